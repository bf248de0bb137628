"""The HTTP planes of the server: routes, access, replies."""

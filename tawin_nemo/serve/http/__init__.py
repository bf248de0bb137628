"""The HTTP side of the server: two planes on two ports.

``server``: sockets, signals and shutdown. ``data_plane``, ``control``: the routes. ``middleware``: request ids, log,
keys, body limits. ``requests``, ``replies``: between the API's models and the engine's jobs. ``weight_updates``:
weights through a process group. ``follower``: published versions. ``errors``: error responses. ``openapi``: writes the
OpenAPI documents.
"""

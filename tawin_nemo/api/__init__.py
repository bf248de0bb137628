"""Requests, replies and the client of the generation server: what both a server and its callers know."""

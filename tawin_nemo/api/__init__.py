"""The interface of the generation server, shared by the server and its callers.

``client``: typed clients of both planes. ``schema``, ``control_schema``: requests and replies of the data plane and of
the control plane. ``arrays``: the binary body of rollout replies. ``secrets_files``: keys and tokens from files.
"""

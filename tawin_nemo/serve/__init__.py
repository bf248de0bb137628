"""The generation server: recommendations, scores, completions and rollouts over HTTP.

``http``: the data plane for users and training jobs, and the control plane for operators. ``engine``: one thread that
runs the requests of all clients in shared decoding steps. The API's models and clients are in ``tawin_nemo.api``.
"""

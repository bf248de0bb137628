"""The engine behind the server.

``engine``: queue, decoding thread. ``swaps``: changes of weights and catalog. ``jobs``: requests, results, admission.
``running``: the running jobs and their shared steps. ``catalog``: the served items and their changes. ``numbering``:
item numbers over published versions. ``telemetry``: metrics and the event log. ``orders``, ``ranks``, ``replica``:
commands from rank 0 to all ranks of a model and their execution. ``weight_sources``: new weights from disk or memory.
"""

"""CUDA graphs as a CPU can have them: a capture writes down every operation with its tensors, a replay repeats them.

As on a GPU, a replay reads and writes the memory of the capture and follows no Python: whatever the captured function
decided on the host, or a tensor that it would make anew in other memory, is as it was at the capture.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves


class _Recorder(TorchDispatchMode):
    def __init__(self, calls: list[tuple[Any, ...]]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "_local_scalar_dense" not in str(func), "a capture would fail: the host reads a number"
        result = func(*args, **(kwargs or {}))
        fresh = all(value.alias_info is None for value in func._schema.returns)
        self.calls.append((func, args, kwargs or {}, result if fresh else None))
        return result


class RecordedGraph:
    """What ``torch.cuda.CUDAGraph`` and ``torch.cuda.graph`` do, after ``install``; ``replays`` are counted."""

    replays = 0
    captures = 0

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def replay(self) -> None:
        with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
            for func, args, kwargs, result in self.calls:
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=False):
                    if isinstance(old, Tensor):
                        old.copy_(new)
        torch.zeros(1)  # outside of the replayed list: the launch of the graph, for those who count
        RecordedGraph.replays += 1

    @classmethod
    def install(cls, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let torch's graphs be these, and streams nothing."""
        stream = type("Stream", (), {"wait_stream": lambda self, other: None})
        monkeypatch.setattr(cls, "replays", 0)
        monkeypatch.setattr(cls, "captures", 0)
        monkeypatch.setattr(torch.cuda, "Stream", stream)
        monkeypatch.setattr(torch.cuda, "current_stream", stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        monkeypatch.setattr(torch.cuda, "CUDAGraph", cls)
        monkeypatch.setattr(torch.cuda, "graph", cls.recording)

    @staticmethod
    def recording(graph: RecordedGraph, *, pool: Any, capture_error_mode: str) -> _Recorder:
        assert capture_error_mode == "thread_local"
        RecordedGraph.captures += 1
        return _Recorder(graph.calls)

"""A function of static tensors as one CUDA graph: hundreds of kernels for the price of one launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

#: Calls before the capture, in which libraries choose their kernels and allocate their workspaces.
_WARM_UP = 2


class Replayed:
    """Calls a function without arguments or results: captured at the first call on a CUDA device, plainly elsewhere.

    The function must do the same operations on the same memory at every call and never make the host wait for the
    device. ``addresses`` says where that memory is: when it changes (weights were moved), the function is captured
    again. ``state``: the tensors that the function changes and reads again, restored after the calls of the warm-up.
    Graphs that share ``pool`` share the memory of their intermediate results, so they must run one after the other.
    """

    def __init__(
        self,
        function: Callable[[], None],
        device: torch.device,
        *,
        addresses: Callable[[], tuple[int, ...]],
        state: Callable[[], Sequence[Tensor]],
        pool: Any = None,
    ) -> None:
        self._function, self._device, self._pool = function, device, pool
        self._addresses, self._state = addresses, state
        self._graph: Any = None
        self._captured_at: tuple[int, ...] = ()

    def __call__(self) -> None:
        """Run the function; on a CUDA device the host waits for nothing, unless it has to capture first."""
        if self._device.type != "cuda":
            self._function()
            return
        if self._graph is None:
            self.capture()
        self._graph.replay()

    def capture(self) -> None:
        """Capture the function in a graph, which changes no tensor. Raises what torch raises if that is impossible."""
        before = [tensor.clone() for tensor in self._state()]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: NCCL's watchdog, another thread, may ask its events while this one captures
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._function()
        for tensor, old in zip(self._state(), before, strict=True):
            tensor.copy_(old)
        self._graph, self._captured_at = graph, self._addresses()

    def check_addresses(self) -> None:
        """Forget the graph if something it reads or writes has moved since it was captured."""
        if self._graph is not None and self._captured_at != self._addresses():
            self._graph = None

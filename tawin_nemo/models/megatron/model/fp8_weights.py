"""FP8 in decoding: quantised weights that are kept from one model call to the next, and sequence parallelism.

Weights are bf16, and Transformer Engine quantises them in every call unless ``is_first_microbatch`` is given: True
quantises and keeps the result in the module, False uses what is kept ("FP8 weight caching" of its documentation). A
call that quantises reads the bf16 weights and writes the FP8 ones before it computes; a call of decoding has few
tokens, so that this is most of what it moves. megatron-core's layers pass the flag on when
``disable_parameter_transpose_cache`` is off; it is on in training, whose passes never use what is kept here. Importing
this module does not import Transformer Engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch


class QuantisedWeights:
    """The FP8 weights that the linear layers of ``model`` keep. Without FP8 it does nothing.

    They are made by the first call after construction or ``renew``, and take one byte per weight.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        config: Any = model.config
        modules = model.modules() if config.fp8 is not None else ()
        self._layers: list[Any] = [layer for layer in modules if hasattr(layer, "disable_parameter_transpose_cache")]
        self._current = False

    def renew(self) -> None:
        """The weights have changed: the next call quantises them again."""
        self._current = False

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Inside the block a forward pass keeps quantised weights, and uses those that are kept and current."""
        before = [layer.disable_parameter_transpose_cache for layer in self._layers]
        for layer in self._layers:
            layer.disable_parameter_transpose_cache = False
            layer.is_first_microbatch = not self._current
        try:
            yield
            self._current = True
        finally:
            for layer, value in zip(self._layers, before, strict=True):
                layer.disable_parameter_transpose_cache = value


class _Config(Protocol):
    sequence_parallel: bool
    fp8: Any


def keeps_sequence_parallel(config: _Config) -> bool:
    """Whether decoding must leave sequence parallelism as training has it.

    Transformer Engine fixes the layout of its quantised tensors, and whether scales are common to all ranks, at a
    module's first FP8 pass, from the flags of that pass. A later pass with other flags fails (block scaling) or reads
    with wrong scales, without an error (tensor-wise scaling).
    """
    return bool(config.sequence_parallel) and config.fp8 is not None

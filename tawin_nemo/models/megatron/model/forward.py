"""A forward pass over packed token trees: padding for the layout, the stage's output, the wanted log-probs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import unwrap_model
from torch import Tensor

from tawin_nemo.models.megatron.model.fp8_scales import calibrate
from tawin_nemo.models.megatron.model.head import child_logprobs, select_rows, token_logprobs
from tawin_nemo.models.megatron.model.precision import row_multiple
from tawin_nemo.models.megatron.model.tree_plan import TreePlan
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.types import Children, TokenBatch
from tawin_nemo.util.torch_modes import without_modes
from tawin_nemo.util.transfers import to_device

#: Attributes of megatron's modules for activations that are split along the sequence.
_SEQUENCE_FLAGS = ("sequence_parallel", "reduce_scatter_embeddings", "scatter_to_sequence_parallel")


def padding(tokens: int, config: TransformerConfig) -> int:
    """Padding tokens that layout and precision need behind a flat row of this many tokens.

    Plans give these tokens no attention, and nothing is read behind them, so they change no log-prob and no gradient
    (delayed and tensor-wise FP8 excepted: a scale is chosen over all rows of a pass).
    """
    return -tokens % row_multiple(config)


def hidden_states(model: torch.nn.Module, batch: TokenBatch) -> Tensor:
    """This stage's output [S, 1, D] of the one flat row (under sequence parallelism this TP rank's part of S)."""
    extra = padding(len(batch.tokens_S), unwrap_model(model).config)
    tokens_BS = to_device([F.pad(batch.tokens_S.cpu(), (0, extra))], runtime.device())[0][None]
    plan = TreePlan(batch, runtime.device(), padding=extra)
    with without_modes():
        run = partial(model, tokens_BS, None, None, packed_seq_params=plan)
        calibrate(unwrap_model(model), run)
        return run()


def batch_logprobs(model: torch.nn.Module, batch: TokenBatch, hidden_SBD: Tensor) -> Tensor:
    """Log-probs [N] of the batch's targets in the batch's score space; last pipeline stage only."""
    bare: GPTModel = unwrap_model(model)
    edges = batch.children
    read = [batch.row_N, batch.target_N] if edges is None else [edges.position_E, edges.token_E, edges.chosen_N]
    index_P, *read = to_device([part.cpu() for part in (batch.index_P, *read)], hidden_SBD.device)
    hidden_PD = select_rows(bare, hidden_SBD, index_P)
    return token_logprobs(bare, hidden_PD, *read) if edges is None else child_logprobs(bare, hidden_PD, Children(*read))


def logit_dtype(model: torch.nn.Module) -> torch.dtype:
    """Type of logits and log-probs: float32, or float64 for a double model."""
    return torch.float64 if next(model.parameters()).dtype == torch.float64 else torch.float32


@contextlib.contextmanager
def modes(model: torch.nn.Module, *, training: bool) -> Iterator[None]:
    """Training or evaluation mode inside the block; the previous mode is restored after it."""
    before = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(before)


@contextlib.contextmanager
def without_sequence_parallel(model: GPTModel) -> Iterator[None]:
    """Switch sequence parallelism off: a decoding step has few tokens. megatron reads these flags in every forward."""
    if not model.config.sequence_parallel:
        yield
        return
    holders = [model.config, *model.modules()]
    flagged = [(holder, flag) for holder in holders for flag in _SEQUENCE_FLAGS if getattr(holder, flag, None) is True]
    try:
        for holder, flag in flagged:
            setattr(holder, flag, False)
        yield
    finally:
        for holder, flag in flagged:
            setattr(holder, flag, True)

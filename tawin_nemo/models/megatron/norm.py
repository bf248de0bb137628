"""RMSNorm that works under sequence parallelism without Transformer Engine or Apex."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (arXiv 1910.07467), computed in float32 or wider.

    Under sequence parallelism each TP rank sees a part of the tokens, so the weight carries ``sequence_parallel=True``
    and megatron's ``finalize_model_grads`` sums its gradient over the TP group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **unused: object) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        normed = torch.nn.functional.rms_norm(wide, (wide.shape[-1],), None, self.eps)
        return normed.to(x.dtype) * self.weight

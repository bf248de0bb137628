"""Residual quantiser with straight-through gradients, and the autoencoder around it, as torch modules.

N rows, L levels, K codes per level, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tawin_nemo.semantic_ids.clustering import transport_plan

SINKHORN_ITERATIONS = 50


@dataclass(frozen=True)
class QuantizerOutput:
    """``latent_ND`` equals the sum of the code vectors; its gradient goes to the encoder unchanged."""

    latent_ND: Tensor
    codes_NL: Tensor
    residuals_LND: Tensor  # input of each level, without gradient
    codebook_loss: Tensor
    commitment_loss: Tensor


class ResidualQuantiser(nn.Module):
    """L codebooks of K vectors, each for the residual of the levels before.

    Residual quantisation with commitment to every partial sum (Lee et al. 2022, "Autoregressive image generation using
    residual quantization", Eq. 5-8; the straight-through estimator of van den Oord et al. 2017). Losses are means over
    rows and dimensions, summed over the levels.
    """

    def __init__(self, levels: int, codes: int, dims: int) -> None:
        super().__init__()
        self.vectors_LKD = nn.Parameter(torch.zeros(levels, codes, dims))

    def forward(self, latent_ND: Tensor, epsilons_L: tuple[float, ...] = ()) -> QuantizerOutput:
        """``epsilons_L``: Sinkhorn's entropy per level, as a share of the largest distance (0 = the nearest code)."""
        residual_ND, codes, rests = latent_ND, [], []
        codebook_loss = commitment_loss = latent_ND.new_zeros(())
        for level, vectors_KD in enumerate(self.vectors_LKD):
            epsilon = epsilons_L[level] if epsilons_L else 0.0
            code_N = choose(residual_ND.detach(), vectors_KD.detach(), epsilon)
            chosen_ND = vectors_KD[code_N]
            rests.append(residual_ND.detach())
            codes.append(code_N)
            codebook_loss = codebook_loss + F.mse_loss(chosen_ND, residual_ND.detach())
            commitment_loss = commitment_loss + F.mse_loss(residual_ND, chosen_ND.detach())
            residual_ND = residual_ND - chosen_ND.detach()
        # the value of the sum of the chosen vectors, the gradient of the latent
        through_ND = latent_ND - residual_ND.detach()
        return QuantizerOutput(through_ND, torch.stack(codes, 1), torch.stack(rests), codebook_loss, commitment_loss)


def choose(residual_ND: Tensor, vectors_KD: Tensor, epsilon: float) -> Tensor:
    """The nearest vector of each row, or with ``epsilon`` > 0 the one with the most mass in a balanced plan."""
    distance_NK = torch.addmm(vectors_KD.square().sum(1), residual_ND, vectors_KD.T, alpha=-2)
    if epsilon == 0:
        return distance_NK.argmin(dim=1)
    distance_NK = (distance_NK + residual_ND.square().sum(1, keepdim=True)).clamp_min(0)
    cost_NK = distance_NK / distance_NK.max().clamp_min(1e-12)
    mass_K = torch.full((len(vectors_KD),), len(residual_ND) / len(vectors_KD), device=residual_ND.device)
    return transport_plan(cost_NK, mass_K, epsilon=epsilon, iterations=SINKHORN_ITERATIONS).argmax(dim=1)


@dataclass(frozen=True)
class NetworkShape:
    """Widths of encoder and decoder: ``dims`` -> ``widths`` -> ``latent`` and back.

    ``residual``: both add their output to their input and begin as the identity (RQ-k-means+); ``latent`` = ``dims``.
    """

    kind: str  # mlp | residual
    dims: int
    widths: tuple[int, ...]
    latent: int


class Autoencoder(nn.Module):
    """Encoder and decoder around the codebooks, for vectors that are shifted and scaled to variance 1 first."""

    mean_D: Tensor
    scale: Tensor

    def __init__(self, shape: NetworkShape, levels: int, codes: int) -> None:
        super().__init__()
        self.shape = shape
        sizes = (shape.dims, *shape.widths, shape.latent)
        wrap: Callable[[nn.Sequential], nn.Module] = _Residual if shape.kind == "residual" else lambda inner: inner
        self.encoder, self.decoder = wrap(_mlp(sizes)), wrap(_mlp(sizes[::-1]))
        self.quantiser = ResidualQuantiser(levels, codes, shape.latent)
        self.register_buffer("mean_D", torch.zeros(shape.dims))
        self.register_buffer("scale", torch.ones(()))

    def encode(self, x_ND: Tensor) -> Tensor:
        """Latent vectors of N item vectors, [N, latent dimensions]; inputs are standardised first."""
        latent_ND: Tensor = self.encoder((x_ND - self.mean_D) / self.scale)
        return latent_ND

    def decode(self, latent_ND: Tensor) -> Tensor:
        """Item vectors, in their original scale, of N latent vectors."""
        x_ND: Tensor = self.decoder(latent_ND) * self.scale + self.mean_D
        return x_ND


class _Residual(nn.Module):
    def __init__(self, inner: nn.Sequential) -> None:
        super().__init__()
        self.inner = inner
        last = inner[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x_ND: Tensor) -> Tensor:
        sum_ND: Tensor = x_ND + self.inner(x_ND)
        return sum_ND


def _mlp(sizes: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for into, out in pairwise(sizes):
        layers += [nn.Linear(into, out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])

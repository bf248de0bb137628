"""Training of RQ-VAE and of RQ-k-means+'s refinement: epochs over the item vectors, resumable, equal by seed."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tawin_nemo.config.schema import RqVaeConfig
from tawin_nemo.semantic_ids.clustering import check_enough_distinct, check_enough_items, residual_kmeans, total_std
from tawin_nemo.semantic_ids.quantiser import Autoencoder, NetworkShape, QuantizerOutput
from tawin_nemo.util.errors import DataError
from tawin_nemo.util.files import atomic_path
from tawin_nemo.util.log import progress, say

#: Rows of latents that a codebook's k-means starts from, per code.
INIT_ROWS_PER_CODE = 64
#: Added to every code's count where its moving average is divided by it (van den Oord et al. 2017, Appendix A.1).
EMA_SMOOTHING = 1e-5

#: Called after each epoch with (epoch, mean reconstruction error).
EpochCallback = Callable[[int, float], None]


@dataclass(frozen=True)
class Plan:
    """Settings of a training besides RqVaeConfig: sizes, seed and initialisation of the codebooks."""

    levels: int
    codes: int
    seed: int
    kmeans_iterations: int
    residual: bool  # RQ-k-means+: networks around the codebooks of residual k-means


def train_quantiser(
    x_ID: np.ndarray,
    cfg: RqVaeConfig,
    plan: Plan,
    *,
    checkpoint: Path | None = None,
    on_epoch: EpochCallback | None = None,
) -> Autoencoder:
    """Train an autoencoder with residual codebooks; returns it in evaluation mode, on the CPU.

    ``checkpoint``: file that keeps the state every ``cfg.save_interval`` epochs; a run with the same vectors and
    settings continues from it with the same result as an uninterrupted one. Raises DataError for fewer items, or
    fewer different ones, than codes.
    """
    check_enough_items(len(x_ID), plan.codes)
    check_enough_distinct(x_ID, plan.codes, 0, total_std(x_ID))
    run = _Training(x_ID, cfg, plan)
    begin = run.restore(checkpoint) if checkpoint else 0
    for epoch in progress(range(begin, cfg.epochs), what="quantiser, epochs", total=cfg.epochs, initial=begin):
        loss = run.epoch(epoch)
        if on_epoch:
            on_epoch(epoch, loss)
        if checkpoint and (epoch + 1) % cfg.save_interval == 0:
            run.save(checkpoint, epoch + 1)
    return run.model.cpu().eval()


class _Training:
    def __init__(self, x_ID: np.ndarray, cfg: RqVaeConfig, plan: Plan) -> None:
        self.cfg, self.plan = cfg, plan
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.key = _fingerprint(x_ID, cfg, plan)
        self.draw = torch.Generator().manual_seed(plan.seed)
        self.x_ID = torch.from_numpy(np.array(x_ID, dtype=np.float32)).to(self.device)
        dims = x_ID.shape[1]
        shape = (
            NetworkShape("residual", dims, tuple(cfg.widths), dims)
            if plan.residual
            else NetworkShape("mlp", dims, tuple(cfg.widths), cfg.latent)
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(plan.seed)
            self.model = Autoencoder(shape, plan.levels, plan.codes).to(self.device)
        self.model.mean_D.copy_(self.x_ID.mean(dim=0))
        self.model.scale.copy_((self.x_ID - self.model.mean_D).square().mean().sqrt())
        self._start_codebooks()
        books = self.model.quantiser.vectors_LKD
        books.requires_grad_(cfg.update == "gradient")
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
        self.count_LK = torch.ones(books.shape[:2], device=self.device)  # moving averages, for update=ema
        self.total_LKD = books.detach().clone()
        self.idle_LK = torch.zeros(books.shape[:2], dtype=torch.int64)  # epochs since a code was used
        self.epsilons_L = _epsilons(cfg, plan.levels)

    def _start_codebooks(self) -> None:
        """Residual k-means of the first latents (RQ-k-means+: of all vectors)."""
        rows = len(self.x_ID) if self.plan.residual else min(len(self.x_ID), INIT_ROWS_PER_CODE * self.plan.codes)
        sample = torch.randperm(len(self.x_ID), generator=self.draw)[:rows].to(self.device)
        with torch.no_grad():
            latents = self.model.encode(self.x_ID[sample.sort().values]).cpu().numpy()
        books, _ = residual_kmeans(
            latents, levels=self.plan.levels, codes=self.plan.codes, seed=self.plan.seed,
            iterations=self.plan.kmeans_iterations,
        )  # fmt: skip
        with torch.no_grad():
            self.model.quantiser.vectors_LKD.copy_(torch.from_numpy(books.vectors_LKD))

    def epoch(self, epoch: int) -> float:
        """One pass; returns the mean squared error of reconstruction, in units of the vectors' variance."""
        cfg, items = self.cfg, len(self.x_ID)
        order = torch.randperm(items, generator=self.draw)
        steps = math.ceil(items / cfg.batch_size)
        used_LK = torch.zeros_like(self.idle_LK)
        total = 0.0
        for step, rows in enumerate(order.split(cfg.batch_size)):
            for group in self.optimizer.param_groups:
                group["lr"] = cfg.lr * (1 + math.cos(math.pi * (epoch + step / steps) / cfg.epochs)) / 2
            loss, output = self._step(self.x_ID[rows.to(self.device)])
            total += loss * len(rows)
            for level, code_N in enumerate(output.codes_NL.T.cpu()):
                used_LK[level].index_add_(0, code_N, torch.ones_like(code_N))
        self.idle_LK = torch.where(used_LK > 0, 0, self.idle_LK + 1)
        if cfg.restart_after and epoch < cfg.epochs - 1:
            self._restart_idle(output)
        return total / items

    def _step(self, x_ND: Tensor) -> tuple[float, QuantizerOutput]:
        model = self.model
        output = model.quantiser(model.encode(x_ND), self.epsilons_L)
        error = F.mse_loss(model.decode(output.latent_ND), x_ND) / model.scale**2
        loss = error + self.cfg.commitment * output.commitment_loss
        if self.cfg.update == "gradient":
            loss = loss + output.codebook_loss
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        if self.cfg.update == "ema":
            self._move_codebooks(output)
        return float(error.detach()), output

    @torch.no_grad()
    def _move_codebooks(self, output: QuantizerOutput) -> None:
        """Move the codebooks to exponential moving averages of the residuals that chose their codes."""
        decay = self.cfg.ema_decay
        for level, residual_ND in enumerate(output.residuals_LND):
            code_N = output.codes_NL[:, level]
            count_K = torch.zeros_like(self.count_LK[level]).index_add_(0, code_N, torch.ones_like(residual_ND[:, 0]))
            total_KD = torch.zeros_like(self.total_LKD[level]).index_add_(0, code_N, residual_ND)
            self.count_LK[level].lerp_(count_K, 1 - decay)
            self.total_LKD[level].lerp_(total_KD, 1 - decay)
            all_counts = self.count_LK[level].sum()
            smooth_K = (self.count_LK[level] + EMA_SMOOTHING) / (all_counts + self.plan.codes * EMA_SMOOTHING)
            self.model.quantiser.vectors_LKD[level] = self.total_LKD[level] / (smooth_K * all_counts)[:, None]

    @torch.no_grad()
    def _restart_idle(self, output: QuantizerOutput) -> None:
        """Reset codes that were unused for ``restart_after`` epochs to random rows of the last batch."""
        for level, residual_ND in enumerate(output.residuals_LND):
            idle = torch.nonzero(self.idle_LK[level] >= self.cfg.restart_after)[:, 0]
            rows = torch.randint(len(residual_ND), (len(idle),), generator=self.draw)
            if len(idle):
                fresh_ND = residual_ND[rows.to(self.device)]
                self.model.quantiser.vectors_LKD[level, idle.to(self.device)] = fresh_ND
                self.count_LK[level, idle.to(self.device)] = 1.0
                self.total_LKD[level, idle.to(self.device)] = fresh_ND
                self.idle_LK[level, idle] = 0

    # -- resume -----------------------------------------------------------------------------------------------------
    def save(self, path: Path, epochs: int) -> None:
        state = {
            "key": self.key, "epochs": epochs, "model": self.model.state_dict(), "draw": self.draw.get_state(),
            "optimizer": self.optimizer.state_dict(), "count": self.count_LK, "total": self.total_LKD,
            "idle": self.idle_LK,
        }  # fmt: skip
        with atomic_path(path) as temporary:
            torch.save(state, temporary)

    def restore(self, path: Path) -> int:
        """Load the state in ``path``; returns the epochs that are done, 0 without a file of the same training."""
        if not path.is_file():
            return 0
        try:
            state: dict[str, Any] = torch.load(path, map_location=self.device, weights_only=True)
            key = state["key"]
        except (pickle.UnpicklingError, RuntimeError, ValueError, KeyError, TypeError, EOFError) as error:
            reason = str(error).strip().splitlines()[0]
            raise DataError(f"{path} is no state of a quantiser's training ({reason}); remove it") from error
        if key != self.key:
            say(f"{path} belongs to another training (other vectors or settings); starting again")
            return 0
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.draw.set_state(state["draw"].cpu())
        self.count_LK, self.total_LKD, self.idle_LK = state["count"], state["total"], state["idle"].cpu()
        return int(state["epochs"])


def _epsilons(cfg: RqVaeConfig, levels: int) -> tuple[float, ...]:
    if cfg.sinkhorn == "off":
        return (0.0,) * levels
    return tuple(
        cfg.sinkhorn_epsilon if cfg.sinkhorn == "all" or level == levels - 1 else 0.0 for level in range(levels)
    )


def _fingerprint(x_ID: np.ndarray, cfg: RqVaeConfig, plan: Plan) -> str:
    """Of all that decides about the result."""
    settings = asdict(cfg) | {"plan": asdict(plan), "shape": list(x_ID.shape)}
    del settings["save_interval"]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(np.ascontiguousarray(x_ID, dtype=np.float32).tobytes())
    return digest.hexdigest()

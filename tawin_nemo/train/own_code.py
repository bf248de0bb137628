"""Rewards, advantages, candidate weights, policy losses and rejected items that a recipe names by import path.

Each is wrapped so that what it returns is checked where it returns it: the right shape, numbers, no NaN. ``train``
calls each once on two rows of train before anything is trained (``requirements``). Axes as in ``types``; R rows, N
rejected items of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tawin_nemo.config.schema import PreferenceConfig, RlConfig
from tawin_nemo.config.seams import made
from tawin_nemo.data.samples import Samples
from tawin_nemo.maths.policy_loss import Counts, Objective, PolicyTerms, token_stats
from tawin_nemo.run.world import World
from tawin_nemo.types import NO_ITEM, Rollout
from tawin_nemo.util.errors import ConfigError
from tawin_nemo.util.imports import described


class PolicyLoss(Protocol):
    """A policy objective, as ``maths.grpo.grpo_loss``: this process's share of the loss, and statistics to sum."""

    def __call__(
        self, logp_N: Tensor, terms: PolicyTerms, counts: Counts, objective: Objective
    ) -> tuple[Tensor, dict[str, Tensor]]: ...


@dataclass(frozen=True, eq=False)
class OwnGroupValues:
    """A function of one's own that gives every candidate a number: a reward, an advantage or a weight."""

    key: str
    path: str
    function: Callable[..., Any]

    def __call__(self, *arguments: Any) -> Tensor:
        """[B, G] float32, 0 at padding. The last of ``arguments`` is the rollout.

        A single reward may be NaN: the step leaves its candidate out. Raises ConfigError for another shape, for other
        values that are not finite, and for rewards of which none is.
        """
        rollout: Rollout = arguments[-1]
        valid_BG = rollout.valid_BG.cpu()
        value = self.function(*arguments)
        try:
            values_BG = torch.as_tensor(value).detach().to("cpu", torch.float32)
        except (TypeError, ValueError, RuntimeError):
            raise self.wrong(f"an object of type {type(value).__name__}", valid_BG) from None
        if values_BG.shape != valid_BG.shape:
            raise self.wrong(f"shape {list(values_BG.shape)}", valid_BG)
        finite = values_BG[valid_BG].isfinite()
        enough = finite.any() or not len(finite) if self.key == "rl.reward" else finite.all()
        if not bool(enough):
            raise self.wrong(f"{int((~finite).sum())} values that are not finite", valid_BG)
        return torch.where(valid_BG, values_BG, 0.0)

    def wrong(self, found: str, valid_BG: Tensor) -> ConfigError:
        shape = list(valid_BG.shape)
        return ConfigError(
            f"{self.key}={self.path} returned {found}; expected one finite number per candidate, {shape}"
        )


def own_group_values(key: str, path: str, world: World) -> OwnGroupValues:
    """The function or object at ``path``, checked. Raises ConfigError as ``seams.made``."""
    return OwnGroupValues(key, path, made(key, path, world))


def own_policy_loss(path: str) -> PolicyLoss:
    """The policy objective at ``path``; statistics of tokens that it does not return are added for the log.

    Raises ConfigError as ``seams.made``; when called, for anything but a scalar loss with a dictionary of tensors.
    """
    function = made("rl.algorithm", path)

    def loss(
        logp_N: Tensor, terms: PolicyTerms, counts: Counts, objective: Objective
    ) -> tuple[Tensor, dict[str, Tensor]]:
        result = function(logp_N, terms, counts, objective)
        pair = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
        value, stats = pair
        if not (isinstance(value, Tensor) and value.numel() == 1 and isinstance(stats, dict)):
            raise ConfigError(
                f"rl.algorithm={path} returned {_kind(result)}; expected (loss, statistics): a tensor of one number "
                "and a dictionary of tensors, which may be empty"
            )
        plain = {"policy_loss": value.detach(), "loss": value.detach()}
        clipped_N = torch.zeros_like(logp_N, dtype=torch.bool)
        return value.reshape(()), plain | token_stats(logp_N, terms, clipped_N) | stats

    return loss


def _kind(result: Any) -> str:
    if isinstance(result, tuple):
        return f"a tuple of {', '.join(type(part).__name__ for part in result)}"
    return f"an object of type {type(result).__name__}"


@dataclass(frozen=True, eq=False)
class OwnNegatives:
    """Rejected items of preference optimisation from a function of one's own: pure in its arguments, on every rank."""

    path: str
    function: Callable[..., Any]
    samples: Samples
    leaf_I: np.ndarray
    num: int

    def items(self, rows: np.ndarray, step: int) -> np.ndarray:
        """[R, N] int64; NO_ITEM where there are fewer. Raises ConfigError for a wrong shape, type or item."""
        items_RN = np.asarray(self.function(rows, step, self.num))
        wanted = (len(rows), self.num)
        if items_RN.shape != wanted or items_RN.dtype.kind not in "iu":
            raise self.wrong(f"shape {list(items_RN.shape)} of {items_RN.dtype}; expected {list(wanted)} of int64")
        items_RN = items_RN.astype(np.int64)
        if ((items_RN < NO_ITEM) | (items_RN >= len(self.leaf_I))).any():
            raise self.wrong(f"items that do not exist; expected 0 .. {len(self.leaf_I) - 1}, or {NO_ITEM} for none")
        target_R1 = self.leaf_I[self.samples.target_N[rows]][:, None]
        if ((self.leaf_I[items_RN] == target_R1) & (items_RN != NO_ITEM)).any():
            raise self.wrong("the target of a row among its rejected items, or an item written like it")
        return items_RN

    def wrong(self, found: str) -> ConfigError:
        return ConfigError(f"preference.negatives={self.path} returned {found}")


def own_negatives(cfg: PreferenceConfig, world: World) -> OwnNegatives:
    """The source at ``preference.negatives``. Raises ConfigError as ``seams.made``."""
    function = made("preference.negatives", cfg.negatives, world)
    return OwnNegatives(cfg.negatives, function, world.samples["train"], world.catalog.leaf_I, cfg.num_negatives)


# -- before anything is trained --------------------------------------------------------------------------------------
def probe_rollout(world: World, size: int = 3) -> Rollout:
    """Two rows of train with their targets and the first other items of the catalog, as a search returns them."""
    prompts = world.samples["train"].prompt_batch(np.arange(min(2, len(world.samples["train"]))))
    leaf_I, paths = torch.from_numpy(world.catalog.leaf_I), world.catalog.paths
    groups = []
    for target in prompts.target_B.tolist():
        others = [item for item in range(min(len(world.catalog), 64)) if leaf_I[item] != leaf_I[target]]
        groups.append([*others[:1], target, *others[1 : size - 1]][:size])
    items_BG = torch.tensor(groups)
    tokens, lengths = paths.take(items_BG.flatten().numpy()).padded()
    scores_BG = -torch.arange(1.0, items_BG.shape[1] + 1).repeat(len(groups), 1)
    return Rollout(
        prompts, items_BG, tokens.view(*items_BG.shape, -1), lengths.view(items_BG.shape), scores_BG, None,
        leaf_I[items_BG] == leaf_I[prompts.target_B][:, None], weight_version=0,
    )  # fmt: skip


def probed(key: str, path: str, call: Callable[[], Any]) -> Any:
    """The result of ``call``, which runs code of one's own. Raises ConfigError instead of whatever it raises."""
    try:
        return call()
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{key}={path} failed on two rows of train: {described(error)}") from error


def probe_policy_loss(rl: RlConfig, loss: PolicyLoss) -> None:
    """Call ``loss`` on three tokens of two candidates. Raises ConfigError when it fails or gives no gradient."""
    logp_N = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    terms = PolicyTerms(
        candidate_N=torch.tensor([0, 0, 1]), old_logp_N=logp_N.detach().clone(),
        ref_logp_N=logp_N.detach() - 0.1 if rl.beta > 0 else None,
        advantage_M=torch.tensor([1.0, -1.0]), omega_M=torch.ones(2), length_M=torch.tensor([2, 1]),
    )  # fmt: skip
    objective = Objective(rl.clip_low, rl.clip_high, rl.beta, rl.kl)
    value, _ = probed("rl.algorithm", rl.algorithm, lambda: loss(logp_N, terms, Counts(2, 3), objective))
    if not value.requires_grad:
        raise ConfigError(f"rl.algorithm={rl.algorithm} returned a loss without a gradient; compute it from logp_N")

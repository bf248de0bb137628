"""Checkpoints of sequential recommenders, and a finished baseline stage as a scorer.

A stage directory (``RUN_DIR/sasrec``) holds ``model.json`` (the Blueprint), ``checkpoints/step_N/`` with weights.pt,
optimizer.pt and state.json (which carries their checksums), and, when it has ended, ``done.json``. With
``baseline.items=text`` it also holds the vectors of the item texts, ``text_vectors/``.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tawin_nemo.baselines.build import Blueprint, build_recommender, items_fingerprint
from tawin_nemo.baselines.protocol import SequentialRecommender, left_padded
from tawin_nemo.baselines.text_items import TEXT_VECTORS, stored_vectors
from tawin_nemo.types import TokenRows
from tawin_nemo.util.errors import CheckpointError, ConfigError
from tawin_nemo.util.files import atomic_directory, sha256

MODEL_FILE, STATE_FILE, DONE_FILE = "model.json", "state.json", "done.json"
WEIGHTS, OPTIMIZER = "weights.pt", "optimizer.pt"


@dataclass(frozen=True, eq=False)
class ModelAndOptimizer:
    """A model and its optimizer, saved and restored together."""

    model: SequentialRecommender
    optimizer: torch.optim.Optimizer


def load_baseline(
    stage_dir: str | Path,
    *,
    external_ids: Sequence[str] | None = None,
    device: torch.device | str = "cpu",
) -> SequentialRecommender:
    """The chosen checkpoint of a finished baseline stage, in eval mode and without gradients.

    Call ``scores(history_BL)`` on rows from ``left_padded``. ``external_ids``: the items of the caller's
    catalog, which must be the model's. Raises ConfigError when the stage is not a finished baseline or is of another
    catalog, CheckpointError when its checkpoint is damaged or its text vectors are missing or others.
    """
    folder = Path(stage_dir)
    if not ((folder / DONE_FILE).is_file() and (folder / MODEL_FILE).is_file()):
        raise ConfigError(
            f"{folder} is not a finished baseline stage ({DONE_FILE} and {MODEL_FILE}); "
            "name the folder RUN_DIR/MODEL of a run with baseline.model=MODEL"
        )
    blueprint = stored_blueprint(folder)
    if external_ids is not None:
        _check_items(folder, blueprint, external_ids)
    try:
        step = int(json.loads((folder / DONE_FILE).read_text(encoding="utf-8"))["chosen_step"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / DONE_FILE} does not name the step that was chosen ({error!r})") from error
    text_IE = None if blueprint.config.items == "ids" else stored_vectors(folder / TEXT_VECTORS, blueprint.text)
    model = build_recommender(blueprint, text_IE)
    load_checkpoint(folder / "checkpoints" / f"step_{step}", model)
    return model.to(device).eval().requires_grad_(False)


def _check_items(folder: Path, blueprint: Blueprint, external_ids: Sequence[str]) -> None:
    if len(external_ids) != blueprint.num_items:
        what = f"{folder} ranks {blueprint.num_items} items, but the catalog has {len(external_ids)}"
    elif blueprint.items and blueprint.items != items_fingerprint(external_ids):
        what = f"{folder} ranks as many items as the catalog has, but not the same ones"
    else:
        return
    raise ConfigError(f"{what}; train the baseline on this catalog")


@dataclass(frozen=True, eq=False)
class Scorer:
    """Scores of a trained model for ragged histories, of which it reads the newest ``max_history`` items."""

    model: SequentialRecommender
    max_history: int

    @torch.no_grad()
    def scores(self, histories: Sequence[np.ndarray]) -> Tensor:
        """Scores [B, I], float32 on the CPU; histories are item indices, oldest first, at least one each."""
        rows = TokenRows.from_lists([np.asarray(history)[-self.max_history :] for history in histories])
        device = self.model.representative_I.device
        return self.model.scores(left_padded(rows).to(device)).float().cpu()


def load_scorer(stage: Path, external_ids: Sequence[str], *, key: str = "rl.reward_source") -> Scorer:
    """Load a finished stage that scores every item of the catalog with ``external_ids``, for rewards and searches.

    Raises ConfigError that names ``key``, which says ``stage``, when it is no finished baseline, is of another catalog,
    or is tiger, which scores only what its search finds.
    """
    try:
        model = load_baseline(stage, external_ids=external_ids)
    except ConfigError as error:
        raise ConfigError(f"{key}={stage}: {error}") from error
    blueprint = stored_blueprint(Path(stage))
    if blueprint.config.model == "tiger":
        raise ConfigError(
            f"{key}={stage} is a tiger, which scores only what its search finds; name a gru4rec, caser, sasrec, hstu "
            "or esasrec stage"
        )
    return Scorer(model, blueprint.max_history)


def stored_blueprint(folder: Path) -> Blueprint:
    """The architecture of the baseline stage in ``folder``."""
    return Blueprint.from_json(json.loads((folder / MODEL_FILE).read_text(encoding="utf-8")))


def save_checkpoint(path: Path, trainable: ModelAndOptimizer, state: dict[str, Any]) -> None:
    """Write the checkpoint directory ``path`` atomically."""
    with atomic_directory(path) as temporary:
        torch.save(trainable.model.state_dict(), temporary / WEIGHTS)
        torch.save(trainable.optimizer.state_dict(), temporary / OPTIMIZER)
        record = {"state": state, "files": {name: sha256(temporary / name) for name in (WEIGHTS, OPTIMIZER)}}
        (temporary / STATE_FILE).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Restore weights (and the optimizer, where one is given); return the saved ``state``.

    Raises CheckpointError when the checkpoint is incomplete, damaged, or of another model.
    """
    problem = find_problem(path)
    if problem is not None:
        raise CheckpointError(
            f"{path}: {problem}; train the stage again, or remove this checkpoint to use an older one"
        )
    device = next(model.parameters()).device
    try:
        model.load_state_dict(torch.load(path / WEIGHTS, map_location=device, weights_only=True))
        if optimizer is not None:
            optimizer.load_state_dict(torch.load(path / OPTIMIZER, map_location=device, weights_only=True))
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{path} holds more than tensors and numbers, and is not loaded ({reason})") from error
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is of another model: {error}") from error
    return dict(json.loads((path / STATE_FILE).read_text(encoding="utf-8"))["state"])


def find_problem(path: Path) -> str | None:
    """The reason why ``path`` is not a complete, undamaged checkpoint; None if it is one."""
    try:
        files = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))["files"]
        damaged = [name for name in (WEIGHTS, OPTIMIZER) if sha256(path / name) != files[name]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"a file is missing or unreadable ({error})"
    return f"the checksum of {damaged[0]} is wrong" if damaged else None

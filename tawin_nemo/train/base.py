"""The frozen weights below adapters (``model.lora``): which they are, whether they are still the same, where they lie.

A checkpoint of adapters names its base: random weights of a seed, a pretrained model, or another checkpoint, which may
hold adapters itself (those of SFT below those of RL). Whole weights come first, then the adapters are merged, the
oldest first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tawin_nemo.models.megatron.checkpoint import adapters, files
from tawin_nemo.models.megatron.hf.files import HfWeights
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.run.trained import run_of
from tawin_nemo.run.world import World
from tawin_nemo.util.errors import CheckpointError, ConfigError
from tawin_nemo.util.files import sha256
from tawin_nemo.util.hub import local_folder


@dataclass(frozen=True)
class Base:
    """Frozen weights, as a checkpoint of adapters stores them.

    ``kind``: random, pretrained or checkpoint. ``source``: a folder or hub name, or a checkpoint, relative to the run
    directory where it lies there. ``seed`` and ``new_tokens`` give random weights and the rows of new tokens.
    """

    kind: str
    source: str = ""
    revision: str = ""
    fingerprint: str = ""
    seed: int = 0
    new_tokens: str = "mean"


@dataclass(frozen=True)
class Origin:
    """Weights to be loaded: those of the checkpoint ``whole``, else those of ``base``; then ``adapters``, in order."""

    base: Base
    whole: Path | None = None
    adapters: tuple[Path, ...] = ()


def own_base(world: World, checkpoint: Path | None) -> Base:
    """What adapters that are trained from ``checkpoint`` on (None: from ``model.init``) belong to. Collective."""
    recipe = world.recipe
    if checkpoint is not None:
        checkpoint, run_dir = checkpoint.absolute(), world.run_dir.absolute()
        inside = checkpoint.is_relative_to(run_dir)
        source = checkpoint.relative_to(run_dir) if inside else checkpoint
        return Base("checkpoint", source.as_posix(), fingerprint=adapters.fingerprint(checkpoint))
    if recipe.model.init == "random":
        return Base("random", seed=recipe.seed)
    folder = local_folder(recipe.model.init, recipe.model.revision)
    return Base(
        "pretrained", recipe.model.init, recipe.model.revision, pretrained_fingerprint(folder), recipe.seed,
        recipe.model.new_tokens,
    )  # fmt: skip


def origin(world: World, checkpoint: Path | None) -> Origin:
    """How the weights of ``checkpoint`` (None: of ``model.init``) are put together. Collective.

    Raises ConfigError when the base of its adapters is gone or has changed, CheckpointError for a damaged record.
    """
    above: list[Path] = []
    while checkpoint is not None:
        record = _record(checkpoint)
        if adapters.BASE not in record:
            return Origin(Base("checkpoint", seed=world.recipe.seed), checkpoint, tuple(above))
        above.insert(0, checkpoint)
        base = _read(checkpoint, record[adapters.BASE])
        if base.kind != "checkpoint":
            return Origin(base if base.kind == "random" else _pretrained(world, checkpoint, base), None, tuple(above))
        checkpoint = _checkpoint_below(checkpoint, base)
    model = world.recipe.model
    kind = "random" if model.init == "random" else "pretrained"
    return Origin(Base(kind, model.init, model.revision, seed=world.recipe.seed, new_tokens=model.new_tokens))


def _record(checkpoint: Path) -> dict[str, Any]:
    try:
        return files.read_record(checkpoint)
    except CheckpointError as error:
        raise CheckpointError(
            f"{checkpoint}: {error}; continue from another checkpoint (newest_valid finds one)"
        ) from error


def _read(checkpoint: Path, stored: Any) -> Base:
    try:
        return Base(**stored)
    except TypeError as error:
        raise CheckpointError(f"{checkpoint} does not say which weights its adapters belong to ({error})") from error


def _checkpoint_below(checkpoint: Path, base: Base) -> Path:
    """The checkpoint whose weights the adapters of ``checkpoint`` belong to."""
    path = Path(base.source)
    if not path.is_absolute():
        path = (run_of(checkpoint) or Path()) / path
    if not (path / files.STATE_FILE).is_file():
        raise ConfigError(
            f"{checkpoint} holds adapters to {path}, which is not there; bring it back (adapters alone are no model)"
        )
    _check_same(checkpoint, base, str(path), adapters.fingerprint(path))
    return path


def _pretrained(world: World, checkpoint: Path, base: Base) -> Base:
    """``base`` at the place where it is now: its own, or ``model.init`` where that is a copy of it."""
    model = world.recipe.model
    places = [(base.source, base.revision), (model.init, model.revision)]
    there = [place for place in dict.fromkeys(places) if place[0] != "random" and local_folder(*place).is_dir()]
    if not there:
        raise ConfigError(
            f"{checkpoint} holds adapters to {base.source}, which is not there; bring it back, or name a copy with "
            "model.init=DIR"
        )
    prints = {place: pretrained_fingerprint(local_folder(*place)) for place in there}
    source, revision = next((place for place in there if prints[place] == base.fingerprint), there[-1])
    _check_same(checkpoint, base, source, prints[source, revision])
    return Base(base.kind, source, revision, base.fingerprint, base.seed, base.new_tokens)


def _check_same(checkpoint: Path, base: Base, where: str, found: str) -> None:
    if found != base.fingerprint:
        now = {"source": where, "fingerprint": found}
        raise ConfigError(
            f"the frozen weights below {checkpoint} have changed: it holds adapters to "
            f"{adapters.described(asdict(base))}, but there is now {adapters.described(now)}; bring those weights "
            "back, or train again"
        )


def pretrained_fingerprint(folder: Path) -> str:
    """SHA-256 over those of the safetensors files of a Hugging Face directory, whose reading the ranks share.

    Collective. Raises CheckpointError where ``folder`` has no weights.
    """
    names = sorted(set(HfWeights(folder).files.values()))
    states = tuple((name, (folder / name).stat().st_size, (folder / name).stat().st_mtime_ns) for name in names)
    mine = _digests(folder, states[runtime.world_rank() :: runtime.world_size()])
    digests: Mapping[str, str] = {name: value for part in runtime.gather_objects(mine) for name, value in part.items()}
    return hashlib.sha256(json.dumps([digests[name] for name in names]).encode()).hexdigest()


@cache
def _digests(folder: Path, states: tuple[tuple[str, int, int], ...]) -> dict[str, str]:
    """SHA-256 of files; ``states`` are their names, sizes and times, so that changed files are read again."""
    return {name: sha256(folder / name) for name, _, _ in states}

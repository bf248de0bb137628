"""Checkpoints of a model with adapters (``model.lora``): they hold the adapters alone, and name the frozen weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tawin_nemo.models.megatron.checkpoint import files
from tawin_nemo.models.megatron.model.adapters import adapters_of
from tawin_nemo.util.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

#: Keys of a checkpoint's record: what the adapters are, and the frozen weights that they belong to.
LORA, BASE = "lora", "base"


def adapter_record(model: GPTModel) -> dict[str, Any]:
    """The entries of a checkpoint's record about the adapters of ``model``; none for a model without them."""
    adapters = adapters_of(model)
    return {} if adapters is None else {LORA: adapters.signature, BASE: dict(adapters.base)}


def check_adapters(path: Path, record: Mapping[str, Any], model: GPTModel) -> None:
    """Raises CheckpointError unless the checkpoint at ``path`` holds what ``model`` has, the same adapters or none, and
    ConfigError when the frozen weights that they belong to are not the model's."""
    here, there = adapter_record(model), {key: record[key] for key in (LORA, BASE) if key in record}
    if here.get(LORA) != there.get(LORA):
        raise CheckpointError(
            f"{path} holds {_words(there)}, but this run trains {_words(here)}; set model.lora as in the run of the "
            f"checkpoint, or start a new run from it: name=NEW start={path}"
        )
    if _weights(here.get(BASE, {})) != _weights(there.get(BASE, {})):
        raise ConfigError(
            f"the frozen weights below {path} have changed: it holds adapters to {described(there[BASE])}, but this "
            f"run has {described(here[BASE])}; bring those weights back, or train again under another name"
        )


def described(base: Mapping[str, Any]) -> str:
    """The frozen weights as text for an error: source and beginning of the fingerprint."""
    source = base.get("source") or f"random weights of seed {base.get('seed')}"
    return f"{source} ({str(base.get('fingerprint', ''))[:12] or 'drawn'})"


def fingerprint(checkpoint: Path) -> str:
    """SHA-256 of the record of a checkpoint, which has the SHA-256 of every file. Raises CheckpointError."""
    return files.record_digest(files.read_record(checkpoint))


def _weights(base: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the frozen weights, wherever they lie."""
    return {key: value for key, value in base.items() if key not in ("source", "revision")}


def _words(entries: Mapping[str, Any]) -> str:
    if LORA not in entries:
        return "whole weights (model.lora.rank=0)"
    lora = entries[LORA]
    return (
        f"adapters of model.lora.rank={lora['rank']}, alpha={lora['alpha']:g}, "
        f"target_modules=[{','.join(lora['target_modules'])}]"
    )

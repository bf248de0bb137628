"""Training checkpoints: megatron-core's distributed checkpoint of model and optimizer, plus ``state.json``.

A checkpoint is a directory ``step_N``. All ranks write into a hidden sibling of that name; rank 0 adds ``state.json``
(the caller's state, the model's signature, versions, size and SHA-256 of every file) and renames it, so that a
directory called ``step_N`` is always whole unless a disk damages it later. Model and optimizer are stored in the
shape of the parameters: both can be loaded under another tensor-, pipeline- or data-parallel layout.

Every function that reads or writes is collective when torch.distributed is initialised; the directory must be visible
to all ranks.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.models.gpt import GPTModel

from tawin_nemo.artefacts import sha256
from tawin_nemo.errors import CheckpointError
from tawin_nemo.log import get_logger
from tawin_nemo.models.megatron import parallel
from tawin_nemo.models.megatron.dcp_save import InProcessSave
from tawin_nemo.models.megatron.sharded_state import HasOptimizer, load_state, optimizer_kind, sharded_state

STATE_FILE = "state.json"
FORMAT = 1
_NAME = re.compile(r"step_(\d+)")

log = get_logger(__name__)


def save_checkpoint(path: Path, *, model: GPTModel, trainable: HasOptimizer | None = None, state: dict) -> None:
    """Write the checkpoint ``path`` (named ``step_N``); an older one of that name is replaced at the very end.

    ``state`` is what the caller needs to continue (step, data position, random states); it must survive JSON.
    Without ``trainable`` only the weights are stored. Raises TypeError when ``state`` cannot be written as JSON.
    """
    path = Path(path)
    record = {
        "format": FORMAT,
        "state": json.loads(json.dumps(state)),
        "model": _signature(model),
        "optimizer": optimizer_kind(trainable),
        "layout": _layout(),
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("tawin-nemo", "torch", "megatron-core")},
        },
    }
    temporary = path.with_name(f".{path.name}.tmp")
    if parallel.world_rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    parallel.barrier()
    dist_checkpointing.save(sharded_state(model, trainable, is_loading=False), str(temporary), InProcessSave())
    files = _digests(temporary, _from_rank_0(sorted(file.name for file in temporary.iterdir())))
    if parallel.world_rank() == 0:
        record["files"] = files
        _commit(temporary, path, record)
    parallel.barrier()


def load_checkpoint(path: Path, *, model: GPTModel, trainable: HasOptimizer | None = None) -> dict:
    """Restore weights (and, with ``trainable``, its optimizer) bit for bit; return the saved ``state``.

    The layout may differ from the one that saved. Without ``trainable`` an optimizer that exists already keeps its
    own copy of the weights: call its ``reload_model_params()``. Raises CheckpointError when the checkpoint is
    incomplete or damaged, is of another model, or lacks the optimizer that is asked for.
    """
    path = Path(path)
    problem = find_problem(path)
    if problem is not None:
        raise CheckpointError(f"{path}: {problem}; continue from another checkpoint (newest_valid finds one)")
    record = _read_record(path)
    _check_signature(path, record, model, trainable)
    wanted = sharded_state(model, trainable, is_loading=True)
    try:
        loaded = dist_checkpointing.load(wanted, str(path), strict=StrictHandling.RAISE_UNEXPECTED)
    except (dist_checkpointing.core.CheckpointingException, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not fit this model ({error})") from error
    load_state(model, trainable, loaded)
    return record["state"]


def list_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """(step, path) of every ``step_N`` below ``directory``, oldest first; none are opened."""
    if not Path(directory).is_dir():
        return []
    found = ((_NAME.fullmatch(path.name), path) for path in Path(directory).iterdir() if path.is_dir())
    return sorted((int(match[1]), path) for match, path in found if match)


def newest_valid(directory: Path) -> Path | None:
    """The newest checkpoint that is complete and undamaged; says in the log which ones were passed over and why."""
    for _, path in reversed(_from_rank_0(list_checkpoints(directory))):
        problem = find_problem(path)
        if problem is None:
            return path
        if parallel.world_rank() == 0:
            log.warning("checkpoint %s is skipped: %s", path, problem)
    return None


def prune(directory: Path, keep_last: int, keep: set[int]) -> None:
    """Remove all checkpoints but the ``keep_last`` newest and those whose step is in ``keep``; left-overs go as well.

    Rank 0 acts, the others return at once. A checkpoint is renamed before it is removed: a kill in between leaves no
    half-empty ``step_N``.
    """
    if parallel.world_rank() != 0:
        return
    checkpoints = list_checkpoints(directory)
    for step, path in checkpoints[: max(len(checkpoints) - keep_last, 0)]:
        if step not in keep:
            path.rename(path.with_name(f".{path.name}.old"))
    for path in Path(directory).glob(".step_*"):
        shutil.rmtree(path, ignore_errors=True)


def find_problem(path: Path) -> str | None:
    """Why ``path`` is not a complete, undamaged checkpoint; None if it is. The files are shared out over the ranks."""
    try:
        record = _read_record(path)
    except CheckpointError as error:
        problem: str | None = str(error)
    else:
        problem = _damaged_file(path, record["files"])
    return next((found for found in _gather(problem) if found is not None), None)


def _damaged_file(path: Path, files: dict[str, dict[str, Any]]) -> str | None:
    for name in _my_share(sorted(files)):
        file = path / name
        if not file.is_file():
            return f"the file {name} is missing"
        if file.stat().st_size != files[name]["bytes"]:
            return f"the file {name} has {file.stat().st_size} bytes instead of {files[name]['bytes']}"
        if sha256(file) != files[name]["sha256"]:
            return f"the checksum of {name} is wrong"
    return None


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        digest = record.pop("sha256")
    except FileNotFoundError:
        raise CheckpointError(f"{STATE_FILE} is missing") from None
    except (ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{STATE_FILE} is damaged ({error!r})") from error
    if digest != _record_digest(record):
        raise CheckpointError(f"the checksum of {STATE_FILE} is wrong")
    if record["format"] != FORMAT:
        raise CheckpointError(f"format {record['format']} is not known (this version reads {FORMAT})")
    return record


def _record_digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _commit(temporary: Path, path: Path, record: dict[str, Any]) -> None:
    text = json.dumps({**record, "sha256": _record_digest(record)}, indent=2, sort_keys=True) + "\n"
    (temporary / STATE_FILE).write_text(text, encoding="utf-8")
    for name in (*record["files"], STATE_FILE):
        _fsync(temporary / name)
    _fsync(temporary)
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    temporary.rename(path)
    _fsync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _signature(model: GPTModel) -> dict[str, Any]:
    """What must agree for weights to mean the same; nothing that depends on the layout."""
    config = model.config
    return {
        "layers": config.num_layers,
        "hidden": config.hidden_size,
        "ffn": config.ffn_hidden_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_query_groups,
        "head_dim": config.kv_channels,
        "qkv_bias": config.add_qkv_bias,
        "norm_eps": config.layernorm_epsilon,
        "tied": model.share_embeddings_and_output_weights,
        "vocab": model.real_vocab,
        "rotary_base": model.rotary_base,
    }


def _layout() -> dict[str, int]:
    return {
        "tensor": parallel.tp_size(),
        "pipeline": parallel.pp_size(),
        "data": parallel_state.get_data_parallel_world_size(),
    }


def _check_signature(path: Path, record: dict[str, Any], model: GPTModel, trainable: HasOptimizer | None) -> None:
    here, there = _signature(model), record["model"]
    different = [f"{key} {there.get(key)} instead of {value}" for key, value in here.items() if there.get(key) != value]
    if different:
        raise CheckpointError(
            f"{path} is of another model: {', '.join(different)}; check model.backbone and the catalogue"
        )
    kind = optimizer_kind(trainable)
    if kind is not None and record["optimizer"] != kind:
        raise CheckpointError(
            f"{path} holds the state of optimizer {record['optimizer']}, this run uses {kind}; "
            "use the trainer.distributed_optimizer and model.precision that it was saved with"
        )


def _gather(value: Any) -> list[Any]:
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _from_rank_0(value: Any) -> Any:
    return _gather(value)[0]


def _my_share(names: list[str]) -> list[str]:
    return names[parallel.world_rank() :: dist.get_world_size()] if dist.is_initialized() else names


def _digests(directory: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file, each computed by one rank."""
    mine = {
        name: {"bytes": (directory / name).stat().st_size, "sha256": sha256(directory / name)}
        for name in _my_share(names)
    }
    return {name: entry for part in _gather(mine) for name, entry in part.items()}

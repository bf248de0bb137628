"""Training checkpoints: megatron-core's distributed checkpoint of model and optimizer, plus ``state.json``.

A checkpoint is a directory ``step_N``. All ranks write into a hidden sibling of that name; rank 0 adds ``state.json``
(the caller's state, the model's signature, versions, size and SHA-256 of every file) and renames it, so that a
directory called ``step_N`` is always whole unless a disk damages it later. Model and optimizer are stored in the
shape of the parameters: both can be loaded under another tensor-, pipeline- or data-parallel layout. Each rank writes
the part of the optimizer's state that it owns, and reads no other.

Every function that reads or writes is collective when torch.distributed is initialised; the directory must be visible
to all ranks.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import platform
import shutil
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import megatron.core
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.models.gpt import GPTModel
from torch.distributed.checkpoint.api import CheckpointException

from tawin_nemo import __version__
from tawin_nemo.models.megatron.checkpoint import files
from tawin_nemo.models.megatron.checkpoint.dcp_load import COMMON, CommonLoad, ShardLoad, check_kinds
from tawin_nemo.models.megatron.checkpoint.dcp_save import ShardSave
from tawin_nemo.models.megatron.checkpoint.files import FORMAT, Ranks, list_checkpoints
from tawin_nemo.models.megatron.checkpoint.sharded_state import HasOptimizer, load_state, optimizer_kind, sharded_state
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.util.errors import CheckpointError, UserError
from tawin_nemo.util.log import get_logger
from tawin_nemo.util.trusted import refuse_pickles

log = get_logger(__name__)


def save_checkpoint(path: Path, *, model: GPTModel, trainable: HasOptimizer | None = None, state: dict) -> None:
    """Write the checkpoint ``path`` (named ``step_N``); an older one of that name is replaced at the very end.

    ``state`` is what the caller needs to continue (step, data position, random states); it must survive JSON.
    Without ``trainable`` only the weights are stored. Raises TypeError when ``state`` cannot be written as JSON, and
    CheckpointError, on every rank, when one of them cannot write; what was there before is then untouched.
    """
    begin_save(path, model=model, trainable=trainable, state=state)()


def begin_save(
    path: Path,
    *,
    model: GPTModel,
    trainable: HasOptimizer | None = None,
    state: dict,
    ranks: Ranks | None = None,
    snapshot: bool = False,
) -> Callable[[], None]:
    """The part of ``save_checkpoint`` that needs the model to stand still; returns the rest: write, check, rename.

    With ``snapshot`` the tensors are copied to CPU memory, and the rest may run in a thread while training goes on; it
    then needs ``ranks`` with a group of its own.
    """
    path, ranks = Path(path), ranks or Ranks()
    record = {
        "format": FORMAT,
        "state": json.loads(json.dumps(state)),
        "model": _signature(model),
        "optimizer": optimizer_kind(trainable),
        "layout": _layout(),
        "versions": {
            "python": platform.python_version(),
            "tawin-nemo": __version__,  # also where the checkout is not installed, as in a container
            "torch": _version("torch", torch),
            "megatron-core": _version("megatron-core", megatron.core),
        },
    }
    temporary = path.with_name(f".{path.name}.tmp")
    shards = ShardSave(snapshot=snapshot)
    with _explained(path):
        if runtime.world_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        runtime.barrier()
        dist_checkpointing.save(sharded_state(model, trainable, is_loading=False), str(temporary), shards)

    def finish() -> None:
        with _explained(path):
            shards.write(ranks.group)
            names = ranks.gather(sorted(file.name for file in temporary.iterdir()))[0]
            parts = ranks.agree(lambda: files.digests(temporary, ranks.share(names)))
            record["files"] = {name: entry for part in parts for name, entry in part.items()}
            ranks.agree(lambda: files.commit(temporary, path, record) if ranks.rank == 0 else None)

    return finish


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn every error while ``path`` is written into one CheckpointError that says what is left on the disk."""
    try:
        yield
    except (Exception, CheckpointException) as error:
        reason = "; ".join(_causes(error))
        raise CheckpointError(
            f"{path} could not be written ({reason}); older checkpoints are untouched: mend the cause (free space on "
            "that disk, say) and run the same command again"
        ) from error


def _causes(error: BaseException) -> list[str]:
    """torch's CheckpointException holds one error per rank that failed."""
    if not isinstance(error, CheckpointException):
        return [str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"]
    return [f"rank {rank}: {type(cause).__name__}: {cause}" for rank, (cause, _) in error.failures.items()]


def load_checkpoint(
    path: Path, *, model: GPTModel, trainable: HasOptimizer | None = None, verified: bool = False
) -> dict:
    """Restore weights (and, with ``trainable``, its optimizer) bit for bit; return the saved ``state``.

    The layout may differ from the one that saved. Without ``trainable`` an optimizer that exists already keeps its
    own copy of the weights: call its ``reload_model_params()``. ``verified``: the checksums have just been verified
    (``newest_valid``) and are not computed again. Raises CheckpointError when the checkpoint is incomplete or damaged,
    is of another model, or has no state of this optimizer.
    """
    path = Path(path)
    problem = None if verified else find_problem(path)
    if problem is not None:
        raise CheckpointError(f"{path}: {problem}; continue from another checkpoint (newest_valid finds one)")
    record = files.read_record(path)
    _check_signature(path, record, model, trainable)
    load_state(model, trainable, _read_shards(path, record, sharded_state(model, trainable, is_loading=True)))
    return record["state"]


def _read_shards(path: Path, record: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """What megatron-core finds for ``wanted``. Raises CheckpointError; nothing in the files is run (``dcp_load``)."""
    names = record["files"].keys()
    try:
        check_kinds(path, names)
        return dict(
            dist_checkpointing.load(
                wanted, str(path), ShardLoad(names), CommonLoad(), strict=StrictHandling.RAISE_UNEXPECTED
            )
        )
    except UserError:
        raise
    except CheckpointException as error:  # the ranks' own errors; it is no Exception
        raise CheckpointError(f"{path} cannot be loaded ({'; '.join(_causes(error))})") from error
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{path} holds more than tensors and numbers, and is not loaded ({reason})") from error
    except (dist_checkpointing.core.CheckpointingException, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not fit this model ({error})") from error


def check_form(path: Path) -> None:
    """Raises CheckpointError unless the record, the formats and the metadata of the checkpoint can be read.

    It is not collective and reads no tensors: several ranks can agree on it before they load together.
    """
    try:
        names = files.read_record(path)["files"].keys()
        check_kinds(path, names)
        ShardLoad(names).load_sharded_metadata(path)
    except UserError:
        raise
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except Exception as error:
        raise CheckpointError(f"{path} cannot be loaded ({type(error).__name__}: {error})") from error


def newest_valid(directory: Path, problem_of: Callable[[Path], str | None] | None = None) -> Path | None:
    """The newest checkpoint that is complete and undamaged; None when there are none at all.

    A warning names those that were skipped, the reason, and the one that is used. ``problem_of`` checks one checkpoint
    (default ``find_problem``). Raises CheckpointError when there are checkpoints and none is whole.
    """
    if runtime.world_rank() == 0:
        files.recover(directory)
    passed: list[str] = []
    for _, path in reversed(Ranks().gather(list_checkpoints(directory))[0]):
        problem = (problem_of or find_problem)(path)
        if problem is None:
            if passed and runtime.world_rank() == 0:
                log.warning("not usable: %s; continuing from %s instead", "; ".join(passed), path)
            return path
        passed.append(f"checkpoint {path} ({problem})")
    if passed:
        raise CheckpointError(
            f"no checkpoint in {directory} is whole: {'; '.join(passed)}; bring one of them back, or remove "
            f"{Path(directory).parent} to train this stage again from its start"
        )
    return None


def set_aside(directory: Path, step: int) -> None:
    """Rank 0 renames checkpoints newer than ``step``; see ``files.set_aside``."""
    if runtime.world_rank() == 0:
        files.set_aside(directory, step)
    runtime.barrier()


def prune(directory: Path, keep_last: int, keep: set[int]) -> None:
    """Rank 0 removes all checkpoints but the ``keep_last`` newest and those whose step is in ``keep``."""
    if runtime.world_rank() == 0:
        files.prune(directory, keep_last, keep)


def find_problem(path: Path) -> str | None:
    """Why ``path`` is not a complete, undamaged checkpoint; None if it is. The files are divided among the ranks."""
    ranks = Ranks()
    try:
        refuse_pickles(path, known=(COMMON,))
        record = files.read_record(path)
        problem = files.damaged_file(path, ranks.share(sorted(record["files"])), record["files"])
    except (CheckpointError, UserError) as error:
        problem = str(error)
    except OSError as error:
        problem = f"it cannot be read ({error})"
    return next((first for first in ranks.gather(problem) if first is not None), None)


def _signature(model: GPTModel) -> dict[str, Any]:
    """The properties that two models must share to exchange weights; none of them depends on the layout."""
    config = model.config
    return {
        **({"qk_norm": True} if config.qk_layernorm else {}),  # checkpoints of other families keep their records
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
        "tensor": runtime.tp_size(),
        "pipeline": runtime.pp_size(),
        "data": parallel_state.get_data_parallel_world_size(),
    }


def _check_signature(path: Path, record: dict[str, Any], model: GPTModel, trainable: HasOptimizer | None) -> None:
    here, there = _signature(model), record["model"]
    keys = dict.fromkeys([*here, *there])
    different = [
        f"{key} {there.get(key)} instead of {here.get(key)}" for key in keys if there.get(key) != here.get(key)
    ]
    if different:
        raise CheckpointError(
            f"{path} is of another model: {', '.join(different)}; check model.backbone and the catalog"
        )
    kind = optimizer_kind(trainable)
    if kind is not None and record["optimizer"] != kind:
        raise CheckpointError(
            f"{path} holds the state of optimizer {record['optimizer']}, this run uses {kind}; "
            "use the trainer.distributed_optimizer and model.precision that it was saved with"
        )


def _version(distribution: str, package: ModuleType) -> str:
    """The installed version, else the package's own ``__version__``, as for sources that are only on the path."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return str(getattr(package, "__version__", "unknown"))

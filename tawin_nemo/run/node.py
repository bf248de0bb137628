"""What one process of each machine does for all of its processes: hashing the data, and measuring the prompts.

The others map the results into their memory, so that neither their start nor their memory grows with the rows.
"""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from tawin_nemo.config.schema import DataConfig
from tawin_nemo.data.interactions import Dataset, Split, load_dataset
from tawin_nemo.data.prompt_encoder import PromptEncoder
from tawin_nemo.data.prompt_index import PromptIndex, index_prompts, open_index
from tawin_nemo.data.samples import Samples, samples_of
from tawin_nemo.data.split_arrays import Arrays, open_arrays, temporary_folder
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.util import errors
from tawin_nemo.util.errors import TawinError
from tawin_nemo.util.log import get_logger

log = get_logger(__name__)
T = TypeVar("T")


def node_name() -> str:
    """The same for all processes of one machine (or container), and no other."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.is_file() else ''}"


def is_first_of_node() -> bool:
    """Whether this process has the lowest rank of its machine. Collective."""
    return runtime.gather_objects(node_name()).index(node_name()) == runtime.world_rank()


def on_each_node(compute: Callable[[], T]) -> T:
    """Call ``compute`` on the lowest rank of each machine; returns its result on every rank of that machine.

    Collective. A TawinError is raised on every rank: the error itself where it arose, elsewhere one of the nearest
    class of ``util.errors`` with the same message. Any other exception is raised on its rank alone and ends the job.
    """
    if runtime.world_size() == 1:
        return compute()
    failure: TawinError | None = None
    result: tuple[list[T], str, str] = ([], "", "")
    if is_first_of_node():
        try:
            result = ([compute()], "", "")
        except TawinError as error:
            failure = error
            kind = next(base for base in type(error).__mro__ if base.__module__ == TawinError.__module__)
            result = ([], kind.__name__, str(error))
    parts = runtime.gather_objects((node_name(), *result))
    if failure is not None:
        raise failure
    for _, _, kind_name, message in parts:
        if kind_name:
            raise getattr(errors, kind_name)(message)
    own: T = next(values[0] for name, values, _, _ in parts if name == node_name() and values)
    return own


def _remove_when_open(folder: Path | None) -> None:
    """Remove a temporary folder of this machine once all of its processes have mapped its files. Collective."""
    first = is_first_of_node()  # returns when all ranks have come here
    if first and folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def open_dataset(root: Path) -> Dataset:
    """``load_dataset`` with splits that all processes of a machine share (``data/split_arrays.py``).

    Collective. One process of each machine hashes the files; rank 0 converts them, and so do machines whose data lie on
    disks of their own. Raises DataError, on all ranks.
    """
    of_rank_0 = runtime.on_rank_0(partial(open_arrays, root))

    def of_node() -> Arrays:
        return of_rank_0 if runtime.world_rank() == 0 else open_arrays(root)

    arrays = on_each_node(of_node)
    dataset = load_dataset(root, arrays)
    _remove_when_open(arrays.folder if arrays.temporary else None)
    return dataset


@dataclass(frozen=True)
class _Measured:
    """The indices of several splits; with a ``folder`` their arrays lie in a file for each there."""

    folder: Path | None
    indices: dict[str, PromptIndex]


def open_samples(splits: Mapping[str, Split], encoder: PromptEncoder, data: DataConfig) -> dict[str, Samples]:
    """The samples of each split; all processes of a machine share what one of them has measured.

    Collective. Errors as ``encode_split``, on all ranks.
    """
    found = on_each_node(partial(_measure, splits, encoder, data))
    indices = found.indices
    if found.folder is not None:
        indices = {name: open_index(found.folder / name, index) for name, index in indices.items()}
    samples = {name: samples_of(split, encoder, data, indices[name]) for name, split in splits.items()}
    _remove_when_open(found.folder)
    return samples


def _measure(splits: Mapping[str, Split], encoder: PromptEncoder, data: DataConfig) -> _Measured:
    none = np.zeros(0, dtype=np.int32)
    try:
        with temporary_folder("tawin-prompts-") as folder:
            indices = {name: index_prompts(split, encoder, data, folder / name) for name, split in splits.items()}
    except OSError as error:
        log.warning("TMPDIR cannot be written (%s): every process keeps 8 bytes per row in its own memory", error)
        return _Measured(None, {name: index_prompts(split, encoder, data) for name, split in splits.items()})
    return _Measured(folder, {name: replace(index, kept_N=none, length_N=none) for name, index in indices.items()})

"""Reading safetensors slice by slice: a single file, or several with an index.

The library checks a file, but its slices for torch leave two Python integers for every tensor that is read (version
0.8.0), and a server reads all tensors at every swap of its weights. So tensors are read through a memory map here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tawin_nemo.config.backbones import Backbone
from tawin_nemo.models.megatron.hf.map import hf_names, table
from tawin_nemo.util.errors import CheckpointError
from tawin_nemo.util.trusted import OutsideRoots, read_text, refuse_pickles, trusted_name

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
#: Rows of a matrix that are read at a time where a second copy of it must not be held.
ROWS_AT_ONCE = 8192
_LFS_POINTER = b"version https://git-lfs"


#: Number formats of safetensors files.
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class TensorFile:
    """The tensors of one safetensors file. Raises SafetensorError for a file that is damaged or cut off.

    ``name`` must name the file only while it is opened.
    """

    def __init__(self, name: str) -> None:
        with safe_open(name, framework="numpy"):
            pass  # compares the header with the length of the file, and the tensors' sizes with their places
        self._bytes = np.memmap(name, dtype=np.uint8, mode="r")
        self._data = 8 + int.from_bytes(self._bytes[:8].tobytes(), "little")
        header = json.loads(self._bytes[8 : self._data].tobytes())
        self._entries: dict[str, dict[str, Any]] = {
            key: value for key, value in header.items() if key != "__metadata__"
        }

    def keys(self) -> set[str]:
        """The tensors' names."""
        return set(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor. Raises KeyError when there is none of this name."""
        return tuple(self._entries[name]["shape"])

    def read(self, name: str, axis: int, start: int, stop: int) -> Tensor:
        """A copy of the slice ``start:stop`` along ``axis`` (0 or 1). Raises KeyError without the tensor, and
        SafetensorError for a number format that torch does not have."""
        entry = self._entries[name]
        if (dtype := _DTYPES.get(entry["dtype"])) is None:
            raise SafetensorError(f"{name} is in {entry['dtype']}, not in one of {', '.join(_DTYPES)}")
        first, end = (self._data + offset for offset in entry["data_offsets"])
        whole = self._bytes[first:end].reshape(*entry["shape"], dtype.itemsize)
        part = whole[start:stop] if axis == 0 else whole[:, start:stop]
        if not part.size:
            return torch.empty(part.shape[:-1], dtype=dtype)
        return torch.from_numpy(np.array(part)).view(dtype).squeeze(-1)


class HfWeights:
    """The tensors of one directory, read slice by slice (``model.safetensors`` or an index with several files)."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._open: dict[str, TensorFile] = {}
        self.files: dict[str, str]
        if any((directory / name).exists() for name in (SINGLE_FILE, INDEX_FILE)):
            refuse_pickles(directory)
        if (directory / INDEX_FILE).exists():
            try:
                self.files = _weight_map(json.loads(read_text(directory / INDEX_FILE)))
            except OutsideRoots:
                raise
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(
                    f"{directory / INDEX_FILE} has no readable weight_map ({error!r}); download it again"
                ) from error
        elif (directory / SINGLE_FILE).exists():
            self.files = dict.fromkeys(self._file(SINGLE_FILE).keys(), SINGLE_FILE)
        else:
            other = sorted(path.name for path in directory.glob("*.bin"))
            raise CheckpointError(
                f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}; save the model with "
                "save_pretrained(..., safe_serialization=True)" + (f" ({other[0]} is the old format)" if other else "")
            )

    def _file(self, name: str) -> TensorFile:
        if name not in self._open:
            try:
                with trusted_name(self.directory / name) as file:
                    self._open[name] = TensorFile(file)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(_damage(self.directory / name, error)) from error
        return self._open[name]

    def check_files(self) -> None:
        """Open every file, which compares its length with its header, and compare its tensors with the index.

        Raises CheckpointError naming the first file that is missing, damaged or of another revision.
        """
        for name in sorted(set(self.files.values())):
            promised = {tensor for tensor, file in self.files.items() if file == name}
            lacking = sorted(promised - self._file(name).keys())
            if lacking:
                raise CheckpointError(
                    f"{self.directory / name} lacks {lacking[0]}, which the index promises; download index and files "
                    "of one revision"
                )

    def check_names(self, shape: Backbone) -> None:
        """Raises CheckpointError unless the files hold exactly the tensors of a model of this shape."""
        expected = {name for entry, layer in table(shape) for name in hf_names(entry, layer)}
        optional = {"lm_head.weight"} if shape.tied else set()
        missing = sorted(expected - self.files.keys())
        unexpected = sorted(
            name for name in self.files.keys() - expected - optional if not name.endswith("rotary_emb.inv_freq")
        )
        if missing or unexpected:
            raise CheckpointError(
                f"{self.directory} does not hold the weights of this {shape.family} model: "
                f"missing {missing[:8]} ({len(missing)}), unexpected {unexpected[:8]} ({len(unexpected)}); "
                "check that config.json belongs to the weights"
            )

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header. Raises CheckpointError when the tensor is missing."""
        return self._holding(name).shape(name)

    def _holding(self, name: str) -> TensorFile:
        file = self._file(self.files[name])
        if name not in file.keys():  # noqa: SIM118
            raise CheckpointError(
                f"{self.directory / self.files[name]} has no tensor {name}, although the index lists it"
            )
        return file

    def read(self, name: str, axis: int, start: int, stop: int) -> Tensor:
        """The slice ``start:stop`` along ``axis`` (0 or 1) of a tensor, in CPU memory. Raises CheckpointError."""
        try:
            return self._holding(name).read(name, axis, start, stop)
        except SafetensorError as error:
            raise CheckpointError(f"{self.directory / self.files[name]}: {error}") from error

    def mean_row(self, name: str) -> Tensor:
        """Mean over the rows of a matrix, [columns] in float64, the same on every rank."""
        rows, columns = self.shape(name)
        total = torch.zeros(columns, dtype=torch.float64)
        for start in range(0, rows, ROWS_AT_ONCE):
            total += self.read(name, 0, start, min(start + ROWS_AT_ONCE, rows)).double().sum(0)
        return total / rows


def _weight_map(index: Any) -> dict[str, str]:
    """Tensor -> file of the folder. Raises KeyError, TypeError or ValueError for an index of another form."""
    files = dict(index["weight_map"])
    wrong = [file for pair in files.items() for file in pair if not isinstance(file, str)]
    if wrong:
        raise TypeError(f"{wrong[0]!r:.40} is no name")
    outside = [file for file in files.values() if Path(file).name != file]
    if outside:
        raise ValueError(f"{outside[0]!r} is no file of this folder")
    return files


def _damage(path: Path, error: Exception) -> str:
    """Why a file cannot be opened, and the remedy."""
    if not path.is_file():
        return f"{path} is named by the index but missing; download that file"
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            return f"{path} is a Git LFS pointer, not the weights; git lfs pull"
    return f"{path} cannot be read ({error}); it is cut off or damaged: copy it again"

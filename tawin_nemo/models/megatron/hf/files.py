"""Reading safetensors slice by slice: a single file, or several with an index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tawin_nemo.util.errors import CheckpointError

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
#: Rows of a matrix that are read at a time where a second copy of it must not be held.
ROWS_AT_ONCE = 8192


class HfWeights:
    """The tensors of one directory, read slice by slice (``model.safetensors`` or an index with several files)."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._open: dict[str, Any] = {}
        if (directory / INDEX_FILE).exists():
            try:
                index = json.loads((directory / INDEX_FILE).read_text(encoding="utf-8"))
                self.files: dict[str, str] = dict(index["weight_map"])
            except (ValueError, KeyError) as error:
                raise CheckpointError(f"{directory / INDEX_FILE} has no readable weight_map ({error!r})") from error
        elif (directory / SINGLE_FILE).exists():
            self.files = dict.fromkeys(self._file(SINGLE_FILE).keys(), SINGLE_FILE)
        else:
            raise CheckpointError(
                f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}; save the model with "
                "save_pretrained(..., safe_serialization=True)"
            )

    def _file(self, name: str) -> Any:
        if name not in self._open:
            try:
                self._open[name] = safe_open(self.directory / name, framework="pt", device="cpu")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{self.directory / name} cannot be read ({error}); copy it again") from error
        return self._open[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header. Raises CheckpointError when the tensor is missing."""
        return tuple(self._slice(name).get_shape())

    def _slice(self, name: str) -> Any:
        try:
            return self._file(self.files[name]).get_slice(name)
        except SafetensorError as error:
            raise CheckpointError(
                f"{self.directory / self.files[name]} has no tensor {name}, although the index lists it"
            ) from error

    def read(self, name: str, axis: int, start: int, stop: int) -> Tensor:
        """The slice ``start:stop`` along ``axis`` (0 or 1) of a tensor, in CPU memory."""
        part = self._slice(name)
        return part[start:stop] if axis == 0 else part[:, start:stop]

    def mean_row(self, name: str) -> Tensor:
        """Mean over the rows of a matrix, [columns] in float64, the same on every rank."""
        rows, columns = self.shape(name)
        total = torch.zeros(columns, dtype=torch.float64)
        for start in range(0, rows, ROWS_AT_ONCE):
            total += self.read(name, 0, start, min(start + ROWS_AT_ONCE, rows)).double().sum(0)
        return total / rows

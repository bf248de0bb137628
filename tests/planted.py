"""Files that run code when they are unpickled, planted where the product reads files; the code makes a folder."""

from __future__ import annotations

import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import Metadata

from tawin_nemo.models.megatron.checkpoint import files as checkpoint_files


class Trap:
    """Unpickling it makes the folder ``marker``."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def pickled(marker: Path) -> bytes:
    """A bare pickle."""
    return pickle.dumps(Trap(marker))


def torch_saved(marker: Path) -> bytes:
    """A file of ``torch.save``."""
    buffer = io.BytesIO()
    torch.save({"weight": Trap(marker)}, buffer)
    return buffer.getvalue()


def numpy_saved(marker: Path) -> bytes:
    """A .npy of objects."""
    buffer = io.BytesIO()
    box = np.empty(2, dtype=object)
    box[:] = Trap(marker)
    np.save(buffer, box, allow_pickle=True)
    return buffer.getvalue()


def metadata_with(step: Path, change: Any) -> None:
    """Rewrite ``.metadata`` of a checkpoint after ``change(metadata)``, and make the checkpoint's checksums right."""
    metadata: Metadata = pickle.loads((step / ".metadata").read_bytes())
    change(metadata)
    (step / ".metadata").write_bytes(pickle.dumps(metadata))
    sign(step)


def sign(step: Path) -> None:
    """Write ``state.json`` anew, as whoever may write a folder can: sizes and checksums of the files as they are."""
    record = json.loads((step / "state.json").read_text(encoding="utf-8"))
    del record["sha256"]
    record["files"] = checkpoint_files.digests(step, sorted(record["files"]))
    record["sha256"] = checkpoint_files.record_digest(record)
    (step / "state.json").write_text(json.dumps(record), encoding="utf-8")

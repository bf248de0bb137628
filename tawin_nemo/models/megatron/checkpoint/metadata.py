"""The ``.metadata`` of a distributed checkpoint, read without running what it says.

torch writes it as a pickle, and a pickle may name any function and call it. Here a name is never looked up: every
class that torch's metadata consists of is replaced by a plain record, any other name is an error, and the metadata are
built from the records after each field has been checked.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Collection
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

_METADATA, _FILES = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
#: Module -> the classes whose instances torch's metadata hold. What is called on loading a path is a class as well.
_RECORDS = {
    _METADATA: (
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
        "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
    ),
    _FILES: ("_StorageInfo",),
    "pathlib": ("PosixPath", "PurePosixPath", "WindowsPath"),
    "pathlib._local": ("PosixPath", "PurePosixPath", "WindowsPath"),
    "torch.serialization": ("_get_layout",),
}  # fmt: skip
#: What a pickled tensor consists of, and the module of Transformer Engine's recipes.
_TENSORS = (("torch._utils", "_rebuild_tensor_v2"), ("collections", "OrderedDict"))
_RECIPES = "transformer_engine.common.recipe"


class _Record:
    """Stands for an object of the pickle: the arguments it was made with and the state it was given."""

    def __init__(self, *args: Any) -> None:
        self.args, self.state = args, None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Reader(pickle.Unpickler):
    """Makes records, tuples and torch dtypes; raises UnpicklingError for every other name."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self._kinds: dict[str, type] = {}  # new ones for every file, so that no file can change them for the next

    def find_class(self, module: str, name: str) -> Any:
        if name in _RECORDS.get(module, ()):
            return self._kinds.setdefault(name, type(name, (_Record,), {}))
        if (module, name) == ("torch", "Size"):
            return tuple
        dtype = getattr(torch, name, None) if module == "torch" and name.isidentifier() else None
        if isinstance(dtype, torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint holds")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it names an object outside of the file")


def read_metadata(file: BinaryIO, names: Collection[str]) -> Metadata:
    """The metadata in ``file``; ``names`` are the files of the checkpoint, which alone they may mention.

    Raises ValueError when the file holds anything else than the metadata of a distributed checkpoint, or is damaged.
    """
    try:
        return _metadata(_Reader(file).load(), names)
    except (pickle.UnpicklingError, EOFError, AttributeError, KeyError, IndexError, TypeError, OverflowError) as error:
        raise ValueError(f"{error}" or type(error).__name__) from error


class _StateReader(_Reader):
    """The same for what Transformer Engine pickles into a tensor of bytes: scales and a recipe of its own classes."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return lambda data: torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if (module, name) in _TENSORS or (module == _RECIPES and name.isidentifier() and name.strip("_")[0].isupper()):
            return self._kinds.setdefault(name, type(name, (_Record,), {}))
        return super().find_class(module, name)


def check_engine_state(data: bytes) -> None:
    """Raise ValueError when the state of a Transformer Engine module, which the module unpickles, names other things
    than tensors and the engine's recipes; nothing of it is called."""
    try:
        _StateReader(io.BytesIO(data)).load()
    except Exception as error:  # whatever a damaged pickle raises
        raise ValueError(f"the state of a Transformer Engine module cannot be used: {error}") from error


def _metadata(found: Any, names: Collection[str]) -> Metadata:
    fields = _fields(found, "Metadata")
    tensors = {_text(key): _entry(value) for key, value in fields["state_dict_metadata"].items()}
    storage = {_index(key): _storage(value, names) for key, value in fields["storage_data"].items()}
    return Metadata(state_dict_metadata=tensors, storage_data=storage)


def _entry(found: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if _kind(found) == "BytesStorageMetadata":
        return BytesStorageMetadata()
    fields = _fields(found, "TensorStorageMetadata")
    state = _checked(found=fields["properties"], kind="TensorProperties").state
    dtype = state[0] if isinstance(state, tuple) else None
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"a tensor has the number format {dtype!r}")
    chunks = [_fields(chunk, "ChunkStorageMetadata") for chunk in fields["chunks"]]
    return TensorStorageMetadata(
        TensorProperties(dtype=dtype),
        _size(fields["size"]),
        [ChunkStorageMetadata(_size(chunk["offsets"]), _size(chunk["sizes"])) for chunk in chunks],
    )


def _index(found: Any) -> MetadataIndex:
    fields = _fields(found, "MetadataIndex")
    offset, index = fields.get("offset"), fields.get("index")
    return MetadataIndex(
        _text(fields["fqn"]), None if offset is None else _size(offset), None if index is None else _count(index)
    )


def _storage(found: Any, names: Collection[str]) -> _StorageInfo:
    fields = _fields(found, "_StorageInfo")
    name = _text(fields["relative_path"])
    if name not in names:
        raise ValueError(f"it names the file {name!r}, which is not one of the checkpoint's")
    if fields.get("transform_descriptors"):
        raise ValueError("its files are transformed, which this version does not read")
    return _StorageInfo(name, _count(fields["offset"]), _count(fields["length"]))


def _checked(found: Any, kind: str) -> _Record:
    if not isinstance(found, _Record) or _kind(found) != kind:
        raise TypeError(f"it holds {_kind(found)} where {kind} belongs")
    return found


def _fields(found: Any, kind: str) -> dict[str, Any]:
    state = _checked(found, kind).state
    if not isinstance(state, dict):
        raise TypeError(f"{kind} has no fields")
    return state


def _kind(found: Any) -> str:
    return type(found).__name__


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"it holds {_kind(value)} where a name belongs")
    return value


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise TypeError(f"it holds {value!r:.40} where a number belongs")
    return value


def _size(value: Any) -> torch.Size:
    if not isinstance(value, tuple):
        raise TypeError(f"it holds {_kind(value)} where a size belongs")
    return torch.Size([_count(part) for part in value])

"""Messages from one leading rank to the ranks that follow it: how they are encoded, sent, and carried out.

A message is a frozen dataclass. On the wire it is a JSON head and the raw bytes of its arrays and tensors. Decoding
constructs only the dataclasses that the receiver names, directly or as types of their fields, and never runs code that
a message brings along, as unpickling would. Generation servers (``serve.engine.ranks``) and disaggregated rollouts
(``placement.rollout_ranks``) both run ``Channel.follow``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol, get_args, get_type_hints

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

# -- Encoding ------------------------------------------------------------------------------------------------------


def encode(message: Any) -> bytes:
    """The message as bytes: 8 bytes with the length of the JSON head, the head, and the arrays in their order.

    Fields may hold None, booleans, numbers, strings, paths, NumPy arrays, tensors, lists, tuples, dicts and further
    dataclasses. Tensors travel through CPU memory and arrive there. Raises TypeError for any other value.
    """
    parts: list[bytes] = []

    def plain(value: Any) -> Any:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, list):
            return [plain(item) for item in value]
        if isinstance(value, tuple):
            return {"tuple": [plain(item) for item in value]}
        if isinstance(value, dict):
            return {"dict": [[plain(key), plain(item)] for key, item in value.items()]}
        if isinstance(value, Path):
            return {"path": str(value)}
        if isinstance(value, np.ndarray) and not value.dtype.hasobject:
            parts.append(value.tobytes())
            return {"array": [value.dtype.str, list(value.shape)]}
        if isinstance(value, Tensor):
            parts.append(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            return {"tensor": [str(value.dtype).removeprefix("torch."), list(value.shape)]}
        if is_dataclass(value) and not isinstance(value, type):
            content = {field.name: plain(getattr(value, field.name)) for field in fields(value)}
            return {"record": [type(value).__name__, content]}
        raise TypeError(f"a message cannot carry a value of type {type(value).__name__}: {value!r:.100}")

    head = json.dumps(plain(message)).encode()
    return b"".join([len(head).to_bytes(8, "little"), head, *parts])


def decode(data: bytes, messages: tuple[type, ...]) -> Any:
    """The message that ``encode`` made of an instance of one of ``messages``.

    Raises TypeError when the data names a dataclass that neither is one of ``messages`` nor can be part of one.
    """
    known = _dataclasses_in(messages)
    head_end = 8 + int.from_bytes(data[:8], "little")
    raw, position = np.frombuffer(data, dtype=np.uint8), head_end

    def buffer(nbytes: int) -> np.ndarray:
        nonlocal position
        position += nbytes
        return raw[position - nbytes : position]

    def rich(value: Any) -> Any:
        if isinstance(value, list):
            return [rich(item) for item in value]
        if not isinstance(value, dict):
            return value
        ((tag, content),) = value.items()
        match tag:
            case "tuple":
                return tuple(rich(item) for item in content)
            case "dict":
                return {rich(key): rich(item) for key, item in content}
            case "path":
                return Path(content)
            case "array":
                name, shape = content
                dtype = np.dtype(name)
                return buffer(dtype.itemsize * math.prod(shape)).copy().view(dtype).reshape(shape)
            case "tensor":
                name, shape = content
                kind = getattr(torch, name)
                assert isinstance(kind, torch.dtype)
                tensor = torch.empty(shape, dtype=kind)
                tensor.view(-1).view(torch.uint8).numpy()[:] = buffer(tensor.nbytes)
                return tensor
            case _:
                name, values = content
                if name not in known:
                    raise TypeError(f"a message holds a {name}; only {', '.join(sorted(known))} are accepted here")
                return known[name](**{key: rich(item) for key, item in values.items()})

    return rich(json.loads(data[8:head_end]))


@cache
def _dataclasses_in(messages: tuple[type, ...]) -> Mapping[str, type]:
    """Name -> class of the dataclasses ``messages`` and of all that the types of their fields mention."""
    known: dict[str, type] = {}

    def visit(kind: Any) -> None:
        for part in get_args(kind):
            visit(part)
        if not (isinstance(kind, type) and is_dataclass(kind)):
            return
        if known.setdefault(kind.__name__, kind) is not kind:
            raise TypeError(f"two message types are called {kind.__name__}; rename one")
        if kind not in visited:
            visited.add(kind)
            for part in get_type_hints(kind).values():
                visit(part)

    visited: set[type] = set()
    for message in messages:
        visit(message)
    return known


def broadcast_bytes(
    data: bytes | None, *, group: dist.ProcessGroup | None = None, source: int = 0, device: str | torch.device = "cpu"
) -> bytes:
    """The bytes of rank ``source`` of ``group`` (None: the default group), on every rank; the others pass None.

    ``device`` must be one that the group's backend can send from.
    """
    size = torch.tensor([0 if data is None else len(data)], device=device)
    dist.broadcast(size, group=group, group_src=source)
    if data is None:
        content = torch.empty(int(size), dtype=torch.uint8, device=device)
    else:
        content = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
    dist.broadcast(content, group=group, group_src=source)
    return content.cpu().numpy().tobytes()


# -- Channels ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stop:
    """The last message: the following ranks leave ``Channel.follow``."""


class Link(Protocol):
    """Carries bytes from the leading rank to all that follow it, in order."""

    def send(self, data: bytes) -> None:
        """Called by the leading rank; raises when a following rank is gone."""
        ...

    def receive(self) -> bytes:
        """Called by the following ranks; blocks until the leading rank sends."""
        ...


class Channel:
    """Messages over a link."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def broadcast(self, message: Any) -> None:
        """Send a message to all following ranks. Raises TypeError as ``encode`` does."""
        self._link.send(encode(message))

    def follow(self, messages: tuple[type, ...], handle: Callable[[Any], None]) -> None:
        """Call ``handle`` with every message that the leading rank broadcasts, in order, until it broadcasts ``Stop``.

        ``messages``: the dataclasses that are accepted besides ``Stop``. Errors of ``handle`` end the loop.
        """
        while not isinstance(message := decode(self._link.receive(), (*messages, Stop)), Stop):
            handle(message)


class GroupLink:
    """A link over a process group on the CPU, from its rank 0 to the others."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def send(self, data: bytes) -> None:
        broadcast_bytes(data, group=self._group)

    def receive(self) -> bytes:
        return broadcast_bytes(None, group=self._group)

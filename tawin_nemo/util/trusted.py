"""Reading files that others may have written: where they may lie, and which kinds are never opened.

A path in a request is confined to some folders. Links are resolved at the moment of opening: what counts is the file
that was opened, not the name that was checked before. Python pickles run code when they are read, so a folder that
holds one is refused as a whole, before anything in it is opened.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from io import BufferedReader
from pathlib import Path

from tawin_nemo.util.errors import UserError

#: Suffixes of files that torch and others read by unpickling.
PICKLED = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".joblib")
_roots: ContextVar[tuple[Path, ...] | None] = ContextVar("roots", default=None)


class OutsideRoots(UserError):
    """A file that was opened on behalf of a request lies outside of the folders that requests may name."""


@contextmanager
def confined(roots: Sequence[Path]) -> Iterator[None]:
    """Inside the block ``open_trusted`` opens only files below one of ``roots``, after all links are followed."""
    token = _roots.set(tuple(root.resolve() for root in roots))
    try:
        yield
    finally:
        _roots.reset(token)


@contextmanager
def open_trusted(path: Path) -> Iterator[BufferedReader]:
    """The file ``path``, open for reading in bytes.

    Raises OutsideRoots inside ``confined`` when the file that was opened lies elsewhere, OSError when it cannot be
    opened.
    """
    roots = _roots.get()
    if roots is not None and Path(path).exists() and not Path(path).is_file():
        raise UserError(f"{path} is no file")  # a pipe would block, a device may never end
    with Path(path).open("rb") as file:
        if roots is not None:
            opened = _opened_path(file, Path(path))
            if not any(opened.is_relative_to(root) for root in roots):
                raise OutsideRoots(f"{path} leads to a file outside of serve.roots; put the file itself there")
        yield file


def read_text(path: Path) -> str:
    """The UTF-8 text of a file; raises as ``open_trusted`` does, and UnicodeDecodeError (a ValueError)."""
    with open_trusted(path) as file:
        return file.read().decode("utf-8")


@contextmanager
def trusted_name(path: Path) -> Iterator[str]:
    """A name of the file ``path`` for libraries that open it themselves; valid inside the block.

    On Linux it names the open file, so that no link can be exchanged in between. Raises as ``open_trusted`` does.
    """
    with open_trusted(path) as file:
        descriptor = f"/proc/self/fd/{file.fileno()}"
        confined_here = _roots.get() is not None and os.path.exists(descriptor)
        yield descriptor if confined_here else str(path)


def refuse_pickles(folder: Path, *, known: Collection[str] = ()) -> None:
    """Raises UserError when ``folder`` holds a file that is read by unpickling, other than the names in ``known``."""
    try:
        names = sorted(entry.name for entry in os.scandir(folder))
    except OSError:
        return  # what is missing or no folder is the reader's own error
    found = [name for name in names if name.lower().endswith(PICKLED) and name not in known]
    if found:
        raise UserError(
            f"{folder} holds {found[0]}, a kind of file that may run code when it is read: nothing in this folder is "
            "opened; move it away (weights are read from safetensors, tokenizers from tokenizer.json)"
        )


def _opened_path(file: BufferedReader, path: Path) -> Path:
    """Where the open file lies. Linux knows; elsewhere the name is resolved again and must lead to the same file."""
    try:
        return Path(os.readlink(f"/proc/self/fd/{file.fileno()}"))
    except OSError:
        resolved = path.resolve()
        if not os.path.samestat(os.fstat(file.fileno()), os.stat(resolved)):
            raise OutsideRoots(f"{path} changed while it was opened; try again") from None
        return resolved

"""What the first import of megatron-core leaves out: nearly half of a start, most of it for what is not used.

megatron-core decorates some functions with ``torch.compile``, which imports torch's compilers at once, and asks whether
Weights & Biases is installed by importing it. Here those functions are compiled at their first call, with the same
result, and megatron-core does not see Weights & Biases, which only metric sinks (``run.sinks``) import.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

PACKAGE = "megatron.core"
_ABSENT = "wandb"


def compiled_when_called(compiler: Callable[..., Any]) -> Callable[..., Any]:
    """``compiler`` (``torch.compile``), which compiles a function at its first call instead of where it is defined.

    With keywords and without a function it returns a decorator, as ``compiler`` does.
    """

    def lazy(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
        if function is None:
            return functools.partial(lazy, **options)

        @functools.cache
        def compiled() -> Callable[..., Any]:
            return compiler(function, **options)

        @functools.wraps(function)
        def call(*arguments: Any, **keywords: Any) -> Any:
            return compiled()(*arguments, **keywords)

        return call

    return lazy


@contextlib.contextmanager
def leaving_out() -> Iterator[None]:
    """Modules that are imported inside get the lazy ``torch.compile`` and no Weights & Biases."""
    import torch

    compiler, hidden = torch.compile, _ABSENT not in sys.modules
    torch.compile = compiled_when_called(compiler)
    if hidden:
        sys.modules[_ABSENT] = None  # type: ignore[assignment]  # Python's own way to make an import fail
    try:
        yield
    finally:
        torch.compile = compiler
        if hidden:
            del sys.modules[_ABSENT]


class _Loader(importlib.abc.Loader):
    """The package's own loader, which runs it inside ``leaving_out``."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self._loader
        with leaving_out():
            self._loader.exec_module(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the package as Python does, once."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != PACKAGE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def install() -> None:
    """Make the first import of megatron-core in this process a short one; nothing where it has been imported."""
    if PACKAGE not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())

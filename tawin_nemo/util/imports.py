"""Code from outside the package, named in a recipe by an import path ``package.module:name``.

A module is looked for in the current directory, in ``PYTHONPATH`` and among the installed packages, in this order, on
every rank. What is wrong with it is a ConfigError that names the recipe key, what was expected and what was found.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tawin_nemo.util.errors import ConfigError

_NAME = r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*"
_IMPORT_PATH = re.compile(f"{_NAME}:{_NAME}")
#: Hexadecimal digits of a source's hash.
DIGITS = 16
#: Names of the folders that packages are installed into.
_INSTALLED = ("site-packages", "dist-packages")


@dataclass(frozen=True)
class Seam:
    """What the code that a recipe key names must be.

    A function (or an object that can be called) with the positional ``parameters``, or a class: it is made once, with
    the ``World`` of the run or with nothing, and its object is called. With ``events`` it is instead a class of which
    the methods of these names are called, each with its own parameters; with ``base`` a subclass of that import path.
    """

    parameters: tuple[str, ...] = ()
    returns: str = ""
    events: dict[str, tuple[str, ...]] | None = None
    base: str = ""

    def __str__(self) -> str:
        if self.base:
            return f"a subclass of {self.base}"
        if self.events is not None:
            methods = ", ".join(f"{name}({', '.join(args)})" for name, args in self.events.items())
            return f"a class with at least one of the methods {methods}"
        return f"a function or class called as ({', '.join(self.parameters)}) -> {self.returns}"


def is_import_path(text: str) -> bool:
    """Whether ``text`` has the form ``package.module:name``.

    >>> is_import_path("my.mod:fn"), is_import_path("rule")
    (True, False)
    """
    return _IMPORT_PATH.fullmatch(text) is not None


def load(key: str, path: str, seam: Seam) -> Any:
    """The object at import path ``path``, the value of recipe key ``key``.

    Raises ConfigError when the module cannot be imported, holds no such name, or holds one that does not fit ``seam``.
    """
    module_name, _, name = path.partition(":")
    found: Any = _module(f"{key}={path}", module_name)
    for part in name.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, [other for other in dir(found) if not other.startswith("_")], n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; it should hold {seam}"
            raise ConfigError(f"{key}={path}: {module_name} has no {name}{hint}")
        found = getattr(found, part)
    wrong = _misfit(found, seam)
    if wrong:
        raise ConfigError(f"{key}={path}: expected {seam}; found {wrong}")
    return found


def make(key: str, path: str, seam: Seam, world: Any = None) -> Any:
    """``load``, and the object of a class: made with ``world``, if there is one and the constructor takes an argument.

    Raises ConfigError as ``load``, and when the constructor fails.
    """
    found = load(key, path, seam)
    if not inspect.isclass(found):
        return found
    arguments = (world,) if world is not None and _binds(found, 1) else ()
    try:
        return found(*arguments)
    except Exception as error:
        given = "the world of the run" if arguments else "no arguments"
        raise ConfigError(f"{key}={path}: making {found.__name__} with {given} failed: {described(error)}") from error


def described(error: BaseException) -> str:
    """Type, message and place of an error in someone else's code, on one line."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


def _module(where: str, name: str) -> Any:
    """Import module ``name``, the current directory first, as ``python -m`` does."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    importlib.invalidate_caches()  # the file may have been written a moment ago
    try:
        return importlib.import_module(name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            raise ConfigError(
                f"{where}: there is no module {error.name}; it is looked for in the current directory {os.getcwd()}, "
                "in PYTHONPATH and among the installed packages"
            ) from None
        raise ConfigError(f"{where}: importing {name} failed: {described(error)}") from error


# -- signatures ----------------------------------------------------------------------------------------------------
def _misfit(found: Any, seam: Seam) -> str:
    """What ``found`` is, where that does not fit ``seam``; else empty."""
    if seam.base:
        base: Any = load("", seam.base, Seam(events={}))
        return "" if inspect.isclass(found) and issubclass(found, base) else shown(found)
    if inspect.isclass(found) and not (_binds(found, 1) or _binds(found, 0)):
        return f"a class made as {found.__name__}{_signature(found)}, not with the world of the run or with nothing"
    if seam.events is not None:
        return _wrong_events(found, seam.events) if seam.events else ""
    if inspect.isclass(found):
        if not any("__call__" in vars(base) for base in found.__mro__):
            return f"the class {found.__name__}, whose objects cannot be called"
        return "" if _binds(found.__call__, 1 + len(seam.parameters)) else shown(found.__call__)
    if not callable(found):
        return shown(found)
    return "" if _binds(found, len(seam.parameters)) else shown(found)


def _wrong_events(found: Any, events: dict[str, tuple[str, ...]]) -> str:
    own = 1 if inspect.isclass(found) else 0  # self
    there = [name for name in dir(found) if name.startswith("on_")]
    for name in there:
        if name not in events:
            near = difflib.get_close_matches(name, events, n=1)
            return f"{name}, which is never called" + (f"; did you mean {near[0]}?" if near else "")
        if not _binds(getattr(found, name), own + len(events[name])):
            return shown(getattr(found, name))
    return "" if there else f"{shown(found)}, which has none of them"


def _binds(function: Any, arguments: int) -> bool:
    """Whether ``function`` can be called with this number of positional arguments; True where Python cannot tell."""
    try:
        inspect.signature(function).bind(*range(arguments))
    except TypeError:
        return False
    except ValueError:  # a builtin without a signature
        return True
    return True


def _signature(found: Any) -> str:
    try:
        return str(inspect.signature(found))
    except (TypeError, ValueError):
        return "(...)"


def shown(found: Any) -> str:
    """An object as an error names it: a function with its signature, a class by name, else the type."""
    if inspect.isclass(found):
        return f"the class {found.__name__}"
    if callable(found) and hasattr(found, "__name__"):
        return f"{found.__name__}{_signature(found)}"
    return f"an object of type {type(found).__name__}"


# -- fingerprints --------------------------------------------------------------------------------------------------
def source_hash(key: str, path: str) -> str:
    """The first ``DIGITS`` of a SHA-256 over the source behind import path ``path``.

    That is the file of its module, the file that defines the object where that is another one, and the files below the
    same folder (of the top-level package, or of the module) that these import at any depth. Installed packages that
    they import are not part of it. Raises ConfigError for code without a file, such as that of a notebook's cell.
    """
    module_name, _, name = path.partition(":")
    found = module = _module(f"{key}={path}", module_name)
    for part in name.split("."):
        found = getattr(found, part, None)
    files: dict[str, Path] = {}
    for each in dict.fromkeys((module_name, getattr(found, "__module__", None) or module_name)):
        _collect(each, _root(each), files)
    if module_name not in files:
        raise ConfigError(
            f"{key}={path}: {shown(found)} of {module!r} lies in no file, so a run that is continued could not tell "
            "whether it is still the same; put it into a file that can be imported"
        )
    digest = hashlib.sha256()
    for each in sorted(files):
        digest.update(f"{each}\0{hashlib.sha256(files[each].read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:DIGITS]


def _file(module_name: str) -> Path | None:
    """The file of a module that can be imported, None for anything else."""
    try:
        spec = importlib.util.find_spec(module_name)
    except (ImportError, ValueError, AttributeError):
        return None
    path = Path(spec.origin) if spec is not None and spec.origin else None
    return path if path is not None and path.is_file() else None


def _root(module_name: str) -> Path | None:
    """The folder whose files count as the same code: that of the top-level package, or of the top-level module.

    None for a single module among the installed ones.
    """
    top = module_name.partition(".")[0]
    path = _file(top)
    if path is not None:
        return None if path.parent.name in _INSTALLED and path.name != "__init__.py" else path.parent
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError, AttributeError):
        return None
    places = list((spec.submodule_search_locations if spec else None) or ())  # a package without __init__.py
    return Path(places[0]) if places else None


def _collect(module_name: str, root: Path | None, files: dict[str, Path]) -> None:
    """Add the file of ``module_name`` and those below ``root`` that it imports."""
    path = _file(module_name)
    if path is None or module_name in files:
        return
    files[module_name] = path
    if root is None or path.suffix != ".py":
        return
    package = module_name if path.name == "__init__.py" else module_name.rpartition(".")[0]
    for name in _imports(path, package):
        if _is_below(name, root):
            _collect(name, root, files)


def _is_below(module_name: str, root: Path) -> bool:
    """Whether a module lies below ``root`` and is neither of this package nor installed into an environment there."""
    top = module_name.partition(".")[0]
    if top == "tawin_nemo" or top in sys.stdlib_module_names:
        return False
    place = _root(top)
    return place is not None and place.is_relative_to(root) and not {*place.relative_to(root).parts} & {*_INSTALLED}


def _imports(path: Path, package: str) -> Iterator[str]:
    """Dotted names that a file imports, wherever it does so; ``from a import b`` may mean ``a.b``."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".") if package else []
            above = parts[: len(parts) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            if base:
                yield base
            yield from (f"{base}.{alias.name}" if base else alias.name for alias in node.names if alias.name != "*")


def path_of(function: Callable[..., Any]) -> str:
    """The import path of a function or class, for a recipe.

    Code of a started script is named by the script's file. Raises ConfigError for what no import path leads to: a
    lambda, a function inside another one, or one of a notebook's cell.
    """
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "<lambda>")
    if module == "__main__":
        file = getattr(sys.modules["__main__"], "__file__", None)
        if file:
            folder = str(Path(file).resolve().parent)
            if folder not in sys.path:
                sys.path.insert(0, folder)
            module = Path(file).stem
        else:
            module = None
    if module is None or "<" in name:
        raise ConfigError(
            f"{shown(function)} has no import path: every rank has to import it, so put it into a file of its own and "
            "name it package.module:name"
        )
    return f"{module}:{name}"

"""Failures at named points of the product, caused from outside: the product's functions are patched, it knows nothing.

``arm("POINT=ACTION[@PASS][/RANK],...")`` patches what lies at each POINT: at the PASS-th time (default 1) that the
process comes there it does ACTION, on every rank or only on RANK. Actions: ``kill`` (SIGKILL), ``kill:MS`` (the same MS
milliseconds later, while the program goes on), ``stop`` (SIGSTOP), ``term`` (SIGTERM), ``enospc`` (the error of a full
disk), ``raise`` (any other error). Each says so on stderr, so that a test can count what it has caused.

A process of its own gets the text in the variable ``TAWIN_FAILPOINTS``: ``environment(text)`` puts
``tests/plugins/sitecustomize.py`` on its path, which arms it before anything is imported. Modules that are not imported
yet are patched as soon as they are.
"""

from __future__ import annotations

import errno
import functools
import importlib.abc
import importlib.machinery
import io
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

VARIABLE = "TAWIN_FAILPOINTS"
ROOT = Path(__file__).resolve().parents[1]
_CHECKPOINT = "tawin_nemo.models.megatron.checkpoint"
#: A write of at least this many bytes is a tensor's data, not the frame around it.
_DATA_BYTES = 1024
_TEMPORARY = re.compile(r"^\..*\.\w{8}\.tmp(\.\w+)?$")
_RULE = re.compile(r"([\w.]+)=(kill|kill:\d+|stop|term|enospc|raise)(?:@(\d+))?(?:/(\d+))?")


@dataclass(frozen=True)
class Site:
    """Where a point is: before or after the call of ``name`` (``Class.method`` or a function) of ``module``.

    ``where(*arguments)`` of the call tells whether this call is meant; ``around`` replaces both: it gets the original
    function and returns the one to call instead.
    """

    module: str
    name: str
    after: bool = False
    where: Callable[..., object] = lambda *_, **__: True
    around: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None


def _in_halves(chosen: Callable[[Path, str], bool], point: str, least: int, *, once: bool) -> Callable[..., Any]:
    """``Path.open`` whose chosen files come to ``point`` in the middle of a write of at least ``least`` bytes."""

    class Halves(io.BufferedWriter):
        met = False

        def write(self, data: Any) -> int:
            size = memoryview(data).nbytes
            if size < least or (once and self.met):
                return super().write(data)
            self.met, view = True, memoryview(data).cast("B")
            super().write(view[: size // 2])
            self.flush()
            reach(point)
            super().write(view[size // 2 :])
            return size

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        def opened(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            file = original(path, mode, *arguments, **options)
            return Halves(file.detach()) if chosen(path, mode) else file

        return opened

    return around


def _is_shard(path: Path, mode: str) -> bool:
    return mode == "wb" and path.name.endswith((".distcp", ".metadata.tmp"))


def _is_log(path: Path, mode: str) -> bool:
    return mode == "ab" and path.name in ("metrics.jsonl", "timings.jsonl")


def _is_unfinished(path: Path) -> bool:
    return path.name.endswith(".tmp") and path.is_dir()


def _is_parent(path: Path) -> bool:
    return not path.name.endswith(".tmp") and path.is_dir()


SITES = {
    # before the first byte of a checkpoint
    "save.before_write": Site(f"{_CHECKPOINT}.dcp_save", "ShardSave.__init__"),
    # half of the first tensor of a shard, or of the index of the shards, is in its file
    "save.mid_shard": Site(
        "pathlib", "Path.open", around=_in_halves(_is_shard, "save.mid_shard", _DATA_BYTES, once=True)
    ),
    # every file is written and fsynced, under the temporary name
    "save.before_rename": Site(f"{_CHECKPOINT}.files", "fsync_path", after=True, where=_is_unfinished),
    # an older checkpoint of this name is moved away, the new one not yet in its place
    "save.replacing": Site(
        "pathlib", "Path.rename", after=True, where=lambda _, target: re.fullmatch(r"\.step_\d+\.old", target.name)
    ),
    # the checkpoint has its name, and the folder is fsynced
    "save.after_rename": Site(f"{_CHECKPOINT}.files", "fsync_path", after=True, where=_is_parent),
    # a checkpoint that goes has been renamed but not removed
    "prune.mid": Site("pathlib", "Path.rename", after=True, where=lambda _, target: target.name.endswith(".gone")),
    # half of a line of metrics.jsonl or timings.jsonl
    "log.mid_line": Site("pathlib", "Path.open", around=_in_halves(_is_log, "log.mid_line", 1, once=False)),
    # candidates are found and rewarded, nothing is learnt from them yet
    "rl.after_rollout": Site("tawin_nemo.train.rl", "rollout_metrics"),
    # a rollout rank has been given prompts
    "rollout_rank.asked": Site(
        "tawin_nemo.placement.rollout_ranks",
        "_Handler._with_engine",
        where=lambda _self, _engine, message: type(message).__name__ == "Generate",
    ),
    # a rollout server is in the middle of a search: before every model call
    "server.searching": Site("tawin_nemo.serve.engine.replica", "Replica._advance"),
    # any JSON, report or table that is written under a temporary name
    "file.before_rename": Site("pathlib", "Path.replace", where=lambda path, _: _TEMPORARY.search(path.name)),
    # a nightly run's version is sealed and has not its name yet
    "publish.before_rename": Site("pathlib", "Path.rename", where=lambda _, target: target.parent.name == "versions"),
    # it has its name, and the link still points at the one before
    "publish.before_link": Site("pathlib", "Path.replace", where=lambda path, _: path.name.startswith(".latest.")),
}
POINTS = tuple(SITES)


@dataclass
class _Rule:
    """What happens at one point; ``left`` counts the passes down."""

    point: str
    action: str | Callable[[], None]
    left: int
    rank: int | None


_rules: list[_Rule] = []
_undo: list[Callable[[], None]] = []
_waiting: dict[str, list[str]] = {}  # points of modules that are not imported yet


def environment(rules: str) -> dict[str, str]:
    """What a process needs in its environment to be armed from its first moment; empty for no rules."""
    if not rules:
        return {}
    path = [str(ROOT / "tests" / "plugins"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {VARIABLE: rules, "PYTHONPATH": os.pathsep.join(filter(None, path))}


def arm(text: str) -> None:
    """Replace the rules; an empty text takes every patch back. Raises ValueError for a text that holds no rules."""
    rules = [_parsed(part) for part in text.split(",") if part]
    while _undo:
        _undo.pop()()
    _rules[:] = []
    _waiting.clear()
    for rule in rules:
        _add(rule)


@contextmanager
def calling(point: str, action: Callable[[], None]) -> Iterator[None]:
    """Call ``action`` every time that this process comes to ``point``; disarms at the end."""
    arm("")
    _add(_Rule(point, action, 0, None))
    try:
        yield
    finally:
        arm("")


def _parsed(part: str) -> _Rule:
    match = _RULE.fullmatch(part)
    if match is None or match[1] not in POINTS:
        raise ValueError(
            f"{VARIABLE}: {part!r} is not POINT=kill|kill:MS|stop|term|enospc|raise[@PASS][/RANK] with a POINT "
            f"of {', '.join(POINTS)}"
        )
    return _Rule(match[1], match[2], int(match[3] or 1), int(match[4]) if match[4] else None)


def _add(rule: _Rule) -> None:
    known = any(other.point == rule.point for other in _rules)
    _rules.append(rule)
    if known:
        return
    module = SITES[rule.point].module
    if module in sys.modules:
        _patch(rule.point)
        return
    _waiting.setdefault(module, []).append(rule.point)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Patches a module right after it has been executed."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        points = _waiting.pop(fullname, None)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target) if points else None
        if not points or spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def executed(module: ModuleType) -> None:
            execute(module)
            for point in points:
                _patch(point)

        spec.loader.exec_module = executed  # type: ignore[method-assign]
        return spec


def _patch(point: str) -> None:
    """Raises AttributeError when the product no longer has what the point's site names."""
    site = SITES[point]
    owner: Any = sys.modules[site.module]
    *classes, name = site.name.split(".")
    for part in classes:
        owner = getattr(owner, part)
    original = getattr(owner, name)

    @functools.wraps(original)
    def patched(*arguments: Any, **options: Any) -> Any:
        meant = bool(site.where(*arguments, **options))
        if meant and not site.after:
            reach(point)
        result = original(*arguments, **options)
        if meant and site.after:
            reach(point)
        return result

    setattr(owner, name, functools.wraps(original)(site.around(original)) if site.around else patched)
    _undo.append(lambda: setattr(owner, name, original))


def reach(point: str) -> None:
    """The program is at ``point``."""
    for rule in list(_rules):
        if rule.point == point and rule.rank in (None, _rank()):
            rule.left -= 1
            if callable(rule.action):
                rule.action()
            elif rule.left == 0:
                _act(rule.point, rule.action)


def _rank() -> int:
    from tawin_nemo.util.launch import read_launch

    return read_launch().rank


def _act(point: str, words: str) -> None:
    action, _, delay = words.partition(":")
    os.write(2, f"failpoint {point}: {words}\n".encode())
    if action == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if action == "raise":
        raise RuntimeError(f"failpoint {point}")
    number = {"term": signal.SIGTERM, "stop": signal.SIGSTOP}.get(action, signal.SIGKILL)
    if delay:
        threading.Thread(target=_send, args=(number, int(delay) / 1000), daemon=True).start()
        return
    _send(number, 0.0)


def _send(number: signal.Signals, seconds: float) -> None:
    time.sleep(seconds)
    os.kill(os.getpid(), number)

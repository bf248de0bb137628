"""A nightly run over semantic IDs is killed again and again; what is live stays whole, and the version is the same."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

from tawin_nemo.run.published import check_version, live_version
from tests.crash_matrix.attempts import Attempt, attempt
from tests.crash_matrix.cases import Outcome, Setting
from tests.crash_matrix.verbs import files
from tests.tools.retrain.shop import FIRST, SECOND, words, write_log

#: While data and codes are written, in training, at the gate, and in the three steps of a publication.
KILLS = (
    "file.before_rename=kill", "file.before_rename=kill@9", "random", "save.mid_shard=kill", "random",
    "file.before_rename=kill@2", "publish.before_rename=kill", "publish.before_link=kill",
)  # fmt: skip


def retrain(world: Setting, name: str) -> Outcome:
    """The second night, with a changed catalog, against one that was never killed."""
    folder = world.folder / name
    write_log(folder / "log")
    whole, killed = folder / "whole", folder / "killed"

    def night(root: Path, day: str, **options: object) -> Attempt:
        line = words(root, folder / "log", day, "trainer.save_interval=2")
        return attempt(line[1:], words=line[:1], log=folder / f"{root.name}.log", **options)  # type: ignore[arg-type]

    first = night(whole, FIRST)
    shutil.copytree(whole, killed, symlinks=True)
    second = night(whole, SECOND)
    problem = "" if first.code == second.code == 0 else f"a night failed: {first.last_words} {second.last_words}"
    attempts: list[Attempt] = []
    for place in KILLS:
        if place == "random":
            attempts.append(night(killed, SECOND, after=world.draw.uniform(0.05, 0.2) * second.cpu))
        else:
            attempts.append(night(killed, SECOND, rules=place))
        if attempts[-1].code != -signal.SIGKILL:
            problem = problem or f"{place}: exit {attempts[-1].code}: {attempts[-1].last_words}"
        problem = problem or _of_what_is_live(killed, place, attempts[-1].code)
    attempts.append(night(killed, SECOND))
    if attempts[-1].code != 0:
        problem = problem or f"the last attempt ended with {attempts[-1].code}: {attempts[-1].last_words}"
    problem = problem or _of_what_is_live(killed, "the end", 0)
    one, other = ({**files(root / "versions"), **_files_of(root)} for root in (killed, whole))
    if not problem and one != other:
        problem = f"other files or bytes: {sorted(file for file, _ in set(one.items()) ^ set(other.items()))}"
    points = [f"retrain: {place}" if place == "random" else place.partition("=")[0] for place in KILLS]
    codes, seconds = tuple(done.code for done in attempts), sum(done.seconds for done in attempts)
    return Outcome(name, tuple(points), codes, problem, seconds)


def _of_what_is_live(root: Path, place: str, code: int) -> str:
    """What is wrong with the live version after an attempt that ended with ``code``: the old one, or the new one."""
    live = live_version(root)
    expected = SECOND if code == 0 else FIRST
    if live is None or live.name != expected:
        return f"{place}: {live} is live instead of {expected}"
    check_version(live)
    return ""


def _files_of(root: Path) -> dict[str, str]:
    """The item numbers, which belong to the folder."""
    return {"items.jsonl": (root / "items.jsonl").read_text(encoding="utf-8")}

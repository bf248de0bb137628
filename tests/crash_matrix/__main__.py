"""Kill, stop and starve training runs at known and at random moments; each must resume to the same bytes.

    python -m tests.crash_matrix                  a short slice: one chain of kills, a full disk, a truncated checkpoint
    python -m tests.crash_matrix --full           everything (about 10 minutes on 2 idle cores)
    python -m tests.crash_matrix --full --json recipes/results/crash_matrix.json
    python -m tests.crash_matrix --full --only lost-server --json recipes/results/crash_matrix.json

With ``--only`` a case that FILE does not have yet is added to those that it has, with its own commit and date.
The table goes to stderr, one JSON object to stdout; exit code 1 when a case failed or a point was never reached.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tests.crash_matrix import cases, nights, servers, verbs
from tests.crash_matrix.attempts import warm_up
from tests.crash_matrix.cases import Outcome, Setting
from tests.failpoints import POINTS
from tests.train.runs import prepare_dataset

RANK_RULES = ("save.mid_shard=kill@2/1", "rl.after_rollout=kill@2/1")
SEARCHING_RULES = ("rollout_rank.asked=kill@4/1",)  # in RL, behind its first checkpoint
ASYNC = "trainer.async_save=true"
SLICE = ("save.before_write=kill@2", "save.mid_shard=kill@2", "save.before_rename=kill", "save.after_rename=kill@2")


Case = Callable[[Setting, str], Outcome | None]


def chain(world: Setting, name: str, places: tuple[str, ...], more: tuple[str, ...]) -> Outcome:
    return cases.chain(world, name, places, *more)


def plan(*, full: bool) -> dict[str, Case]:
    """Every case by its name."""
    if not full:
        return {
            "slice-kills": partial(cases.chain, places=SLICE),
            "slice-disk": partial(cases.full_disk, rules="save.mid_shard=enospc@3"),
            "slice-truncated": cases.truncated,
        }
    return {
        **{
            f"kills-{number}": partial(chain, places=places, more=(ASYNC,) if number % 2 else ())
            for number, places in enumerate(cases.CHAINS)
        },
        "terms": partial(cases.terms, count=cases.TERMS),
        "disk-shard": partial(cases.full_disk, rules="save.mid_shard=enospc@3"),
        "disk-log": partial(cases.full_disk, rules="log.mid_line=enospc@6"),
        "disk-json": partial(cases.full_disk, rules="file.before_rename=enospc@5"),
        "disk-limit": partial(cases.full_disk, rules="", fsize=200_000),
        "disk-tmpfs": cases.full_tmpfs,
        "truncated": cases.truncated,
        "all-truncated": cases.all_truncated,
        "preference": verbs.preference,
        "convert": verbs.convert,
        "tokenize": verbs.tokenize,
        "recommend": verbs.recommend,
        "lost-server": servers.lost_server,
        "retrain": nights.retrain,
        "ranks": lambda world, name: cases.rank_killed(world, name, RANK_RULES, cases.LAYOUT),
        "ranks-apart": lambda world, name: cases.rank_killed(world, name, SEARCHING_RULES, *cases.APART),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.crash_matrix", description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="every case, not the short slice")
    parser.add_argument("--data", type=Path, help="a prepared dataset (default: a generated one)")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--json", type=Path, help="write the JSON there as well; with --only: add to it")
    arguments = parser.parse_args(argv)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="crash_matrix_") as name:
        folder = Path(name)
        data = arguments.data or prepare_dataset(folder / "dataset")
        warm_up()
        world = cases.setting(folder, data)
        found = []
        for case, run in plan(full=arguments.full).items():
            outcome = run(world, case) if arguments.only in case else None
            if outcome is not None:
                found.append(outcome)
                print(row(outcome), file=sys.stderr, flush=True)
    result = report(found, "--full" if arguments.full else "", time.monotonic() - start)
    print(table(result), file=sys.stderr, flush=True)
    print(json.dumps(result), flush=True)
    if arguments.json:
        written = added(json.loads(arguments.json.read_text(encoding="utf-8")), result) if arguments.only else result
        arguments.json.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    return 0 if result["failed"] == 0 and (arguments.only or not result["points_never_reached"]) else 1


def row(outcome: Outcome) -> str:
    said = outcome.problem or "same bytes at the end, or the clear error that was asked for"
    return f"{outcome.case:16} {outcome.seconds:6.1f} s  exit codes {list(outcome.codes)}  {said}"


def report(found: list[Outcome], options: str, seconds: float) -> dict[str, Any]:
    """What is committed: command, date, hardware, counts per point, cases."""
    counts = Counter(point for outcome in found for point in outcome.points)
    return {
        "command": f"python -m tests.crash_matrix {options}".strip(),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores",
        "commit": _commit(),
        "seconds": round(seconds, 1),
        "cases": len(found),
        "failed": sum(bool(outcome.problem) for outcome in found),
        "sigkills": sum(code == -9 for outcome in found for code in outcome.codes),
        "sigterms": counts["SIGTERM"],
        "events_per_point": dict(sorted(counts.items())),
        "points_never_reached": sorted(set(POINTS) - counts.keys()) if options == "--full" else [],
        "outcomes": [
            {
                "case": o.case,
                "exit_codes": list(o.codes),
                "problem": o.problem,
                "seconds": round(o.seconds, 1),
                **({"seconds_to_end_after_a_kill": list(o.seconds_to_end)} if o.seconds_to_end else {}),
            }
            for o in found
        ],
    }


def added(before: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A committed result with the cases of another one added. Raises ValueError for a case that it has already."""
    have = {outcome["case"] for outcome in before["outcomes"]}
    again = [outcome["case"] for outcome in new["outcomes"] if outcome["case"] in have]
    if again:
        raise ValueError(
            f"{', '.join(again)}: only a run of all cases replaces a case, since it counts all points anew"
        )
    points = Counter(before["events_per_point"]) + Counter(new["events_per_point"])
    own = {key: new[key] for key in ("commit", "date")}
    sums = {key: before[key] + new[key] for key in ("seconds", "cases", "failed", "sigkills", "sigterms")}
    return {
        **before,
        **sums,
        "seconds": round(sums["seconds"], 1),
        "events_per_point": dict(sorted(points.items())),
        "points_never_reached": sorted(set(before["points_never_reached"]) - points.keys()),
        "outcomes": [*before["outcomes"], *({**outcome, **own} for outcome in new["outcomes"])],
    }


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def table(result: dict[str, Any]) -> str:
    lines = [f"{'point':40} events", *(f"{point:40} {n}" for point, n in result["events_per_point"].items())]
    lines.append(f"{result['cases']} cases, {result['failed']} failed, {result['sigkills']} SIGKILLs")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

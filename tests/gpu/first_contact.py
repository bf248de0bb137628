"""``first_contact.sh``: parts in a fixed order, each in a process of its own, one JSON line each, 12 minutes in all.

A line has ``part``, ``status`` (passed, failed or skipped), ``seconds``, and the figures of the part or a ``reason``.
The last line is a summary: ``dry_run``, ``commit``, ``date``, ``failed``, ``not_run``. Exit code 0 when nothing failed,
1 when a part did, 2 without a CUDA device. The numbers of a dry run are no measurement. With
``TAWIN_GPU_DRY=pretended`` every part runs on the pretended device of ``tests/simcuda`` and fails on a fault of it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from tests.gpu import run
from tests.gpu.workload import is_dry, is_pretended

#: Seconds of all parts together, and of each; the order is that of what would be missed most.
TOTAL_S = 720.0
LIMITS_S = {
    "machine": 20.0, "sdpa": 60.0, "first_steps": 50.0, "correctness": 60.0, "compile": 60.0, "train_new_shapes": 90.0,
    "decode_7b": 80.0, "graphs": 40.0, "update_3b": 80.0, "checkpoint": 60.0, "determinism": 60.0, "end_to_end": 60.0,
}  # fmt: skip
#: Module and function of every part; a part imports no more than it needs.
FUNCTIONS = {
    "machine": "contact_machine:machine", "sdpa": "contact_parts:sdpa", "first_steps": "contact_parts:first_steps",
    "correctness": "contact_parts:correctness", "compile": "contact_parts:compiled",
    "train_new_shapes": "contact_parts:train_new_shapes", "decode_7b": "contact_models:decode_7b",
    "graphs": "contact_models:graphs",
    "update_3b": "contact_models:update_3b", "checkpoint": "contact_state:checkpoints",
    "determinism": "contact_state:deterministic", "end_to_end": "contact_state:end_to_end",
}  # fmt: skip
#: Why a part cannot run on a pretended device.
NOT_PRETENDED = {
    "graphs": "the pretended device has no CUDA graphs (tests/simcuda/test_fixed_search.py records and repeats them)"
}
#: A part is not begun with less than this left.
LEAST_S = 10.0


def function_of(name: str) -> Callable[[], dict[str, Any]]:
    """The function of a part; its module is imported here."""
    module, _, function = FUNCTIONS[name].partition(":")
    found: Callable[[], dict[str, Any]] = getattr(import_module(f"tests.gpu.{module}"), function)
    return found


def run_one(name: str) -> int:
    """Run one part in this process; its figures are the last line on stdout."""
    if is_pretended():
        from tests.gpu.contact_common import check_pretended, pretend_if_asked

        pretend_if_asked()
        found = function_of(name)()
        check_pretended()
        print(json.dumps(found | {"device": "pretended"}))
    else:
        print(json.dumps(function_of(name)()))
    return 0


def command_of(name: str) -> list[str]:
    return [sys.executable, "-W", "ignore", "-m", "tests.gpu.first_contact", "--part", name]


def run_all(
    names: Sequence[str], total_s: float, *, command: Callable[[str], Sequence[str]] = command_of
) -> Iterator[dict[str, Any]]:
    """One result a part, as soon as it has ended; those for which no time is left are skipped."""
    end = time.monotonic() + total_s
    for name in names:
        left = end - time.monotonic()
        if left < LEAST_S:
            yield {"part": name, "status": "skipped", "reason": f"{max(left, 0):.0f} s of {total_s:g} s left"}
            continue
        if is_pretended() and name in NOT_PRETENDED:
            yield {"part": name, "status": "skipped", "reason": NOT_PRETENDED[name]}
            continue
        yield {"part": name, **run.run_part(name, command(name), min(LIMITS_S[name], left))}


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests/gpu/first_contact.sh", description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(LIMITS_S), help=f"comma-separated: {', '.join(LIMITS_S)}")
    parser.add_argument("--total-s", type=float, default=TOTAL_S, help="seconds for all parts together")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # what run_all starts
    given = parser.parse_args(argv)
    unknown = [name for name in given.parts.split(",") if name not in LIMITS_S]
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(LIMITS_S)}")
    return given


def main(argv: Sequence[str] | None = None) -> int:
    given = arguments(argv)
    if given.part:
        return run_one(given.part)
    if is_dry():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif run.this_machine().capability is None:
        print("no CUDA device: nothing was run. TAWIN_GPU_DRY=1 tests the script on a CPU.", file=sys.stderr)
        return 2
    folder = Path(os.environ.get("OUT", "first_contact"))
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    with (folder / "first_contact.jsonl").open("w", encoding="utf-8") as file:

        def say(line: dict[str, Any]) -> None:
            for target in (file, sys.stdout):
                print(json.dumps(line), file=target, flush=True)

        for result in run_all(given.parts.split(","), given.total_s):
            results.append(result)
            say(result)
        origin = run.provenance(argv) | {"command": "tests/gpu/first_contact.sh"}
        state = {name: [x["part"] for x in results if x["status"] == name] for name in ("failed", "skipped")}
        note = {"note": run.DRY_NOTE} if is_dry() else {}
        say({"dry_run": is_dry(), **note, **origin, "failed": state["failed"], "not_run": state["skipped"]})
    return 1 if state["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())

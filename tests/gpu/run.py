"""``run.sh``: every part in a process of its own, with a time limit; a part that fails is reported, the rest runs.

The last line on stdout is one JSON object: ``dry_run``, ``machine``, ``sizes``, ``parts`` (each with ``status`` passed,
failed or skipped, ``seconds``, and its figures or a ``reason``) and ``failed``. Exit code 0 when nothing failed, 1 when
a part did, 2 without a CUDA device. A dry run says so in ``note``; its numbers are no measurement.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from tawin_nemo.models.megatron.model.precision import FP8, this_machine, unsupported_reason
from tests.gpu.workload import is_dry, sizes_of_run

LIMIT_S = 600.0
#: An FP8 curve has to end this close to bf16's, as a share of it.
AGREEMENT = 0.05
DRY_NOTE = "dry run of the script on a tiny model: no measurement, nothing here says anything about a GPU"
NAMES = (
    "attention", "bf16_vs_fp32", "train_bf16", *(f"train_{name}" for name in FP8),
    "mismatch_bf16", *(f"mismatch_{name}" for name in FP8), "nccl", "pytest",
)  # fmt: skip


def why_skipped(name: str) -> str:
    """The reason a part cannot run on this machine, empty if it can."""
    unsupported = unsupported_reason(name.partition("_")[2], this_machine())
    if unsupported is not None:
        return f"{unsupported.reason}: {unsupported.remedy}"
    if name == "pytest" and is_dry():
        return "needs a CUDA device"
    if name == "pytest" and importlib.util.find_spec("pytest") is None:
        return "pytest is not installed"
    return ""


def command_of(name: str) -> list[str]:
    return [sys.executable, "-W", "ignore", "-m", "tests.gpu.run", "--part", name]


def run_part(name: str, command: Sequence[str], limit_s: float) -> dict[str, Any]:
    """Status, seconds, and the figures of the part's last line or the end of what it said."""
    begin = time.monotonic()
    environment = dict(os.environ) | ({"CUDA_VISIBLE_DEVICES": ""} if is_dry() else {})
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, env=environment)
    except subprocess.TimeoutExpired:
        return {"status": "failed", "seconds": round(limit_s, 1), "reason": f"did not end within {limit_s:g} s"}
    found: dict[str, Any] = {"seconds": round(time.monotonic() - begin, 1)}
    if done.returncode == 0:
        with contextlib.suppress(ValueError, IndexError):
            return {"status": "passed", **found, **json.loads(done.stdout.strip().splitlines()[-1])}
    said = [line for line in (done.stderr or done.stdout).strip().splitlines() if line.strip()]
    reason = said[-1] if said else "it said nothing"
    return {"status": "failed", **found, "reason": f"exit code {done.returncode}: {reason}", "said": said[-12:]}


def run_parts(
    names: Sequence[str], *, limit_s: float = LIMIT_S, command: Callable[[str], Sequence[str]] = command_of
) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        reason = why_skipped(name)
        found[name] = {"status": "skipped", "reason": reason} if reason else run_part(name, command(name), limit_s)
        print(f"{name}: {found[name]['status']} {found[name].get('reason', '')}", file=sys.stderr, flush=True)
    return found


def compare_curves(parts: dict[str, dict[str, Any]]) -> None:
    """Each FP8 curve's end against bf16's; one that lies too far off has failed."""
    base = parts.get("train_bf16", {})
    for name in FP8:
        part = parts.get(f"train_{name}", {})
        if part.get("status") != "passed" or base.get("status") != "passed":
            continue
        part["gap_to_bf16"] = (part["last"] - base["last"]) / base["last"]
        part["speed_over_bf16"] = part["tokens_per_s"] / base["tokens_per_s"]
        if abs(part["gap_to_bf16"]) > AGREEMENT:
            part |= {"status": "failed", "reason": f"ends {part['gap_to_bf16']:+.1%} from bf16, limit {AGREEMENT:.0%}"}


def machine_facts() -> dict[str, Any]:
    import torch

    seen = this_machine()
    versions = {}
    for name in ("torch", "megatron-core", "transformer-engine", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"gpus": gpus, "cuda": seen.cuda, "capability": seen.capability, "python": platform.python_version(),
            "versions": versions}  # fmt: skip


def provenance(argv: Sequence[str] | None) -> dict[str, str]:
    words = sys.argv[1:] if argv is None else argv
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True) if shutil.which("git") else None
    commit = git.stdout.strip() if git is not None and git.returncode == 0 else "unknown"
    return {"command": shlex.join(["bash", "tests/gpu/run.sh", *words]), "commit": commit,
            "date": time.strftime("%Y-%m-%d %H:%M")}  # fmt: skip


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests/gpu/run.sh", description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(NAMES), help=f"comma-separated: {', '.join(NAMES)}")
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help="seconds for one part")
    parser.add_argument("--json", type=Path, help="also write the result to this file, indented")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # what run_part starts
    given = parser.parse_args(argv)
    unknown = [name for name in given.parts.split(",") if name not in NAMES]
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(NAMES)}")
    return given


def main(argv: Sequence[str] | None = None) -> int:
    given = arguments(argv)
    if given.part:
        from tests.gpu.parts import PARTS

        print(json.dumps(PARTS[given.part]()))
        return 0
    if is_dry():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif this_machine().capability is None:
        print("no CUDA device: nothing was run. TAWIN_GPU_DRY=1 tests the script on a CPU.", file=sys.stderr)
        return 2
    begin = time.monotonic()
    parts = run_parts(given.parts.split(","), limit_s=given.limit_s)
    compare_curves(parts)
    result = {
        "dry_run": is_dry(), **({"note": DRY_NOTE} if is_dry() else {}), **provenance(argv), "machine": machine_facts(),
        "sizes": sizes_of_run(), "parts": parts, "seconds": round(time.monotonic() - begin, 1),
        "failed": [name for name, part in parts.items() if part["status"] == "failed"],
    }  # fmt: skip
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())

"""What every benchmark shares: runs in turn, the machine's own limits, peak memory, a table and one JSON line.

The sides that are compared run in turn (a, b, a, b, ...), so that a machine that slows down hits both. Figures are
medians with quartiles. ``floor_seconds`` is what the machine cannot beat: floating-point operations over the measured
rate of large matrix products, or bytes over the measured copy bandwidth, whichever is longer.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tawin_nemo.run.mfu import matmul_tflops

REPOSITORY = Path(__file__).resolve().parents[2]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHORTEST_SAMPLE = 0.05  # seconds; shorter runs are repeated within one sample


@dataclass(frozen=True)
class Timed:
    """Seconds per run."""

    samples: list[float]

    @property
    def median(self) -> float:
        return float(np.median(self.samples))

    @property
    def quartiles(self) -> tuple[float, float]:
        low, high = np.percentile(self.samples, [25, 75])
        return float(low), float(high)

    def facts(self) -> dict[str, Any]:
        return {"median_seconds": rounded(self.median), "quartiles": [rounded(q) for q in self.quartiles],
                "runs": len(self.samples)}  # fmt: skip


def in_turn(sides: dict[str, Callable[[], Any]], *, repeats: int = 5, warm: Collection[str] = ()) -> dict[str, Timed]:
    """Time every side ``repeats`` times, one after the other each round.

    A round before that does not count; sides named in ``warm`` have run before and skip it.
    """
    inner = {name: 1 if name in warm else _calls_per_sample(run) for name, run in sides.items()}
    samples: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            gc.collect()
            begin = time.perf_counter()
            for _ in range(inner[name]):
                run()
            samples[name].append((time.perf_counter() - begin) / inner[name])
    return {name: Timed(values) for name, values in samples.items()}


def seconds_of(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def _calls_per_sample(run: Callable[[], Any]) -> int:
    """Also the warm-up; the second call counts, since the first one may build caches."""
    seconds = seconds_of(run)
    if seconds < SHORTEST_SAMPLE:
        seconds = seconds_of(run)
    return max(1, round(SHORTEST_SAMPLE / max(seconds, 1e-7)))


def best_of(variants: dict[str, Callable[[], Any]]) -> tuple[str, dict[str, float]]:
    """Run every variant once (the fastest gets a second run, against a cold start) and name the fastest."""
    seconds = {name: seconds_of(run) for name, run in variants.items()}
    best = min(seconds, key=lambda name: seconds[name])
    seconds[best] = min(seconds[best], seconds_of(variants[best]))
    return best, {name: rounded(value) for name, value in seconds.items()}


# -- the machine ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Machine:
    """What this process can use, and how fast its two basic operations are."""

    cpu: str
    cores: int
    threads: int
    torch: str
    python: str
    load_before: float  # processes that wanted a core in the minute before the start
    tflops: dict[str, float]  # square matrix products, per number format
    copy_gb_s: float  # read plus written bytes

    def floor_seconds(self, *, flops: float = 0.0, moved_bytes: float = 0.0, dtype: str = "fp32") -> float:
        return max(flops / (self.tflops[dtype] * 1e12), moved_bytes / (self.copy_gb_s * 1e9))


def this_machine() -> Machine:
    load = os.getloadavg()[0]
    if load > 0.7:
        print(f"note: load {load:.1f} before the start: other work shares the cores, times may be wrong",
              file=sys.stderr)  # fmt: skip
    return Machine(
        cpu=_cpu_name(), cores=len(os.sched_getaffinity(0)), threads=torch.get_num_threads(),
        torch=torch.__version__, python=platform.python_version(), load_before=round(load, 2),
        tflops={name: rounded(matmul_tflops(dtype, seconds=0.6)) for name, dtype in DTYPES.items()},
        copy_gb_s=rounded(copy_bandwidth() / 1e9),
    )  # fmt: skip


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def copy_bandwidth(megabytes: int = 256) -> float:
    """Bytes read plus written per second by a large copy; the best of five."""
    source = torch.ones(megabytes * 2**20 // 4)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / min(seconds_of(lambda: target.copy_(source)) for _ in range(5))


# -- memory --------------------------------------------------------------------------------------------------------
def resident_mib() -> float:
    return _status("VmRSS")


def peak_above(run: Callable[[], Any]) -> float:
    """MiB by which the resident memory of this process rose above its start at most, while ``run`` ran.

    Linux keeps the high-water mark; writing 5 to clear_refs sets it back to the present. Inside the figure is whatever
    ``run`` allocates and touches; what lay in memory before (weights, gradients, data) is not.
    """
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = resident_mib()
    run()
    return _status("VmHWM") - before


def _status(key: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {key}; peak memory can only be measured on Linux")


def in_child(module: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Run a benchmark module again in a process of its own (for its memory) and read its last line."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], check=True, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


# -- the result ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Target:
    goal: str
    value: float
    met: bool

    @classmethod
    def at_least(cls, goal: float, value: float) -> Target:
        return cls(f">= {goal:g}", rounded(value), bool(value >= goal))

    @classmethod
    def at_most(cls, goal: float, value: float) -> Target:
        return cls(f"<= {goal:g}", rounded(value), bool(value <= goal))


@dataclass
class Report:
    """One benchmark's outcome; ``rows`` are what the table shows, ``unfair`` what a reader has to know."""

    name: str
    machine: Machine
    shapes: dict[str, Any]
    settings: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    targets: dict[str, Target] = field(default_factory=dict)
    unfair: list[str] = field(default_factory=list)
    checks: dict[str, Any] = field(default_factory=dict)  # that both sides computed the same

    def finish(self, *, ours: float, baseline: float, floor: float, json_file: str = "") -> None:
        """Print the table and the JSON line, and write the latter to ``json_file`` as well."""
        result = {
            "benchmark": self.name,
            "command": " ".join(["python -m", f"tests.benchmarks.{self.name}", *_shown_arguments()]),
            "commit": _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain") else ""),
            "date": time.strftime("%Y-%m-%d"),
            "ratio": rounded(baseline / ours),
            "floor_ratio": rounded(ours / floor),
            "ours_median_seconds": rounded(ours),
            "baseline_median_seconds": rounded(baseline),
            "floor_seconds": rounded(floor),
            "shapes": self.shapes,
            "settings": self.settings,
            "targets": {name: asdict(target) for name, target in self.targets.items()},
            "checks": self.checks,
            "rows": self.rows,
            "unfair": self.unfair,
            "machine": asdict(self.machine),
        }
        print(f"\n{self.name}: {json.dumps(self.shapes)}")
        print(table(self.rows))
        for name, target in self.targets.items():
            print(f"target {name}: {target.value:g} (goal {target.goal}) {'met' if target.met else 'NOT MET'}")
        for text in self.unfair:
            print(f"unfair: {text}")
        if json_file:
            Path(json_file).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(result), flush=True)


def table(rows: list[dict[str, Any]]) -> str:
    """Aligned columns, in the order in which the keys first occur."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *[[_cell(row.get(name)) for name in names] for row in rows]]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return " .. ".join(_cell(part) for part in value)
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def rounded(value: float) -> float:
    return float(f"{value:.5g}")


def _shown_arguments() -> list[str]:
    """The command line without where the result goes."""
    given = sys.argv[1:]
    return [word for place, word in enumerate(given) if word != "--json" and given[place - 1 : place] != ["--json"]]


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=REPOSITORY)
    return done.stdout.strip()


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Options of all benchmarks."""
    result = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--full", action="store_true", help="the published shapes; longer than ten minutes")
    result.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads of both sides")
    result.add_argument("--repeats", type=int, default=5, help="timed runs of each side")
    result.add_argument("--json", default="", metavar="FILE", help="write the result to this file, too")
    return result

"""The targets of finished benchmarks as the Markdown table that the pages of recipes/results quote.

python -m tests.benchmarks.summary recipes/results/bench_*.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HEAD = "| benchmark | ours, median | other side | x floor | target | goal | measured | |\n" + "|---" * 8 + "|"


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def seconds(value: float) -> str:
    return f"{1e3 * value:.3g} ms" if value < 1 else f"{number(value)} s"


def lines(name: str, result: dict[str, Any]) -> list[str]:
    """One line per target (one for a benchmark without any); ``name`` is the file's, ``bench_NAME[.VARIANT].json``."""
    title = name.removeprefix("bench_").removesuffix(".json").replace(".", ", ")
    head = (
        f"| [{title}]({name}) | {seconds(result['ours_median_seconds'])} | "
        f"{seconds(result['baseline_median_seconds'])} | {number(result['floor_ratio'])} |"
    )
    targets = result["targets"] or {"": {"goal": "", "value": result["ratio"], "met": None}}
    return [
        f"{head} {target} | {facts['goal']} | {number(facts['value'])} | "
        f"{ {True: 'met', False: '**missed**', None: ''}[facts['met']] } |"
        for target, facts in targets.items()
    ]


def main() -> None:
    print(HEAD)
    for path in map(Path, sys.argv[1:]):
        print("\n".join(lines(path.name, json.loads(path.read_text(encoding="utf-8")))))


if __name__ == "__main__":
    main()

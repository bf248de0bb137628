"""Study `indexes` once more, test rows apart: those whose target shares its ID in MiniOneRec's index, and the others.

    python -m tests.benchmarks.shared_ids

Nothing is trained: the ranks are in the committed run files. A hit counts in full everywhere. Prints a Markdown table.
"""

from __future__ import annotations

import numpy as np

from tawin_nemo.eval.paired import hierarchical_interval, paired_test
from tawin_nemo.study.record import RunRecord, SplitResult, read_folder
from tawin_nemo.study.tables import plain, signed
from tests.benchmarks.harness import REPOSITORY

FOLDER = REPOSITORY / "recipes" / "results" / "indexes"
ARMS = ("ours", "published", "minionerec", "random")
METRICS = ("recall@1", "recall@3")


def tests_of(records: dict[tuple[str, int], RunRecord], arm: str) -> list[SplitResult]:
    return [record.splits["test"] for (name, _), record in sorted(records.items()) if name == arm]


def cells(ours_SB: np.ndarray, arm_SB: np.ndarray, shared_B: np.ndarray) -> list[str]:
    """Share of the hits that lie on shared rows, mean on the others, and the arm minus ours there."""
    mean = hierarchical_interval(arm_SB[:, ~shared_B])
    test = paired_test(arm_SB[:, ~shared_B], ours_SB[:, ~shared_B]).difference
    text = f"{signed(test.mean)} [{signed(test.low)}, {signed(test.high)}]" if arm_SB is not ours_SB else ""
    share = arm_SB[:, shared_B].sum() / arm_SB.sum()
    return [f"{share:.0%}", plain(mean.mean), f"**{text}**" if text and test.excludes_zero else text]


def lines() -> list[str]:
    records, _ = read_folder(FOLDER)
    shared_B = tests_of(records, "minionerec")[0].sharing_B
    if shared_B is None:
        raise ValueError(f"no target of {FOLDER}/minionerec.*.json shares its ID")
    shared_B = shared_B > 1
    head = [f"R@{metric[-1]}: {text}" for metric in METRICS for text in ("hits there", "other rows", "minus ours")]
    rows = [["index", *head], ["---"] * (1 + len(head))]
    for arm in ARMS:
        row = [f"`{arm}`"]
        for metric in METRICS:
            ours_SB, arm_SB = (
                np.stack([one.matches(metric) for one in tests_of(records, name)]) for name in ("ours", arm)
            )
            row += cells(arm_SB if arm == "ours" else ours_SB, arm_SB, shared_B)
        rows.append(row)
    title = f"{shared_B.sum()} of {len(shared_B):,} test rows have a target that shares its ID in MiniOneRec's index."
    return [title, *(f"| {' | '.join(row)} |" for row in rows)]


if __name__ == "__main__":
    print("\n".join(lines()))

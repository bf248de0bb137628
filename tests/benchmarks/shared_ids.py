"""Study `indexes` once more, test rows apart: those whose target shares its ID in MiniOneRec's index, and the others.

    python -m tests.benchmarks.shared_ids

Nothing is trained: the ranks are in the committed run files. A hit counts in full everywhere. Prints a Markdown table.
"""

from __future__ import annotations

import numpy as np

from tawin_nemo.eval.paired import paired_test
from tawin_nemo.tools.study.record import RunRecord, read_folder
from tawin_nemo.tools.study.tables import plain, short, signed
from tests.benchmarks.harness import REPOSITORY

FOLDER = REPOSITORY / "recipes" / "results" / "indexes"
ARMS = ("ours", "published", "minionerec", "random")
METRICS = ("recall@1", "recall@3")


def hits_of(records: dict[tuple[str, int], RunRecord], arm: str, metric: str) -> np.ndarray:
    """[seeds, rows]"""
    return np.stack([one.splits["test"].matches(metric) for (name, _), one in sorted(records.items()) if name == arm])


def cells(arm_SB: np.ndarray, ours_SB: np.ndarray, shared_B: np.ndarray) -> list[str]:
    """Share of the hits that lie on shared rows, mean on the others, and the arm minus ours there."""
    share = arm_SB[:, shared_B].sum() / arm_SB.sum()
    test = paired_test(arm_SB[:, ~shared_B], ours_SB[:, ~shared_B]).difference
    text = f"{signed(test.mean)} [{signed(test.low)}, {signed(test.high)}]"
    return [f"{share:.0%}", plain(arm_SB[:, ~shared_B].mean()), f"**{text}**" if test.excludes_zero else text]


def lines() -> list[str]:
    records, _ = read_folder(FOLDER)
    sharing_B = records["minionerec", 1].splits["test"].sharing_B
    if sharing_B is None:
        raise ValueError(f"no target of {FOLDER}/minionerec.seed1.json shares its ID")
    shared_B = sharing_B > 1
    head = [f"{short(metric)}: {text}" for metric in METRICS for text in ("hits there", "other rows", "minus ours")]
    rows = [["index", *head], ["---"] * (1 + len(head))]
    ours = {metric: hits_of(records, "ours", metric) for metric in METRICS}
    for arm in ARMS:
        found = [cells(hits_of(records, arm, metric), ours[metric], shared_B) for metric in METRICS]
        rows.append([f"`{arm}`", *(cell for three in found for cell in (three if arm != "ours" else [*three[:2], ""]))])
    title = f"{shared_B.sum()} of {len(shared_B):,} test rows have a target that shares its ID in MiniOneRec's index."
    return [title, *(f"| {' | '.join(row)} |" for row in rows)]


if __name__ == "__main__":
    print("\n".join(lines()))

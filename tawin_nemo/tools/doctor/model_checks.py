"""What the figures of a trained model mean: one line with a verdict and a remedy for each of them."""

from __future__ import annotations

from collections.abc import Sequence

from tawin_nemo.eval.intervals import Interval
from tawin_nemo.eval.result import EvalResult
from tawin_nemo.tools.doctor.check import Check, check, fails, ok, warning

#: Beams of a prompt that is decoded without the trie; cut-offs of recall, and of recall in the tail.
FREE_BEAMS, RECALL_K, TAIL_K = 10, 10, 50
#: The items with the fewest rows of train that are the tail.
UNPOPULAR_SHARE = 0.8
#: Free answers that name no item, unused codes of a level, and recall of the tail as a share of that of all: beyond
#: these (below the last) a line is a warning.
INVALID_SHARE, DEAD_SHARE, TAIL_RATIO = 0.01, 0.2, 0.5


def share(count: tuple[int, int]) -> float:
    """The first number as a share of the second."""
    return count[0] / max(1, count[1])


@check("free answers")
def free_check(greedy: tuple[int, int], beams: tuple[int, int], loss_space: str) -> Check:
    """Answers without the trie that name no item."""
    value = (
        f"{share(greedy):.1%} of {greedy[1]} greedy answers and {share(beams):.1%} of {beams[1]} beams "
        f"({FREE_BEAMS} a prompt) name no item"
    )
    if share(greedy) <= INVALID_SHARE:
        return ok(value)
    why = "; sft.loss_space=trie never teaches it what is no item" if loss_space == "trie" else ""
    return warning(value, f"search with the trie, as every verb here does: its answers are items{why}")


@check("searched answers")
def searched_check(searched: EvalResult) -> Check:
    """Answers of the search with the trie that name no item: none, or something is broken."""
    value = f"{searched.invalid_rate:.1%} of the beams with the trie name no item"
    return ok(value) if searched.invalid_rate == 0 else fails(value, "report it: the trie and the catalog differ")


@check("collisions")
def collision_check(shared: float, groups: Sequence[Sequence[int]], kind: str) -> Check:
    """Items on one token path, which the model cannot tell apart."""
    if not groups:
        return ok("every item has a token path of its own")
    value = f"{shared:.1%} of the items share a token path, up to {max(map(len, groups))} one"
    if kind == "sid":
        return warning(value, "tokenize with semantic_ids.collisions=assign, and train again")
    return warning(value, "titles occur twice: make them different, or use catalog.kind=sid")


@check("dead codes")
def dead_code_check(levels: Sequence[tuple[int, int]]) -> Check:
    """Codes that no item has, level by level."""
    value = ", ".join(f"level {n}: {size - used} of {size} unused" for n, (used, size) in enumerate(levels, 1))
    if all(size - used <= DEAD_SHARE * size for used, size in levels):
        return ok(value)
    return warning(value, "tokenize with semantic_ids.method=constrained, or with fewer semantic_ids.codes")


@check("recall")
def recall_check(searched: EvalResult, popular: float) -> Check:
    """Recall@RECALL_K against the same list of popular items for everybody."""
    name = f"recall@{RECALL_K}"
    low, high = searched.intervals[name]
    value = (
        f"{name} {searched.means[name]:.4f} [{low:.4f}, {high:.4f}] on {searched.rows} rows; the {RECALL_K} most "
        f"popular items for everybody: {popular:.4f}"
    )
    return (
        ok(value) if low > popular else warning(value, "not shown to beat popular items: train longer, check the data")
    )


@check("tail")
def tail_check(searched: EvalResult, tail: tuple[Interval, int] | None) -> Check:
    """Recall@TAIL_K of unpopular items against that of all."""
    name = f"recall@{TAIL_K}"
    coverage = searched.beyond[f"coverage@{RECALL_K}"]
    if tail is None:
        return ok("no row has an unpopular target")
    found, rows = tail
    value = (
        f"{name} {found.mean:.4f} [{found.low:.4f}, {found.high:.4f}] for the less popular {UNPOPULAR_SHARE:.0%} of "
        f"the items ({rows} rows), {searched.means[name]:.4f} for all; {coverage:.1%} of the items are in some "
        f"top {RECALL_K}"
    )
    if found.high >= TAIL_RATIO * searched.means[name]:
        return ok(value)
    return warning(value, "it prefers popular items (evaluate prints by how much): after RL try rl.sft_weight=0.5")

"""The candidate protocol of LLaRA, S-DPO and NAPO: pick the target among 20 items (``eval.candidates``).

Two figures with free decoding, and one with the catalog's trie:

- *ValidRatio*: greedy decoding over the whole vocabulary, at most ``MAX_TOKENS`` new tokens; the output is valid if
  exactly one candidate's name occurs in it (letter case aside).
- *HitRatio@1*: the output is valid and names the target. Both are means over all rows.
- *HitRatio@1 by the trie*: the most likely candidate, searched among the row's candidates only. Every answer is valid
  by construction. Candidates on one token path share the hit.

Axes beyond ``types``: C candidates of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from tawin_nemo.catalog.items import Catalog
from tawin_nemo.config.schema import EvalConfig
from tawin_nemo.data.negative_sampling import candidate_set
from tawin_nemo.data.samples import Samples
from tawin_nemo.eval.measured import Measured
from tawin_nemo.rollout.assist import histories_for
from tawin_nemo.rollout.engine import RolloutEngine
from tawin_nemo.rollout.filters import ItemFilter
from tawin_nemo.rollout.greedy import greedy_decode
from tawin_nemo.types import DataParallel
from tawin_nemo.util.errors import DataError
from tawin_nemo.util.log import progress

#: New tokens of free decoding, at most.
MAX_TOKENS = 20
#: Rows that are decoded at once.
CHUNK_ROWS = 128
#: Columns of the per-user table that are measured, by the names of their means.
MEASURED = ("hit_ratio@1", "valid_ratio", "trie_hit_ratio@1")

Decode = Callable[[Iterable[int]], str]


def evaluate_candidates(
    engine: RolloutEngine,
    samples: Samples,
    catalog: Catalog,
    texts: Sequence[str],
    decode: Decode,
    cfg: EvalConfig,
    *,
    eos: int,
    seed: int,
    dp: DataParallel,
    label: str,
) -> Measured:
    """The three figures of the module's docstring over all rows; every rank calls it and returns the same.

    ``texts`` are the item texts as answers write them, by item index; ``decode`` turns tokens into text. Candidates are
    those of the data, or ``cfg.candidates`` items drawn by ``seed`` and row. Raises DataError without rows.
    """
    if len(samples) == 0:
        raise DataError(f"{label}: no rows to evaluate; check data.eval_limit and the split")
    dp = engine.dp or dp
    mine = np.arange(len(samples))[dp.rank :: dp.size]
    by_length = mine[np.argsort(-samples.prompts.lengths_of(mine), kind="stable")]
    chunks = [by_length[start : start + CHUNK_ROWS] for start in range(0, len(by_length), CHUNK_ROWS)]
    columns: list[np.ndarray] = [np.zeros((0, len(MEASURED)))]
    for rows in progress(chunks, what=f"{label} candidates"):
        sets = [candidate_set(samples, catalog.leaf_I, int(row), cfg.candidates, seed) for row in rows]
        written = greedy_decode(engine.lm, samples.prompts.take(rows), max_tokens=MAX_TOKENS, eos=eos)
        named = [named_candidate(decode(written[b]), [texts[item] for item in sets[b]]) for b in range(len(rows))]
        valid_B = np.array([place is not None for place in named])
        chosen_B = np.array([-1 if place is None else sets[b][place] for b, place in enumerate(named)])
        hit_B = valid_B & (chosen_B == samples.target_N[rows])
        columns.append(np.stack([hit_B, valid_B, _trie_hits(engine, samples, catalog, rows, sets)], axis=1))
    parts = dp.gather((by_length, np.concatenate(columns)))
    order = np.concatenate([rows for rows, _ in parts]).argsort(kind="stable")
    values = np.concatenate([part for _, part in parts])[order]
    return Measured.of("candidates", samples, {name: values[:, place].copy() for place, name in enumerate(MEASURED)})


def named_candidate(output: str, names: Sequence[str]) -> int | None:
    """Index of the only one of ``names`` that occurs in ``output``; None if none does, or more than one.

    >>> named_candidate("I think: the beatles", ["ABBA", "The Beatles"])
    1
    >>> named_candidate("ABBA, Queen", ["ABBA", "Queen"]) is None
    True
    """
    found = [place for place, name in enumerate(names) if name.lower() in output.lower()]
    return found[0] if len(found) == 1 else None


def _trie_hits(
    engine: RolloutEngine, samples: Samples, catalog: Catalog, rows: np.ndarray, sets: Sequence[np.ndarray]
) -> np.ndarray:
    """1 where the most likely candidate is the target, divided by the candidates on its path. [B]."""
    width = min(max(map(len, sets)), catalog.trie.num_leaves)
    filters = [ItemFilter.only(catalog.trie, items.tolist()) for items in sets]
    histories = histories_for(engine, samples.history, rows)
    found = engine.search(samples.prompts.take(rows), width, score_space="trie", filters=filters, **histories)
    target_leaf_B = catalog.leaf_I[samples.target_N[rows]]
    sharing_B = np.array(
        [(catalog.leaf_I[items] == leaf).sum() for items, leaf in zip(sets, target_leaf_B, strict=True)]
    )
    return np.asarray((found.leaf_BW[:, 0].cpu().numpy() == target_leaf_B) / sharing_B)

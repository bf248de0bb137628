"""New items: the shop before they came, and a whole small measurement whose search reaches every one of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tawin_nemo.catalog.semantic_ids import load_codes
from tawin_nemo.data.interactions import Split, load_dataset
from tawin_nemo.types import TokenRows
from tests.benchmarks import new_items
from tests.benchmarks.harness import REPOSITORY
from tests.semantic_ids.catalog import prepared, titles

COMMITTED = sorted((REPOSITORY / "recipes" / "results" / "semantic_ids").glob("new_items*.json"))
ITEMS = 60
TINY = [
    "model.backbone=nano", "catalog.kind=sid", "catalog.index=made later", "data.template=compact",
    "sft.epochs=1", "sft.global_batch_size=8",
    "eval.beams=5", "eval.ks=[1,3]", "trainer.threads=1", "semantic_ids.codes=5", "semantic_ids.text.dims=8",
    "compare.sft_continued=false", "sft.rows=all",
]  # fmt: skip


@given(st.integers(0, 2**32 - 1))
def test_earlier_rows_are_those_that_a_loop_keeps(seed: int) -> None:
    rng = np.random.default_rng(seed)
    new_I = rng.random(9) < 0.4
    histories = [rng.integers(0, 9, rng.integers(1, 5)).tolist() for _ in range(12)]
    target_N, number_N = rng.integers(0, 9, 12), np.arange(12)
    names = [item for item in range(9) if not new_I[item]]
    expected = []
    for row, history in enumerate(histories):
        known = [names.index(item) for item in history if not new_I[item]]
        if known and not new_I[target_N[row]]:
            expected.append((row, known, names.index(target_N[row]), row))
    split = new_items.earlier_rows(Split(number_N, TokenRows.from_lists(histories), target_N, number_N), new_I)
    kept = zip(split.user_N, [split.history[row] for row in range(len(split))], split.target_N, split.time_N)  # noqa: B905
    assert [(int(user), list(map(int, past)), int(target), int(when)) for user, past, target, when in kept] == expected


def test_held_out_is_a_share_and_depends_on_the_seed() -> None:
    first, again, other = (new_items.held_out(100, 0.05, seed) for seed in (1, 1, 2))
    assert first.sum() == other.sum() == 5
    assert (first == again).all()
    assert (first != other).any()


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_a_committed_measurement_is_quoted_correctly(path: Path) -> None:
    result = json.loads(path.read_text(encoding="utf-8"))
    text = (REPOSITORY / "recipes" / "results" / "semantic_ids.md").read_text(encoding="utf-8")
    assert {"command", "commit", "date", "hardware", "settings"} <= result.keys()
    assert f"(semantic_ids/{path.name})" in text
    assert result["command"].replace(f"--seed {result['settings']['seed']} ", "") in text
    assert set(result["reached"].values()) == {result["new"]}
    for line in result["rows"]:
        for metric in ("recall@3", "recall@10", "recall@50"):
            assert f"{line[metric][0]:.4f}".lstrip("0") in text, (line, metric)


@pytest.mark.slow
def test_every_new_item_is_reached_with_codes_of_frozen_codebooks(tmp_path: Path) -> None:
    """Codebooks and model see 57 of 60 items; the search over the grown index then finds all 60."""
    new_I = np.isin(np.arange(ITEMS), (26, 28, 40))  # 26 is a target of valid, 28 one of test
    prepared(tmp_path / "all", titles(ITEMS))
    result = new_items.compare(tmp_path, new_I, TINY, None)
    earlier = load_dataset(tmp_path / "earlier")
    assert earlier.items.external_ids == [f"B{item:03d}" for item in range(ITEMS) if not new_I[item]]
    names = load_dataset(tmp_path / "all").items.external_ids
    before = load_codes(tmp_path / "codes" / "index.json", earlier.items.external_ids)
    grown = load_codes(tmp_path / "grown" / "index.json", names)
    random = load_codes(tmp_path / "random.index.json", names)
    assert [grown[item] for item in np.flatnonzero(~new_I)] == before
    assert [random[item] for item in np.flatnonzero(~new_I)] == before
    assert [random[item] for item in np.flatnonzero(new_I)] != [grown[item] for item in np.flatnonzero(new_I)]
    assert len(set(map(tuple, grown))) == len(set(map(tuple, random))) == ITEMS
    assert result["reached"] == {new_items.GROWN: 3, new_items.RANDOM: 3}
    assert set(result["invalid_rate"].values()) == {0.0}
    assert [line["rows"] for line in result["rows"]] == [2, 3, 2, 3]
    assert len(result["differences"]) == 2 * len(new_items.METRICS)

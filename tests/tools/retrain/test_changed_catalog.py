"""Nights under semantic IDs while the catalog changes: codes and numbers stay, old rows stay, one version is published.

With a server that follows the nights, under load: test_served_nights.py (``tests/run.sh --full``).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tawin_nemo.catalog.export_files import read_catalog
from tawin_nemo.cli import main
from tawin_nemo.config.load import load_recipe
from tawin_nemo.data.tokenizer import read_vocabulary
from tawin_nemo.run.published import check_version, starting_version
from tawin_nemo.semantic_ids.growth import ExistingIndex, read_departed
from tawin_nemo.serve.engine.items_file import read_items
from tawin_nemo.util.errors import ConfigError
from tests.tools.retrain.shop import FIRST, IDLE, LEAVES, NEW, OLD, SECOND, THIRD, night, write_log


def codes_in(version: Path) -> dict[str, list[str]]:
    catalog, codes = read_catalog(version)
    return dict(zip(catalog.external_ids, codes, strict=True))


def gate(version: Path) -> dict[str, Any]:
    return dict(json.loads((version / "gate.json").read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def story(tmp_path_factory) -> tuple[Path, Path]:
    """The folder of the versions and that of the log."""
    folder = tmp_path_factory.mktemp("shop")
    write_log(folder / "log")
    return folder / "root", folder / "log"


def test_two_nights_with_a_changed_catalog(story, capsys):
    """The second night trains with a learning rate of nothing: its weights show what it started from."""
    root, log = story
    code, result = night(root, log, FIRST, capsys)
    assert code == 0, result
    first = (root / "latest").resolve()
    old = codes_in(first)
    assert len(old) == OLD
    assert len({tuple(code) for code in old.values()}) == OLD

    code, result = night(root, log, SECOND, capsys, *IDLE, "retrain.max_latency_ms=60000", "retrain.min_coverage=0.01")
    assert code == 0, result
    second = (root / "latest").resolve()
    new = codes_in(second)
    assert (second.name, len(new)) == (SECOND, OLD + NEW - 1)
    assert {name: new[name] for name in old if name != LEAVES} == {n: old[n] for n in old if n != LEAVES}
    assert len({tuple(code) for code in [*new.values(), old[LEAVES]]}) == OLD + NEW  # nobody else got its codes
    assert_one_version(second)
    assert_old_rows_stay(first, second)
    decision = gate(second)
    assert [verdict["metric"] for verdict in decision["verdicts"]] == ["ndcg@3", "recall@8"]
    assert all(verdict["difference"]["mean"] == 0.0 for verdict in decision["verdicts"])  # same weights, same codes
    assert [(check["name"], check["passed"]) for check in decision["checks"]] == [
        ("coverage@10", True), ("latency_ms", True),
    ]  # fmt: skip
    assert 0 < decision["checks"][1]["value"] < 60_000
    figures = decision["data"]
    assert (figures["items"], figures["new_items"]) == (OLD + NEW - 1, pytest.approx(NEW / (OLD + NEW - 1)))
    assert (figures["gone_items"], figures["new_users"]) == (pytest.approx(1 / OLD), 0.0)
    assert 0.0 < figures["popularity_drift"] < 1.0
    assert 0.0 < figures["age_days"] < 21.0

    numbers = [[item.external_id for item in read_items(version / "items.jsonl")] for version in (first, second)]
    assert numbers[1][:OLD] == numbers[0]
    assert sorted(numbers[1][OLD:]) == [f"I{number}" for number in range(OLD, OLD + NEW)]
    departed = next(item for item in read_items(second / "items.jsonl") if item.external_id == LEAVES)
    assert list(departed.codes) == old[LEAVES]


def assert_one_version(version: Path) -> None:
    """Weights, catalog and index in one sealed folder; the index is that of the catalog."""
    files = check_version(version)["files"]
    assert {
        "model.safetensors", "tokenizer.json", "catalog.parquet", "trie.safetensors", "gate.json", "items.jsonl",
        "popularity.parquet", "index/index.json", "index/codes.npy", "index/manifest.json",
    } <= files.keys()  # fmt: skip
    index = ExistingIndex.read(version / "index")
    assert {*index.external_ids} == {*codes_in(version), LEAVES}
    assert list(read_departed(version / "index")) == [LEAVES]


def assert_old_rows_stay(first: Path, second: Path) -> None:
    """Old tokens keep their ids and rows; a code that no earlier item had starts as the mean of the old rows."""
    before, after = read_vocabulary(first), read_vocabulary(second)
    assert {word: after[word] for word in before} == before
    added = sorted(after[word] for word in after.keys() - before.keys())
    assert added, "the story needs a code that is new to the vocabulary"
    name = "model.embed_tokens.weight"
    old_VD, new_VD = (load_file(version / "model.safetensors")[name] for version in (first, second))
    np.testing.assert_allclose(new_VD[: len(before)], old_VD[: len(before)], atol=1e-6)
    mean_D = old_VD[: len(before)].mean(axis=0)
    for token in added:
        assert np.abs(new_VD[token]).max() > 0
        assert np.linalg.norm(new_VD[token] - mean_D) < np.linalg.norm(old_VD[: len(before)] - mean_D, axis=1).mean()


def test_rollback_takes_one_command_and_the_server_starts_with_what_is_live(story, capsys):
    root, log = story
    served = starting_version(load_recipe(None, [f"serve.follow={root}"]))
    assert Path(served.checkpoint).name == SECOND
    assert main(["retrain", "rollback", f"retrain.root={root}"]) == 0
    served = starting_version(load_recipe(None, [f"serve.follow={root}"]))
    assert Path(served.checkpoint).name == FIRST
    with pytest.raises(ConfigError, match="leave out checkpoint"):
        starting_version(load_recipe(None, [f"serve.follow={root}", "checkpoint=runs/x/sft"]))
    with pytest.raises(ConfigError, match=r"no .*latest yet"):
        starting_version(load_recipe(None, [f"serve.follow={log}"]))
    assert night(root, log, SECOND, capsys)[0] == 2  # what was taken back does not come again by itself


@pytest.mark.full
def test_the_night_after_a_rollback_grows_the_codes_of_the_live_version(story, capsys):
    """Item numbers go on from the version that was taken back: none is given twice."""
    root, log = story
    code, result = night(root, log, THIRD, capsys)
    assert code == 0, result
    first, second, third = (root / "versions" / day for day in (FIRST, SECOND, THIRD))
    assert check_version(third)["against"] == FIRST
    old, new = codes_in(first), codes_in(third)
    assert {name: new[name] for name in new if name in old} == {name: old[name] for name in old if name in new}
    numbers = [[item.external_id for item in read_items(version / "items.jsonl")] for version in (second, third)]
    assert numbers[1][: len(numbers[0])] == numbers[0]
    assert main(["retrain", "prune", f"retrain.root={root}", "retrain.keep=1"]) == 0
    assert sorted(path.name for path in (root / "versions").glob("2*")) == [FIRST, THIRD]

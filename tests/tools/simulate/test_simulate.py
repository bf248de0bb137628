"""Figure 3: the simulation against WPAUC itself, its limit against every ranking of a small set, and the verb."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tawin_nemo.maths.auc import wpauc
from tawin_nemo.tools.simulate import simulate as module
from tawin_nemo.tools.simulate.simulate import (
    CUTOFFS,
    NEGATIVES,
    POSITIVES,
    Options,
    best_window,
    correlations,
    exact_moments,
    simulate,
    summarise,
)
from tawin_nemo.util.errors import ConfigError

ROOT = Path(__file__).parents[3]


def correlations_by_definition(lists_TI: np.ndarray, cutoffs: tuple[int, ...]) -> np.ndarray:
    """numpy.corrcoef of maths.auc.wpauc with Recall@K, window by window; NaN where there is none."""
    T, items = lists_TI.shape
    scores_TI = -torch.arange(items).expand(T, items)
    mask_TI = torch.from_numpy(lists_TI)
    pos, neg = scores_TI[mask_TI].reshape(T, -1), scores_TI[~mask_TI].reshape(T, -1)
    n = neg.shape[1]
    maps = np.full((len(cutoffs), n + 1, n + 1), np.nan)
    for start, end in itertools.combinations(range(n + 1), 2):
        values_T = wpauc(pos, neg, start / n, (end - start) / n).numpy()
        for i, k in enumerate(cutoffs):
            recall_T = lists_TI[:, :k].mean(axis=1)
            if values_T.std() > 0 and recall_T.std() > 0:
                maps[i, start, end] = np.corrcoef(values_T, recall_T)[0, 1]
    return maps


def drawn_lists(trials: int, seed: int, positives: int, negatives: int) -> np.ndarray:
    """The lists that ``simulate`` draws, one by one."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.permuted(np.arange(positives + negatives) < positives) for _ in range(trials)])


def test_simulation_equals_the_definition() -> None:
    sizes = {"positives": 3, "negatives": 9, "cutoffs": (2, 3, 6, 11)}
    found = correlations(simulate(150, seed=4, **sizes))  # type: ignore[arg-type]
    expected = correlations_by_definition(drawn_lists(150, 4, 3, 9), (2, 3, 6, 11))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)  # NaN in the same places
    assert np.isfinite(found).sum() == 4 * 45


@pytest.mark.parametrize(
    ("positives", "negatives", "cutoffs"), [(1, 6, (1, 4)), (3, 5, (1, 3, 5, 7)), (4, 2, (1, 3, 5))]
)
def test_exact_moments_equal_the_mean_over_every_ranking(
    positives: int, negatives: int, cutoffs: tuple[int, ...]
) -> None:
    n = positives + negatives
    lists = [np.isin(np.arange(n), places) for places in itertools.combinations(range(n), positives)]
    expected = correlations_by_definition(np.stack(lists), cutoffs)
    moments = exact_moments(positives, negatives, cutoffs)
    np.testing.assert_allclose(correlations(moments), expected, rtol=0, atol=1e-12)
    hits_TK = np.stack(lists).cumsum(axis=1)[:, np.array(cutoffs) - 1]
    np.testing.assert_allclose(moments.hits_K, hits_TK.var(axis=0), atol=1e-12)


def test_simulation_converges_to_the_exact_correlations() -> None:
    """The standard error of a correlation r over T trials is about (1 - r^2) / sqrt(T)."""
    trials = 3_000
    found, exact = correlations(simulate(trials, seed=1)), correlations(exact_moments())
    inside = np.isfinite(exact)
    assert inside.sum() == len(CUTOFFS) * NEGATIVES * (NEGATIVES + 1) / 2
    assert (np.isfinite(found) >= inside).all()
    error = np.abs(found - exact)[inside] / ((1 - exact[inside] ** 2) / np.sqrt(trials) + 1e-9)
    assert np.quantile(error, 0.999) < 5
    assert np.abs(found - exact)[inside].max() < 0.09


def test_the_maximiser_moves_right_with_k_and_beats_opauc_and_auc() -> None:
    peaks = [best_window(map_SE) for map_SE in correlations(exact_moments(cutoffs=tuple(range(10, 191, 10))))]
    assert all(a.alpha < b.alpha for a, b in itertools.pairwise(peaks))
    maps = correlations(simulate(2_000, seed=0))
    rows = summarise(maps, correlations(exact_moments()))
    starts = [row["argmax_alpha"] for row in rows.values()]
    assert starts == sorted(set(starts))
    for k, row in rows.items():
        assert row["correlation"] >= row["best_opauc_correlation"] >= row["auc_correlation"]
        assert row["correlation"] >= row["predicted_correlation"]
        assert row["predicted_alpha"] == (int(k) - POSITIVES) / NEGATIVES
        assert row["predicted_d"] == POSITIVES / NEGATIVES
        assert row["predicted_alpha"] <= row["argmax_alpha_at_predicted_d"] <= row["predicted_alpha"] + 0.04


def test_memory_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = simulate(300, seed=2)
    monkeypatch.setattr(module, "CHUNK", 37)
    parts = simulate(300, seed=2)
    for name in ("ahead_NN", "ahead_hits_NK", "hits_K"):
        assert np.array_equal(getattr(whole, name), getattr(parts, name))
    assert not np.array_equal(whole.hits_K, simulate(300, seed=3).hits_K)


def test_a_recall_that_never_varies_has_no_correlation() -> None:
    with pytest.raises(ConfigError, match=r"Recall@3 was the same in all trials.*raise trials="):
        correlations(simulate(5, seed=0, positives=2, negatives=1, cutoffs=(3,)))


@pytest.mark.parametrize(
    ("overrides", "seen"),
    [
        (["trails=5"], "'trails=5'; did you mean trials?"),
        (["colour=red"], "'colour=red'; its keys are trials, seed, output"),
        (["5"], "'5'; its keys are trials, seed, output"),
        (["trials=1"], "trials=1 is too small; use trials=2 or more"),
        (["trials=many"], "trials=many is not a whole number"),
        (["trials=1e4"], "trials=1e4 is not a whole number"),
        (["seed=-1"], "seed=-1 is too small; use seed=0 or more"),
        (["output="], "output= is empty"),
    ],
)
def test_options_refuse_mistakes(overrides: list[str], seen: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Options.parse(overrides)
    assert seen in str(caught.value)


def test_options_have_defaults_and_take_values() -> None:
    assert Options.parse([]) == Options(10_000, 0, "runs/simulate")
    assert Options.parse(["seed=3", "output=a=b", "trials=20"]) == Options(20, 3, "a=b")


def test_the_verb_writes_both_files_and_ends_with_one_json_line(tmp_path: Path) -> None:
    done = cli("simulate", "trials=400", "seed=5", f"output={tmp_path / 'new'}")
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert (
        list(last["argmax_alpha"]) == list(last["argmax_d"]) == list(last["correlation"]) == [str(k) for k in CUTOFFS]
    )
    assert (last["trials"], last["seed"]) == (400, 5)
    assert last["seconds"] > 0
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["figure3.json", "figure3.png"]
    assert (tmp_path / "new" / "figure3.png").read_bytes().startswith(b"\x89PNG")
    stored = json.loads((tmp_path / "new" / "figure3.json").read_text(encoding="utf-8"))
    assert {k: row["argmax_alpha"] for k, row in stored["cutoffs"].items()} == last["argmax_alpha"]
    expected = summarise(correlations(simulate(400, 5)), correlations(exact_moments()))
    assert stored["cutoffs"] == expected


@pytest.mark.parametrize(
    ("arguments", "seen"),
    [(("trails=5",), "did you mean trials?"), (("trials=1",), "trials=1"), (("--recipe", "x.yaml"), "takes no recipe")],
)
def test_mistakes_exit_with_2(arguments: tuple[str, ...], seen: str) -> None:
    done = cli("simulate", *arguments)
    assert done.returncode == 2, done.stderr
    assert seen in done.stderr
    assert "Traceback" not in done.stderr


def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tawin_nemo", *arguments], capture_output=True, text=True, timeout=300, cwd=ROOT
    )


# -- the committed figure ----------------------------------------------------------------------------------------------
def test_the_committed_figure_can_be_made_again_and_is_quoted_correctly() -> None:
    stored = json.loads((ROOT / "recipes" / "results" / "figure3.json").read_text(encoding="utf-8"))
    assert (ROOT / "recipes" / "results" / "figure3.png").is_file()
    rows = summarise(correlations(simulate(stored["trials"], stored["seed"])), correlations(exact_moments()))
    text = (ROOT / "recipes" / "results" / "wpauc.md").read_text(encoding="utf-8")
    for k, row in rows.items():
        committed = stored["cutoffs"][k]
        for name, value in row.items():  # another numpy may draw other lists; the best beta is on a flat top
            assert committed[name] == pytest.approx(value, abs=0.15 if "beta" in name else 0.03), (k, name)
        assert table_line(k, committed) in text


def table_line(k: str, row: dict[str, float]) -> str:
    """A row of the table in wpauc.md."""
    return (
        f"| {k} | {row['argmax_alpha']:.3f} | {row['argmax_d']:.3f} | {row['correlation']:.3f} "
        f"| {row['exact_argmax_alpha']:.3f} | {row['exact_argmax_d']:.3f} | {row['exact_correlation']:.3f} "
        f"| {row['predicted_alpha']:.3f} | {row['argmax_alpha_at_predicted_d']:.3f} "
        f"| {row['predicted_correlation']:.3f} | {row['best_opauc_correlation']:.3f} "
        f"| {row['auc_correlation']:.3f} |"
    )

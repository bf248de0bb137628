"""Areas from ranks against those of explicit scores; beams that miss the best items; replicas that share the rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tawin_nemo.config.schema import EvalConfig
from tawin_nemo.eval.full_ranking import areas, rank_everything, spaced_rows
from tawin_nemo.eval.measured import Measured
from tawin_nemo.maths.auc import auc, opauc, wpauc
from tawin_nemo.types import Candidates, DataParallel, TokenRows
from tawin_nemo.util.errors import DataError
from tests.eval.listed_engine import ListedEngine, make_catalog, make_samples

#: All five paths for every row, best first, each by its first item.
FULL = [[0, 1, 2, 3, 5], [3, 1, 2, 0, 5], [5, 2, 0, 1, 3]]


def test_areas_are_those_of_the_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    scores_BI = torch.randn(40, 121, generator=generator)
    rank_B = (scores_BI[:, 1:] > scores_BI[:, :1]).sum(1).numpy()
    found = areas(rank_B, 120, (3, 7))
    positive, negative = scores_BI[:, :1], scores_BI[:, 1:]
    expected = {
        "auc": auc(positive, negative), "opauc@10": opauc(positive, negative, 10 / 120),
        "opauc@50": opauc(positive, negative, 50 / 120), "wpauc": wpauc(positive, negative, 3 / 120, 4 / 120),
    }  # fmt: skip
    assert found.keys() == expected.keys()
    for name, values_B in expected.items():
        np.testing.assert_allclose(found[name], values_B.numpy(), rtol=0, atol=1e-12, err_msg=name)


class Beams(ListedEngine):
    """Narrow searches return another list than the full one, as beam search does where a good item hides."""

    def search(self, prompts: TokenRows, width: int, **options: object) -> Candidates:
        lists = self.lists if width == 5 else [[3, 2, 1, 0, 5]] * 3
        return ListedEngine(self.catalog, lists).search(prompts, width, token_budget=EvalConfig().token_budget)


def test_ranks_and_beams() -> None:
    catalog, samples = make_catalog(), make_samples([0, 4, 3])  # item 4 is on the path of item 2
    cfg = EvalConfig(auc=True)
    engine = Beams(catalog, FULL)
    found = rank_everything(engine, samples, catalog, cfg, window=(0, 2), widths=(2,), dp=DataParallel(), label="x")
    assert found.per_user["rank"].to_list() == [0, 2, 4]
    assert found.means["auc"] == pytest.approx(np.mean([1, 0.5, 0]))
    assert found.means["wpauc"] == pytest.approx(1 / 3)
    # of the true best two, {0, 1}, {3, 1} and {5, 2}, the beams {3, 2} hold none, one and one
    assert found.per_user["beams_found@2"].to_list() == [0.0, 0.5, 0.5]


def test_a_target_that_the_search_does_not_list_is_last() -> None:
    """Not first: a path to which the model gives no probability at all is missing in the list."""
    catalog, cfg = make_catalog(), EvalConfig(auc=True)
    engine = Beams(catalog, [[0, 1, 2, 3]] * 3)
    found = rank_everything(
        engine, make_samples([5, 0, 1]), catalog, cfg, window=(0, 2), widths=(), dp=DataParallel(), label="x"
    )  # fmt: skip
    assert found.per_user["rank"].to_list() == [4, 0, 1]


def test_replicas_share_the_rows() -> None:
    catalog, samples = make_catalog(), make_samples([0, 4, 3])
    cfg = EvalConfig(auc=True)

    def ranked(dp: DataParallel) -> Measured:
        return rank_everything(
            Beams(catalog, FULL), samples, catalog, cfg, window=(0, 2), widths=(2,), dp=dp, label="x"
        )  # fmt: skip

    alone, parts = ranked(DataParallel()), []

    def send(value: object) -> list[object]:
        parts.append(value)
        raise ConnectionAbortedError  # what a rank gathers is what it has measured; the rest needs the other rank

    for rank in (0, 1):
        with pytest.raises(ConnectionAbortedError):
            ranked(DataParallel(rank, 2, send))
    together = ranked(DataParallel(0, 2, lambda _: parts))
    assert together.per_user.equals(alone.per_user)


def test_a_limit_takes_evenly_spaced_rows_and_nothing_is_refused() -> None:
    assert spaced_rows(10, 0).tolist() == list(range(10))
    assert spaced_rows(10, 4).tolist() == [0, 3, 6, 9]
    catalog = make_catalog()
    with pytest.raises(DataError, match="needs rows and two paths, not 0 rows"):
        rank_everything(
            Beams(catalog, FULL), make_samples([]), catalog, EvalConfig(), window=(0, 2), widths=(2,),
            dp=DataParallel(), label="x",
        )  # fmt: skip

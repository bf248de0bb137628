"""The search in fixed shapes gives what the usual search gives each prompt alone: items, scores, log-probs, bounds."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from fixed_table import FixedTableLM
from sequence_lm import TableLM
from test_select_dense import EOS, PATHS, VOCAB, assert_equal, each_alone, some_prompts

from tawin_nemo.catalog.items import Catalog
from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.config.schema import RolloutConfig
from tawin_nemo.rollout import fixed_search
from tawin_nemo.rollout.beam import collect_candidates
from tawin_nemo.rollout.engine import RolloutEngine
from tawin_nemo.rollout.filters import ItemFilter
from tawin_nemo.rollout.fixed_search import FixedShapeSearch, FixedShapeSearches, fixed_buffers
from tawin_nemo.rollout.lm import MeteredLM
from tawin_nemo.types import TokenRows
from tawin_nemo.util import graphs
from tawin_nemo.util.errors import ConfigError, TawinError
from tawin_nemo.util.graphs import Replayed


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize("seed", range(10))
def test_results_are_those_of_each_prompt_alone(kind: str, seed: int) -> None:
    rng = np.random.default_rng(100 + seed)
    trie = TokenTrie.from_paths(PATHS[kind](rng, int(rng.integers(1, 90))))
    width, penalty = int(rng.integers(1, 12)), [0.0, 0.7, -0.4][seed % 3]
    lm = FixedTableLM(VOCAB, seed=seed, dtype=torch.float32 if seed % 2 else torch.float64)
    buffers = fixed_buffers(lm, trie, width, 4, 6)
    assert buffers is not None
    search = FixedShapeSearch(lm, buffers, trie, width, 4, length_penalty=penalty)
    for rows in (4, 1, 3):  # in the same buffers
        prompts = some_prompts(rng, rows)
        found = search.search(prompts, np.arange(rows))
        expected = each_alone(lm, prompts, trie, width, length_penalty=penalty)
        assert_equal((found.candidates, found.pruned_score_B), expected)


def test_long_chains_take_several_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    way = rng.integers(1, 4, 11).tolist()
    paths = [[first, *way, last, EOS] for first in (1, 2, 3) for last in (1, 2, 3)]
    trie, lm = TokenTrie.from_paths(paths), FixedTableLM(VOCAB, impossible=False)
    prompts = some_prompts(rng, 2)
    expected = each_alone(lm, prompts, trie, 4)
    for chains, passes in (((0, 1, 2, 4, 8), 2), ((0, 4), 3), ((0, 1), 12)):
        monkeypatch.setattr(fixed_search, "CHAINS", chains)
        buffers = fixed_buffers(lm, trie, 4, 2, 6)
        found = FixedShapeSearch(lm, buffers, trie, 4, 2).search(prompts, np.arange(2))
        assert_equal((found.candidates, found.pruned_score_B), expected)
        assert buffers.passes == passes


def test_a_stream_divides_prompts_by_length_and_budget() -> None:
    rng = np.random.default_rng(7)
    trie, lm = TokenTrie.from_paths(PATHS["with EOS"](rng, 60)), FixedTableLM(VOCAB)
    prompts = TokenRows.from_lists([rng.integers(1, VOCAB, length).tolist() for length in (3, 70, 5, 130, 64, 2, 9)])
    searches = FixedShapeSearches(lm, trie, length_penalty=0.0)
    budget = 3 * (64 + 5 * trie.decision_depth)
    parts = list(searches.stream(prompts, 5, budget))
    assert [part.ticket_B.tolist() for part in parts] == [[3], [1], [4, 6], [2, 0], [5]]
    assert [buffer.prompt_slots // 64 for buffer in lm.buffers] == [3, 2, 1, 1]  # the two pairs share theirs
    expected, _ = each_alone(lm, prompts, trie, 5)
    assert_equal((collect_candidates(parts, 5, trie), np.zeros(0)), (expected, np.zeros(0)))
    assert len(searches._kept) <= fixed_search.KEPT_SHAPES
    assert list(searches.stream(TokenRows.from_lists([]), 5, budget)) == []


def engine_over(lm: Any, **options: object) -> RolloutEngine:
    rng = np.random.default_rng(9)
    rows = TokenRows.from_lists(PATHS["with EOS"](rng, 50))
    names = [str(item) for item in range(len(rows))]
    catalog = Catalog(names, names, "title", rows, TokenTrie.from_paths(rows))
    return RolloutEngine(lm, catalog, RolloutConfig(**options), seed=1)


def test_an_engine_searches_in_fixed_shapes_where_it_can() -> None:
    prompts = some_prompts(np.random.default_rng(1), 5)
    lm = FixedTableLM(VOCAB)
    on, off = engine_over(MeteredLM(lm), cuda_graphs="on"), engine_over(lm)
    assert_equal((on.search(prompts, 6), np.zeros(0)), (off.search(prompts, 6), np.zeros(0)))
    assert len(lm.buffers) == 1
    flops = on.pop_flops()
    root = fixed_search.root_tokens(on.catalog.trie)
    assert flops.tokens == len(prompts.flat) + root * len(prompts) + lm.buffers[0].tokens_run()
    assert flops.logits > 5 * 2
    trie = on.catalog.trie
    only = [ItemFilter.only(trie, range(0, 50, 2))] * 5
    assert torch.equal(on.search(prompts, 6, filters=only).items_BW, off.search(prompts, 6, filters=only).items_BW)
    vocab = on.search(prompts, 6, score_space="vocab"), off.search(prompts, 6, score_space="vocab")
    assert torch.equal(vocab[0].scores_BW, vocab[1].scores_BW)
    assert len(lm.buffers) == 1


def test_a_model_without_fixed_shapes_is_named() -> None:
    with pytest.raises(ConfigError, match="without pipeline stages"):
        engine_over(TableLM(VOCAB), cuda_graphs="on").search(some_prompts(np.random.default_rng(1), 2), 3)


def test_nan_is_an_error_in_the_round_that_meets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, trie = FixedTableLM(VOCAB), TokenTrie.from_paths([[1, EOS], [2, EOS], [3, 4, EOS]])
    search = FixedShapeSearch(lm, fixed_buffers(lm, trie, 2, 2, 6), trie, 2, 2)
    prompts = some_prompts(np.random.default_rng(0), 2)
    search.search(prompts, np.arange(2))
    monkeypatch.setattr(lm, "edge_logprobs", lambda rows, position_E, *_: torch.full((len(position_E),), torch.nan))
    with pytest.raises(TawinError, match="NaN"):
        search.search(prompts, np.arange(2))
    monkeypatch.undo()
    assert_equal(
        (search.search(prompts, np.arange(2)).candidates, np.zeros(0)),
        (each_alone(lm, prompts, trie, 2)[0], np.zeros(0)),
    )


class FakeCuda:
    """What ``Replayed`` asks of torch.cuda; a graph records the function that was captured and calls it at replay."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, run: list[str]) -> None:
        self.run, self.capturing = run, False
        stream = type("Stream", (), {"wait_stream": lambda self, other: None})
        monkeypatch.setattr(torch.cuda, "Stream", stream)
        monkeypatch.setattr(torch.cuda, "current_stream", stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        monkeypatch.setattr(
            torch.cuda, "CUDAGraph", lambda: type("Graph", (), {"replay": lambda _: run.append("replay")})()
        )
        monkeypatch.setattr(torch.cuda, "graph", self.graph)

    def graph(self, graph: Any, *, pool: Any, capture_error_mode: str) -> Any:
        assert capture_error_mode == "thread_local"
        self.run.append("capture")
        return nullcontext()


def test_a_function_is_captured_once_and_again_when_memory_has_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    run: list[str] = []
    FakeCuda(monkeypatch, run)
    state, where = torch.zeros(2), [(1, 2)]

    def function() -> None:
        run.append("call")
        state.add_(1)

    replayed = Replayed(function, torch.device("cuda"), addresses=lambda: where[0], state=lambda: [state])
    replayed()
    assert run == ["call"] * graphs._WARM_UP + ["capture", "call", "replay"]
    assert state.tolist() == [0.0, 0.0]  # neither the warm-up nor the capture is a run
    replayed.check_addresses()
    replayed()
    assert run[-2:] == ["replay", "replay"]
    where[0] = (1, 3)
    replayed.check_addresses()
    replayed()
    assert run[-2:] == ["call", "replay"]
    assert run.count("capture") == 2
    plain = Replayed(function, torch.device("cpu"), addresses=lambda: where[0], state=lambda: [state])
    plain()
    assert run[-1] == "call"


def test_a_search_needs_a_beam() -> None:
    lm, trie = FixedTableLM(VOCAB), TokenTrie.from_paths([[1, EOS], [2, EOS]])
    with pytest.raises(ConfigError, match="at least one beam"):
        FixedShapeSearch(lm, fixed_buffers(lm, trie, 1, 2, 6), trie, 0, 2)

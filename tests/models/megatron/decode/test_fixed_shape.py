"""Searches in static buffers over a real model: the usual results, rounds that are one graph each, no host sync."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.config.backbones import Backbone
from tawin_nemo.config.schema import ModelConfig
from tawin_nemo.models.megatron.decode.lm import MegatronLM
from tawin_nemo.models.megatron.model.build import build_model
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.rollout.beam import constrained_beam_search
from tawin_nemo.rollout.fixed_search import CHAINS, FixedShapeSearch, fixed_buffers
from tawin_nemo.types import Candidates, TokenRows
from tests.rollout.launches import Count, Launches
from tests.rollout.recorded_graph import RecordedGraph

SHAPE = Backbone(
    "qwen2", hidden=32, layers=2, heads=4, kv_heads=2, ffn=48, vocab=51, rope_theta=1e4, init_std=0.2, max_position=256
)
WIDTH, PROMPTS, SLOTS = 5, 4, 16
TOLERANCE = {torch.float32: 5e-5, torch.float64: 1e-10}


def language_model(dtype: torch.dtype, shape: Backbone = SHAPE, **options: Any) -> MegatronLM:
    runtime.initialize(ModelConfig(), seed=1)
    return MegatronLM(build_model(shape, ModelConfig(**options), seed=3).to(dtype), shape)


def titles(seed: int, items: int = 40) -> TokenTrie:
    """Paths of mixed lengths with forced stretches, behind a beginning that all share."""
    rng = np.random.default_rng(seed)
    begin = rng.integers(1, 9, seed % 3).tolist()
    bodies = [np.repeat(rng.integers(1, 7, rng.integers(1, 5)), 2).tolist() for _ in range(items)]
    return TokenTrie.from_paths([[*begin, *body, 0] for body in bodies])


def some_prompts(seed: int, rows: int) -> TokenRows:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, SLOTS + 1, rows)
    return TokenRows.from_lists([rng.integers(1, SHAPE.vocab, length).tolist() for length in lengths])


def fixed_search(lm: MegatronLM, trie: TokenTrie) -> FixedShapeSearch:
    buffers = fixed_buffers(lm, trie, WIDTH, PROMPTS, SLOTS)
    assert buffers is not None
    return FixedShapeSearch(lm, buffers, trie, WIDTH, PROMPTS)


def assert_same(found: Candidates, expected: Candidates, tolerance: float) -> None:
    assert torch.equal(found.items_BW, expected.items_BW)
    assert torch.equal(found.tokens_BWT, expected.tokens_BWT)
    torch.testing.assert_close(found.scores_BW, expected.scores_BW, rtol=0, atol=tolerance)
    torch.testing.assert_close(found.logprobs_BWT, expected.logprobs_BWT, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("seed", range(4))
def test_the_usual_results(dtype: torch.dtype, seed: int) -> None:
    shape = replace(SHAPE, kv_heads=(1, 2, 4, 2)[seed], family="qwen3" if seed == 3 else "qwen2")
    lm, trie = language_model(dtype, shape), titles(seed)
    search = fixed_search(lm, trie)
    for rows in (4, 2, 3):  # stale keys of the searches before lie in the same buffers
        prompts = some_prompts(10 * seed + rows, rows)
        expected = constrained_beam_search(lm, prompts, trie, WIDTH)
        assert_same(search.search(prompts, np.arange(rows)).candidates, expected, TOLERANCE[dtype])


def test_bfloat16_finds_the_same_items() -> None:
    lm, trie, prompts = language_model(torch.bfloat16), titles(1), some_prompts(5, 4)
    found = fixed_search(lm, trie).search(prompts, np.arange(4)).candidates
    expected = constrained_beam_search(lm, prompts, trie, WIDTH)
    assert torch.equal(found.items_BW[:, 0], expected.items_BW[:, 0])
    torch.testing.assert_close(found.scores_BW, expected.scores_BW, rtol=0, atol=0.1)


def test_a_model_in_training_drops_nothing_while_it_searches() -> None:
    lm, trie, prompts = language_model(torch.float64, dropout=0.5), titles(0), some_prompts(6, 4)
    lm.model.train()
    found = fixed_search(lm, trie).search(prompts, np.arange(4)).candidates
    assert lm.model.training
    assert_same(found, constrained_beam_search(lm, prompts, trie, WIDTH), 1e-10)


def test_a_round_is_one_list_of_operations_on_one_piece_of_memory() -> None:
    """What a CUDA graph needs: no host sync, and at each call the same operations, shapes and addresses."""
    search = fixed_search(language_model(torch.float32), titles(2))
    search.search(some_prompts(0, 4), np.arange(4))
    addresses = search.addresses()
    lists: dict[Any, list[Any]] = {kind: [] for kind in (*CHAINS, "prefill")}
    for rows in (4, 1):
        for tokens in CHAINS:
            search.begin(some_prompts(rows, rows))
            prefill = counted(search._buffers.prefill)
            assert prefill.syncs == 0
            lists["prefill"].append(prefill.operations)
            for _ in range(2 if tokens else 5):  # at the start, on the way, behind the end
                with torch.no_grad(), Launches() as mode:
                    search.round(tokens)
                assert mode.count.syncs == 0, mode.count.names
                lists[tokens].append(mode.count.operations)
        assert search.addresses() == addresses
    for operations in lists.values():
        assert len(operations) >= 4
        assert all(later == operations[0] for later in operations)
    assert len(lists[8][0]) > len(lists[0][0])


def test_moved_weights_are_noticed_and_changed_ones_are_read() -> None:
    lm, trie, prompts = language_model(torch.float64), titles(0), some_prompts(3, 4)
    search = fixed_search(lm, trie)
    before = search.search(prompts, np.arange(4)).candidates
    addresses = search.addresses()
    with torch.no_grad():
        lm.model.decoder.layers[1].mlp.linear_fc2.weight.mul_(3)
    assert search.addresses() == addresses
    after = search.search(prompts, np.arange(4)).candidates
    assert not torch.equal(after.scores_BW, before.scores_BW)
    assert_same(after, constrained_beam_search(lm, prompts, trie, WIDTH), 1e-10)
    weight = lm.model.decoder.layers[0].mlp.linear_fc1.weight
    weight.data = weight.data.clone()
    assert search.addresses() != addresses


def test_prompts_that_do_not_fit_are_an_error() -> None:
    buffers = language_model(torch.float32).fixed_shape(2, 3, 4)
    assert buffers is not None
    for rows in ([[1]], [[1], [2, 3, 4, 5]]):
        with pytest.raises(ValueError, match="do not fit buffers for 2 prompts of up to 3"):
            buffers.fill(TokenRows.from_lists(rows))


def test_modules_that_decode_by_themselves_have_no_fixed_shape() -> None:
    lm = language_model(torch.float32)
    assert MegatronLM(lm.model, SHAPE, use_inference_forward=False).fixed_shape(2, 3, 4) is None


# -- CUDA graphs, as a CPU can have them, and what a search costs a GPU: one graph is one launch.


def on_graphs(search: FixedShapeSearch) -> FixedShapeSearch:
    """``search`` as on a CUDA device; call after ``RecordedGraph.install``."""
    for replayed in (search._open, *search._rounds.values()):
        replayed._device = torch.device("cuda")
    return search


@pytest.mark.parametrize("seed", range(3))
def test_replays_of_what_was_captured_give_the_same_results(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    lm, trie = language_model(torch.bfloat16), titles(seed)
    plain, graphs = fixed_search(lm, trie), on_graphs(fixed_search(lm, trie))
    RecordedGraph.install(monkeypatch)
    for rows in (4, 1, 3, 4):
        prompts = some_prompts(20 * seed + rows, rows)
        expected = plain.search(prompts, np.arange(rows))
        found = graphs.search(prompts, np.arange(rows))
        for name, tensor in expected.candidates.tensors().items():
            assert torch.equal(getattr(found.candidates, name), tensor), name
        np.testing.assert_array_equal(found.pruned_score_B, expected.pruned_score_B)
    assert RecordedGraph.captures <= 1 + len(CHAINS)
    assert RecordedGraph.replays > 8
    before = RecordedGraph.captures
    weight = lm.model.decoder.layers[0].mlp.linear_fc1.weight
    weight.data = -2 * weight.data  # in other memory
    expected = plain.search(prompts, np.arange(rows))
    found = graphs.search(prompts, np.arange(rows))
    assert RecordedGraph.captures > before
    assert torch.equal(found.candidates.scores_BW, expected.candidates.scores_BW)


def counted(run: Callable[[], Any]) -> Count:
    with torch.no_grad(), Launches() as mode:
        run()
    return mode.count


def test_a_captured_search_needs_a_tenth_of_the_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, trie, prompts = language_model(torch.bfloat16), titles(2), some_prompts(8, 4)
    RecordedGraph.install(monkeypatch)
    search = on_graphs(fixed_search(lm, trie))
    search.search(prompts, np.arange(4))  # captures
    usual = counted(lambda: constrained_beam_search(lm, prompts, trie, WIDTH))
    before = RecordedGraph.replays
    captured = counted(lambda: search.search(prompts, np.arange(4)))
    replays = RecordedGraph.replays - before
    assert replays >= 4
    assert captured.launches * 10 <= usual.launches, (captured.launches, usual.launches)
    assert captured.syncs <= replays + 2  # one to read each round's three numbers; two for the candidates
    assert captured.syncs * 10 <= usual.syncs
    # the share that grows with rounds: a graph's launch, and nothing else
    search.begin(prompts)
    search._rounds[1]()
    deeper = counted(lambda: (search.begin(prompts), *(search._rounds[1]() for _ in range(10))))
    opened = counted(lambda: search.begin(prompts))
    assert (deeper - opened).launches == 10
    assert (deeper - opened).syncs == 0

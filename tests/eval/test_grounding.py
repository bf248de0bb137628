"""BigRec's grounding against a row-by-row walk: free text, its embedding, and the distance to every item's."""

from __future__ import annotations

import math
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tawin_nemo.catalog.items import Catalog
from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.config.load import load_recipe
from tawin_nemo.config.schema import EvalConfig, RolloutConfig
from tawin_nemo.data.samples import Samples
from tawin_nemo.eval.grounding import embeddings, ground
from tawin_nemo.rollout.engine import RolloutEngine
from tawin_nemo.rollout.greedy import free_beam_search, greedy_decode
from tawin_nemo.types import DataParallel, TokenRows
from tawin_nemo.util.errors import ConfigError, DataError, TawinError
from tests.rollout.sequence_lm import Rows, TableLM

EOS, VOCAB, LETTERS = 1, 9, "..abcdefg"
#: Items 1 and 4 are written alike.
NAMES = ["ab", "ac", "d", "eef", "ac", "g", "fa", "b"]
ROWS = 60


class EmbeddingLM(TableLM):
    """Its states are a fixed function of all tokens up to a row."""

    def hidden_states(self, cache: Rows, row_N: Tensor) -> Tensor:
        return torch.tensor([state(cache.sequence[row]) for row in row_N.tolist()])


def state(tokens: tuple[int, ...]) -> list[float]:
    return [zlib.crc32(repr((tokens, place)).encode()) % 1000 / 250 for place in range(3)]


def encode(texts: Any) -> TokenRows:
    return TokenRows.from_lists([[LETTERS.index(letter, 2) for letter in text.replace(".", "")] for text in texts])


def decode(tokens: Any) -> str:
    return "".join(LETTERS[token] for token in tokens)


def scene(seed: int = 2) -> tuple[RolloutEngine, Samples, Catalog]:
    paths = TokenRows.from_lists([[*encode([name])[0].tolist(), EOS] for name in NAMES])
    catalog = Catalog(NAMES, NAMES, "title", paths, TokenTrie.from_paths(paths, names=NAMES))
    draw = np.random.default_rng(1)
    samples = Samples(
        TokenRows.from_lists([[2 + row % 7, (row * row) % VOCAB, row % 5][: 1 + row % 3] for row in range(ROWS)]),
        draw.integers(0, len(NAMES), size=ROWS),
        np.arange(ROWS),
        TokenRows.from_lists([[0]] * ROWS),
    )
    lm = EmbeddingLM(VOCAB, seed=seed, impossible=False)
    return RolloutEngine(lm, catalog, RolloutConfig(), seed=0), samples, catalog


def measured(engine: RolloutEngine, samples: Samples, catalog: Catalog, dp: DataParallel | None = None, **changes: Any):
    cfg = EvalConfig(ks=[1, 3], **{"grounding": 1, **changes})
    return ground(
        engine, samples, catalog, NAMES, encode, decode, cfg, eos=EOS, dp=dp or DataParallel(), label="test"
    )  # fmt: skip


def slow_rank(text: str, target: int) -> int:
    """The rank of the target's path among all paths, by the distance of embeddings; -1 for an empty text."""
    tokens = tuple(encode([text])[0].tolist())
    if not tokens:
        return -1
    names = list(dict.fromkeys(NAMES))
    distances = [math.dist(state(tokens), state(tuple(encode([name])[0].tolist()))) for name in names]
    order = sorted(range(len(names)), key=lambda place: (distances[place], place))
    return order.index(names.index(NAMES[target]))


@pytest.mark.parametrize("beams", [1, 3])
def test_every_row_ranks_the_whole_catalog_by_the_distance_to_its_free_text(beams: int) -> None:
    engine, samples, catalog = scene()
    longest, ranks, named = catalog.trie.max_depth, [], []
    for row in range(ROWS):
        prompt = samples.prompts.take(np.array([row]))
        if beams == 1:
            tokens = greedy_decode(engine.lm, prompt, max_tokens=longest, eos=EOS)[0].tolist()
        else:
            tokens = free_beam_search(engine.lm, prompt, width=beams, max_tokens=longest, eos=EOS)[0][0]
        text = decode(token for token in tokens if token != EOS)
        ranks.append(slow_rank(text, int(samples.target_N[row])))
        named.append(float(text in NAMES))
    assert len(set(ranks)) > 5
    result = measured(engine, samples, catalog, grounding=beams)
    table = result.per_user
    assert table["rank"].to_list() == ranks
    assert table["named_ratio"].to_list() == named
    assert sum(named) < ROWS
    assert beams > 1 or sum(named) > 0
    credit = np.array([0.5 if NAMES[target] == "ac" else 1.0 for target in samples.target_N])
    listed = np.array(ranks)
    for k in (1, 3):
        hit = (listed >= 0) & (listed < k)
        np.testing.assert_allclose(table[f"grounded_recall@{k}"].to_numpy(), hit * credit)
        gain = np.where(hit, 1 / np.log2(np.maximum(listed, 0) + 2), 0) * credit
        np.testing.assert_allclose(table[f"grounded_ndcg@{k}"].to_numpy(), gain, rtol=1e-6)
    whole = measured(engine, samples, catalog, grounding=beams, collision="optimistic")
    assert whole.means["grounded_recall@3"] >= result.means["grounded_recall@3"]
    assert measured(engine, samples, catalog, grounding=beams, token_budget=16).per_user.equals(table)


def test_replicas_divide_the_rows() -> None:
    engine, samples, catalog = scene()
    alone = measured(engine, samples, catalog)
    shares: list[Any] = []

    def hand_in(value: Any) -> list[Any]:
        shares.append(value)
        raise StopIteration

    for rank in range(3):
        with pytest.raises(StopIteration):
            measured(engine, samples, catalog, DataParallel(rank, 3, hand_in))
    gathered = measured(engine, samples, catalog, DataParallel(0, 3, lambda _: shares))
    assert gathered.per_user.equals(alone.per_user)


def test_an_item_written_exactly_is_the_nearest() -> None:
    engine, _, catalog = scene()
    items_LD = embeddings(engine.lm, encode(list(dict.fromkeys(NAMES))), 8)
    for place, name in enumerate(dict.fromkeys(NAMES)):
        assert int(torch.cdist(embeddings(engine.lm, encode([name]), 100), items_LD).argmin()) == place
    assert len(items_LD) == catalog.trie.num_leaves


def test_what_cannot_be_grounded_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, samples, catalog = scene()
    with pytest.raises(DataError, match="test: no rows"):
        measured(engine, samples.take(np.zeros(0, dtype=np.int64)), catalog)
    monkeypatch.setattr(EmbeddingLM, "hidden_states", lambda self, cache, row_N: torch.full((len(row_N), 2), math.nan))
    with pytest.raises(TawinError, match="hidden states that are not numbers"):
        measured(engine, samples, catalog)
    with pytest.raises(ConfigError, match=r"eval\.grounding=4 writes free text .* catalog\.kind=sid"):
        load_recipe(None, ["data.dataset=synthetic", "eval.grounding=4", "catalog.kind=sid", "catalog.index=x.json"])

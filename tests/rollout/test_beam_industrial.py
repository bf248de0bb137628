"""Beam search over the real Industrial titles, in the real Qwen tokenizer, against transformers' generate.

A search over all 151,936 tokens costs transformers some ten passes over the vocabulary per beam and step, minutes for
hundreds of prompts on a CPU. Most prompts therefore run with the tokens renumbered to those that occur in the
catalog: a monotone renumbering leaves the trie, its order and the search as they are. A few run with all tokens;
TAWIN_FULL_VOCAB_PROMPTS sets how many.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hf_lm import HfLM, double_precision_generate, random_qwen2, transformers_search
from rankings import EXACT, SCORE_TOLERANCE, assert_same_ranking, found_ranking
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.rollout.beam import constrained_beam_search
from tawin_nemo.types import TokenRows

pytestmark = [pytest.mark.real_data, pytest.mark.slow]

QWEN_VOCAB, EOS_TOKEN = 151_936, "<|endoftext|>"
CHUNK = 50  # prompts per call of generate
#: Of the random weights, for flat distributions. In vocab space the eight best titles cost 58 to 728 nats (median 252).
SPREAD = 0.1


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The models are tiny: more threads only wait for each other, for minutes where other work shares the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def title_paths(industrial: Path, qwen_tokenizer: Path) -> TokenRows:
    """Tokens of `"title"`, a line feed and EOS for all 3,686 items."""
    tokenizer = Tokenizer.from_file(str(qwen_tokenizer / "tokenizer.json"))
    items = json.loads((industrial / "Industrial_and_Scientific.item.json").read_text(encoding="utf-8"))
    texts = [f'"{items[str(item)]["title"]}"\n' for item in range(len(items))]
    eos = tokenizer.token_to_id(EOS_TOKEN)
    return TokenRows.from_lists([[*encoding.ids, eos] for encoding in tokenizer.encode_batch(texts)])


@pytest.fixture(scope="module")
def renumbered_paths(title_paths: TokenRows) -> TokenRows:
    return TokenRows(np.unique(title_paths.flat, return_inverse=True)[1].astype(np.int64), title_paths.offsets)


def random_prompts(paths: TokenRows, count: int, seed: int) -> TokenRows:
    """Random tokens of the catalog, 4 to 23 per prompt."""
    rng = np.random.default_rng(seed)
    tokens = np.unique(paths.flat)
    return TokenRows.from_lists([rng.choice(tokens, rng.integers(4, 24)) for _ in range(count)])


def check_against_transformers(
    model: PreTrainedModel, paths: TokenRows, prompts: TokenRows, width: int, space: str, tolerance: float
) -> None:
    trie, eos = TokenTrie.from_paths(paths), int(paths[0][-1])
    found = constrained_beam_search(HfLM(model), prompts, trie, width, score_space=space)
    assert (found.items_BW >= 0).all()
    for start in range(0, len(prompts), CHUNK):
        rows = np.arange(start, min(start + CHUNK, len(prompts)))
        expected = transformers_search(model, prompts.take(rows), trie, width, eos=eos, space=space)
        for row, ranking in zip(rows, expected, strict=True):
            assert len(ranking) == width
            assert_same_ranking(found_ranking(found, int(row)), ranking, tolerance)


def test_the_real_trie(title_paths: TokenRows) -> None:
    trie = TokenTrie.from_paths(title_paths)
    assert (trie.num_items, trie.num_leaves) == (3686, 3646)
    assert trie.max_depth == 84  # 83 tokens of the longest title, and EOS


@pytest.mark.parametrize(
    ("space", "count"), [("trie", 200), ("vocab", 40), pytest.param("vocab", 200, marks=pytest.mark.full)]
)
def test_many_prompts_rank_as_transformers_does(renumbered_paths: TokenRows, space: str, count: int) -> None:
    model = random_qwen2(int(renumbered_paths.flat.max()) + 1, spread=SPREAD)
    prompts = random_prompts(renumbered_paths, count, seed=0)
    check_against_transformers(model, renumbered_paths, prompts, 8, space, SCORE_TOLERANCE)


@pytest.mark.parametrize("space", ["trie", "vocab"])
def test_float64_ranks_exactly_as_transformers_does(
    renumbered_paths: TokenRows, space: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    double_precision_generate(monkeypatch)
    model = random_qwen2(int(renumbered_paths.flat.max()) + 1, seed=1).double()
    prompts = random_prompts(renumbered_paths, 20, seed=1)
    check_against_transformers(model, renumbered_paths, prompts, 8, space, EXACT)


@pytest.mark.parametrize("space", ["trie", "vocab"])
def test_all_151936_tokens_rank_as_transformers_does(title_paths: TokenRows, space: str) -> None:
    prompts = random_prompts(title_paths, int(os.environ.get("TAWIN_FULL_VOCAB_PROMPTS", "3")), seed=2)
    check_against_transformers(random_qwen2(QWEN_VOCAB, spread=SPREAD), title_paths, prompts, 4, space, SCORE_TOLERANCE)

"""The candidate protocol against counting by hand, on a language model whose scores are a table."""

import json

import numpy as np
import polars as pl
import pytest

from tawin_nemo.catalog.items import Catalog
from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.config.schema import EvalConfig, RolloutConfig
from tawin_nemo.data.negative_sampling import candidate_set
from tawin_nemo.data.samples import Samples
from tawin_nemo.eval.candidates import MAX_TOKENS, MEASURED, evaluate_candidates, named_candidate
from tawin_nemo.rollout.engine import RolloutEngine
from tawin_nemo.rollout.greedy import greedy_decode
from tawin_nemo.types import DataParallel, TokenRows
from tests.rollout.sequence_lm import TableLM

EOS, VOCAB = 1, 9
#: Items 1 and 4 are written alike. Names are single letters, so that a free output often names one.
PATHS = [[2, 3, EOS], [2, 4, EOS], [5, EOS], [6, 6, 7, EOS], [2, 4, EOS], [8, EOS], [7, 2, EOS]]
NAMES = ["ab", "ac", "d", "eef", "ac", "g", "fa"]
ROWS = 40


def scene(candidates=None):
    paths = TokenRows.from_lists(PATHS)
    catalog = Catalog(NAMES, NAMES, "title", paths, TokenTrie.from_paths(paths, names=NAMES))
    draw = np.random.default_rng(1)
    samples = Samples(
        TokenRows.from_lists([[row % VOCAB, (row * row) % VOCAB, row % 5][: 1 + row % 3] for row in range(ROWS)]),
        draw.integers(0, len(PATHS), size=ROWS),
        np.arange(ROWS),
        TokenRows.from_lists([[0]] * ROWS),
        candidates=candidates,
    )
    engine = RolloutEngine(TableLM(VOCAB, seed=2, impossible=False), catalog, RolloutConfig(), seed=0)
    return engine, samples, catalog


def decode(tokens):
    return "".join("..abcdefg"[token] for token in tokens)


def measured(engine, samples, catalog, dp=None):
    return evaluate_candidates(
        engine, samples, catalog, NAMES, decode, EvalConfig(candidates=4), eos=EOS, seed=7, dp=dp or DataParallel(),
        label="test",
    )  # fmt: skip


def test_the_figures_are_those_counted_row_by_row(tmp_path):
    engine, samples, catalog = scene()
    result = measured(engine, samples, catalog)
    lm, hits, valid, trie = engine.lm, [], [], []
    for row in range(ROWS):
        items = candidate_set(samples, catalog.leaf_I, row, 4, 7).tolist()
        target = int(samples.target_N[row])
        output = decode(greedy_decode(lm, samples.prompts.take(np.array([row])), max_tokens=MAX_TOKENS, eos=EOS)[0])
        inside = [item for item in items if NAMES[item] in output]
        valid.append(float(len(inside) == 1))
        hits.append(float(inside == [target]))
        scores = {}
        for item in items:
            sequence, total = samples.prompts[row].tolist(), 0.0
            node = catalog.trie.root
            for token in PATHS[item]:
                tokens, children = catalog.trie.children(node)
                values = lm.path_logprobs(sequence, [int(t) for t in tokens], "trie")
                total += dict(zip((int(t) for t in tokens), values, strict=True))[token]
                sequence.append(token)
                node = dict(zip((int(t) for t in tokens), (int(c) for c in children), strict=True))[token]
            scores[item] = total
        best = max(scores.values())
        trie.append((scores[target] == best, [item for item in items if scores[item] == best]))
    table = result.per_user
    assert table["valid_ratio"].to_list() == valid
    assert table["hit_ratio@1"].to_list() == hits
    assert 0 < sum(hits) <= sum(valid) < ROWS
    for found, (is_best, winners) in zip(table["trie_hit_ratio@1"].to_list(), trie, strict=True):
        if len(winners) == 1:  # ties are broken by the search's own rule
            assert found == float(is_best)
    assert result.means["hit_ratio@1"] == pytest.approx(sum(hits) / ROWS)
    result.write(tmp_path, "test")
    facts = json.loads((tmp_path / "test.candidates.json").read_text())
    assert facts["rows"] == ROWS
    assert facts["means"].keys() == set(MEASURED)
    assert pl.read_parquet(tmp_path / "test.candidates.parquet").equals(table)


def test_replicas_give_what_one_process_gives():
    whole = measured(*scene())
    parts = []
    for rank in range(2):
        measured(*scene(), dp=DataParallel(rank, 2, lambda value: parts.append(value) or [value] * 2))
    assert sorted(np.concatenate([rows for rows, _ in parts]).tolist()) == list(range(ROWS))
    again = np.empty((ROWS, len(MEASURED)))
    for rows, values in parts:
        again[rows] = values
    assert np.array_equal(again, whole.per_user.select(MEASURED).to_numpy())


def test_candidates_of_the_data_are_used():
    sets = TokenRows.from_lists([[0]] * ROWS)
    engine, samples, catalog = scene(sets)
    samples.target_N[:] = 0
    table = measured(engine, samples, catalog).per_user
    assert set(table["trie_hit_ratio@1"].to_list()) == {1.0}


def test_which_name_is_meant():
    assert named_candidate("I say Hope.", ["Hope", "Queen"]) == 0
    assert named_candidate("hopeful", ["HOPE", "Queen"]) == 0
    assert named_candidate("nothing", ["Hope", "Queen"]) is None
    assert named_candidate("Hope and Queen", ["Hope", "Queen"]) is None

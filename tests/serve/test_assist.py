"""A server whose searches an auxiliary recommender joins (``rollout.assist``), against a walk of every item."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from tawin_nemo.baselines.assist import AuxiliaryRecommender
from tawin_nemo.baselines.build import Blueprint, build_recommender, items_fingerprint
from tawin_nemo.baselines.load import ModelAndOptimizer, save_checkpoint
from tawin_nemo.commands.serve import first_catalog
from tawin_nemo.config.load import load_recipe
from tawin_nemo.config.schema import BaselineConfig
from tawin_nemo.data.catalog_builder import build_catalog
from tawin_nemo.data.prompts import Template
from tawin_nemo.models.megatron.parallel.channel import Stop, decode, encode
from tawin_nemo.rollout.filters import ItemFilter
from tawin_nemo.serve.engine.catalog import NewItem, ServedCatalog
from tawin_nemo.serve.engine.jobs import Job
from tawin_nemo.serve.engine.messages import MESSAGES, Admit, Lane
from tawin_nemo.serve.engine.ranks import Leader, follow
from tawin_nemo.serve.engine.replica import Replica
from tawin_nemo.serve.engine.running import Running
from tawin_nemo.serve.engine.telemetry import Metrics
from tawin_nemo.types import TokenRows
from tawin_nemo.util.errors import ConfigError
from tawin_nemo.util.files import write_json
from tests.rollout.sequence_lm import TableLM
from tests.serve.scene import IDS, TITLES, path_scores, prompt_format, serving, tokenizer
from tests.serve.two_ranks import OneOfTwo, Wire

WEIGHT = 0.4
#: The same additions in another order, in float64.
TOLERANCE = 1e-9


@dataclass
class TableScorer:
    """Scores that are a fixed function of the newest three items."""

    def scores(self, histories: Sequence[np.ndarray]) -> Tensor:
        rows = [[zlib.crc32(repr((*history.tolist()[-3:], item)).encode()) % 997 / 100 for item in range(len(IDS))]
                for history in histories]  # fmt: skip
        return torch.tensor(rows, dtype=torch.float64)


def assisted_catalog(weight: float = WEIGHT) -> ServedCatalog:
    catalog = build_catalog(TITLES, IDS, TITLES, tokenizer(), Template(), kind="title")
    recommender = AuxiliaryRecommender(TableScorer(), IDS, weight)  # type: ignore[arg-type]
    return ServedCatalog.of(catalog, TITLES, prompt_format(), recommender)


def totals(history: list[int], catalog: ServedCatalog, known: list[int]) -> dict[int, float]:
    """The mixed score of every live item; ``known``: the history in the recommender's items."""
    by_id = dict(zip(IDS, TableScorer().scores([np.array(known)])[0].tolist(), strict=True))
    middle = float(np.sort(list(by_id.values()))[(len(IDS) - 1) // 2])  # torch's median
    live = catalog.number_J.tolist()
    share = {item: np.exp(by_id.get(catalog.external_ids[item], middle)) for item in live}
    whole = sum(share.values())
    paths = {item: tuple(catalog.paths[item].tolist()) for item in live}
    mass = {item: sum(share[other] for other in live if paths[other] == paths[item]) / whole for item in live}
    model = path_scores(history, catalog=catalog)
    return {item: WEIGHT * model[item] + (1 - WEIGHT) * float(np.log(mass[item])) for item in live}


def ranked(scores: dict[int, float], catalog: ServedCatalog) -> list[int]:
    """The first item of every path, best first."""
    first = {int(catalog.trie.leaf_I[catalog.trie_item_I[item]]): item for item in sorted(scores, reverse=True)}
    return sorted(first.values(), key=lambda item: -scores[item])


@pytest.mark.parametrize("seed", range(3))
def test_replies_rank_all_items_by_their_mixed_scores(seed: int) -> None:
    rng, catalog = np.random.default_rng(seed), assisted_catalog()
    with serving(catalog=catalog) as scene, scene.client() as client:
        for _ in range(4):
            history = rng.integers(0, len(TITLES), rng.integers(1, 5)).tolist()
            expected = totals(history, catalog, history)
            reply = client.recommend(history, n=len(TITLES), beams=len(TITLES), return_tokens=True)
            assert [found.item for found in reply.items] == ranked(expected, catalog)
            own = path_scores(history, catalog=catalog)
            for found in reply.items:
                assert found.score == pytest.approx(expected[found.item], abs=TOLERANCE)
                assert sum(found.logprobs or []) == own[found.item]  # log-probs stay the model's own
            allowed = rng.choice(len(TITLES), 9, replace=False).tolist()
            some = client.recommend(history, n=9, beams=len(TITLES), allow=allowed)
            order = [item for item in ranked(expected, catalog) if {item, *alike(item)} & set(allowed)]
            assert [alike(found.item) for found in some.items] == [alike(item) for item in order]
            narrow = client.recommend(history, n=3, beams=3, exact=True)
            assert [found.item for found in narrow.items] == ranked(expected, catalog)[:3]


def alike(item: int) -> frozenset[int]:
    return frozenset(other for other, title in enumerate(TITLES) if title == TITLES[item])


def test_a_request_without_items_is_answered_by_the_model_alone() -> None:
    """A raw prompt, an empty history, scores of items, completions: nothing that the recommender could read."""
    with serving() as plain, serving(catalog=assisted_catalog()) as scene, plain.client() as one, scene.client() as two:
        for request in ({"prompt": "Bought: red lamp"}, {"history": []}):
            expected, found = (c.recommend(n=5, beams=9, **request) for c in (one, two))
            assert [(i.item, i.score) for i in found.items] == [(i.item, i.score) for i in expected.items]
        expected, found = (c.score([1, 2, 3], history=[4, 5]) for c in (one, two))
        assert found.items == expected.items


def test_a_changed_catalog_is_ranked_with_the_items_that_the_recommender_knows() -> None:
    first = assisted_catalog()
    catalog = first.changed([NewItem("new", "old new lamp table")], [IDS[7], IDS[3]], 2)
    history = [len(TITLES), 3, 5]  # a new item, which the recommender cannot read, and one that left
    expected = totals(history, catalog, [3, 5])
    with serving(catalog=catalog) as scene, scene.client() as client:
        reply = client.recommend(history, n=len(TITLES), beams=len(TITLES))
    assert [found.item for found in reply.items] == ranked(expected, catalog)
    assert len(TITLES) in [found.item for found in reply.items]
    for found in reply.items:
        assert found.score == pytest.approx(expected[found.item], abs=TOLERANCE)
    assert catalog.assist([[len(TITLES)]]) is not None  # nothing left to read: every prompt has weight 1
    assert catalog.assist([[len(TITLES)]]).weight_P.tolist() == [1.0]  # type: ignore[union-attr]


def test_every_rank_of_a_model_gets_the_same_assistance() -> None:
    """Rank 0 alone has the recommender; what it says travels with the prompts and survives the wire bit for bit."""
    catalog, wire = assisted_catalog(), Wire()
    first, second = (Replica(lambda path: TableLM(tokenizer().size, impossible=False)) for _ in range(2))
    for part in (first, second):
        part.models[1], part.tries[1] = part.load(""), catalog.trie
    follower = threading.Thread(target=follow, args=(second, OneOfTwo(wire, 1)), daemon=True)
    follower.start()
    leader = Leader(first, OneOfTwo(wire, 0))
    running = Running(leader, Metrics())
    jobs = [
        Job(catalog, catalog.prompt([2, 9]), 1e18, width=4, history=[2, 9]),
        Job(catalog, catalog.prompt([8]), 1e18, width=3),
        Job(catalog, catalog.prompt([4]), 1e18, width=5, history=[4], filter=ItemFilter.without(catalog.trie, [4])),
    ]
    running.begin(jobs, 1)
    while running.jobs:
        running.advance()
    leader.apply(Stop())
    follower.join(30)
    assert not follower.is_alive()
    assert second.models[1].ran == first.models[1].ran != []
    assert [len(job.future.result().prompts[0].hits) for job in jobs] == [4, 3, 5]
    assist = catalog.assist([job.history for job in jobs])
    assert assist is not None
    assert assist.weight_P.tolist() == [WEIGHT, 1.0, WEIGHT]
    numbers, rows = np.arange(3), TokenRows.from_lists([[1], [2], [3]])
    again = decode(encode(Admit(Lane(1, 1, "trie"), rows, numbers, numbers, numbers * 0, rows, assist)), MESSAGES)
    assert torch.equal(again.assist.weight_P, assist.weight_P)
    assert torch.equal(again.assist.edge_PV, assist.edge_PV)


def stage_of(folder: Path, external_ids: Sequence[str]) -> Path:
    """A finished baseline stage with fresh weights over these items."""
    config = BaselineConfig(model="sasrec", hidden=16, layers=1, heads=2, dropout=0.0)
    blueprint = Blueprint(config, len(external_ids), 5, None, items_fingerprint(external_ids))
    torch.manual_seed(0)
    model = build_recommender(blueprint)
    trained = ModelAndOptimizer(model, torch.optim.Adam(model.parameters()))
    save_checkpoint(folder / "checkpoints" / "step_1", trained, {})
    write_json(folder / "model.json", blueprint.to_json())
    write_json(folder / "done.json", {"step": 1, "chosen_step": 1})
    return folder


def test_a_server_loads_the_recommender_at_its_start(tmp_path: Path) -> None:
    catalog = build_catalog(TITLES, IDS, TITLES, tokenizer(), Template(), kind="title")

    def first(stage: Path, *words: str) -> ServedCatalog:
        recipe = load_recipe(None, ["data.dataset=synthetic", f"rollout.assist.stage={stage}", *words])
        world = SimpleNamespace(
            tokenizer=tokenizer(),
            template=Template(),
            catalog=catalog,
            item_texts=TITLES,
            export=None,
            recipe=recipe,
        )
        return first_catalog(world)  # type: ignore[arg-type]

    stage = stage_of(tmp_path / "sasrec", IDS)
    served = first(stage, "rollout.assist.weight=0.3")
    assert served.recommender is not None
    assist = served.assist([[3, 5], []])
    assert assist is not None
    assert assist.weight_P.tolist() == [0.3, 1.0]
    assert float(assist.edge_PV[0].min()) < 0
    assert first(stage, "rollout.assist.weight=1").recommender is None
    with pytest.raises(ConfigError, match=r"rollout\.assist\.stage=.*not a finished baseline"):
        first(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="not the same ones"):
        first(stage_of(tmp_path / "other", [*IDS[1:], "other"]))

"""What benchmark and soak of the server conclude: right replies pass, and what is wrong with the others is found."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.benchmarks import serve_swaps, soak
from tests.benchmarks.load import Load, Reply, Spec, load
from tests.benchmarks.serve_baseline import Generator
from tests.benchmarks.serve_oracle import SCORE_TOLERANCE, Oracle, admissible
from tests.benchmarks.serve_swaps import Answers, Swap
from tests.benchmarks.serving import Setting
from tests.benchmarks.setting import qwen_shape, transformers_model
from tests.serve.scene import KEY, first_catalog, serving, tokenizer

HISTORIES = [[3, 5], [7], [11, 12, 13]]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """Two small models over the titles of tests/serve."""
    folder = tmp_path_factory.mktemp("setting")
    shape = replace(qwen_shape(1), vocab=tokenizer().size, hidden=32, ffn=64, heads=2, kv_heads=2, init_std=0.3)
    weights = [folder / f"weights_{seed}" for seed in range(2)]
    for seed, place in enumerate(weights):
        transformers_model(shape, seed=seed).save_pretrained(place)
    return Setting("small", folder, (), first_catalog(), HISTORIES, weights, shape, {})


def answered(setting: Setting, weights: int, row: int, n: int = 4) -> list[tuple[str, float]]:
    """By transformers' beam search with a beam for every item."""
    body = {"history": HISTORIES[row], "n": n, "beams": 12}
    (found,) = serve_swaps.rankings(setting.catalog, setting.weights[weights], [body])
    return found


def test_oracle_and_beam_search_of_transformers_agree(setting: Setting) -> None:
    """One walks a path token by token, the other searches; both are written without our trie."""
    catalog = setting.catalog
    table = admissible([catalog.paths[item].tolist() for item in range(40)], tokenizer().eos_id)
    for weights, row in ((0, 0), (1, 2)):
        found = answered(setting, weights, row)
        paths = [tuple(catalog.paths[catalog.number_of[name]].tolist()) for name, _ in found]
        prompt = catalog.prompt(HISTORIES[row]).flat.tolist()
        scores = Oracle(setting.weights).scores(weights, table, prompt, paths)
        assert scores == pytest.approx([score for _, score in found], abs=SCORE_TOLERANCE)


def test_the_baseline_answers_padded_prompts_as_it_does_alone(setting: Setting) -> None:
    import torch

    generator = Generator.of(setting.catalog, setting.weights[0])
    prompts = [torch.from_numpy(setting.catalog.prompt(history).flat) for history in HISTORIES]
    together = generator.best(prompts, 12, 5)
    for prompt, found in zip(prompts, together, strict=True):
        (alone,) = generator.best([prompt], 12, 5)
        assert [item for item, _ in alone] == [item for item, _ in found]
        assert [score for _, score in alone] == pytest.approx([score for _, score in found], abs=SCORE_TOLERANCE)


def reply_of(ranking: list[tuple[str, float]], weights: int, catalog: int = 1, body: int = 0) -> Reply:
    items = [{"external_id": name, "score": score} for name, score in ranking]
    content = {"weight_version": weights, "catalog_version": catalog, "items": items}
    return Reply(body, 0.0, 1.0, 200, content)


def test_a_reply_of_other_weights_than_it_names_is_wrong(setting: Setting) -> None:
    first, second = (answered(setting, weights, 0) for weights in range(2))
    answers = Answers({"first": [first], "second": [second]}, {(1, 1): "first", (2, 1): "second"})
    assert serve_swaps.differing([first], [second]) == 1
    assert not answers.wrong(reply_of(first, 1))
    assert not answers.wrong(reply_of(second, 2))
    assert answers.wrong(reply_of(second, 1))
    assert answers.wrong(reply_of(first, 2))
    assert answers.wrong(reply_of(first[:-1], 1))
    assert answers.wrong(reply_of([*first[:-1], (first[-1][0], first[-1][1] - 0.01)], 1))


def line(setting: Setting, seed: int, row: int, **changes: Any) -> dict[str, Any]:
    items = [list(item) for item in answered(setting, seed, row)]
    return {"kind": "recommend", "ok": True, "status": 200, "history": row, "weights": seed + 1, "catalog": 1,
            "items": items} | changes  # fmt: skip


def test_the_soak_finds_replies_that_are_not_of_their_versions(setting: Setting) -> None:
    world = soak.World.of(setting)
    world.weights[2] = 1
    good = [line(setting, weights, row) for weights in (0, 1) for row in range(3)]
    found = soak.judged(good, world, 100)
    assert (found["recomputed"], found["mixed_versions"]) == (6, 0)
    assert (found["unknown_versions"], found["invalid_items"]) == (0, 0)
    gone = good[0]["items"][0][0]
    world.changed(2, world.live - {gone})
    assert soak.judged([line(setting, 0, 0, weights=2)], world, 100)["mixed_versions"] == 1
    assert soak.judged([line(setting, 0, 0, weights=9)], world, 100)["unknown_versions"] == 1
    assert soak.judged([line(setting, 0, 0, catalog=9)], world, 100)["unknown_versions"] == 1
    late = soak.judged([line(setting, 0, 0), line(setting, 0, 0, catalog=2, kind="complete")], world, 100)
    assert (late["invalid_items"], late["mixed_versions"]) == (1, 0)


def test_growth_compares_the_end_with_the_time_behind_the_warm_up() -> None:
    memory = [*range(100, 125), *[200.0] * 50, *[220.0] * 25]
    assert soak.growth(memory) == {"warm_mib": 200.0, "end_mib": 220.0, "growth": pytest.approx(0.1)}


def test_a_missed_goal_is_named() -> None:
    operator = SimpleNamespace(failed=[], done=Counter(items=1))
    found = {"invalid_items": 0, "mixed_versions": 0, "unknown_versions": 0, "recomputed": 5}
    memory = {"growth": 0.06}
    bad = {"kind": "slow", "ok": False, "status": 500, "text": "x"}
    assert soak.report([], operator, found, memory, 1.0)["failed"] == []
    assert soak.report([bad], operator, found, memory, 10.0)["failed"] == ["failures", "memory"]
    assert soak.report([], operator, found | {"recomputed": 0}, memory, 1.0)["failed"] == ["mixed_versions"]
    assert soak.report([], operator, found | {"invalid_items": 1}, memory, 1.0)["failed"] == ["invalid_items"]


# -- the load ----------------------------------------------------------------------------------------------------------
def test_pauses_are_those_of_the_swaps_beyond_the_calm_run() -> None:
    calm = Load([Reply(0, at, at + 0.01, 200, None) for at in (10 + 0.01 * step for step in range(400))], 4.0, 0.1)
    times = [20 + 0.01 * step for step in range(400)]
    busy = [Reply(0, at, at + (0.09 if 21.0 <= at < 21.08 else 0.01), 200, None) for at in times if not 21 < at < 21.07]
    row = serve_swaps.pauses(calm, Load(busy, 4.0, 0.1), [Swap(21.0, 21.02, 2, 1)])
    assert row["longest gap ms, calm"] == pytest.approx(10)
    assert row["added latency ms"] == pytest.approx(80)
    assert row["added gap ms"] == pytest.approx(80)  # from 21.00 to 21.09


def test_closed_and_open_loop_against_a_server(tmp_path: Path) -> None:
    bodies: list[dict[str, Any]] = [{"history": [item], "n": 2} for item in range(5)]
    with serving() as scene:
        headers = {"Authorization": f"Bearer {KEY}"}
        closed = load(Spec(scene.data, bodies, 1.5, 3, warm=0.5, headers=headers))
        assert closed.failed == 0
        assert closed.seconds >= 1.5
        assert 0 < closed.core <= 1.5
        assert {reply.body for reply in closed.replies} == set(range(5))
        with scene.client() as client:
            expected = client.recommend([4], n=2)
        given = next(reply for reply in closed.replies if reply.body == 4)
        assert given.content is not None
        assert [item["score"] for item in given.content["items"]] == [item.score for item in expected.items]
        opened = load(Spec(scene.data, bodies, 2.0, 8, rate=20.0, warm=0.2, headers=headers))
        assert 15 <= len(opened.replies) <= 70  # 40 are expected
        assert opened.latency(0.5) > 0
        refused = load(Spec(scene.data, bodies, 0.5, 2, warm=0.0))
        assert refused.failed == len(refused.replies) > 0

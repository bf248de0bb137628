"""Weights and catalogs change under load: every reply is of one pair of versions, and nothing is lost."""

from __future__ import annotations

import gc
import json
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tawin_nemo.api.client import ServerError
from tawin_nemo.api.control_schema import ItemToAdd
from tawin_nemo.serve.engine.catalog import NewItem
from tawin_nemo.serve.engine.items_file import read_items
from tests.serve.scene import IDS, TITLES, first_catalog, path_scores, serving


def weights(folder: Path, seed: int) -> str:
    file = folder / f"weights{seed}"
    file.write_text(str(seed))
    return str(file)


def new_item(number: int) -> ItemToAdd:
    return ItemToAdd(external_id=f"N{number}", title=f"new chair {number}")


def scores_in(reply) -> dict[int, float]:
    return {found.item: found.score for found in reply.items}


def test_new_weights_are_for_new_requests_and_running_ones_keep_theirs(tmp_path: Path) -> None:
    with serving(roots=[tmp_path]) as scene, ThreadPoolExecutor(2) as pool, scene.controller() as control:
        scene.gate.clear()
        old = pool.submit(scene.client().recommend, [3], n=5, beams=40, score_space="vocab")
        scene.wait_until(lambda: scene.engine.busy == 1 and not scene.engine._queue)
        updated = pool.submit(control.update_weights, weights(tmp_path, 7))
        scene.gate.set()
        assert updated.result(30).weight_version == 2
        new = scene.client().recommend([3], n=5, beams=40, score_space="vocab")
        was = old.result(30)
        assert (was.weight_version, new.weight_version) == (1, 2)
        for reply, seed in ((was, 0), (new, 7)):
            expected = path_scores([3], seed=seed, space="vocab")
            assert scores_in(reply) == {item: expected[item] for item in scores_in(reply)}
        assert scores_in(was) != scores_in(new)
        scene.wait_until(lambda: control.status().weights_in_memory == [2])
        assert scene.metric("tawin_weight_version") == 2


def test_weights_that_cannot_be_loaded_leave_those_in_use(tmp_path: Path) -> None:
    (tmp_path / "broken").write_text("not a number")
    with serving(roots=[tmp_path]) as scene, scene.controller() as control, scene.client() as client:
        before = client.recommend([1])
        with pytest.raises(ServerError, match="holds no weights") as caught:
            control.update_weights(str(tmp_path / "broken"))
        assert (caught.value.status, caught.value.error.code) == (400, "checkpoint_unusable")
        control.update_weights(weights(tmp_path, 3), weight_version=40)
        with pytest.raises(ServerError, match="40 is not newer than 40"):
            control.update_weights(weights(tmp_path, 4), weight_version=40)
        control.update_weights(weights(tmp_path, 0))
        after = client.recommend([1])
        assert (before.weight_version, after.weight_version) == (1, 41)
        assert before.items == after.items


def test_a_request_can_ask_for_one_weight_version_or_none(tmp_path: Path) -> None:
    with serving(roots=[tmp_path]) as scene, scene.controller() as control, scene.client() as client:
        assert client.recommend([1], weight_version=1).weight_version == 1
        control.update_weights(weights(tmp_path, 2))
        with pytest.raises(ServerError, match="version 1 was asked for; version 2 is in use") as caught:
            client.recommend([1], weight_version=1)
        assert caught.value.status == 409
        assert client.recommend([1], weight_version=2).weight_version == 2


def test_items_come_and_go_while_the_server_runs() -> None:
    with serving() as scene, scene.controller() as control, scene.client() as client:
        changed = control.change_items(add=[new_item(1)], remove=[IDS[4], IDS[5]])
        assert (changed.items, changed.catalog_version, changed.validated) == (len(TITLES) - 1, 2, True)
        catalog = scene.engine.catalog
        reply = client.recommend([4, "N1"], n=64, beams=64)  # a removed item may still stand in a history
        expected = path_scores([4, len(TITLES)], catalog=catalog)
        assert scores_in(reply) == {item: expected[item] for item in scores_in(reply)}
        assert {4, 5} & scores_in(reply).keys() == set()
        assert len(TITLES) in scores_in(reply)  # the new item's number
        assert client.search_items("new chair 1").items[0].external_id == "N1"
        with pytest.raises(ServerError, match="item 4 was removed"):
            client.score([4], [1])
        assert client.recommend([1], allow=[4, 5]).items == []
        back = control.change_items(add=[ItemToAdd(external_id=IDS[4], title=TITLES[4])])
        assert back.catalog_version == 3
        assert client.score([IDS[4]], [1]).items[0].item == 4  # as it was: its number again


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"remove": ["nobody"]}, "not in the catalog: 'nobody'"),
        ({"add": [ItemToAdd(external_id=IDS[1], title="x")]}, "in the catalog already"),
        ({"add": [new_item(1), new_item(1)]}, "named twice: 'N1'"),
        ({"add": [ItemToAdd(external_id="N", title="a <|endoftext|> b")]}, "reserved token"),
        ({"add": [ItemToAdd(external_id="N", title="x", codes=["<a_1>"])]}, "wants no codes"),
        ({"add": [ItemToAdd(external_id="N", title="long " * 700)]}, "the longest item has"),
        ({"remove": IDS}, "keep at least one"),
    ],
)  # fmt: skip
def test_a_change_that_cannot_be_made_changes_nothing(change, words: str) -> None:
    with serving() as scene, scene.controller() as control:
        with pytest.raises(ServerError, match=words) as caught:
            control.change_items(**change)
        assert caught.value.status == 400
        assert scene.engine.catalog.version == 1
        assert control.status().candidates == []
        assert control.change_items(add=[new_item(9)]).items == len(TITLES) + 1


def test_a_catalog_is_built_then_validated_then_activated(tmp_path: Path) -> None:
    kept = [{"external_id": IDS[item], "title": TITLES[item]} for item in range(10)]
    lines = [*kept, {"external_id": IDS[10], "title": "another title"}, {"external_id": "N1", "title": "old new lamp"}]
    file = tmp_path / "items.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with serving(roots=[tmp_path]) as scene, scene.controller() as control, scene.client() as client:
        built = control.build_catalog(str(file))
        assert (built.items, built.validated, built.catalog_version) == (12, False, 1)
        with pytest.raises(ServerError, match="was not validated") as caught:
            control.activate_catalog(built.candidate)
        assert caught.value.status == 409
        assert control.validate_catalog(built.candidate).validated
        assert len(client.recommend([1], n=64, beams=64).items) == len(TITLES) - 2  # still the old one
        active = control.activate_catalog(built.candidate)
        assert (active.catalog_version, active.items) == (built.candidate, 12)
        titles = [item.title for item in client.search_items(limit=100).items]
        assert titles == [line["title"] for line in lines]
        assert client.search_items("another").items[0].item == len(TITLES)  # changed: a number of its own
        with pytest.raises(ServerError, match="no candidate"):
            control.activate_catalog(built.candidate)
        late = control.build_catalog(str(file))
        control.change_items(remove=["N1"])
        with pytest.raises(ServerError, match="no candidate"):
            control.validate_catalog(late.candidate)  # built on a catalog that is no more
        file.write_text('{"external_id": "A"}\n')
        with pytest.raises(ServerError, match="line 1: KeyError"):
            control.build_catalog(str(file))


def test_no_garbage_is_looked_for_while_a_catalog_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a million new items a collection takes seconds, in which no request gets on."""
    file, seen = tmp_path / "items.jsonl", []
    file.write_text(json.dumps({"external_id": "N1", "title": "a lamp"}) + "\n")

    def reading(path: Path) -> list[NewItem]:
        seen.append(gc.isenabled())
        return read_items(path)

    monkeypatch.setattr("tawin_nemo.serve.http.catalog_changes.read_items", reading)
    with serving(roots=[tmp_path]) as scene, scene.controller() as control:
        assert control.build_catalog(str(file)).items == 1
    assert seen == [False]
    assert gc.isenabled()


def test_a_catalog_of_the_same_items_is_the_same() -> None:
    here = first_catalog()
    again = here.replaced([NewItem(name, title) for name, title in zip(IDS, TITLES, strict=True)], version=9)
    assert again.fingerprint == here.fingerprint
    assert again.live_I.tolist() == [True] * len(TITLES)


def test_versions_nobody_runs_on_leave_the_memory(tmp_path: Path) -> None:
    with serving(roots=[tmp_path]) as scene, scene.controller() as control, scene.client() as client:
        models = [weakref.ref(scene.engine.leader.replica.models[1])]
        tries = [weakref.ref(scene.engine.catalog.trie)]
        for seed in range(1, 5):
            control.update_weights(weights(tmp_path, seed))
            control.change_items(add=[new_item(seed)])
            client.recommend([1])
            models.append(weakref.ref(scene.engine.leader.replica.models[seed + 1]))
            tries.append(weakref.ref(scene.engine.catalog.trie))
        scene.weights.clear()
        client.recommend([2])
        scene.wait_until(lambda: control.status().weights_in_memory == [5])
        gc.collect()
        assert [ref() is not None for ref in models] == [False] * 4 + [True]
        assert [ref() is not None for ref in tries] == [False] * 4 + [True]
        assert control.status().catalogs_in_memory == [5]


def test_swaps_in_a_loop_under_load_lose_nothing_and_mix_nothing(tmp_path: Path) -> None:
    """Every reply must be, score by score, what the oracle says for the one pair of versions that it names."""
    seeds, catalogs = {1: 0}, {1: first_catalog()}
    over = threading.Event()
    with serving(roots=[tmp_path]) as scene, scene.controller() as control, ThreadPoolExecutor(4) as pool:

        def user(number: int) -> list[tuple[int, object]]:
            seen = []
            with scene.client() as client:
                while not over.is_set():
                    seen.append((number, client.recommend([number], n=8, beams=12)))
            return seen

        users = [pool.submit(user, number) for number in range(4)]
        try:
            for turn in range(1, 9):
                seeds[control.update_weights(weights(tmp_path, turn)).weight_version] = turn
                remove = [f"N{turn - 1}"] if turn > 1 else []
                version = control.change_items(add=[new_item(turn)], remove=remove).catalog_version
                catalogs[version] = scene.engine.catalog
                reached = scene.metric("tawin_phase_seconds_count", phase="run") + 6
                scene.wait_until(lambda: scene.metric("tawin_phase_seconds_count", phase="run") >= reached)  # noqa: B023
        finally:
            over.set()
        replies = [entry for future in users for entry in future.result(60)]
    pairs = {(reply.weight_version, reply.catalog_version) for _, reply in replies}
    assert len(pairs) >= 8
    expected: dict[tuple[int, int, int], dict[int, float]] = {}
    for number, reply in replies:
        key = (number, reply.weight_version, reply.catalog_version)
        if key not in expected:
            expected[key] = path_scores(
                [number], seed=seeds[reply.weight_version], catalog=catalogs[reply.catalog_version]
            )
        assert reply.items
        assert scores_in(reply) == {item: expected[key][item] for item in scores_in(reply)}
    text = scene.engine.metrics.text().decode()
    families = [found for found in text_string_to_metric_families(text) if found.name == "tawin_requests"]
    assert {sample.labels["code"] for family in families for sample in family.samples} == {"200"}


def test_a_rollback_goes_back_one_change_at_a_time_and_numbers_are_not_given_again(tmp_path: Path) -> None:
    with serving(roots=[tmp_path], keep_versions=2) as scene, scene.controller() as control, scene.client() as client:
        first = client.recommend([3], n=5, beams=40)
        control.update_weights(weights(tmp_path, 7))
        second = client.recommend([3], n=5, beams=40)
        control.change_items(add=[new_item(1)])
        (card,) = client.models().data
        assert [(pair.weight_version, pair.catalog_version) for pair in card.history] == [(2, 2), (2, 1), (1, 1)]
        assert card.history[0].since >= card.history[-1].since > 1_600_000_000
        assert control.status().weights_in_memory == [1, 2]

        assert control.rollback().message == "back from weights 2 and catalog 2"
        assert client.search_items("new chair 1").total == 0
        assert client.recommend([3], n=5, beams=40).items == second.items
        back = control.rollback()
        assert (back.weight_version, back.catalog_version) == (1, 1)
        again = client.recommend([3], n=5, beams=40)
        assert (again.items, again.weight_version) == (first.items, 1)
        scene.wait_until(lambda: control.status().weights_in_memory == [1])
        scene.wait_until(lambda: control.status().catalogs_in_memory == [1])
        with pytest.raises(ServerError, match=r"no version to go back to \(serve.keep_versions=2\)") as caught:
            control.rollback()
        assert (caught.value.status, caught.value.error.code) == (409, "no_version_before")

        with pytest.raises(ServerError, match="weight_version 2 is not newer than 2, the newest so far"):
            control.update_weights(weights(tmp_path, 9), 2)
        assert control.update_weights(weights(tmp_path, 9)).weight_version == 3
        assert control.change_items(add=[new_item(2)]).catalog_version == 3
        assert scene.metric("tawin_swaps_total", kind="rollback") == 2


def test_without_versions_to_keep_there_is_none_to_go_back_to(tmp_path: Path) -> None:
    with serving(roots=[tmp_path]) as scene, scene.controller() as control:
        control.update_weights(weights(tmp_path, 7))
        with pytest.raises(ServerError, match=r"serve\.keep_versions=0, so no version before is kept"):
            control.rollback()
        assert control.status().weight_version == 2


def test_requests_under_way_end_with_what_they_began_with(tmp_path: Path) -> None:
    with serving(roots=[tmp_path], keep_versions=1) as scene, ThreadPoolExecutor(1) as pool:
        control = scene.controller()
        control.update_weights(weights(tmp_path, 7))
        scene.gate.clear()
        running = pool.submit(scene.client().recommend, [3], n=5, beams=40)
        scene.wait_until(lambda: scene.engine.busy == 1 and not scene.engine._queue)
        back = threading.Thread(target=control.rollback)
        back.start()
        scene.gate.set()
        back.join(30)
        assert (running.result(30).weight_version, scene.client().recommend([3]).weight_version) == (2, 1)
        expected = path_scores([3], seed=7)
        assert scores_in(running.result()) == {item: expected[item] for item in scores_in(running.result())}

"""A server follows published versions: weights, tokenizer and catalog change as one, numbers of items stay."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tawin_nemo.api.client import ServerError
from tawin_nemo.config.schema import CatalogConfig, DataConfig, ModelConfig
from tawin_nemo.data.catalog_builder import build_catalog
from tawin_nemo.data.prompts import Template
from tawin_nemo.data.tokenizer import Tokenizer, build_tokenizer
from tawin_nemo.run.published import LATEST, VERSIONS, seal
from tawin_nemo.serve.engine.catalog import NewItem, PromptFormat, ServedCatalog
from tawin_nemo.serve.engine.numbering import known_items, numbered
from tawin_nemo.serve.http.follower import Follower
from tests.serve.scene import IDS, TITLES, GateLM, Scene, first_catalog, path_scores, serving

FIRST, SECOND, THIRD = "2020-01-01", "2020-01-02", "2020-01-03"
#: Of the second version: items 0 and 5 have left, one is new and stands first, one has another title.
NEW, RENAMED = NewItem("N1", "small new chair"), NewItem(IDS[7], "old lamp indeed")
LEFT = (IDS[0], IDS[5])


@cache
def other_tokenizer() -> Tokenizer:
    """A larger vocabulary than the first version's."""
    return build_tokenizer(DataConfig(bpe_vocab_size=330), CatalogConfig(), ModelConfig(), [*TITLES, NEW.title], None)


def items_of(name: str) -> list[NewItem]:
    if name == FIRST:
        return [NewItem(*pair) for pair in zip(IDS, TITLES, strict=True)]
    same = [NewItem(*pair) for pair in zip(IDS, TITLES, strict=True) if pair[0] not in (*LEFT, RENAMED.external_id)]
    return [NEW, *reversed(same), RENAMED]


@dataclass
class Weights:
    """A source of the weights of a seed, for the vocabulary of a version."""

    seed: int
    vocab: int
    gate: threading.Event

    def load_here(self, replica) -> GateLM:
        return GateLM(self.vocab, seed=self.seed, gate=self.gate)

    def load_on_all_ranks(self, leader, version: int) -> None:
        raise AssertionError("one process")


def catalog_of(name: str, current: ServedCatalog, version: int, generation: int = 1) -> ServedCatalog:
    items = items_of(name)
    tokenizer = first_catalog().prompt_format.tokenizer if name == FIRST else other_tokenizer()
    titles, ids = [item.title for item in items], [item.external_id for item in items]
    catalog = build_catalog(titles, ids, titles, tokenizer, Template(), kind="title")
    prompt_format = PromptFormat(tokenizer, Template(), 5, 200, generation, tokenizer.size, 2048)
    return numbered(catalog, titles, prompt_format, known_items(current, items), version=version)


def publish(root: Path, name: str, *, seed: int) -> Path:
    folder = root / VERSIONS / name
    folder.mkdir(parents=True)
    (folder / "seed").write_text(str(seed))
    (folder / "weights").write_text("9" * 1000)
    seal(folder, date=name, against="")
    point(root, name)
    return folder


def point(root: Path, name: str) -> None:
    link = root / ".new"
    link.symlink_to(Path(VERSIONS) / name)
    link.replace(root / LATEST)


def follower_in(scene: Scene, root: Path) -> Follower:
    """Follows ``root`` as the verb does; it has not looked yet."""
    generations = itertools.count(1)

    def put(folder: Path) -> None:
        generation = next(generations)
        vocab = (first_catalog().prompt_format.tokenizer if folder.name == FIRST else other_tokenizer()).size
        scene.server.control.changes.follow(
            lambda current, version: catalog_of(folder.name, current, version, generation),
            Weights(int((folder / "seed").read_text()), vocab, scene.gate),
        )

    made = Follower(root, root / VERSIONS / FIRST, poll_s=0.02, put=put)
    scene.server.follow(made)
    return made


def scores_in(reply) -> dict[int, float]:
    return {found.item: found.score for found in reply.items}


def test_a_request_is_never_answered_with_the_weights_of_another_version(tmp_path: Path) -> None:
    """One request runs and one waits while the version changes: both are answered by the first one, later ones not."""
    publish(tmp_path, FIRST, seed=0)
    with serving() as scene, ThreadPoolExecutor(3) as pool, scene.controller() as control:
        follower = follower_in(scene, tmp_path)
        assert not follower.look()  # nothing new
        scene.gate.clear()
        running = pool.submit(scene.client().recommend, [3], n=5, beams=40, score_space="vocab")
        scene.wait_until(lambda: scene.engine.busy == 1 and not scene.engine._queue)
        waiting = pool.submit(scene.client().recommend, [4], n=5, beams=40, score_space="vocab")
        scene.wait_until(lambda: scene.engine.busy == 2)
        publish(tmp_path, SECOND, seed=7)
        swap = pool.submit(follower.look)
        scene.wait_until(lambda: bool(scene.engine._calls))
        scene.gate.set()
        assert swap.result(30)
        for reply, history in ((running.result(30), [3]), (waiting.result(30), [4])):
            assert (reply.weight_version, reply.catalog_version) == (1, 1)
            expected = path_scores(history, seed=0, space="vocab")
            assert scores_in(reply) == {item: expected[item] for item in scores_in(reply)}
        new, catalog = scene.client().recommend([3], n=64, beams=64, score_space="vocab"), scene.engine.catalog
        assert (new.weight_version, new.catalog_version) == (2, 2)
        assert max(token for token in catalog.trie_paths.flat) < catalog.prompt_format.vocab_size
        expected = path_scores([3], seed=7, catalog=catalog, space="vocab")
        assert scores_in(new) == {item: expected[item] for item in scores_in(new)}
        assert {"N1", IDS[7]} <= {item.external_id for item in new.items}
        status = control.status()
        assert (status.followed_version, status.refused_version) == (SECOND, None)
        scene.wait_until(lambda: control.status().weights_in_memory == [2])


def test_items_keep_their_numbers_over_versions(tmp_path: Path) -> None:
    """Also those that left: they may occur in histories. A new item gets the next number wherever the version lists
    it, and a title changes without a new number."""
    publish(tmp_path, FIRST, seed=0)
    with serving() as scene, scene.client() as client:
        follower = follower_in(scene, tmp_path)
        publish(tmp_path, SECOND, seed=7)
        assert follower.look()
        catalog = scene.engine.catalog
        assert catalog.external_ids == [*IDS, "N1"]
        assert catalog.titles[7] == RENAMED.title
        assert [catalog.external_ids[n] for n in range(len(IDS)) if not catalog.live_I[n]] == list(LEFT)
        reply = client.recommend([0, LEFT[1], "N1"], n=64, beams=64)
        expected = path_scores([0, 5, len(IDS)], seed=7, catalog=catalog)
        assert scores_in(reply) == {item: expected[item] for item in scores_in(reply)}
        assert not {0, 5} & scores_in(reply).keys()
        point(tmp_path, FIRST)
        assert follower.look()  # taken back: the new item is a removed one and still stands in histories
        assert client.recommend(["N1", 0], n=5).catalog_version == 3
        assert scene.engine.catalog.external_ids == [*IDS, "N1"]
        assert scene.engine.catalog.number_J.tolist() == list(range(len(IDS)))
        assert scene.engine.catalog.titles[7] == TITLES[7]


def test_a_version_that_is_broken_is_refused_and_tried_again(tmp_path: Path) -> None:
    publish(tmp_path, FIRST, seed=0)
    with serving() as scene, scene.client() as client, scene.controller() as control:
        follower, before = follower_in(scene, tmp_path), client.recommend([3])
        folder = publish(tmp_path, SECOND, seed=7)
        (folder / "weights").write_text("8" * 1000)
        assert not follower.look()
        assert "weights is damaged or was edited" in str(control.status().refused_version)
        assert control.status().followed_version == FIRST
        assert client.recommend([3]).items == before.items
        (folder / "weights").unlink()
        scene.wait_until(lambda: follower.look() or "cannot be read" in str(follower.refused()))
        (folder / "weights").write_text("9" * 1000)
        scene.wait_until(follower.look)
        assert (control.status().followed_version, control.status().refused_version) == (SECOND, None)
        assert client.recommend([3]).weight_version == 2
        (tmp_path / LATEST).unlink()
        (tmp_path / LATEST).symlink_to(Path(VERSIONS) / "nowhere")
        assert not follower.look()
        assert client.recommend([3]).weight_version == 2


def test_a_version_whose_model_cannot_be_loaded_leaves_weights_and_catalog(tmp_path: Path) -> None:
    publish(tmp_path, FIRST, seed=0)
    with serving() as scene, scene.client() as client:
        follower = follower_in(scene, tmp_path)
        folder = tmp_path / VERSIONS / SECOND
        folder.mkdir()
        (folder / "seed").write_text("no number")
        seal(folder, date=SECOND, against=FIRST)
        point(tmp_path, SECOND)
        assert not follower.look()
        assert "ValueError" in str(follower.refused())
        reply = client.recommend([3])
        assert (reply.weight_version, reply.catalog_version) == (1, 1)


def test_no_request_fails_or_is_mixed_while_versions_come_and_go(tmp_path: Path) -> None:
    publish(tmp_path, FIRST, seed=0)
    publish(tmp_path, SECOND, seed=7)
    point(tmp_path, FIRST)
    with serving() as scene, ThreadPoolExecutor(3) as pool, scene.controller() as control:
        follower, stop = follower_in(scene, tmp_path), threading.Event()

        def ask(number: int) -> list[tuple[int, int, bool]]:
            replies = []
            with scene.client() as client:
                while not stop.is_set():
                    reply = client.recommend([IDS[number], 0], n=64, beams=64)
                    has_new = any(item.external_id == "N1" for item in reply.items)
                    replies.append((reply.weight_version, reply.catalog_version, has_new))
            return replies

        asking = [pool.submit(ask, number) for number in (1, 2, 3)]
        for name in [SECOND, FIRST] * 4:
            point(tmp_path, name)
            assert follower.look(), follower.refused()
        stop.set()
        replies = [reply for future in asking for reply in future.result(60)]
        assert len(replies) > 20
        assert all(weights == catalog for weights, catalog, _ in replies)  # both are counted from 1
        assert all(has_new == (catalog % 2 == 0) for _, catalog, has_new in replies)
        assert scene.metric("tawin_swaps_total", kind="version") == 8
        scene.wait_until(lambda: control.status().weights_in_memory == [9])


def test_the_server_can_go_back_in_memory_and_requests_change_the_followed_catalog(tmp_path: Path) -> None:
    publish(tmp_path, FIRST, seed=0)
    saved = tmp_path / "catalog.json"
    with serving(keep_versions=1, saved=saved) as scene, scene.controller() as control, scene.client() as client:
        follower = follower_in(scene, tmp_path)
        control.change_items(remove=[IDS[3]])
        publish(tmp_path, SECOND, seed=7)
        assert follower.look()
        assert not saved.exists()  # the version replaces what requests changed
        assert client.recommend([1], n=64, beams=64, allow=[3]).items
        control.change_items(remove=["N1"])
        assert client.recommend([1], n=5).weight_version == 2
        control.rollback()
        assert client.recommend([1], allow=["N1"]).items[0].external_id == "N1"
        publish(tmp_path, THIRD, seed=8)
        assert follower.look()
        control.rollback()
        reply = client.recommend([1], n=5)
        expected = path_scores([1], seed=7, catalog=scene.engine.catalog)
        assert scores_in(reply) == {item: expected[item] for item in scores_in(reply)}


def test_a_following_server_takes_weights_from_nowhere_else(tmp_path: Path) -> None:
    (tmp_path / "weights").write_text("3")
    with serving(roots=[tmp_path], follow=str(tmp_path)) as scene, scene.controller() as control:
        with pytest.raises(ServerError, match="follows") as caught:
            control.update_weights(str(tmp_path / "weights"))
        assert (caught.value.status, caught.value.error.code) == (409, "server_follows")


def test_removed_items_without_known_codes_are_skipped_in_histories() -> None:
    """After a restart a version knows the numbers of all items, and the codes of those that its index keeps."""
    titles, ids = ["one", "two"], ["A", "C"]
    codes = [["<a_1>", "<b_1>"], ["<a_1>", "<b_2>"]]
    template = Template(kind="sid")
    tokenizer = build_tokenizer(DataConfig(), CatalogConfig(kind="sid", index="x"), ModelConfig(), titles, codes)
    texts = ["".join(item) for item in codes]
    catalog = build_catalog(titles, ids, texts, tokenizer, template, kind="sid")
    known = [
        NewItem("A", "one"), NewItem("B", "gone", ("<a_1>", "<b_1>")), NewItem("X", "gone", ("<a_9>", "<b_1>")),
        NewItem("Y", "gone"), NewItem("C", "two"),
    ]  # fmt: skip
    served = numbered(catalog, texts, PromptFormat(tokenizer, template, 5, 50), known)
    assert served.external_ids == ["A", "B", "X", "Y", "C"]
    assert served.texts == [texts[0], texts[0], "", "", texts[1]]
    assert served.number_J.tolist() == [0, 4]
    assert served.prompt([0, 2, 3, 4]).flat.tolist() == served.prompt([0, 4]).flat.tolist()
    assert served.prompt([1]).flat.tolist() == served.prompt([0]).flat.tolist()

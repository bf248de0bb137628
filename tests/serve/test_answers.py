"""Replies of the data plane against a brute-force oracle over the whole catalog."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tawin_nemo.api.client import ServerError
from tests.serve.scene import IDS, MODEL, TITLES, Scene, best_scores, draws_of, first_catalog, path_scores, serving

ALL = len(TITLES)


@pytest.fixture(scope="module")
def catalog():
    return first_catalog()


def test_with_beams_for_every_path_the_reply_is_the_exact_ranking(scene: Scene, catalog) -> None:
    scores = path_scores([3, 5])
    with scene.client() as client:
        reply = client.recommend([3, IDS[5]], n=ALL, beams=ALL, return_tokens=True)
    assert [found.score for found in reply.items] == best_scores(scores, range(ALL), catalog, ALL)
    assert len(reply.items) == catalog.trie.num_leaves == ALL - 2  # two titles occur twice
    for found in reply.items:
        assert (found.external_id, found.title) == (IDS[found.item], TITLES[found.item])
        assert found.score == scores[found.item]
        assert found.probability == math.exp(found.score)
        assert found.tokens == catalog.trie_paths[found.item].tolist()
        assert found.logprobs is not None
        assert sum(found.logprobs) == found.score
    assert (reply.weight_version, reply.catalog_version) == (1, 1)


@pytest.mark.parametrize("space", ["trie", "vocab"])
@pytest.mark.parametrize("seed", range(12))
def test_filters_leave_exactly_the_best_of_what_is_allowed(scene: Scene, catalog, space: str, seed: int) -> None:
    """n best of the allowed items by brute force, with a beam for each allowed path."""
    rng = np.random.default_rng(seed)
    history, n = draws_of(rng), int(rng.integers(1, 12))
    deny = rng.choice(ALL, rng.integers(0, 30), replace=False).tolist()
    allow = rng.choice(ALL, rng.integers(1, 30), replace=False).tolist() if seed % 2 else None
    exclude = bool(seed % 3)
    allowed = set(range(ALL) if allow is None else allow) - set(deny) - set(history if exclude else ())
    scores = path_scores(history, space=space)
    expected = best_scores(scores, sorted(allowed), catalog, n)
    least = expected[len(expected) // 2] if expected and seed % 4 == 0 else None
    with scene.client() as client:
        reply = client.recommend(
            history, n=n, beams=ALL, deny=[IDS[item] for item in deny], allow=allow, exclude_history=exclude,
            score_space=space, min_score=least,
        )  # fmt: skip
    found = [(item.item, item.score) for item in reply.items]
    assert {item for item, _ in found} <= allowed
    assert [score for _, score in found] == [score for score in expected if least is None or score >= least]
    assert all(score == scores[item] for item, score in found)


@pytest.mark.parametrize("seed", range(8))
def test_exact_widens_the_search_until_the_best_are_proven(scene: Scene, catalog, seed: int) -> None:
    """From one beam up to the brute-force ranking; a narrow search that claims to be exact is."""
    rng = np.random.default_rng(seed)
    history, n = draws_of(rng), int(rng.integers(1, 6))
    deny = rng.choice(ALL, rng.integers(0, 20), replace=False).tolist()
    expected = best_scores(path_scores(history), sorted(set(range(ALL)) - set(deny)), catalog, n)
    with scene.client() as client:
        narrow = client.recommend(history, n=n, beams=n, deny=deny)
        wide = client.recommend(history, n=n, beams=n, deny=deny, exact=True)
    assert wide.exact is True
    assert [item.score for item in wide.items] == expected
    assert narrow.beams == n <= wide.beams
    assert (wide.beams > n) == (not narrow.exact)
    assert not narrow.exact or [item.score for item in narrow.items] == expected


def test_at_the_servers_limit_a_search_without_proof_says_so() -> None:
    with serving(max_beams=2, beams=2) as limited, limited.client() as client:
        replies = [client.recommend([item], n=2, exact=True) for item in range(6)]
    assert {reply.beams for reply in replies} == {2}
    assert False in {reply.exact for reply in replies}


def test_a_denied_item_gives_its_place_to_the_one_that_is_written_alike(scene: Scene) -> None:
    with scene.client() as client:
        plain = client.recommend([2], n=ALL, beams=ALL)
        denied = client.recommend([2], n=ALL, beams=ALL, deny=[0])
    place = [item.item for item in plain.items].index(0)
    assert denied.items[place].item == 38
    assert [item.score for item in denied.items] == [item.score for item in plain.items]


def test_a_filter_that_allows_nothing_gives_an_empty_list(scene: Scene) -> None:
    with scene.client() as client:
        assert client.recommend([1], allow=[]).items == []
        assert client.recommend([1], allow=[4], deny=[4]).items == []


def test_histories_by_number_id_and_title_and_a_raw_prompt_are_one_and_the_same(scene: Scene, catalog) -> None:
    history = [7, 9, 11, 13, 15, 17]  # the newest five are used
    prompt = catalog.prompt_format.template.prompt([TITLES[item] for item in history[-5:]])
    with scene.client() as client:
        replies = [
            client.recommend(history), client.recommend([IDS[item] for item in history]),
            client.recommend(prompt=prompt), client.recommend([1, 2, 3, *history]),
            client.recommend(history_titles=[TITLES[item] for item in history]),
        ]  # fmt: skip
        empty = client.recommend([])
    assert all(reply.items == replies[0].items for reply in replies)
    assert empty.items != replies[0].items


def test_scores_of_given_items_are_those_of_the_whole_catalog(scene: Scene) -> None:
    items = [5, 0, 38, 20, 5]
    for space in ("trie", "vocab"):
        scores = path_scores([4], space=space)
        with scene.client() as client:
            reply = client.score([IDS[item] for item in items], [4], score_space=space)
        assert [found.item for found in reply.items] == items
        assert [found.logprob for found in reply.items] == [scores[item] for item in items]


def test_completions_by_beams_are_the_recommendations(scene: Scene, catalog) -> None:
    prompts = [catalog.prompt_format.template.prompt([TITLES[item]]) for item in (3, 8)]
    with scene.client() as client:
        reply = client.complete(prompts, model=MODEL, n=3, use_beam_search=True, best_of=6, logprobs=1)
        for place, item in enumerate((3, 8)):
            expected = client.recommend([item], n=3, beams=6).items
            found = reply.choices[3 * place : 3 * place + 3]
            assert [choice.item for choice in found] == [other.item for other in expected]
            assert [choice.text for choice in found] == [other.title for other in expected]
            for choice, other in zip(found, expected, strict=True):
                assert choice.logprobs is not None
                assert sum(choice.logprobs.token_logprobs) == other.score
                assert "".join(choice.logprobs.tokens) == choice.text + "<|endoftext|>"
                assert choice.logprobs.text_offset[0] == 0
    assert [choice.index for choice in reply.choices] == list(range(6))
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_draws_are_a_function_of_the_seed(scene: Scene, catalog) -> None:
    prompt = catalog.prompt_format.template.prompt([TITLES[3]])
    with scene.client() as client:
        texts = [
            [choice.text for choice in client.complete(prompt, model=MODEL, n=12, seed=seed).choices]
            for seed in (1, 1, 2)
        ]
    assert texts[0] == texts[1] != texts[2]
    assert set(texts[0]) <= set(TITLES)


def test_items_are_found_by_parts_of_their_titles(scene: Scene) -> None:
    with scene.client() as client:
        reply, rest = client.search_items("LAMP", limit=3), client.search_items("lamp", limit=100, offset=3)
        everything = client.search_items(limit=100)
    expected = [item for item, title in enumerate(TITLES) if "lamp" in title]
    assert [found.item for found in [*reply.items, *rest.items]] == expected
    assert reply.total == rest.total == len(expected) > 3
    assert everything.total == ALL


def test_models_tells_versions_and_fingerprint(scene: Scene, catalog) -> None:
    with scene.client() as client:
        (card,) = client.models().data
    assert (card.id, card.items, card.catalog) == (MODEL, ALL, catalog.fingerprint)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"history": [1], "n": 65}, "n", "limit of 64"),
        ({"history": [1], "beams": 65}, "beams", "limit of 64"),
        ({"history": [1], "n": 9, "beams": 8}, "beams", "below n=9"),
        ({"history": [ALL]}, "history", "not known"),
        ({"history": [10**30]}, "history", "not known"),
        ({"history": ["B9999"]}, "history", "'B9999' is not known"),
        ({"history": [1], "deny": ["nothing"]}, "deny", "not known"),
        ({"history": [1], "allow": [ALL]}, "allow", "not known"),
        ({"history_titles": ["no such title"]}, "history_titles", "items/search"),
        ({}, "history", "got none"),
        ({"history": [1], "prompt": "x"}, "history", "history, prompt"),
        ({"prompt": "x", "exclude_history": True}, "exclude_history", "needs history"),
        ({"prompt": "x" * 3000}, "prompt", "the model takes 2048"),
        ({"prompt": "x" * 200_000}, "prompt", "200000 characters"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_refused_by_name(scene: Scene, fields, param: str, words: str) -> None:
    with scene.http() as http:
        answer = http.post("/v1/recommendations", json=fields)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert words in error["message"]


def test_unknown_fields_and_models_are_refused(scene: Scene) -> None:
    with scene.http() as http:
        misspelt = http.post("/v1/recommendations", json={"history": [1], "beam": 3})
        other = http.post("/v1/completions", json={"model": "gpt", "prompt": "x"})
    assert (misspelt.status_code, misspelt.json()["error"]["param"]) == (400, "beam")
    assert (other.status_code, other.json()["error"]["code"]) == (404, "model_not_found")
    with scene.client() as client, pytest.raises(ServerError, match="max_tokens") as caught:
        client.complete("x", model=MODEL, max_tokens=1)
    assert caught.value.status == 400


def test_a_long_history_is_cut_to_its_newest_items(scene: Scene) -> None:
    long = [item % ALL for item in range(10_000)]
    with scene.client() as client:
        assert client.recommend(long).items == client.recommend(long[-5:]).items
        with pytest.raises(ServerError, match="history: 10001"):
            client.recommend([*long, 1])

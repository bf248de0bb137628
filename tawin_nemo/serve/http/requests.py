"""From a request of the data plane to a job of the engine. Raises ApiError for what cannot be answered."""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

from tawin_nemo.api.schema import CompletionRequest, Reader, RecommendationRequest, ScoreRequest
from tawin_nemo.config.schema import ServeConfig
from tawin_nemo.rollout.engine import draw_seed
from tawin_nemo.rollout.filters import ItemFilter
from tawin_nemo.serve.engine.catalog import ServedCatalog
from tawin_nemo.serve.engine.jobs import Done, Job
from tawin_nemo.serve.http.errors import ApiError
from tawin_nemo.types import TokenRows
from tawin_nemo.util.errors import DataError


@dataclass(frozen=True)
class Terms:
    """What the server was started with, as far as requests are concerned."""

    settings: ServeConfig
    model_id: str
    beams: int
    space: str
    length_penalty: float
    positions: int  # tokens that the model takes
    vocab: int
    tokenizer: str = ""  # fingerprint
    precision: str = "fp32"
    instance: str = field(default_factory=lambda: uuid.uuid4().hex)  # of this start of the server


@dataclass(frozen=True)
class Asked:
    """A job and the item numbers that its request named."""

    job: Job
    history: list[int]
    items: list[int]


def recommendation(request: RecommendationRequest, catalog: ServedCatalog, terms: Terms) -> Asked:
    """The n best of the allowed items: a search that never enters a part of the trie without any of them."""
    beams = max(request.n, terms.beams) if request.beams is None else request.beams
    _within(request.n, terms.settings.max_beams, "n")
    _within(beams, terms.settings.max_beams, "beams")
    if beams < request.n:
        raise ApiError(400, f"beams={beams} is below n={request.n}; ask for at least as many", param="beams")
    history, prompts = _reader(request, catalog, terms)
    denied = set(_numbers(request.deny, catalog, "deny", terms.settings.max_items))
    if request.exclude_history:
        if request.prompt is not None:
            raise ApiError(400, "exclude_history needs history or history_titles", param="exclude_history")
        denied |= set(history)
    trie, given = catalog.trie, None
    if request.allow is not None:
        allowed = set(_numbers(request.allow, catalog, "allow", terms.settings.max_items)) - denied
        given = ItemFilter.only(trie, _places(allowed, catalog))
    elif denied:
        given = ItemFilter.without(trie, _places(denied, catalog))
    paths = trie.num_leaves if given is None else given.allowed_paths(trie)
    return Asked(_job(request, catalog, prompts, terms, width=max(1, min(beams, paths)), given=given), history, [])


def wider(request: RecommendationRequest, asked: Asked, done: Done, terms: Terms) -> RecommendationRequest | None:
    """The request with twice the beams, when it asks for proof and there is none yet; None at the server's limit."""
    width = asked.job.width
    if not request.exact or terms.length_penalty or done.prompts[0].proven(request.n):
        return None
    if width >= terms.settings.max_beams:
        return None
    return request.model_copy(update={"beams": min(2 * max(width, request.n), terms.settings.max_beams)})


def score(request: ScoreRequest, catalog: ServedCatalog, terms: Terms) -> Asked:
    """A search of the given items only, with a beam for each of their paths: every one of them is found."""
    history, prompts = _reader(request, catalog, terms)
    items = _numbers(request.items, catalog, "items", min(terms.settings.max_items, terms.settings.max_beams))
    removed = [item for item in items if catalog.place_I[item] < 0]
    if removed:
        raise ApiError(400, f"item {removed[0]} was removed from the catalog", param="items")
    given = ItemFilter.only(catalog.trie, _places(items, catalog))
    width = given.allowed_paths(catalog.trie)
    return Asked(_job(request, catalog, prompts, terms, width=width, given=given), history, items)


def completion(request: CompletionRequest, catalog: ServedCatalog, terms: Terms) -> Asked:
    """The n best items of each prompt, or n draws; a draw is a function of seed and prompt number."""
    settings = terms.settings
    if request.model != terms.model_id:
        text = f"model {request.model!r} is not served here; {terms.model_id!r} is"
        raise ApiError(404, text, param="model", code="model_not_found")
    texts = [request.prompt] if isinstance(request.prompt, str) else request.prompt
    if not texts:
        raise ApiError(400, "prompt: give at least one", param="prompt")
    _within(len(texts), settings.max_prompts, "prompt")
    _within(request.n, settings.max_beams, "n")
    longest = catalog.trie.max_depth
    if request.max_tokens is not None and request.max_tokens < longest:
        text = f"answers are whole items of up to {longest} tokens; leave max_tokens out or ask for at least as many"
        raise ApiError(400, text, param="max_tokens")
    if not request.use_beam_search and request.best_of is not None:
        raise ApiError(400, "best_of goes with use_beam_search=true", param="best_of")
    beams = request.best_of or max(request.n, terms.beams)
    _within(beams, settings.max_beams, "best_of")
    if beams < request.n:
        raise ApiError(400, f"best_of={beams} is below n={request.n}", param="best_of")
    prompts = _joined([_tokens(text, catalog, terms) for text in texts])
    deadline = time.monotonic() + settings.deadline_s
    if request.use_beam_search:
        width = min(beams, catalog.trie.num_leaves)
        return Asked(Job(catalog, prompts, deadline, width=width, space=terms.space), [], [])
    seed = secrets.randbits(62) if request.seed is None else request.seed
    job = Job(
        catalog, prompts, deadline, space="trie", draws=request.n, temperature=request.temperature,
        seeds=[draw_seed(seed, 0, row) for row in range(len(texts))],
    )  # fmt: skip
    return Asked(job, [], [])


def _job(
    request: Reader, catalog: ServedCatalog, prompts: TokenRows, terms: Terms, *, width: int,
    given: ItemFilter | None,
) -> Job:  # fmt: skip
    seconds = min(request.timeout_s or terms.settings.deadline_s, terms.settings.deadline_s)
    return Job(
        catalog, prompts, time.monotonic() + seconds, width=width, space=request.score_space or terms.space,
        filter=given, weights=request.weight_version,
    )  # fmt: skip


def _reader(request: Reader, catalog: ServedCatalog, terms: Terms) -> tuple[list[int], TokenRows]:
    """The history's item numbers (none for a raw prompt) and the prompt."""
    ways = [name for name in ("history", "history_titles", "prompt") if getattr(request, name) is not None]
    if len(ways) != 1:
        text = f"give one of history, history_titles and prompt; got {', '.join(ways) or 'none'}"
        raise ApiError(400, text, param="history")
    if request.prompt is not None:
        return [], _tokens(request.prompt, catalog, terms)
    if request.history is not None:
        history = _numbers(request.history, catalog, "history", terms.settings.max_history)
    else:
        history = _titled(request.history_titles or [], catalog, terms.settings.max_history)
    try:
        prompts = catalog.prompt(history)
    except DataError as error:
        raise ApiError(400, str(error), param=ways[0]) from error
    return history, _fitting(prompts, catalog, terms, ways[0])


def _tokens(text: str, catalog: ServedCatalog, terms: Terms) -> TokenRows:
    if len(text) > 64 * terms.positions:  # no token is that long: not worth the tokenizer's time
        raise ApiError(400, f"the prompt has {len(text)} characters, more than the model takes", param="prompt")
    try:
        prompts = catalog.tokens(text)
    except DataError as error:
        raise ApiError(400, str(error), param="prompt") from error
    if not len(prompts.flat):
        raise ApiError(400, "the prompt has no tokens", param="prompt")
    return _fitting(prompts, catalog, terms, "prompt")


def _fitting(prompts: TokenRows, catalog: ServedCatalog, terms: Terms, param: str) -> TokenRows:
    length, longest = len(prompts.flat), catalog.trie.max_depth
    if length + longest > terms.positions:
        text = f"the prompt has {length} tokens, the longest item {longest}, and the model takes {terms.positions}"
        raise ApiError(400, f"{text} together; shorten the prompt", param=param)
    if prompts.flat.max() >= terms.vocab:
        raise ApiError(400, "the prompt has tokens that the model does not know", param=param)
    return prompts


def _numbers(given: Sequence[int | str], catalog: ServedCatalog, param: str, most: int) -> list[int]:
    _within(len(given), most, param)
    numbers = []
    for name in given:
        number = catalog.number_of.get(name) if isinstance(name, str) else name
        if number is None or number >= len(catalog.titles):
            raise ApiError(400, f"{param}: item {str(name)[:80]!r} is not known", param=param, code="unknown_item")
        numbers.append(number)
    return numbers


def _titled(titles: Sequence[str], catalog: ServedCatalog, most: int) -> list[int]:
    _within(len(titles), most, "history_titles")
    unknown = next((title for title in titles if title not in catalog.titled), None)
    if unknown is not None:
        text = f"history_titles: no item is titled {unknown[:80]!r}; GET /v1/items/search finds titles"
        raise ApiError(400, text, param="history_titles", code="unknown_item")
    return [catalog.titled[title] for title in titles]


def _places(numbers: Sequence[int] | set[int], catalog: ServedCatalog) -> list[int]:
    """Items of the trie; removed ones are not in it."""
    places = [int(catalog.place_I[number]) for number in numbers]
    return [place for place in places if place >= 0]


def _joined(rows: Sequence[TokenRows]) -> TokenRows:
    return TokenRows.from_lists([row.flat for row in rows])


def _within(value: int, most: int, param: str) -> None:
    if value > most:
        raise ApiError(400, f"{param}: {value} is above this server's limit of {most}", param=param)

"""Parse data-plane requests into the engine's jobs. Everything here raises ApiError for a request that is invalid.

W: beams of a search; M: items that a filter lists; I: all item numbers of the catalog, removed ones included; J: items
of its trie.
"""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tawin_nemo.api.schema import CompletionRequest, HistoryRequest, RecommendationRequest, RolloutRequest, ScoreRequest
from tawin_nemo.config.schema import ServeConfig
from tawin_nemo.rollout.filters import ItemFilter
from tawin_nemo.rollout.sampling import draw_seed
from tawin_nemo.serve.engine.catalog import ServedCatalog
from tawin_nemo.serve.engine.item_fields import MatchCache, UnknownFilter
from tawin_nemo.serve.engine.jobs import Job, JobResult
from tawin_nemo.serve.http.errors import ApiError
from tawin_nemo.types import TokenRows
from tawin_nemo.util.errors import DataError


@dataclass(frozen=True)
class ServerContext:
    """What is fixed for the life of a server and needed to parse and answer requests."""

    settings: ServeConfig
    model_id: str  # name of the model in the API
    beams: int  # default beam width
    score_space: str  # default: trie | vocab
    length_penalty: float
    max_positions: int  # tokens of the longest sequence that the model accepts
    vocab_size: int
    tokenizer: str = ""  # fingerprint
    precision: str = "fp32"
    filters: MatchCache = field(default_factory=MatchCache)  # of requests, by the fields of items
    instance: str = field(default_factory=lambda: uuid.uuid4().hex)  # new at every start of the server

    def limits(self, catalog: ServedCatalog) -> tuple[int, int]:
        """``max_positions`` and ``vocab_size`` of the model that answers requests of ``catalog``."""
        own = catalog.prompt_format
        return own.max_positions or self.max_positions, own.vocab_size or self.vocab_size


@dataclass(frozen=True)
class ParsedRequest:
    """A job, and the item numbers of the request's history and of its ``items`` field."""

    job: Job
    history: list[int]
    items: list[int]


def parse_recommendation(
    request: RecommendationRequest, catalog: ServedCatalog, context: ServerContext
) -> ParsedRequest:
    """A beam search for the n best allowed items, which enters only subtrees of the trie that hold one of them."""
    beams = max(request.n, context.beams) if request.beams is None else request.beams
    _check_limit(request.n, context.settings.max_beams, "n")
    _check_limit(beams, context.settings.max_beams, "beams")
    if beams < request.n:
        raise ApiError(400, f"beams={beams} is below n={request.n}; set at least as many", param="beams")
    history, prompts = _history_and_prompt(request, catalog, context)
    item_filter, paths = _filter_and_paths(request, history, catalog, context)
    width = max(1, min(beams, paths))
    job = _job(request, catalog, prompts, context, width=width, item_filter=item_filter, history=history)
    return ParsedRequest(job, history, [])


def _filter_and_paths(
    request: RecommendationRequest, history: list[int], catalog: ServedCatalog, context: ServerContext
) -> tuple[ItemFilter | None, int]:
    """The filter of ``allow``, ``deny``, ``exclude_history`` and ``filter`` together, and how many paths it allows."""
    trie, most = catalog.trie, context.settings.max_items
    denied = set(_item_numbers(request.deny, catalog, "deny", most))
    if request.exclude_history:
        if request.prompt is not None:
            raise ApiError(400, "exclude_history needs history or history_titles", param="exclude_history")
        denied |= set(history)
    listed = None if request.allow is None else set(_item_numbers(request.allow, catalog, "allow", most)) - denied
    if not request.filter:
        if listed is None and not denied:
            return None, trie.num_leaves
        chosen = (
            ItemFilter.without(trie, _trie_items(denied, catalog))
            if listed is None
            else ItemFilter.only(trie, _trie_items(listed, catalog))
        )
        return chosen, chosen.allowed_paths(trie)
    _check_limit(sum(len(value) for value in request.filter.values() if isinstance(value, list)), most, "filter")
    try:
        match = context.filters.match(catalog, request.filter)
    except UnknownFilter as error:
        raise ApiError(400, str(error), param="filter", code=error.code) from error
    if listed is None and not denied:
        return match.filter, match.paths
    allowed_J = np.zeros(trie.num_items, dtype=bool)
    allowed_J[match.trie_item_M if listed is None else _trie_items(listed, catalog)] = True
    if listed is not None:
        allowed_J &= np.isin(np.arange(trie.num_items), match.trie_item_M)
    allowed_J[_trie_items(denied, catalog)] = False
    chosen = ItemFilter.only(trie, np.flatnonzero(allowed_J).tolist())
    return chosen, chosen.allowed_paths(trie)


def widened(
    request: RecommendationRequest, parsed: ParsedRequest, result: JobResult, context: ServerContext
) -> RecommendationRequest | None:
    """The request with twice the beams if it wants an exact ranking that is not proven yet; None when it is done.

    None as well at the server's beam limit, and with a length penalty, under which no ranking can be proven.
    """
    width = parsed.job.width
    if not request.exact or context.length_penalty or result.prompts[0].proven(request.n):
        return None
    if width >= context.settings.max_beams:
        return None
    return request.model_copy(update={"beams": min(2 * max(width, request.n), context.settings.max_beams)})


def parse_score(request: ScoreRequest, catalog: ServedCatalog, context: ServerContext) -> ParsedRequest:
    """A beam search among the listed items, with one beam per path, so that it reaches all of them."""
    history, prompts = _history_and_prompt(request, catalog, context)
    most = min(context.settings.max_items, context.settings.max_beams)
    items = _item_numbers(request.items, catalog, "items", most)
    removed = [item for item in items if catalog.trie_item_I[item] < 0]
    if removed:
        raise ApiError(400, f"item {removed[0]} was removed from the catalog", param="items")
    item_filter = ItemFilter.only(catalog.trie, _trie_items(items, catalog))
    width = item_filter.allowed_paths(catalog.trie)
    job = _job(request, catalog, prompts, context, width=width, item_filter=item_filter)
    return ParsedRequest(job, history, items)


def parse_completion(request: CompletionRequest, catalog: ServedCatalog, context: ServerContext) -> ParsedRequest:
    """The n best items of each prompt, or n independent draws; a draw depends on the seed and the prompt's index."""
    settings = context.settings
    if request.model != context.model_id:
        text = f"model {request.model!r} is not served here; {context.model_id!r} is"
        raise ApiError(404, text, param="model", code="model_not_found")
    texts = [request.prompt] if isinstance(request.prompt, str) else request.prompt
    if not texts:
        raise ApiError(400, "prompt: the list is empty; send at least one prompt", param="prompt")
    _check_limit(len(texts), settings.max_prompts, "prompt")
    _check_limit(request.n, settings.max_beams, "n")
    longest = catalog.trie.max_depth
    if request.max_tokens is not None and request.max_tokens < longest:
        text = f"completions are whole items of up to {longest} tokens; omit max_tokens or set at least as many"
        raise ApiError(400, text, param="max_tokens")
    if not request.use_beam_search and request.best_of is not None:
        raise ApiError(400, "best_of needs use_beam_search=true", param="best_of")
    beams = request.best_of or max(request.n, context.beams)
    _check_limit(beams, settings.max_beams, "best_of")
    if beams < request.n:
        raise ApiError(400, f"best_of={beams} is below n={request.n}; set at least as many", param="best_of")
    prompts = TokenRows.from_lists([_prompt_tokens(text, catalog, context).flat for text in texts])
    deadline = time.monotonic() + settings.deadline_s
    if request.use_beam_search:
        width = min(beams, catalog.trie.num_leaves)
        return ParsedRequest(Job(catalog, prompts, deadline, width=width, space=context.score_space), [], [])
    seed = secrets.randbits(62) if request.seed is None else request.seed
    job = Job(
        catalog, prompts, deadline, space="trie", draws=request.n, temperature=request.temperature,
        seeds=[draw_seed(seed, 0, row) for row in range(len(texts))],
    )  # fmt: skip
    return ParsedRequest(job, [], [])


def parse_rollout(request: RolloutRequest, catalog: ServedCatalog, context: ServerContext) -> ParsedRequest:
    """One job for all prompts of a training batch: a beam search, or independent draws with a seed per prompt."""
    settings, trie = context.settings, catalog.trie
    if (request.beams is None) == (request.draws is None):
        raise ApiError(400, "set exactly one of beams and draws", param="beams")
    width, draws = request.beams or 1, request.draws or 0
    if max(width, draws) > settings.max_beams:
        text = f"{max(width, draws)} is above serve.max_beams={settings.max_beams} of this server"
        raise ApiError(400, text, param="draws" if draws else "beams")
    if width > trie.num_leaves:
        raise ApiError(400, f"beams={width}: the catalog has {trie.num_leaves} distinct paths", param="beams")
    if draws and request.score_space == "vocab":
        raise ApiError(400, "draws are made in trie space; omit score_space", param="score_space")
    if draws and len(request.seeds or []) != len(request.prompts):
        text = f"{len(request.prompts)} prompts need as many seeds; got {len(request.seeds or [])}"
        raise ApiError(400, text, param="seeds")
    prompts = TokenRows.from_lists(request.prompts)
    _check_rollout_prompts(prompts, catalog, context)
    seconds = min(request.timeout_s or settings.rollout_deadline_s, settings.rollout_deadline_s)
    job = Job(
        catalog, prompts, time.monotonic() + seconds, width=width, space=request.score_space or context.score_space,
        weights=request.weight_version, draws=draws, temperature=request.temperature,
        seeds=list(request.seeds or []), arrays=True,
    )  # fmt: skip
    return ParsedRequest(job, [], [])


def _check_rollout_prompts(prompts: TokenRows, catalog: ServedCatalog, context: ServerContext) -> None:
    lengths, longest = prompts.lengths, catalog.trie.max_depth
    positions, vocab = context.limits(catalog)
    row = int(lengths.argmax())
    if lengths.min() == 0:
        raise ApiError(400, f"prompt {int(lengths.argmin())} has no tokens", param="prompts")
    if lengths[row] + longest > positions:
        text = f"prompt {row} has {lengths[row]} tokens and the longest item {longest}; the model takes"
        raise ApiError(400, f"{text} {positions} together", param="prompts")
    if prompts.flat.max() >= vocab:
        text = f"token {prompts.flat.max()} is none of the model's {vocab} tokens"
        raise ApiError(400, text, param="prompts")


def _job(
    request: HistoryRequest, catalog: ServedCatalog, prompts: TokenRows, context: ServerContext, *, width: int,
    item_filter: ItemFilter | None, history: Sequence[int] = (),
) -> Job:  # fmt: skip
    seconds = min(request.timeout_s or context.settings.deadline_s, context.settings.deadline_s)
    return Job(
        catalog, prompts, time.monotonic() + seconds, width=width, space=request.score_space or context.score_space,
        filter=item_filter, weights=request.weight_version, history=list(history),
    )  # fmt: skip


def _history_and_prompt(
    request: HistoryRequest, catalog: ServedCatalog, context: ServerContext
) -> tuple[list[int], TokenRows]:
    """The history's item numbers (empty for a raw prompt) and the prompt as one row of tokens."""
    fields = [name for name in ("history", "history_titles", "prompt") if getattr(request, name) is not None]
    if len(fields) != 1:
        text = f"set exactly one of history, history_titles and prompt; got {', '.join(fields) or 'none'}"
        raise ApiError(400, text, param="history")
    if request.prompt is not None:
        return [], _prompt_tokens(request.prompt, catalog, context)
    if request.history is not None:
        history = _item_numbers(request.history, catalog, "history", context.settings.max_history)
    else:
        history = _numbers_of_titles(request.history_titles or [], catalog, context.settings.max_history)
    try:
        prompts = catalog.prompt(history)
    except DataError as error:
        raise ApiError(400, str(error), param=fields[0]) from error
    return history, _check_prompt(prompts, catalog, context, fields[0])


def _prompt_tokens(text: str, catalog: ServedCatalog, context: ServerContext) -> TokenRows:
    if len(text) > 64 * context.limits(catalog)[0]:  # longer than any text of so many tokens: do not tokenize it
        raise ApiError(400, f"the prompt has {len(text)} characters, more than the model takes", param="prompt")
    try:
        prompts = catalog.tokens(text)
    except DataError as error:
        raise ApiError(400, str(error), param="prompt") from error
    if not len(prompts.flat):
        raise ApiError(400, "the prompt has no tokens", param="prompt")
    return _check_prompt(prompts, catalog, context, "prompt")


def _check_prompt(prompts: TokenRows, catalog: ServedCatalog, context: ServerContext, param: str) -> TokenRows:
    length, longest = len(prompts.flat), catalog.trie.max_depth
    most, vocab = context.limits(catalog)
    if length + longest > most:
        text = f"the prompt has {length} tokens and the longest item {longest}; the model takes {most} together"
        raise ApiError(400, f"{text}; shorten the prompt", param=param)
    if prompts.flat.max() >= vocab:
        raise ApiError(400, "the prompt has tokens that the model does not know", param=param)
    return prompts


def _item_numbers(items: Sequence[int | str], catalog: ServedCatalog, param: str, most: int) -> list[int]:
    _check_limit(len(items), most, param)
    numbers = []
    for name in items:
        number = catalog.number_of.get(name) if isinstance(name, str) else name
        if number is None or number >= len(catalog.titles):
            raise ApiError(400, f"{param}: item {str(name)[:80]!r} is not known", param=param, code="unknown_item")
        numbers.append(number)
    return numbers


def _numbers_of_titles(titles: Sequence[str], catalog: ServedCatalog, most: int) -> list[int]:
    _check_limit(len(titles), most, "history_titles")
    unknown = next((title for title in titles if title not in catalog.number_of_title), None)
    if unknown is not None:
        text = f"history_titles: no item has the title {unknown[:80]!r}; GET /v1/items/search finds titles"
        raise ApiError(400, text, param="history_titles", code="unknown_item")
    return [catalog.number_of_title[title] for title in titles]


def _trie_items(numbers: Sequence[int] | set[int], catalog: ServedCatalog) -> list[int]:
    """Indices in the trie of item numbers; removed items are not in the trie and are skipped."""
    indices = [int(catalog.trie_item_I[number]) for number in numbers]
    return [index for index in indices if index >= 0]


def _check_limit(value: int, most: int, param: str) -> None:
    if value > most:
        raise ApiError(400, f"{param}: {value} is above this server's limit of {most}", param=param)

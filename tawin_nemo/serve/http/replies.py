"""Build the data plane's replies from the engine's results.

B: prompts; W: candidates of a prompt; T: tokens of a path; I, J: items of the catalog and of its trie.
"""

from __future__ import annotations

import math
import time

from tawin_nemo.api import schema
from tawin_nemo.api.arrays import RolloutReply
from tawin_nemo.serve.engine.catalog import ServedCatalog
from tawin_nemo.serve.engine.jobs import Hit, Job, JobResult
from tawin_nemo.serve.http.requests import ParsedRequest, ServerContext
from tawin_nemo.types import Candidates


def item_of(hit: Hit, job: Job) -> int:
    """The number of the hit's item; of items with the same token path the first that the job's filter allows."""
    catalog = job.catalog
    index = (
        int(catalog.trie.items(hit.leaf)[0]) if job.filter is None
        else job.filter.first_allowed(catalog.trie, hit.leaf)
    )  # fmt: skip
    return int(catalog.number_J[index])


def recommendation(
    request: schema.RecommendationRequest, parsed: ParsedRequest, result: JobResult, name: str, *, penalised: bool
) -> schema.RecommendationReply:
    """The reply with id ``name``; ``exact`` is unknown (None) when scores are ``penalised`` by length."""
    job, catalog = parsed.job, parsed.job.catalog
    items = []
    for hit in result.prompts[0].hits[: request.n]:
        if request.min_score is not None and hit.score < request.min_score:
            break  # hits are sorted by score
        item = item_of(hit, job)
        items.append(
            schema.Recommended(
                item=item, external_id=catalog.external_ids[item], title=catalog.titles[item], score=hit.score,
                probability=math.exp(math.fsum(hit.logprobs)),
                tokens=hit.tokens if request.return_tokens else None,
                token_texts=_texts(hit, catalog) if request.return_tokens else None,
                logprobs=hit.logprobs if request.return_tokens else None,
            )
        )  # fmt: skip
    return schema.RecommendationReply(
        id=name, items=items, beams=job.width, exact=None if penalised else result.prompts[0].proven(request.n),
        weight_version=result.weight_version, catalog_version=result.catalog_version,
    )  # fmt: skip


def score(parsed: ParsedRequest, result: JobResult, name: str) -> schema.ScoreReply:
    """The summed log-probability of each item in the request's order; None for an item that cannot be generated."""
    catalog = parsed.job.catalog
    logprob_of = {hit.leaf: math.fsum(hit.logprobs) for hit in result.prompts[0].hits}
    leaf_J, trie_item_I = catalog.trie.leaf_I, catalog.trie_item_I
    return schema.ScoreReply(
        id=name, weight_version=result.weight_version, catalog_version=result.catalog_version,
        items=[
            schema.Scored(
                item=item, external_id=catalog.external_ids[item], title=catalog.titles[item],
                logprob=logprob_of.get(int(leaf_J[trie_item_I[item]])),
            )
            for item in parsed.items
        ],
    )  # fmt: skip


def completion(
    request: schema.CompletionRequest, parsed: ParsedRequest, result: JobResult, name: str
) -> schema.CompletionReply:
    """A reply in OpenAI's format: the choices of the first prompt, then those of the second, and so on."""
    job, catalog = parsed.job, parsed.job.catalog
    choices: list[schema.Choice] = []
    completion_tokens = 0
    for prompt in result.prompts:
        for hit in prompt.hits[: request.n]:
            item = item_of(hit, job)
            completion_tokens += len(hit.tokens)
            choices.append(
                schema.Choice(
                    index=len(choices), text=catalog.prompt_format.template.answer(catalog.texts[item]), item=item,
                    external_id=catalog.external_ids[item],
                    logprobs=None if request.logprobs is None else _logprobs(hit, catalog),
                )
            )  # fmt: skip
    prompt_tokens = len(job.prompts.flat)
    return schema.CompletionReply(
        id=name, created=int(time.time()), model=request.model, choices=choices,
        usage=schema.Usage(
            prompt_tokens=prompt_tokens, completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
        ),
        weight_version=result.weight_version, catalog_version=result.catalog_version,
    )  # fmt: skip


def rollout(parsed: ParsedRequest, result: JobResult, context: ServerContext) -> bytes:
    """A safetensors file with the candidates of all prompts in order, token paths padded to the longest one."""
    rows = [prompt.candidates for prompt in result.prompts if prompt.candidates is not None]
    candidates = Candidates.cat(rows)
    longest = int(candidates.lengths_BW.max())
    return RolloutReply(
        candidates.items_BW, candidates.tokens_BWT[..., :longest], candidates.lengths_BW, candidates.scores_BW,
        candidates.logprobs_BWT[..., :longest], context.instance, parsed.job.catalog.fingerprint,
        result.weight_version, result.catalog_version,
    ).encoded()  # fmt: skip


def _logprobs(hit: Hit, catalog: ServedCatalog) -> schema.CompletionLogprobs:
    words = _texts(hit, catalog)
    offsets = [0]
    for word in words[:-1]:
        offsets.append(offsets[-1] + len(word))
    return schema.CompletionLogprobs(tokens=words, token_logprobs=hit.logprobs, text_offset=offsets)


def _texts(hit: Hit, catalog: ServedCatalog) -> list[str]:
    return [catalog.prompt_format.tokenizer.decode([token]) for token in hit.tokens]

"""From what the engine found to replies of the data plane."""

from __future__ import annotations

import math
import time

from tawin_nemo.api import schema
from tawin_nemo.serve.engine.catalog import ServedCatalog
from tawin_nemo.serve.engine.jobs import Done, Hit, Job
from tawin_nemo.serve.http.requests import Asked


def item_of(hit: Hit, job: Job) -> int:
    """Number of the first allowed item on the hit's path."""
    catalog = job.catalog
    place = (
        int(catalog.trie.items(hit.leaf)[0]) if job.filter is None
        else job.filter.first_allowed(catalog.trie, hit.leaf)
    )  # fmt: skip
    return int(catalog.number_J[place])


def recommendation(
    request: schema.RecommendationRequest, asked: Asked, done: Done, name: str, *, penalised: bool
) -> schema.RecommendationReply:
    """``penalised``: with a length penalty nothing is proven."""
    job, catalog = asked.job, asked.job.catalog
    found = []
    for hit in done.prompts[0].hits[: request.n]:
        if request.min_score is not None and hit.score < request.min_score:
            break  # best first
        item = item_of(hit, job)
        found.append(
            schema.Recommended(
                item=item, external_id=catalog.external_ids[item], title=catalog.titles[item], score=hit.score,
                probability=math.exp(math.fsum(hit.logprobs)),
                tokens=hit.tokens if request.return_tokens else None,
                token_texts=_texts(hit, catalog) if request.return_tokens else None,
                logprobs=hit.logprobs if request.return_tokens else None,
            )
        )  # fmt: skip
    return schema.RecommendationReply(
        id=name, items=found, beams=job.width, exact=None if penalised else done.prompts[0].proven(request.n),
        weight_version=done.weight_version, catalog_version=done.catalog_version,
    )  # fmt: skip


def score(asked: Asked, done: Done, name: str) -> schema.ScoreReply:
    catalog = asked.job.catalog
    logprob_of = {hit.leaf: math.fsum(hit.logprobs) for hit in done.prompts[0].hits}
    leaf_J, place_I = catalog.trie.leaf_I, catalog.place_I
    return schema.ScoreReply(
        id=name, weight_version=done.weight_version, catalog_version=done.catalog_version,
        items=[
            schema.Scored(
                item=item, external_id=catalog.external_ids[item], title=catalog.titles[item],
                logprob=logprob_of.get(int(leaf_J[place_I[item]])),
            )
            for item in asked.items
        ],
    )  # fmt: skip


def completion(request: schema.CompletionRequest, asked: Asked, done: Done, name: str) -> schema.CompletionReply:
    """Choices of the first prompt, then of the second, and so on."""
    job, catalog = asked.job, asked.job.catalog
    choices: list[schema.Choice] = []
    answered = 0
    for ran in done.prompts:
        for hit in ran.hits[: request.n]:
            item = item_of(hit, job)
            answered += len(hit.tokens)
            choices.append(
                schema.Choice(
                    index=len(choices), text=catalog.writing.template.answer(catalog.texts[item]), item=item,
                    external_id=catalog.external_ids[item],
                    logprobs=None if request.logprobs is None else _logprobs(hit, catalog),
                )
            )  # fmt: skip
    asked_tokens = len(job.prompts.flat)
    return schema.CompletionReply(
        id=name, created=int(time.time()), model=request.model, choices=choices,
        usage=schema.Usage(
            prompt_tokens=asked_tokens, completion_tokens=answered, total_tokens=asked_tokens + answered
        ),
        weight_version=done.weight_version, catalog_version=done.catalog_version,
    )  # fmt: skip


def _logprobs(hit: Hit, catalog: ServedCatalog) -> schema.CompletionLogprobs:
    words = _texts(hit, catalog)
    offsets = [0]
    for word in words[:-1]:
        offsets.append(offsets[-1] + len(word))
    return schema.CompletionLogprobs(tokens=words, token_logprobs=hit.logprobs, text_offset=offsets)


def _texts(hit: Hit, catalog: ServedCatalog) -> list[str]:
    return [catalog.writing.tokenizer.decode([token]) for token in hit.tokens]

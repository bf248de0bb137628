"""Rollouts for a training job: token prompts in, arrays out, in the same model calls as everybody's requests."""

from __future__ import annotations

import time

import numpy as np

from tawin_nemo.api.arrays import RolloutReply
from tawin_nemo.api.schema import RolloutRequest, RolloutTerms
from tawin_nemo.rollout.scoring import joined
from tawin_nemo.serve.engine.catalog import ServedCatalog
from tawin_nemo.serve.engine.engine import Engine
from tawin_nemo.serve.engine.jobs import Done, Job
from tawin_nemo.serve.http.errors import ApiError
from tawin_nemo.serve.http.requests import Asked, Terms
from tawin_nemo.types import Candidates, TokenRows


def asked(request: RolloutRequest, catalog: ServedCatalog, terms: Terms) -> Asked:
    """A search of all prompts, or their draws. Raises ApiError for what cannot be answered."""
    settings, trie = terms.settings, catalog.trie
    if (request.beams is None) == (request.draws is None):
        raise ApiError(400, "give one of beams and draws", param="beams")
    width, draws = request.beams or 1, request.draws or 0
    if max(width, draws) > settings.max_beams:
        text = f"{max(width, draws)} is above serve.max_beams={settings.max_beams} of this server"
        raise ApiError(400, text, param="draws" if draws else "beams")
    if width > trie.num_leaves:
        raise ApiError(400, f"beams={width}: the catalog has {trie.num_leaves} distinct paths", param="beams")
    if draws and request.score_space == "vocab":
        raise ApiError(400, "draws are made in trie space", param="score_space")
    if draws and len(request.seeds or []) != len(request.prompts):
        raise ApiError(400, f"{len(request.prompts)} prompts need as many seeds", param="seeds")
    prompts = TokenRows.from_lists(request.prompts)
    _check(prompts, catalog, terms)
    seconds = min(request.timeout_s or settings.rollout_deadline_s, settings.rollout_deadline_s)
    job = Job(
        catalog, prompts, time.monotonic() + seconds, width=width, space=request.score_space or terms.space,
        weights=request.weight_version, draws=draws, temperature=request.temperature,
        seeds=list(request.seeds or []), arrays=True,
    )  # fmt: skip
    return Asked(job, [], [])


def _check(prompts: TokenRows, catalog: ServedCatalog, terms: Terms) -> None:
    lengths, longest = prompts.lengths, catalog.trie.max_depth
    row = int(lengths.argmax())
    if lengths.min() == 0:
        raise ApiError(400, f"prompt {int(lengths.argmin())} has no tokens", param="prompts")
    if lengths[row] + longest > terms.positions:
        text = f"prompt {row} has {lengths[row]} tokens, the longest item {longest}, and the model takes"
        raise ApiError(400, f"{text} {terms.positions} together", param="prompts")
    if prompts.flat.max() >= terms.vocab:
        raise ApiError(400, f"token {prompts.flat.max()} is none of the model's {terms.vocab}", param="prompts")


def reply(asked: Asked, done: Done, terms: Terms) -> bytes:
    """All prompts' lists in order, padded to the longest path among them."""
    rows = [ran.found for ran in done.prompts if ran.found is not None]
    found: Candidates = joined(rows, np.arange(len(rows)))
    longest = int(found.lengths_BW.max())
    return RolloutReply(
        found.items_BW, found.tokens_BWT[..., :longest], found.lengths_BW, found.scores_BW,
        found.logprobs_BWT[..., :longest], terms.instance, asked.job.catalog.fingerprint, done.weight_version,
        done.catalog_version,
    ).encoded()  # fmt: skip


def terms_of(engine: Engine, terms: Terms) -> RolloutTerms:
    settings, here = terms.settings, engine.catalog
    return RolloutTerms(
        instance=terms.instance, catalog=here.fingerprint, tokenizer=terms.tokenizer, precision=terms.precision,
        length_penalty=terms.length_penalty, max_beams=settings.max_beams, max_body_kb=settings.max_body_kb,
        token_budget=settings.token_budget, row_budget=settings.row_budget,
        weight_version=engine.weights, catalog_version=here.version,
    )  # fmt: skip

"""Token trees, token by token: what a batch must hold, read out of its definition, and what a model must see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tawin_nemo.data.trees import AnswerIndex
from tawin_nemo.types import TokenBatch

#: Answer, token of it, the tokens before it (prompt included), the token itself, its alternatives (vocab space: None).
Scored = tuple[int, int, tuple[int, ...], int, tuple[int, ...] | None]


@dataclass(frozen=True)
class Place:
    """One place P of a batch by itself: the tokens it sees, in order, and what is asked of it."""

    tokens: list[int]
    targets: list[int]  # one per log-prob that is read from it
    log_probs: list[int]  # their indices into N
    admissible: list[int] | None  # None in vocab space


def dense_places(batch: TokenBatch) -> list[Place]:
    """Every place of a batch as a plain row, from the visibility rule of ``TokenBatch`` alone."""
    tokens, ends, rows = batch.tokens_S.tolist(), batch.end_S.tolist(), batch.row_N.tolist()
    targets, places = batch.target_N.tolist(), []
    for p, place in enumerate(batch.index_P.tolist()):
        log_probs = [n for n, row in enumerate(rows) if row == p]
        admissible = None
        if batch.children is not None:
            admissible = batch.children.token_E[batch.children.position_E == p].tolist()
        seen = [token for token, end, j in zip(tokens, ends, range(len(tokens)), strict=True) if j <= place < end]
        places.append(Place(seen, [targets[n] for n in log_probs], log_probs, admissible))
    return places


def scored_tokens(batch: TokenBatch, index: AnswerIndex) -> list[Scored]:
    """The log-probs of a batch in their order, each with everything it depends on."""
    found: dict[int, Scored] = {}
    for place in dense_places(batch):
        admissible = None if place.admissible is None else tuple(place.admissible)
        for n, target in zip(place.log_probs, place.targets, strict=True):
            found[n] = (int(index.answer_N[n]), int(index.token_N[n]), tuple(place.tokens), target, admissible)
    return [found[n] for n in range(len(batch.target_N))]


def expected_scores(
    prompts: Sequence[list[int]],
    answers: Sequence[list[int]],
    prompt_A: Sequence[int],
    catalog: Sequence[list[int]] | None,
) -> list[Scored]:
    """What ``scored_tokens`` must be: every answer behind its own prompt, token by token."""
    scored: list[Scored] = []
    for a, (answer, b) in enumerate(zip(answers, prompt_A, strict=True)):
        for t, token in enumerate(answer):
            admissible = None
            if catalog is not None:
                admissible = tuple(sorted({path[t] for path in catalog if path[:t] == answer[:t]}))
            if admissible is None or len(admissible) > 1:
                scored.append((a, t, (*prompts[b], *answer[:t]), token, admissible))
    return scored


def expected_prefixes(
    prompts: Sequence[list[int]],
    answers: Sequence[list[int]],
    prompt_A: Sequence[int],
    catalog: Sequence[list[int]] | None,
) -> list[set[tuple[int, ...]]]:
    """Per prompt the beginnings of prompt + answer whose last token must be an input: those before a scored token."""
    needed = [{tuple(prompt[: n + 1]) for n in range(len(prompt))} for prompt in prompts]
    for a, _, before, _, _ in expected_scores(prompts, answers, prompt_A, catalog):
        needed[prompt_A[a]] |= {before[: n + 1] for n in range(len(before))}
    return needed

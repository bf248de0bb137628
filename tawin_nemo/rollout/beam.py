"""Token-synchronous beam search over the catalog trie.

Semantics of transformers 4.57 ``generate(num_beams=W, num_return_sequences=W, do_sample=False,
early_stopping="never", prefix_allowed_tokens_fn=..., renormalize_logits=(score_space == "trie"))`` with
``max_new_tokens`` at least the longest path. At every step all beams of a prompt advance by one token; of all
continuations, ranked by their summed log-probs,

- those that end a path are finished if they are among the best W, and lost otherwise;
- the best W of the others are the beams of the next step;
- the best W finished ones, by ``score / length ** length_penalty``, are the result.

Differences: nothing but items is ever returned (fewer than W exist: NO_ITEM), and equal scores are ordered by
finishing earlier, then by the better parent beam, then by the smaller token.

What saves work and changes no result: beams that cannot overtake the W-th finished one are dropped; in trie space steps
without a choice are skipped, tokens without a choice are run together, and those behind the last choice never
(``beam_state.run_chains``); prompts do not wait for each other, but all that need the model share one call of it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.rollout.assist import Assist, joined
from tawin_nemo.rollout.beam_state import Beams, first_beams, run_chains, waiting, with_first_token
from tawin_nemo.rollout.filters import Filters, ItemFilter, rejoined
from tawin_nemo.rollout.lm import LM
from tawin_nemo.rollout.scoring import (
    SCORE_SPACES,
    append_root_path,
    candidates_from,
    check_prompts,
    check_search,
    empty_candidates,
    probe_logprob,
)
from tawin_nemo.rollout.select import Rules, to_next_choice
from tawin_nemo.rollout.select_dense import step_on_device
from tawin_nemo.types import Candidates, TokenRows
from tawin_nemo.util.errors import ConfigError
from tawin_nemo.util.torch_modes import plain_calls
from tawin_nemo.util.transfers import to_device

#: Tokens that one call of the model is filled up to with chains that are needed only later: about as many as a GPU runs
#: in the time in which it reads the weights. On titles some 5 % more tokens are run, in two thirds of the calls.
RUN_AHEAD = 256


@dataclass(frozen=True)
class FinishedPrompts:
    """Results of B prompts whose search is complete.

    A path's score only falls from token to token. Without a length penalty every path outside of ``candidates`` scores
    therefore at most the larger of ``pruned_score_B`` and the last candidate; candidates at or above ``pruned_score_B``
    are exact.
    """

    ticket_B: np.ndarray  # the caller's numbers of the prompts, as given to ``BeamSearch.admit``
    candidates: Candidates
    pruned_score_B: np.ndarray  # best score of a path that was pruned for lack of beams, -inf if none was

    def __len__(self) -> int:
        return len(self.ticket_B)


def constrained_beam_search(
    lm: LM,
    prompts: TokenRows,
    trie: TokenTrie,
    width: int,
    *,
    score_space: str = "trie",
    length_penalty: float = 0.0,
) -> Candidates:
    """The W best items of each of B prompts; semantics as in the module docstring.

    ``score_space``: log-probs over the admissible tokens (``trie``; forced tokens count exactly 0) or over the whole
    vocabulary (``vocab``). ``length_penalty`` p divides the final score by ``length ** p``, EOS counted. With W >= the
    number of distinct paths the result is the exact ranking of the whole catalog; an item of probability 0 is never
    returned.
    Raises ConfigError (width, score space), DataError (prompt without tokens, too long, or with tokens that the model
    does not have), CatalogError (token beyond the model's vocabulary), TawinError (NaN log-probs).
    """
    search = BeamSearch(lm, trie, width, score_space=score_space, length_penalty=length_penalty)
    search.admit(prompts, np.arange(len(prompts)))
    finished = []
    while search.running:
        finished.append(search.advance())
    return collect_candidates(finished, width, trie)


def collect_candidates(finished: Sequence[FinishedPrompts], width: int, trie: TokenTrie) -> Candidates:
    """The candidates of all finished prompts, in ascending order of their tickets."""
    if not (finished := [part for part in finished if len(part)]):
        return empty_candidates(width, trie.max_depth)
    order = np.concatenate([part.ticket_B for part in finished]).argsort()
    return Candidates.cat([part.candidates for part in finished]).take(torch.from_numpy(order))


class BeamSearch:
    """A beam search that new prompts can join while others run; each prompt's result is what it would be alone.

    ``admit`` prefills prompts, ``advance`` steps all of them until they need the model again or finish. Beams are on
    the host, whatever the model's device. Finished prompts are removed from its cache once they are half of it.
    """

    def __init__(
        self,
        lm: LM,
        trie: TokenTrie,
        width: int,
        *,
        score_space: str = "trie",
        length_penalty: float = 0.0,
        run_ahead: int = RUN_AHEAD,
    ) -> None:
        """Errors as in ``constrained_beam_search``; ``run_ahead`` as in ``beam_state.run_chains``."""
        check_search(lm, trie, width)
        if score_space not in SCORE_SPACES:
            raise ConfigError(f"score_space={score_space!r} is not known; use one of {', '.join(SCORE_SPACES)}")
        self._lm, self._trie, self._run_ahead = lm, trie, run_ahead
        self._width, self._space, self._length_penalty = width, score_space, length_penalty
        self._rules: Rules | None = None
        self._beams: Beams | None = None  # on the host
        self._cache: Any = None
        self._held_P = np.zeros(0, dtype=np.int64)
        self._stepped = True  # no prompt can step before the model has run

    @property
    def running(self) -> int:
        """Number of prompts whose search is not complete."""
        return 0 if self._beams is None else len(self._beams)

    @property
    def cache_tokens(self) -> int:
        """Tokens reserved in the model's cache: for each of its prompts the most that it and its beams can need."""
        return int(self._held_P.sum())

    def max_cache_tokens(self, lengths_B: np.ndarray, widths_B: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """Upper bound [B] of the cache tokens of prompts and their beams (default W each), less what is run ahead."""
        depth = self._trie.decision_depth if self._space == "trie" else self._trie.max_depth - 1
        return lengths_B + np.asarray(self._width if widths_B is None else widths_B, dtype=np.int64) * depth

    @plain_calls
    def admit(
        self,
        prompts: TokenRows,
        tickets: Sequence[int] | np.ndarray,
        *,
        widths: Sequence[int] | None = None,
        filters: Sequence[ItemFilter | None] | None = None,
        assist: Assist | None = None,
    ) -> None:
        """Prefill B prompts and add them to the running search; ``tickets`` are the caller's numbers for them.

        ``widths``: beams of each prompt instead of W; ``filters``: the items that each may return, None = all;
        ``assist``: an auxiliary recommender's part of their scores. Results have as many columns as the widest prompt
        that runs at the same time. Raises ConfigError for a width below 1.
        """
        check_prompts(self._lm, prompts, self._trie)
        if len(prompts) == 0:
            return
        if widths is not None:
            check_search(self._lm, self._trie, min(widths))
        extended, run = append_root_path(prompts, self._trie) if self._space == "trie" else (prompts, 0)
        cache = self._lm.prefill(extended)
        if self._rules is None:
            like = probe_logprob(self._lm, cache, self._trie, self._space)
            rules = Rules.of(self._trie, self._space, self._length_penalty, like.new_empty(0, device="cpu"))
            self._rules = replace(rules, device=like.device)
        mixed = joined(self._rules.assist, len(self._held_P), assist, len(prompts), self._trie, self._rules.norm_T)
        self._rules = self._rules.assisted(mixed)
        alike = set(widths or [self._width]) == {self._width}
        self._rules = replace(self._rules, uniform=alike and (self._beams is None or self._rules.uniform))
        ticket_B = torch.as_tensor(np.asarray(tickets, dtype=np.int64))
        logprobs = self._trie.decision_depth + 1 if self._space == "trie" else self._trie.max_depth
        beams = first_beams(
            ticket_B, torch.arange(len(prompts)), width=max(widths or [self._width]), run=run, logprobs=logprobs,
            like=self._rules.norm_T, width_B=None if widths is None else torch.as_tensor(np.asarray(widths)),
        )  # fmt: skip
        if self._space == "vocab":
            beams = with_first_token(self._lm, cache, self._trie, beams)
        if filters is not None:
            beams = self._filtered(beams, filters)
        if self._beams is None:
            self._cache, self._beams = cache, beams
        else:
            widest = max(self._beams.node_BW.shape[1], beams.node_BW.shape[1])
            old, cached, beams = self._beams.resized(widest), len(self._held_P), beams.resized(widest)
            self._cache, new_row_old, new_row = self._lm.join(self._cache, cache)
            beams = replace(beams, prompt_B=beams.prompt_B + cached)
            self._beams = Beams.cat([_renumbered(old, new_row_old), _renumbered(beams, new_row)])
        self._held_P = np.concatenate([self._held_P, self.max_cache_tokens(prompts.lengths, widths)])
        self._stepped = False

    def _filtered(self, beams: Beams, filters: Sequence[ItemFilter | None]) -> Beams:
        """Attach filters to new prompts, and drop the filters of prompts that have left."""
        assert self._rules is not None
        used_B = beams.filter_B[:0] if self._beams is None else self._beams.filter_B
        kept, used_B, filter_B = rejoined(self._rules.filters, used_B, filters)
        if self._beams is not None:
            self._beams = replace(self._beams, filter_B=used_B)
        if not kept:
            self._rules = replace(self._rules, filters=None)
            return beams
        active = Filters(self._trie, kept, self._rules.device)
        self._rules = replace(self._rules, filters=active)
        asked = to_device([filter_B, beams.node_BW[:, 0]], self._rules.device)
        blocked_B = active.blocked(*asked).cpu()  # no item is allowed: the prompt is finished at once
        node_BW = beams.node_BW.masked_fill(blocked_B[:, None], -1)
        return replace(beams, filter_B=filter_B, node_BW=node_BW)

    def drop(self, tickets: Collection[int]) -> None:
        """Cancel prompts by their tickets and release their cache; unknown tickets are ignored."""
        if self._beams is None:
            return
        gone_B = torch.isin(self._beams.ticket_B, torch.tensor(list(tickets), dtype=torch.long))
        if bool(gone_B.any()):
            self._leave(self._beams, gone_B)
            self._release_cache()

    @plain_calls
    def advance(self) -> FinishedPrompts:
        """Step until every prompt waits for the model, run it once, step again; returns the prompts that finished."""
        done = [] if self._stepped else self._step_all()
        if self._beams is not None:
            self._cache, self._beams = run_chains(
                self._lm, self._cache, self._trie, self._beams, self._space, self._run_ahead
            )
            done += self._step_all(ready=self._space == "trie")
            self._release_cache()
        self._stepped = True
        if not done:
            none = empty_candidates(self._width, self._trie.max_depth)
            return FinishedPrompts(np.zeros(0, dtype=np.int64), none, np.zeros(0))
        tickets = np.concatenate([part.ticket_B.numpy() for part in done])
        candidates = [
            candidates_from(self._trie, part.done_leaf_BW, part.done_score_BW, part.done_logp_BWT) for part in done
        ]
        pruned = np.concatenate([part.pruned_score_B.double().numpy() for part in done])
        return FinishedPrompts(tickets, Candidates.cat(candidates), pruned)

    def _step_all(self, *, ready: bool = False) -> list[Beams]:
        """Step all prompts until each waits for the model; returns those that finished. ``ready``: none waits now."""
        assert self._rules is not None
        done = []
        while self._beams is not None:
            if ready:
                self._beams = step_on_device(self._lm, self._cache, self._trie, self._beams, self._rules)
            if self._space == "trie":
                self._beams = to_next_choice(self._trie, self._beams, self._rules)
            beams, over_B = self._beams, ~self._beams.live_BW.any(dim=1)
            ready_B = ~waiting(self._trie, beams, self._space).any(dim=1)
            over, steps = int(over_B.sum()), int(ready_B.sum())
            ready = not over and steps == len(beams)
            if over:
                done.append(self._leave(beams, over_B))
            elif steps and not ready:
                ready_M = ready_B.nonzero()[:, 0]
                stepped = step_on_device(self._lm, self._cache, self._trie, beams.take(ready_M), self._rules)
                self._beams = beams.put(ready_M, stepped)
            elif not steps:
                break
        return done

    def _leave(self, beams: Beams, over_B: Tensor) -> Beams:
        """Remove finished prompts from the search; their keys stay in the cache until ``_release_cache``."""
        going_M = (~over_B).nonzero()[:, 0]
        if len(going_M):
            self._beams = beams.take(going_M)
        else:
            self._beams, self._cache, self._held_P = None, None, self._held_P[:0]
        return beams.take(over_B.nonzero()[:, 0])

    def _release_cache(self) -> None:
        """Remove finished prompts from the model's cache once they are at least half of it."""
        beams = self._beams
        if beams is None or 2 * len(beams) > len(self._held_P):
            return
        beams = beams.resized(int(beams.width_B.max()))
        self._cache, new_row = self._lm.keep(self._cache, beams.prompt_B)
        self._held_P = self._held_P[beams.prompt_B.numpy()]
        if self._rules is not None and self._rules.assist is not None:
            self._rules = self._rules.assisted(self._rules.assist.take(beams.prompt_B))
        beams = replace(beams, prompt_B=torch.arange(len(beams)))
        self._beams = _renumbered(beams, new_row)


def _renumbered(beams: Beams, new_row_R: Tensor) -> Beams:
    return replace(beams, row_BW=new_row_R.to(beams.row_BW.device)[beams.row_BW])

"""The beam search of ``rollout.beam`` in fixed shapes: one function per round, which a GPU runs as one CUDA graph.

All state lies in static tensors of B prompts and W beams. A round runs up to L tokens of every chain that a beam waits
for, lets the prompts that wait for nothing more take one step, and skips what follows without a choice; no operation in
it depends on what the beams are, so nothing in it makes the host wait. Between rounds the host reads three numbers:
whether a beam is left, the longest chain that is waited for (which chooses L), and whether a log-prob was NaN. The
prompts are run by another such function before the first round.

Results are those of ``constrained_beam_search`` in trie space for each prompt alone. There are no filters and no vocab
space here, prompts do not join a running search, and no chain is run ahead of its need.

Axes: B prompts of the buffers, M <= B prompts of a search, L tokens of a chain.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.catalog.trie_dense import StepLimits
from tawin_nemo.rollout.beam import FinishedPrompts
from tawin_nemo.rollout.beam_state import Beams, first_beams, waiting
from tawin_nemo.rollout.lm import LM, FixedShape, FixedShapeLM, MeteredLM
from tawin_nemo.rollout.scoring import append_root_path, candidates_from, check_search, nan_error
from tawin_nemo.rollout.select import Rules, to_next_choice
from tawin_nemo.rollout.select_dense import step_fixed
from tawin_nemo.types import TokenRows
from tawin_nemo.util.errors import ConfigError
from tawin_nemo.util.graphs import Replayed
from tawin_nemo.util.torch_modes import numbers, plain_calls

#: Tokens of a chain that one round can run; a longer chain takes several rounds.
CHAINS = (0, 1, 2, 4, 8)


def fixed_buffers(lm: LM, trie: TokenTrie, width: int, prompts: int, prompt_slots: int) -> FixedShape | None:
    """Buffers of ``lm`` for searches with W beams for B prompts; None if the model has no such form.

    ``prompt_slots``: tokens of the longest prompt, without the path that all items begin with. At any depth of the trie
    at most W tokens of a prompt are run, because tokens are run only when every beam has decided on that depth.
    """
    if not isinstance(lm, FixedShapeLM):
        return None
    shared = root_tokens(trie)
    return lm.fixed_shape(prompts, prompt_slots + shared, width * (trie.decision_depth - shared))


def root_tokens(trie: TokenTrie) -> int:
    """Number of tokens that all paths begin with; 0 for a single path."""
    return int(trie.arrays.node_depth[0]) if trie.num_inner else 0


@dataclass(frozen=True)
class _Static:
    """The static tensors of a search, and what it does with them."""

    rules: Rules
    first: Beams  # one beam per prompt at the root
    beams: Beams
    real_B: Tensor  # bool: the prompt is one of the search's, not one that fills the buffers up
    edges: Tensor  # [] edges whose log-prob was read
    status: Tensor  # [3] what the host reads: is a beam left, the longest chain that is waited for, was a log-prob NaN


class FixedShapeSearch:
    """Searches for up to B prompts with W beams each, one after the other in the same buffers."""

    def __init__(
        self, lm: LM, buffers: FixedShape, trie: TokenTrie, width: int, prompts: int, *, length_penalty: float = 0.0
    ) -> None:
        """``buffers`` of ``lm`` must be for W beams, B prompts (``fixed_buffers``). Errors as ``check_search``."""
        check_search(lm, trie, width)
        self._lm, self._buffers, self._trie, self._width, self._prompts = lm, buffers, trie, width, prompts
        self._limits, self._length_penalty = StepLimits.of(trie, width), length_penalty
        self._static: _Static | None = None
        device = buffers.state()[0].device
        pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        replayed = partial(Replayed, device=device, addresses=self.addresses, state=self.state, pool=pool)
        self._open = replayed(self.open)
        self._rounds = {tokens: replayed(partial(self.round, tokens)) for tokens in CHAINS}

    @plain_calls
    def search(self, prompts: TokenRows, tickets: np.ndarray) -> FinishedPrompts:
        """The W best items of each of M prompts; ``tickets`` are the caller's numbers for them.

        Raises ValueError for more prompts, or longer ones, than the buffers are for; TawinError for NaN log-probs.
        """
        extended = self.begin(prompts)
        while True:
            live, chain, nan = self._tensors.status.tolist()  # the one time that the host waits for a round
            if nan:
                raise nan_error()
            if not live:
                break
            tokens = next((length for length in CHAINS if length >= chain), CHAINS[-1])
            self._rounds[tokens]()
        if isinstance(self._lm, MeteredLM):
            self._lm.count(extended, self._buffers.tokens_run(), int(self._tensors.edges))
        found = self._tensors.beams.map(lambda tensor: tensor[: len(prompts)].clone())
        candidates = candidates_from(self._trie, found.done_leaf_BW, found.done_score_BW, found.done_logp_BWT)
        return FinishedPrompts(np.asarray(tickets), candidates, found.pruned_score_B.double().cpu().numpy())

    def begin(self, prompts: TokenRows) -> TokenRows:
        """Run M prompts and give each its first beam; returns what was run of each.

        The other prompts of the buffers are of one token and have no beams.
        """
        extended, run = append_root_path(prompts, self._trie)
        spare = TokenRows.from_lists([extended[0][:1]] * (self._prompts - len(prompts)))
        self._buffers.fill(TokenRows.cat([extended, spare]))
        if self._static is None:
            self._static = self._allocated(run)
        self._static.real_B.copy_(torch.arange(self._prompts) < len(prompts))
        for replayed in (self._open, *self._rounds.values()):
            replayed.check_addresses()
        self._open()
        return extended

    def _allocated(self, run: int) -> _Static:
        self._buffers.prefill()  # the first call allocates
        zero = torch.zeros(1, dtype=torch.long, device=self._buffers.state()[0].device)
        like = self._buffers.logprobs(zero, zero, zero + self._trie.max_token, "trie")
        rules = replace(Rules.of(self._trie, "trie", self._length_penalty, like), uniform=True)
        number_B, depth = torch.arange(self._prompts), self._trie.decision_depth
        first = first_beams(number_B, number_B, width=self._width, run=run, logprobs=depth + 1, like=like)
        return _Static(rules, first, first.map(torch.clone), first.node_BW[:, 0] == 0, zero[0], zero.repeat(3))

    @property
    def _tensors(self) -> _Static:
        assert self._static is not None, "begin comes first"
        return self._static

    def state(self) -> list[Tensor]:
        """The static tensors that a round changes."""
        static = self._tensors
        return [*static.beams.tensors().values(), static.edges, static.status, *self._buffers.state()]

    def addresses(self) -> tuple[int, ...]:
        """Where everything lies in memory that a round reads and writes."""
        static = self._tensors
        tensors = [*self.state(), *static.first.tensors().values(), static.real_B]
        return (*self._buffers.addresses(), *(tensor.data_ptr() for tensor in tensors))

    def open(self) -> None:
        """Run the prompts, and place the first beams at their first choice."""
        static = self._tensors
        self._buffers.prefill()
        node_BW = torch.where(static.real_B[:, None], static.first.node_BW, -1)
        beams = to_next_choice(self._trie, replace(static.first, node_BW=node_BW), static.rules, fixed=True)
        static.edges.zero_()
        self._store(beams, torch.zeros_like(static.edges))

    def round(self, tokens: int) -> None:
        """Run up to L = ``tokens`` tokens of each chain, then step the prompts that wait for nothing more."""
        beams, rules, trie = self._tensors.beams, self._tensors.rules, self._trie
        if tokens:
            beams = self._run_chains(beams, tokens)
        steps_B = ~waiting(trie, beams, "trie").any(dim=1) & beams.live_BW.any(dim=1)
        # a prompt without beams may be behind the deepest choice, where no step could read its depth's tables
        safe = replace(beams, depth_B=beams.depth_B.clamp(max=trie.decision_depth))
        stepped, edges_B, nan_B = step_fixed(self._buffers.logprobs, trie, safe, rules, self._limits)
        stepped = to_next_choice(trie, stepped, rules, fixed=True)
        self._tensors.edges.add_(torch.where(steps_B, edges_B, 0).sum())
        self._store(_chosen(steps_B, stepped, beams), (nan_B & steps_B).any())

    def _run_chains(self, beams: Beams, tokens: int) -> Beams:
        """Run what the waiting beams need next, at most L tokens of each chain."""
        trie = self._trie
        left_BW = self._chains(beams)
        length_BW = left_BW.clamp(max=tokens)
        tensors = trie.tensors(beams.node_BW.device)
        item_BW = tensors.node_item[beams.node_BW.clamp(min=0)].long()
        place_BWL = (tensors.pool_offsets[item_BW].long() + beams.run_BW)[..., None] + numbers(tokens, item_BW.device)
        token_BWL = tensors.pool_tokens[place_BWL.clamp(max=len(tensors.pool_tokens) - 1)].long()
        row_BW = self._buffers.extend(beams.row_BW, token_BWL, length_BW)
        return replace(beams, row_BW=row_BW, run_BW=beams.run_BW + length_BW)

    def _chains(self, beams: Beams) -> Tensor:
        """[B, W] tokens that a beam waits for."""
        left_BW = self._trie.depth_of(beams.node_BW) - beams.run_BW
        return left_BW.masked_fill(~waiting(self._trie, beams, "trie"), 0)

    def _store(self, beams: Beams, nan: Tensor) -> None:
        """Write beams into the static ones, and what the host reads about them; ``nan`` [] is not 0 for an error."""
        for static, value in zip(self._tensors.beams.tensors().values(), beams.tensors().values(), strict=True):
            static.copy_(value)
        live = beams.live_BW.any().long()
        self._tensors.status.copy_(torch.stack([live, self._chains(beams).max(), nan.long()]))


def _chosen(new_B: Tensor, new: Beams, old: Beams) -> Beams:
    """The beams of ``new`` where ``new_B`` (bool), else of ``old``."""
    others = old.tensors()

    def choose(name: str, tensor: Tensor) -> Tensor:
        return torch.where(new_B.view(-1, *[1] * (tensor.dim() - 1)), tensor, others[name])

    return replace(new, **{name: choose(name, tensor) for name, tensor in new.tensors().items()})


#: Prompt slots are rounded up to a multiple of this, so that prompts of similar lengths share buffers and graphs.
SLOT_STEP = 64
#: Shapes whose buffers and graphs are kept: those of training and of evaluation.
KEPT_SHAPES = 2


class FixedShapeSearches:
    """Searches in fixed shapes over one catalog, with the buffers and graphs of the latest shapes."""

    def __init__(self, lm: LM, trie: TokenTrie, *, length_penalty: float) -> None:
        self._lm, self._trie, self._length_penalty = lm, trie, length_penalty
        self._kept: OrderedDict[tuple[int, int, int], FixedShapeSearch] = OrderedDict()

    def stream(self, prompts: TokenRows, width: int, token_budget: int) -> Iterator[FinishedPrompts]:
        """The results of N prompts, longest first, a power of two of them at a time; tickets are rows of ``prompts``.

        Buffers hold at most ``token_budget`` tokens of prompts and beams, or one prompt. Errors as
        ``FixedShapeSearch``; ConfigError if the model cannot decode in fixed shapes.
        """
        order_N = np.argsort(-prompts.lengths, kind="stable")
        started = 0
        while started < len(order_N):
            slots = -(-int(prompts.lengths[order_N[started]]) // SLOT_STEP) * SLOT_STEP
            fitting = max(1, token_budget // (slots + width * self._trie.decision_depth))
            size = min(1 << (fitting.bit_length() - 1), 1 << (len(order_N) - started - 1).bit_length())
            rows_M = order_N[started : started + size]
            yield self._of_shape(width, size, slots).search(prompts.take(rows_M), rows_M)
            started += len(rows_M)

    def _of_shape(self, width: int, prompts: int, slots: int) -> FixedShapeSearch:
        key = (width, prompts, slots)
        if key not in self._kept:
            while len(self._kept) >= KEPT_SHAPES:  # before the new buffers are made
                self._kept.popitem(last=False)
            buffers = fixed_buffers(self._lm, self._trie, width, prompts, slots)
            if buffers is None:
                raise ConfigError(
                    "rollout.cuda_graphs=on needs a model without pipeline stages in fp32 or bf16; "
                    "set rollout.cuda_graphs=off"
                )
            self._kept[key] = FixedShapeSearch(
                self._lm, buffers, self._trie, width, prompts, length_penalty=self._length_penalty
            )
        self._kept.move_to_end(key)
        return self._kept[key]

"""The state of a beam search: W beams and the W best finished paths of each of B prompts, as dense tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Beams:
    """Beams of B prompts, best first. All beams of a prompt have ``depth_B`` tokens; an empty one has node -1.

    Every field has one entry per prompt along its first axis.
    """

    ticket_B: Tensor  # the caller's number of the prompt
    prompt_B: Tensor  # the prompt's number in the model's cache, ascending
    depth_B: Tensor  # tokens of the path that every beam has
    node_BW: Tensor  # trie node that the beam is heading to, or stands at
    score_BW: Tensor  # sum of log-probs, -inf where empty
    row_BW: Tensor  # row of the model's cache: the last token of the beam's path that was run
    run_BW: Tensor  # tokens of the path that were run, up to and with that row
    logp_BWT: Tensor  # log-probs of the path's tokens as far as known, 0 beyond; forced tokens in trie space: 0
    done_score_BW: Tensor  # finished paths, length-normalised; -inf where empty
    done_leaf_BW: Tensor  # -1 where empty
    done_logp_BWT: Tensor

    def __len__(self) -> int:
        return len(self.ticket_B)

    @property
    def live_BW(self) -> Tensor:
        return self.node_BW >= 0

    def take(self, rows_M: Tensor) -> Beams:
        """M of the prompts."""
        return self._each(lambda tensor: tensor.index_select(0, rows_M))

    def put(self, rows_M: Tensor, other: Beams) -> Beams:
        """The state with M of its prompts replaced by those of ``other``."""
        return _combined(lambda old, new: old.index_copy(0, rows_M, new), self, other)

    def with_prompts(self, other: Beams) -> Beams:
        """The state with the prompts of ``other`` behind its own."""
        return _combined(lambda old, new: torch.cat([old, new]), self, other)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Beams:
        return Beams(*(change(getattr(self, field.name)) for field in fields(self)))


def _combined(combine: Callable[[Tensor, Tensor], Tensor], first: Beams, second: Beams) -> Beams:
    return Beams(*(combine(getattr(first, field.name), getattr(second, field.name)) for field in fields(first)))


def first_beams(ticket_B: Tensor, prompt_B: Tensor, *, width: int, run: int, logprobs: int, like: Tensor) -> Beams:
    """One beam per prompt, heading to the trie's root (node 0), ``run`` tokens of the way being run with the prompt.

    Log-probs for up to ``logprobs`` tokens; device and floating type are those of ``like``.
    """
    device = like.device
    shape = (len(ticket_B), width)
    node_BW = torch.full(shape, -1, device=device)
    node_BW[:, 0] = 0
    score_BW = torch.full(shape, -torch.inf, dtype=like.dtype, device=device)
    done_score_BW = score_BW.clone()
    score_BW[:, 0] = 0
    prompt_B = prompt_B.to(device)
    logp_BWT = torch.zeros((*shape, logprobs), dtype=like.dtype, device=device)
    return Beams(
        ticket_B=ticket_B.to(device),
        prompt_B=prompt_B,
        depth_B=torch.full_like(prompt_B, run),
        node_BW=node_BW,
        score_BW=score_BW,
        row_BW=prompt_B[:, None].expand(shape).contiguous(),
        run_BW=torch.full_like(node_BW, run),
        logp_BWT=logp_BWT,
        done_score_BW=done_score_BW,
        done_leaf_BW=torch.full_like(node_BW, -1),
        done_logp_BWT=logp_BWT,
    )

"""The state of a beam search: W beams and the W best finished paths of each of B prompts, as dense tensors.

Prompts may have fewer beams than W; the places behind their own stay empty.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Beams:
    """Beams of B prompts, best first. All beams of a prompt have ``depth_B`` tokens; an empty one has node -1.

    Every field has one entry per prompt along its first axis.
    """

    ticket_B: Tensor  # the caller's number of the prompt
    prompt_B: Tensor  # the prompt's number in the model's cache, ascending
    width_B: Tensor  # beams of the prompt, at most W
    filter_B: Tensor  # row of the search's filters, -1 = every item is allowed
    lost_B: Tensor  # best score of a path, finished or not, that the number of beams made the search give up
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

    @property
    def own_BW(self) -> Tensor:
        """bool: a place that belongs to the prompt."""
        return torch.arange(self.node_BW.shape[1], device=self.width_B.device) < self.width_B[:, None]

    def resized(self, width: int) -> Beams:
        """The state with another W, at least that of its widest prompt."""
        extra = width - self.node_BW.shape[1]
        empty = {"node_BW": -1, "done_leaf_BW": -1, "score_BW": -torch.inf, "done_score_BW": -torch.inf}

        def sized(name: str) -> Tensor:
            tensor: Tensor = getattr(self, name)
            if "_BW" not in name:
                return tensor
            behind = (0, 0, 0, extra) if name.endswith("_BWT") else (0, extra)
            return pad(tensor, behind, value=empty.get(name, 0))

        return Beams(*(sized(field.name) for field in fields(self)))

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


def first_beams(
    ticket_B: Tensor,
    prompt_B: Tensor,
    *,
    width: int,
    run: int,
    logprobs: int,
    like: Tensor,
    width_B: Tensor | None = None,
    filter_B: Tensor | None = None,
) -> Beams:
    """One beam per prompt, heading to the trie's root (node 0), ``run`` tokens of the way being run with the prompt.

    Log-probs for up to ``logprobs`` tokens; device and floating type are those of ``like``. All prompts have ``width``
    beams unless ``width_B`` says less, and no filter without ``filter_B``.
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
        width_B=torch.full_like(prompt_B, width) if width_B is None else width_B.to(device),
        filter_B=torch.full_like(prompt_B, -1) if filter_B is None else filter_B.to(device),
        lost_B=torch.full((len(ticket_B),), -torch.inf, dtype=like.dtype, device=device),
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

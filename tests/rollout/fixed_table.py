"""A test double of decoding in static buffers: ``TableLM`` behind ``FixedShape``, which checks what it is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from sequence_lm import TableLM, Tokens
from torch import Tensor

from tawin_nemo.types import TokenRows


@dataclass
class FixedTableLM(TableLM):
    """``TableLM`` that also decodes in fixed shapes; ``buffers`` are all that were asked for."""

    buffers: list[FixedTable] = field(default_factory=list)

    def fixed_shape(self, prompts: int, prompt_slots: int, slots: int) -> FixedTable:
        self.buffers.append(FixedTable(self, prompts, prompt_slots, slots))
        return self.buffers[-1]


class FixedTable:
    """Rows are token sequences; a prompt never runs more tokens than it has slots, and never a token twice."""

    def __init__(self, lm: TableLM, prompts: int, prompt_slots: int, slots: int) -> None:
        self.lm, self.prompts, self.prompt_slots, self.slots = lm, prompts, prompt_slots, slots
        self.sequence: list[Tokens] = []
        self.run: list[set[Tokens]] = []
        self.passes, self.prefilled = 0, False

    def fill(self, prompts: TokenRows) -> None:
        assert len(prompts) == self.prompts
        assert 1 <= prompts.lengths.min() <= prompts.lengths.max() <= self.prompt_slots
        self.sequence = [tuple(prompts[row].tolist()) for row in range(len(prompts))]
        self.run = [set() for _ in range(len(prompts))]
        self.prefilled = False

    def prefill(self) -> None:
        self.prefilled = True

    def extend(self, parent_BW: Tensor, token_BWL: Tensor, length_BW: Tensor) -> Tensor:
        row_BW = parent_BW.clone()
        self.passes += 1
        for prompt, slot in (length_BW > 0).nonzero().tolist():
            sequence = self.sequence[int(parent_BW[prompt, slot])]
            for token in token_BWL[prompt, slot, : int(length_BW[prompt, slot])].tolist():
                sequence = (*sequence, token)
                assert sequence not in self.run[prompt], "a token was run twice"
                self.run[prompt].add(sequence)
                self.sequence.append(sequence)
            row_BW[prompt, slot] = len(self.sequence) - 1
        assert max(len(run) for run in self.run) <= self.slots
        return row_BW

    def logprobs(self, row_N: Tensor, position_E: Tensor, token_E: Tensor, space: str) -> Tensor:
        assert self.prefilled
        assert (position_E.diff() >= 0).all()
        return self.lm.edge_logprobs([self.sequence[row] for row in row_N.tolist()], position_E, token_E, space)

    def state(self) -> list[Tensor]:
        return [torch.zeros(0)]

    def addresses(self) -> tuple[int, ...]:
        return ()

    def tokens_run(self) -> int:
        return sum(len(run) for run in self.run)

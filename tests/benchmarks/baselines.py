"""The other side of the benchmarks: constrained generation and group-relative updates as transformers and TRL do them.

Each is given what helps it: SDPA attention, the key-value cache, logits of the completion only, rows sorted by length
and padded to their own micro-batch, and the fastest of several micro-batch sizes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from tawin_nemo.config.backbones import FlopCount
from tawin_nemo.types import TokenRows


# -- constrained generation ----------------------------------------------------------------------------------------
class PrefixTable:
    """Admissible next tokens behind every beginning of every path, for ``prefix_allowed_tokens_fn``.

    One dictionary look-up per beam and step; a trie that is walked from its root would be slower.
    """

    def __init__(self, paths: TokenRows, eos: int) -> None:
        found: dict[tuple[int, ...], set[int]] = defaultdict(set)
        for path in (paths[row].tolist() for row in range(len(paths))):
            for depth, token in enumerate(path):
                found[tuple(path[:depth])].add(token)
        self._next = {prefix: sorted(tokens) for prefix, tokens in found.items()}
        self._nothing = [eos]  # behind a finished path: transformers wants an answer for every row
        self.prompt_tokens = 0

    def __call__(self, _: int, sequence_T: Tensor) -> list[int]:
        return self._next.get(tuple(sequence_T[self.prompt_tokens :].tolist()), self._nothing)


def generate_beams(
    model: PreTrainedModel, prompts: TokenRows, table: PrefixTable, width: int, *, longest: int, eos: int, per_call: int
) -> list[list[tuple[tuple[int, ...], float]]]:
    """(path, score) of the ``width`` best paths of each prompt, best first, by transformers' own beam search.

    Scores are those of the trie space (``renormalize_logits``). All prompts have the same length.
    """
    found: list[list[tuple[tuple[int, ...], float]]] = []
    table.prompt_tokens = int(prompts.lengths[0])
    for start in range(0, len(prompts), per_call):
        ids_BT, _ = prompts.take(np.arange(start, min(start + per_call, len(prompts)))).padded()
        output = model.generate(
            ids_BT, attention_mask=torch.ones_like(ids_BT), num_beams=width, num_return_sequences=width,
            do_sample=False, prefix_allowed_tokens_fn=table, renormalize_logits=True, length_penalty=0.0,
            max_new_tokens=longest, eos_token_id=eos, pad_token_id=eos, use_cache=True, return_dict_in_generate=True,
            output_scores=True,
        )  # fmt: skip
        scores = output.sequences_scores.tolist()
        for row, sequence in enumerate(output.sequences[:, ids_BT.shape[1] :].tolist()):
            if row % width == 0:
                found.append([])
            end = sequence.index(eos) + 1 if eos in sequence else len(sequence)
            found[-1].append((tuple(sequence[:end]), scores[row]))
    return found


class StringKeyProcessor(LogitsProcessor):
    """A constraint by string keys, as in MiniOneRec, written from a description of it.

    Behaviour kept: log_softmax over the whole vocabulary, a mask of -1e6 that is 0 at admissible tokens, one key made
    of the last tokens of each beam, joined by "-". ``count`` is how many generated tokens make the key.
    """

    def __init__(self, table: dict[str, list[int]], beams: int, count: int) -> None:
        self._table, self._beams, self._count = table, beams, count

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = torch.nn.functional.log_softmax(scores, dim=-1)
        mask = torch.full_like(scores, -1000000.0)
        for prompt, sequences in enumerate(input_ids.view(-1, self._beams, input_ids.shape[-1])):
            for beam, sequence in enumerate(sequences):
                key = "-".join(str(token) for token in sequence[-self._count :].tolist())
                allowed = self._table.get(key, [])
                if allowed:
                    mask[prompt * self._beams + beam, allowed] = 0
        return scores + mask


def best_continuations(
    hidden_RD: Tensor, head_VD: Tensor, ids_RT: Tensor, running_R: Tensor, beams: int,
    processors: Sequence[LogitsProcessor], *, prompts_per_call: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scores and flat (beam, token) indices of the best 2 x ``beams`` continuations of each prompt: what transformers'
    beam search does behind the model's last hidden states, step by step."""
    scores, places = [], []
    for start in range(0, len(hidden_RD), prompts_per_call * beams):
        rows = slice(start, start + prompts_per_call * beams)
        logp_RV = torch.nn.functional.log_softmax((hidden_RD[rows] @ head_VD.T).float(), dim=-1)
        for processor in processors:
            logp_RV = processor(ids_RT[rows], logp_RV)
        total = logp_RV.view(-1, beams, logp_RV.shape[-1]) + running_R[rows].view(-1, beams, 1)
        best = torch.topk(total.flatten(1), k=2 * beams)
        scores.append(best.values)
        places.append(best.indices)
    return torch.cat(scores), torch.cat(places)


# -- group-relative updates ----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class RepeatedBatch:
    """Completions behind their own copy of the prompt, right-padded: ``keep`` tokens of completion per row."""

    ids_RT: Tensor
    mask_RT: Tensor
    keep: int
    completion_RK: Tensor  # 1 at the completion's own tokens
    row_R: Tensor  # which completion of the whole group


def repeated_batches(prompts: TokenRows, answers: TokenRows, prompt_A: np.ndarray, size: int) -> list[RepeatedBatch]:
    """``size`` rows per micro-batch, the longest first."""
    order = np.argsort(-(prompts.lengths[prompt_A] + answers.lengths), kind="stable")
    batches = []
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        joined = [np.concatenate([prompts[prompt_A[row]], answers[row]]) for row in rows]
        ids_RT, length_R = TokenRows.from_lists(joined).padded()
        mask_RT = (torch.arange(ids_RT.shape[1]) < length_R[:, None]).long()
        # All prompts have one length here, so the completions stand in the same columns.
        keep = ids_RT.shape[1] - int(prompts.lengths[0])
        batches.append(RepeatedBatch(ids_RT, mask_RT, keep, mask_RT[:, -keep:], torch.from_numpy(rows)))
    return batches


def repeated_work(prompts: TokenRows, answers: TokenRows, prompt_A: np.ndarray, vocab: int) -> FlopCount:
    """One forward pass over the repeated prompts, padding not counted."""
    length_A = (prompts.lengths[prompt_A] + answers.lengths).astype(float)
    return FlopCount(int(length_A.sum()), float((length_A * (length_A + 1) / 2).sum()), len(answers.flat) * vocab)


def completion_logps(model: PreTrainedModel, batch: RepeatedBatch) -> Tensor:
    """log softmax over the whole vocabulary at every token of the completions, [R, K]."""
    output = model(input_ids=batch.ids_RT, attention_mask=batch.mask_RT, logits_to_keep=batch.keep + 1, use_cache=False)
    logits_RKV = output.logits[:, :-1]
    chosen_RK1 = batch.ids_RT[:, -batch.keep :, None]
    rows = []
    for logits_KV, chosen_K1 in zip(logits_RKV, chosen_RK1, strict=True):  # row by row: a smaller peak
        wide_KV = logits_KV.float()
        rows.append(wide_KV.gather(1, chosen_K1)[:, 0] - wide_KV.logsumexp(1))
    return torch.stack(rows)


def group_loss(
    logp_RK: Tensor,
    ref_RK: Tensor | None,
    advantage_R: Tensor,
    mask_RK: Tensor,
    *,
    groups: int,
    beta: float,
    clip: float,
) -> Tensor:
    """GRPO: clipped ratio (old = the same policy), KL estimate k3, mean over a completion's tokens, then over all."""
    ratio_RK = (logp_RK - logp_RK.detach()).exp()
    advantage_R1 = advantage_R[:, None]
    value_RK = torch.minimum(ratio_RK * advantage_R1, ratio_RK.clamp(1 - clip, 1 + clip) * advantage_R1)
    if ref_RK is not None:
        delta_RK = ref_RK - logp_RK
        value_RK = value_RK - beta * (delta_RK.exp() - delta_RK - 1)
    return -((value_RK * mask_RK).sum(1) / mask_RK.sum(1)).sum() / groups


def reference_logps(model: PreTrainedModel, batches: Sequence[RepeatedBatch]) -> list[Tensor]:
    with torch.no_grad():
        return [completion_logps(model, batch) for batch in batches]


def backward(
    model: PreTrainedModel, batches: Sequence[RepeatedBatch], advantage_A: Tensor,
    reference: Sequence[Tensor] | None = None, *, beta: float = 0.0, clip: float = 0.2,
) -> float:  # fmt: skip
    """Gradients of the group loss into ``.grad`` (set to zero first); returns the loss."""
    model.zero_grad(set_to_none=False)
    total = 0.0
    for place, batch in enumerate(batches):
        loss = group_loss(
            completion_logps(model, batch), None if reference is None else reference[place],
            advantage_A[batch.row_R], batch.completion_RK, groups=len(advantage_A), beta=beta, clip=clip,
        )  # fmt: skip
        loss.backward()
        total += float(loss.detach())
    return total


def allocate_gradients(model: PreTrainedModel) -> None:
    """Gradients that lie in memory before a measurement starts, as they do on the other side."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)


def adamw(model: PreTrainedModel, lr: float) -> Any:
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.999), weight_decay=0.01, fused=True)

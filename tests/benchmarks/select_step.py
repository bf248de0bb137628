"""One step of a constrained beam search behind the model: head, log-probs, constraint, ranking.

    python -m tests.benchmarks.select_step [--full]

64 prompts x 16 beams. Both sides get the same hidden states [1024, 896] and the same LM head [151936, 896]. The
catalogs are random four-code semantic IDs; each of the four positions has its own codes, drawn from the Qwen
vocabulary, as many as give a node behind two codes 16 children (250 codes for a million items, 791 for ten million; one
more row shows ten million items over 250 codes). All beams stand behind two codes, at distinct nodes of a prompt.

Ours is ``rollout.select.step``, which the search calls once per token, with ``MegatronLM.logprobs``. Baselines:
transformers' beam-search epilogue with its PrefixConstrainedLogitsProcessor (with and without LogitNormalization, which
our trie space equals), and a processor with string keys as in MiniOneRec.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.generation.logits_process import LogitNormalization, PrefixConstrainedLogitsProcessor

from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.config.backbones import Backbone
from tawin_nemo.config.schema import ModelConfig
from tawin_nemo.models.megatron.decode.lm import MegatronLM
from tawin_nemo.models.megatron.model.build import build_model
from tawin_nemo.models.megatron.model.head import head_weight_VD
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.rollout import select
from tawin_nemo.rollout.beam_state import Beams, first_beams
from tawin_nemo.types import TokenRows
from tawin_nemo.util.torch_modes import plain_calls
from tests.benchmarks import harness
from tests.benchmarks.baselines import StringKeyProcessor, best_continuations
from tests.benchmarks.setting import qwen_shape, start

LEVELS, CHILDREN = 4, 16
UNFAIR = [
    "the baselines' epilogue runs on the CPU, where passes over the vocabulary are dear; a GPU makes them 10-100 times "
    "cheaper, and our step is then bound by the launches of its small operations",
    "the baselines' tables hold only the prefixes that are looked up here; whole ones are slower and large",
    "the baselines' head covers the whole vocabulary because their processors need it; ours multiplies admissible rows",
    "the ratio is to transformers without LogitNormalization, which ranks in the vocabulary space at less cost than "
    "the trie space that our step ranks in; the row with it computes the same ranking as ours (checked)",
]


def random_codes(items: int, codes: int, vocab: int, seed: int = 0) -> np.ndarray:
    """[items, LEVELS] token ids; the positions' codes are disjoint."""
    rng = np.random.default_rng(seed)
    alphabet = rng.choice(vocab, size=(LEVELS, codes), replace=False)
    return np.stack([level[rng.integers(0, codes, items)] for level in alphabet], axis=1)


@dataclass(frozen=True)
class Case:
    """A catalog and beams that stand behind two codes."""

    trie: TokenTrie
    beams: Beams
    rules: select.Rules
    ids_RT: Tensor  # the two codes of every beam

    @property
    def edges(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.trie.edges_of(self.beams.node_BW.flatten())

    def facts(self) -> dict[str, float]:
        edges = len(self.edges[1])
        return {"items": self.trie.num_items, "edges": edges, "children": round(edges / self.beams.node_BW.numel(), 1)}


def make_case(items: int, codes: int, prompts: int, beams: int, vocab: int) -> Case:
    paths = random_codes(items, codes, vocab)
    offsets = np.arange(items + 1, dtype=np.int64) * LEVELS
    trie = TokenTrie.from_paths(TokenRows(paths.reshape(-1), offsets))
    prefixes = np.unique(paths[:500_000, :2], axis=0)
    prefix_RT = torch.from_numpy(np.random.default_rng(1).permutation(prefixes))
    node_R = torch.zeros(len(prefix_RT), dtype=torch.long)
    for token_R in prefix_RT.T:
        node_R = trie.follow(node_R, token_R.contiguous())
    behind_two_R = ~trie.is_leaf(node_R) & (trie.depth_of(node_R) == 2)
    wanted = prompts * beams
    if int(behind_two_R.sum()) < wanted:
        raise SystemExit(f"only {int(behind_two_R.sum())} of {wanted} beams find a node with a choice; fewer --codes")
    chosen = behind_two_R.nonzero()[:wanted, 0]
    shape = (prompts, beams)
    like = torch.zeros(0)
    tickets = torch.arange(prompts)
    state = first_beams(tickets, tickets, width=beams, run=2, logprobs=LEVELS, like=like)
    scores = -torch.rand(shape, generator=torch.Generator().manual_seed(2)).mul(5).cumsum(1)
    rows = prompts + torch.arange(wanted).view(shape)
    state = replace(state, node_BW=node_R[chosen].view(shape), score_BW=scores, row_BW=rows)
    return Case(trie, state, select.Rules.of(trie, "trie", 0.0, like), prefix_RT[chosen])


def model_with_hidden(shape: Backbone, prompts: int, beams: int) -> tuple[MegatronLM, Any, Tensor]:
    """A model, a cache of it in which every beam has a row, and the hidden states [R, D] of the beams' rows."""
    cfg = ModelConfig()
    runtime.initialize(cfg, seed=0)
    lm = MegatronLM(build_model(shape, cfg, seed=0), shape)
    cache = lm.prefill(TokenRows.from_lists([[1]] * prompts))
    parent_R = torch.arange(prompts).repeat_interleave(beams)
    cache = lm.extend(cache, parent_R, TokenRows.from_lists([[2]] * (prompts * beams)))
    hidden_RD = torch.randn(prompts * (beams + 1), shape.hidden, generator=torch.Generator().manual_seed(3))
    return lm, replace(cache, hidden_RD=hidden_RD), hidden_RD[prompts:]


def baselines(case: Case, hidden_RD: Tensor, head_VD: Tensor, per_call: int) -> dict[str, Any]:
    """Name -> function that returns scores and places of the best continuations."""
    beams = case.beams.node_BW.shape[1]
    position_E, token_E, _ = case.edges
    per_beam = torch.split(token_E, torch.bincount(position_E, minlength=len(hidden_RD)).tolist())
    prefixes, allowed = case.ids_RT.tolist(), [tokens.tolist() for tokens in per_beam]
    table = {tuple(prefix): tokens for prefix, tokens in zip(prefixes, allowed, strict=True)}
    keys = {"-".join(map(str, prefix)): tokens for prefix, tokens in zip(prefixes, allowed, strict=True)}
    constraint = PrefixConstrainedLogitsProcessor(lambda _, ids: table[tuple(ids.tolist())], beams)
    variants = {
        "transformers": [constraint],
        "transformers, renormalised": [constraint, LogitNormalization()],
        "string keys": [StringKeyProcessor(keys, beams, count=2)],
    }

    def side(processors: list[Any]) -> Any:
        running_R = case.beams.score_BW.flatten()
        return lambda: best_continuations(
            hidden_RD, head_VD, case.ids_RT, running_R, beams, processors, prompts_per_call=per_call
        )

    return {name: side(processors) for name, processors in variants.items()}


def agreement(case: Case, ours: Beams, theirs: tuple[Tensor, Tensor], vocab: int) -> dict[str, Any]:
    """Our W running beams against the first W of transformers' 2 W continuations, renormalised."""
    width = case.beams.node_BW.shape[1]
    score_BW, place_BW = theirs[0][:, :width], theirs[1][:, :width]
    parent_BW = case.beams.node_BW.gather(1, place_BW // vocab)
    node_BW = case.trie.follow(parent_BW.flatten(), (place_BW % vocab).flatten()).view(score_BW.shape)
    return {
        "same nodes": round(float((node_BW == ours.node_BW).float().mean()), 6),
        "largest score difference": harness.rounded(float((score_BW - ours.score_BW).abs().max())),
    }


def floor(case: Case, hidden: int, machine: harness.Machine) -> float:
    """Dot products of the admissible tokens; hidden states and distinct head rows read once, 16 bytes per edge."""
    _, token_E, _ = case.edges
    rows = len(torch.unique(token_E)) + case.beams.node_BW.numel()
    return machine.floor_seconds(
        flops=2.0 * hidden * len(token_E), moved_bytes=4.0 * hidden * rows + 16.0 * len(token_E)
    )


def fill(
    report: harness.Report, cases: dict[str, Case], floors: dict[str, float],
    sizes: dict[str, harness.Timed], timed: dict[str, harness.Timed],
) -> None:  # fmt: skip
    """Rows and targets; ``sizes`` are our step over all catalogs, ``timed`` all sides over the first one."""
    base, first = timed["transformers"].median, timed[next(iter(cases))].median
    for side, result in (sizes | timed).items():
        row = {"side": side, **result.facts(), "ratio": harness.rounded(base / result.median)}
        if side in cases:
            row |= cases[side].facts() | {"floor_ratio": harness.rounded(result.median / floors[side])}
        report.rows.append(row)
    report.targets["transformers / ours"] = harness.Target.at_least(1000, base / first)
    report.targets["string keys / ours"] = harness.Target.at_least(1000, timed["string keys"].median / first)
    if len(sizes) > 1:
        small, large = list(sizes.values())[:2]
        report.targets["largest / smallest catalog"] = harness.Target.at_most(1.3, large.median / small.median)


def main() -> None:
    options = harness.parser(__doc__)
    options.add_argument("--prompts", type=int, default=64)
    options.add_argument("--beams", type=int, default=16)
    options.add_argument("--items", type=int, nargs="+", default=[1_000_000, 10_000_000], help="catalog sizes")
    options.add_argument("--vocab", type=int, default=151_936)
    options.add_argument("--hidden", type=int, default=896)
    options.add_argument("--per-call", type=int, nargs="+", default=[64, 16, 4, 1], help="baselines: prompts at once")
    given = options.parse_args()
    start(given.threads)
    machine = harness.this_machine()
    shape = replace(qwen_shape(1), vocab=given.vocab, hidden=given.hidden)
    lm, cache, hidden_RD = model_with_hidden(shape, given.prompts, given.beams)
    head_VD = head_weight_VD(lm.model).detach()

    plans = [(items, max(2, round((items / CHILDREN) ** 0.5))) for items in given.items]
    if len(given.items) > 1:
        plans.append((given.items[-1], plans[0][1]))
    cases = {
        f"ours, {items:,} items, {codes} codes": make_case(items, codes, given.prompts, given.beams, given.vocab)
        for items, codes in plans
    }

    @plain_calls
    def ours(case: Case) -> Beams:
        return select.step(lm, cache, case.trie, case.beams, case.rules)

    with torch.no_grad():
        sizes = harness.in_turn({name: partial(ours, case) for name, case in cases.items()}, repeats=3 * given.repeats)
        name, case = next(iter(cases.items()))
        searched = {
            str(per_call): baselines(case, hidden_RD, head_VD, per_call)["transformers"]
            for per_call in given.per_call
            if per_call <= given.prompts
        }
        best, seconds = harness.best_of(searched)
        others = baselines(case, hidden_RD, head_VD, int(best))
        timed = harness.in_turn({name: partial(ours, case), **others}, repeats=given.repeats)
        checks = agreement(case, ours(case), others["transformers, renormalised"](), given.vocab)

    report = harness.Report(
        "select_step", machine,
        shapes={"prompts": given.prompts, "beams": given.beams, "hidden": given.hidden, "vocab": given.vocab,
                "levels": LEVELS, "beams_stand_behind_codes": 2},
        settings={"dtype": "fp32", "baseline_prompts_per_call": {"best": int(best), "seconds": seconds}},
        unfair=UNFAIR, checks=checks,
    )  # fmt: skip
    floors = {side: floor(case, given.hidden, machine) for side, case in cases.items()}
    fill(report, cases, floors, sizes, timed)
    report.finish(
        ours=timed[name].median, baseline=timed["transformers"].median, floor=floors[name], json_file=given.json
    )


if __name__ == "__main__":
    main()

"""What every rank of a group of layouts runs: RL with a training and a rollout layout, for many pairs of them."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.models.gpt import GPTModel
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from tawin_nemo.catalog.items import Catalog
from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.config.backbones import Backbone
from tawin_nemo.config.schema import ModelConfig, Recipe, ReferenceConfig, RlConfig, RolloutConfig, TrainerConfig
from tawin_nemo.data.batches import balanced_shard
from tawin_nemo.models.megatron.hf.io import save_hf
from tawin_nemo.models.megatron.model import reshard
from tawin_nemo.models.megatron.model.build import build_model, full_shape, sharded_axis
from tawin_nemo.models.megatron.optim.trainable import Trainable
from tawin_nemo.models.megatron.parallel import disaggregated, runtime
from tawin_nemo.models.megatron.parallel.channel import Stop
from tawin_nemo.models.megatron.parallel.disaggregated import RolloutRanks
from tawin_nemo.placement.remote_engine import RemoteEngine
from tawin_nemo.placement.rollout_ranks import serve
from tawin_nemo.placement.weight_sync import build_engine, check_equal, sync_weights
from tawin_nemo.rollout.engine import Engine, RolloutEngine
from tawin_nemo.run.timers import Timers
from tawin_nemo.train.actor import Actor
from tawin_nemo.train.reference import build_reference
from tawin_nemo.train.rewards import RankingReward
from tawin_nemo.train.rl import RlComponents, rl_step
from tawin_nemo.train.rollouts import PromptStream, Rollouts
from tawin_nemo.types import DataParallel, PromptBatch, Rollout, TokenRows
from tawin_nemo.util.errors import TawinError
from tawin_nemo.util.files import atomic_path
from tests.distributed.launch import LIMIT, free_port

#: 51 vocabulary rows: TP 2 needs one of padding, on both sides of a change between TP 1 and TP 2. 3 layers: PP 2 holds
#: 2 + 1 of them.
SHAPE = Backbone("qwen2", hidden=32, layers=3, heads=4, kv_heads=2, ffn=48, vocab=51, rope_theta=1e4, max_position=256)
STEPS, PROMPTS, LR = 3, 7, 1e-3
ALPHABET, EOS = (3, 11, 24, 25, 27, 43, 50), 1
RL = RlConfig(group_size=4, beta=0.01, ensure_target="replace_last", prompts_per_step=PROMPTS)
#: A rollout searched ahead must know all its log-probs, so no target is put in; larger groups find some.
RL_AHEAD = RlConfig(group_size=12, beta=0.01, prompts_per_step=PROMPTS)


@dataclass(frozen=True)
class Pair:
    """A layout of training and one of rollouts (TP, PP; 0 = as in training), on ``searching`` ranks apart unless 0."""

    tp: int = 1
    pp: int = 1
    sequence_parallel: bool = False
    rollout_tp: int = 0
    rollout_pp: int = 0
    tied: bool = True
    searching: int = 0
    ahead: int = 0

    @property
    def name(self) -> str:
        training = f"tp{self.tp}-pp{self.pp}{'-sp' if self.sequence_parallel else ''}"
        apart = f" on {self.searching} ranks apart, ahead {self.ahead}" if self.searching else ""
        return f"{training}, rollout tp{self.rollout_tp}-pp{self.rollout_pp}{apart}{'' if self.tied else ', untied'}"

    @property
    def apart(self) -> RolloutRanks | None:
        return RolloutRanks(self.searching, *self.recipe.rollout_layout) if self.searching else None

    @property
    def recipe(self) -> Recipe:
        return Recipe(
            seed=5,
            model=ModelConfig(
                tensor_model_parallel_size=self.tp,
                pipeline_model_parallel_size=self.pp,
                sequence_parallel=self.sequence_parallel,
            ),
            rollout=RolloutConfig(
                tensor_model_parallel_size=self.rollout_tp,
                pipeline_model_parallel_size=self.rollout_pp,
                placement="separate" if self.searching else "colocated",
                devices=self.searching,
                ahead=self.ahead,
            ),
            rl=RL_AHEAD if self.ahead else RL,
            reference=ReferenceConfig(mode="swap"),
        )

    @property
    def shape(self) -> Backbone:
        return replace(SHAPE, tied=self.tied)


def small_catalog() -> Catalog:
    """30 items of three or four tokens and EOS."""
    draw = np.random.default_rng(5)
    paths = {tuple(draw.choice(ALPHABET, size=draw.integers(3, 5)).tolist()) for _ in range(60)}
    rows = TokenRows.from_lists([[*path, EOS] for path in sorted(paths)[::2]][:30])
    names = [f"item {i}" for i in range(len(rows))]
    return Catalog(names, names, "title", rows, TokenTrie.from_paths(rows))


def prompts(step: int, dp: DataParallel) -> PromptBatch:
    """This replica's share of the step's PROMPTS prompts, which are 4 to 6 tokens long."""
    draw = np.random.default_rng([6, step])
    rows = TokenRows.from_lists([draw.integers(1, SHAPE.vocab, size=4 + r % 3) for r in range(PROMPTS)])
    whole = PromptBatch(torch.arange(PROMPTS), rows, torch.from_numpy(draw.integers(0, 30, size=PROMPTS)))
    return whole.take(torch.from_numpy(balanced_shard(np.arange(PROMPTS), rows.lengths, dp)))


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation inside returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def check_sync(engine: Engine, pair: Pair, actor: Actor) -> None:
    """The weights are shared, or equal tensor by tensor; damage is found; nothing larger than a shard is made."""
    if isinstance(engine, RemoteEngine):
        check_remote(engine, pair, actor.trainable.model)
        return
    assert isinstance(engine, RolloutEngine)
    searching, training = engine.lm.lm.model, actor.trainable.model
    if pair.recipe.rollout_layout == (pair.tp, pair.pp):
        assert searching is training
        assert engine.dp is None
        return
    assert not {p.data_ptr() for p in searching.parameters()} & {p.data_ptr() for p in training.parameters()}
    check_equal(engine)
    victim = next(p for name, p in searching.named_parameters() if name.endswith("linear_fc2.weight"))
    last = runtime.world_rank() == runtime.world_size() - 1
    if last:
        victim.data[-1, -1] += 1.0
    with pytest.raises(TawinError, match=r"differ in 1 tensors: decoder\.layers\.\d+\.mlp\.linear_fc2\.weight"):
        check_equal(engine)
    with Largest() as seen:
        engine.receive_weights()
    check_equal(engine)
    for model in (searching, training):
        for parameter in model.parameters():
            if sharded_axis(parameter) is not None and model.pg_collection.tp.size() == 2:
                assert np.prod(full_shape(model, parameter)) == 2 * parameter.numel()
    if pair.tp == 2 and engine.lm.lm.model.pg_collection.tp.size() == 2:
        whole = SHAPE.vocab // 2 * SHAPE.hidden * 2
        assert 0 < seen.elements < whole, (seen.elements, whole)


def check_remote(engine: RemoteEngine, pair: Pair, training: GPTModel) -> None:
    """The weights on the rollout ranks are equal; a change that was not sent is found."""
    ranks = runtime.world_size()
    assert [entry["rank"] for entry in engine.rank_layouts] == list(range(ranks, ranks + pair.searching))
    assert {(entry["tp_size"], entry["pp_size"]) for entry in engine.rank_layouts} == {pair.recipe.rollout_layout}
    check_equal(engine)
    bias = next(p for name, p in training.named_parameters() if name.endswith("linear_qkv.bias"))
    before = bias.data.clone()
    if runtime.world_rank() == ranks - 1:
        bias.data[-1] += 1.0
    with pytest.raises(
        TawinError, match=r"differ in 1 tensors: decoder\.layers\.\d+\.self_attention\.linear_qkv\.bias"
    ):
        check_equal(engine)
    bias.data.copy_(before)
    check_equal(engine)


def facts(rollout: Rollout, dp: DataParallel) -> dict[str, list[Any]]:
    """Items and scores of all replicas' groups in the order of the prompts."""
    mine = [
        (int(row), items.tolist(), scores.tolist())
        for row, items, scores in zip(rollout.prompts.row_B, rollout.items_BG, rollout.scores_BG, strict=True)
    ]
    rows = sorted(row for part in dp.gather(mine) for row in part)
    assert [row for row, _, _ in rows] == list(range(PROMPTS))
    return {"items": [items for _, items, _ in rows], "scores": [scores for _, _, scores in rows]}


def train(pair: Pair, folder: Path) -> dict[str, Any]:
    """Three steps of RL; what was logged, rolled out and learned, the weights as ``folder``/model.safetensors.

    A rollout rank serves and returns nothing."""
    recipe, shape, catalog = pair.recipe, pair.shape, small_catalog()
    runtime.initialize(recipe.model, seed=1, rollout_ranks=pair.apart)
    if disaggregated.is_rollout_rank():
        serve()
        return {}
    build = partial(build_model, shape, recipe.model, seed=3, rollout_tp=recipe.rollout_layout[0])
    dp, model = runtime.data_parallel(), build()
    engine = build_engine(recipe, model, shape, catalog)
    actor = Actor(Trainable(model, shape, TrainerConfig(), lr=LR), catalog, recipe.rl, dp)
    reference = build_reference(recipe.reference.mode, recipe.rl.beta, model, build)
    seen: list[Rollout] = []

    def reward(rollout: Rollout) -> torch.Tensor:
        seen.append(rollout)
        return RankingReward()(rollout)

    stream, timers = PromptStream(lambda n: prompts(n, dp)), Timers(1e12, dp)
    ahead_until = STEPS if pair.ahead and pair.searching else 0
    rollouts = Rollouts(recipe.rl, engine, catalog, dp, stream, timers, ahead_until=ahead_until)
    components = RlComponents(recipe.rl, rollouts, actor, reference, reward, timers)
    sync_weights(engine, version=0)
    check_sync(engine, pair, actor)
    stats = [rl_step(components, step=step, lr=LR) for step in range(STEPS)]
    check_equal(engine)
    assert engine.weight_version == STEPS
    drawing = Rollouts(replace(recipe.rl, negatives="dynamic"), engine, catalog, dp, stream, timers)
    drawn = drawing.generate(prompts(9, dp), STEPS)
    listed = engine.search(prompts(9, DataParallel()).prompts, 5)  # as evaluation does
    save_hf(model, shape, folder)
    rows = timers.report()["rows/generate"]
    if disaggregated.is_disaggregated():
        disaggregated.rollout_channel().broadcast(Stop())
    return {
        "stats": stats,
        "rollouts": [
            *(facts(rollout, dp) for rollout in [*seen, drawn]),
            {"items": listed.items_BW.tolist(), "scores": listed.scores_BW.tolist()},
        ],
        "searched": rows,
    }


def meet_anew(agreed: Path) -> None:
    """Another port for the next process group, which rank 0 names in a file.

    Taken only now: one reserved long before may meanwhile be the near end of some connection.
    """
    if os.environ["RANK"] == "0":
        with atomic_path(agreed) as path:
            path.write_text(str(free_port()), encoding="utf-8")
    give_up = time.monotonic() + LIMIT
    while not agreed.exists():
        assert time.monotonic() < give_up, f"rank 0 has not named a port in {LIMIT} s"
        time.sleep(0.01)
    os.environ["MASTER_PORT"] = agreed.read_text(encoding="utf-8")


def main() -> None:
    root = Path(sys.argv[2])
    reshard._AT_ONCE = 2**13  # the small model would travel at once; its largest matrix alone is more
    for number, options in enumerate(json.loads(sys.argv[1])):
        if sys.argv[3:] == ["anew"] and number:  # processes that are divided anew must meet anew
            runtime.shutdown()
            meet_anew(root / f"port_{number}")
        result = train(Pair(**options), root / str(number))
        if not disaggregated.is_rollout_rank():
            if runtime.world_rank() == 0:
                (root / f"{number}.json").write_text(json.dumps(result))
            runtime.barrier()
    runtime.shutdown()


def options_of(pairs: list[Pair]) -> str:
    return json.dumps([asdict(pair) for pair in pairs])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


if __name__ == "__main__":
    main()

"""RL of a small megatron model whose rollouts come from servers: the servers, in a thread or as a process of their own,
and the loop. Run as a program it is one server (``learning.py FOLDER TP``), on one rank or two."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tawin_nemo.catalog.items import Catalog
from tawin_nemo.commands.serve import ProcessGroupRanks, from_tensors
from tawin_nemo.config.schema import (
    ModelConfig,
    Recipe,
    ReferenceConfig,
    RlConfig,
    RolloutConfig,
    ServeConfig,
    TrainerConfig,
)
from tawin_nemo.models.megatron.decode.lm import MegatronLM
from tawin_nemo.models.megatron.model.build import build_model
from tawin_nemo.models.megatron.optim.trainable import Trainable
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.placement.weight_sync import build_engine, sync_weights
from tawin_nemo.rollout.engine import Engine as Searches
from tawin_nemo.run.timers import Timers
from tawin_nemo.serve.engine.catalog import ServedCatalog
from tawin_nemo.serve.engine.engine import Engine
from tawin_nemo.serve.engine.jobs import Limits
from tawin_nemo.serve.engine.ranks import Leader, SingleProcess, follow
from tawin_nemo.serve.engine.replica import Replica
from tawin_nemo.serve.engine.saved_changes import SavedChanges
from tawin_nemo.serve.engine.telemetry import Metrics
from tawin_nemo.serve.http.requests import ServerContext
from tawin_nemo.serve.http.server import Secrets, Server
from tawin_nemo.train.actor import Actor
from tawin_nemo.train.reference import build_reference
from tawin_nemo.train.rewards import RankingReward
from tawin_nemo.train.rl import RlComponents, rl_step
from tawin_nemo.train.rollouts import PromptStream, Rollouts
from tawin_nemo.types import DataParallel, Rollout
from tawin_nemo.util.files import write_json
from tests.distributed.rollout_worker import LR, PROMPTS, SHAPE, STEPS, prompts, small_catalog
from tests.serve.scene import KEY, TOKEN, prompt_format

RL = RlConfig(group_size=4, beta=0.01, ensure_target="replace_last", prompts_per_step=PROMPTS)


def recipe(
    servers: list[Path] | None = None, folder: Path | None = None, *, options: Mapping[str, Any] | None = None,
    **rl: Any,
) -> Recipe:  # fmt: skip
    """In this process, or on servers whose keys lie in ``folder``; ``options``: further keys of section rollout."""
    rollout = RolloutConfig()
    if servers and folder:
        rollout = RolloutConfig(
            placement="server", servers=[str(file) for file in servers], api_key_file=str(folder / "keys"),
            control_token_file=str(folder / "token"), server_timeout_s=60.0,
            **{"server_wait_s": 1.0, **(options or {})},
        )  # fmt: skip
        (folder / "keys").write_text(KEY)
        (folder / "token").write_text(TOKEN)
    return Recipe(seed=5, rollout=rollout, rl=replace(RL, **rl), reference=ReferenceConfig(mode="swap"))


def made(tp: int, catalog: Catalog, settings: ServeConfig) -> Engine | None:
    """The engine of a server with weights of its own; None on a rank that follows, when it is over."""
    cfg = ModelConfig(tensor_model_parallel_size=tp)
    runtime.initialize(cfg, seed=1)
    replica = Replica(lambda path: MegatronLM(build_model(SHAPE, cfg, seed=77), SHAPE),
                      from_tensors=from_tensors(SHAPE, cfg, (tp, 1)))  # fmt: skip
    replica.models[1], replica.tries[1] = replica.load(""), catalog.trie
    ranks = ProcessGroupRanks() if tp > 1 else SingleProcess()
    if runtime.world_rank() > 0:
        follow(replica, ranks)
        return None
    served = ServedCatalog.of(catalog, catalog.titles, prompt_format())
    served.warm()
    return Engine(Leader(replica, ranks), served, limits=Limits.of(settings), metrics=Metrics(), weights=1)


def server_of(engine: Engine, settings: ServeConfig, folder: Path) -> tuple[Server, Path]:
    context = ServerContext(settings, "small", 4, "trie", 0.0, SHAPE.max_position, SHAPE.vocab)
    server = Server(engine, context, Secrets([KEY], TOKEN), roots=[], saved=SavedChanges(None, engine.catalog))
    data, control = server.ports
    file = folder / "address.json"
    write_json(file, {"data": f"http://127.0.0.1:{data}", "control": f"http://127.0.0.1:{control}"})
    return server, file


@dataclass
class Running:
    engine: Engine
    server: Server
    file: Path


@contextmanager
def serving(folder: Path, catalog: Catalog | None = None, **changes: Any) -> Iterator[Running]:
    """A server in a thread of this process; it may end inside."""
    settings = replace(ServeConfig(port=0, control_port=0, drain_s=5), **changes)
    engine = made(1, catalog or small_catalog(), settings)
    assert engine is not None
    server, file = server_of(engine, settings, folder)
    ready = threading.Event()
    thread = threading.Thread(target=server.run, args=(ready.set,), daemon=True)
    engine.start()
    thread.start()
    try:
        assert ready.wait(120), "the server did not start"
        yield Running(engine, server, file)
    finally:
        server.drain(0.0)
        thread.join(60)
    assert not thread.is_alive()
    assert engine.failed.exception(timeout=60) is None


@dataclass
class Learned:
    stats: list[dict[str, float]]
    rollouts: list[Rollout]
    weights: dict[str, Tensor]
    engine: Searches


def learn(recipe: Recipe, *, between: Any = lambda step: None) -> Learned:
    """Three steps of RL; ``between(step)`` is called with every step's rollout there and its update to come."""
    runtime.initialize(recipe.model, seed=1)
    build = partial(build_model, SHAPE, recipe.model, seed=3)
    dp, model, catalog = DataParallel(), build(), small_catalog()
    engine = build_engine(recipe, model, SHAPE, catalog)
    actor = Actor(Trainable(model, SHAPE, TrainerConfig(), lr=LR), catalog, recipe.rl, dp)
    reference = build_reference("swap", recipe.rl.beta, model, build)
    seen: list[Rollout] = []

    def reward(rollout: Rollout) -> Tensor:
        seen.append(rollout)
        between(len(seen) - 1)
        return RankingReward()(rollout)

    timers = Timers(1e12, dp)
    rollouts = Rollouts(recipe.rl, engine, catalog, dp, PromptStream(lambda n: prompts(n, dp)), timers)
    components = RlComponents(recipe.rl, rollouts, actor, reference, reward, timers)
    sync_weights(engine, version=0)
    stats = [rl_step(components, step=step, lr=LR) for step in range(STEPS)]
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    return Learned(stats, seen, weights, engine)


def main(folder: Path, tp: int) -> None:
    torch.set_num_threads(1)
    settings = ServeConfig(port=0, control_port=0, drain_s=5)
    engine = made(tp, small_catalog(), settings)
    if engine is not None:
        engine.start()
        server, _ = server_of(engine, settings, folder)
        server.run()
    runtime.shutdown()


def process(words: Sequence[str]) -> None:
    """``python -m tests.serve.learning words``."""
    main(Path(words[0]), int(words[1]))


if __name__ == "__main__":
    process(sys.argv[1:])

"""What every rank of a layout runs: train, save, continue; load and continue the same; load another layout's file."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import pickle
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from tawin_nemo.config.backbones import Backbone
from tawin_nemo.config.schema import ModelConfig, TrainerConfig
from tawin_nemo.data.trees import tree_batch
from tawin_nemo.models.megatron.checkpoint import dcp_save, flat_pieces
from tawin_nemo.models.megatron.checkpoint.async_save import AsyncSaver
from tawin_nemo.models.megatron.checkpoint.checkpoint import load_checkpoint, newest_valid, prune, save_checkpoint
from tawin_nemo.models.megatron.checkpoint.files import list_checkpoints
from tawin_nemo.models.megatron.hf.io import save_hf
from tawin_nemo.models.megatron.model.build import build_model
from tawin_nemo.models.megatron.optim.trainable import MicroBatch, Trainable
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.types import TokenRows
from tawin_nemo.util.errors import CheckpointError
from tests.models.megatron.checkpoint import gathered

#: 21 vocabulary rows: one row of padding under TP 2, and the optimizer state of it. 3 layers: PP 2 holds 2 + 1.
SHAPE = Backbone("qwen2", 16, 3, 4, 2, 24, 21, rope_theta=1e4, max_position=64)
ROWS, LENGTH, LR = 4, 7, 1e-2


def update(actor: Trainable, step: int) -> dict[str, float]:
    """One update on this replica's share of the step's fixed rows."""
    place = runtime.data_parallel()
    tokens = torch.randint(0, SHAPE.vocab, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(step))
    mine = tokens[place.rank :: place.size].numpy()
    first, others = TokenRows.from_lists(list(mine[:, :1])), TokenRows.from_lists(list(mine[:, 1:]))
    batch, _ = tree_batch(first, others, np.arange(len(mine)), None)
    return actor.update([MicroBatch(batch, lambda logp_N: (-logp_N.sum() / (ROWS * LENGTH), {}))], lr=LR)


def trainable(cfg: ModelConfig, *, distributed: bool, seed: int) -> Trainable:
    trainer = TrainerConfig(distributed_optimizer=distributed)
    return Trainable(build_model(SHAPE, cfg, seed=seed), SHAPE, trainer, lr=LR)


def adam_state(actor: Trainable) -> list[torch.Tensor]:
    """Every tensor of this rank's optimizer: master weights, moments and step counters."""
    tensors = []
    for part in actor.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state[parameter]
                tensors += [parameter, *(state[name] for name in ("exp_avg", "exp_avg_sq", "step"))]
    return tensors


def assert_equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    assert len(one) == len(other) > 0
    assert all(torch.equal(left, right) for left, right in zip(one, other, strict=True))


def train_and_save(actor: Trainable, root: Path) -> list[dict[str, float]]:
    """Two steps, ``step_2`` and its weights in Hugging Face form; then two more, whose statistics are returned."""
    for step in (0, 1):
        update(actor, step)
    save_checkpoint(root / "step_2", model=actor.model, trainable=actor, state={"step": 2})
    save_hf(actor.model, SHAPE, root / "hf")
    return [update(actor, step) for step in (2, 3)]


def check_async(actor: Trainable, root: Path) -> None:
    """A save that a thread writes while the next steps run holds the weights of its own step."""
    kept = [parameter.clone() for parameter in actor.model.parameters()]
    state = [tensor.clone() for tensor in adam_state(actor)]
    saver = AsyncSaver()
    saver.save(root / "step_3", model=actor.model, trainable=actor, state={"step": 3})
    for step in (5, 6):
        update(actor, step)
    saver.wait()
    load_checkpoint(root / "step_3", model=actor.model, trainable=actor)
    assert_equal(list(actor.model.parameters()), kept)
    assert_equal(adam_state(actor), state)


def check_gathered_form(actor: Trainable, root: Path) -> None:
    """What the ranks write piece by piece is bit for bit what one of them would gather, and both forms are read."""
    save_checkpoint(root / "step_3", model=actor.model, trainable=actor, state={})
    with gathered.saving():
        save_checkpoint(root / "whole" / "step_3", model=actor.model, trainable=actor, state={})
    kept = [tensor.clone() for tensor in [*actor.model.parameters(), *adam_state(actor)]]
    for path in (root / "step_3", root / "whole" / "step_3"):
        for reader in (contextlib.nullcontext, gathered.loading):
            update(actor, 7)
            with reader():
                load_checkpoint(path, model=actor.model, trainable=actor)
            assert_equal([*actor.model.parameters(), *adam_state(actor)], kept)


def check_other_layout(actor: Trainable, other: Path) -> None:
    """Pieces read from the checkpoint of another layout are those of whole tensors read from it."""
    with gathered.loading():
        load_checkpoint(other, model=actor.model, trainable=actor)
    expected = [tensor.clone() for tensor in adam_state(actor)]
    update(actor, 7)
    load_checkpoint(other, model=actor.model, trainable=actor)
    assert_equal(adam_state(actor), expected)


def check_shares(path: Path) -> None:
    """Every rank has written, and the ranks' elements differ by no more than the largest tensor's and the padding."""
    metadata = pickle.loads((path / ".metadata").read_bytes())
    written: Counter[str] = Counter()
    for index, place in metadata.storage_data.items():
        kind = metadata.state_dict_metadata[index.fqn]
        for chunk in getattr(kind, "chunks", []):
            if chunk.offsets == index.offset and index.fqn.startswith("optimizer.state."):
                written[place.relative_path] += math.prod(chunk.sizes)
    assert len(written) == runtime.world_size()
    largest = max(math.prod(kind.size) for kind in metadata.state_dict_metadata.values() if hasattr(kind, "size"))
    assert max(written.values()) - min(written.values()) <= 3 * largest


def check_a_rank_that_cannot_write(actor: Trainable, root: Path) -> None:
    """The disk of the last rank is full: every rank raises, and what was there before is what is there."""
    before = list_checkpoints(root)
    last = runtime.world_size() - 1

    def full(stream: Any, data: Any) -> int:
        stream.error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise stream.error

    stops = patch.object(dcp_save._Stream, "write", full) if runtime.world_rank() == last else contextlib.nullcontext()
    with stops, pytest.raises(CheckpointError, match=f"rank {last}: .*No space left"):
        save_checkpoint(root / "step_3", model=actor.model, trainable=actor, state={"step": 30})
    assert list_checkpoints(root) == before
    assert newest_valid(root) == root / "step_3"
    assert load_checkpoint(root / "step_3", model=actor.model, trainable=actor) == {"step": 3}


def check_damage(actor: Trainable, root: Path) -> None:
    """Every rank must pass over a damaged newest checkpoint, whoever finds the damage."""
    save_checkpoint(root / "step_4", model=actor.model, trainable=actor, state={"step": 4})
    assert newest_valid(root) == root / "step_4"
    runtime.barrier()
    if runtime.world_rank() == 0:
        (root / "step_4" / "__0_0.distcp").write_bytes(b"not a checkpoint")
    runtime.barrier()
    assert newest_valid(root) == root / "step_3"
    with pytest.raises(CheckpointError, match="has 16 bytes instead of"):
        load_checkpoint(root / "step_4", model=actor.model, trainable=actor)
    prune(root, keep_last=1, keep={2})
    runtime.barrier()
    assert (root / "step_2").exists()


def main() -> None:
    options, root, other = json.loads(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    cfg, distributed = ModelConfig(**options["model"]), options["distributed_optimizer"]
    runtime.initialize(cfg, seed=1)
    flat_pieces.BLOCK = options["block"]
    assert runtime.world_size() == options["processes"]
    first = trainable(cfg, distributed=distributed, seed=3)
    expected = train_and_save(first, root)

    second = trainable(cfg, distributed=distributed, seed=4)
    assert load_checkpoint(root / "step_2", model=second.model, trainable=second) == {"step": 2}
    assert [update(second, step) for step in (2, 3)] == expected
    assert_equal(list(second.model.parameters()), list(first.model.parameters()))
    assert_equal(adam_state(second), adam_state(first))
    check_async(second, root)
    check_a_rank_that_cannot_write(second, root)
    check_damage(first, root)
    if distributed:
        check_gathered_form(second, root / "forms")
        check_shares(root / "step_2")
        check_other_layout(second, other)

    load_checkpoint(other, model=second.model, trainable=second)
    save_hf(second.model, SHAPE, root / "hf_of_other")
    continued = [update(second, step) for step in (2, 3)]
    if runtime.world_rank() == 0:
        (root / "result.json").write_text(json.dumps({"own": expected, "other": continued}))
    runtime.barrier()
    runtime.shutdown()


if __name__ == "__main__":
    main()

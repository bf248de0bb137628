"""What every rank of a layout runs with adapters: five updates, scoring, decoding, merged weights, a checkpoint, and
another layout's checkpoint; rank 0 writes the numbers."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tawin_nemo.config.schema import LoraConfig, ModelConfig, TrainerConfig
from tawin_nemo.models.megatron.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from tawin_nemo.models.megatron.hf.memory import gather_hf
from tawin_nemo.models.megatron.model.adapters import add_adapters
from tawin_nemo.models.megatron.model.build import build_model
from tawin_nemo.models.megatron.optim.trainable import Trainable, score
from tawin_nemo.models.megatron.parallel import runtime
from tests.distributed.layout_worker import SHAPE, assert_equal_everywhere, decode, micro_batches, rows

LORA = LoraConfig(rank=4, alpha=16.0)
UNTIED = replace(SHAPE, family="llama", tied=False)
BASE = {"kind": "random", "seed": 3}


def adapted(cfg: ModelConfig, trainer: TrainerConfig, *, seed: int, tied: bool = True) -> Trainable:
    """``seed`` is that of the adapters; the frozen weights are always the same."""
    shape = SHAPE if tied else UNTIED
    model = build_model(shape, cfg, seed=3)
    add_adapters(model, shape, LORA, seed=seed, base=BASE)
    return Trainable(model, shape, trainer, lr=1e-2)


def steps(actor: Trainable, count: int) -> list[dict[str, float]]:
    return [actor.update(micro_batches("vocab"), lr=1e-2) for _ in range(count)]


def frozen(actor: Trainable) -> list[torch.Tensor]:
    return [value.detach().clone() for name, value in actor.model.named_parameters() if ".lora." not in name]


def measure(cfg: ModelConfig, trainer: TrainerConfig, folder: Path, other: Path | None = None) -> dict[str, Any]:
    """Numbers of a tied and of an untied model; ``folder`` gets the checkpoint step_5 and the merged weights of the
    tied one. ``other``: a checkpoint of another layout, from which one more update is taken."""
    runtime.initialize(cfg, seed=1)
    result: dict[str, Any] = {}
    for tied in (True, False):
        actor = adapted(cfg, trainer, seed=5, tied=tied)
        before, stats = frozen(actor), steps(actor, 5)
        assert all(torch.equal(one, two) for one, two in zip(before, frozen(actor), strict=True))
        scored = score(actor.model, [rows([0, 4], "vocab"), rows([2], "vocab")])
        logits = decode(actor)
        assert_equal_everywhere([torch.tensor([list(s.values()) for s in stats])], "statistics")
        assert_equal_everywhere([*scored, *logits], "scores")
        flat = torch.cat([tensor.flatten() for tensor in logits]).tolist()
        result["tied" if tied else "untied"] = {"stats": stats, "scores": torch.cat(scored).tolist(), "logits": flat}
        if not tied:
            continue
        write_merged(actor, folder / "merged.safetensors")
        save_checkpoint(folder / "step_5", model=actor.model, trainable=actor, state={"step": 5})
        result["next"] = steps(actor, 1)
        again = adapted(cfg, trainer, seed=6)
        assert load_checkpoint(folder / "step_5", model=again.model, trainable=again) == {"step": 5}
        assert steps(again, 1) == result["next"]  # bit for bit
    if other is not None:
        actor = adapted(cfg, trainer, seed=6)
        load_checkpoint(other, model=actor.model, trainable=actor)
        write_merged(actor, folder / "merged_of_other.safetensors")
        result["next_of_other"] = steps(actor, 1)
    return result


def write_merged(actor: Trainable, path: Path) -> None:
    weights = gather_hf(actor.model, actor.shape)
    if weights is not None:
        save_file({name: value.contiguous() for name, value in weights.items()}, path)
    runtime.barrier()


def main() -> None:
    options = json.loads(sys.argv[1])
    trainer = TrainerConfig(distributed_optimizer=options["distributed_optimizer"])
    folder = Path(sys.argv[2])
    result = measure(ModelConfig(**options["model"]), trainer, folder, Path(sys.argv[3]))
    if runtime.world_rank() == 0:
        (folder / "result.json").write_text(json.dumps(result))
    runtime.barrier()
    runtime.shutdown()


if __name__ == "__main__":
    main()

"""What every rank of a layout runs: five updates in both spaces, scoring and decoding; rank 0 writes the numbers."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from tawin_nemo.backbones import Backbone
from tawin_nemo.config import ModelConfig, TrainerConfig
from tawin_nemo.models.megatron import parallel
from tawin_nemo.models.megatron.build import build_model
from tawin_nemo.models.megatron.lm import MegatronLM
from tawin_nemo.models.megatron.trainable import MicroBatch, Trainable, score
from tawin_nemo.types import Children, TokenBatch

#: 51 vocabulary rows: not a multiple of TP 2, so one row of padding exists; two key-value heads for grouped queries.
SHAPE = Backbone("qwen2", hidden=32, layers=2, heads=4, kv_heads=2, ffn=48, vocab=51, rope_theta=1e4, max_position=256)
ROWS, LENGTH, STEPS = 6, 11, 5


def rows(select: list[int], space: str) -> TokenBatch:
    """The selected ones of ROWS fixed token rows; row r is LENGTH - r % 3 tokens long, right-padded."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(1, SHAPE.vocab, (ROWS, LENGTH + 1), generator=generator)
    branches = torch.randint(1, 7, (ROWS, LENGTH), generator=generator)
    lengths = torch.tensor([LENGTH - r % 3 for r in select])
    width = int(lengths.max())
    row_N = torch.repeat_interleave(torch.arange(len(select)), lengths)
    position_N = torch.cat([torch.arange(int(length)) for length in lengths])
    target_N = tokens[select][row_N, position_N + 1]
    children = None
    if space == "trie":  # the target and its neighbours in the vocabulary stand for a node's children
        count_N = branches[select][row_N, position_N]
        position_E = torch.repeat_interleave(torch.arange(len(row_N)), count_N)
        chosen_N = torch.cumsum(count_N, 0) - count_N
        step_E = torch.arange(len(position_E)) - chosen_N[position_E]
        children = Children(position_E, (target_N[position_E] + 7 * step_E) % SHAPE.vocab, chosen_N)
    tokens_BT = torch.where(torch.arange(width) < lengths[:, None], tokens[select][:, :width], 0)
    return TokenBatch(tokens_BT, lengths, row_N, position_N, target_N, children)


def total_positions() -> int:
    return sum(LENGTH - r % 3 for r in range(ROWS))


def loss(logp_N: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return -logp_N.sum() / total_positions(), {"positions": torch.tensor(float(len(logp_N)))}


def train(
    shape: Backbone, cfg: ModelConfig, trainer: TrainerConfig, space: str
) -> tuple[Trainable, list[dict[str, float]]]:
    trainable = Trainable(build_model(shape, cfg, seed=3), shape, trainer, lr=1e-2)
    place = parallel.data_parallel()
    mine = list(range(ROWS))[place.rank :: place.size]
    # uneven micro-batches: under DP the first replica runs more of them than the others
    sizes = [1, len(mine) - 1] if place.rank == 0 else [len(mine)]
    parts = np.split(np.array(mine), np.cumsum(sizes)[:-1])
    micro = [MicroBatch(rows([int(r) for r in part], space), loss) for part in parts]
    return trainable, [trainable.update(micro, lr=1e-2) for _ in range(STEPS)]


def decode(trainable: Trainable) -> list[torch.Tensor]:
    """Logits of a prefill and of three beam-like extensions with shuffled parents."""
    batch = rows([0, 1, 2, 3], "vocab")
    lm = MegatronLM(trainable.model, trainable.shape)
    logits, cache = lm.prefill(batch.tokens_BT, batch.lengths_B, reserve=3)
    seen = [logits]
    generator = torch.Generator().manual_seed(9)
    for count in (8, 10, 5):
        parents = torch.randint(0, len(cache), (count,), generator=generator)
        logits, cache = lm.extend(cache, parents, torch.randint(0, SHAPE.vocab, (count,), generator=generator))
        seen.append(logits)
    return seen


def assert_equal_everywhere(tensors: list[torch.Tensor], what: str) -> None:
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    first = flat.clone()
    dist.broadcast(first, src=0)
    assert torch.equal(flat, first), f"{what} differ on rank {dist.get_rank()}: {(flat - first).abs().max()}"


def assert_sharded(trainable: Trainable, cfg: ModelConfig) -> None:
    """This rank holds its share of the layers and of every split matrix, and no more."""
    tp, pp = cfg.tensor_model_parallel_size, cfg.pipeline_model_parallel_size
    assert (parallel.tp_size(), parallel.pp_size()) == (tp, pp)
    assert parallel.data_parallel().size == dist.get_world_size() // (tp * pp)
    shapes = {name: tuple(p.shape) for name, p in trainable.model.named_parameters()}
    layers = {name.split(".")[2] for name in shapes if name.startswith("decoder.layers.")}
    assert len(layers) == SHAPE.layers // pp
    dim = SHAPE.kv_channels
    assert shapes["decoder.layers.0.self_attention.linear_qkv.weight"] == ((4 + 2 * 2) * dim // tp, SHAPE.hidden)
    assert shapes["decoder.layers.0.mlp.linear_fc1.weight"] == (2 * SHAPE.ffn // tp, SHAPE.hidden)
    assert shapes["decoder.layers.0.mlp.linear_fc2.weight"] == (SHAPE.hidden, SHAPE.ffn // tp)
    vocabulary = -(-SHAPE.vocab // tp)
    if parallel.is_first_stage():
        assert shapes["embedding.word_embeddings.weight"] == (vocabulary, SHAPE.hidden)
    else:
        assert not any(name.startswith("embedding") for name in shapes)
    assert ("decoder.final_layernorm.weight" in shapes) == parallel.is_last_stage()
    own_head = parallel.is_last_stage() and not (trainable.shape.tied and parallel.is_first_stage())
    assert ("output_layer.weight" in shapes) == own_head
    if trainable.ddp.ddp_config.use_distributed_optimizer:
        owned = sum(p.numel() for group in trainable.optimizer.param_groups for p in group["params"])
        everything = sum(p.numel() for p in trainable.model.parameters())
        replicas = parallel.data_parallel().size
        assert owned <= everything if replicas == 1 else owned < 0.75 * everything, (owned, everything)


def measure(cfg: ModelConfig, trainer: TrainerConfig) -> dict[str, Any]:
    """Statistics of five updates, scores and decoding logits, for tied and untied heads and both spaces."""
    parallel.initialize(cfg, seed=1)
    result: dict[str, Any] = {}
    for shape in (SHAPE, replace(SHAPE, tied=False)):
        for space in ("vocab", "trie"):
            trainable, stats = train(shape, cfg, trainer, space)
            assert_sharded(trainable, cfg)
            scored = score(trainable.model, [rows([0, 4], space), rows([2], space)])
            logits = decode(trainable)
            assert_equal_everywhere([torch.tensor([list(s.values()) for s in stats])], "statistics")
            assert_equal_everywhere(scored, "scores")
            assert_equal_everywhere(logits, "decoding logits")
            flat = torch.cat([tensor.flatten() for tensor in logits]).tolist()
            name = f"{space}, {'tied' if shape.tied else 'untied'}"
            result[name] = {"stats": stats, "scores": torch.cat(scored).tolist(), "logits": flat}
    return result


def main() -> None:
    options = json.loads(sys.argv[1])
    trainer = TrainerConfig(distributed_optimizer=options["distributed_optimizer"])
    result = measure(ModelConfig(**options["model"]), trainer)
    if parallel.world_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(result))
    parallel.barrier()
    parallel.shutdown()


if __name__ == "__main__":
    main()

"""What every rank of a layout runs: five updates in both spaces, scoring and decoding; rank 0 writes the numbers."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear

from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.config.backbones import Backbone
from tawin_nemo.config.schema import ModelConfig, TrainerConfig
from tawin_nemo.data.trees import tree_batch
from tawin_nemo.models.megatron.decode import lm
from tawin_nemo.models.megatron.decode.lm import MegatronLM
from tawin_nemo.models.megatron.model.build import build_model
from tawin_nemo.models.megatron.optim.trainable import MicroBatch, Trainable, score
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.rollout.beam import constrained_beam_search
from tawin_nemo.rollout.fixed_search import FixedShapeSearch, fixed_buffers
from tawin_nemo.types import TokenBatch, TokenRows
from tawin_nemo.util.errors import DataError

#: 51 vocabulary rows: not a multiple of TP 2, so one row of padding exists; two key-value heads for grouped queries.
SHAPE = Backbone("qwen2", hidden=32, layers=2, heads=4, kv_heads=2, ffn=48, vocab=51, rope_theta=1e4, max_position=256)
ROWS, STEPS = 6, 5
#: Tokens of the catalog, on both sides of the border between the shards of TP 2; EOS ends every path.
ALPHABET, EOS = (3, 11, 24, 25, 27, 43, 50), 1


def small_catalog() -> TokenRows:
    """30 items of three or four tokens and EOS."""
    draw = np.random.default_rng(5)
    paths = {tuple(draw.choice(ALPHABET, size=draw.integers(3, 5)).tolist()) for _ in range(60)}
    return TokenRows.from_lists([[*path, EOS] for path in sorted(paths)[::2]][:30])


def prompts(select: list[int]) -> TokenRows:
    """The selected ones of ROWS fixed prompts; prompt r is 4 + r % 3 tokens long."""
    draw = np.random.default_rng(6)
    return TokenRows.from_lists([draw.integers(1, SHAPE.vocab, size=4 + r % 3) for r in range(ROWS)]).take(select)


def rows(select: list[int], space: str) -> TokenBatch:
    """The selected prompts with their trees: prompt r has r % 3 + 1 items as its answers, so that some are chains."""
    items = [r % 3 + 1 for r in select]
    picked = np.concatenate([5 * r + np.arange(r % 3 + 1) for r in select])
    paths = small_catalog()
    trie = TokenTrie.from_paths(paths) if space == "trie" else None
    return tree_batch(prompts(select), paths.take(picked), np.repeat(np.arange(len(select)), items), trie)[0]


def total_positions(space: str) -> int:
    return len(rows(list(range(ROWS)), space).target_N)


def loss(logp_N: torch.Tensor, *, total: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return -logp_N.sum() / total, {"positions": torch.tensor(float(len(logp_N)))}


def train(
    shape: Backbone, cfg: ModelConfig, trainer: TrainerConfig, space: str
) -> tuple[Trainable, list[dict[str, float]]]:
    trainable = Trainable(build_model(shape, cfg, seed=3), shape, trainer, lr=1e-2)
    micro = micro_batches(space)
    return trainable, [trainable.update(micro, lr=1e-2) for _ in range(STEPS)]


def micro_batches(space: str) -> list[MicroBatch]:
    """This replica's rows, divided unevenly."""
    place = runtime.data_parallel()
    mine = list(range(ROWS))[place.rank :: place.size]
    # uneven micro-batches: under DP the first replica runs more of them than the others
    sizes = [1, len(mine) - 1] if place.rank == 0 else [len(mine)]
    parts = np.split(np.array(mine), np.cumsum(sizes)[:-1])
    mean_loss = partial(loss, total=total_positions(space))
    return [MicroBatch(rows(part.tolist(), space), mean_loss) for part in parts]


def decode(trainable: Trainable) -> list[torch.Tensor]:
    """Log-probs of all tokens behind all rows after a prefill and three extensions below shuffled rows.

    The same bits with and without megatron's own modules.
    """
    lean, slow = (decoded(trainable, use_inference_forward=kind) for kind in (True, False))
    assert all(torch.equal(one, other) for one, other in zip(lean, slow, strict=True))
    if trainable.config.sequence_parallel:
        as_fp8 = decoded_like_fp8(trainable)
        assert all(torch.equal(one, other) for one, other in zip(lean, as_fp8, strict=True))
    search_in_fixed_shapes(trainable)
    return lean


def search_in_fixed_shapes(trainable: Trainable) -> None:
    """The search in static buffers finds what the usual one finds, on every rank; pipeline stages have no buffers."""
    lm, trie = MegatronLM(trainable.model, trainable.shape), TokenTrie.from_paths(small_catalog())
    buffers = fixed_buffers(lm, trie, 6, 4, 6)
    assert (buffers is None) == (runtime.pp_size() > 1)
    if buffers is not None:
        found = FixedShapeSearch(lm, buffers, trie, 6, 4).search(prompts([0, 1, 2]), np.arange(3)).candidates
        expected = constrained_beam_search(lm, prompts([0, 1, 2]), trie, 6)
        assert torch.equal(found.items_BW, expected.items_BW)
        torch.testing.assert_close(found.scores_BW, expected.scores_BW, rtol=0, atol=1e-5)
        assert_equal_everywhere([found.scores_BW, found.logprobs_BWT], "searches in fixed shapes")


def decoded_like_fp8(trainable: Trainable) -> list[torch.Tensor]:
    """Decode as an FP8 model does: no module may see other flags, or more tokens, than in training."""
    model, tp = trainable.model, runtime.tp_size()
    parts: list[tuple[bool, bool]] = []

    def seen(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        parts.append((module.sequence_parallel, module.config.sequence_parallel))

    linear = [module for module in model.modules() if isinstance(module, ColumnParallelLinear)]
    handles = [module.register_forward_pre_hook(seen) for module in linear]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm, "keeps_sequence_parallel", lambda config: bool(config.sequence_parallel))
        result = decoded(trainable, use_inference_forward=False)
    for handle in handles:
        handle.remove()
    assert tp > 1
    assert set(parts) == {(True, True)}
    return result


def decoded(trainable: Trainable, *, use_inference_forward: bool) -> list[torch.Tensor]:
    lm = MegatronLM(trainable.model, trainable.shape, use_inference_forward=use_inference_forward)
    cache, seen = lm.prefill(prompts([0, 1, 2, 3])), []
    generator = torch.Generator().manual_seed(9)
    for chains in (8, 10, 5, 0):
        position_E = torch.arange(lm.rows(cache)).repeat_interleave(SHAPE.vocab)
        token_E = torch.arange(SHAPE.vocab).repeat(lm.rows(cache))
        few_E = token_E % 7 < 2
        seen.append(lm.logprobs(cache, torch.arange(lm.rows(cache)), position_E, token_E, "vocab"))
        seen.append(lm.logprobs(cache, torch.arange(lm.rows(cache)), position_E[few_E], token_E[few_E], "trie"))
        parents = torch.randint(0, lm.rows(cache), (chains,), generator=generator)
        tokens = torch.randint(0, SHAPE.vocab, (chains, 2), generator=generator)
        lengths = [1 + chain % 2 for chain in range(chains)]
        new = [row[:length].numpy() for row, length in zip(tokens, lengths, strict=True)]
        cache = lm.extend(cache, parents, TokenRows.from_lists(new))
    return seen


def assert_equal_everywhere(tensors: list[torch.Tensor], what: str) -> None:
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    first = flat.clone()
    dist.broadcast(first, src=0)
    assert torch.equal(flat, first), f"{what} differ on rank {dist.get_rank()}: {(flat - first).abs().max()}"


def assert_sharded(trainable: Trainable, cfg: ModelConfig) -> None:
    """This rank holds its share of the layers and of every split matrix, and no more."""
    tp, pp = cfg.tensor_model_parallel_size, cfg.pipeline_model_parallel_size
    assert (runtime.tp_size(), runtime.pp_size()) == (tp, pp)
    assert runtime.data_parallel().size == dist.get_world_size() // (tp * pp)
    shapes = {name: tuple(p.shape) for name, p in trainable.model.named_parameters()}
    layers = {name.split(".")[2] for name in shapes if name.startswith("decoder.layers.")}
    assert len(layers) == SHAPE.layers // pp
    dim = trainable.shape.kv_channels
    assert ("decoder.layers.0.self_attention.q_layernorm.weight" in shapes) == trainable.shape.qk_norm
    assert shapes["decoder.layers.0.self_attention.linear_qkv.weight"] == ((4 + 2 * 2) * dim // tp, SHAPE.hidden)
    assert shapes["decoder.layers.0.mlp.linear_fc1.weight"] == (2 * SHAPE.ffn // tp, SHAPE.hidden)
    assert shapes["decoder.layers.0.mlp.linear_fc2.weight"] == (SHAPE.hidden, SHAPE.ffn // tp)
    vocabulary = -(-SHAPE.vocab // tp)
    if runtime.is_first_stage():
        assert shapes["embedding.word_embeddings.weight"] == (vocabulary, SHAPE.hidden)
    else:
        assert not any(name.startswith("embedding") for name in shapes)
    assert ("decoder.final_layernorm.weight" in shapes) == runtime.is_last_stage()
    own_head = runtime.is_last_stage() and not (trainable.shape.tied and runtime.is_first_stage())
    assert ("output_layer.weight" in shapes) == own_head
    if trainable.ddp.ddp_config.use_distributed_optimizer:
        owned = sum(p.numel() for group in trainable.optimizer.param_groups for p in group["params"])
        everything = sum(p.numel() for p in trainable.model.parameters())
        replicas = runtime.data_parallel().size
        assert owned <= everything if replicas == 1 else owned < 0.75 * everything, (owned, everything)


def measure(cfg: ModelConfig, trainer: TrainerConfig) -> dict[str, Any]:
    """Statistics of five updates, scores and decoding logits, for tied and untied heads and both spaces; and for Qwen3,
    whose norms of queries and keys are whole on every TP rank, and see that rank's heads alone."""
    runtime.initialize(cfg, seed=1)
    result: dict[str, Any] = {}
    for shape in (SHAPE, replace(SHAPE, tied=False), replace(SHAPE, family="qwen3", head_dim=16)):
        for space in ("vocab", "trie") if shape.family == "qwen2" else ("trie",):
            trainable, stats = train(shape, cfg, trainer, space)
            assert_sharded(trainable, cfg)
            scored = score(trainable.model, [rows([0, 4], space), rows([2], space)])
            logits = decode(trainable)
            assert_equal_everywhere([torch.tensor([list(s.values()) for s in stats])], "statistics")
            assert_equal_everywhere(scored, "scores")
            assert_equal_everywhere(logits, "decoding logits")
            flat = torch.cat([tensor.flatten() for tensor in logits]).tolist()
            name = f"{space}, {shape.family}, {'tied' if shape.tied else 'untied'}"
            result[name] = {"stats": stats, "scores": torch.cat(scored).tolist(), "logits": flat}
    return result


class Missing(DataError):
    """An error that its own message cannot make anew."""

    def __init__(self, what: str, *, where: str) -> None:
        super().__init__(f"{what} is missing in {where}")


def check_rank_0_computes() -> None:
    """The value that rank 0 computed, or its error, reaches every rank; the others compute nothing."""
    asked: list[int] = []

    def fails() -> None:
        asked.append(runtime.world_rank())
        raise Missing("a file", where="the folder")

    assert runtime.on_rank_0(lambda: {"rank": runtime.world_rank()}) == {"rank": 0}
    with pytest.raises(DataError, match=r"^a file is missing in the folder$"):
        runtime.on_rank_0(fails)
    assert asked == ([0] if runtime.world_rank() == 0 else [])


def main() -> None:
    options = json.loads(sys.argv[1])
    trainer = TrainerConfig(distributed_optimizer=options["distributed_optimizer"])
    result = measure(ModelConfig(**options["model"]), trainer)
    check_rank_0_computes()
    if runtime.world_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(result))
    runtime.barrier()
    runtime.shutdown()


if __name__ == "__main__":
    main()

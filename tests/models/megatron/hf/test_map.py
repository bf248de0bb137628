"""The table: every Hugging Face element lands in exactly one place, at the place megatron-core reads it from."""

from pathlib import Path

import pytest
import torch

from tawin_nemo.config.backbones import Backbone
from tawin_nemo.config.schema import ModelConfig
from tawin_nemo.models.megatron.hf.map import (
    Entry,
    Kind,
    hf_names,
    hf_shapes,
    local_parameters,
    shard_segments,
    table,
)
from tawin_nemo.models.megatron.model.build import build_model
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.util.errors import CheckpointError

SHAPE = Backbone("qwen2", 24, 2, 6, 3, 36, 10, head_dim=4, tied=False)


def entry_of(name: str) -> Entry:
    return next(entry for entry, layer in table(SHAPE) if any(name in found for found in hf_names(entry, layer)))


def assemble(name: str, tp_size: int, padded_vocab: int = 10) -> list[list[tuple[int, int]]]:
    """Per rank the (source, row) pairs of its shard, in order."""
    entry = entry_of(name)
    shards = [shard_segments(entry, SHAPE, rank, tp_size, padded_vocab=padded_vocab) for rank in range(tp_size)]
    return [[(part.source, row) for part in shard for row in range(part.start, part.stop)] for shard in shards]


def test_names_of_one_layer_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=3, head_dim=4,
        intermediate_size=36, vocab_size=10, tie_word_embeddings=False,
    )  # fmt: skip
    theirs = {name: tuple(tensor.shape) for name, tensor in Qwen2ForCausalLM(config).state_dict().items()}
    ours = {
        name: size
        for entry, layer in table(SHAPE)
        for name, size in zip(hf_names(entry, layer), hf_shapes(entry, SHAPE), strict=True)
    }
    assert ours == theirs


@pytest.mark.parametrize("tp_size", [1, 2, 3, 6])
@pytest.mark.parametrize("name", ["q_proj.weight", "k_proj.bias", "gate_proj", "o_proj", "down_proj", "norm"])
def test_shards_hold_every_element_once(name: str, tp_size: int) -> None:
    entry = entry_of(name)
    sizes = [size[entry.axis] for size in hf_shapes(entry, SHAPE)]
    everything = [(source, row) for source, size in enumerate(sizes) for row in range(size)]
    shards = assemble(name, tp_size)
    if entry.kind is Kind.REPLICATED:
        assert all(shard == everything for shard in shards)
    else:
        assert sorted(pair for shard in shards for pair in shard) == everything


def test_fused_qkv_interleaves_per_query_group() -> None:
    # 3 groups of 2 query heads of 4 channels: 8 query rows, 4 key rows, 4 value rows
    def group(g: int) -> list[tuple[int, int]]:
        query = [(0, row) for row in range(8 * g, 8 * g + 8)]
        return query + [(source, row) for source in (1, 2) for row in range(4 * g, 4 * g + 4)]

    assert assemble("q_proj.weight", 1) == [group(0) + group(1) + group(2)]
    assert assemble("q_proj.weight", 3) == [group(0), group(1), group(2)]
    # more ranks than groups: the fused rows are cut through the middle of a group
    assert assemble("q_proj.weight", 6)[1] == group(0)[8:]


def test_fused_gate_up_is_stacked_on_every_rank() -> None:
    assert assemble("gate_proj", 2)[1] == [(0, row) for row in range(18, 36)] + [(1, row) for row in range(18, 36)]


def test_padded_vocabulary_rows_have_no_source() -> None:
    assert assemble("lm_head", 4, padded_vocab=12)[3] == [(0, 9)]  # rows 9, 10, 11 of a vocabulary of 10


def test_another_shape_than_the_models_is_refused() -> None:
    runtime.initialize(ModelConfig(), seed=0)
    model = build_model(SHAPE, ModelConfig(), seed=0)
    assert len(local_parameters(model, SHAPE)) == 1 + 2 * 7 + 2
    with torch.no_grad(), pytest.raises(CheckpointError, match=r"unknown \(output_layer.weight"):
        local_parameters(model, Backbone("qwen2", 24, 2, 6, 3, 36, 10, head_dim=4, tied=True))
    with pytest.raises(CheckpointError, match="linear_qkv"):
        local_parameters(model, Backbone("llama", 24, 2, 6, 3, 36, 10, head_dim=4, tied=False))

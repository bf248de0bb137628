"""Which Hugging Face tensors make up which megatron-core parameter: one table, read in both directions.

Every megatron-core shard is a concatenation of *segments* of Hugging Face tensors along one axis (rows, except for
row-parallel weights, which are cut along columns). Import copies segments into the shard, export copies them back, so
the two directions cannot disagree. Interleaving of the fused weights (megatron-core 0.16):

    linear_qkv  per query group: its query heads, then its key head, then its value head; the fused rows are then cut
                evenly over the tensor-parallel ranks (also through a group, when there are fewer groups than ranks)
    linear_fc1  on every tensor-parallel rank: its rows of gate_proj, then its rows of up_proj
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from tawin_nemo.config.backbones import Backbone
from tawin_nemo.config.lora import MARK
from tawin_nemo.util.errors import CheckpointError

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from torch.nn import Parameter


class Kind(Enum):
    """How a parameter is sharded over tensor-parallel ranks."""

    REPLICATED = "replicated"
    ROW = "row"  # cut along the columns of the weight (its input)
    VOCAB = "vocab"  # cut along rows; the model may have more rows than the file
    QKV = "qkv"
    GATE_UP = "gate_up"


@dataclass(frozen=True)
class Entry:
    """One row of the table; ``{layer}`` stands for the layer number. ``mcore`` lists alternatives, best first."""

    hf: tuple[str, ...]
    mcore: tuple[str, ...]
    kind: Kind

    @property
    def axis(self) -> int:
        """The axis along which the parameter is sharded: 1 for row-parallel weights, else 0."""
        return 1 if self.kind is Kind.ROW else 0


@dataclass(frozen=True)
class Segment:
    """Rows (or columns) ``start:stop`` of the ``source``-th Hugging Face tensor of an entry."""

    source: int
    start: int
    stop: int


_EMBEDDING = Entry(("model.embed_tokens.weight",), ("embedding.word_embeddings.weight",), Kind.VOCAB)
#: With tied weights the last pipeline stage holds the same matrix a second time, as its output layer.
_TIED_EMBEDDING = Entry(_EMBEDDING.hf, (*_EMBEDDING.mcore, "output_layer.weight"), Kind.VOCAB)
_HEAD = Entry(("lm_head.weight",), ("output_layer.weight",), Kind.VOCAB)
_FINAL_NORM = Entry(("model.norm.weight",), ("decoder.final_layernorm.weight",), Kind.REPLICATED)

_HF, _MCORE = "model.layers.{layer}.", "decoder.layers.{layer}."
_QKV_BIAS = Entry(
    tuple(f"{_HF}self_attn.{name}_proj.bias" for name in "qkv"), (_MCORE + "self_attention.linear_qkv.bias",), Kind.QKV
)
_QK_NORM = tuple(
    Entry(
        (f"{_HF}self_attn.{name}_norm.weight",), (f"{_MCORE}self_attention.{name}_layernorm.weight",), Kind.REPLICATED
    )
    for name in "qk"
)
#: Transformer Engine's spec keeps the two norms inside the linear layers that follow them.
_LAYER = (
    Entry(
        (_HF + "input_layernorm.weight",),
        (_MCORE + "input_layernorm.weight", _MCORE + "self_attention.linear_qkv.layer_norm_weight"),
        Kind.REPLICATED,
    ),
    Entry(
        tuple(f"{_HF}self_attn.{name}_proj.weight" for name in "qkv"),
        (_MCORE + "self_attention.linear_qkv.weight",),
        Kind.QKV,
    ),
    Entry((_HF + "self_attn.o_proj.weight",), (_MCORE + "self_attention.linear_proj.weight",), Kind.ROW),
    Entry(
        (_HF + "post_attention_layernorm.weight",),
        (_MCORE + "pre_mlp_layernorm.weight", _MCORE + "mlp.linear_fc1.layer_norm_weight"),
        Kind.REPLICATED,
    ),
    Entry(
        (_HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight"), (_MCORE + "mlp.linear_fc1.weight",), Kind.GATE_UP
    ),
    Entry((_HF + "mlp.down_proj.weight",), (_MCORE + "mlp.linear_fc2.weight",), Kind.ROW),
)


def table(shape: Backbone) -> Iterator[tuple[Entry, int | None]]:
    """Every entry of the model with its 0-based global layer number (None outside the layers), in model order."""
    yield (_TIED_EMBEDDING if shape.tied else _EMBEDDING), None
    layer_entries = (*_LAYER, *((_QKV_BIAS,) if shape.qkv_bias else ()), *(_QK_NORM if shape.qk_norm else ()))
    for layer in range(shape.layers):
        for entry in layer_entries:
            yield entry, layer
    yield _FINAL_NORM, None
    if not shape.tied:
        yield _HEAD, None


def hf_names(entry: Entry, layer: int | None) -> list[str]:
    """Hugging Face names of the entry's tensors in this layer."""
    return [name.format(layer=layer) for name in entry.hf]


def hf_shapes(entry: Entry, shape: Backbone) -> list[tuple[int, ...]]:
    """Shapes of the entry's Hugging Face tensors, in the order of ``entry.hf``."""
    q, kv = shape.heads * shape.kv_channels, shape.kv_heads * shape.kv_channels
    match entry.kind:
        case Kind.REPLICATED:
            return [(shape.kv_channels if entry in _QK_NORM else shape.hidden,)]
        case Kind.VOCAB:
            return [(shape.vocab, shape.hidden)]
        case Kind.QKV:
            columns = () if entry.hf[0].endswith(".bias") else (shape.hidden,)
            return [(q, *columns), (kv, *columns), (kv, *columns)]
        case Kind.GATE_UP:
            return [(shape.ffn, shape.hidden), (shape.ffn, shape.hidden)]
        case Kind.ROW:
            return [(shape.hidden, q if "self_attn" in entry.hf[0] else shape.ffn)]


def _fused_qkv(shape: Backbone) -> list[Segment]:
    per_group, d = shape.heads // shape.kv_heads * shape.kv_channels, shape.kv_channels
    segments = []
    for group in range(shape.kv_heads):
        segments.append(Segment(0, group * per_group, (group + 1) * per_group))
        segments += [Segment(source, group * d, (group + 1) * d) for source in (1, 2)]
    return segments


def _window(segments: list[Segment], start: int, stop: int) -> list[Segment]:
    """The range ``start:stop`` of a concatenation of segments."""
    cut, offset = [], 0
    for segment in segments:
        length = segment.stop - segment.start
        low, high = max(start - offset, 0), min(stop - offset, length)
        if low < high:
            cut.append(Segment(segment.source, segment.start + low, segment.start + high))
        offset += length
    return cut


def shard_segments(entry: Entry, shape: Backbone, tp_rank: int, tp_size: int, *, padded_vocab: int) -> list[Segment]:
    """The segments of the entry that rank ``tp_rank`` of ``tp_size`` holds, in the order of its shard.

    ``padded_vocab`` is the number of vocabulary rows of the whole model; segments end at ``shape.vocab``, the rows
    behind it are padding and have no segment.
    """
    sizes = [size[entry.axis] for size in hf_shapes(entry, shape)]
    match entry.kind:
        case Kind.REPLICATED:
            return [Segment(0, 0, sizes[0])]
        case Kind.VOCAB:
            rows = padded_vocab // tp_size
            return _window([Segment(0, 0, sizes[0])], tp_rank * rows, (tp_rank + 1) * rows)
        case Kind.QKV:
            rows = sum(sizes) // tp_size
            return _window(_fused_qkv(shape), tp_rank * rows, (tp_rank + 1) * rows)
        case Kind.GATE_UP | Kind.ROW:
            width = sizes[0] // tp_size
            return [Segment(source, tp_rank * width, (tp_rank + 1) * width) for source in range(len(sizes))]


def local_parameters(model: GPTModel, shape: Backbone) -> dict[tuple[Entry, int | None], Parameter]:
    """The table rows that this pipeline stage holds, with their parameters; adapters (``model.lora``) are no rows.

    Layer numbers of the table are global; megatron-core numbers the layers of a stage from 0 and says through
    `get_transformer_layer_offset` where the stage starts (uneven splits included). Raises CheckpointError when the
    parameters of the model are not those of the table: it was built from another shape.
    """
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    from tawin_nemo.models.megatron.model.in_flight import wait_for_weights

    wait_for_weights(model)
    named = {name: value for name, value in model.named_parameters() if MARK not in name}
    offset = get_transformer_layer_offset(model.config, vp_stage=model.vp_stage)
    result: dict[tuple[Entry, int | None], Parameter] = {}
    absent: list[str] = []
    for entry, layer in table(shape):
        local = None if layer is None else layer - offset
        names = [pattern.format(layer=local) for pattern in entry.mcore]
        name = next((name for name in names if name in named), None)
        if name is not None:
            result[entry, layer] = named.pop(name)
        elif _belongs_here(model, entry, local):
            absent.append(names[0])
    if named or absent:
        raise CheckpointError(
            f"the model is not the {shape.family} of {shape.layers} layers (tied={shape.tied}) that it should be: "
            f"{_list('unknown', list(named))}{_list('absent', absent)}; build it from the same shape"
        )
    return result


def _belongs_here(model: GPTModel, entry: Entry, local_layer: int | None) -> bool:
    if local_layer is not None:
        return 0 <= local_layer < len(model.decoder.layers)
    return bool(model.pre_process if entry.hf == _EMBEDDING.hf else model.post_process)


def _list(what: str, names: list[str]) -> str:
    shown = ", ".join(sorted(names)[:5]) + (" ..." if len(names) > 5 else "")
    return f"{len(names)} {what} ({shown}) " if names else ""

"""Bytes that a forward pass leaves behind for the backward pass, and what both need beside that.

Counted tensor by tensor from the decoder layer as it is built (norm.py, attention.py, tree_plan.py and megatron's
attention and MLP); a test compares the sum with what autograd really saves. a = bytes of an activation.
"""

from __future__ import annotations

from dataclasses import dataclass

from tawin_nemo.config.backbones import Backbone
from tawin_nemo.config.layout import Layout

#: Most logits that head_lse.py holds at once, and the most exponentials it keeps for the backward pass.
LOGITS_ALIVE = {"cpu": 2**20, "cuda": 2**24}
LOGITS_KEPT = 2**23
#: Edges that head.py multiplies at once in bf16.
EDGES_AT_ONCE = 8192
NARROWEST_SLICE = 256


@dataclass(frozen=True)
class Pass:
    """What runs in one forward pass on one replica: equal prompts, each a chain with a tree of candidates below it.

    ``tokens`` of the whole row, ``tree`` of them in trees; ``keys`` = tokens of one prompt with its tree; ``scored`` =
    rows that reach the LM head; ``vocabulary`` = they are normalised over all of it.
    """

    tokens: int
    tree: int = 0
    keys: int = 0
    scored: int = 0
    vocabulary: bool = True


@dataclass(frozen=True)
class Numbers:
    """How numbers are held: bytes of weights and activations, and whether the device has the fused kernels."""

    bytes: int  # of a weight or an activation: 4 in fp32, 2 otherwise
    fp8: bool = False
    device: str = "cuda"
    dropout: float = 0.0

    @classmethod
    def of(cls, precision: str, *, device: str = "cuda", dropout: float = 0.0) -> Numbers:
        return cls(4 if precision == "fp32" else 2, precision.startswith("fp8"), device, dropout)

    @property
    def norm_copy(self) -> int:
        """Bytes of a norm's saved input: in bf16 a float32 copy, in fp32 the input itself."""
        return 4


@dataclass(frozen=True)
class Widths:
    """Columns of one token's tensors on one rank."""

    hidden: float  # outside the split matrices: all, or a TP-th under sequence parallelism
    query: float
    key: float  # of keys; values have as many
    ffn: float
    rotary: int
    heads: float

    @classmethod
    def of(cls, shape: Backbone, layout: Layout) -> Widths:
        tp = layout.tp
        split = tp if layout.sequence_parallel else 1
        dim = shape.kv_channels
        return cls(
            shape.hidden / split, shape.heads * dim / tp, shape.kv_heads * dim / tp, shape.ffn / tp, dim,
            shape.heads / tp,
        )  # fmt: skip


def layer_bytes(shape: Backbone, layout: Layout, numbers: Numbers, work: Pass, recompute: str = "none") -> float:
    """Bytes that one decoder layer saves for its backward pass.

    Two norms: input (float32), reciprocal deviation, normed row, output, which is the next matrix product's input.
    RoPE: cosine and sine, for queries and for keys. Attention: queries, outputs, their packed copy and the
    projection's input, log-sum-exp per head; keys and values of the chains, and again of chains with trees, which
    attend in a call of their own. MLP: both halves of its first product and its result, without the fused kernel also
    SiLU's output and a copy of the second half. ``full`` recomputation keeps the layer's input only, ``selective`` the
    attention's inputs (the value is a view of queries, keys and values together) in place of what it computes.
    """
    a, w = numbers.bytes, Widths.of(shape, layout)
    if recompute == "full":
        return a * w.hidden * work.tokens
    norms = 2 * ((numbers.norm_copy + 2 * a) * w.hidden + 4)
    rotary = 4 * w.rotary * a
    mlp = (3 if numbers.device == "cuda" else 5) * w.ffn * a
    dropped = 2 * w.hidden * (1 if numbers.device == "cuda" else a) if numbers.dropout else 0
    if recompute == "selective":
        return work.tokens * (norms + rotary + mlp + dropped + a * (3 * w.query + 3 * w.key))
    per_token = norms + rotary + mlp + dropped + 4 * w.query * a + 4 * w.heads
    key_rows = work.tokens - work.tree + (work.tokens if work.tree else 0)
    return work.tokens * per_token + key_rows * 2 * w.key * a


def mask_bytes(shape: Backbone, numbers: Numbers, work: Pass) -> float:
    """The tree's visibility and its additive mask, for all layers: one row per tree token and query head of a group."""
    share = shape.heads // shape.kv_heads
    return work.tree * work.keys * (1 + share * numbers.bytes)


def saved_bytes(
    shape: Backbone, layout: Layout, numbers: Numbers, work: Pass, *, recompute: str, layers: int, last: bool
) -> float:
    """Everything one micro-batch leaves behind on a stage: layers, masks, and on the last stage the final norm."""
    final = (numbers.norm_copy + numbers.bytes) * Widths.of(shape, layout).hidden * work.tokens if last else 0.0
    per_layer = layer_bytes(shape, layout, numbers, work, recompute)
    return layers * per_layer + mask_bytes(shape, numbers, work) + final


def backward_bytes(shape: Backbone, layout: Layout, numbers: Numbers, work: Pass, recompute: str = "none") -> float:
    """What the backward pass of a layer needs beside the saved tensors.

    It is largest in the MLP: two further tensors of the FFN's width before the saved ones go (three in the fused
    kernel), the gradients of the residual stream and of the norm's input; the product of the largest weight's
    gradient before it is added to the buffer; and under ``full`` recomputation what the layer saves when run again.
    Under sequence parallelism also the gathered input of the matrix products.
    """
    a, w = numbers.bytes, Widths.of(shape, layout)
    ffn_tensors = 3 if numbers.device == "cuda" else 2
    working = work.tokens * (ffn_tensors * w.ffn * a + (2 * a + 4) * w.hidden)
    if layout.sequence_parallel:
        working += work.tokens * shape.hidden * a
    if numbers.device == "cuda" or a == 2:  # a CPU adds float32 products to the buffer as they are made
        working += 2 * w.ffn * shape.hidden * a
    if recompute == "full":
        working += layer_bytes(shape, layout, numbers, work)
    if recompute == "selective":
        working += work.tokens * a * (3 * w.query + 4 * w.key)
    return working


def forward_bytes(shape: Backbone, layout: Layout, numbers: Numbers, tokens: float) -> float:
    """What a forward pass without gradient holds at most: the MLP's tensors, residual stream, norm."""
    a, w = numbers.bytes, Widths.of(shape, Layout(layout.tp))  # decoding runs without sequence parallelism
    ffn_tensors = 3 if numbers.device == "cuda" else 5
    return tokens * (ffn_tensors * w.ffn * a + (2 * a + 4) * w.hidden)


def head_bytes(shape: Backbone, layout: Layout, numbers: Numbers, work: Pass, *, backward: bool = True) -> float:
    """Logits of the scored rows on the last stage: a slice of the vocabulary at a time (head_lse.py), or the head rows
    of some edges at a time (head.py), and the rows' hidden states."""
    rows = shape.hidden * work.scored * (numbers.bytes + (4 if backward else 0))
    local_vocab = -(-shape.vocab // layout.tp)
    if not work.vocabulary:
        pairs = EDGES_AT_ONCE * shape.hidden * (3 * 4 + 2 * 2) if numbers.bytes == 2 else 0
        return rows + pairs
    width = min(local_vocab, max(NARROWEST_SLICE, LOGITS_ALIVE[numbers.device] // max(1, work.scored)))
    alive = work.scored * width
    kept = 4 * work.scored * local_vocab if backward and work.scored * local_vocab <= LOGITS_KEPT else 0
    wide = 0 if numbers.bytes == 4 else numbers.bytes * (alive + width * shape.hidden)
    return rows + kept + 2 * 4 * alive + wide

"""What a recipe's steps run: tokens and FLOPs from stated mean lengths, and the bytes that forward passes leave behind.

A rollout may run fewer tokens than this says (candidates share beginnings, forced tokens are never run): figures are
upper bounds for equal prompts. Bytes are counted tensor by tensor from the decoder layer as it is built (norm.py,
attention.py, tree_plan.py and megatron's attention and MLP); a test compares the sum with what autograd really saves.
a = bytes of an activation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tawin_nemo.config.backbones import Backbone, FlopCount
from tawin_nemo.config.layout import Layout
from tawin_nemo.config.schema import Recipe

#: Most logits that head.py holds at once, and the most exponentials it keeps for the backward pass.
LOGITS_ALIVE = {"cpu": 2**20, "cuda": 2**24}
LOGITS_KEPT = 2**23
#: Edges that head.py multiplies at once in bf16.
EDGES_AT_ONCE = 8192
NARROWEST_SLICE = 256
#: Bytes per element of a norm's saved input: in bf16 a float32 copy, in fp32 the input itself.
NORM_INPUT = 4
#: Admissible next tokens at a place with a choice, mean. Head rows of these are all that trie space multiplies.
CHILDREN = 16


@dataclass(frozen=True)
class Lengths:
    """Mean tokens of a prompt, of an item with its end-of-text token, and those of an item up to its last choice in
    the trie: trie space runs and scores only these."""

    prompt: int
    path: int
    decisions: int

    def run(self, space: str) -> int:
        """Tokens of an item that are run: in vocabulary space all but the last, which is never an input."""
        return max(1, self.decisions if space == "trie" else self.path - 1)

    def scored(self, space: str) -> int:
        """Tokens of an item that have a log-prob."""
        return max(1, self.decisions if space == "trie" else self.path)


#: Where none are given. Titles: the Industrial set in Qwen's tokenizer, items of 29 tokens; semantic IDs: 4 codes.
TITLES, CODES = Lengths(256, 29, 4), Lengths(96, 5, 4)


def default_lengths(recipe: Recipe) -> Lengths:
    """The lengths that are assumed for a recipe whose data nobody has looked at."""
    usual = CODES if recipe.catalog.kind == "sid" else TITLES
    return replace(usual, prompt=min(usual.prompt, recipe.data.max_prompt_tokens))


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


def tree_pass(tokens: int, lengths: Lengths, candidates: int, space: str) -> Pass:
    """A micro-batch of ``tokens`` tokens of prompts with the trees of their candidates (one candidate: no tree)."""
    below = candidates * lengths.run(space)
    keys = lengths.prompt + below
    prompts = tokens / keys
    return Pass(
        tokens,
        tree=round(prompts * below) if candidates > 1 else 0,
        keys=keys,
        scored=round(prompts * candidates * lengths.scored(space)),
        vocabulary=space == "vocab",
    )


def sft_pass(recipe: Recipe, lengths: Lengths) -> Pass:
    """A full micro-batch of SFT: plain rows."""
    return tree_pass(recipe.sft.micro_batch_tokens, lengths, 1, recipe.sft.loss_space)


def rl_pass(recipe: Recipe, lengths: Lengths) -> Pass:
    """A full micro-batch of the actor's update."""
    return tree_pass(recipe.rl.micro_batch_tokens, lengths, recipe.rl.group_size, recipe.rl.policy_space)


def preference_pass(recipe: Recipe, lengths: Lengths) -> Pass:
    """A full micro-batch of preference optimisation: the target and the rejected items of each prompt."""
    cfg = recipe.preference
    return tree_pass(cfg.micro_batch_tokens, lengths, 1 + cfg.num_negatives, cfg.policy_space)


def preference_step_work(recipe: Recipe, lengths: Lengths, vocab: int, rows: int) -> FlopCount:
    """Forward pass of ``rows`` rows of one preference step; sharing rejected items costs nothing."""
    cfg = recipe.preference
    return rows_work(rows, lengths, 1 + cfg.num_negatives, cfg.policy_space, vocab)


def rows_work(rows: int, lengths: Lengths, candidates: int, space: str, vocab: int) -> FlopCount:
    """One forward pass over ``rows`` prompts with ``candidates`` items below each."""
    prompt, run = lengths.prompt, lengths.run(space)
    pairs = prompt * (prompt + 1) / 2 + candidates * run * (prompt + (run + 1) / 2)
    logits = candidates * lengths.scored(space) * (vocab if space == "vocab" else CHILDREN)
    return FlopCount(rows * (prompt + candidates * run), rows * pairs, rows * logits)


def sft_step_work(recipe: Recipe, lengths: Lengths, vocab: int, rows: int) -> FlopCount:
    """Forward pass of ``rows`` rows of one SFT step."""
    return rows_work(rows, lengths, 1, recipe.sft.loss_space, vocab)


@dataclass(frozen=True)
class RlWork:
    """Forward passes of one RL step; an update costs three times its forward pass, ``updates`` times."""

    rollout: FlopCount
    reference: FlopCount
    scoring: FlopCount  # old log-probs, where the rollout does not leave them
    update: FlopCount
    updates: int


def rl_step_work(recipe: Recipe, lengths: Lengths, vocab: int, prompts: int) -> RlWork:
    """What one RL step runs for ``prompts`` prompts."""
    rl, nothing = recipe.rl, FlopCount()
    width = recipe.rollout.width or rl.group_size
    if rl.negatives == "dynamic":
        width = round(width * rl.oversample)
    searched = search_space(recipe)
    scored = rows_work(prompts, lengths, rl.group_size, rl.policy_space, vocab)
    return RlWork(
        rollout=rows_work(prompts, lengths, width, searched, vocab),
        reference=scored if rl.beta > 0 and uses_reference(recipe) else nothing,
        scoring=scored if searched != rl.policy_space or rl.importance_cap > 0 else nothing,
        update=scored,
        updates=rl.inner_updates,
    )


def search_space(recipe: Recipe) -> str:
    """The space that rollouts rank or draw in."""
    return recipe.rollout.score_space if recipe.rl.negatives == "beam" else "trie"


def uses_reference(recipe: Recipe) -> bool:
    """Whether RL or preference optimisation scores its candidates with a reference."""
    preference = recipe.preference.enabled and recipe.preference.uses_reference
    return ((recipe.rl.enabled and recipe.rl.beta > 0) or preference) and recipe.reference.mode != "off"


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

    Two norms: input (float32), reciprocal deviation, normed row, output, which is the next matrix product's input; the
    one kernel of a CUDA device keeps its input as it is, and no normed row.
    Qwen3's norms of queries and keys: the same without the output, which RoPE does not keep; in fp32 the keys' input is
    a view of queries, keys and values together, which stay with it.
    RoPE: nothing, its tables belong to the pass. Attention: queries, keys and values of a block, the trees' queries
    again, folded into their groups; outputs and the projection's input, log-sum-exp per head. MLP: both halves of its
    first product and its result, without the fused kernel also SiLU's output and a copy of the second half.
    ``full`` recomputation keeps the layer's input only, ``selective`` the
    attention's inputs (the value is a view of queries, keys and values together) in place of what it computes.
    """
    a, w = numbers.bytes, Widths.of(shape, layout)
    if recompute == "full":
        return a * w.hidden * work.tokens
    # of an element: on a CUDA device the input; else the wide input, and the normed row that the weight multiplies
    norm = a if numbers.device == "cuda" else NORM_INPUT + a
    norms = 2 * ((norm + a) * w.hidden + 4)
    if shape.qk_norm:
        norms += norm * (w.query + w.key) + 4 * (w.heads + w.key / w.rotary)
        norms += a * (w.query + w.key) if a == NORM_INPUT and numbers.device != "cuda" else 0
    mlp = (3 if numbers.device == "cuda" else 5) * w.ffn * a
    dropped = 2 * w.hidden * (1 if numbers.device == "cuda" else a) if numbers.dropout else 0
    if recompute == "selective":
        return work.tokens * (norms + mlp + dropped + a * (3 * w.query + 3 * w.key))
    per_token = norms + mlp + dropped + (3 * w.query + 2 * w.key) * a + 4 * w.heads
    return work.tokens * per_token + work.tree * w.query * a


def mask_bytes(shape: Backbone, numbers: Numbers, work: Pass) -> float:
    """The tree's visibility and its additive mask, for all layers: one row per tree token and query head of a group."""
    share = shape.heads // shape.kv_heads
    return work.tree * work.keys * (1 + share * numbers.bytes)


def saved_bytes(
    shape: Backbone, layout: Layout, numbers: Numbers, work: Pass, *, recompute: str, layers: int, last: bool
) -> float:
    """Everything one micro-batch leaves behind on a stage: layers, masks, and on the last stage the final norm.

    On a CUDA device also the tables of RoPE: cosines, sines and the matrices of them.
    """
    w, on_gpu = Widths.of(shape, layout), numbers.device == "cuda"
    final = (numbers.bytes + (0 if on_gpu else NORM_INPUT)) * w.hidden * work.tokens if last else 0.0
    final += 4 * w.rotary * numbers.bytes * work.tokens if on_gpu else 0.0
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
    """Logits of the scored rows on the last stage: a slice of the vocabulary at a time (head.py), or the head rows
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

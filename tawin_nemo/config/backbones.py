"""Backbones by name: one table of shapes. Sources: the models' published ``config.json`` files.

Qwen2.5-1.5B and -3B: hidden, layers, heads and vocabulary were seen in public sources, ``tie_word_embeddings`` is
taken from the family. mistral-7b is v0.3 (full attention); v0.1 has a sliding window of 4096. ``model.init`` with a
Hugging Face directory reads that directory's own config instead.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace

from tawin_nemo.util.errors import ConfigError


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3's frequency scaling (``rope_type: llama3``)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True)
class Backbone:
    """Shape of a decoder of the Qwen2.5, Qwen3 or Llama family (RMSNorm, SwiGLU, grouped-query attention, RoPE)."""

    family: str  # qwen2 (bias on q, k, v) | qwen3 (norms on the heads of q and k) | llama, mistral (neither)
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int  # rows of the embedding as published; 0 = as many as the tokenizer needs
    head_dim: int = 0  # 0 = hidden / heads
    tied: bool = True
    rope_theta: float = 1e6
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    max_position: int = 32768
    init_std: float = 0.02
    window: int = 0  # newest tokens that a token attends to (sliding window); 0 = all of them

    @property
    def kv_channels(self) -> int:
        return self.head_dim or self.hidden // self.heads

    @property
    def qkv_bias(self) -> bool:
        return self.family == "qwen2"

    @property
    def qk_norm(self) -> bool:
        """Each head of queries and of keys is normalised before RoPE (Qwen3)."""
        return self.family == "qwen3"

    @property
    def positions(self) -> int:
        """Tokens of the longest sequence that the model computes exactly: up to its window, all attention is full."""
        return min(self.max_position, self.window) if self.window else self.max_position

    def layer_parameters(self, tp: int = 1) -> int:
        """Parameters of one decoder layer on one of ``tp`` ranks: matrices are divided, norms are not."""
        q, kv = self.heads * self.kv_channels // tp, self.kv_heads * self.kv_channels // tp
        attention = self.hidden * (q + 2 * kv) + q * self.hidden + (q + 2 * kv if self.qkv_bias else 0)
        norms = 2 * self.hidden + (2 * self.kv_channels if self.qk_norm else 0)
        return attention + 3 * self.hidden * self.ffn // tp + norms

    @property
    def body_parameters(self) -> int:
        """Parameters without embedding and LM head."""
        return self.layers * self.layer_parameters() + self.hidden


@dataclass(frozen=True)
class FlopCount:
    """What a forward pass has to compute, whatever it costs an implementation; works add up."""

    tokens: int = 0  # rows through the decoder's layers
    pairs: float = 0.0  # (query, key) pairs of one attention head
    logits: int = 0  # dot products with rows of the LM head

    def __add__(self, other: FlopCount) -> FlopCount:
        return FlopCount(self.tokens + other.tokens, self.pairs + other.pairs, self.logits + other.logits)

    def forward_flops(self, shape: Backbone) -> float:
        """Floating-point operations of the matrix products, two per multiply-add; a training pass costs three times
        as many (forward, and backward to inputs and to weights)."""
        attention = 4.0 * shape.layers * shape.heads * shape.kv_channels * self.pairs  # q.k and p.v
        return 2.0 * shape.body_parameters * self.tokens + attention + 2.0 * shape.hidden * self.logits


_LLAMA3 = RopeScaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192)

BACKBONES: dict[str, Backbone] = {
    "qwen2.5-0.5b": Backbone("qwen2", 896, 24, 14, 2, 4864, 151936),
    "qwen2.5-1.5b": Backbone("qwen2", 1536, 28, 12, 2, 8960, 151936),
    "qwen2.5-3b": Backbone("qwen2", 2048, 36, 16, 2, 11008, 151936),
    "qwen2.5-7b": Backbone("qwen2", 3584, 28, 28, 4, 18944, 152064, tied=False),
    "qwen3-0.6b": Backbone("qwen3", 1024, 28, 16, 8, 3072, 151936, head_dim=128, max_position=40960),
    "qwen3-1.7b": Backbone("qwen3", 2048, 28, 16, 8, 6144, 151936, head_dim=128, max_position=40960),
    "qwen3-4b": Backbone("qwen3", 2560, 36, 32, 8, 9728, 151936, head_dim=128, max_position=40960),
    "qwen3-8b": Backbone("qwen3", 4096, 36, 32, 8, 12288, 151936, head_dim=128, tied=False, max_position=40960),
    "llama-2-7b": Backbone(
        "llama", 4096, 32, 32, 32, 11008, 32000, tied=False, rope_theta=1e4, norm_eps=1e-5, max_position=4096
    ),
    "mistral-7b": Backbone("mistral", 4096, 32, 32, 8, 14336, 32768, tied=False, norm_eps=1e-5),
    "llama-3.2-1b": Backbone(
        "llama", 2048, 16, 32, 8, 8192, 128256, head_dim=64,
        rope_theta=5e5, rope_scaling=_LLAMA3, norm_eps=1e-5, max_position=131072,
    ),
    # Models for CPUs, trained from scratch, same architecture as Qwen2.5; the vocabulary is the tokenizer's.
    "nano": Backbone("qwen2", 32, 2, 4, 2, 64, 0, rope_theta=1e4, max_position=2048),
    "tiny": Backbone("qwen2", 64, 2, 4, 2, 192, 0, rope_theta=1e4, max_position=2048),
    "small-1m": Backbone("qwen2", 128, 4, 4, 4, 512, 0, rope_theta=1e4, max_position=4096),
}  # fmt: skip


def stage_layers(layers: int, stages: int) -> list[int]:
    """Layers of every pipeline stage, spread as evenly as megatron can: the stages between the first and the last hold
    equally many. [] where some stage would then be empty or hold more than ``ceil(layers / stages)``.

    >>> stage_layers(28, 4), stage_layers(3, 2), stage_layers(28, 8), stage_layers(28, 16)
    ([7, 7, 7, 7], [2, 1], [2, 4, 4, 4, 4, 4, 4, 2], [])
    """
    most = -(-layers // stages)
    if layers % stages == 0:
        return [most] * stages
    spreads = []
    for middle in (most - 1, most):
        outer = layers - middle * (stages - 2)
        spread = [-(-outer // 2), *[middle] * (stages - 2), outer // 2]  # the last stage has the head as well
        if min(spread) > 0 and max(spread) == most:
            spreads.append(spread)
    return max(spreads, key=min, default=[])


def backbone(name: str) -> Backbone:
    """The named backbone. Raises ConfigError with the nearest name."""
    if name in BACKBONES:
        return BACKBONES[name]
    near = difflib.get_close_matches(name, BACKBONES, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"model.backbone={name} is not known{hint} Known: {', '.join(BACKBONES)}")


def with_vocab(shape: Backbone, needed: int) -> Backbone:
    """The shape with at least ``needed`` vocabulary rows (published rows are never cut off)."""
    return replace(shape, vocab=max(shape.vocab, needed))

"""Adapters of ``model.lora``: which matrices of a decoder layer they belong to, and their sizes.

megatron-core fuses some of the matrices that Hugging Face keeps apart. Every matrix that is named gets factors of its
own, as in Hugging Face's PEFT, so that adapters mean the same however the matrices are stored.
"""

from __future__ import annotations

from collections.abc import Sequence

from tawin_nemo.config.backbones import Backbone
from tawin_nemo.config.schema import LoraConfig
from tawin_nemo.util.errors import ConfigError

#: megatron-core's linear layers of a decoder layer -> the Hugging Face matrices that each consists of, in this order.
MATRICES = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}
#: Part of the names of all parameters of adapters: ``decoder.layers.0.mlp.linear_fc1.lora.a``.
MARK = ".lora."
#: Those that tensor parallelism cuts along their input; the others are cut along their output.
ROW_PARALLEL = ("linear_proj", "linear_fc2")


def targets(linear: str, lora: LoraConfig) -> tuple[str, ...]:
    """The matrices of a linear layer that get adapters, in the order of ``MATRICES``; none with rank 0.

    >>> targets("linear_qkv", LoraConfig(rank=2, target_modules=["v_proj", "q_proj"]))
    ('q_proj', 'v_proj')
    """
    return tuple(name for name in MATRICES[linear] if lora.rank and name in lora.target_modules)


def training_passes(lora: LoraConfig) -> float:
    """FLOPs of a training pass, in forward passes: forward, backward to the inputs and backward to the weights, which
    frozen weights do not have. Products of the adapters themselves are not counted.

    >>> training_passes(LoraConfig()), training_passes(LoraConfig(rank=8))
    (3.0, 2.0)
    """
    return 2.0 if lora.rank else 3.0


def matrix_shape(shape: Backbone, name: str) -> tuple[int, int]:
    """Outputs and inputs of a Hugging Face matrix of a decoder layer."""
    q, kv = shape.heads * shape.kv_channels, shape.kv_heads * shape.kv_channels
    return {
        "q_proj": (q, shape.hidden), "k_proj": (kv, shape.hidden), "v_proj": (kv, shape.hidden),
        "o_proj": (shape.hidden, q), "gate_proj": (shape.ffn, shape.hidden), "up_proj": (shape.ffn, shape.hidden),
        "down_proj": (shape.hidden, shape.ffn),
    }[name]  # fmt: skip


def layer_parameters(shape: Backbone, lora: LoraConfig, tp: int = 1) -> int:
    """Parameters of the adapters of one decoder layer on one of ``tp`` ranks.

    The factor on the side that is cut is divided over the ranks, the other one is on every rank. A fused matrix has one
    output factor for all its rows, also where not all its parts have adapters.
    """
    count = 0
    for linear, matrices in MATRICES.items():
        named = targets(linear, lora)
        if not named:
            continue
        rows = sum(matrix_shape(shape, name)[0] for name in matrices)
        columns = matrix_shape(shape, matrices[0])[1] * len(named)
        count += rows + columns // tp if linear in ROW_PARALLEL else rows // tp + columns
    return count * lora.rank


def check_lora(shape: Backbone, lora: LoraConfig) -> None:
    """Raises ConfigError for a rank above the smaller side of a matrix: more than that, adapters cannot express."""
    sizes: Sequence[tuple[int, str]] = sorted((min(matrix_shape(shape, name)), name) for name in lora.target_modules)
    if lora.rank and sizes and lora.rank > sizes[0][0]:
        raise ConfigError(
            f"model.lora.rank={lora.rank} is more than the smaller side of {sizes[0][1]}, which is {sizes[0][0]} in "
            f"this backbone; set model.lora.rank to {sizes[0][0]} or less"
        )

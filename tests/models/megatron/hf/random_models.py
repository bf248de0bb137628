"""Small random models of every supported family, made with transformers; no weight at a special value."""

from __future__ import annotations

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB = 37
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 256, "rope_theta": 1e4,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
#: Family (and what is special) -> configuration, model. Qwen3's heads are wider than hidden / heads.
KINDS = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
    "llama": (LlamaConfig, LlamaForCausalLM, {"head_dim": 16, "rope_scaling": LLAMA3}),
    "llama9": (LlamaConfig, LlamaForCausalLM, {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 36}),
    "mistral": (MistralConfig, MistralForCausalLM, {"head_dim": 16, "sliding_window": None}),
}


def random_model(kind: str, *, tied: bool, **keys: object) -> PreTrainedModel:
    """Random weights, none of them at a special value (norms not 1, biases not 0)."""
    torch.manual_seed(7)
    config, model_class, special = KINDS[kind]
    model: PreTrainedModel = model_class(config(**SIZES | special | keys, tie_word_embeddings=tied))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return model.eval()

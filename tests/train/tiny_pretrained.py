"""A tiny random model in Hugging Face form with a tokenizer of the test data's titles."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from tawin_nemo.config.schema import CatalogConfig, DataConfig, ModelConfig
from tawin_nemo.data.interactions import load_dataset
from tawin_nemo.data.tokenizer import build_tokenizer


def write(folder: Path, dataset: Path, *, seed: int = 5) -> Path:
    """The model in ``folder``; its tokenizer knows no codes, and there are spare rows behind its last token."""
    titles = load_dataset(dataset).items.titles
    data = DataConfig(tokenizer="bpe", bpe_vocab_size=320)
    tokenizer = build_tokenizer(data, CatalogConfig(), ModelConfig(), titles, None)
    tokenizer.save(folder)
    torch.manual_seed(seed)
    shape = Qwen2Config(
        vocab_size=tokenizer.size + 7, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=24, max_position_embeddings=256, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen2ForCausalLM(shape).save_pretrained(folder)
    return folder

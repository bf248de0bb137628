"""Hugging Face import and export under every layout: right scores, and the files bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tawin_nemo.config.schema import ModelConfig
from tawin_nemo.models.megatron.parallel import runtime
from tests.distributed.hf_worker import EXTRA_TOKENS, convert, tokens
from tests.distributed.launch import launch

WORKER = Path(__file__).parent / "hf_worker.py"
SCORE_ATOL = 1e-5  # float32, another order of the sums
#: 37 and 43 (extended) vocabulary rows are padded under TP 2.
SIZES = {
    "vocab_size": 37, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64, "rope_theta": 1e4,
}  # fmt: skip
MODELS = {
    "qwen2-tied": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "qwen3-untied": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=False)),
    "llama-untied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False)),
}


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Random models, and beside each what one process makes of it."""
    root = tmp_path_factory.mktemp("hf")
    runtime.initialize(ModelConfig(), seed=1)
    for name, make in MODELS.items():
        torch.manual_seed(5)
        model = make()
        with torch.no_grad():
            for tensor in model.parameters():
                tensor.normal_(0.3, 0.2)
        model.save_pretrained(root / name)
        for extra in (0, EXTRA_TOKENS):
            convert(root / name, root / "one_process" / f"{name}+{extra}", ModelConfig(), extra)
    return [root / name for name in MODELS]


TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("processes", "model"),
    [
        pytest.param(2, TP2, id="tp2"),
        pytest.param(2, PP2, id="pp2"),
        pytest.param(4, {**TP2, **PP2, "sequence_parallel": True}, id="tp2-pp2-sp"),
        pytest.param(2, {}, id="dp2"),
    ],
)
def test_layout_imports_and_exports(processes: int, model: dict[str, Any], sources: list[Path], tmp_path: Path) -> None:
    launch(WORKER, processes, json.dumps(model), str(tmp_path), *map(str, sources), folder=tmp_path)
    scores = json.loads((tmp_path / "scores.json").read_text())
    for source in sources:
        original, exported = read(source), read(tmp_path / f"{source.name}+0")
        for name, tensor in original.items():
            assert torch.equal(exported[name], tensor), name
        assert exported.keys() == original.keys()

        extended = f"{source.name}+{EXTRA_TOKENS}"
        expected, got = read(source.parent / "one_process" / extended), read(tmp_path / extended)
        assert got["model.embed_tokens.weight"].shape[0] == SIZES["vocab_size"] + EXTRA_TOKENS
        assert got.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(got[name], tensor), name

        for folder in (source, tmp_path / extended):
            name = extended if folder.name == extended else f"{source.name}+0"
            with torch.no_grad():
                logits = AutoModelForCausalLM.from_pretrained(folder)(tokens()[:, :-1]).logits
            logp = torch.log_softmax(logits, -1).gather(-1, tokens()[:, 1:, None]).flatten()
            assert logp.std() > 0.1
            torch.testing.assert_close(torch.tensor(scores[name]), logp, atol=SCORE_ATOL, rtol=SCORE_ATOL)

"""A model with adapters, exported: transformers computes the same logits with the merged weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tawin_nemo.config.schema import LoraConfig, ModelConfig
from tawin_nemo.models.megatron.decode.lm import MegatronLM
from tawin_nemo.models.megatron.hf.config import backbone_from_hf
from tawin_nemo.models.megatron.hf.io import load_hf, save_hf
from tawin_nemo.models.megatron.model.adapters import add_adapters
from tawin_nemo.models.megatron.model.build import build_model
from tawin_nemo.models.megatron.model.head import full_logits_NV
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.types import TokenRows
from tests.models.megatron.hf.random_models import VOCAB, random_model

#: float32, factors against merged weights, another order of the sums; logits are of order 10.
LOGITS_ATOL = 2e-4


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
def test_transformers_computes_the_logits_of_the_adapted_model(kind: str, tmp_path: Path) -> None:
    random_model(kind, tied=kind == "qwen2").save_pretrained(tmp_path / "base")
    shape = backbone_from_hf(tmp_path / "base")
    runtime.initialize(ModelConfig(), seed=0)
    model = build_model(shape, ModelConfig(), seed=1, to_be_loaded=True)
    load_hf(model, shape, tmp_path / "base")
    add_adapters(model, shape, LoraConfig(rank=4, alpha=8.0), seed=2, base={})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora.b"):
                parameter.normal_(0.0, 0.2, generator=torch.Generator().manual_seed(3))
    save_hf(model, shape, tmp_path / "merged")
    tokens = torch.randint(0, VOCAB, (1, 9), generator=torch.Generator().manual_seed(4))
    cache = MegatronLM(model.eval(), shape).prefill(TokenRows.from_lists([tokens[0].numpy()]))
    assert cache.hidden_RD is not None
    ours = full_logits_NV(model, cache.hidden_RD)[0]
    theirs, before = (
        AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.float32)(tokens).logits[0, -1]
        for folder in ("merged", "base")
    )
    assert (ours - before).abs().max() > 0.1
    torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=LOGITS_ATOL)

"""A published checkpoint, SmolLM2-135M-Instruct: what megatron computes with it is what transformers computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tawin_nemo.config.schema import ModelConfig
from tawin_nemo.data.tokenizer import Tokenizer
from tawin_nemo.models.megatron.hf.config import backbone_from_hf
from tawin_nemo.models.megatron.hf.io import load_hf
from tawin_nemo.models.megatron.model.build import build_model
from tawin_nemo.models.megatron.model.head import full_logits_NV
from tawin_nemo.models.megatron.parallel import runtime

pytestmark = pytest.mark.slow

#: float32 through 30 layers, another order of the sums; the logits' standard deviation is above 3.
LOGITS_ATOL = 2e-3
TEXT = "The capital of France is Paris. Water boils at 100 degrees Celsius, and a steel ruler of 30 cm"
#: Ids that transformers' own reader of the GGUF file gives these words (behind a start token, which is not wanted).
KNOWN_IDS = {"The capital of France is": [504, 3575, 282, 4649, 314], " cm": [5973], "<|im_end|>": [2]}
TEXTS = [
    TEXT, "Steel ruler, 30 cm", 'M8 x 1.25" bolt (Pack of 10)', "café №5 日本 ▁x", " two  spaces \n", "12345", "",
    "3/8-Inch #10-32 UNF, 1/4'", "<|im_start|>user\nhello<|im_end|>",
]  # fmt: skip


@torch.no_grad()
def test_logits_equal_those_of_transformers(smollm2: Path) -> None:
    """Also the continuation that shows that the weights mean something."""
    theirs = AutoModelForCausalLM.from_pretrained(smollm2).eval()
    tokens_BT = torch.tensor([AutoTokenizer.from_pretrained(smollm2)(TEXT)["input_ids"]])
    expected_TV = theirs(tokens_BT).logits[0]
    del theirs  # one copy of the weights at a time
    runtime.initialize(ModelConfig(), seed=0)
    shape = backbone_from_hf(smollm2)
    model = build_model(shape, ModelConfig(), seed=0, to_be_loaded=True)
    load_hf(model, shape, smollm2)
    logits_TV = full_logits_NV(model, model.eval()(tokens_BT, None, None)[:, 0])
    assert expected_TV.std() > 3
    torch.testing.assert_close(logits_TV, expected_TV, atol=LOGITS_ATOL, rtol=0)
    assert Tokenizer.load(smollm2).decode([int(logits_TV[4].argmax())]) == " Paris"


def test_the_tokenizer_reads_back_what_it_writes(smollm2: Path) -> None:
    """Ours and transformers' object for the folder agree; text comes back to the byte."""
    ours, theirs = Tokenizer.load(smollm2), AutoTokenizer.from_pretrained(smollm2)
    assert (ours.eos_token, ours.size, len(theirs)) == ("<|im_end|>", 49152, 49152)
    for text, row in zip(TEXTS, ours.encode_batch(TEXTS), strict=True):
        assert theirs(text)["input_ids"] == row.tolist()
        assert ours.decode(row) == theirs.decode(row) == text
    for text, ids in KNOWN_IDS.items():
        assert ours.encode_batch([text])[0].tolist() == ids
    assert len(ours.encode_batch(["2024"])[0]) == 4

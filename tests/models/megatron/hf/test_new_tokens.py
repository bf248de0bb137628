"""Tokens that pretrained weights do not know: what their rows begin with, and training nothing else."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tawin_nemo.config.backbones import with_vocab
from tawin_nemo.config.schema import ModelConfig, TrainerConfig
from tawin_nemo.data.trees import tree_batch
from tawin_nemo.models.megatron.hf.config import backbone_from_hf
from tawin_nemo.models.megatron.hf.io import load_hf
from tawin_nemo.models.megatron.hf.new_tokens import NewTokens, freeze_others
from tawin_nemo.models.megatron.model.build import build_model
from tawin_nemo.models.megatron.optim.trainable import MicroBatch, Trainable
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.types import TokenRows
from tests.models.megatron.hf.test_io import VOCAB, random_model

#: Two inside the file's matrix, as Qwen's spare rows are, and three behind it.
NEW = np.array([33, 36, 37, 38, 40])
ROWS = VOCAB + 4
MEAN_ATOL = 1e-6


def loaded(folder: Path, new: NewTokens | None, precision: str = "fp32"):
    cfg = ModelConfig(precision=precision)
    runtime.initialize(cfg, seed=0)
    shape = with_vocab(backbone_from_hf(folder), ROWS)
    model = build_model(shape, cfg, seed=3)
    drawn = {name: value.detach().clone() for name, value in model.named_parameters()}
    load_hf(model, shape, folder, new)
    return shape, model, drawn


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random_model("qwen2", tied=False).save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.mark.parametrize("words", [None, [[1, 2, 2], [], [5], [0, 9], []]], ids=["mean", "text"])
def test_new_rows_begin_with_a_mean_and_noise(folder: Path, words: list[list[int]] | None) -> None:
    new = NewTokens(NEW, None if words is None else TokenRows.from_lists(words))
    _, model, drawn = loaded(folder, new)
    theirs = random_model("qwen2", tied=False)
    sides = {
        "embedding.word_embeddings.weight": theirs.model.embed_tokens.weight,
        "output_layer.weight": theirs.lm_head.weight,
    }
    named = dict(model.named_parameters())
    for name, file_VD in sides.items():
        for place, token in enumerate(NEW):
            chosen = words[place] if words else []
            begin = file_VD[chosen].mean(0) if chosen else file_VD.mean(0)
            torch.testing.assert_close(named[name][token], begin + drawn[name][token], atol=MEAN_ATOL, rtol=0)
            assert drawn[name][token].abs().max() > 0
        known = [row for row in range(VOCAB) if row not in NEW]
        assert torch.equal(named[name][known], file_VD[known])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("distributed", [False, True], ids=["plain", "distributed-optimizer"])
def test_nothing_but_the_new_rows_changes(folder: Path, distributed: bool, precision: str) -> None:
    new = NewTokens(NEW)
    shape, model, _ = loaded(folder, new, precision)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    freeze_others(model, new)
    trainer = TrainerConfig(distributed_optimizer=distributed, weight_decay=0.1)
    trainable = Trainable(model, shape, trainer, lr=1e-2)
    tokens = torch.randint(0, ROWS, (6, 9), generator=torch.Generator().manual_seed(1)).numpy()
    tokens[:, 4] = NEW[[0, 1, 2, 3, 4, 0]]
    first, others = (TokenRows.from_lists(list(part)) for part in (tokens[:, :1], tokens[:, 1:]))
    batch, _ = tree_batch(first, others, np.arange(len(tokens)), None)
    for _ in range(3):
        stats = trainable.update([MicroBatch(batch, lambda logp_N: (-logp_N.mean(), {}))], lr=1e-2)
        assert stats["grad_norm"] > 0
    for name, value in model.named_parameters():
        same = value == before[name]
        if "word_embeddings" in name or "output_layer" in name:
            moved = (~same).any(dim=1).nonzero().flatten().tolist()
            assert moved == NEW.tolist(), name
        else:
            assert same.all(), name

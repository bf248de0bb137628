"""What every rank of a layout runs: import, score, export; for each of several Hugging Face folders."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch

from tawin_nemo.config.backbones import with_vocab
from tawin_nemo.config.schema import ModelConfig
from tawin_nemo.data.trees import tree_batch
from tawin_nemo.models.megatron.hf.config import backbone_from_hf
from tawin_nemo.models.megatron.hf.io import load_hf, save_hf
from tawin_nemo.models.megatron.model.build import build_model
from tawin_nemo.models.megatron.optim.trainable import score
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.types import TokenBatch, TokenRows

SEED, EXTRA_TOKENS = 3, 6
ROWS, LENGTH = 2, 9


def tokens() -> torch.Tensor:
    """Fixed rows [ROWS, LENGTH + 1] over the first 30 tokens."""
    return torch.randint(0, 30, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(1))


def batch() -> TokenBatch:
    """Every token of the rows but their first is scored."""
    flat = TokenRows.from_lists([row[1:].numpy() for row in tokens()])
    return tree_batch(TokenRows.from_lists([row[:1].numpy() for row in tokens()]), flat, np.arange(ROWS), None)[0]


def convert(source: Path, target: Path, cfg: ModelConfig, extra: int) -> list[float]:
    """Import ``source`` with ``extra`` new vocabulary rows, export to ``target``; the scores of the fixed rows."""
    shape = backbone_from_hf(source)
    shape = with_vocab(shape, shape.vocab + extra)
    model = build_model(shape, cfg, seed=SEED)
    load_hf(model, shape, source)
    save_hf(model, shape, target, max_shard_bytes=10_000)
    return score(model, [batch()])[0].tolist()


def main() -> None:
    cfg, root = ModelConfig(**json.loads(sys.argv[1])), Path(sys.argv[2])
    sources = [Path(name) for name in sys.argv[3:]]
    runtime.initialize(cfg, seed=1)
    scores = {}
    for source in sources:
        for extra in (0, EXTRA_TOKENS):
            name = f"{source.name}+{extra}"
            scores[name] = convert(source, root / name, cfg, extra)
    if runtime.world_rank() == 0:
        (root / "scores.json").write_text(json.dumps(scores))
    runtime.barrier()
    runtime.shutdown()


if __name__ == "__main__":
    main()

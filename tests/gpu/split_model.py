"""Updates and searches of one model under TP 2 with sequence parallelism, in a given order; two processes.

Run by torchrun: ``-m tests.gpu.split_model PRECISION update,search,...``. Fails unless every loss is finite, every
search agrees on both ranks, and the last search agrees with that of a new model with the same weights.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys

import torch
import torch.distributed as dist
from torch import Tensor

from tawin_nemo.config.backbones import Backbone
from tawin_nemo.config.schema import ModelConfig, TrainerConfig
from tawin_nemo.models.megatron.decode.lm import MegatronLM
from tawin_nemo.models.megatron.model.build import build_model
from tawin_nemo.models.megatron.optim.trainable import Trainable
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.types import TokenRows
from tests.gpu.workload import TINY, Workload

#: A width that FP8 can cut under TP 2, and blocks of 128.
SHAPE = Backbone("qwen2", 256, 2, 4, 2, 512, 211, rope_theta=1e4, max_position=256, init_std=0.05)
#: Scales of delayed scaling follow the maxima of passes before; the others depend on the weights alone.
TOLERANCE = {"fp8-delayed": 0.3, "fp8-tensorwise": 0.05, "fp8-blockwise": 0.05, "bf16": 1e-2, "fp32": 1e-5}


def run_split_model(precision: str, order: str) -> None:
    """Start both processes. Raises AssertionError with their output when one fails."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    words = [*command, "-m", "tests.gpu.split_model", precision, order]
    done = subprocess.run(
        words, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def search(model: torch.nn.Module) -> Tensor:
    """Log-probs of some tokens behind two prompts and a chain below each."""
    lm, tokens, rows = MegatronLM(model, SHAPE), torch.arange(2, 40), torch.arange(2)
    cache = lm.extend(
        lm.prefill(TokenRows.from_lists([[5, 9, 3, 30], [7, 2]])), rows, TokenRows.from_lists([[11, 12], [13]])
    )
    ends = torch.tensor([3, 4])
    scores = lm.logprobs(cache, ends, rows.repeat_interleave(len(tokens)), tokens.repeat(2), "vocab")
    first = scores.clone()
    dist.broadcast(first, src=0)
    assert torch.equal(scores, first), "the ranks disagree"
    return scores


def main(precision: str, order: str) -> None:
    cfg = ModelConfig(precision=precision, tensor_model_parallel_size=2, sequence_parallel=True)
    runtime.initialize(cfg, seed=0)
    trainable = Trainable(build_model(SHAPE, cfg, seed=1), SHAPE, TrainerConfig(), lr=1e-3)
    load = Workload(TINY)
    for step, word in enumerate(order.split(",")):
        if word == "search":
            assert search(trainable.model).isfinite().all()
        else:
            loss = trainable.update(list(load.micro_batches(step)), lr=1e-3)["loss"]
            assert math.isfinite(loss), loss
    fresh = build_model(SHAPE, cfg, seed=2)
    fresh.load_state_dict(trainable.model.state_dict())
    torch.testing.assert_close(search(trainable.model), search(fresh), rtol=0, atol=TOLERANCE[precision])
    runtime.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])

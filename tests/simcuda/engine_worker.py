"""One rank of ``test_engine.py``: a model of Transformer Engine's layers through one order of searches and updates.

``python -m tests.simcuda.engine_worker JSON``, with keys ``engine`` (folder), ``model`` (keys of section model),
``steps`` (search, update, score, save, load, load:PRECISION) and ``out``. Rank 0 writes what it saw to ``out``.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tests.simcuda import device
from tests.simcuda.fake_engine import QUANTISED, import_engine


def main(given: dict[str, Any]) -> None:
    """Run the steps; any fault of the device, and any error of the engine, ends the process with its traceback."""
    with device.visible():
        import_engine(Path(given["engine"]))
    device.install()
    result = _steps(given)
    assert not device.FAULTS, device.FAULTS
    if int(os.environ.get("RANK", "0")) == 0:
        Path(given["out"]).write_text(json.dumps(result), encoding="utf-8")


def _steps(given: dict[str, Any]) -> dict[str, Any]:
    from tawin_nemo.config.backbones import Backbone
    from tawin_nemo.config.schema import ModelConfig, TrainerConfig
    from tawin_nemo.models.megatron.checkpoint import checkpoint
    from tawin_nemo.models.megatron.model.build import build_model
    from tawin_nemo.models.megatron.optim.trainable import Trainable
    from tawin_nemo.models.megatron.parallel import runtime
    from tests.gpu.workload import TINY, Workload

    shape = Backbone("qwen2", 256, 4, 4, 2, 512, 211, rope_theta=1e4, max_position=256, init_std=0.05)
    cfg, load = ModelConfig(**given["model"]), Workload(TINY)
    runtime.initialize(cfg, seed=0)
    model = build_model(shape, cfg, seed=1)
    trainable = Trainable(model, shape, TrainerConfig(), lr=1e-3)
    path = Path(given["out"]).with_suffix(".step_1")
    result: dict[str, Any] = {"layers": sorted({type(module).__name__ for module in model.modules()}), "seen": []}
    for step in given["steps"]:
        QUANTISED.clear()
        verb, _, other = step.partition(":")
        if verb == "search":
            shown: Any = _search(model, shape)
        elif verb == "update":
            shown = trainable.update(list(load.micro_batches(0)), lr=1e-3)
        elif verb == "score":
            shown = tuple(trainable.score([next(load.micro_batches(0)).batch])[0].shape)
        elif verb == "save":
            shown = checkpoint.save_checkpoint(path, model=model, trainable=trainable, state={"saved": 1})
        elif other:
            into = build_model(shape, replace(cfg, precision=other), seed=2)
            shown = checkpoint.load_checkpoint(path, model=into)["saved"]
        else:
            shown = checkpoint.load_checkpoint(path, model=model, trainable=trainable)["saved"]
        kinds = sorted({(kind, reduced) for kind, reduced, _ in QUANTISED})
        result["seen"].append({"step": step, "shown": shown if step != "save" else None, "quantised": kinds})
    runtime.shutdown()
    return result


def _search(model: Any, shape: Any) -> list[int]:
    """Shape of the log-probs behind the prompts, after a prefill and an extension."""
    from tawin_nemo.models.megatron.decode.lm import MegatronLM
    from tawin_nemo.types import TokenRows

    lm = MegatronLM(model, shape)
    cache = lm.prefill(TokenRows.from_lists([[5, 9, 3, 30], [7, 2]]))
    cache = lm.extend(cache, torch.arange(2), TokenRows.from_lists([[11, 12], [13]]))
    rows, tokens = torch.arange(2), torch.arange(2, 40)
    logp_E = lm.logprobs(cache, rows, rows.repeat_interleave(len(tokens)), tokens.repeat(2), "vocab")
    assert bool(torch.isfinite(logp_E).all())
    return list(logp_E.shape)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

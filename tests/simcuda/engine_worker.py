"""One rank of ``test_engine.py``: models of Transformer Engine's layers through orders of searches and updates.

``python -m tests.simcuda.engine_worker JSON``, with keys ``engine`` (folder), ``out`` and ``cases``: name -> ``model``
(keys of section model) and ``steps`` (search, update, score, save, load, load:PRECISION, beside:PRECISION). Rank 0
writes what it saw, or the traceback of a case that failed, to ``out``. ``beside`` searches twice as rollouts in another
precision do, whose model shares the weights, and gives the weights that were quantised in each of the two searches.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tests.simcuda import device
from tests.simcuda.fake_engine import ACCUMULATED, QUANTISED, QUANTISED_WEIGHTS, import_engine, reset


def main(given: dict[str, Any]) -> None:
    """All cases, each with a model of its own."""
    with device.visible():
        import_engine(Path(given["engine"]))
    device.install()
    from tawin_nemo.models.megatron.parallel import runtime

    results: dict[str, Any] = {}
    out = Path(given["out"])
    for name, case in given["cases"].items():
        device.FAULTS.clear()
        reset()
        try:
            results[name] = _steps(case, out.with_name(f"{name}.step_1"))
            assert not device.FAULTS, device.FAULTS
        except Exception:
            results[name] = {"error": traceback.format_exc()}
    runtime.shutdown()
    if int(os.environ.get("RANK", "0")) == 0:
        out.write_text(json.dumps(results), encoding="utf-8")


def _steps(case: dict[str, Any], saved: Path) -> dict[str, Any]:
    from tawin_nemo.config.backbones import Backbone
    from tawin_nemo.config.schema import ModelConfig, TrainerConfig
    from tawin_nemo.models.megatron.model.build import build_model
    from tawin_nemo.models.megatron.optim.trainable import Trainable
    from tawin_nemo.models.megatron.parallel import runtime

    shape = Backbone("qwen2", 256, 4, 4, 2, 512, 211, rope_theta=1e4, max_position=256, init_std=0.05)
    cfg = ModelConfig(**case["model"])
    runtime.initialize(cfg, seed=0)
    model = build_model(shape, cfg, seed=1)
    trainable = Trainable(model, shape, TrainerConfig(), lr=1e-3)
    result: dict[str, Any] = {"layers": sorted({type(module).__name__ for module in model.modules()}), "seen": []}
    engines: dict[str, Any] = {}
    for step in case["steps"]:
        QUANTISED.clear()
        QUANTISED_WEIGHTS.clear()
        ACCUMULATED.clear()
        shown = _step(step, trainable, cfg, saved, engines)
        kinds = sorted({(kind, reduced) for kind, reduced, _ in QUANTISED})
        counts = {"weights_quantised": len(QUANTISED_WEIGHTS), "accumulated": sorted(set(ACCUMULATED))}
        result["seen"].append({"step": step, "shown": shown, "quantised": kinds, **counts})
    return result


def _step(step: str, trainable: Any, cfg: Any, saved: Path, engines: dict[str, Any]) -> Any:
    """What the step returns, as far as JSON takes it."""
    from tawin_nemo.models.megatron.checkpoint import checkpoint
    from tawin_nemo.models.megatron.model.build import build_model
    from tests.gpu.workload import TINY, Workload

    verb, _, precision = step.partition(":")
    model, load = trainable.model, Workload(TINY)
    if verb == "beside":
        return _beside(trainable, cfg, precision, load, engines)
    if verb == "search":
        return _search(model, trainable.shape)
    if verb == "update":
        return trainable.update(list(load.micro_batches(0)), lr=1e-3)
    if verb == "score":
        return len(trainable.score([next(load.micro_batches(0)).batch])[0])
    if verb == "save":
        return checkpoint.save_checkpoint(saved, model=model, trainable=trainable, state={"saved": 1})
    if precision:
        model = build_model(trainable.shape, replace(cfg, precision=precision), seed=2)
        return checkpoint.load_checkpoint(saved, model=model)["saved"]
    return checkpoint.load_checkpoint(saved, model=model, trainable=trainable)["saved"]


def _beside(trainable: Any, cfg: Any, precision: str, load: Any, engines: dict[str, Any]) -> list[int]:
    """Weights that were quantised in each of two rollouts in ``precision``, behind weights that have just changed."""
    from tawin_nemo.config.schema import Recipe, RolloutConfig
    from tawin_nemo.placement.weight_sync import build_engine, check_equal

    recipe = replace(Recipe(), model=cfg, rollout=RolloutConfig(precision=precision))
    if precision not in engines:
        engines[precision] = build_engine(recipe, trainable.model, trainable.shape, load.catalog)
    engine = engines[precision]
    engine.receive_weights()
    check_equal(engine)
    options = {"negatives": "beam", "policy_space": "trie", "step": 0}
    seen = []
    for _ in range(2):
        QUANTISED_WEIGHTS.clear()
        engine.generate(load.prompt_batch(0), 4, **options)
        seen.append(len(QUANTISED_WEIGHTS))
    return seen


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

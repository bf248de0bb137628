"""Transformer Engine's own Python under megatron-core, over a made-up extension (``fake_engine``): bf16 and FP8.

Its compiled part runs on GPUs only. Everything above it is real here: which layers are built and how, what is quantised
when and with whose scale, padding, sequence-parallel gathers, gradients in megatron's buffers, checkpoints.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.launch import free_port
from tests.train.runs import ROOT, importable

VARIABLE = "TAWIN_TE_PACKAGE"
LIMIT = 400
PRECISIONS = ("bf16", "fp8-blockwise", "fp8-tensorwise", "fp8-delayed")
#: What TE's Python decides at a module's first FP8 pass must hold for searches and updates, whichever comes first.
ORDERS = {"search_first": ["search", "update", "search"], "update_first": ["update", "update", "score", "search"]}
pytestmark = [pytest.mark.full, pytest.mark.slow]


@pytest.fixture(scope="module")
def engine():
    """The folder with the unpacked wheel."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = Path(os.environ.get(VARIABLE, cache / "tawin_nemo" / "transformer_engine"))
    if not (folder / "transformer_engine" / "pytorch").is_dir():
        pytest.skip(
            f"no Transformer Engine in {folder} ({VARIABLE}); `bash tests/simcuda/fetch_te.sh` unpacks it there"
        )
    return folder


def seen(engine, out, *, tp, steps, **model):
    """What rank 0 saw in each step."""
    model |= {"tensor_model_parallel_size": tp, "sequence_parallel": tp > 1}
    given = json.dumps({"engine": str(engine), "model": model, "steps": steps, "out": str(out)})
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(tp)}
    command = [sys.executable, "-W", "ignore", "-m", "tests.simcuda.engine_worker", given]
    logs = [out.with_suffix(f".{rank}.log") for rank in range(tp)]
    ranks = []
    for rank, log in enumerate(logs):
        env = {**importable(), **place, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        with log.open("wb") as file:
            ranks.append(subprocess.Popen(command, env=env, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT))
    try:
        codes = [rank.wait(LIMIT) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert codes == [0] * tp, "\n".join(log.read_text(errors="replace")[-3000:] for log in logs)
    return json.loads(out.read_text())


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_searches_and_updates_in_any_order(precision, order, tp, engine, tmp_path):
    others = [other for other in ("bf16", "fp8-tensorwise") if other != precision]
    steps = [*ORDERS[order], "save", "load", *(f"load:{other}" for other in others)]
    result = seen(engine, tmp_path / "seen.json", tp=tp, steps=steps, precision=precision)
    assert [step["step"] for step in result["seen"]] == steps
    if precision == "bf16":
        return
    assert {"TEColumnParallelLinear", "TERowParallelLinear"} <= set(result["layers"])
    quantised = {tuple(pair) for step in result["seen"] for pair in step["quantised"]}
    assert {kind for kind, _ in quantised} == {
        {
            "fp8-blockwise": "Float8BlockQuantizer",
            "fp8-tensorwise": "Float8CurrentScalingQuantizer",
            "fp8-delayed": "Float8Quantizer",
        }[precision]
    }
    # each rank quantises its part of the tokens: scales of what is gathered afterwards must be common to all ranks
    assert (("Float8CurrentScalingQuantizer", True) in quantised) == (precision == "fp8-tensorwise" and tp > 1)
    if precision == "fp8-tensorwise" and tp > 1:
        for step in result["seen"]:
            if step["step"] in ("search", "update"):
                assert ["Float8CurrentScalingQuantizer", True] in step["quantised"], step


@pytest.mark.parametrize("precision", PRECISIONS[1:3])
def test_layers_at_the_ends_in_bf16(precision, engine, tmp_path):
    ends = {"num_layers_at_start_in_bf16": 1, "num_layers_at_end_in_bf16": 1}
    result = seen(engine, tmp_path / "seen.json", tp=1, steps=["update", "search"], precision=precision, **ends)
    assert result["seen"][0]["quantised"]


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("precision", PRECISIONS[:2])
def test_recomputation(precision, recompute, engine, tmp_path):
    seen(engine, tmp_path / "seen.json", tp=1, steps=["update", "update"], precision=precision, recompute=recompute)

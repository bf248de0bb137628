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

from tawin_nemo.models.megatron.model.precision import FP8
from tests.distributed.launch import free_port
from tests.train.runs import ROOT, importable

VARIABLE = "TAWIN_TE_PACKAGE"
LIMIT = 500
PRECISIONS = ("bf16", "fp8-blockwise", "fp8-tensorwise", "fp8-delayed")
QUANTISERS = {
    "bf16": set(), "fp8-blockwise": {"Float8BlockQuantizer"}, "fp8-tensorwise": {"Float8CurrentScalingQuantizer"},
    "fp8-delayed": {"Float8Quantizer"},
}  # fmt: skip
#: Those that may keep the layers at the ends in bf16.
OPTIONAL = ("fp8-blockwise", "fp8-tensorwise")
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


def launched(engine, out, tp, cases):
    """What rank 0 saw in each case: name -> (steps, keys of section model)."""
    layout = {"tensor_model_parallel_size": tp, "sequence_parallel": tp > 1}
    named = {name: {"steps": steps, "model": {**layout, **model}} for name, (steps, model) in cases.items()}
    given = json.dumps({"engine": str(engine), "out": str(out), "cases": named})
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


def steps_of(order, precision):
    """The order, then a checkpoint that models of this and other precisions load."""
    others = [other for other in ("bf16", "fp8-tensorwise") if other != precision]
    return [*ORDERS[order], "save", "load", *(f"load:{other}" for other in others)]


@pytest.fixture(scope="module", params=[(order, tp) for tp in (1, 2) for order in ORDERS], ids=str)
def ordered(request, engine, tmp_path_factory):
    """TP size, order and results of all precisions."""
    order, tp = request.param
    cases = {precision: (steps_of(order, precision), {"precision": precision}) for precision in PRECISIONS}
    return tp, order, launched(engine, tmp_path_factory.mktemp("engine") / "seen.json", tp, cases)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_searches_and_updates_in_any_order(precision, ordered):
    tp, order, results = ordered
    result = results[precision]
    assert "error" not in result, result["error"]
    assert [step["step"] for step in result["seen"]] == steps_of(order, precision)
    assert {"TEColumnParallelLinear", "TERowParallelLinear"} <= set(result["layers"]) or precision == "bf16"
    added = {tuple(pair) for step in result["seen"] for pair in step["accumulated"]}
    if precision == "bf16":  # megatron's own layers, without apex: added to float32 by Transformer Engine's product
        assert added == {("torch.bfloat16", "torch.float32")}
    assert {total for _, total in added} == {"torch.float32"}
    quantised = {tuple(pair) for step in result["seen"] for pair in step["quantised"]}
    assert {kind for kind, _ in quantised} == QUANTISERS[precision]
    # a search quantises weights in its prefill alone: of four layers with four weights each
    searched = [step["weights_quantised"] for step in result["seen"] if step["step"] == "search"]
    once = 0 if precision == "bf16" else WEIGHTS
    begins = precision == "fp8-delayed" and order == "search_first"
    first = 2 * once if begins else once  # a pass of its own makes the scales
    assert searched == [first, *[once] * (len(searched) - 1)]
    # each rank quantises its part of the tokens: the scales of what is gathered then must be common to all ranks
    for step in result["seen"]:
        if step["step"] in ("search", "update") and precision == "fp8-tensorwise":
            assert (["Float8CurrentScalingQuantizer", True] in step["quantised"]) == (tp > 1), step


#: (precision of training, of rollouts); a rollout quantises the four weights of each of four layers, once.
PAIRS = (
    ("bf16", "fp8-blockwise"), ("bf16", "fp8-tensorwise"), ("fp8-blockwise", "bf16"), ("fp8-delayed", "bf16"),
    ("fp8-blockwise", "model"), ("fp8-tensorwise", "fp8-blockwise"), ("fp8-delayed", "model"),
)  # fmt: skip
WEIGHTS = 16


@pytest.fixture(scope="module", params=[1, 2], ids="tp{}".format)
def paired(request, engine, tmp_path_factory):
    cases = {
        f"{trained} {rollout}": (
            [f"beside:{rollout}", "update", f"beside:{rollout}", "update", f"beside:{rollout}"], {"precision": trained}
        )
        for trained, rollout in PAIRS
    }  # fmt: skip
    return launched(engine, tmp_path_factory.mktemp("paired") / "seen.json", request.param, cases)


@pytest.mark.parametrize("pair", PAIRS, ids="/".join)
def test_training_and_rollouts_have_their_own_precision(pair, paired):
    """Every rollout behind an update quantises the weights once, however many model calls it makes."""
    result = paired[" ".join(pair)]
    assert "error" not in result, result["error"]
    kept = [step["shown"] for step in result["seen"] if step["step"].startswith("beside")]
    searched = pair[0] if pair[1] == "model" else pair[1]
    once = [WEIGHTS if searched in FP8 else 0, 0]
    first = [2 * WEIGHTS, 0] if searched == "fp8-delayed" else once  # a pass of its own makes its scales
    assert kept == [first, once, once]


@pytest.fixture(scope="module")
def options(engine, tmp_path_factory):
    ends = {"num_layers_at_start_in_bf16": 1, "num_layers_at_end_in_bf16": 1}
    cases = {f"ends {precision}": (["update", "search"], {"precision": precision, **ends}) for precision in OPTIONAL}
    for recompute in ("selective", "full"):
        for precision in ("bf16", *OPTIONAL):
            keys = {"precision": precision, "recompute": recompute}
            cases[f"{recompute} {precision}"] = (["update", "search", "update"], keys)
    return launched(engine, tmp_path_factory.mktemp("engine") / "seen.json", 1, cases)


@pytest.mark.parametrize("precision", OPTIONAL)
def test_layers_at_the_ends_in_bf16(precision, options):
    result = options[f"ends {precision}"]
    assert "error" not in result, result["error"]
    assert {kind for kind, _ in result["seen"][0]["quantised"]} == QUANTISERS[precision]


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("precision", ["bf16", *OPTIONAL])
def test_recomputation(precision, recompute, options):
    result = options[f"{recompute} {precision}"]
    assert "error" not in result, result["error"]

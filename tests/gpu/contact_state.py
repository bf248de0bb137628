"""Parts of ``first_contact.sh`` about state: checkpoints, equal bytes, a whole pipeline."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from tawin_nemo.config.schema import TrainerConfig
from tawin_nemo.models.megatron.checkpoint import checkpoint
from tawin_nemo.models.megatron.checkpoint.files import Ranks
from tawin_nemo.models.megatron.optim.trainable import Trainable
from tawin_nemo.run import determinism
from tests.gpu import parts
from tests.gpu.contact_common import clock, fresh, out, pretend_if_asked, tiny_rows, trainable_of
from tests.gpu.workload import Sizes, Workload, is_pretended


def checkpoints() -> dict[str, Any]:
    """Seconds of a checkpoint's copy to the host, of writing with checksums, of loading, and of an offload and back."""
    given, folder = tiny_rows(1), out("checkpoint")
    trainable = trainable_of(given, TrainerConfig(offload_optimizer=True))
    trainable.update(list(Workload(given).micro_batches(0)), lr=given.lr)
    model, times = trainable.model, {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        begin = clock()
        result = work()
        times[f"{name}_s"] = clock() - begin
        return result

    def begun() -> Callable[[], None]:
        return checkpoint.begin_save(
            folder / "step_1", model=model, trainable=trainable, state={}, ranks=Ranks(None), snapshot=True
        )

    finish = timed("copy_to_host", begun)
    timed("write_and_hash", finish)
    timed("check_and_load", lambda: checkpoint.load_checkpoint(folder / "step_1", model=model, trainable=trainable))
    for number in ("first", "second"):  # the first one allocates pinned memory
        offload = trainable.optimizer_offloaded()
        timed(f"{number}_offload", offload.__enter__)
        empty = [storage.nbytes() == 0 for storage in _moments(trainable)]
        parts.require(bool(empty) and all(empty), f"{sum(empty)} of {len(empty)} moments were offloaded")
        timed(f"{number}_return", lambda offload=offload: offload.__exit__(None, None, None))
    size = sum(path.stat().st_size for path in (folder / "step_1").rglob("*") if path.is_file())
    return {"bytes": size, **times}


def _moments(trainable: Trainable) -> Iterator[torch.UntypedStorage]:
    for part in getattr(trainable.optimizer, "chained_optimizers", [trainable.optimizer]):
        for state in part.optimizer.state.values():
            yield from (state[name].untyped_storage() for name in ("exp_avg", "exp_avg_sq"))


def deterministic() -> dict[str, Any]:
    """Whether two runs of five steps end with the same bytes, as they are and with ``trainer.deterministic``.

    The second pair runs in a process of its own: cuBLAS reads its variable when it makes its first handle.
    """
    command = [sys.executable, "-W", "ignore", "-m", "tests.gpu.contact_state"]
    plain = curve()
    done = subprocess.run(command, capture_output=True, text=True)
    parts.require(done.returncode == 0, done.stderr[-1500:])
    return {"as it is": plain, "trainer.deterministic": json.loads(done.stdout.strip().splitlines()[-1])}


def curve() -> dict[str, Any]:
    """Whether two equal trainings in this process end with equal weights, and their seconds."""
    given, begin = fresh(5), clock()
    given = replace(given, shape=replace(given.shape, layers=2))  # the end of the model is where sums vary
    first, second = _digest(given), _digest(given)
    return {"equal": first == second, "seconds": clock() - begin}


def _digest(given: Sizes) -> str:
    load, trainable = Workload(given), trainable_of(given)
    for step in range(given.steps):
        trainable.update(list(load.micro_batches(step)), lr=given.lr)
    digest = hashlib.sha256()
    for parameter in trainable.model.parameters():
        digest.update(parameter.detach().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def end_to_end() -> dict[str, Any]:
    """A small pipeline by the command line where its packages are there, else the mismatch of a rollout."""
    if not all(_importable(name) for name in ("polars", "transformers", "omegaconf")):
        return {"pipeline": "packages are missing", **parts.mismatch("bf16")}
    words = (
        "model.backbone=nano model.precision=bf16 rl.max_steps=3 sft.epochs=1 data.train_limit=200 data.eval_limit=30 "
        "prepare.synthetic_items=150 prepare.synthetic_users=500 compare.sft_continued=false"
    ).split()
    words += [f"run_dir={out('end_to_end') / 'run'}", f"data.root={out('data')}"]
    program = "tests.simcuda.runs" if is_pretended() else "tawin_nemo"
    command = [sys.executable, "-m", program, "train", "--recipe", "recipes/quickstart.yaml", *words]
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    parts.require(done.returncode == 0, done.stderr[-1500:])
    return {"pipeline": "train", "pipeline_s": time.perf_counter() - begin}


def _importable(name: str) -> bool:
    try:
        __import__(name)
    except ImportError:
        return False
    return True


if __name__ == "__main__":  # the second half of ``deterministic``
    pretend_if_asked()
    determinism.make_deterministic()
    print(json.dumps(curve()))

"""The planner's memory model against real training steps on CPUs: ``python -m tests.benchmarks.plan_memory``.

Each case starts its own processes. A process imports everything and trains a very small model once, which loads the
libraries' kernels; then the resident memory's peak during two steps of a mid-size model, above what it was before, is
compared with the planner's sum for that rank (the second step has the optimizer's state and the activations at once).
glibc is told to hand every freed block of 64 KiB or more back, as a GPU's allocator would reuse it. The last line is
one JSON object; exit code 1 when a case is off by more than 15 %.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tawin_nemo.config.backbones import Backbone
from tawin_nemo.config.layout import Layout
from tawin_nemo.config.schema import ModelConfig, Recipe, TrainerConfig
from tawin_nemo.data.trees import tree_batch
from tawin_nemo.models.megatron.model.build import build_model
from tawin_nemo.models.megatron.optim.trainable import MicroBatch, Trainable
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.tools.plan.memory import Parts, resident, stage_parameters, update_parts
from tawin_nemo.tools.plan.work import Numbers, Pass
from tawin_nemo.types import TokenBatch, TokenRows
from tests.benchmarks.harness import peak_above

WITHIN = 0.15
MIB = 2.0**20
SHAPE = Backbone("qwen2", 384, 4, 8, 2, 1024, 8192, rope_theta=1e4, max_position=1024)
SMALL = replace(SHAPE, hidden=32, layers=1, ffn=64, vocab=512)
#: 8 prompts of 200 tokens, each with 4 candidates of 15 tokens, 14 of which are run.
PROMPTS, LENGTH, CANDIDATES, PATH = 8, 200, 4, 15
CASES: dict[str, ModelConfig] = {
    "one process": ModelConfig(),
    "full recomputation": ModelConfig(recompute="full"),
    "bf16": ModelConfig(precision="bf16"),
    "TP 2": ModelConfig(tensor_model_parallel_size=2),
    "TP 2, sequence parallel": ModelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
}
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MASTER_ADDR": "127.0.0.1",
    "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536",
}  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """Of one rank; bytes in MiB."""

    case: str
    measured_mib: float
    modelled_mib: float
    parts_mib: dict[str, float]
    parameters: int
    modelled_parameters: int

    @property
    def off(self) -> float:
        return self.modelled_mib / self.measured_mib - 1.0


def layout_of(cfg: ModelConfig) -> Layout:
    return Layout(cfg.tensor_model_parallel_size, cfg.pipeline_model_parallel_size, 1, cfg.sequence_parallel)


def work() -> Pass:
    """What ``batch(SHAPE)`` is, in the planner's words."""
    tree = CANDIDATES * (PATH - 1)
    keys = LENGTH + tree
    return Pass(PROMPTS * keys, PROMPTS * tree, keys, PROMPTS * (CANDIDATES * (PATH - 1) + 1))


def modelled(cfg: ModelConfig) -> Parts:
    """The planner's parts of a rank on a CPU, at the fullest moment of an update."""
    numbers, layout = Numbers.of(cfg.precision, device="cpu"), layout_of(cfg)
    base = resident(SHAPE, Recipe(model=cfg), layout, numbers, stage=0)
    extra = update_parts(SHAPE, layout, numbers, work(), recompute=cfg.recompute, stage=0, micro_batches=1)
    return replace(base, activations=extra.activations, working=extra.working, logits=extra.logits)


def batch(shape: Backbone) -> TokenBatch:
    """Candidates of one prompt share no token but the first scored place."""
    draw = np.random.default_rng(0)
    prompts = TokenRows.from_lists([draw.integers(1, shape.vocab, LENGTH) for _ in range(PROMPTS)])
    paths = [
        np.concatenate([[c + 1], draw.integers(1, shape.vocab, PATH - 1)]) for _ in range(PROMPTS)
        for c in range(CANDIDATES)
    ]  # fmt: skip
    return tree_batch(prompts, TokenRows.from_lists(paths), np.repeat(np.arange(PROMPTS), CANDIDATES), None)[0]


def train(shape: Backbone, cfg: ModelConfig) -> Trainable:
    """Two steps on the batch in vocabulary space."""
    trainable = Trainable(build_model(shape, cfg, seed=1), shape, TrainerConfig(), lr=1e-3)
    micro = MicroBatch(batch(shape), lambda logp_N: (-logp_N.mean(), {}))
    for _ in range(2):
        trainable.update([micro], lr=1e-3)
    return trainable


def measure(case: str) -> Measured:
    """One rank of a case, in this process."""
    cfg = CASES[case]
    runtime.initialize(cfg, seed=1)
    torch.set_num_threads(1)
    train(SMALL, cfg)
    kept: list[Trainable] = []
    seen = peak_above(lambda: kept.append(train(SHAPE, cfg)))
    parts = modelled(cfg)
    return Measured(
        case=case,
        measured_mib=round(seen, 1),
        modelled_mib=round(parts.total / MIB, 1),
        parts_mib={name: round(value / MIB, 1) for name, value in asdict(parts).items() if value},
        parameters=sum(p.numel() for p in kept[0].model.parameters()),
        modelled_parameters=stage_parameters(SHAPE, layout_of(cfg), 0),
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_case(case: str) -> list[Measured]:
    """All ranks of a case, in processes of their own. Raises RuntimeError with a failing rank's output."""
    processes = CASES[case].tensor_model_parallel_size
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{rank}.json" for rank in range(processes)]
        command = [sys.executable, "-m", "tests.benchmarks.plan_memory", "--case", case, "--out"]
        environment = {**os.environ, **ENVIRONMENT, "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(processes)}
        started = [
            subprocess.Popen(
                [*command, str(file)], env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for rank, file in enumerate(files)
        ]  # fmt: skip
        outputs = [process.communicate()[0] for process in started]
        for process, output in zip(started, outputs, strict=True):
            if process.returncode:
                raise RuntimeError(f"case {case} ended with {process.returncode}:\n{output[-3000:]}")
        return [Measured(**json.loads(file.read_text(encoding="utf-8"))) for file in files]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=list(CASES), help="only this one, in this process, result to --out")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="which ones to run")
    parser.add_argument("--out", help="file for the result of --case")
    given = parser.parse_args()
    if given.case:
        Path(given.out).write_text(json.dumps(asdict(measure(given.case))), encoding="utf-8")
        return 0
    rows: list[dict[str, Any]] = []
    for case in given.cases:
        for rank, found in enumerate(run_case(case)):
            rows.append({**asdict(found), "rank": rank, "off": round(found.off, 3)})
            print(f"{case:26} rank {rank}: measured {found.measured_mib:7.1f} MiB, model {found.modelled_mib:7.1f} "
                  f"({found.off:+.1%})  {found.parts_mib}", file=sys.stderr, flush=True)  # fmt: skip
    worst = max(abs(row["off"]) for row in rows)
    met = worst <= WITHIN and all(row["parameters"] == row["modelled_parameters"] for row in rows)
    print(json.dumps({"benchmark": "plan_memory", "within": WITHIN, "worst": worst, "met": met, "rows": rows}))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())

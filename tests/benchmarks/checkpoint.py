"""What a checkpoint costs each data-parallel rank: bytes written, and peak memory of a save and of a resume.

    python -m tests.benchmarks.checkpoint [--json recipes/results/bench_checkpoint.json]

RANKS processes (gloo) hold a model in bf16 with the distributed optimizer's state, as at 7B. Two sides, one after the
other: ``gathered`` (tests/models/megatron/checkpoint/gathered.py: rank 0 gathers and writes whole tensors, every rank
reads whole tensors) and ``pieces`` (each rank writes and reads what it owns). Both must restore the same bits, and
``pieces`` those of the gathered file as well. Memory is the peak of resident memory above what it was before the call.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tawin_nemo.config.backbones import Backbone, backbone
from tawin_nemo.models.megatron.checkpoint.flat_pieces import BLOCK
from tawin_nemo.tools.plan.memory import parameters
from tests.benchmarks import harness
from tests.distributed.launch import launch

RANKS = 4
MIB = 2**20
#: Bytes of a parameter in a checkpoint: the weight in bf16; master weight and two moments in float32.
WEIGHT, STATE = 2, 12
UNFAIR = [
    "all ranks share two cores, one disk and its cache: with a node's own disk for each writer the difference in "
    "seconds is larger",
    "peaks are those of a CPU: the optimizer's tensors are in the same memory; on GPUs they are not",
]


def run_side(side: str, folder: Path, shape: Backbone, repeats: int) -> list[dict[str, Any]]:
    """What every rank of ``checkpoint_worker`` measured."""
    options = json.dumps({"shape": asdict(shape), "repeats": repeats})
    worker = Path(__file__).with_name("checkpoint_worker.py")
    launch(worker, RANKS, side, str(folder), options, folder=folder / f"logs_{side}", limit=1200)
    return [json.loads((folder / f"{side}.{rank}.json").read_text(encoding="utf-8")) for rank in range(RANKS)]


def seven_b(nodes: int, tensor: int = 2, per_node: int = 8) -> list[dict[str, Any]]:
    """GB a rank or node at the size of Qwen2.5-7B, by arithmetic: nothing of it is measured."""
    shape = backbone("qwen2.5-7b")
    count, replicas = parameters(shape), nodes * per_node // tensor
    embedding = shape.vocab * shape.hidden // tensor  # the largest tensor of a rank
    mine, whole = count * (WEIGHT + STATE) / (tensor * replicas), count * STATE / tensor
    rows = [
        {"side": "gathered", "writers": tensor, "written a writer": count * (WEIGHT + STATE) / tensor,
         "host, save, a writer": whole, "host, resume, a node": per_node * (whole + STATE // 3 * embedding)},
        {"side": "pieces", "writers": tensor * replicas, "written a writer": mine,
         "host, save, a writer": max(4.0 * BLOCK, WEIGHT * embedding),
         "host, save, a node, async_save": per_node * mine,
         "host, resume, a node": per_node * max(4.0 * BLOCK, WEIGHT * embedding),
         "host, resume of a gathered file, a node": per_node * STATE // 3 * embedding},
    ]  # fmt: skip
    return [
        {"nodes": nodes}
        | {name: value if name in ("side", "writers") else harness.rounded(value / 1e9) for name, value in row.items()}
        for row in rows
    ]


def lines() -> list[str]:
    """The arithmetic for 7B on one and on four nodes as the Markdown table of recipes/results/reliability.md."""
    rows = [row for nodes in (1, 4) for row in seven_b(nodes)]
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [
        "| " + " | ".join(names) + " |",
        "|---" * len(names) + "|",
        *("| " + " | ".join(f"{row[name]:.3g}" if isinstance(row.get(name), float) else str(row.get(name, "-"))
                            for name in names) + " |" for row in rows),
    ]  # fmt: skip


def main() -> None:
    parser = harness.parser(__doc__)
    parser.set_defaults(repeats=3)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=16384)
    given: argparse.Namespace = parser.parse_args()
    shape = Backbone(
        "qwen2", given.hidden, given.layers, 8, 2, 4 * given.hidden, given.vocab, rope_theta=1e4, max_position=2048
    )
    runs = Path("runs")  # ignored by git
    runs.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="checkpoint_", dir=runs) as name:
        sides = {side: run_side(side, Path(name).resolve(), shape, given.repeats) for side in ("gathered", "pieces")}
    finish(sides, shape, given)


def finish(sides: dict[str, list[dict[str, Any]]], shape: Backbone, given: argparse.Namespace) -> None:
    """Print the table of both sides and the targets; write the JSON file."""
    machine = harness.this_machine()
    total = sum(rank["written"] for rank in sides["pieces"])
    report = harness.Report(
        "checkpoint", machine,
        shapes={"layers": shape.layers, "hidden": shape.hidden, "vocab": shape.vocab, "ranks": RANKS,
                "parameters_million": harness.rounded(parameters(shape) / 1e6), "files_mb": total / 1e6},
        settings={"threads a rank": 1, "repeats": given.repeats}, unfair=UNFAIR,
    )  # fmt: skip
    seconds = {}
    for side, ranks in sides.items():
        seconds[side] = {
            what: harness.Timed([max(rank[what][turn] for rank in ranks) for turn in range(given.repeats)])
            for what in ("save_seconds", "load_seconds")
        }
        report.rows.append({
            "side": side,
            "written, MB": [harness.rounded(rank["written"] / 1e6) for rank in ranks],
            "save, peak MiB": [round(rank["save_mib"]) for rank in ranks],
            "resume, peak MiB": [round(rank["load_mib"]) for rank in ranks],
            "save, s": harness.rounded(seconds[side]["save_seconds"].median),
            "resume, s": harness.rounded(seconds[side]["load_seconds"].median),
        })  # fmt: skip
    worst = {side: {what: max(rank[what] for rank in ranks) for what in ("written", "save_mib", "load_mib")}
             for side, ranks in sides.items()}  # fmt: skip
    report.targets = {
        "largest share of one writer": harness.Target.at_most(1.2 / RANKS, worst["pieces"]["written"] / total),
        "peak of a save, share of gathered": harness.Target.at_most(
            0.5, worst["pieces"]["save_mib"] / worst["gathered"]["save_mib"]
        ),
        "peak of a resume, share of gathered": harness.Target.at_most(
            0.5, worst["pieces"]["load_mib"] / worst["gathered"]["load_mib"]
        ),
    }
    report.checks = {
        "equal_bits": {side: [rank["equal"] for rank in ranks] for side, ranks in sides.items()},
        "qwen2.5-7b, GB by arithmetic": [row for nodes in (1, 4) for row in seven_b(nodes)],
    }
    print("\n".join(lines()))
    assert all(all(rank["equal"].values()) for ranks in sides.values() for rank in ranks), report.checks
    floor = machine.floor_seconds(moved_bytes=2.0 * total)
    report.finish(
        ours=seconds["pieces"]["save_seconds"].median, baseline=seconds["gathered"]["save_seconds"].median,
        floor=floor, json_file=given.json,
    )  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

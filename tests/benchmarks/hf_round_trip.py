"""A Hugging Face checkpoint through a TP x PP layout and back: the same bits, and how much memory each rank needs.

    python -m tests.benchmarks.hf_round_trip                                   Qwen2.5-0.5B's shape, TP2 x PP2
    python -m tests.benchmarks.hf_round_trip --json recipes/results/hf_round_trip.json
    python -m tests.benchmarks.hf_round_trip --backbone nano --vocab 3000      a small one

The checkpoint is drawn at random, bf16, in files of ``--shard-mb``, with a tokenizer that has added semantic-ID tokens.
Memory is RssAnon + RssShmem of /proc/PID/status (no mapped file pages), sampled from outside, above what the process
had after its imports. The bound: 1.5 x the rank's shard + the largest tensor.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks import harness

MB = 1_000_000
LAYOUT = (2, 2)
CODES = ["<a_0>", "<a_1>", "<b_0>"]
_ANONYMOUS = re.compile(r"Rss(?:Anon|Shmem):\s+(\d+) kB")


def anonymous_bytes(pid: int | str) -> int:
    """Resident memory of a process without file pages; 0 when it has gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    return sum(int(kilobytes) for kilobytes in _ANONYMOUS.findall(status)) * 1024


def worker(arguments: argparse.Namespace) -> None:
    """One rank: import the files, export them again."""
    import torch

    from tawin_nemo.config.schema import ModelConfig
    from tawin_nemo.models.megatron.hf.config import backbone_from_hf
    from tawin_nemo.models.megatron.hf.io import load_hf, save_hf
    from tawin_nemo.models.megatron.model.build import build_model
    from tawin_nemo.models.megatron.parallel import runtime

    imported = anonymous_bytes("self")
    folder, rank = arguments.folder, int(os.environ["RANK"])
    source = folder / "source"
    (tp, pp) = LAYOUT
    cfg = ModelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, precision="bf16")
    runtime.initialize(cfg, seed=1)
    torch.set_num_threads(1)
    shape = backbone_from_hf(source)
    times = [time.monotonic()]
    model = build_model(shape, cfg, seed=1)
    times.append(time.monotonic())
    load_hf(model, shape, source)
    times.append(time.monotonic())
    save_hf(model, shape, folder / "export", max_shard_bytes=arguments.shard_mb * MB, tokenizer_dir=source)
    times.append(time.monotonic())
    shard = sum(parameter.nbytes for parameter in model.parameters())
    facts = {"rank": rank, "imported": imported, "shard": shard, "seconds": times}
    (folder / f"rank_{rank}.json").write_text(json.dumps(facts), encoding="utf-8")
    runtime.barrier()
    runtime.shutdown()


def make_source(folder: Path, backbone: str, vocab: int, shard_mb: int) -> int:
    """Random bf16 weights in the family's files, file by file; the bytes of the largest tensor."""
    import torch
    from safetensors.torch import save_file

    from tawin_nemo.config.backbones import backbone as shape_of
    from tawin_nemo.config.backbones import with_vocab
    from tawin_nemo.models.megatron.hf.config import hf_config
    from tawin_nemo.models.megatron.hf.files import INDEX_FILE
    from tawin_nemo.models.megatron.hf.io import _files
    from tawin_nemo.models.megatron.hf.map import hf_names, hf_shapes
    from tawin_nemo.util.files import write_json

    shape = with_vocab(shape_of(backbone), vocab)
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(7)
    weight_map, largest, total = {}, 0, 0
    for file, rows in _files(shape, torch.bfloat16, shard_mb * MB).items():
        tensors = {
            name: torch.randn(size, generator=generator, dtype=torch.bfloat16)
            for row in rows
            for name, size in zip(hf_names(*row), hf_shapes(row[0], shape), strict=True)
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        largest = max(largest, *(tensor.nbytes for tensor in tensors.values()))
        total += sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(folder / "config.json", hf_config(shape, dtype="bfloat16"))
    make_tokenizer(folder)
    return largest


def make_tokenizer(folder: Path) -> None:
    """A small byte-level tokenizer with semantic-ID tokens added to it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    fast.add_tokens(CODES)
    fast.save_pretrained(folder)


def differences(source: Path, export: Path) -> list[str]:
    """Names of tensors and tokenizer properties that are not the same, bit for bit."""
    import torch
    from transformers import AutoTokenizer

    from tawin_nemo.models.megatron.hf.files import HfWeights

    one, other = HfWeights(source), HfWeights(export)
    wrong = sorted(set(one.files) ^ set(other.files))
    for name in sorted(set(one.files) & set(other.files)):
        left, right = (weights.read(name, 0, 0, weights.shape(name)[0]) for weights in (one, other))
        if left.dtype != right.dtype or not torch.equal(left.view(torch.int16), right.view(torch.int16)):
            wrong.append(name)
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (source, export)]
    ids = [tokenizer("a" + "".join(CODES), add_special_tokens=False)["input_ids"] for tokenizer in tokenizers]
    if ids[0] != ids[1] or len(ids[1]) != 1 + len(CODES):
        wrong.append(f"tokenizer: {ids}")
    return wrong


def run_ranks(folder: Path, options: Sequence[str], limit: float) -> list[int]:
    """Start every rank; the peak of each one's anonymous memory."""
    ranks = LAYOUT[0] * LAYOUT[1]
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 20000)}
    env |= {"WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.benchmarks.hf_round_trip", "--worker", "--folder", str(folder), *options]
    started = [subprocess.Popen(command, env={**env, "RANK": str(n), "LOCAL_RANK": str(n)}) for n in range(ranks)]
    peaks, over = [0] * ranks, threading.Event()

    def watch() -> None:
        while not over.is_set():
            for rank, process in enumerate(started):
                peaks[rank] = max(peaks[rank], anonymous_bytes(process.pid))
            time.sleep(0.002)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    deadline = time.monotonic() + limit
    try:
        while any(process.poll() is None for process in started) and time.monotonic() < deadline:
            if any(process.poll() not in (None, 0) for process in started):
                break
            time.sleep(0.05)
    finally:
        over.set()
        watcher.join()
        for process in started:
            process.kill()
            process.wait()
    codes = [process.returncode for process in started]
    if any(codes):
        raise RuntimeError(f"the ranks ended with {codes}; their tracebacks are above")
    return peaks


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole round trip below ``folder``."""
    start = time.monotonic()
    largest = make_source(folder / "source", arguments.backbone, arguments.vocab, arguments.shard_mb)
    peaks = run_ranks(folder, ["--shard-mb", str(arguments.shard_mb)], arguments.limit)
    ranks = []
    for rank, peak in enumerate(peaks):
        facts = json.loads((folder / f"rank_{rank}.json").read_text(encoding="utf-8"))
        above, bound = peak - facts["imported"], int(1.5 * facts["shard"] + largest)
        build, load, save = (round(b - a, 1) for a, b in zip(facts["seconds"], facts["seconds"][1:], strict=False))
        ranks.append({
            "rank": rank, "shard_mb": facts["shard"] / MB, "peak_above_imports_mb": above / MB, "bound_mb": bound / MB,
            "within": above <= bound, "build_s": build, "import_s": load, "export_s": save,
        })  # fmt: skip
    wrong = differences(folder / "source", folder / "export")
    return {
        "command": " ".join(["python -m tests.benchmarks.hf_round_trip", *harness._shown_arguments()]),
        "commit": harness._git("rev-parse", "--short", "HEAD"),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores",
        "layout": {"tensor": LAYOUT[0], "pipeline": LAYOUT[1]},
        "checkpoint_mb": sum(file.stat().st_size for file in (folder / "source").glob("*.safetensors")) / MB,
        "files": len(list((folder / "source").glob("*.safetensors"))),
        "largest_tensor_mb": largest / MB,
        "bit_identical": not wrong,
        "different": wrong[:10],
        "within_bound": all(rank["within"] for rank in ranks),
        "ranks": ranks,
        "seconds": round(time.monotonic() - start, 1),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.hf_round_trip")
    parser.add_argument("--backbone", default="qwen2.5-0.5b")
    parser.add_argument("--vocab", type=int, default=151_936, help="rows of the embedding")
    parser.add_argument("--shard-mb", type=int, default=100, help="largest file, of source and export")
    parser.add_argument("--limit", type=float, default=1500.0, help="seconds for the ranks")
    parser.add_argument("--json", type=Path, help="write the JSON there as well")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.worker:
        worker(arguments)
        return 0
    with tempfile.TemporaryDirectory(prefix="hf_round_trip_") as name:
        result = measure(Path(name), arguments)
    print(json.dumps(result), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0 if result["bit_identical"] and result["within_bound"] else 1


if __name__ == "__main__":
    sys.exit(main())

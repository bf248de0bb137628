"""Codebooks for many items: residual k-means against faiss and a plain scikit-learn loop, RQ-VAE, assignment of 1M.

    python -m tests.benchmarks.semantic_ids --json recipes/results/bench_semantic_ids.json

Sides of the k-means comparison: `tawin_nemo.semantic_ids.clustering`; faiss.ResidualQuantizer (`pip install
faiss-cpu==1.15.1`, which is not in requirements.txt; left out with a note where it is absent), greedy as ours, training
and codes; scikit-learn's KMeans with k-means++ on all rows, level after level. All run at most the same number of Lloyd
iterations, on the same threads. Ours and RQ-VAE have the defaults of `tawin-nemo tokenize`; the assignment is that of
plain codebooks. Vectors are drawn around 2,000 centres and have length 1. With `--repeats 3` about half an hour.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from tawin_nemo.config.schema import SemanticIdsConfig
from tawin_nemo.semantic_ids.clustering import residual_kmeans
from tawin_nemo.semantic_ids.codebooks import Codebooks, nearest
from tawin_nemo.semantic_ids.coder import ItemCoder
from tawin_nemo.semantic_ids.quantiser import Autoencoder
from tawin_nemo.semantic_ids.report import relative_error
from tawin_nemo.semantic_ids.train_quantiser import Plan, train_quantiser
from tests.benchmarks import harness

MODULE = "tests.benchmarks.semantic_ids"
#: What the verb tokenize does by default.
USUAL = SemanticIdsConfig()
CENTRES = 2000
UNFAIR = [
    "faiss trains its levels on 256 rows per code at most (its default), ours and scikit-learn's on all rows",
    "ours seeds k-means++ from 32 rows per code, scikit-learn's from all rows",
    "the peak memory of the assignment is that of its process, the imported libraries (before_mib) included",
]


def vectors(items: int, dims: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(min(CENTRES, items), dims)).astype(np.float32)
    rows = centres[rng.integers(0, len(centres), items)]
    rows += rng.standard_normal(size=rows.shape, dtype=np.float32) * 0.7
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


# -- sides: vectors -> what the codes decode to ----------------------------------------------------------------------
def ours(x_ID: np.ndarray, levels: int, codes: int, iterations: int) -> np.ndarray:
    books, codes_IL = residual_kmeans(x_ID, levels=levels, codes=codes, iterations=iterations, seed=0)
    return books.decode(codes_IL)


def plain(x_ID: np.ndarray, levels: int, codes: int, iterations: int) -> np.ndarray:
    from sklearn.cluster import KMeans

    rest, read = x_ID.copy(), np.zeros_like(x_ID)
    for level in range(levels):
        model = KMeans(codes, n_init=1, max_iter=iterations, random_state=level).fit(rest)
        chosen = model.cluster_centers_[model.labels_]
        read += chosen
        rest -= chosen
    return read


def faiss_greedy(x_ID: np.ndarray, levels: int, codes: int, iterations: int) -> np.ndarray:
    import faiss

    quantiser = faiss.ResidualQuantizer(x_ID.shape[1], levels, int(np.log2(codes)))
    quantiser.max_beam_size = 1
    quantiser.cp.niter = iterations
    quantiser.train(x_ID)
    return quantiser.decode(quantiser.compute_codes(x_ID))


def sides() -> dict[str, Callable[..., np.ndarray]]:
    found: dict[str, Callable[..., np.ndarray]] = {"ours": ours, "scikit-learn loop": plain}
    try:
        import faiss  # noqa: F401
    except ImportError:
        print("faiss: not installed", file=sys.stderr)
        return found
    return found | {"faiss ResidualQuantizer": faiss_greedy}


def faiss_version() -> str:
    """Empty where it is not installed."""
    try:
        return version("faiss-cpu")
    except PackageNotFoundError:
        return ""


# -- alone in a process, for its memory ------------------------------------------------------------------------------
def assign_file(path: Path, levels: int, codes: int) -> dict[str, float]:
    """Codes of a memory-mapped file of vectors; seconds, peak MiB of the process."""
    x_ID = np.load(path, mmap_mode="r")
    rng = np.random.default_rng(1)
    books = Codebooks(rng.normal(size=(levels, codes, x_ID.shape[1])).astype(np.float32) * 0.05)
    before = harness.resident_mib()
    begin = time.perf_counter()
    codes_IL = books.encode(x_ID)
    seconds = time.perf_counter() - begin
    first = nearest(x_ID[:100], books.vectors_LKD[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "seconds": seconds,
        "peak_mib": peak,
        "before_mib": before,
        "agree": float((codes_IL[:100, 0] == first).mean()),
    }


def assignment(items: int, dims: int, levels: int, codes: int, threads: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "vectors.npy"
        rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(items, dims))
        for begin in range(0, items, 100_000):
            rows[begin : begin + 100_000] = vectors(min(100_000, items - begin), dims, seed=begin)
        rows.flush()
        del rows
        return harness.in_child(MODULE, ["--alone", str(path), "--levels", str(levels), "--codes", str(codes),
                                         "--threads", str(threads)])  # fmt: skip


def options() -> Any:
    result = harness.parser(__doc__)
    result.add_argument("--items", type=int, default=100_000)
    result.add_argument("--assigned", type=int, default=1_000_000, help="items of the assignment")
    result.add_argument("--dims", type=int, default=384)
    result.add_argument("--levels", type=int, default=3)
    result.add_argument("--codes", type=int, default=256)
    result.add_argument(
        "--iterations", type=int, default=USUAL.kmeans_iterations, help="Lloyd iterations per level, at most"
    )
    result.add_argument("--epochs", type=int, default=USUAL.rqvae.epochs, help="of RQ-VAE")
    result.add_argument("--batch", type=int, default=USUAL.rqvae.batch_size, help="of RQ-VAE")
    result.add_argument("--alone", type=Path, help="only: codes of the vectors in this file")
    return result


def timed_rqvae(x_ID: np.ndarray, given: argparse.Namespace) -> tuple[float, ItemCoder]:
    """Seconds of training, and what was trained."""
    cfg = replace(USUAL.rqvae, epochs=given.epochs, batch_size=given.batch)
    plan = Plan(given.levels, given.codes, seed=0, kmeans_iterations=given.iterations, residual=False)
    trained: list[Autoencoder] = []
    seconds = harness.seconds_of(lambda: trained.append(train_quantiser(x_ID, cfg, plan)))
    return seconds, ItemCoder("rqvae", Codebooks(trained[0].quantiser.vectors_LKD.detach().numpy()), trained[0])


def main() -> None:
    given = options().parse_args()
    torch.set_num_threads(given.threads)
    if given.alone:
        print(json.dumps(assign_file(given.alone, given.levels, given.codes)))
        return
    machine = harness.this_machine()
    x_ID = vectors(given.items, given.dims)
    read: dict[str, np.ndarray] = {}
    compared = sides()
    threadpool_limits(given.threads)  # of scikit-learn and faiss, whose libraries are loaded now

    def runner(name: str, side: Callable[..., np.ndarray]) -> Callable[[], None]:
        def run() -> None:
            read[name] = side(x_ID, given.levels, given.codes, given.iterations)

        return run

    timed = harness.in_turn({name: runner(name, side) for name, side in compared.items()}, repeats=given.repeats)
    rqvae, coder = timed_rqvae(x_ID, given)
    alone = assignment(given.assigned, given.dims, given.levels, given.codes, given.threads)

    report = harness.Report(
        "semantic_ids", machine,
        shapes={"items": given.items, "dims": given.dims, "levels": given.levels, "codes": given.codes},
        settings={"iterations": given.iterations, "epochs": given.epochs, "batch": given.batch,
                  "assigned": given.assigned, "repeats": given.repeats, "faiss": faiss_version()}, unfair=UNFAIR,
    )  # fmt: skip
    report.rows = [
        {"side": name, "seconds": result.median, "quartiles": list(result.quartiles),
         "error": relative_error(x_ID, read[name])}
        for name, result in timed.items()
    ]  # fmt: skip
    report.rows.append(
        {"side": "RQ-VAE", "seconds": rqvae, "error": relative_error(x_ID, coder.decode(coder.encode(x_ID)))}
    )
    report.rows.append(
        {
            "side": "assignment",
            "seconds": alone["seconds"],
            "peak_mib": alone["peak_mib"],
            "before_mib": alone["before_mib"],
        }
    )
    mine = timed["ours"].median
    report.targets = {
        "seconds, residual k-means": harness.Target.at_most(60, mine),
        "seconds, RQ-VAE": harness.Target.at_most(600, rqvae),
        "seconds, assignment": harness.Target.at_most(60, alone["seconds"]),
        "peak MiB, assignment": harness.Target.at_most(4096, alone["peak_mib"]),
    }
    report.checks = {
        "times ours": {name: harness.rounded(result.median / mine) for name, result in timed.items() if name != "ours"},
        "assignment agrees with a second one": alone["agree"],
    }
    flops = 2.0 * given.items * given.dims * given.codes * given.levels * given.iterations
    report.finish(
        ours=mine, baseline=timed["scikit-learn loop"].median, floor=machine.floor_seconds(flops=flops),
        json_file=given.json,
    )  # fmt: skip


if __name__ == "__main__":
    main()

"""Building the catalog trie: time, memory of the index, peak memory of the process.

    python -m tests.benchmarks.trie_build [--full]

Catalogs: random semantic IDs of four codes (256 per position, token ids behind a Qwen vocabulary) and end of text,
a million items, with --full ten million, too; and a million generated titles of about 20 tokens, in families that
begin alike. Ours is ``TokenTrie.from_paths`` on int64 rows. Baselines: nested dictionaries filled in a Python loop
(titles and the ten million on a slice, seconds per item), the sorted level-by-level arrays that trie-constrained
decoding on accelerators uses (lexsort and first differences, semantic IDs only), and marisa-trie, if it is installed.

Floor: every token read once, 8-byte words read and written once per 8 of the log2(items) bits that tell the items
apart (a radix sort), the index written once; all at the copy bandwidth of this machine.
"""

from __future__ import annotations

import gc
import json
import math
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.types import TokenRows
from tests.benchmarks import harness

try:
    import marisa_trie
except ImportError:
    marisa_trie = None

EOS, FIRST_CODE, LEVELS = 151_643, 151_669, 4
UNFAIR = [
    "the dictionaries are filled with the garbage collector off; titles and the ten million are timed per item on a "
    "slice, where they fit the caches better than whole: kind to them",
    "the sorted level arrays hold every token as a node and know no items; building them here is our own numpy",
    "marisa-trie keeps keys of 3 bytes per token and numbers them itself: no item numbers, no list of children; its "
    "bytes hold the paths too, and compare with index plus pool of ours; its keys are made before the clock starts",
]


def semantic_ids(items: int, codes: int, seed: int = 0) -> TokenRows:
    """Paths of four random codes and end of text."""
    rng = np.random.default_rng(seed)
    flat = np.empty((items, LEVELS + 1), dtype=np.int64)
    flat[:, LEVELS] = EOS
    for level in range(LEVELS):
        for start in range(0, items, 10**6):  # the generator's copies stay small beside the trie
            size = min(10**6, items - start)
            flat[start : start + size, level] = rng.integers(0, codes, size) + FIRST_CODE + level * codes
    return TokenRows(flat.reshape(-1), np.arange(items + 1, dtype=np.int64) * (LEVELS + 1))


def titles(items: int, seed: int = 0, words: int = 60_000) -> TokenRows:
    """Titles of 20 tokens in the mean: the beginning of one of items / 4 family titles, then words of their own.

    Words follow Zipf's law; one title in a hundred is a copy of another. A path has 3.9 choices in the mean, the last
    one behind 5.0 tokens; 3,686 real titles in Qwen tokens (Amazon Industrial and Scientific): 4.1, behind 5.9.
    """
    rng = np.random.default_rng(seed)
    frequency = np.cumsum(1 / np.arange(1, words + 1))

    def draw(count: int) -> np.ndarray:
        return np.searchsorted(frequency, rng.random(count) * frequency[-1]) + 1000

    longest, families = 48, items // 4
    length_N = np.clip(rng.normal(20, 6, items), 4, longest).astype(np.int64)
    family_N = rng.integers(0, families, items)
    shared_N = (rng.random(items) ** 2 * length_N).astype(np.int64)  # most part early
    stem_FT = draw(families * longest).reshape(families, longest)
    stem_FT[:, :2] = stem_FT[rng.integers(0, families // 50, families), :2]  # brands
    offsets = np.concatenate([[0], np.cumsum(length_N)])
    column_S = np.arange(offsets[-1]) - np.repeat(offsets[:-1], length_N)
    row_S = np.repeat(np.arange(items), length_N)
    flat = np.where(column_S < shared_N[row_S], stem_FT[family_N[row_S], column_S], draw(int(offsets[-1])))
    flat[offsets[1:] - 1] = EOS
    rows = np.arange(items)
    copies = rng.random(items) < 0.01
    rows[copies] = rng.integers(0, items, int(copies.sum()))
    return TokenRows(flat, offsets).take(rows)


# -- baselines -----------------------------------------------------------------------------------------------------
def dict_trie(rows: TokenRows) -> dict:
    gc.disable()
    root: dict = {}
    flat, offsets = rows.flat.tolist(), rows.offsets.tolist()
    for start, stop in pairwise(offsets):
        node = root
        for token in flat[start:stop]:
            child = node.get(token)
            if child is None:
                child = node[token] = {}
            node = child
    gc.enable()
    return root


def count_choices(root: dict) -> int:
    """Nodes with two or more children."""
    count, stack = 0, [root]
    while stack:
        node = stack.pop()
        count += len(node) > 1
        stack.extend(node.values())
    return count


def level_arrays(tokens_NL: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and tokens of the edges of every prefix, breadth first; paths of one length."""
    tokens_NL = tokens_NL[np.lexsort(tokens_NL.T[::-1])]
    is_new_NL = np.ones(tokens_NL.shape, dtype=bool)
    is_new_NL[1:] = np.logical_or.accumulate(tokens_NL[1:] != tokens_NL[:-1], axis=1)
    node_N, first = np.zeros(len(tokens_NL), dtype=np.int64), 1
    parents, labels = [], []
    for level in range(tokens_NL.shape[1]):
        is_new_N = is_new_NL[:, level]
        parents.append(node_N[is_new_N])
        labels.append(tokens_NL[is_new_N, level].astype(np.int32))
        node_N = first - 1 + np.cumsum(is_new_N)
        first += len(labels[-1])
    counts = np.bincount(np.concatenate(parents), minlength=first)
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32), np.concatenate(labels)


def marisa_keys(rows: TokenRows) -> list[bytes]:
    """Three bytes per token, the highest first."""
    data = rows.flat.astype(">u4").view(np.uint8).reshape(-1, 4)[:, 1:].tobytes()
    bounds = (3 * rows.offsets).tolist()
    return [data[start:stop] for start, stop in pairwise(bounds)]


# -- measuring -----------------------------------------------------------------------------------------------------
def floor_bytes(rows: TokenRows, index_bytes: int) -> float:
    passes = math.ceil(math.ceil(math.log2(len(rows))) / 8)
    return 4 * len(rows.flat) + passes * 16 * len(rows) + index_bytes


def edges_ms(trie: TokenTrie) -> float:
    """Milliseconds of ``edges_of`` for 1024 random nodes with a choice."""
    nodes_N = torch.randint(0, trie.num_inner, (1024,), generator=torch.Generator().manual_seed(0))
    trie.edges_of(nodes_N)
    return 1e3 * float(np.median([harness.seconds_of(lambda: trie.edges_of(nodes_N)) for _ in range(25)]))


def compare(name: str, rows: TokenRows, sliced: int, repeats: int, floor: Callable[[float], float]) -> dict[str, Any]:
    """Ours, the dictionaries on a slice and the other baselines on one catalog, in turn: the table's rows."""
    part = rows.take(np.arange(min(sliced, len(rows))))
    sides: dict[str, Callable[[], Any]] = {"ours": lambda: TokenTrie.from_paths(rows), "dict": lambda: dict_trie(part)}
    same_length = bool((rows.lengths == rows.lengths[0]).all())
    if same_length:
        tokens_NL = rows.flat.reshape(len(rows), -1)
        sides["levels"] = lambda: level_arrays(tokens_NL)
    if marisa_trie is not None and len(rows) <= 10**6:
        keys = marisa_keys(rows)
        sides["marisa"] = lambda: marisa_trie.BinaryTrie(keys)
    timed = harness.in_turn(sides, repeats=repeats)
    trie = TokenTrie.from_paths(rows)
    least = floor(floor_bytes(rows, trie.index_bytes))
    choices = (TokenTrie.from_paths(part).num_inner, count_choices(dict_trie(part)))
    if choices[0] != choices[1]:
        raise SystemExit(f"{name}: {choices[0]} nodes with a choice, the dictionaries have {choices[1]}")
    table = []
    for side, times in timed.items():
        items = len(part) if side == "dict" else len(rows)
        row: dict[str, Any] = {"catalogue": name, "side": side, "items": items, **times.facts(),
                               "us_per_item": harness.rounded(1e6 * times.median / items)}  # fmt: skip
        if side == "ours":
            row |= {"index_bytes_per_item": harness.rounded(trie.index_bytes / items), "inner_nodes": trie.num_inner,
                    "pool_bytes_per_item": harness.rounded(trie.pool_bytes / items),
                    "decision_depth": trie.decision_depth, "edges_of_1024_ms": harness.rounded(edges_ms(trie)),
                    "floor_ratio": harness.rounded(times.median / least)}  # fmt: skip
        elif side == "levels":
            row["index_bytes_per_item"] = harness.rounded(sum(a.nbytes for a in level_arrays(tokens_NL)) / items)
        elif side == "marisa":
            row["whole_bytes_per_item"] = harness.rounded(len(marisa_trie.BinaryTrie(keys).tobytes()) / items)
        table.append(row)
    per_item = {row["side"]: row["median_seconds"] / row["items"] for row in table}
    return {"rows": table, "ours": timed["ours"].median, "floor": least,
            "dict_whole": per_item["dict"] * len(rows), "bytes": trie.index_bytes / len(rows)}  # fmt: skip


def measure_alone(kind: str, items: int, codes: int) -> dict[str, float]:
    """One build in this process: its seconds, and the peak memory of the process with imports and input."""
    rows = semantic_ids(items, codes) if kind == "sid" else titles(items)
    before, built = harness.resident_mib(), []

    def build() -> None:
        begin = time.perf_counter()
        built.append((TokenTrie.from_paths(rows), time.perf_counter() - begin))

    peak = before + harness.peak_above(build)
    [(trie, seconds)] = built
    return {"seconds": harness.rounded(seconds), "peak_rss_mib": round(peak), "input_rss_mib": round(before),
            "bytes_per_item": harness.rounded(trie.index_bytes / items)}  # fmt: skip


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--codes", type=int, default=256, help="codes per position of the semantic IDs")
    parser.add_argument("--slice", type=int, default=100_000, help="titles that the dictionaries are timed on")
    parser.add_argument("--alone", nargs=2, metavar=("KIND", "ITEMS"), help="build once and print time and memory")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.alone:
        print(json.dumps(measure_alone(given.alone[0], int(given.alone[1]), given.codes)))
        return
    if marisa_trie is None:
        print("marisa-trie: not installed", file=sys.stderr)
    million = 10**6
    machine = harness.this_machine()

    def floor(moved: float) -> float:
        return machine.floor_seconds(moved_bytes=moved)

    def child(kind: str, items: int) -> dict[str, Any]:
        return harness.in_child(
            "tests.benchmarks.trie_build", ["--alone", kind, str(items), "--codes", str(given.codes)]
        )

    report = harness.Report(
        "trie_build", machine, shapes={"items": million, "tokens": LEVELS + 1, "codes": given.codes},
        settings={"slice": given.slice, "repeats": given.repeats, "marisa": marisa_trie is not None,
                  "input": "int64 rows", "threads of the build": 1}, unfair=UNFAIR,
    )  # fmt: skip
    sid = compare("4 codes, 1M", semantic_ids(million, given.codes), million, given.repeats, floor)
    title = compare("titles, 1M", titles(million), given.slice, given.repeats, floor)
    report.rows = [*sid["rows"], *title["rows"]]
    alone = {"4 codes, 1M": child("sid", million), "titles, 1M": child("titles", million)}
    report.targets = {
        "seconds, 1M x 4 codes": harness.Target.at_most(0.6, sid["ours"]),
        "index bytes per item, 1M x 4 codes": harness.Target.at_most(16, sid["bytes"]),
        "times the dictionaries, 1M x 4 codes": harness.Target.at_least(30, sid["dict_whole"] / sid["ours"]),
        "seconds, 1M titles": harness.Target.at_most(20, title["ours"]),
    }
    if given.full:
        ten = compare("4 codes, 10M", semantic_ids(10 * million, given.codes), given.slice, given.repeats, floor)
        alone["4 codes, 10M"] = child("sid", 10 * million)
        report.rows += ten["rows"]
        report.targets["seconds, 10M x 4 codes"] = harness.Target.at_most(15, ten["ours"])
        peak = alone["4 codes, 10M"]["peak_rss_mib"]
        report.targets["peak MiB of the process, 10M x 4 codes"] = harness.Target.at_most(2048, peak)
    report.checks = {"nodes with a choice equal those of the dictionaries": True, "alone": alone,
                     "bytes_per_item": harness.rounded(sid["bytes"])}  # fmt: skip
    report.finish(ours=sid["ours"], baseline=sid["dict_whole"], floor=sid["floor"], json_file=given.json)


if __name__ == "__main__":
    main()

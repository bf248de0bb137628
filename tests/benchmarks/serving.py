"""What benchmark and soak of the server share: a model with several weights, a server in a process of its own.

Weights are drawn at random, with a spread that lets rankings be decided by more than rounding; training would change
neither what a request costs nor whether an answer is right.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import psutil

from tawin_nemo.api.client import Client, ControlClient
from tawin_nemo.commands.serve import first_catalog
from tawin_nemo.commands.session import started, trained_world
from tawin_nemo.config.backbones import Backbone
from tawin_nemo.config.load import load_recipe
from tawin_nemo.run.world import World
from tawin_nemo.serve.engine.catalog import ServedCatalog
from tests.benchmarks.harness import REPOSITORY
from tests.benchmarks.setting import qwen_shape, shared_folder, transformers_model
from tests.train.runs import SMALL, prepare_dataset

#: Seconds for a server to come up on a busy machine.
START = 240
#: Spread of the logits of a random model: that of ``setting.SPREAD`` at the width of Qwen2.5-0.5B.
LOGITS = 1.5


@dataclass(frozen=True)
class Setting:
    """A catalog, histories, and one model with several weights; ``told`` starts a server on all of it."""

    name: str
    folder: Path
    told: tuple[str, ...]
    catalog: ServedCatalog
    histories: list[list[int]]
    weights: list[Path]  # Hugging Face folders; a server starts with the first one
    shape: Backbone
    facts: dict[str, Any]

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"


def industrial(folder: Path, *, weights: int = 2) -> Setting:
    """The complete Amazon Industrial catalog by semantic IDs and the small-1m backbone."""
    data = shared_folder("amazon18_industrial")
    told = ("--recipe", str(REPOSITORY / "recipes" / "industrial_sid_cpu.yaml"), f"data.root={data}")
    return _setting("industrial_sid", folder, (*told, "data.train_limit=64", "data.eval_limit=512"), weights)


def titles(folder: Path, *, layers: int, weights: int = 2) -> Setting:
    """The model benchmarks' setting: Industrial titles in Qwen's tokens, width and vocabulary of Qwen2.5-0.5B."""
    data, words = shared_folder("amazon18_industrial"), shared_folder("qwen_tokenizer")
    told = ("--recipe", str(REPOSITORY / "recipes" / "industrial_title_cpu.yaml"), f"data.root={data}")
    told += (f"data.tokenizer={words}", "data.template=alpaca", "data.train_limit=64", "data.eval_limit=512")
    return _setting("industrial_titles", folder, told, weights, qwen_shape(layers))


def generated(folder: Path, *, weights: int = 2) -> Setting:
    """150 generated items by title and the nano backbone; needs no data."""
    data = prepare_dataset(folder / "dataset")
    return _setting("generated_titles", folder, (*SMALL, f"data.root={data}"), weights)


def _setting(
    name: str, folder: Path, told: tuple[str, ...], weights: int, shape: Backbone | None = None
) -> Setting:  # fmt: skip
    """``shape``: of the model, if not the recipe's."""
    words, file = list(told), None
    if words[0] == "--recipe":
        _, file, *words = words
    world = _world(file, [*words, f"run_dir={folder / 'run'}"])
    shape = shape or replace(world.shape, init_std=LOGITS / world.shape.hidden**0.5)
    made = []
    for seed in range(weights):
        made.append(folder / "run" / f"weights_{seed}")
        transformers_model(shape, seed=seed).save_pretrained(made[-1])
        world.tokenizer.save(made[-1])
    test, catalog = world.dataset.test, first_catalog(world)
    facts = {
        "items": len(world.catalog), "kind": world.catalog.kind, "layers": shape.layers, "hidden": shape.hidden,
        "vocab": shape.vocab, "longest_item": catalog.trie.max_depth,
    }  # fmt: skip
    histories = [list(map(int, test.history[row])) for row in range(min(len(test), 512))]
    return Setting(name, folder, told, catalog, histories, made, shape, facts)


def _world(file: str | None, words: Sequence[str]) -> World:
    """Data, tokenizer and catalog as the server reads them, in this process."""
    recipe = load_recipe(file, list(words))
    with started(recipe):
        return trained_world(recipe, weights_follow=True)  # their files are made from its shape


@dataclass(frozen=True)
class Served:
    """A server's process. ``data`` and ``control`` are addresses."""

    pid: int
    data: str
    control: str
    token: str

    def client(self) -> Client:
        return Client(self.data)

    def controller(self) -> ControlClient:
        return ControlClient(self.control, self.token, timeout_s=300)

    @property
    def resident_mib(self) -> float:
        return psutil.Process(self.pid).memory_info().rss / 2**20


def cpu_seconds(pid: int) -> float:
    """That a process has used so far, in all its threads."""
    used = psutil.Process(pid).cpu_times()
    return float(used.user + used.system)


@contextmanager
def server(setting: Setting, *more: str, threads: int) -> Iterator[Served]:
    """Ours; its log is ``run/server.log``. AssertionError when it does not come up or does not end well."""
    place = setting.run_dir / "serve" / "address.json"
    place.unlink(missing_ok=True)
    words = [*setting.told, f"run_dir={setting.run_dir}", f"model.init={setting.weights[0]}"]
    words += [f"trainer.threads={threads}", "serve.port=0", "serve.control_port=0", *more]
    with process(["tawin_nemo", "serve", *words], setting.run_dir / "server.log", threads) as started:
        wait_for(lambda: place.is_file(), started, setting.run_dir / "server.log")
        found = json.loads(place.read_text(encoding="utf-8"))
        token = (setting.run_dir / "serve" / "control_token").read_text(encoding="ascii").strip()
        yield Served(int(found["pid"]), found["data"], found["control"], token)


@contextmanager
def process(words: Sequence[str], log: Path, threads: int) -> Iterator[subprocess.Popen[bytes]]:
    """``python -m WORDS`` with so many threads, until the block ends; both streams go to ``log``."""
    told = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    with log.open("ab") as stream:
        started = subprocess.Popen(
            [sys.executable, "-m", *words], stdout=stream, stderr=stream, env=told, cwd=REPOSITORY
        )
    try:
        yield started
    finally:
        started.terminate()
        try:
            started.wait(60)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()


def wait_for(ready: Any, started: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START
    while not ready():
        text = log.read_text(encoding="utf-8", errors="replace")[-3000:] if started.poll() is not None else ""
        assert started.poll() is None, f"it ended with {started.returncode}: {text}"
        assert time.monotonic() < end, f"nothing answers after {START} s"
        time.sleep(0.05)


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2).status_code == 200
    except httpx.TransportError:
        return False


@contextmanager
def temporary_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="tawin_serve_") as name:
        yield Path(name)

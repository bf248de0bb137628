"""A server on real sockets in a thread of the test, over a model that can be stopped and whose answers are exact."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from prometheus_client.parser import text_string_to_metric_families
from torch import Tensor

from tawin_nemo.api.client import Client, ControlClient
from tawin_nemo.config.schema import CatalogConfig, DataConfig, ModelConfig, ServeConfig
from tawin_nemo.data.catalog_builder import build_catalog
from tawin_nemo.data.prompts import Template
from tawin_nemo.data.tokenizer import Tokenizer, build_tokenizer
from tawin_nemo.serve.engine.catalog import PromptFormat, ServedCatalog
from tawin_nemo.serve.engine.engine import Engine
from tawin_nemo.serve.engine.item_fields import MatchCache
from tawin_nemo.serve.engine.jobs import Limits
from tawin_nemo.serve.engine.ranks import Leader, SingleProcess
from tawin_nemo.serve.engine.replica import FromTensors, Replica
from tawin_nemo.serve.engine.saved_changes import SavedChanges
from tawin_nemo.serve.engine.telemetry import Metrics
from tawin_nemo.serve.http.requests import ServerContext
from tawin_nemo.serve.http.server import Secrets, Server
from tawin_nemo.types import TokenRows
from tawin_nemo.util.errors import CheckpointError
from tests.rollout.sequence_lm import TableLM

KEY, TOKEN = "a-user's-key-0123456789", "the-operator's-token-0123456789"
MODEL = "table"
WORDS = ("red", "blue", "lamp", "table", "chair", "old", "new", "small")
#: 40 titles of one to three words, some beginning alike; items 38 and 39 are written like items 0 and 1.
TITLES = [
    *dict.fromkeys(" ".join(WORDS[i // p % 8] for p in (1, 8, 3)[: 1 + i % 3]) for i in range(0, 1000, 7)),
][:38]
TITLES += TITLES[:2]
#: What the weights of the table model consist of.
TENSORS = [{"tens": (1,)}, {"ones": (2, 3)}]
IDS = [f"B{number:04}" for number in range(len(TITLES))]


@cache
def tokenizer() -> Tokenizer:
    return build_tokenizer(DataConfig(bpe_vocab_size=300), CatalogConfig(), ModelConfig(), TITLES, None)


def prompt_format(max_history: int = 5) -> PromptFormat:
    return PromptFormat(tokenizer(), Template(), max_history, 200)


def first_catalog() -> ServedCatalog:
    catalog = build_catalog(TITLES, IDS, TITLES, tokenizer(), Template(), kind="title")
    return ServedCatalog.of(catalog, TITLES, prompt_format())


@dataclass
class GateLM(TableLM):
    """Model calls behind the prompts wait while ``gate`` is closed."""

    impossible: bool = False
    gate: threading.Event = field(default_factory=threading.Event)
    broken: bool = False

    def logprobs(self, cache: Any, row_N: Tensor, position_E: Tensor, token_E: Tensor, space: str) -> Tensor:
        assert self.gate.wait(60), "the gate was never opened"
        if self.broken:
            raise RuntimeError("this model is broken")
        return super().logprobs(cache, row_N, position_E, token_E, space)


@dataclass
class Scene:
    """A running server and the two clients' addresses."""

    server: Server
    engine: Engine
    gate: threading.Event
    data: str
    control: str
    weights: dict[int, GateLM]

    def client(self, key: str = KEY, **options: Any) -> Client:
        return Client(self.data, key, **options)

    def controller(self, token: str = TOKEN) -> ControlClient:
        return ControlClient(self.control, token)

    def http(self, **options: Any) -> httpx.Client:
        headers = {"Authorization": f"Bearer {KEY}"}
        return httpx.Client(base_url=self.data, headers=headers, timeout=30, verify=False, **options)

    def metric(self, name: str, **labels: str) -> float:
        return metric_in(self.engine.metrics.text().decode(), name, **labels)

    def wait_until(self, what: Any, seconds: float = 60) -> None:
        """Wait for a condition of the engine; AssertionError when it does not come."""
        waiting = threading.Event()
        for _ in range(int(seconds / 0.01)):
            if what():
                return
            waiting.wait(0.01)
        raise AssertionError("what was waited for did not happen")


def metric_in(text: str, name: str, **labels: str) -> float:
    """One sample of Prometheus' text format; 0 where the labels have not occurred yet."""
    families = list(text_string_to_metric_families(text))
    for family in families:
        for sample in family.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                return float(sample.value)
    assert any(name.startswith(family.name) for family in families), f"no metric is called {name}"
    return 0.0


@contextmanager
def serving(
    roots: Sequence[Path] = (), *, catalog: ServedCatalog | None = None, keys: Sequence[str] = (KEY,),
    kind: type[GateLM] = GateLM, saved: Path | None = None, filters: MatchCache | None = None, **changes: Any,
) -> Iterator[Scene]:  # fmt: skip
    """A server with these ``serve`` settings; the model's weights are the number in a file, and its gate is open.

    ``filters``: those by item fields; without, items have ids and titles only.
    """
    settings = replace(ServeConfig(port=0, control_port=0, beams=6, max_beams=64, drain_s=5), **changes)
    gate = threading.Event()
    gate.set()
    made: dict[int, GateLM] = {}

    def load(path: str) -> GateLM:
        try:
            seed = int(Path(path).read_text()) if path else 0
        except ValueError as error:
            raise CheckpointError(f"{path} holds no weights") from error
        made[seed] = kind(vocab, seed=seed, gate=gate)
        return made[seed]

    def build_from_tensors(rows: Iterable[Mapping[str, Tensor]]) -> GateLM:
        """The model of a seed, which comes as two tensors: its tens and its ones."""
        tensors = {name: value for row in rows for name, value in row.items()}
        seed = int(10 * tensors["tens"].item() + tensors["ones"].mean().item())
        made[seed] = kind(vocab, seed=seed, gate=gate)
        return made[seed]

    parts = FromTensors(TENSORS, torch.float32, build_from_tensors)
    state = SavedChanges(saved, catalog := catalog or first_catalog())
    catalog, replica = state.restored(catalog), Replica(load, from_tensors=parts)
    vocab = catalog.prompt_format.tokenizer.size
    catalog.warm()
    replica.models[1], replica.tries[catalog.version] = load(""), catalog.trie
    metrics = Metrics(settings.variant)
    engine = Engine(Leader(replica, SingleProcess()), catalog, limits=Limits.of(settings), metrics=metrics, weights=1)
    del catalog  # or it would stay in memory
    own = {} if filters is None else {"filters": filters}
    context = ServerContext(settings, MODEL, settings.beams, "trie", 0.0, 2048, vocab, **own)
    server = Server(engine, context, Secrets(list(keys), TOKEN), roots=list(roots), saved=state)
    data, control = (f"http://127.0.0.1:{port}" for port in server.ports)
    ready = threading.Event()
    thread = threading.Thread(target=server.run, args=(ready.set,), daemon=True)
    engine.start()
    thread.start()
    try:
        assert ready.wait(30), "the server did not start"
        yield Scene(server, engine, gate, data, control, made)
    finally:
        gate.set()
        server.drain(0.0)
        thread.join(30)
    assert not thread.is_alive(), "the server did not end"
    assert engine.failed.exception(timeout=30) is None


# -- the slow oracle ---------------------------------------------------------------------------------------------------
def path_scores(
    history: Sequence[int],
    *,
    seed: int = 0,
    catalog: ServedCatalog | None = None,
    space: str = "trie",
    prompt: TokenRows | None = None,
) -> dict[int, float]:
    """Summed log-prob of every live item (by number), token by token through the trie; quarters, so exact."""
    catalog = catalog or first_catalog()
    lm = TableLM(catalog.prompt_format.tokenizer.size, seed=seed, impossible=False)
    tokens = (catalog.prompt(history) if prompt is None else prompt).flat.tolist()
    found = {}
    for number in catalog.number_J.tolist():
        position, path, score = catalog.trie.root, tokens[:], 0.0
        for token in catalog.paths[number].tolist():
            choices, _ = catalog.trie.children(position)
            values = lm.path_logprobs(path, choices.tolist(), space)
            score += values[choices.tolist().index(token)]
            position, path = catalog.trie.step(position, token), [*path, token]
        found[number] = score
    return found


def best_scores(scores: dict[int, float], allowed: Sequence[int], catalog: ServedCatalog, n: int) -> list[float]:
    """The n best scores of the allowed items, items on one path counting once."""
    of_leaf = {int(catalog.trie.leaf_I[catalog.trie_item_I[number]]): scores[number] for number in allowed}
    return sorted(of_leaf.values(), reverse=True)[:n]


def probability(score: float) -> float:
    return math.exp(score)


def draws_of(rng: np.random.Generator, most: int = 4) -> list[int]:
    """A random history."""
    return rng.integers(0, len(TITLES), rng.integers(0, most + 1)).tolist()

"""The product's metric sinks against the real libraries: what was sent is read back."""

from __future__ import annotations

import math
import struct
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tawin_nemo.config.load import load_recipe
from tawin_nemo.config.schema import SINKS, Recipe
from tawin_nemo.config.seams import imported
from tawin_nemo.config.sinks import LIBRARIES
from tawin_nemo.run.sink_worker import Line, Worker
from tawin_nemo.run.sinks import BUILT_IN, TRAINING_METRICS, mlflow_name, opened
from tawin_nemo.util.errors import ConfigError
from tests.run.receiver import receiver

LOGGED = [("sft", 1, {"train/loss": 2.5, "mfu/step": 0.25}), ("rl", 1, {"rl/reward": 0.5, "valid/ndcg@3": 0.75}),
          ("rl", 2, {"rl/reward": 1.0})]  # fmt: skip


def recipe(*overrides: str) -> Recipe:
    return load_recipe(None, ["name=shop", *overrides])


def logged(name: str, run_dir: Path, *overrides: str, lines: Sequence[tuple[str, int, dict]] = LOGGED) -> None:
    """Send ``lines`` through a sink of the product and close it."""
    worker = opened(name, recipe(*overrides), run_dir)
    for line in lines:
        worker(*line)
    worker.close()


def labels(**pairs: str) -> frozenset[tuple[str, str]]:
    return frozenset(pairs.items())


def test_every_sink_that_the_recipe_may_name_exists():
    assert BUILT_IN.keys() == LIBRARIES.keys() == set(SINKS)
    assert recipe("trainer.metric_sinks=tensorboard,wandb,math:cos").trainer.metric_sinks[2] == "math:cos"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("trainer.metric_sinks=tensorbored", "tensorboard"),
        ("trainer.metric_sinks=prometheus", "sinks.pushgateway is empty; set sinks.pushgateway=HOST:9091"),
        ("trainer.metric_sinks=wandb,otlp,wandb", "names wandb twice"),
        ("serve.variant=a b", "serve.variant=a b is sent as a header"),
    ],
)
def test_a_wrong_word_ends_with_a_remedy(words: str, message: str):
    with pytest.raises(ConfigError) as error:
        recipe(words)
    assert message in str(error.value)


@pytest.mark.parametrize("name", SINKS)
def test_a_missing_library_ends_the_run_before_it_starts(name: str, monkeypatch: pytest.MonkeyPatch):
    named = recipe(f"trainer.metric_sinks={name}", "sinks.pushgateway=nowhere:9091", "sinks.mlflow_uri=http://nowhere")
    assert imported(named, trains=True) == named
    module, requirement = LIBRARIES[name].module, LIBRARIES[name].requirement
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError) as error:
        imported(named, trains=True)
    assert str(error.value).startswith(f"trainer.metric_sinks={name} needs the package {module}")
    assert str(error.value).endswith(f"pip install {requirement}")
    imported(named, trains=False)  # verbs that do not train send nothing


def test_mlflow_without_a_server_ends_the_run_before_it_starts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match=r"^trainer\.metric_sinks=mlflow needs an MLflow server, but sinks\.mlflow"):
        imported(recipe("trainer.metric_sinks=mlflow"), trains=True)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://nowhere")
    imported(recipe("trainer.metric_sinks=mlflow"), trains=True)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(item.step, item.value) for item in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_files_are_read_back_and_a_later_attempt_replaces_what_it_repeats(tmp_path: Path):
    logged("tensorboard", tmp_path)
    assert scalars(tmp_path / "tensorboard" / "sft") == {"train/loss": [(1, 2.5)], "mfu/step": [(1, 0.25)]}
    assert scalars(tmp_path / "tensorboard" / "rl")["rl/reward"] == [(1, 0.5), (2, 1.0)]
    logged("tensorboard", tmp_path, lines=[("rl", 2, {"rl/reward": 4.0}), ("rl", 3, {"rl/reward": 5.0})])
    assert scalars(tmp_path / "tensorboard" / "rl")["rl/reward"] == [(1, 0.5), (2, 4.0), (3, 5.0)]


def wandb_history(file: Path) -> list[dict[str, float]]:
    """The history of an offline run: LevelDB's log format (blocks of 32 KiB) of protobuf records."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts, found = file.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record, parts = Record.FromString(parts), b""
            if record.HasField("history"):
                items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                found.append({key: float(value) for key, value in items.items() if not key.startswith("_")})
    return found


def test_wandb_offline_every_stage_has_its_own_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged("wandb", tmp_path)
    (file,) = tmp_path.rglob("run-*.wandb")
    assert (tmp_path / "run_id").read_text() in file.name
    end = time.monotonic() + 60  # wandb-core may still write when finish() has returned
    while len(wandb_history(file)) < len(LOGGED) and time.monotonic() < end:
        time.sleep(0.05)
    assert wandb_history(file) == [
        {**{f"{stage}/{name}": value for name, value in metrics.items()}, f"{stage}/step": step}
        for stage, step, metrics in LOGGED
    ]


def test_mlflow_a_later_attempt_continues_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # of newer versions, in place of a server

    place = (f"sinks.mlflow_uri={(tmp_path / 'store').as_uri()}", "sinks.project=p", "seed=7")
    logged("mlflow", tmp_path, *place)
    logged("mlflow", tmp_path, *place, lines=[("rl", 3, {"rl/reward": 1.5})])
    client = MlflowClient(place[0].split("=")[1])
    (run,) = client.search_runs([client.get_experiment_by_name("p").experiment_id])
    assert (run.info.run_name, run.info.status, run.data.params["seed"]) == ("shop", "FINISHED", "7")
    rewards = client.get_metric_history(run.info.run_id, "rl/rl/reward")
    assert [(item.step, item.value) for item in rewards] == [(1, 0.5), (2, 1.0), (3, 1.5)]
    assert run.data.metrics["rl/valid/ndcg_at_3"] == 0.75
    assert mlflow_name("a@b%c") == "a_at_b_c"


def test_the_pushgateway_gets_every_value_under_the_runs_name():
    with receiver(202) as gateway:
        logged("prometheus", Path("/nowhere"), f"sinks.pushgateway={gateway.url}")
        assert {line for line, _ in gateway.requests} == {"PUT /metrics/job/tawin-nemo/run/shop"}
        *_, last = gateway.pushed()
    assert {name for name, _ in last} == TRAINING_METRICS.keys()
    assert last["tawin_training_metric", labels(stage="rl", metric="rl/reward")] == 1.0
    assert last["tawin_training_metric", labels(stage="rl", metric="valid/ndcg@3")] == 0.75
    assert last["tawin_training_step", labels(stage="rl")] == 2
    assert abs(last["tawin_training_last_log_timestamp_seconds", labels(stage="sft")] - time.time()) < 60
    assert last["tawin_training_running", labels()] == 0
    assert gateway.pushed()[0]["tawin_training_running", labels()] == 1


def test_a_collector_gets_the_same_over_otlp():
    with receiver() as collector:
        logged("otlp", Path("/nowhere"), f"sinks.otlp_endpoint={collector.url}/v1/metrics")
        first, *_, last = collector.exported()
        resource = collector.resources()[0]
    assert {name.replace(".", "_") for name, _ in last} == TRAINING_METRICS.keys()
    assert last["tawin.training.metric", labels(stage="rl", metric="rl/reward")] == 1.0
    assert last["tawin.training.step", labels(stage="sft")] == 1
    assert (first["tawin.training.running", labels()], last["tawin.training.running", labels()]) == (1, 0)
    assert (resource["service.name"], resource["tawin.run"]) == ("tawin-nemo", "shop")


@pytest.mark.parametrize("name", ["prometheus", "otlp"])
def test_a_receiver_that_fails_costs_a_warning_and_not_the_run(name: str, caplog: pytest.LogCaptureFixture):
    with receiver(400) as broken:
        logged(
            name, Path("/nowhere"), f"sinks.pushgateway={broken.url}", f"sinks.otlp_endpoint={broken.url}/v1/metrics"
        )
    told = [record.message for record in caplog.records if "the run goes on" in record.message]
    assert len(told) == 1
    assert told[0].startswith(f"metric sink {name}: ")


class Hanging:
    """A sink whose first write lasts until ``gate`` opens."""

    def __init__(self) -> None:
        self.gate, self.lines, self.began = threading.Event(), list[Line](), threading.Event()

    def write(self, lines: Sequence[Line]) -> None:
        self.began.set()
        assert self.gate.wait(60)
        self.lines += lines

    def close(self) -> None:
        """Nothing to finish."""


@pytest.fixture
def hanging() -> Iterator[Hanging]:
    sink = Hanging()
    yield sink
    sink.gate.set()


def test_a_sink_that_hangs_holds_nobody_up(hanging: Hanging, caplog: pytest.LogCaptureFixture):
    worker = Worker("slow", hanging, waiting=3)
    worker("rl", 0, {"a": 1.0})
    assert hanging.began.wait(60)
    began = time.monotonic()
    for step in range(1, 6):  # three wait, two are dropped
        worker("rl", step, {"a": math.nan, "text": "no number"})  # type: ignore[dict-item]
    worker.close(limit=0.1)
    assert time.monotonic() - began < 10
    assert "metric sink slow: 6 of 6 lines were not written" in caplog.text


def test_what_waits_is_written_before_a_sink_is_closed(hanging: Hanging):
    worker = Worker("slow", hanging)
    for step in range(5):
        worker("rl", step, {"a": float(step), "text": "no number"})  # type: ignore[dict-item]
    hanging.gate.set()
    worker.close()
    assert [(line.step, line.metrics) for line in hanging.lines] == [(step, {"a": float(step)}) for step in range(5)]


def test_a_library_that_cannot_open_its_sink_names_the_key(tmp_path: Path):
    (tmp_path / "run").write_text("a file where a folder should be")
    with pytest.raises(ConfigError, match=r"trainer\.metric_sinks=wandb could not be opened"):
        opened("wandb", recipe("sinks.project=a/b"), tmp_path / "run")

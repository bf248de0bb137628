"""The metric sinks of the product: TensorBoard, W&B, MLflow, a Prometheus Pushgateway and OpenTelemetry, without NeMo.

``trainer.metric_sinks`` names them, section ``sinks`` sets them; everything else is the library's own (``WANDB_MODE``,
``MLFLOW_TRACKING_TOKEN``, ``OTEL_EXPORTER_OTLP_HEADERS`` ...). Each library is imported when its sink is opened. Every
sink writes in a thread of its own (``sink_worker``); what a library raises there is logged and never ends the run.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tawin_nemo.config.fields import leaf_fields, value_of
from tawin_nemo.config.schema import Recipe
from tawin_nemo.config.sinks import mlflow_uri
from tawin_nemo.run.sink_worker import Line, Sink, Worker
from tawin_nemo.util.errors import ConfigError
from tawin_nemo.util.files import atomic_path

#: Metrics of one MLflow request (its server's limit), seconds that a push may take.
_MLFLOW_BATCH, _PUSH_S = 1000, 10.0
#: Names of the training metrics in Prometheus, with their help; OpenTelemetry writes ``.`` for the first two ``_``.
TRAINING_METRICS = {
    "tawin_training_metric": "value of a metric at the last step",
    "tawin_training_step": "last step that was logged",
    "tawin_training_last_log_timestamp_seconds": "time of the last logged step",
    "tawin_training_running": "1 while the run goes on, 0 after it has ended or was stopped",
}


def run_id(run_dir: Path) -> str:
    """The id of a run in W&B, the same in every attempt: drawn once and stored in ``RUN_DIR/run_id``."""
    kept = run_dir / "run_id"
    if not kept.is_file():
        with atomic_path(kept) as temporary:
            temporary.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
    return kept.read_text(encoding="utf-8")


def changed_keys(recipe: Recipe) -> dict[str, Any]:
    """The keys whose values are not the defaults, with their values."""
    default = Recipe()
    values = {key: value_of(recipe, key) for key, _ in leaf_fields(Recipe)}
    return {key: value for key, value in values.items() if value != value_of(default, key)}


class TensorBoardSink:
    """Event files in ``RUN_DIR/tensorboard/STAGE``.

    A run that continues purges what an earlier attempt logged at later steps than it starts from.
    """

    def __init__(self, recipe: Recipe, run_dir: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._make, self._folder = SummaryWriter, run_dir / "tensorboard"
        self._writers: dict[str, SummaryWriter] = {}

    def write(self, lines: Sequence[Line]) -> None:
        for line in lines:
            writer = self._writers.get(line.stage)
            if writer is None:
                folder = str(self._folder / line.stage)
                writer = self._make(folder, purge_step=line.step)
                self._writers[line.stage] = writer
            for name, value in line.metrics.items():
                writer.add_scalar(name, value, line.step, walltime=line.time)
        for writer in self._writers.values():
            writer.flush()

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


class WandbSink:
    """One W&B run, which a later attempt continues; every stage has its own axis ``STAGE/step``."""

    def __init__(self, recipe: Recipe, run_dir: Path) -> None:
        import wandb

        self._run = wandb.init(
            project=recipe.sinks.project, name=recipe.name, id=run_id(run_dir), resume="allow", dir=str(run_dir),
            config=changed_keys(recipe),
        )  # fmt: skip
        self._stages: set[str] = set()

    def write(self, lines: Sequence[Line]) -> None:
        for line in lines:
            axis = f"{line.stage}/step"
            if line.stage not in self._stages:
                self._stages.add(line.stage)
                self._run.define_metric(f"{line.stage}/*", step_metric=axis)
            named = {f"{line.stage}/{name}": value for name, value in line.metrics.items()}
            self._run.log({**named, axis: line.step})

    def close(self) -> None:
        self._run.finish()


class MlflowSink:
    """One MLflow run of experiment ``sinks.project``, which a later attempt continues (``RUN_DIR/mlflow_run``)."""

    def __init__(self, recipe: Recipe, run_dir: Path) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric, self._client = Metric, MlflowClient(mlflow_uri(recipe, "trainer.metric_sinks=mlflow"))
        kept = run_dir / "mlflow_run"
        if kept.is_file():
            self._run = kept.read_text(encoding="utf-8")
            self._client.update_run(self._run, status="RUNNING")
            return
        found = self._client.get_experiment_by_name(recipe.sinks.project)
        experiment = found.experiment_id if found else self._client.create_experiment(recipe.sinks.project)
        self._run = self._client.create_run(experiment, run_name=recipe.name).info.run_id
        params = [Param(key, str(value)[:500]) for key, value in changed_keys(recipe).items()]
        for start in range(0, len(params), 100):
            self._client.log_batch(self._run, params=params[start : start + 100])
        with atomic_path(kept) as temporary:
            temporary.write_text(self._run, encoding="utf-8")

    def write(self, lines: Sequence[Line]) -> None:
        metrics = [
            self._metric(mlflow_name(f"{line.stage}/{name}"), value, int(line.time * 1000), line.step)
            for line in lines
            for name, value in line.metrics.items()
        ]
        for start in range(0, len(metrics), _MLFLOW_BATCH):
            self._client.log_batch(self._run, metrics=metrics[start : start + _MLFLOW_BATCH])

    def close(self) -> None:
        self._client.set_terminated(self._run)


def mlflow_name(name: str) -> str:
    """``name`` in the characters that MLflow allows.

    >>> mlflow_name("rl/valid/ndcg@10")
    'rl/valid/ndcg_at_10'
    """
    return re.sub(r"[^\w\-. :/]", "_", name.replace("@", "_at_"))


class PrometheusSink:
    """The newest values on a Pushgateway, as job ``tawin-nemo`` with the recipe's name as label ``run``."""

    def __init__(self, recipe: Recipe, run_dir: Path) -> None:
        from prometheus_client import CollectorRegistry, Gauge, push_to_gateway

        self._push, self._registry = push_to_gateway, CollectorRegistry()
        self._gateway, self._run = recipe.sinks.pushgateway, recipe.name
        labels: tuple[list[str], ...] = (["stage", "metric"], ["stage"], ["stage"], [])
        self._value, self._step, self._time, self._running = (
            Gauge(name, text, names, registry=self._registry)
            for (name, text), names in zip(TRAINING_METRICS.items(), labels, strict=True)
        )
        self._running.set(1)

    def write(self, lines: Sequence[Line]) -> None:
        for line in lines:
            for name, value in line.metrics.items():
                self._value.labels(line.stage, name).set(value)
            self._step.labels(line.stage).set(line.step)
            self._time.labels(line.stage).set(line.time)
        self._send()

    def close(self) -> None:
        self._running.set(0)
        self._send()

    def _send(self) -> None:
        self._push(self._gateway, "tawin-nemo", self._registry, grouping_key={"run": self._run}, timeout=_PUSH_S)


class OtlpSink:
    """The newest values, sent to an OpenTelemetry collector over OTLP/HTTP after every line."""

    def __init__(self, recipe: Recipe, run_dir: Path) -> None:
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import InMemoryMetricReader, MetricExportResult
        from opentelemetry.sdk.resources import Resource

        self._success = MetricExportResult.SUCCESS
        self._exporter = OTLPMetricExporter(endpoint=recipe.sinks.otlp_endpoint or None)
        self._reader = InMemoryMetricReader()
        resource = Resource.create({"service.name": "tawin-nemo", "tawin.run": recipe.name})
        self._provider = MeterProvider([self._reader], resource, shutdown_on_exit=False)
        meter = self._provider.get_meter("tawin_nemo")
        self._value, self._step, self._time, self._running = (
            meter.create_gauge(name.replace("_", ".", 2), description=text) for name, text in TRAINING_METRICS.items()
        )
        self._running.set(1)

    def write(self, lines: Sequence[Line]) -> None:
        for line in lines:
            for name, value in line.metrics.items():
                self._value.set(value, {"stage": line.stage, "metric": name})
            self._step.set(line.step, {"stage": line.stage})
            self._time.set(line.time, {"stage": line.stage})
        self._send()

    def close(self) -> None:
        self._running.set(0)
        self._send()
        self._provider.shutdown()
        self._exporter.shutdown()

    def _send(self) -> None:
        if self._exporter.export(self._reader.get_metrics_data()) is not self._success:
            raise ConnectionError("the collector did not take the metrics (its answer stands above)")


BUILT_IN: dict[str, Callable[[Recipe, Path], Sink]] = {
    "tensorboard": TensorBoardSink, "wandb": WandbSink, "mlflow": MlflowSink, "prometheus": PrometheusSink,
    "otlp": OtlpSink,
}  # fmt: skip


def opened(name: str, recipe: Recipe, run_dir: Path) -> Worker:
    """The sink ``name`` of the product, open. Raises ConfigError when its library cannot open it."""
    try:
        return Worker(name, BUILT_IN[name](recipe, run_dir))
    except Exception as error:  # every library raises its own types
        raise ConfigError(
            f"trainer.metric_sinks={name} could not be opened ({type(error).__name__}: {error}); mend section sinks, "
            f"or leave {name} out"
        ) from error

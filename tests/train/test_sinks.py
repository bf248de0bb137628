"""A whole run with metric sinks: what they get is what the run logs, and the run computes the same as without them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.run.receiver import receiver
from tests.run.test_sinks import labels, scalars
from tests.train.runs import SMALL, metrics, run


@pytest.mark.slow
def test_a_run_sends_what_it_logs_and_computes_the_same(small_dataset: Path, finished_run: Path, tmp_path: Path):
    with receiver(202) as gateway, receiver() as collector:
        run(
            *SMALL, f"data.root={small_dataset}", f"run_dir={tmp_path}", "compare.sft_continued=false", "name=shop",
            "trainer.metric_sinks=tensorboard,prometheus,otlp", f"sinks.pushgateway={gateway.url}",
            f"sinks.otlp_endpoint={collector.url}/v1/metrics",
        )  # fmt: skip
    for stage in ("sft", "rl"):
        log = Path(stage) / "metrics.jsonl"
        assert (tmp_path / log).read_bytes() == (finished_run / log).read_bytes()
    *_, last = metrics(tmp_path, "rl")
    timing = json.loads((tmp_path / "rl" / "timings.jsonl").read_text().splitlines()[-1])
    pushed, exported = gateway.pushed()[-1], collector.exported()[-1]
    shown = scalars(tmp_path / "tensorboard" / "rl")
    for name, value in last.items():
        if name != "step":
            place = labels(stage="rl", metric=name)
            assert pushed["tawin_training_metric", place] == exported["tawin.training.metric", place] == value
            assert shown[name][-1] == (last["step"], pytest.approx(value, rel=1e-6))  # float32 in event files
    assert pushed["tawin_training_metric", labels(stage="rl", metric="mfu/step")] == timing["mfu/step"]
    assert pushed["tawin_training_step", labels(stage="rl")] == last["step"] == 4
    assert pushed["tawin_training_running", labels()] == 0
    assert {line for line, _ in gateway.requests} == {"PUT /metrics/job/tawin-nemo/run/shop"}

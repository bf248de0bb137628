"""Alert rules, dashboard and scrape configuration: what they name is exported by the product, with those labels."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from tawin_nemo.config.load import load_recipe
from tawin_nemo.run.sinks import PrometheusSink
from tawin_nemo.serve.engine.telemetry import PHASES, REJECTIONS, Metrics
from tests.run.receiver import receiver
from tests.train.runs import metrics

MONITORING = Path(__file__).parents[2] / "slurm" / "monitoring"
#: What Prometheus adds to every target.
OWN_METRICS, OWN_LABELS = {"up"}, {"job", "instance", "run"}
#: Values of labels that the product sets, by label; ``code`` is an HTTP status.
VALUES = {"phase": PHASES, "reason": REJECTIONS, "stage": ("sft", "rl"), "code": ("200", "404", "429", "500", "503")}


def exported() -> dict[str, set[str]]:
    """Every sample of the server and of training's sink by name, with the labels that it has."""
    server = Metrics("a")
    server.requests.labels("data:/v1/recommendations", "200")
    server.versions.labels("weights")
    server.swaps.labels("weights")
    with receiver() as gateway:
        recipe = load_recipe(None, [f"sinks.pushgateway={gateway.url}"])
        registry: CollectorRegistry = PrometheusSink(recipe, Path("/nowhere"))._registry
    families = [*registry.collect(), *text_string_to_metric_families(server.text().decode())]
    found = {sample.name: set(sample.labels) for family in families for sample in family.samples}
    labelled = {"tawin_training_metric": {"stage", "metric"}, "tawin_training_step": {"stage"},
                "tawin_training_last_log_timestamp_seconds": {"stage"}}  # fmt: skip
    assert labelled.keys() <= {family.name for family in families}
    return found | labelled


EXPORTED = exported()


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((MONITORING / "alerts.yaml").read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    return json.loads((MONITORING / "dashboard.json").read_text(encoding="utf-8"))


def panels() -> list[dict[str, Any]]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def expressions() -> list[str]:
    shown = [target["expr"] for panel in panels() for target in panel["targets"]]
    return [*(rule["expr"] for rule in rules()), *shown]


def selectors(node: Any) -> Iterator[promql_parser.VectorSelector]:
    """Every selector in a parsed expression."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node
    for name in ("expr", "lhs", "rhs", "vector_selector", "args", "param"):
        inner = getattr(node, name, None)
        for part in inner if isinstance(inner, list) else [inner]:
            if part is not None:
                yield from selectors(part)


@pytest.mark.parametrize("text", expressions())
def test_an_expression_is_promql_over_metrics_and_labels_of_the_product(text: str):
    found = list(selectors(promql_parser.parse(text)))
    assert found
    for selector in found:
        assert selector.name in OWN_METRICS | EXPORTED.keys(), selector.name
        known = EXPORTED.get(selector.name, set()) | OWN_LABELS
        for matcher in selector.matchers.matchers:
            assert matcher.name in known, (selector.name, matcher.name)
            values = VALUES.get(matcher.name)
            if values and "$" not in matcher.value:
                assert any(re.fullmatch(matcher.value, value) for value in values), matcher.value


def test_labels_of_groupings_and_joins_are_those_of_the_product():
    every = {label for labels in EXPORTED.values() for label in labels} | OWN_LABELS
    for text in expressions():
        for names in re.findall(r"\b(?:by|on|group_left|without|ignoring) *\(([^)]*)\)", text):
            assert set(re.findall(r"\w+", names)) <= every, text


def test_the_scan_would_find_a_metric_that_nobody_exports():
    (selector,) = selectors(promql_parser.parse("sum(rate(tawin_request_total[5m]))"))
    assert selector.name not in EXPORTED


@pytest.mark.slow
def test_training_metrics_that_the_dashboard_shows_are_logged(finished_run: Path):
    """Of a pattern at least one alternative is logged by each run; of a name, the name."""
    searched = {
        "valid/ndcg@3",
        "valid/recall@3",
    }  # by runs with trainer.val_check_interval: tests/train/test_own_code.py
    logged = searched | {key for stage in ("sft", "rl") for line in metrics(finished_run, stage) for key in line}
    for stage in ("sft", "rl"):
        lines = (finished_run / stage / "timings.jsonl").read_text(encoding="utf-8").splitlines()
        logged |= {key for line in lines for key in json.loads(line)}
    shown = [
        alternative
        for text in expressions()
        for selector in selectors(promql_parser.parse(text))
        for matcher in selector.matchers.matchers
        if matcher.name == "metric"
        for alternative in re.split(r"\|(?![^(]*\))", matcher.value)
    ]
    assert len(shown) > 8
    assert [text for text in shown if not any(re.fullmatch(text, key) for key in logged)] == []


def test_a_rule_says_when_how_bad_and_what():
    assert len({rule["alert"] for rule in rules()}) == len(rules()) >= 8
    for rule in rules():
        assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert re.fullmatch(r"\d+[smh]", rule.get("for", "1m"))
        for label in re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]):
            assert label in rule["expr"] or label in OWN_LABELS, rule["alert"]


def test_the_dashboard_can_be_laid_out():
    """Panels have ids of their own and do not overlap; variables are defined, used and filled by the product."""
    board = dashboard()
    everything = board["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    cells = [
        (x, y)
        for panel in everything
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) == 23
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(board["panels"]))) - {"__all"}
    variables = {item["name"]: item for item in board["templating"]["list"]}
    assert used == variables.keys()
    for item in variables.values():
        if item["type"] == "query":
            metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", item["definition"]).groups()
            assert label in EXPORTED[metric] | OWN_LABELS
    for panel in panels():
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references) > 0
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_grafanas_own_model_loads_the_dashboard():
    from grafana_foundation_sdk.cog import plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    plugins.register_default_plugins()
    loaded = Dashboard.from_json(dashboard())
    assert loaded.title == "tawin-nemo"
    shown = [panel for panel in loaded.panels or [] if panel.type_val == "timeseries"]
    assert len(shown) == len(panels())
    assert all(target.expr for panel in shown for target in panel.targets)  # of Prometheus' query type


def test_prometheus_reads_the_rules_and_keeps_the_labels_that_training_pushes():
    scrape = yaml.safe_load((MONITORING / "prometheus.yaml").read_text(encoding="utf-8"))
    assert all((MONITORING / file).is_file() for file in scrape["rule_files"])
    jobs = {job["job_name"]: job for job in scrape["scrape_configs"]}
    named = set(re.findall(r'job="([^"]+)"', " ".join(expressions())))
    assert named <= jobs.keys()
    assert jobs["pushgateway"]["honor_labels"] is True

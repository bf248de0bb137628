"""The report of a run: one self-contained HTML page with settings, results and their confidence intervals."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tawin_nemo.eval import figures
from tawin_nemo.eval.result import Comparison, EvalResult, compare
from tawin_nemo.eval.run_files import LAST_STAGE, ReportInput, StageRecord, load_report
from tawin_nemo.maths.tawin import weight_profile
from tawin_nemo.util.errors import DataError
from tawin_nemo.util.files import atomic_path

#: Stages that the others are compared with, row by row.
BASELINES = ("sft", "sft_continued")
PACKAGES = ("tawin-nemo", "torch", "megatron-core", "transformers", "numpy")

TITLES = {
    "zero_shot": "Without training",
    "sft": "SFT",
    "sft_continued": "SFT continued on the RL rows",
    "sft_all": "SFT on all training rows",
    "preference": "Preference optimisation",
    "rl": "RL",
}

#: Plots of a preference stage, as RL_PLOTS.
PREFERENCE_PLOTS = (
    ("Preference loss", ("preference/loss",)),
    ("Reward margin of a pair", ("preference/reward_margin",)),
    ("Pairs in the right order", ("preference/pair_accuracy",)),
    ("Log-probability of an answer", ("preference/logp_chosen", "preference/logp_rejected")),
    ("Margin", ("preference/gamma",)),
)

#: Plots of an RL stage: title and the logged names that may fill it.
RL_PLOTS = (
    ("Mean reward", ("rl/reward",)),
    ("Groups that hold their target", ("rl/hit_rate",)),
    ("Groups without signal (zero variance)", ("rl/frac_zero_std_groups",)),
    ("KL to the reference", ("rl/kl",)),
    ("Gradient norm", ("grad_norm",)),
    ("Clipped tokens", ("rl/clip_fraction",)),
    ("Different items per group", ("rl/distinct_items_per_group",)),
)


@dataclass(frozen=True)
class SummaryRow:
    """A named entry in the summary table of a report, already formatted."""

    name: str
    value: str


@dataclass(frozen=True)
class StageComparison:
    """Paired differences of one stage against one baseline."""

    ours: str
    theirs: str
    comparisons: tuple[Comparison, ...]


def write_report(run_dir: Path) -> Path:
    """Write ``run_dir/report.html`` from the files of the run. Raises DataError if one of these is malformed."""
    path = run_dir / "report.html"
    html = render(load_report(run_dir))
    with atomic_path(path) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return path


def render(report: ReportInput) -> str:
    """The HTML page; depends on the files of the run and the installed versions only."""
    environment = Environment(
        loader=PackageLoader("tawin_nemo", "eval"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"metric": lambda x: f"{x:.4f}", "signed": lambda x: f"{x:+.4f}", "beyond": _beyond_text}
    tested = [stage for stage in report.stages if stage.result is not None]
    names = _metric_names(tested)
    return environment.get_template("report.html.j2").render(
        name=report.setting("name", report.run_dir.name),
        titles={stage.name: TITLES.get(stage.name, stage.name) for stage in report.stages},
        run_rows=list(_run_rows(report)),
        timing=[(stage, _duration(stage.seconds)) for stage in report.stages],
        tested=tested,
        split=report.split,
        metrics=names,
        best=_best(tested, names),
        results_plot=_results_plot(tested, names),
        versus=_versus(tested, names),
        beyond=_beyond_names(tested),
        sft_plots=list(_sft_plots(report)),
        rl_plots=[*_preference_plots(report), *_rl_plots(report)],
        window=_window(report),
        data_rows=list(_data_rows(report, tested)),
        recipe_text=report.recipe_text,
    )


def _metric_names(tested: list[StageRecord]) -> list[str]:
    """Metrics that every evaluation has, in the order of the first."""
    results = [stage.result for stage in tested if stage.result is not None]
    return [name for name in results[0].means if all(name in other.means for other in results)] if results else []


def _beyond_names(tested: list[StageRecord]) -> list[str]:
    """Metrics beyond accuracy that at least one evaluation has, by name and cut-off; older versions wrote none."""
    names = {name for stage in tested if stage.result is not None for name in stage.result.beyond}
    return sorted(names, key=lambda name: (name.partition("@")[0], int(name.partition("@")[2] or 0)))


def _beyond_text(value: float | None, name: str) -> str:
    if value is None:
        return "–"
    if name.startswith("coverage"):
        return f"{value:.1%}"
    return f"{value:+.3f}" if name.startswith("popularity") else f"{value:.2f}"


def _best(tested: list[StageRecord], names: list[str]) -> dict[str, float]:
    return {name: max(stage.result.means[name] for stage in tested if stage.result) for name in names}


def _versus(tested: list[StageRecord], names: list[str]) -> list[StageComparison]:
    rows = []
    results: dict[str, EvalResult] = {stage.name: stage.result for stage in tested if stage.result is not None}
    for theirs in (name for name in BASELINES if name in results):
        for ours in (name for name in results if name != theirs and (name, theirs) != BASELINES):
            pairs = tuple(compare(results[ours], results[theirs], metric) for metric in names)
            rows.append(StageComparison(ours, theirs, pairs))
    return rows


# -- plots --------------------------------------------------------------------------------------------------------
def _results_plot(tested: list[StageRecord], names: list[str]) -> Markup | None:
    if not names:
        return None
    rows = {
        TITLES.get(stage.name, stage.name): [
            (stage.result.means[name], *stage.result.intervals[name]) for name in names
        ]
        for stage in tested
        if stage.result is not None
    }
    return Markup(figures.metric_bars([_short(name) for name in names], rows))


def _sft_plots(report: ReportInput) -> Iterator[Markup]:
    for stage in report.stages:
        lines = {label: stage.series[key] for label, key in (("train", "train/loss"), ("valid", "valid/loss"))
                 if key in stage.series}  # fmt: skip
        if lines:
            title = TITLES.get(stage.name, stage.name)
            yield Markup(figures.curves(title, lines, ylabel="loss per token"))


def _preference_plots(report: ReportInput) -> Iterator[Markup]:
    stage = report.stage("preference")
    if stage is None:
        return
    for title, keys in PREFERENCE_PLOTS:
        lines = {key: stage.series[key] for key in keys if key in stage.series}
        if lines:
            yield Markup(figures.curves(title, lines))


def _rl_plots(report: ReportInput) -> Iterator[Markup]:
    stage = report.stage(LAST_STAGE)
    if stage is None:
        return
    for title, keys in RL_PLOTS:
        lines = {key: stage.series[key] for key in keys if key in stage.series}
        if lines:
            yield Markup(figures.curves(title, lines))
    valid = {_short(key.removeprefix("valid/")): series for key, series in stage.series.items()
             if key.startswith("valid/ndcg@")}  # fmt: skip
    if valid:
        yield Markup(figures.curves("Valid during RL", valid))


def _window(report: ReportInput) -> Markup | None:
    """The weights that this recipe gives to a group that holds its target."""
    if not (report.setting("rl.enabled", False) and report.setting("rl.tawin.enabled", False)):
        return None
    k, tau = float(report.setting("rl.tawin.k")), float(report.setting("rl.tawin.tau"))
    target_k, window = int(report.setting("rl.tawin.target_k", 0)), str(report.setting("rl.tawin.window", "centred"))
    anchor = float(target_k - 1) if target_k else float(report.setting("rl.tawin.anchor"))
    negatives = int(report.setting("rl.group_size")) - 1
    weights = weight_profile(negatives, k=k, tau=tau, anchor=anchor, window=window).tolist()
    label = f"TAWin, k = {k:g}, τ = {tau:g}, {window}"
    return Markup(figures.window_profile(weights, anchor=anchor, label=label))


# -- tables -------------------------------------------------------------------------------------------------------
def _run_rows(report: ReportInput) -> Iterator[SummaryRow]:
    parallel = [f"TP {report.setting('model.tensor_model_parallel_size')}",
                f"PP {report.setting('model.pipeline_model_parallel_size')}"]  # fmt: skip
    processes = int(report.setting("trainer.num_nodes", 1)) * int(report.setting("trainer.devices", 1))
    yield SummaryRow("Backbone", f"{report.setting('model.backbone', '–')}, init {report.setting('model.init', '–')}")
    yield SummaryRow("Precision", str(report.setting("model.precision", "–")))
    yield SummaryRow("Processes", f"{processes} ({', '.join(parallel)})")
    yield SummaryRow("Seed", str(report.setting("seed", "–")))
    if report.setting("preference.enabled", False):
        shown = ("algorithm", "beta", "negatives", "num_negatives", "lr", "epochs", "rows")
        yield SummaryRow("Preference", ", ".join(f"{key} {report.setting(f'preference.{key}')}" for key in shown))
    if report.setting("rl.enabled", False):
        keys = ("algorithm", "group_size", "prompts_per_step", "lr", "beta", "kl", "reward", "policy_space", "rows")
        yield SummaryRow("RL", ", ".join(f"{key} {report.setting(f'rl.{key}')}" for key in keys))
    yield SummaryRow(
        "Evaluation", ", ".join(f"{key} {report.setting(f'eval.{key}')}" for key in ("beams", "collision"))
    )
    for kind, heading in {"candidates": "Among candidates", "grounding": "Free text, grounded"}.items():
        for name, means in dict(report.summary.get(kind, {})).items():
            figures_of = ", ".join(f"{key} {value:.4f}" for key, value in means.items())
            yield SummaryRow(f"{heading}, {TITLES.get(name, name)}", figures_of)
    if "wall_s" in report.summary:
        yield SummaryRow("Wall time", _duration(float(report.summary["wall_s"])))
    versions = [f"Python {platform.python_version()}", *(f"{name} {_version(name)}" for name in PACKAGES)]
    yield SummaryRow("Versions (of the report's writer)", ", ".join(versions))


def _data_rows(report: ReportInput, tested: list[StageRecord]) -> Iterator[SummaryRow]:
    for name, value in report.catalog.items():
        shown = ", ".join(f"{k} {_number(v)}" for k, v in value.items()) if isinstance(value, dict) else _number(value)
        yield SummaryRow(name.replace("_", " "), shown)
    if tested and tested[-1].result is not None:
        result = tested[-1].result
        shared = f"{result.collisions:,} of {result.rows:,} ({result.collision})"
        yield SummaryRow(f"{report.split} rows whose target shares its path", shared)
        if result.collision == "optimistic" and result.collisions:
            means = ", ".join(f"{_short(name)} {value:.4f}" for name, value in result.fractional_means().items())
            yield SummaryRow("Means with a hit on a shared path divided among its items", means)


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _short(metric: str) -> str:
    """recall@3 -> R@3, ndcg@3 -> N@3."""
    return metric.replace("recall@", "R@").replace("ndcg@", "N@")


def _duration(seconds: float) -> str:
    """
    >>> _duration(3725.4)
    '1 h 02 min 05 s'
    """
    if not math.isfinite(seconds) or seconds < 0:
        raise DataError(f"a duration of {seconds} s")
    hours, rest = divmod(round(seconds), 3600)
    minutes, second = divmod(rest, 60)
    if hours:
        return f"{hours} h {minutes:02d} min {second:02d} s"
    return f"{minutes} min {second:02d} s" if minutes else f"{second} s"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"

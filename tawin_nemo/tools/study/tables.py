"""The results page of a study as Markdown, made of its run files and its study file alone.

The same files give the same text, byte for byte, so a test can rebuild a committed page.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from tawin_nemo.eval.intervals import Interval
from tawin_nemo.eval.paired import is_measured, parse_metric
from tawin_nemo.tools.study.analysis import POOLED, PairRow, Results, likely_best, pair_rows, sweep_lines
from tawin_nemo.tools.study.record import SplitResult

HOW_TO_READ = """\
A mean is over seeds and users; brackets hold its 95 % interval when seeds and users are resampled (10,000 times, the
same users for all seeds). A difference is paired by seed and user; *per seed* are the differences of the single seeds;
*p* comes from flipping the signs of the users' differences (seeds taken as fixed) and *Holm* corrects it for all pairs
with the same metric on the same split; *detectable* is the smallest true difference that the users' spread lets a test
find with a power of 80 %. **Bold**: the interval excludes zero."""


def page(results: Results, plots: Sequence[str]) -> str:
    """The whole page; ``plots`` are file names beside it."""
    file = results.study.file
    parts = [f"# Study {file.study}", file.about.strip(), _made_by(results), HOW_TO_READ]
    for split in results.splits:
        parts += [f"## {_title(results, split)}", arms_table(results, split)]
        if results.study.pairs:
            parts += [f"### Paired differences, {split}", pairs_table(results, split)]
        parts += list(_sweeps(results, split))
    if trends := trends_table(results):
        parts += ["## In training: first tenth, last tenth", trends]
    parts += [f"![{name}]({name})" for name in plots]
    parts += list(_not_finished(results))
    parts += ["## Runs", _runs(results)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _made_by(results: Results) -> str:
    path = "/".join(results.study.path.resolve().parts[-3:])  # without the folders of this machine
    return (
        f"Made by `python -m tawin_nemo study --recipe {path}`; `report=true` behind it rebuilds this page and its "
        "plots from the run files beside them."
    )


def _title(results: Results, split: str) -> str:
    records = results.records.values()
    runs = [[r.splits[part] for part in split.split("+")] for r in records if r.splits.keys() >= set(split.split("+"))]
    sizes = sorted({sum(part.rows for part in parts) for parts in runs})
    beams = sorted({part.beams for record in records for part in record.splits.values()})
    return f"{split}: {' or '.join(f'{n:,}' for n in sizes)} rows, {' or '.join(map(str, beams))} beams"


def arms_table(results: Results, split: str) -> str:
    """Arms x metrics; an arm without a finished run has its line as well, one whose items share paths has two."""
    file = results.study.file
    facts = [] if split == POOLED else file.facts
    head = ["arm", "seeds", *map(short, file.metrics), *facts, "min"]
    rows = []
    for arm in results.study.arms:
        means = [results.mean(arm.name, split, metric) for metric in file.metrics]
        others = [results.fact(arm.name, split, fact) for fact in facts]
        runs = results.evaluated(arm.name, split)
        seconds = [results.records[arm.name, seed].wall_s for seed in runs]
        minutes = f"{sum(seconds) / len(seconds) / 60:.1f}" if seconds else "–"
        cells = [_mean(mean) for mean in means] + ["–" if fact is None else f"{fact:.4g}" for fact in others]
        rows.append([f"`{arm.name}`", _seeds(results, arm.name, len(arm.seeds), len(runs)), *cells, minutes])
        if results.shares_credit(arm.name, split):
            full = [results.mean(arm.name, split, metric, SplitResult.matches) for metric in file.metrics]
            rows.append([f"`{arm.name}`, shared IDs in full", "", *map(_mean, full), *[""] * len(facts), ""])
    return _table(head, rows)


def _seeds(results: Results, name: str, planned: int, finished: int) -> str:
    failed = sum(arm == name for arm, _ in results.failed)
    text = str(finished) if finished >= planned else f"{finished} of {planned}"
    return f"{text} ({failed} failed)" if failed else text


def trends_table(results: Results) -> str:
    """Arms x logged scalars at both ends of training; empty when the study asks for none."""
    scalars = results.study.file.trends
    rows = []
    for arm in results.study.arms:
        ends = [results.trend(arm.name, scalar) for scalar in scalars]
        if any(ends):
            rows.append([f"`{arm.name}`", *(f"{end[0]:.4g}, {end[1]:.4g}" if end else "–" for end in ends)])
    return _table(["arm", *scalars], rows) if rows else ""


def pairs_table(results: Results, split: str) -> str:
    """Every comparison with every metric."""
    head = ["ours - theirs", "metric", "difference", "per seed", "p", "Holm", "detectable"]
    rows = [row for metric in results.study.file.metrics for row in pair_rows(results, split, metric)]
    rows.sort(key=lambda row: results.study.pairs.index((row.ours, row.theirs)))
    return _table(head, [_pair_cells(row) for row in rows]) if rows else "No pair has two finished runs yet."


def _pair_cells(row: PairRow) -> list[str]:
    test = row.test
    text = _signed_mean(test.difference)
    return [
        f"`{row.ours}` - `{row.theirs}`",
        short(row.metric),
        f"**{text}**" if test.difference.excludes_zero else text,
        " ".join(signed(value) for value in test.per_seed),
        _p(test.p),
        _p(row.p_holm),
        plain(test.detectable),
    ]


def _sweeps(results: Results, split: str) -> Iterator[str]:
    for sweep in results.study.file.sweeps:
        rows, best = [], []
        for metric in sweep.metrics or results.study.file.metrics:
            for line in sweep_lines(results, sweep, split, metric):
                shares = [f"{share:.0%}" for share in line.best] or ["–"] * len(line.x)
                for x, mean, share in zip(line.x, line.means, shares, strict=True):
                    cell = _signed_mean(mean) if sweep.minus else _mean(mean)
                    rows.append([short(metric), line.label, f"{x:g}", cell, share])
                if line.best:
                    top, low, high = likely_best(line)
                    best.append(f"- {short(metric)}, {line.label}: {sweep.x_label} {top:g}, 95 %: {low:g} to {high:g}")
        if rows:
            minus = f" minus `{sweep.minus}`" if sweep.minus else ""
            yield f"### `{sweep.arm}`{minus} against {sweep.x_label}, {split}"
            yield _table(["metric", "line", sweep.x_label, "mean", "best in"], rows)
            yield (
                f"Best {sweep.x_label} by the mean, and the range around it that holds the best one in 95 % of 2,000 "
                "resamples of seeds and users:\n\n" + "\n".join(best)
            )


def _not_finished(results: Results) -> Iterator[str]:
    if results.failed:
        rows = [
            [f"`{run.arm}`", str(run.seed), str(run.exit_code), _code(run.log_tail[-1] if run.log_tail else "")]
            for _, run in sorted(results.failed.items())
        ]
        yield "## Failed runs"
        yield _table(["arm", "seed", "exit code", "last line of its log"], rows)
    planned = [(arm.name, seed) for arm in results.study.arms for seed in arm.seeds]
    present = {*results.records, *results.failed}
    arms = {arm.name for arm in results.study.arms}
    missing = [f"`{arm}.seed{seed}`" for arm, seed in planned if (arm, seed) not in present]
    stray = [f"`{arm}.seed{seed}`" for arm, seed in sorted(present) if arm not in arms]
    if missing:
        yield f"Not run yet: {', '.join(missing)}."
    if stray:
        yield f"Run files of arms that the study file no longer has: {', '.join(stray)}."


def _runs(results: Results) -> str:
    records = results.records.values()
    if not records:
        return "None is finished."
    hours = sum(record.wall_s for record in records) / 3600
    commits = Counter(record.commit for record in records)
    machines = Counter(f"{record.hardware.get('cpu')}, {record.hardware.get('cores')} cores" for record in records)
    first, last = min(record.date for record in records), max(record.date for record in records)
    dirty = " (`+` = with changes not committed)" if any("+" in commit for commit in commits) else ""
    return "\n".join([
        f"- {len(records)} finished, {hours:.2f} process hours, {first} to {last}",
        f"- code: {_counted(commits)}{dirty}",
        f"- machine: {_counted(machines)}, one process per run",
        f"- largest rate of invalid items: {max(s.invalid_rate for r in records for s in r.splits.values()):g}",
    ])  # fmt: skip


def _counted(counts: Counter[str]) -> str:
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{name} ({count} runs)" for name, count in sorted(counts.items()))


# -- cells ---------------------------------------------------------------------------------------------------------
def short(metric: str) -> str:
    """
    >>> short("recall@3"), short("ndcg@10")
    ('R@3', 'N@10')
    """
    if is_measured(metric):
        return metric
    kind, k = parse_metric(metric)
    return f"{kind[0].upper()}@{k}"


def plain(value: float) -> str:
    """
    >>> plain(0.0831), plain(1.0)
    ('.0831', '1.0000')
    """
    text = f"{value:.4f}"
    return text[1:] if text.startswith("0.") else text


def signed(value: float) -> str:
    """
    >>> signed(0.011), signed(-0.00004)
    ('+.0110', '+.0000')
    """
    return ("-" if round(value, 4) < 0 else "+") + plain(abs(value))


def _mean(interval: Interval | None) -> str:
    return "–" if interval is None else f"{plain(interval.mean)} [{plain(interval.low)}, {plain(interval.high)}]"


def _signed_mean(interval: Interval) -> str:
    return f"{signed(interval.mean)} [{signed(interval.low)}, {signed(interval.high)}]"


def _p(value: float) -> str:
    return f"{value:.4f}" if value < 0.1 else f"{value:.2f}"


def _code(text: str) -> str:
    return "`" + text.replace("`", "'").replace("|", "/")[:160] + "`"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)

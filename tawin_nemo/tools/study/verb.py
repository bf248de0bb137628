"""``tawin-nemo study``: read the study, make the plan, run what is missing, write the results page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tawin_nemo.tools.study import provenance
from tawin_nemo.tools.study.analysis import load_results
from tawin_nemo.tools.study.arms import Study, read_study
from tawin_nemo.tools.study.launch import data_finder, train_command
from tawin_nemo.tools.study.plan import DONE, make_plan, plan_table
from tawin_nemo.tools.study.runner import Outcome, Runner
from tawin_nemo.tools.study.slurm import submitting
from tawin_nemo.util.files import atomic_path
from tawin_nemo.util.log import get_logger

log = get_logger(__name__)


def run_study(
    path: str | Path | None, overrides: Sequence[str], *, dry_run: bool = False
) -> tuple[dict[str, Any], int]:
    """Run a study and write its results page. Returns the JSON line for stdout, and the exit code (1 = a run failed).

    Raises ConfigError for a mistake in the study file or a run file of another recipe.
    """
    study = read_study(path, overrides)
    if study.file.report:
        return {"study": study.file.study, "report": str(write_page(study))}, 0
    plan = make_plan(study)
    slurm = study.file.launcher == "slurm"
    workers = study.file.workers or (max(1, len(plan.waiting)) if slurm else provenance.cores())
    log.info("%s\n%s", study.file.study, plan_table(plan, workers))
    skipped = [run.name for run in plan.runs if plan.state[run.key] == DONE]
    if dry_run:
        waiting = [run.name for run in plan.waiting]
        return {"study": study.file.study, "dry_run": True, "done": len(skipped), "to_run": waiting}, 0
    if study.file.commit:
        provenance.require_repository(study.results)
    outcome = Outcome()
    if plan.waiting:
        command = train_command(study)
        command = submitting(command, study.file.sbatch) if slurm else command
        outcome = Runner(plan, command, data_finder(study), workers=workers).run()
    result = {
        "study": study.file.study,
        "finished": len(outcome.finished),
        "skipped": len(skipped),
        "failed": outcome.failed,
        "blocked": outcome.blocked,
        "results": str(study.results),
        "report": str(write_page(study)),
    }
    return result, 1 if outcome.failed or outcome.blocked else 0


def write_page(study: Study) -> Path:
    """README.md, the plots and what ``export`` asks for, from the run files in ``results``; the page's path."""
    # matplotlib takes a second to import, which a dry run should not wait for
    from tawin_nemo.tools.study.plots import write_plots
    from tawin_nemo.tools.study.tables import page

    results = load_results(study)
    study.results.mkdir(parents=True, exist_ok=True)
    text = page(results, write_plots(results, study.results))
    path = study.results / "README.md"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    if study.file.export:
        from tawin_nemo.tools.study.export import write_tables

        written = write_tables(results, Path(study.file.export))
        log.info("tables: %s", ", ".join(map(str, written)))
    return path

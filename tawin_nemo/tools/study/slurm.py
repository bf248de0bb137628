"""The runs of a study as Slurm jobs (``launcher: slurm``): the command of a run, wrapped in ``slurm_job``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tawin_nemo.tools.study import slurm_job
from tawin_nemo.tools.study.launch import Command
from tawin_nemo.tools.study.plan import Run


def submitting(command: Command, options: Sequence[str]) -> Command:
    """The command of a run -> the command that runs it as a Slurm job with these options of sbatch."""

    def words(run: Run, data: Path, start: Path | None) -> list[str]:
        log = run.run_dir / "slurm.log"
        size = node_options(run)
        own = [*size, *options]
        inner = command(run, data, start)
        name = f"{run.study}.{run.name}"
        return [sys.executable, "-m", slurm_job.__name__, str(run.run_dir), name, str(log), *own, "--", *inner]

    return words


def node_options(run: Run) -> list[str]:
    """Nodes and tasks of a run on several nodes; one on a single node starts its processes itself."""
    trainer = run.recipe.trainer
    return [f"--nodes={trainer.num_nodes}", f"--ntasks-per-node={trainer.devices if trainer.num_nodes > 1 else 1}"]

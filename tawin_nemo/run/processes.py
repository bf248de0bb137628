"""Training in several processes of this machine, started from Python."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tawin_nemo.config.load import to_yaml
from tawin_nemo.config.schema import Recipe
from tawin_nemo.run.datasets import run_dir_of
from tawin_nemo.run.launcher import launch
from tawin_nemo.util.errors import ConfigError, Preempted, TawinError


def train_in_processes(recipe: Recipe, *, dry_run: bool) -> dict[str, Any]:
    """``tawin-nemo train`` in ``trainer.devices`` processes, which import from where this process does.

    Returns the run's summary. Raises ConfigError, Preempted or TawinError by the exit code of the processes, whose
    messages are on stderr.
    """
    with tempfile.TemporaryDirectory() as folder, _same_imports():
        file = Path(folder) / "recipe.yaml"
        file.write_text(to_yaml(recipe), encoding="utf-8")
        code = launch(recipe.trainer.devices, ["train", "--recipe", str(file), *(["--dry-run"] if dry_run else [])])
    if code:
        known: dict[int, type[TawinError]] = {ConfigError.exit_code: ConfigError, Preempted.exit_code: Preempted}
        raise known.get(code, TawinError)(f"training ended with exit code {code}; its messages are on stderr")
    summary = run_dir_of(recipe) / "summary.json"
    return {"dry_run": True} if dry_run else dict(json.loads(summary.read_text(encoding="utf-8")))


@contextmanager
def _same_imports() -> Iterator[None]:
    """PYTHONPATH holds this process's own places, for the processes that are started inside the block."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([os.getcwd(), *(place for place in sys.path if place)])
    try:
        yield
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before

"""Where a result comes from: the code's commit and the machine; and the git commit of each result."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from tawin_nemo.util.errors import ConfigError
from tawin_nemo.util.files import write_json
from tawin_nemo.util.log import get_logger

log = get_logger(__name__)

#: Folder that holds the package; in a checkout it is the repository.
SOURCE = Path(__file__).resolve().parents[3]
#: What a process gets besides this one's environment: a core each.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
}  # fmt: skip
#: File of a run directory that names the machine.
HARDWARE = "hardware.json"
#: Attempts, and seconds between them, while another program holds the index.
ATTEMPTS, PAUSE = 8, 0.5


def code_version() -> str:
    """Short commit of the code, with ``+`` when it has changes that are not committed; ``unknown`` without git."""
    head = _git(SOURCE, "rev-parse", "--short", "HEAD")
    if head.returncode != 0:
        return "unknown"
    changed = _git(SOURCE, "status", "--porcelain", "--", "tawin_nemo", "data_prep").stdout.strip()
    return head.stdout.strip() + ("+" if changed else "")


def hardware() -> dict[str, Any]:
    """The processor's name, the cores this process may use, and torch's version."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        line = re.search(r"^model name\s*:\s*(.+)$", info.read_text(encoding="utf-8"), re.MULTILINE)
        name = line[1].strip() if line else name
    return {"cpu": name, "cores": cores(), "torch": metadata.version("torch")}


def write_hardware(run_dir: Path) -> None:
    """Leave this machine's ``hardware`` in a run directory, for a run that the study's own machine did not make."""
    write_json(run_dir / HARDWARE, hardware())


def hardware_of(run_dir: Path) -> dict[str, Any]:
    """The machine that made a run: the one that left a note, else this one."""
    path = run_dir / HARDWARE
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else hardware()


def cores() -> int:
    return max(1, len(os.sched_getaffinity(0)))


def require_repository(folder: Path) -> None:
    """Raises ConfigError when ``folder`` is not in a git repository (``commit: true`` would have nowhere to go)."""
    existing = next(path for path in (folder, *folder.resolve().parents) if path.is_dir())
    if _git(existing, "rev-parse", "--show-toplevel").returncode != 0:
        raise ConfigError(f"commit=true but {folder} is not in a git repository; set commit=false or results=FOLDER")


def commit(paths: Sequence[Path], message: str) -> bool:
    """Commit these files of one folder and nothing else that may be staged; False, with a warning, when git refuses.

    Waits while another program holds git's index.
    """
    folder, names = paths[0].parent, [path.name for path in paths]
    for attempt in range(ATTEMPTS):
        done = _git(folder, "add", "--", *names)
        if done.returncode == 0:
            if _git(folder, "diff", "--cached", "--quiet", "--", *names).returncode == 0:
                return True  # committed already
            done = _git(folder, "commit", "--quiet", "-m", message, "--only", "--", *names)
            if done.returncode == 0:
                return True
        if "lock" not in done.stderr:  # index.lock, or a reference that another commit is moving
            break
        time.sleep(PAUSE * (attempt + 1))
    log.warning("%s is written but not committed: %s", paths[0], (done.stderr or done.stdout).strip()[-300:])
    return False


def _git(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # A path is a path, whatever characters it has, and git never waits for somebody at a terminal.
    environment = {**os.environ, "GIT_LITERAL_PATHSPECS": "1", "GIT_TERMINAL_PROMPT": "0"}
    try:
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, env=environment, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(["git", *arguments], 1, "", str(error))

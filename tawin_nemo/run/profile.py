"""``profile=torch | nsys``: profiles steps 2 to 4 of every stage, counted from the start of this process."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from tawin_nemo.util.errors import ConfigError
from tawin_nemo.util.log import get_logger

log = get_logger(__name__)

FIRST_STEP, LAST_STEP = 2, 4  # the first one also allocates and warms up
OPERATORS = 20


def check_profile(kind: str) -> None:
    """Raises ConfigError when ``profile`` is not supported on this machine."""
    if kind == "nsys" and not torch.cuda.is_available():
        raise ConfigError("profile=nsys marks a range for Nsight Systems, which needs a CUDA device; use profile=torch")


class StepProfiler:
    """Call ``step`` before every step and ``stop`` after the last one; does nothing for ``kind`` off.

    torch: a Chrome trace and a table of the most expensive operators in ``directory``, by world rank 0 (``writer``).
    nsys: the range that ``nsys profile --capture-range=cudaProfilerApi`` records, in every process.
    """

    def __init__(self, kind: str, directory: Path, *, writer: bool) -> None:
        check_profile(kind)
        self._kind = kind if writer or kind == "nsys" else "off"
        self._directory = directory
        self._steps = 0
        self._torch: torch.profiler.profile | None = None
        self._running = False

    def step(self) -> None:
        """Start or end the profile when the next step is due for it."""
        self._steps += 1
        if self._steps == FIRST_STEP:
            self._start()
        elif self._steps > LAST_STEP:
            self.stop()

    def _start(self) -> None:
        if self._kind == "off":
            return
        self._running = True
        if self._kind == "nsys":
            torch.cuda.profiler.start()
            return
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        self._torch = torch.profiler.profile(activities=activities, record_shapes=True)
        self._torch.start()

    def stop(self) -> None:
        """End the profile and write it, also when the stage had fewer steps."""
        if not self._running:
            return
        self._running = False
        if self._torch is None:
            torch.cuda.profiler.stop()
            return
        self._torch.stop()
        self._directory.mkdir(parents=True, exist_ok=True)
        self._torch.export_chrome_trace(str(self._directory / "trace.json"))
        order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = self._torch.key_averages().table(sort_by=order, row_limit=OPERATORS)
        (self._directory / "operators.txt").write_text(table + "\n", encoding="utf-8")
        self._torch = None
        log.info("profile of steps %d-%d: %s", FIRST_STEP, LAST_STEP, self._directory)

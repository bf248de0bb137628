"""Some seconds of the soak: ``python -m tests.benchmarks.soak`` runs it for minutes, and judges memory as well."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.benchmarks import soak_load
from tests.train.runs import environment


@pytest.mark.full
def test_swaps_and_clients_of_every_kind() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.soak", "--generated", "--minutes", "0.2", "--sample", "80"],
        capture_output=True, text=True, timeout=550, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["failed"] == []
    assert (result["failures"], result["invalid_items"], result["mixed_versions"]) == (0, 0, 0)
    assert result["recomputed"] > 20
    assert set(result["requests"]) == set(soak_load.CLIENTS)
    assert set(result["swaps"]) == {"weights", "items", "activate"}

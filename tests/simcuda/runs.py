"""Whole commands of tawin-nemo on a pretended device, in forked processes, one per rank."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tests.train import runs

#: Exit code of a run that ended well although the pretended device had a fault: somebody caught its exception.
FAULTY = 97
#: Environment variable: a file to which every rank writes its counts by call site, followed by the rank's number.
REPORT = "SIMCUDA_REPORT"


def verb(words: Sequence[str]) -> int:
    """``python -m tawin_nemo words`` on the pretended device of this rank."""
    from tawin_nemo.cli import main
    from tests.simcuda import device

    sys.argv = ["tawin-nemo", *words]
    device.install()
    with device.counting() as counts:
        code = main(list(words))
    if os.environ.get(REPORT):
        Path(f"{os.environ[REPORT]}.{os.environ.get('RANK', '0')}").write_text(counts.table(most=40) + "\n")
    if device.FAULTS:
        print("\n".join(device.FAULTS), file=sys.stderr)
        return code or FAULTY
    return code


#: As ``tests.train.runs``, on the pretended device.
run = partial(runs.run, main=verb)
called = partial(runs.called, main=verb)

if __name__ == "__main__":  # python -m tests.simcuda.runs train --recipe ... (torchrun -m for several ranks)
    sys.exit(verb(sys.argv[1:]))

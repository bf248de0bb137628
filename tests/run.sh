#!/usr/bin/env bash
# Everything a change must pass: lint, format, types, tests. Installs into .venv on a bare machine.
#   bash tests/run.sh            all of it, with 2- and 4-process gloo tests
#   bash tests/run.sh -k trie    arguments go to pytest
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/install.sh
ruff check .
ruff format --check .
mypy
# one worker per core, each file on one worker so that its fixtures are made once
pytest -q -n "${TAWIN_TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder "$@"

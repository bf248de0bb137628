#!/usr/bin/env bash
# Checks and times what needs a GPU, one process per part; the last line on stdout is one JSON object.
#   bash tests/gpu/run.sh                                  every part, at most 10 minutes each
#   bash tests/gpu/run.sh --parts attention,train_bf16     some of them
#   bash tests/gpu/run.sh --json recipes/results/gpu_h200.json
#   TAWIN_GPU_DRY=1 bash tests/gpu/run.sh                  a tiny model on the CPU: tests this script, measures nothing
# TAWIN_PYTHON chooses the interpreter. What has to be installed: tests/gpu/README.md.
set -euo pipefail
cd "$(dirname "$0")/../.."
exec "${TAWIN_PYTHON:-python3}" -m tests.gpu.run "$@"

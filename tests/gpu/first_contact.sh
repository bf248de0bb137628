#!/usr/bin/env bash
# Twelve minutes on one H200: what can only be learned on a real GPU, most instructive first. Every part prints one JSON
# line on stdout when it ends, has a time limit of its own, and fails without stopping the others.
#   bash tests/gpu/first_contact.sh                           all parts, 720 s together
#   bash tests/gpu/first_contact.sh --parts sdpa,decode_7b    some of them
#   TAWIN_GPU_DRY=1 bash tests/gpu/first_contact.sh           a tiny model on the CPU: tests this script, measures nothing
#   TAWIN_GPU_DRY=pretended bash tests/gpu/first_contact.sh   the same on the pretended device of tests/simcuda
# OUT (default first_contact) gets the lines as first_contact.jsonl, checkpoints and logs. TAWIN_WHEELS: a folder with wheels
# of packages that the machine lacks (megatron-core; polars and others for the last part); they are unpacked below OUT.
# TAWIN_PYTHON chooses the interpreter. The checkout need not be installed.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${TAWIN_PYTHON:-python3}
export OUT=${OUT:-first_contact}
mkdir -p "$OUT"
if [ -n "${TAWIN_WHEELS:-}" ]; then
    "$python" -m pip install --quiet --no-index --no-deps --target "$OUT/site" "$TAWIN_WHEELS"/*.whl >&2
fi
export PYTHONPATH=$PWD:$OUT/site${PYTHONPATH:+:$PYTHONPATH}
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True} TORCHINDUCTOR_COMPILE_THREADS=2
exec "$python" -m tests.gpu.first_contact "$@"

#!/usr/bin/env bash
# Collects every package of requirements.txt in a folder, for machines that reach no package index.
#
#   bash recipes/wheelhouse.sh WHEELS                     on a machine with an index, the same Python and platform
#   GPU=1 bash recipes/wheelhouse.sh WHEELS               Transformer Engine as well: where recipes/install_gpu.sh has run
#
# On the machine without an index, in a checkout beside the copied folder:
#
#   cd WHEELS && sha256sum --check SHA256SUMS
#   PIP_NO_INDEX=1 PIP_FIND_LINKS=WHEELS bash recipes/install_gpu.sh      or recipes/quickstart.sh, on a CPU
#
# Environment:
#   TAWIN_PYTHON        interpreter (default python3; with GPU=1 that of the virtual environment TAWIN_VENV)
#   TAWIN_TORCH_INDEX   package index of torch's wheel, as in install_gpu.sh
#   TAWIN_REQUIREMENTS  another file than requirements.txt
set -euo pipefail
if [ $# != 1 ]; then
    echo "usage: bash recipes/wheelhouse.sh FOLDER" >&2
    exit 2
fi
mkdir -p "$1"
wheels=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
python=${TAWIN_PYTHON:-python3} requirements=${TAWIN_REQUIREMENTS:-requirements.txt}
pip() { "$python" -m pip "$@" --disable-pip-version-check --quiet; }

torch=$(grep '^torch==' "$requirements" || true)
if [ -n "$torch" ]; then # first, by itself, as in install.sh: this build satisfies all later pins
    pip download --dest "$wheels" ${TAWIN_TORCH_INDEX:+--index-url "$TAWIN_TORCH_INDEX"} "$torch"
fi
# wheels only: what exists as source alone is built here, not on the machine without an index
pip wheel --wheel-dir "$wheels" --find-links "$wheels" -r "$requirements" \
    'setuptools>=70.1' wheel ninja pybind11 packaging pip
if [ "${GPU:-}" = 1 ]; then # compiled against the installed torch
    "${TAWIN_VENV:-.venv}/bin/python" -m pip wheel --disable-pip-version-check --no-build-isolation \
        --wheel-dir "$wheels" --find-links "$wheels" "$torch" -r requirements-gpu.txt
fi
cd "$wheels"
rm -f SHA256SUMS
sums=$(find . -maxdepth 1 -type f -printf '%f\0' | sort -z | xargs -0 sha256sum)
echo "$sums" >SHA256SUMS
echo "$(wc -l <SHA256SUMS) files in $wheels; on the other machine: PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER" >&2

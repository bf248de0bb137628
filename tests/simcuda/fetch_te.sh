#!/usr/bin/env bash
# Unpacks the Python of Transformer Engine's core wheel (no CUDA library, no torch) for tests/simcuda/test_engine.py:
#   bash tests/simcuda/fetch_te.sh [FOLDER]
# FOLDER: $TAWIN_TE_PACKAGE, else ~/.cache/tawin_nemo/transformer_engine. Downloads about 180 MB and keeps 5.
set -euo pipefail
version=2.11.0
folder=${1:-${TAWIN_TE_PACKAGE:-${XDG_CACHE_HOME:-$HOME/.cache}/tawin_nemo/transformer_engine}}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
  --dest "$work" "transformer_engine_cu12==$version"
mkdir -p "$folder"
python3 - "$work" "$folder" "$version" <<'PYTHON'
import sys
import zipfile
from pathlib import Path

(wheel,) = Path(sys.argv[1]).glob("*.whl")
with zipfile.ZipFile(wheel) as archive:
    names = [name for name in archive.namelist() if name.endswith((".py", "METADATA", ".txt")) and ".so" not in name]
    archive.extractall(sys.argv[2], names)
# the package of this name only ties core and torch extension together; its version is asked for
record = Path(sys.argv[2], f"transformer_engine-{sys.argv[3]}.dist-info")
record.mkdir(exist_ok=True)
record.joinpath("METADATA").write_text(f"Metadata-Version: 2.1\nName: transformer_engine\nVersion: {sys.argv[3]}\n")
PYTHON
echo "$folder"

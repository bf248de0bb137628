#!/usr/bin/env bash
# Installs everything for a GPU machine into .venv: torch for the driver's CUDA version, requirements.txt (megatron-core
# among them), Transformer Engine compiled against that torch, and NVIDIA's apex if its source is named.
#
#   bash recipes/install_gpu.sh
#   TAWIN_DRY_RUN=1 bash recipes/install_gpu.sh            print the commands, install nothing
#
# NVIDIA driver   torch wheel                       FP8
# >= 580          the package index's own, CUDA 13  all recipes
# 525 .. 579      CUDA 12.6                         no fp8-blockwise, which needs CUDA 12.9
# older           none: update the driver
#
# Transformer Engine's torch extension exists as source only. `pip install -r requirements-gpu.txt` alone would compile it
# in an isolated environment against the newest torch instead of the installed one, and its import would then fail with
# an undefined symbol: hence --no-build-isolation. It needs the CUDA toolkit (nvcc) of torch's CUDA version, a C++17 compiler
# and the headers of cuDNN, NCCL and the CUDA libraries, which lie in the nvidia-* packages that torch brings along.
#
# Environment:
#   TAWIN_VENV           where to install (default .venv beside the code)
#   TAWIN_PYTHON         interpreter, 3.11 or 3.12
#   TAWIN_TORCH_INDEX    package index of torch's wheel, instead of the choice by driver version
#   TAWIN_CUDA_ARCHS     compute capabilities to compile for (default 90: H100, H200, H800), e.g. "80;90"
#   TAWIN_DRIVER         driver of the machines that will use it, where this one has no GPU (building an image)
#   TAWIN_APEX           folder with NVIDIA's apex source; never `pip install apex`, which is an unrelated package
#   MAX_JOBS             compilers at a time (default 8; each needs about 4 GB of memory)
set -euo pipefail
cd "$(dirname "$0")/.."

dry_run() { [ "${TAWIN_DRY_RUN:-}" = 1 ]; }
fail() {
    echo "install_gpu.sh: $*" >&2
    exit 2
}
run() {
    if dry_run; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}

try() { [ -n "${TAWIN_DRIVER:-}" ] || run "$@"; } # what needs the driver itself, on a machine that has it

driver=${TAWIN_DRIVER:-$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1)} || true
[ -n "$driver" ] || fail "nvidia-smi shows no GPU: run this on a GPU node (bash recipes/quickstart.sh installs for a CPU)"
if [ "${driver%%.*}" -ge 580 ]; then
    cuda=13 index=""
elif [ "${driver%%.*}" -ge 525 ]; then
    cuda=12 index=https://download.pytorch.org/whl/cu126
else
    fail "driver $driver is older than 525, which CUDA 12 needs: update the NVIDIA driver"
fi
export TAWIN_TORCH_INDEX=${TAWIN_TORCH_INDEX:-$index}

nvcc=${CUDA_HOME:+$CUDA_HOME/bin/}nvcc
toolkit=$("$nvcc" --version 2>/dev/null | sed -n 's/.*release \([0-9][0-9.]*\).*/\1/p') || true
[ -n "$toolkit" ] || fail "no nvcc: install the CUDA $cuda toolkit, or set CUDA_HOME to its folder"
if ! dry_run; then # installs torch and requirements.txt, activates the environment
    # shellcheck source=recipes/install.sh
    source recipes/install.sh
    cuda=$(python -c 'import torch; print((torch.version.cuda or "none").split(".")[0])')
    [ "$cuda" != none ] || fail "the installed torch is a CPU build: set TAWIN_TORCH_INDEX to an index with CUDA wheels"
fi
[ "${toolkit%%.*}" = "$cuda" ] || fail "nvcc is CUDA $toolkit, torch is for CUDA $cuda: set CUDA_HOME to a toolkit of CUDA $cuda"

# setup.py of the extension looks into CUDA_HOME alone; cuDNN, NCCL and cuSPARSE come with torch
headers=$(python3 recipes/nvidia_headers.py)
[ -z "$headers" ] || export CPATH=$headers${CPATH:+:$CPATH}
export NVTE_FRAMEWORK=pytorch NVTE_CUDA_ARCHS=${TAWIN_CUDA_ARCHS:-90} MAX_JOBS=${MAX_JOBS:-8}
dry_run && echo "TAWIN_TORCH_INDEX=$TAWIN_TORCH_INDEX NVTE_CUDA_ARCHS=$NVTE_CUDA_ARCHS CPATH=${CPATH:-}"
run python -m pip install --disable-pip-version-check 'setuptools>=70.1' wheel ninja pybind11 packaging
# with torch's pin: nothing may replace the torch that the extension is compiled against
run python -m pip install --disable-pip-version-check --no-build-isolation "$(grep '^torch==' requirements.txt)" \
    -r requirements-gpu.txt
try python -c 'import transformer_engine.pytorch, transformer_engine; print("Transformer Engine", transformer_engine.__version__)'
if [ -n "${TAWIN_APEX:-}" ]; then
    run env APEX_CPP_EXT=1 APEX_CUDA_EXT=1 APEX_ALL_CONTRIB_EXT=0 \
        python -m pip install --disable-pip-version-check --no-build-isolation --no-deps "$TAWIN_APEX"
    try python -c 'import amp_C, fused_weight_gradient_mlp_cuda'
fi
try python -m tawin_nemo doctor --quick

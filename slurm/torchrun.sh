#!/bin/bash
# One machine's part of a run on several machines without Slurm. Start the same command on each of them:
#
#   TAWIN_NODES=2 TAWIN_HEAD=node1 bash slurm/torchrun.sh train recipes/tawin_qwen7b.yaml model.init=/models/HF_DIR [key=value ...]
#
# Every machine starts its ranks through torchrun's launcher (rendezvous c10d), which meets the others at TAWIN_HEAD and
# numbers the ranks. All of them need the run directory, the data and the model under the same paths.
#
# Environment:
#   TAWIN_HEAD         name or address of one of the machines, with :PORT if another than 29500 (default MASTER_ADDR)
#   TAWIN_NODES        number of machines (default 1)
#   TAWIN_GPUS         processes per machine (default: the GPUs that nvidia-smi lists, else 1)
#   TAWIN_JOB          the same word on all machines, another one for another job at the same time (default tawin)
#   TAWIN_SETUP        commands of your site, such as module load: see setup.sh
#   TAWIN_HOME         checkout of this project (default: the one that this script is in)
#   TAWIN_VENV         virtual environment (default: TAWIN_HOME/.venv if it is there)
#   TAWIN_DRY_RUN=1    print the command and start nothing
#
# Exit codes: 0 finished; 75 stopped by a signal or trainer.max_time after a save: the same command on all machines
# continues; 2 a mistake in the input; anything else: a failure, on which the machine's last lines name the rank.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=slurm/setup.sh
source "$HERE/setup.sh"
if [ $# -lt 2 ]; then
  echo "usage: TAWIN_NODES=N TAWIN_HEAD=HOST bash $0 VERB RECIPE [key=value ...]" >&2
  exit 2
fi
verb=$1 recipe=$2
shift 2
export TAWIN_HOME=${TAWIN_HOME:-$(dirname "$HERE")} TAWIN_NODES=${TAWIN_NODES:-1} TAWIN_JOB=${TAWIN_JOB:-tawin}
export TAWIN_HEAD=${TAWIN_HEAD:-${MASTER_ADDR:-localhost}}
unset RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT # of pods, where Kubernetes set them; ranks get their own
site_setup
if [ -f "${TAWIN_VENV:=$TAWIN_HOME/.venv}/bin/activate" ]; then
  # shellcheck source=/dev/null
  source "$TAWIN_VENV/bin/activate"
fi
gpus=${TAWIN_GPUS:-$({ nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l)}
if [ "$gpus" = 0 ]; then gpus=1; fi
export PYTHONPATH=$TAWIN_HOME${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1} # megatron-core overlaps TP communication so
export TORCHINDUCTOR_COMPILE_THREADS=${TORCHINDUCTOR_COMPILE_THREADS:-2}
if [ -z "${PYTORCH_ALLOC_CONF:-}" ]; then # the newer name of the same setting
  export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
fi
command=(python -m tawin_nemo "$verb" --recipe "$recipe" "$@" "trainer.num_nodes=$TAWIN_NODES" "trainer.devices=$gpus")
if [ "${TAWIN_DRY_RUN:-}" = 1 ]; then
  printf 'TAWIN_HEAD=%q TAWIN_NODES=%q TAWIN_JOB=%q ' "$TAWIN_HEAD" "$TAWIN_NODES" "$TAWIN_JOB"
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi
cd "$TAWIN_HOME"
exec "${command[@]}"

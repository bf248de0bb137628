#!/bin/bash
# TAWin RL of Qwen2.5-0.5B on one node of 8 H800.
#
#   sbatch slurm/tawin_qwen0.5b.sh model.init=/models/HF_DIR data.root=/data/DIR [key=value ...]
#
# Every number below can be changed by sbatch's options (sbatch --nodes=2 --time=8:00:00 slurm/tawin_qwen0.5b.sh ...), and
# everything else by the environment: slurm/launch.sh lists it.
#SBATCH --job-name=tawin_qwen0.5b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail
export TAWIN_HOME=${TAWIN_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
[ -f "$TAWIN_HOME/slurm/launch.sh" ] || { echo "no slurm/launch.sh in TAWIN_HOME=$TAWIN_HOME: name the checkout" >&2 && exit 2; }
# shellcheck source=slurm/launch.sh
source "$TAWIN_HOME/slurm/launch.sh"
launch train recipes/tawin_qwen0.5b.yaml "$@"

#!/bin/bash
# SFT of Qwen2.5-7B on 4 nodes of 8 H800.
#
#   sbatch slurm/sft_qwen7b.sh model.init=/models/HF_DIR data.root=/data/DIR [key=value ...]
#
# Every number below can be changed by sbatch's options (sbatch --nodes=2 --time=8:00:00 slurm/sft_qwen7b.sh ...), and
# everything else by the environment: slurm/launch.sh lists it.
#SBATCH --job-name=sft_qwen7b
#SBATCH --nodes=4
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
launch train recipes/sft_qwen7b.yaml "$@"

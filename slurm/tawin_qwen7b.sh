#!/bin/bash
# TAWin RL of Qwen2.5-7B on one node of 8 H800, with the paper's batch of 512 sequences (32 prompts x 16 candidates).
#
#   sbatch slurm/tawin_qwen7b.sh model.init=/models/HF_DIR data.root=/data/DIR [key=value ...]
#
# One node is enough for that batch: by `plan`, four nodes make a step 2.0 times as fast, since launches of rollouts and the
# hand-out of weights between nodes are not divided. Four nodes are for a production batch, 1,408 prompts a step (20,000
# tokens for each of 16 replicas): 4.0 times as fast as one. Estimated, not measured; choose rl.lr anew for such a batch.
#
#   sbatch --nodes=4 slurm/tawin_qwen7b.sh rl.prompts_per_step=1408 ...
#
# Every number below can be changed by sbatch's options (sbatch --nodes=2 --time=8:00:00 slurm/tawin_qwen7b.sh ...), and
# everything else by the environment: slurm/launch.sh lists it.
#SBATCH --job-name=tawin_qwen7b
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
launch train recipes/tawin_qwen7b.yaml "$@"

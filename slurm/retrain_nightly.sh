#!/bin/bash
# A night of production retraining: new interactions -> data set -> training from the published model -> gate on valid
# -> a Hugging Face export, and `latest` points at it if the gate passes. See `tawin-nemo keys retrain`.
#
#   sbatch slurm/retrain_nightly.sh retrain.root=/models/shop model.init=/models/HF_DIR data.root=/data/DIR [key=value ...]
#
# From cron: 0 2 * * * cd CHECKOUT && sbatch slurm/retrain_nightly.sh ... . DATE=YYYY-MM-DD takes another day than that of
# the first attempt (UTC). Exit codes: 0 published, 3 refused by the gate (what is published stays; gate.json says why).
# The same date again continues a night that was killed. One night waits for another that still runs (singleton).
# Everything else as in slurm/tawin_qwen7b.sh.
#SBATCH --job-name=retrain_nightly
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=12:00:00
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --dependency=singleton
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail
export TAWIN_HOME=${TAWIN_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
[ -f "$TAWIN_HOME/slurm/launch.sh" ] || { echo "no slurm/launch.sh in TAWIN_HOME=$TAWIN_HOME: name the checkout" >&2 && exit 2; }
# shellcheck source=slurm/launch.sh
source "$TAWIN_HOME/slurm/launch.sh"

first_attempts_date() { # a night that is requeued after midnight is still the same night
  local file=${TAWIN_LOGS:-$TAWIN_HOME/logs}/retrain_nightly.${SLURM_JOB_ID:-0}.date
  if [ -n "${SLURM_JOB_ID:-}" ] && ! dry_run && [ ! -s "$file" ]; then
    mkdir -p "$(dirname "$file")"
    date -u +%F >"$file"
  fi
  cat "$file" 2>/dev/null || date -u +%F
}

launch retrain recipes/tawin_qwen7b.yaml "retrain.date=${DATE:-$(first_attempts_date)}" "$@"

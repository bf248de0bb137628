#!/bin/bash
# A recommendation server on one node: one model over its GPUs, HTTP on the first one. See `tawin-nemo keys serve`.
#
#   sbatch slurm/serve.sh model.init=/models/HF_DIR data.root=/data/DIR serve.api_keys_file=/secrets/keys [key=value ...]
#   sbatch --ntasks-per-node=1 --gpus-per-node=1 slurm/serve.sh checkpoint=RUN_DIR/rl ...
#
# The address and the control plane's token are in RUN_DIR/serve/ (address.json, control_token). Before the time limit,
# on Slurm's signal, the server drains and the job is requeued, with the newest weights under the same path; scancel
# drains and ends it. When a rank dies, all ranks of the server end within seconds and are started again here, by the
# supervisor in launch.sh, MAX_RESTARTS times (20); address.json then has the new address. More replicas: submit it again with other serve.port and serve.control_port, or for other nodes.
# Everything else as in slurm/tawin_qwen7b.sh, except that plan, which counts what training needs, is not asked.
#SBATCH --job-name=serve
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=12
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
if dry_run; then pretend_slurm; fi
PARALLEL=(model.tensor_model_parallel_size="${SLURM_NTASKS_PER_NODE:-1}")
if [ "${SLURM_NTASKS_PER_NODE:-1}" = 1 ]; then PARALLEL+=(model.sequence_parallel=false); fi
MAX_RESTARTS=${MAX_RESTARTS:-20}
launch serve recipes/tawin_qwen7b.yaml "${PARALLEL[@]}" serve.host=0.0.0.0 "$@"

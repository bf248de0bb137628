# shellcheck shell=bash
# Sourced by the batch scripts of this folder:
#
#   launch VERB RECIPE [key=value ...]
#
# preflight (plan, doctor), then one srun task per GPU, with a log file per attempt and rank, and requeue.
#
# Environment, besides sbatch's own options (sbatch exports what is set where it is called):
#   RECIPE             recipe file instead of the script's own
#   TAWIN_OVERRIDES    key=value words, as after the script's name
#   TAWIN_HOME         checkout of this project (default: the folder where sbatch was called)
#   TAWIN_VENV         virtual environment (default: TAWIN_HOME/.venv if it is there)
#   TAWIN_SETUP        commands of your site before everything else, such as module load: see setup.sh
#   TAWIN_LOGS         folder of the logs (default: TAWIN_HOME/logs)
#   TAWIN_PREFLIGHT=0  start at once, without plan and doctor
#   TAWIN_GPU          what plan counts with: h800 (default), h100, h200, a100, a100-40
#   TAWIN_DRY_RUN=1    print the srun commands and start nothing; works without a Slurm
#   CONTAINER_IMAGE    run inside this image (pyxis); it needs what recipes/install_gpu.sh installs, see slurm/README.md
#   CONTAINER_MOUNTS   what it sees besides TAWIN_HOME: SRC:DST,SRC:DST
#   MAX_REQUEUES       attempts after the first one (default 20)
#   MAX_RESTARTS       how often a server that failed is started again inside its job (0; serve.sh: 20)
#   RESTART_PAUSE_S    seconds before the first restart, doubled each time up to 60 (default 2)
#
# Set for the tasks unless they are set already: OMP_NUM_THREADS and RAYON_NUM_THREADS and POLARS_MAX_THREADS (the
# cores of a task), PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True (shapes change in every step),
# TORCHINDUCTOR_COMPILE_THREADS=2 (each task compiles for itself), CUDA_DEVICE_MAX_CONNECTIONS=1.
#
# These scripts run under bash 4.2 and newer: there an empty array is unbound under set -u, hence ${A[@]+"${A[@]}"}.
#
# A run that Slurm's --signal, the time limit or trainer.max_time stopped has saved its state and ended with 75; the job
# then requeues itself and continues. Any other failure ends the job at once, with its own exit code and the last lines
# of the rank that failed first; a server is first started again, unless the failure was a mistake in its input (code 2).
# scancel ends a job for good.

# shellcheck source=slurm/setup.sh
source "${BASH_SOURCE[0]%/*}/setup.sh"
AGAIN=75
CANCELLED="" # SIGTERM came to the batch script itself
SRUN_OPTIONS=()
RESTARTS=0 # of a server, in this attempt

say() { echo "[$(date +%H:%M:%S)] $SLURM_JOB_NAME $SLURM_JOB_ID: $*"; }

dry_run() { [ "${TAWIN_DRY_RUN:-}" = 1 ]; }

# What sbatch would have set, from the script's own #SBATCH lines, for a look without a Slurm.
pretend_slurm() {
  default_of() { sed -n "s/^#SBATCH --$1=//p" "$0"; }
  SLURM_JOB_ID=${SLURM_JOB_ID:-0} SLURM_JOB_NAME=${SLURM_JOB_NAME:-$(default_of job-name)}
  SLURM_NNODES=${SLURM_NNODES:-$(default_of nodes)}
  SLURM_NTASKS_PER_NODE=${SLURM_NTASKS_PER_NODE:-$(default_of ntasks-per-node)}
  SLURM_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-$(default_of cpus-per-task)}
  MASTER_ADDR=${MASTER_ADDR:-FIRST_NODE}
}

launch() {
  local verb=$1 recipe=${RECIPE:-$2}
  shift 2
  if dry_run; then
    pretend_slurm
  elif [ -z "${SLURM_JOB_ID:-}" ]; then
    echo "$0 is for sbatch; TAWIN_DRY_RUN=1 bash $0 prints what it would start" >&2
    exit 2
  fi
  cd "$TAWIN_HOME" || exit 2
  ATTEMPT=${SLURM_RESTART_COUNT:-0}
  TASKS=${SLURM_NTASKS_PER_NODE:-1}
  LOGS=${TAWIN_LOGS:-$TAWIN_HOME/logs}/$SLURM_JOB_NAME.$SLURM_JOB_ID
  surroundings
  local overrides=()
  read -r -a overrides <<<"${TAWIN_OVERRIDES:-}"
  local words=(--recipe "$recipe" ${overrides[@]+"${overrides[@]}"} "$@" "trainer.num_nodes=$SLURM_NNODES" "trainer.devices=$TASKS")
  say "attempt $ATTEMPT: $SLURM_NNODES nodes x $TASKS tasks, rank 0 on $MASTER_ADDR:$MASTER_PORT, logs in $LOGS"
  trap : USR1                 # Slurm tells the tasks itself; this script has to wait for them
  trap 'CANCELLED=yes' TERM
  if [ "${TAWIN_PREFLIGHT:-1}" = 1 ]; then
    preflight "$verb" "${words[@]}"
  fi
  step "$verb" "${words[@]}"
  dry_run || say "done"
}

surroundings() {
  site_setup
  if [ -z "${CONTAINER_IMAGE:-}" ] && [ -f "${TAWIN_VENV:=$TAWIN_HOME/.venv}/bin/activate" ]; then
    # shellcheck source=/dev/null
    source "$TAWIN_VENV/bin/activate"
  fi
  CONTAINER=()
  if [ -n "${CONTAINER_IMAGE:-}" ]; then
    CONTAINER=(--container-image="$CONTAINER_IMAGE" --container-workdir="$TAWIN_HOME" --no-container-mount-home
      --container-mounts="$TAWIN_HOME:$TAWIN_HOME,$LOGS:$LOGS${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}")
  fi
  if ! dry_run; then
    mkdir -p "$LOGS"
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  fi
  export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
  export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not take it over from sbatch by itself
  export PYTHONPATH=$TAWIN_HOME${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
  export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1} # megatron-core overlaps TP communication so
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SRUN_CPUS_PER_TASK}
  export RAYON_NUM_THREADS=${RAYON_NUM_THREADS:-$SRUN_CPUS_PER_TASK} # tokenizers
  export POLARS_MAX_THREADS=${POLARS_MAX_THREADS:-$SRUN_CPUS_PER_TASK}
  export TORCHINDUCTOR_COMPILE_THREADS=${TORCHINDUCTOR_COMPILE_THREADS:-2}
  if [ -z "${PYTORCH_ALLOC_CONF:-}" ]; then # the newer name of the same setting
    export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
  fi
}

# Run a verb on every task, or on those that SRUN_OPTIONS ask for. Returns only when it has ended well.
step() {
  local verb=$1 code=0
  LOG=$LOGS/attempt$ATTEMPT.$verb
  if [ "$RESTARTS" != 0 ]; then LOG=$LOG.restart$RESTARTS; fi
  AGAIN_FILE=$LOG.again FAILED_FILE=$LOG.failed
  local command=(srun --export=ALL --kill-on-bad-exit=1 ${SRUN_OPTIONS[@]+"${SRUN_OPTIONS[@]}"}
    ${CONTAINER[@]+"${CONTAINER[@]}"}
    --output="$LOG.rank%t.log" bash "$TAWIN_HOME/slurm/task.sh" "$AGAIN_FILE" "$FAILED_FILE"
    python -m tawin_nemo "$@")
  if dry_run; then
    printf '%q ' "${command[@]}"
    echo
    return
  fi
  rm -f "$AGAIN_FILE" "$FAILED_FILE"
  "${command[@]}" || code=$? # in the foreground: a trap waits until it has ended
  if [ -e "$AGAIN_FILE" ] && [ ! -e "$FAILED_FILE" ]; then again; fi
  if [ "$code" = 0 ]; then return; fi
  if restarts "$verb" "$code"; then step "$@"; else fail "$verb" "$code"; fi
}

# Whether a server that failed is to be started again; waits before it says so. restarts VERB CODE
restarts() {
  if [ "$1" != serve ] || [ -n "$CANCELLED" ] || [ "$RESTARTS" -ge "${MAX_RESTARTS:-0}" ]; then return 1; fi
  if grep -q 'with code 2,' "$FAILED_FILE" 2>/dev/null; then return 1; fi # it would fail in the same way
  local pause=${RESTART_PAUSE_S:-2} n
  for ((n = 0; n < RESTARTS && pause < 60; n++)); do pause=$((2 * pause)); done
  pause=$((pause < 60 ? pause : 60)) RESTARTS=$((RESTARTS + 1))
  say "serve failed with code $2 ($(cat "$FAILED_FILE" 2>/dev/null || echo "no rank could say why"))"
  say "restart $RESTARTS of $MAX_RESTARTS in $pause s"
  sleep "$pause"
  [ -z "$CANCELLED" ]
}

# What is wrong should be told in a minute, not by 32 tracebacks. preflight VERB [key=value ...]
preflight() {
  local asked="doctor has"
  if [ "$1" != serve ]; then # plan counts what training needs
    asked="plan and doctor have"
    SRUN_OPTIONS=(--nodes=1 --ntasks=1)
    step plan "${@:2}" --gpus "$((SLURM_NNODES * TASKS))" --gpu "${TAWIN_GPU:-h800}"
    SRUN_OPTIONS=()
  fi
  step doctor "${@:2}"
  dry_run || say "preflight: $asked no objection"
}

again() {
  local resume="sbatch the same file with the same arguments to continue"
  if [ -n "$CANCELLED" ] && [ "$(squeue -h -j "$SLURM_JOB_ID" -o %r)" != TimeLimit ]; then
    say "stopped from outside after a save; $resume"
    exit "$AGAIN"
  fi
  if [ "$ATTEMPT" -ge "${MAX_REQUEUES:-20}" ]; then
    say "stopped after a save, and MAX_REQUEUES=${MAX_REQUEUES:-20} is used up; $resume"
    exit "$AGAIN"
  fi
  say "stopped after a save; requeued"
  scontrol requeue "$SLURM_JOB_ID" || { say "the requeue was refused; $resume" && exit "$AGAIN"; }
  sleep 120 # Slurm ends this script when it takes the job back
  exit "$AGAIN"
}

fail() {
  local verb=$1 code=$2 first="" logs=("$LOG".rank*.log)
  say "$verb failed with code $code"
  if [ -e "$FAILED_FILE" ]; then
    cat "$FAILED_FILE"
    first=$LOG.rank$(sed -n 's/^rank \([0-9]*\) .*/\1/p;q' "$FAILED_FILE").log
  else # a node that is gone cannot tell
    first=$(grep -l -E 'Error|tawin-nemo [a-z]+:' "${logs[@]}" 2>/dev/null | head -n 1 || true)
  fi
  echo "--- the last lines of ${first:=${logs[0]}}"
  tail -n 40 "$first" || true
  exit "$code"
}

# Sourced by the batch scripts of this folder. One srun task per GPU, logs per attempt and rank, requeue.
#
#   launch VERB [--recipe F] [key=value ...]
#
# Environment (export it, or sbatch --export=ALL,NAME=value):
#   TAWIN_HOME        checkout of this project (default: where sbatch was called)
#   TAWIN_VENV        virtual environment to activate (default: TAWIN_HOME/.venv if it is there)
#   TAWIN_LOGS        folder of the logs (default: TAWIN_HOME/logs)
#   CONTAINER_IMAGE   run inside this image (pyxis), with CONTAINER_MOUNTS (default: TAWIN_HOME and the working folder)
#   MAX_REQUEUES      attempts after the first one (default 20)
#
# A run that Slurm's signal, a preemption or trainer.max_time stopped has saved its state and ends with 75; the job then
# requeues itself and continues. Any other failure ends the job at once, with the first failing rank's last lines.

TAWIN_HOME=${TAWIN_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
AGAIN=75

launch() {
  cd "$TAWIN_HOME"
  local attempt=${SLURM_RESTART_COUNT:-0} tasks=${SLURM_NTASKS_PER_NODE:-1}
  local logs=${TAWIN_LOGS:-$TAWIN_HOME/logs}/$SLURM_JOB_NAME.$SLURM_JOB_ID
  local again=$logs/attempt$attempt.again
  mkdir -p "$logs"
  if [ -z "${CONTAINER_IMAGE:-}" ] && [ -f "${TAWIN_VENV:=$TAWIN_HOME/.venv}/bin/activate" ]; then
    source "$TAWIN_VENV/bin/activate"
  fi
  local container=()
  if [ -n "${CONTAINER_IMAGE:-}" ]; then
    container=(--container-image="$CONTAINER_IMAGE" --container-workdir="$TAWIN_HOME"
      --container-mounts="${CONTAINER_MOUNTS:-$TAWIN_HOME:$TAWIN_HOME,$PWD:$PWD}")
  fi
  MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
  say "attempt $attempt: $SLURM_NNODES nodes x $tasks tasks, rank 0 on $MASTER_ADDR:$MASTER_PORT, logs in $logs"

  # Tasks end with 0 when they only ask to be started again: a task that ended with another code would make srun kill
  # those that are still closing down. The shell around Python must survive the signal that Python answers.
  srun --export=ALL --kill-on-bad-exit=1 --output="$logs/attempt$attempt.rank%t.log" "${container[@]}" \
    bash -c 'trap : USR1 TERM; again=$1; shift; "$@"; code=$?
             if [ "$code" = '"$AGAIN"' ]; then : > "$again"; exit 0; fi; exit "$code"' task "$again" \
    python -m tawin_nemo "$@" "trainer.num_nodes=$SLURM_NNODES" "trainer.devices=$tasks" &
  local step=$! code=0
  trap : USR1 TERM # Slurm tells the tasks itself; this shell has to wait for them
  while true; do
    code=0
    wait "$step" || code=$?
    kill -0 "$step" 2>/dev/null || break # a signal ended the wait, not the step
  done
  finish "$code" "$attempt" "$logs" "$again"
}

finish() {
  local code=$1 attempt=$2 logs=$3 again=$4
  if [ "$code" = 0 ] && [ ! -e "$again" ]; then
    say "done"
    return 0
  fi
  if [ -e "$again" ]; then
    if [ "$attempt" -ge "${MAX_REQUEUES:-20}" ]; then
      say "stopped after a save, and MAX_REQUEUES=${MAX_REQUEUES:-20} is used up; sbatch the same file to continue"
      exit "$AGAIN"
    fi
    say "stopped after a save; requeued"
    scontrol requeue "$SLURM_JOB_ID"
    sleep 60 # Slurm ends this script when it takes the job back
    exit "$AGAIN"
  fi
  say "failed with code $code; the first rank that failed says:"
  first=$(grep -l -E 'Error|tawin-nemo [a-z]+:' $(ls -tr "$logs/attempt$attempt".rank*.log) 2>/dev/null | head -n 1 || true)
  tail -n 40 "${first:-$logs/attempt$attempt.rank0.log}" || true
  exit "$code"
}

say() { echo "[$(date +%H:%M:%S)] $SLURM_JOB_NAME $SLURM_JOB_ID: $*"; }

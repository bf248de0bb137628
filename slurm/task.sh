#!/bin/bash
# One task of a step: task.sh AGAIN_FILE FAILED_FILE COMMAND ...
#
# A command that only asks to be started again (75) ends with 0 here and leaves AGAIN_FILE: a task that ended with
# another code would make srun kill those that are still closing down. The first one that fails writes its name into
# FAILED_FILE. This shell outlives the signals that the command answers.
asked=""
trap 'asked=yes' USR1 TERM
again=$1 failed=$2
shift 2
echo "rank $SLURM_PROCID of $SLURM_NTASKS on $SLURMD_NODENAME, attempt ${SLURM_RESTART_COUNT:-0}, $(date '+%F %T')"
"$@" # in the foreground: bash runs the trap when it has ended, and its exit code is never that of an interrupted wait
code=$?
case "$code" in
  0) exit 0 ;;
  75) stopped=yes ;;
  138 | 143) stopped=$asked ;; # the signal came before the command could answer it: nothing is lost
  *) stopped="" ;;
esac
if [ -n "$stopped" ]; then
  : >"$again"
  exit 0
fi
how="code $code"
if [ "$code" -gt 128 ]; then how="signal $(kill -l $((code - 128)) 2>/dev/null || echo $((code - 128)))"; fi
(
  set -o noclobber
  echo "rank $SLURM_PROCID on $SLURMD_NODENAME was the first to fail, with $how, at $(date +%T)" >"$failed"
) 2>/dev/null
exit "$code"

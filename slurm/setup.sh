# shellcheck shell=bash
# Sourced by launch.sh and torchrun.sh:
#
#   site_setup      runs the commands in TAWIN_SETUP before the virtual environment is activated
#
#   TAWIN_SETUP='module purge && module load cuda/13.0 gcc/13' sbatch slurm/tawin_qwen7b.sh ...
#   TAWIN_SETUP='source /site/env.sh' ...
#
# What they change in the environment reaches every task. A batch script is no login shell: where there is no command
# `module` yet, the usual files of Lmod and Environment Modules are looked for, TAWIN_MODULES before them.
site_setup() {
  local code=0 file
  if [ -z "${TAWIN_SETUP:-}" ]; then return 0; fi
  set +eu # module systems are not written for them
  for file in "${TAWIN_MODULES:-}" /etc/profile.d/{lmod,z00_lmod,modules}.sh /usr/share/{lmod/lmod,modules}/init/bash; do
    command -v module >/dev/null 2>&1 && break
    # shellcheck source=/dev/null
    [ -r "$file" ] && source "$file"
  done
  eval "$TAWIN_SETUP"
  code=$?
  set -eu
  if [ "$code" != 0 ]; then
    echo "TAWIN_SETUP=$TAWIN_SETUP ended with $code; mend it, or leave it out" >&2
    exit 2
  fi
}

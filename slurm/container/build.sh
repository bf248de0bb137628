#!/bin/bash
# Builds the container image, and the file that pyxis and enroot run.
#
#   bash slurm/container/build.sh registry.example/tawin-nemo:0.1 [options of docker build]
#   SQSH=/images/tawin.sqsh bash slurm/container/build.sh tawin-nemo:0.1 --build-arg DRIVER=535 --build-arg BASE=...
#   CONTAINER_IMAGE=/images/tawin.sqsh sbatch slurm/tawin_qwen7b.sh ...
#
# Environment:
#   TAWIN_DOCKER      docker (default) or podman
#   SQSH              also write this squashfs file with enroot, from the engine's image
#   TAWIN_DRY_RUN=1   print the commands and run nothing
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
run() {
  if [ "${TAWIN_DRY_RUN:-}" = 1 ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}
if [ $# -lt 1 ]; then
  echo "usage: bash slurm/container/build.sh IMAGE:TAG [options of docker build]" >&2
  exit 2
fi
image=$1 engine=${TAWIN_DOCKER:-docker}
shift
run "$engine" build --file slurm/container/Dockerfile --tag "$image" "$@" .
if [ -n "${SQSH:-}" ]; then
  source=dockerd
  if [ "$engine" = podman ]; then source=podman; fi
  run enroot import --output "$SQSH" "$source://$image"
fi

#!/usr/bin/env bash
# A real Slurm of several nodes on this one machine, for tests: root, no systemd, no cgroups, loopback only.
#   source <(tests/slurm/cluster.sh start)     prints what to source (SLURM_CONF), progress goes to stderr
#   tests/slurm/cluster.sh stop                ends jobs and daemons, removes the folder
# Exit code 3: this machine cannot have one (no root, or Debian's packages slurm-wlm and munge cannot be installed).
# Knobs: SLURM_SIM_DIR, NODES (2), GPUS per node (8, fake), CPUS per node (96).
set -euo pipefail
DIR=${SLURM_SIM_DIR:-${TMPDIR:-/tmp}/tawin-slurm}
NODES=${NODES:-2} GPUS=${GPUS:-8} CPUS=${CPUS:-96}
export SLURM_CONF=$DIR/slurm.conf
say() { echo "cluster: $*" >&2; }

running() { # running PIDFILE NAME: the process of that file lives and has that name
  local pid
  pid=$(cat "$1" 2>/dev/null) && [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$2" ]
}

install() {
  if command -v slurmctld && command -v slurmd && command -v munged; then return; fi >/dev/null
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    cannot "there is no Slurm here, and no apt-get as root to install it"
  fi
  say "installing slurm-wlm and munge"
  local policy=/usr/sbin/policy-rc.d made="" # keeps the packages' own services from starting
  [ -e "$policy" ] || { printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod 755 "$policy" && made=yes; }
  export DEBIAN_FRONTEND=noninteractive
  { apt-get update -q && apt-get install -y -q --no-install-recommends slurm-wlm munge; } >&2 || failed=yes
  [ -z "$made" ] || rm -f "$policy"
  [ -z "${failed:-}" ] || cannot "apt-get install slurm-wlm munge failed"
}

cannot() { say "$*" && exit 3; } # the machine cannot have a Slurm; tests skip

configure() {
  mkdir -p "$DIR"/{run,log,state,dev,munge}
  for n in $(seq "$NODES"); do
    mkdir -p "$DIR/spool/node$n"
    grep -q "node$n # tawin-slurm" /etc/hosts || echo "127.0.1.$n node$n # tawin-slurm" >>/etc/hosts
  done
  for i in $(seq 0 $((GPUS - 1))); do
    [ -c "$DIR/dev/gpu$i" ] || mknod "$DIR/dev/gpu$i" c 1 3 || cannot "making device files is not allowed here"
  done
  echo "NodeName=node[1-$NODES] Name=gpu File=$DIR/dev/gpu[0-$((GPUS - 1))]" >"$DIR/gres.conf"
  cat >"$SLURM_CONF" <<CONF
ClusterName=tawin
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=16917
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job is held back
AuthInfo=socket=$DIR/munge/munge.socket,cred_expire=5
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/run/slurmctld.pid
SlurmdPidFile=$DIR/run/slurmd.%n.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# more CPUs and memory than the machine has
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
# the controller on loopback only; srun must stay free, or the nodes cannot call it back
CommunicationParameters=NoCtldInAddrAny
KillWait=10
# a busy machine answers late
MessageTimeout=100
TCPTimeout=60
SlurmdTimeout=1800
MinJobAge=3600
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0
NodeName=node[1-$NODES] NodeHostname=localhost NodeAddr=127.0.1.[1-$NODES] Port=[17101-$((17100 + NODES))] Sockets=1 CoresPerSocket=$CPUS ThreadsPerCore=1 RealMemory=1000000 Gres=gpu:$GPUS State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
}

start_munge() {
  running "$DIR/munge/munged.pid" munged && return
  chown munge: "$DIR/munge" && chmod 711 "$DIR/munge"
  [ -s "$DIR/munge/munge.key" ] || head -c 1024 /dev/urandom >"$DIR/munge/munge.key"
  chown munge: "$DIR/munge/munge.key" && chmod 400 "$DIR/munge/munge.key"
  (cd / && setpriv --reuid=munge --regid=munge --clear-groups munged --socket="$DIR/munge/munge.socket" \
    --key-file="$DIR/munge/munge.key" --pid-file="$DIR/munge/munged.pid" --log-file="$DIR/munge/munged.log" \
    --seed-file="$DIR/munge/munged.seed") >&2 </dev/null
}

start_node() { # with a host name of its own where that is allowed
  if unshare --uts true 2>/dev/null; then
    # shellcheck disable=SC2016
    unshare --uts sh -c 'hostname "$2" && exec slurmd -f "$1" -N "$2"' - "$SLURM_CONF" "$1"
  else
    slurmd -f "$SLURM_CONF" -N "$1"
  fi
}

start() {
  [ "$(id -u)" = 0 ] || cannot "starting Slurm's daemons needs root"
  install
  configure
  start_munge
  running "$DIR/run/slurmctld.pid" slurmctld || (cd / && env -u SLURM_JOB_ID slurmctld -f "$SLURM_CONF") >&2 </dev/null
  for n in $(seq "$NODES"); do
    running "$DIR/run/slurmd.node$n.pid" slurmd || (cd / && start_node "node$n") >&2 </dev/null
  done
  for _ in $(seq 150); do
    if [ "$(sinfo -h -N -o %T 2>/dev/null | grep -cxE 'idle|mixed|allocated|completing')" = "$NODES" ]; then
      echo "export SLURM_CONF=$SLURM_CONF"
      return
    fi
    sleep 0.2
  done
  say "the nodes did not come up"
  tail -n 20 "$DIR"/log/*.log >&2
  exit 1
}

stop() {
  if running "$DIR/run/slurmctld.pid" slurmctld; then
    squeue -h -o %A | xargs -r scancel || true
    for _ in $(seq 60); do
      if [ -z "$(squeue -h 2>/dev/null)" ]; then break; fi
      sleep 0.5
    done
  fi
  for file in "$DIR"/run/*.pid "$DIR"/munge/munged.pid; do
    name=$(basename "$file" | cut -d. -f1)
    if running "$file" "$name"; then kill "$(cat "$file")" 2>/dev/null || true; fi
  done
  sleep 1
  rm -rf -- "$DIR"
  if grep -q '# tawin-slurm$' /etc/hosts; then # written in place: in a container the file is a mount
    kept=$(grep -v '# tawin-slurm$' /etc/hosts)
    printf '%s\n' "$kept" >/etc/hosts
  fi
}

case "${1:-}" in
  start | stop) "$1" ;;
  *) say "start or stop" && exit 2 ;;
esac

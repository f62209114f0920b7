#!/usr/bin/env bash
# A SLURM of one node on this machine, for tests/cluster/test_slurm_cluster.py. As root, on Debian or Ubuntu:
#
#     tests/cluster/slurm.sh test           # start, run the tests (with more arguments, pytest's), stop; some minutes
#     tests/cluster/slurm.sh start FOLDER   # then, with SLURM_CONF=FOLDER/slurm.conf exported: sbatch, srun, squeue
#     tests/cluster/slurm.sh stop FOLDER    # also cancels what runs, and removes FOLDER
#
# `start` installs SLURM (apt-get) if it is not there. Partition `low` is preempted by `high`: SIGTERM, 20 s of grace,
# SIGKILL, requeue. Tried with SLURM 22.05 on Debian 12.
set -euo pipefail

start() {
  folder=$(realpath -m "$1")
  export SLURM_CONF=$folder/slurm.conf
  if ! command -v slurmctld >/dev/null || ! command -v munged >/dev/null; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge
  fi
  host=$(hostname -s)
  getent hosts "$host" >/dev/null || echo "127.0.0.1 $host" >>/etc/hosts
  mkdir -p "$folder"/{state,spool}
  # cred_expire: a requeued job waits until its old credential is void, 2 minutes by default
  cat >"$SLURM_CONF" <<CONF
ClusterName=one
SlurmctldHost=$host
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=10
OverTimeLimit=0
NodeName=$host CPUs=2
PartitionName=low Nodes=$host Default=YES State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=high Nodes=$host State=UP PriorityTier=2 PreemptMode=OFF
CONF
  install -d -o munge /run/munge
  [ -S /run/munge/munge.socket.2 ] || su -s /bin/bash munge -c "$(command -v munged)"
  slurmctld
  slurmd
  for _ in {1..30}; do
    sinfo --noheader --states=idle | grep -q low && break
    sleep 1
  done
  sinfo
}

stop() {
  folder=$(realpath -m "$1")
  export SLURM_CONF=$folder/slurm.conf
  scancel --full --signal=KILL --user="$(id -un)" || true
  scancel --user="$(id -un)" || true
  for pid in "$folder/slurmd.pid" "$folder/slurmctld.pid" /run/munge/munged.pid; do
    [ -e "$pid" ] || continue
    kill "$(cat "$pid")" || true
    for _ in {1..20}; do
      [ -e "$pid" ] || break # each removes its own at its end
      sleep 0.5
    done
  done
  rm -rf "$folder"
}

case ${1:-} in
  start | stop) "$1" "$2" ;;
  test)
    folder=$(mktemp -d)
    trap 'stop "$folder"' EXIT
    start "$folder"
    CIFAR_TL_SLURM=1 "${PYTHON:-python}" -m pytest -p no:xdist "$(dirname "$0")" "${@:2}"
    ;;
  *) sed -n '2,9s/^# \?//p' "$0" ;;
esac

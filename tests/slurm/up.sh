#!/usr/bin/env bash
# A real Slurm of one node on this machine, for tests: two partitions, eight CPUs, four GPUs that are none, accounting.
#
#   SLURM_TEST=<folder> tests/slurm/up.sh && export SLURM_CONF=<folder>/slurm.conf
#
# Everything it keeps lies in that folder; started again, it starts what is not running. Needs root, no systemd, and
# Debian's slurm-wlm slurmctld slurmd slurmdbd slurm-client munge mariadb-server. `down.sh` stops it.
#
#   spot      (default) a job here is preempted by any in `ondemand`: it has three seconds, and is queued again
#   ondemand  is never preempted
set -euo pipefail
home=${SLURM_TEST:?a folder of its own}
mkdir -p "$home"/{run,log,ctld,slurmd,mysql,gpu}
home=$(cd "$home" && pwd)
chmod 755 "$home" "$home/run" # other users' jobs read slurm.conf and speak to munge
export SLURM_CONF=$home/slurm.conf
PATH=$PATH:/usr/sbin:/sbin
[ "$(id -u)" = 0 ] || { echo "up.sh: needs root" >&2; exit 1; }
for command in munged mariadbd slurmdbd slurmctld slurmd sbatch sacctmgr; do
  command -v $command > /dev/null || { echo "up.sh: there is no $command" >&2; exit 1; }
done
node=$(hostname -s)
memory=$(($(awk '/^MemTotal/ {print $2}' /proc/meminfo) / 1024 - 1024))

running() { [ -s "$home/run/$1.pid" ] && kill -0 "$(cat "$home/run/$1.pid" 2> /dev/null)" 2> /dev/null; }
until_true() { # SECONDS WHAT COMMAND...: waits for the command to succeed
  local end=$((SECONDS + $1)) what=$2
  shift 2
  until "$@" > /dev/null 2>&1; do
    [ $SECONDS -lt $end ] || { echo "$what did not come up; see $home/log" >&2; exit 1; }
    sleep 0.2
  done
}

for gpu in 0 1 2 3; do [ -e "$home/gpu/$gpu" ] || mknod "$home/gpu/$gpu" c 1 3; done # four more of /dev/null
cat > "$home/gres.conf" << END
NodeName=$node Name=gpu Type=h100 File=$home/gpu/[0-3]
END
cat > "$home/slurm.conf" << END
ClusterName=selfspec
SlurmctldHost=$node(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A credential that is valid for two minutes keeps a job that is queued again waiting for as long.
AuthInfo=socket=$home/run/munge.socket,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePass=$home/run/munge.socket
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# A job that asked for a signal before its time is up (sbatch --signal) gets it when it is preempted, too.
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
KillWait=5
OverTimeLimit=0
ReturnToService=2
SlurmctldPidFile=$home/run/slurmctld.pid
SlurmdPidFile=$home/run/slurmd.pid
StateSaveLocation=$home/ctld
SlurmdSpoolDir=$home/slurmd
SlurmctldLogFile=$home/log/slurmctld.log
SlurmdLogFile=$home/log/slurmd.log
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=$node NodeAddr=127.0.0.1 CPUs=8 RealMemory=$memory Gres=gpu:h100:4 State=UNKNOWN
PartitionName=spot Nodes=$node Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=3
PartitionName=ondemand Nodes=$node MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
END
cat > "$home/slurmdbd.conf" << END
AuthType=auth/munge
AuthInfo=socket=$home/run/munge.socket
DbdHost=$node
DbdAddr=127.0.0.1
SlurmUser=root
LogFile=$home/log/slurmdbd.log
PidFile=$home/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=3307
StorageUser=slurm
StoragePass=test
StorageLoc=slurm
END
chmod 600 "$home/slurmdbd.conf"
# Where no other Slurm is configured, commands find this one without SLURM_CONF.
[ -e /etc/slurm/slurm.conf ] || { mkdir -p /etc/slurm && ln -sf "$SLURM_CONF" /etc/slurm/slurm.conf; }

if ! running munged; then
  [ -s "$home/run/munge.key" ] || (umask 077 && head -c 128 /dev/urandom > "$home/run/munge.key")
  munged --force --key-file="$home/run/munge.key" --socket="$home/run/munge.socket" --seed-file="$home/run/munge.seed" \
    --pid-file="$home/run/munged.pid" --log-file="$home/log/munged.log"
fi

database() { mariadb --no-defaults --socket="$home/run/mysql.socket" "$@"; }
if ! running mariadbd; then
  chown mysql "$home/mysql" "$home/run"
  [ -d "$home/mysql/mysql" ] ||
    mariadb-install-db --no-defaults --user=mysql --datadir="$home/mysql" > "$home/log/install-db.log" 2>&1
  mariadbd --no-defaults --user=mysql --datadir="$home/mysql" --socket="$home/run/mysql.socket" \
    --pid-file="$home/run/mariadbd.pid" --port=3307 --bind-address=127.0.0.1 --innodb-buffer-pool-size=64M \
    > "$home/log/mariadbd.log" 2>&1 < /dev/null &
  until_true 600 mariadbd database -e 'select 1'
  database -e "create database if not exists slurm; grant all on slurm.* to 'slurm'@'127.0.0.1' identified by 'test';
    grant all on slurm.* to 'slurm'@'localhost' identified by 'test'"
fi

running slurmdbd || slurmdbd
until_true 600 slurmdbd sacctmgr -n show cluster
running slurmctld || slurmctld
running slurmd || slurmd
until_true 600 slurmctld scontrol ping
until_true 600 "the node $node" sh -c 'sinfo -h -o %t | grep -Eq "^(idle|mix|alloc)$"'
sinfo

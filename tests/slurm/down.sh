#!/usr/bin/env bash
# Ends what up.sh started in $SLURM_TEST, jobs included, and waits until it has ended.
set -euo pipefail
home=$(cd "${SLURM_TEST:?the folder given to up.sh}" && pwd)
export SLURM_CONF=$home/slurm.conf

running() { [ -s "$home/run/$1.pid" ] && kill -0 "$(cat "$home/run/$1.pid" 2> /dev/null)" 2> /dev/null; }

if running slurmctld; then
  squeue -h -o %i | xargs -r scancel
  for _ in $(seq 600); do [ -n "$(squeue -h -o %i)" ] || break; sleep 0.2; done
fi
for daemon in slurmd slurmctld slurmdbd mariadbd munged; do
  if running $daemon; then kill "$(cat "$home/run/$daemon.pid")"; fi
  for _ in $(seq 600); do running $daemon || break; sleep 0.2; done
done
if [ "$(readlink /etc/slurm/slurm.conf)" = "$SLURM_CONF" ]; then rm /etc/slurm/slurm.conf; fi

#!/usr/bin/env bash
# A real SkyPilot API server on this machine, with this machine's Slurm (tests/slurm/up.sh) as its only infra.
#
#   SKY_TEST=<folder> tests/skypilot/up.sh && export HOME=<folder>/home PATH=<folder>/venv/bin:$PATH
#
# All it keeps lies in that folder: SkyPilot's own environment (venv/, made if need be), its HOME, and the home of
# the user as whom it reaches Slurm through an sshd on 127.0.0.1:2222. Started again, it starts what is not running.
# Needs root, openssh-server and some 5 GB of memory. `down.sh` stops it.
#
# A machine without the internet (SKY_OFFLINE=1) lacks what SkyPilot takes for granted: for what it installs on a node,
# shims/ stands in on that user's PATH; for its catalog of prices, catalog/ (made up); and the addresses by which it
# tells whether *it* is offline become its own.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "${SKY_TEST:?a folder of its own}"/{home/.slurm,home/.sky,sshd,shims}
lab=$(cd "$SKY_TEST" && pwd)
chmod 755 "$lab"
user=skyuser port=2222
venv=$lab/venv

if [ ! -x "$venv/bin/sky" ]; then
  python3 -m venv "$venv"
  "$venv/bin/pip" install -q 'skypilot[gcp,slurm]==0.14.1' uv
fi

# Who SkyPilot is on the cluster.
id $user > /dev/null 2>&1 || { useradd --no-create-home --home-dir "$lab/user" --shell /bin/bash $user; usermod -p '*' $user; }
install -d -o $user "$lab/user"
[ -e "$lab/sshd/host" ] || ssh-keygen -q -t ed25519 -N '' -f "$lab/sshd/host"
[ -e "$lab/sshd/key" ] || ssh-keygen -q -t ed25519 -N '' -f "$lab/sshd/key"
cat > "$lab/sshd/config" << CONFIG
Port $port
ListenAddress 127.0.0.1
HostKey $lab/sshd/host
PidFile $lab/sshd/pid
AuthorizedKeysFile $lab/sshd/key.pub
StrictModes no
UsePAM no
PasswordAuthentication no
AllowUsers $user
MaxSessions 200
MaxStartups 150:30:200
Subsystem sftp internal-sftp
CONFIG
mkdir -p /run/sshd
if ! { [ -s "$lab/sshd/pid" ] && kill -0 "$(cat "$lab/sshd/pid")" 2> /dev/null; }; then
  "$(command -v sshd || echo /usr/sbin/sshd)" -f "$lab/sshd/config" -E "$lab/sshd/log"
fi

if [ -n "${SKY_OFFLINE:-}" ]; then
  install -m 755 "$here"/shims/* "$lab/shims/"
  install -m 755 "$venv/bin/uv" "$lab/shims/real-uv"
  mkdir -p "$lab/home/.sky/catalogs/v8" && cp -r "$here"/catalog/* "$lab/home/.sky/catalogs/v8/"
  addresses="_TEST_IP_LIST = ['http://127.0.0.1:46580']"
  sed -i "s#^_TEST_IP_LIST = .*#$addresses#" "$venv"/lib/python3*/site-packages/sky/backends/backend_utils.py
fi
cat > "$lab/user/.bash_profile" << PROFILE
export PATH=${SKY_OFFLINE:+$lab/shims:}\$HOME/.local/bin:\$PATH SHIMS=$lab/shims
PROFILE

cat > "$lab/home/.slurm/config" << CONFIG
Host local
  HostName 127.0.0.1
  Port $port
  User $user
  IdentityFile $lab/sshd/key
  IdentitiesOnly yes
CONFIG
# Consolidated: the controller of managed jobs is part of the API server, not a machine of its own.
cat > "$lab/home/.sky/config.yaml" << CONFIG
jobs:
  controller:
    consolidation_mode: true
slurm:
  sbatch_options:
    time: "01:00:00"
CONFIG
export HOME=$lab/home PATH=$venv/bin:$PATH SKYPILOT_DISABLE_USAGE_COLLECTION=1
ssh -F "$HOME/.slurm/config" -o StrictHostKeyChecking=accept-new local sinfo > /dev/null
sky api start > "$lab/api.log" 2>&1
sky check slurm

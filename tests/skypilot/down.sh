#!/usr/bin/env bash
# Stops what up.sh started in $SKY_TEST, and waits until it has ended.
set -euo pipefail
lab=$(cd "${SKY_TEST:?the folder given to up.sh}" && pwd)
HOME=$lab/home "$lab/venv/bin/sky" api stop || true
scancel -u skyuser 2> /dev/null || true
if [ -s "$lab/sshd/pid" ]; then kill "$(cat "$lab/sshd/pid")" 2> /dev/null || true; fi
for _ in $(seq 50); do pgrep -u skyuser > /dev/null || break; sleep 0.2; done
pgrep -u skyuser | xargs -r kill || true
for _ in $(seq 50); do userdel skyuser 2> /dev/null && break; id skyuser > /dev/null 2>&1 || break; sleep 0.2; done
rm -rf "$lab/user"

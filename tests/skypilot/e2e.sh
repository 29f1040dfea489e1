#!/usr/bin/env bash
# A sweep of three as SkyPilot managed jobs, from `python -m selfspec.run -m` to the merged table, all parts real but
# the engine: SkyPilot's API server on a local Slurm (up.sh), checkpoints in a bucket over HTTP, an MLflow server.
# One job's machine is taken away half-way; it must come back, and carry on from the bucket. The same command again
# must find all done. Some ten minutes.
#
#   SKY_TEST=<folder> PYTHON=<selfspec's> JOB_PYTHON='<command for the same one, as the cluster user>' tests/skypilot/e2e.sh
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
lab=$(cd "${SKY_TEST:?the folder given to up.sh}" && pwd)
: "${PYTHON:=python}" "${JOB_PYTHON:=$PYTHON}"
work=$lab/e2e
rm -rf "$work" && mkdir -p "$work"
export HOME=$lab/home PATH=$lab/venv/bin:$PATH SKYPILOT_DISABLE_USAGE_COLLECTION=1 SELFSPEC_CACHE=$work/cache
export GIT_PYTHON_REFRESH=quiet DO_NOT_TRACK=true
cd "$here/../.."

mkfifo "$work/bucket.in"
"$PYTHON" "$here/bucket.py" < "$work/bucket.in" > "$work/bucket.out" 2> "$work/bucket.err" &
exec 3> "$work/bucket.in"
"$PYTHON" -m mlflow server --backend-store-uri "sqlite:///$work/mlflow.db" --artifacts-destination "$work/artifacts" \
  --host 127.0.0.1 --port 5055 --workers 1 > "$work/mlflow.log" 2>&1 &
mlflow=$!
trap 'exec 3>&-; kill $mlflow; wait' EXIT
until [ -s "$work/bucket.out" ] && curl -sf http://127.0.0.1:5055/health > /dev/null; do sleep 0.5; done
read -r STORAGE_EMULATOR_HOST bucket < "$work/bucket.out"
export STORAGE_EMULATOR_HOST MLFLOW_TRACKING_URI=http://127.0.0.1:5055
export E2E_SECRET=hush-$RANDOM$RANDOM$RANDOM

"$PYTHON" "$here/judge.py" prompts "$work/prompts.json"
chmod a+rX "$work" "$work/prompts.json"
sweep() {
  "$PYTHON" -m selfspec.run -m hydra/launcher=skypilot K=1,2,3 engine=fake draft=layerskip exit_layer=3 \
    model.name=fake model.layers=6 model.sha256=null "model.source=file:$work/prompts.json" \
    "workload.source=file:$work/prompts.json" workload.sha256=null workload.new_tokens=12 \
    scale=smoke scale.prompts=40 tracking.uri=null output_dir="$work/outputs" checkpoint.dir="$bucket/e2e" \
    hydra.launcher.infra=slurm/local/spot hydra.launcher.accelerators=H100:1 hydra.launcher.use_spot=true \
    hydra.launcher.cpus=1 hydra.launcher.memory=1 hydra.launcher.poll_s=3 hydra.launcher.setup=null \
    "hydra.launcher.envs={STORAGE_EMULATOR_HOST: '$STORAGE_EMULATOR_HOST', SLOW_S: '1'}" \
    'hydra.launcher.secrets=[E2E_SECRET]' \
    "hydra.launcher.command='test -n \"\$E2E_SECRET\" && SELFSPEC_CACHE=\$HOME/cache $JOB_PYTHON tests/skypilot/slow.py'" "$@"
}

echo "== the sweep"
start=$SECONDS
sweep > "$work/first.log" 2>&1 &
launcher=$!
plan=$(timeout 600 "$PYTHON" "$here/judge.py" half "$bucket/e2e" "$work/outputs" 1)
victim=$(squeue -h -o '%i %j' | awk -v plan="$plan" '$2 ~ plan {print $1}')
echo "== after $((SECONDS - start)) s: the machine of plan $plan (Slurm job $victim) is taken away half-way"
scancel "$victim"
wait $launcher || { cat "$work/first.log"; exit 1; }
cat "$work/first.log"
echo "== the sweep took $((SECONDS - start)) s; the same command again"
start=$SECONDS
sweep > "$work/second.log" 2>&1 || { cat "$work/second.log"; exit 1; }
cat "$work/second.log"
echo "== took $((SECONDS - start)) s"
"$PYTHON" "$here/judge.py" verdict "$bucket/e2e" "$work" "$plan"
if grep -rqF "$E2E_SECRET" "$work"; then echo "the secret is in: $(grep -rlF "$E2E_SECRET" "$work")"; exit 1; fi
echo "== the secret is in no file of ours, no log and not in MLflow"

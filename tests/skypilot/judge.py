"""What ``e2e.sh`` asks of the bucket and of what the sweep left.

prompts FILE              writes prompts
half BUCKET OUTPUTS JOB   waits until half of that job's units are in the bucket; its plan
verdict BUCKET WORK PLAN  whether all is as it should be, though that plan's machine was taken away
"""

import csv
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny

PROMPTS = 40
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # else gcsfs waits a minute for what the emulator lacks


def units(bucket: str, plan: str) -> Counter[str]:
    """How often each unit is in a plan's journal."""
    import fsspec

    store, root = fsspec.core.url_to_fs(f"{bucket}/plans/{plan}", token="anon", use_listings_cache=False)
    store.invalidate_cache()
    found: Counter[str] = Counter()
    for name in store.find(root):
        for line in store.cat_file(name).splitlines():
            entry = json.loads(line) if line.startswith(b'{"stage"') else {}
            found.update([entry["unit"]] if "unit" in entry else [])
    return found


def half(bucket: str, outputs: str, job: str) -> None:
    noted: list[Path] = []
    while not noted:
        time.sleep(1)
        noted = list(Path(outputs).rglob("sweep.json"))
    plans = json.loads(noted[0].read_text())["plans"]
    plan = sorted(plans)[int(job)]
    while len(units(bucket, plan)) < PROMPTS // 3:
        time.sleep(3)
    print(plan)


def verdict(bucket: str, work: str, plan: str) -> None:
    from mlflow import MlflowClient

    sweeps = sorted(Path(work, "outputs").rglob("sweep.json"))
    assert len(sweeps) == 2
    for noted in sweeps:
        rows = list(csv.DictReader((noted.parent / "summary.csv").read_text().splitlines()))
        assert [row["status"] for row in rows] == ["finished"] * 3, rows
    plans = json.loads(sweeps[0].read_text())["plans"]
    for each in plans:
        counted = units(bucket, each)
        assert len(counted) == PROMPTS and set(counted.values()) == {1}, counted
    print(f"== {len(plans)} plans, {PROMPTS} units each, none lost and none twice")

    first, second = (Path(work, name).read_text() for name in ("first.log", "second.log"))
    assert "RECOVERING" in first and "recovered 1x" in first, first
    assert second.count("done before") == 3 and "launched" not in second, second
    print("== one job was recovered; the second time nothing was launched")

    client = MlflowClient()
    known = client.get_experiment_by_name("selfspec")
    assert known is not None
    runs = client.search_runs([known.experiment_id])
    (parent,) = [run for run in runs if "selfspec.sweep_id" in run.data.tags]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert sorted(run.data.tags["selfspec.plan"] for run in children) == sorted(plans) and len(runs) == 4
    assert {run.info.status for run in runs} == {"FINISHED"}, [run.info.status for run in runs]
    print("== MLflow: one run a job, below the sweep's, all FINISHED")


if __name__ == "__main__":
    {"prompts": lambda file: tiny.prompts(Path(file)), "half": half, "verdict": verdict}[sys.argv[1]](*sys.argv[2:])

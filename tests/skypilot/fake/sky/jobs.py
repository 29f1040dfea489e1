"""Managed jobs: processes of this machine, each in a folder that says how it is."""

import enum
import json
import os
import shlex
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .exceptions import ClusterNotUpError


class Status(enum.Enum):
    """Of a job."""

    RUNNING = "RUNNING"
    RECOVERING = "RECOVERING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    FAILED_NO_RESOURCE = "FAILED_NO_RESOURCE"

    def is_terminal(self):
        """Whether it stays so."""
        return self not in (Status.RUNNING, Status.RECOVERING)


@dataclass
class Record:
    """What SkyPilot says of a job."""

    job_id: int
    job_name: str
    status: Status
    recovery_count: int
    failure_reason: str | None
    infra: str
    cloud: str | None = None
    region: str | None = None


def launch(task, name, pool=None):
    """Starts a job; its id, as SkyPilot gives it. One named in the file ``$FAKE_SKY.refuses`` is not taken."""
    refused = _home().with_suffix(".refuses")
    if refused.exists() and name in refused.read_text():
        return RuntimeError(f"quota exceeded for {name}")
    home = _home()
    number = 1
    while True:
        with suppress(FileExistsError):
            (home / str(number)).mkdir(parents=True)
            break
        number += 1
    secrets = task.config.pop("secrets", {})
    folder = home / str(number)
    (folder / "job.json").write_text(json.dumps({**task.config, "pool": pool, "secrets": sorted(secrets)}))
    _start(folder, secrets)
    return [number], None


def queue_v2(refresh, job_ids, name_match, fields):
    """The jobs there are."""
    if not _home().exists():
        return ClusterNotUpError("no controller")
    found = [_record(folder) for folder in sorted(_home().iterdir(), key=lambda folder: int(folder.name))]
    wanted = [r for r in found if (job_ids is None or r.job_id in job_ids) and (name_match or "") in r.job_name]
    return wanted, len(wanted), {}, len(found)


def tail_logs(job_id, follow, tail, output_stream):
    """The end of a log."""
    lines = (_home() / str(job_id) / "log").read_text().splitlines(keepends=True)
    output_stream.write("\x1b[36m" + "".join(lines[-tail:]))


def _home():
    return Path(os.environ["FAKE_SKY"])


def _start(folder, secrets):
    job = json.loads((folder / "job.json").read_text())
    script = f"({job['run']}\n) >> log 2>&1; echo $? > code.new; mv code.new code"
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | job.get("envs", {}) | secrets
    here = f"cd {shlex.quote(str(Path(job.get('workdir', '.')).resolve()))}\n"
    script = script.replace("(", "(" + here, 1)
    process = subprocess.Popen(["bash", "-c", script], cwd=folder, env=env, start_new_session=True)
    (folder / "pid").write_text(str(process.pid))


def _record(folder):
    job = json.loads((folder / "job.json").read_text())
    lost, code, status = folder / "lost", folder / "code", Status.RUNNING
    alive, reason = _alive(int((folder / "pid").read_text())), None  # first: one that has ended has left its code
    if code.exists():
        status = Status.FAILED if int(code.read_text()) else Status.SUCCEEDED
        reason = f"exit code {code.read_text().strip()}" if status is Status.FAILED else None
    elif not alive:
        status = Status.RECOVERING
        with lost.open("a") as file:
            file.write("once\n")
        _start(folder, {})
    recoveries = len(lost.read_text().split()) if lost.exists() else 0
    infra = job["resources"].get("infra") or "elsewhere"
    return Record(int(folder.name), job["name"], status, recoveries, reason, infra)


def _alive(pid):
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False

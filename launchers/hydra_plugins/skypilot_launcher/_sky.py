"""SkyPilot's side of the bridge: a script for the Python of its environment, alone, with nothing of ours beside it.

Each line on stdin is a request, ``{"do": "queue", ...}``; each gets one line on stdout: ``{"is": ...}``, or
``{"refused": "<what the user can put right>"}``, or ``{"failed": "<what went wrong>"}``. What SkyPilot prints goes
to stderr. A request names secrets; their values are taken from the environment here, and are in no line.
"""

import copy
import difflib
import io
import json
import math
import os
import re
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

Record = dict[str, Any]
OLDEST = (0, 14)
"""Earlier SkyPilots lack ``queue_v2`` and managed jobs' secrets."""
FIELDS = ["job_id", "job_name", "status", "recovery_count", "failure_reason", "cloud", "region", "infra"]
AT_ONCE = 8
"""Requests in flight while launching."""


class Refused(Exception):
    """What the user can put right."""


def hello() -> str:
    """Imports SkyPilot; its version."""
    try:
        import sky
    except ImportError as error:
        raise Refused(f"SkyPilot cannot be imported by {sys.executable}: {error}") from error
    if tuple(int(part) for part in re.findall(r"\d+", sky.__version__)[:2]) < OLDEST:
        raise Refused(f"SkyPilot {sky.__version__} is too old; must be {'.'.join(map(str, OLDEST))} or newer")
    return str(sky.__version__)


def prepare(task: Record, patience_s: float | None = None) -> Record:
    """Has SkyPilot validate a task.

    Args:
        patience_s: how long that may take; a second task is not waited for where the first took longer.

    Returns:
        ``task`` less what its infra refuses; ``said``: words about that and about what could not be checked;
        ``hourly``: the least it costs, in US dollars, or None where no catalog is at hand.
    """
    if patience_s is None:
        return _prepare(task)
    asked = Future[Record]()

    def answer() -> None:
        try:
            asked.set_result(_prepare(task))
        except BaseException as error:
            asked.set_exception(error)

    threading.Thread(target=answer, daemon=True).start()
    try:
        return asked.result(0 if _slow else patience_s)
    except FutureTimeout as error:
        _slow.append(patience_s)
        raise TimeoutError(
            f"no answer in {patience_s:g} s; it fetches catalogs, for which it needs a network"
        ) from error


_slow: list[float] = []


def _prepare(task: Record) -> Record:
    task, said = copy.deepcopy(task), list[str]()
    spot = task["resources"].pop("use_spot", False)
    parsed = _task(task)
    clouds = sorted({str(one.cloud) for one in parsed.resources if one.cloud is not None})
    if spot and not all(_has_spot(one) for one in parsed.resources):
        said.append(f"use_spot=true: {', '.join(clouds)} has no spot machines; left out")
    elif spot:
        task["resources"]["use_spot"] = True
        parsed = _task(task)
    offers = _offers(parsed, said)
    prices = [offer.spot_price if _on_spot(parsed) else offer.price for offer in offers]
    prices = [price for price in prices if price is not None and not math.isnan(price) and price > 0]
    return {"task": task, "said": said, "hourly": min(prices, default=None)}


def launch(tasks: list[Record], secrets: list[str], pool: str | None) -> list[Record]:
    """Launches managed jobs: for each its id, ``{"id": ...}``, or why there is none, ``{"failed": ...}``."""
    import sky

    missing = [name for name in secrets if name not in os.environ]
    if missing:
        raise Refused(f"{missing[0]}: is not set")

    def one(task: Record) -> Record:
        try:
            parsed = _task({**task, "secrets": {name: os.environ[name] for name in secrets}})
            ids, _ = sky.get(sky.jobs.launch(parsed, name=task["name"], pool=pool))
            return {"id": ids[0]}
        except (Exception, SystemExit) as error:
            return {"failed": one_line(error)}

    with ThreadPoolExecutor(AT_ONCE) as threads:
        return list(threads.map(one, tasks))


def queue(prefix: str | None = None, ids: list[int] | None = None) -> list[Record]:
    """The managed jobs of those ids, or all whose name has this prefix."""
    import sky
    from sky import exceptions

    try:
        # Refreshed for jobs that are watched; merely to see what there is, no controller is started.
        request = sky.jobs.queue_v2(refresh=ids is not None, job_ids=ids, name_match=prefix, fields=FIELDS)
        records = sky.get(request)[0]
    except exceptions.ClusterNotUpError:  # no controller, so no jobs
        return []
    return [
        {
            "id": record.job_id,
            "name": record.job_name,
            "state": record.status.value,
            "over": record.status.is_terminal(),
            "recoveries": record.recovery_count or 0,
            "where": record.infra or " ".join(filter(None, (record.cloud, record.region))) or "-",
            "reason": one_line(record.failure_reason or ""),
        }
        for record in records
    ]


def logs(id: int, lines: int) -> list[str]:
    """The last lines of what a job said."""
    import sky

    said = io.StringIO()
    sky.jobs.tail_logs(job_id=id, follow=False, tail=lines, output_stream=said)
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", said.getvalue())
    return [line.rstrip() for line in plain.splitlines() if line.strip()][-lines:]


def _task(config: Record) -> Any:
    import sky

    try:
        # A copy: SkyPilot takes out of the dictionary what it has read.
        task = sky.Task.from_yaml_config(copy.deepcopy(config))
        task.validate(skip_file_mounts=True)  # whether a bucket is there is for who has the right to look
    except Exception as error:
        if isinstance(error, (ValueError, TypeError, ImportError)) or type(error).__module__.startswith("sky."):
            raise Refused(one_line(error)) from error
        raise
    return task


def _on_spot(task: Any) -> bool:
    return any(one.use_spot for one in task.resources)


def _has_spot(resources: Any) -> bool:
    from sky import clouds, exceptions

    if resources.cloud is None:
        return True
    try:
        wanted = {clouds.CloudImplementationFeatures.SPOT_INSTANCE}
        resources.cloud.check_features_are_supported(resources, wanted)
    except exceptions.NotSupportedError:
        return False
    return True


def _offers(task: Any, said: list[str]) -> list[Any]:
    """What the catalogs have of a task's accelerators; SkyPilot itself takes any name for one."""
    from sky import catalog

    found = list[Any]()
    for one in task.resources:
        for name, count in (one.accelerators or {}).items():
            cloud = None if one.cloud is None else str(one.cloud).lower()
            try:
                offers = _in_catalog(catalog, name, one.region, count, cloud)
                known = [] if offers else sorted(catalog.list_accelerators(gpus_only=True, clouds=cloud))
            except Exception as error:  # nothing to look into: no network, no cluster
                said.append(f"accelerators={name}:{count:g}: not checked: no catalog at hand ({type(error).__name__})")
                continue
            if not offers:
                near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known[:10]
                where = f" in {one.region}" if one.region and cloud not in ("slurm", "kubernetes") else ""
                raise Refused(
                    f"accelerators={name}:{count:g}: {one.cloud or 'no cloud'} has none{where}; "
                    + (f"known are {', '.join(near)}" if name not in known else f"{name} comes in other numbers")
                )
            found += offers
    return found


def _in_catalog(catalog: Any, name: str, region: str | None, count: float, cloud: str | None) -> list[Any]:
    try:
        found = catalog.list_accelerators(
            gpus_only=False,
            name_filter=f"^{re.escape(name)}$",
            region_filter=region,
            quantity_filter=count,
            clouds=cloud,
            case_sensitive=False,
            all_regions=True,
        )
    except ValueError:  # how Slurm's and Kubernetes' say that there is none
        return []
    return [offer for offers in found.values() for offer in offers]


def one_line(error: object) -> str:
    """Words without line breaks and colours."""
    words = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split())
    return words or ("" if isinstance(error, str) else type(error).__name__)


def main() -> None:
    """Answers requests until stdin ends."""
    # Answers keep the real stdout; whatever SkyPilot and what it starts print there goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"is": DOES[request.pop("do")](**request)}
        except Refused as error:
            answer = {"refused": one_line(error)}
        except (Exception, SystemExit) as error:
            answer = {"failed": one_line(error)}
        print(json.dumps(answer), file=answers, flush=True)


DOES: dict[str, Callable[..., object]] = {
    "hello": hello,
    "prepare": prepare,
    "launch": launch,
    "queue": queue,
    "logs": logs,
}

if __name__ == "__main__":
    main()

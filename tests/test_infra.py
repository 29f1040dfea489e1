"""Monitoring and container files: what they name is there, and a real Prometheus takes them, where there is one."""

import asyncio
import json
import re
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from plans import planned
from serving import serving

from selfspec.serve.backend import Call
from selfspec.serve.metrics import Metrics

pytestmark = pytest.mark.slow

INFRA = Path(__file__).parents[1] / "infra"
PROMETHEUS = INFRA / "prometheus"
DASHBOARD = json.loads((INFRA / "grafana" / "dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]
METRIC = re.compile(r"\b(?:selfspec|process)_\w+")
installed = pytest.mark.skipif(
    not (shutil.which("promtool") and shutil.which("prometheus")), reason="Prometheus is not installed (.ci/run does)"
)


def exposed() -> set[str]:
    """Every name that can be queried of the app's metrics, whether or not it has been counted yet."""
    names = set()
    for family in Metrics().registry.collect():
        ends = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("_total",)}.get(family.type, ("",))
        names |= {family.name + end for end in ends}
    return names


def promtool(*arguments: str) -> str:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, cwd=PROMETHEUS)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


CONTRACT = {
    *(f"selfspec_{name}_seconds_bucket" for name in ("request", "ttft", "inter_token", "queue")),
    *(f"selfspec_{name}_tokens_total" for name in ("proposed", "accepted", "generated")),
    *(f"selfspec_{name}_total" for name in ("cache_lookups", "routes", "errors")),
    *(f"selfspec_{name}" for name in ("batch_rows", "waiting_requests", "kv_used_ratio")),
    "process_resident_memory_bytes",
}
"""What every dashboard may count on."""


def test_every_metric_that_is_shown_or_watched_exists_and_every_one_is_shown() -> None:
    shown = {name for query in QUERIES for name in METRIC.findall(query)}
    watched = set(METRIC.findall((PROMETHEUS / "alerts.yml").read_text()))
    assert shown | watched <= exposed() and shown >= CONTRACT


def test_the_dashboard_is_one_that_grafana_imports() -> None:
    """Its model as documented for Grafana's JSON dashboards; there is no Grafana here to load it."""
    assert DASHBOARD["schemaVersion"] >= 39 and DASHBOARD["uid"] and DASHBOARD["title"]
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD["panels"])))
    assert used <= variables | {"__rate_interval"}
    for panel in PANELS:
        assert panel["type"] == "timeseries" and panel["datasource"]["uid"] == "${datasource}"
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        assert all(target["expr"] and target["legendFormat"] for target in panel["targets"])


def test_panels_do_not_overlap() -> None:
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for a, b in combinations(places, 2):
        apart = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        assert apart or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"], (a, b)


@installed
def test_prometheus_takes_configuration_and_alerts_which_fire() -> None:
    assert "is valid prometheus config" in promtool("check", "config", "prometheus.yml")
    assert "rules found" in promtool("check", "rules", "alerts.yml")
    promtool("test", "rules", "alerts_test.yml")


@installed
def test_prometheus_parses_every_query_of_the_dashboard(tmp_path: Path) -> None:
    queries = [query.replace("$__rate_interval", "1m").replace("$instance", ".*") for query in QUERIES]
    rules = [{"record": f"panel:query:{at}", "expr": query} for at, query in enumerate(queries)]
    (tmp_path / "rules.yml").write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))  # JSON is YAML
    assert f"{len(queries)} rules found" in promtool("check", "rules", str(tmp_path / "rules.yml"))


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[Any]:
    """Starts a real one with our configuration, less where the gateway is and how often it is asked."""
    started = list[subprocess.Popen[bytes]]()

    def start(target: str) -> tuple[str, subprocess.Popen[bytes]]:
        text = (PROMETHEUS / "prometheus.yml").read_text().replace("127.0.0.1:8000", target)
        assert target in text
        (tmp_path / "prometheus.yml").write_text(text.replace("interval: 5s", "interval: 1s"))
        shutil.copy(PROMETHEUS / "alerts.yml", tmp_path)
        command = ["prometheus", f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
        command += ["--web.listen-address=127.0.0.1:0", "--log.level=error"]
        started.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        process = psutil.Process(started[-1].pid)
        while not (ports := [at.laddr.port for at in process.net_connections("tcp") if at.status == "LISTEN"]):
            assert started[-1].poll() is None, "it has ended by itself"
            time.sleep(0.05)
        return f"http://127.0.0.1:{ports[0]}", started[-1]

    yield start
    for process in started:
        process.terminate()
        process.wait()


def ask(url: str, metric: str) -> list[str]:
    """The values that it has seen last; none before Prometheus is up, or has seen any.

    Whether or not the last scrape came through: one that takes longer than the interval does not.
    """
    address = f"{url}/api/v1/query?query={urllib.parse.quote(f'last_over_time({metric}[1d])')}"
    try:
        with urllib.request.urlopen(address) as response:
            return [each["value"][1] for each in json.load(response)["data"]["result"]]
    except OSError:
        return []


@installed
async def test_a_real_prometheus_scrapes_a_real_gateway(fake: list[str], prometheus: Any) -> None:
    with serving(planned(*fake)) as server:
        watching, process = prometheus(server.url.removeprefix("http://"))
        call = Call("c1", "tiny", prompt="hello", max_tokens=8, temperature=0.0)
        assert [chunk async for chunk in server.gateway.answer(call)]
        while await asyncio.to_thread(ask, watching, 'selfspec_request_seconds_count{job="selfspec"}') != ["1"]:
            assert process.poll() is None, "it has ended by itself"
            await asyncio.sleep(0.1)
        for name in ("selfspec_batch_rows", "selfspec_queue_seconds_bucket", "process_resident_memory_bytes"):
            assert await asyncio.to_thread(ask, watching, name), name


@pytest.mark.parametrize("code", [0, 3])
def test_a_run_in_the_cloud_keeps_its_files_and_says_how_it_ended(tmp_path: Path, code: int) -> None:
    python = tmp_path / "selfspec" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "$@" > "$HOME/given"\nmkdir outputs\ntouch outputs/result.json\nexit {code}\n')
    python.chmod(0o755)
    (tmp_path / "ckpt").mkdir()
    script = yaml.safe_load((INFRA / "selfspec.yaml").read_text())["run"].replace("/ckpt/", f"{tmp_path}/ckpt/")
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "BUCKET": "mine", "ARGS": "gate=varH tau_v=4"}
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment)
    assert done.returncode == code and (tmp_path / "ckpt" / "outputs" / "result.json").exists()
    assert "checkpoint.dir=gs://mine/selfspec gate=varH tau_v=4" in (tmp_path / "given").read_text()


def test_every_package_has_one_index() -> None:
    """Of two, pip takes the newest of either: whoever may publish on the second could replace any package."""
    root = INFRA.parent
    pages = [root / "README.md", INFRA / "Dockerfile", INFRA / "README.md", *(root / "docs").glob("*.md")]
    assert not [page for page in pages if "--extra-index-url" in page.read_text()]


def test_the_container_starts_what_there_is() -> None:
    """Docker is not at hand: what its file copies is there, and what it starts takes these overrides."""
    lines = (INFRA / "Dockerfile").read_text().splitlines()
    for line in lines:
        if line.startswith("COPY"):
            *sources, _ = line.split()[1:]
            assert all((INFRA.parent / source).exists() for source in sources), line
    (start,) = [json.loads(line.removeprefix("ENTRYPOINT")) for line in lines if line.startswith("ENTRYPOINT")]
    command = [sys.executable, *start[1:], "--cfg", "job"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "host: 0.0.0.0" in done.stdout, done.stderr

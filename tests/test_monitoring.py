"""deploy/monitoring/: each alert fires when it should, and the real Prometheus answers every expression."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from conftest import FakeLoader, settings
from live import LiveService, free_port, post, serving, until

import gpu_service

ROOT = Path(gpu_service.__file__).parent
FOLDER = ROOT / "deploy" / "monitoring"
DOCUMENT = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
KEY = "prometheus's own"
needs_promtool = pytest.mark.skipif(not shutil.which("promtool"), reason="needs promtool (Debian: prometheus)")
needs_prometheus = pytest.mark.skipif(not shutil.which("prometheus"), reason="needs prometheus (Debian: prometheus)")


def alerts() -> dict[str, str]:
    """The expressions of the alerts by name."""
    (group,) = yaml.safe_load((FOLDER / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    return {rule["alert"]: rule["expr"] for rule in group["rules"]}


def panels() -> dict[str, str]:
    """The expressions of the dashboard by panel and letter, with what Grafana fills in."""
    dashboard = json.loads((FOLDER / "dashboard.json").read_text(encoding="utf-8"))
    found = {f"{p['title']} {t['refId']}": t["expr"] for p in dashboard["panels"] for t in p["targets"]}
    return {name: e.replace("$__rate_interval", "1m").replace("$instance", ".*") for name, e in found.items()}


def value_of_alert(expression: str) -> str:
    """What an alert holds to its bound."""
    value, bound = re.fullmatch(r"(.+) (?:[<>]|==) ([\d.]+)", expression, re.DOTALL).groups()  # type: ignore[union-attr]
    assert float(bound) >= 0
    return str(value)


def promtool(*arguments: str | Path, text: str | None = None) -> None:
    done = subprocess.run(["promtool", *map(str, arguments)], input=text, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr.strip(), done.stderr  # what `check metrics` has to say about names


def test_every_alert_stands_in_the_documentation_with_what_to_do_and_no_other_does() -> None:
    table = DOCUMENT.partition("\n## The alerts")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \| .{20,} \| .{20,} \|$", table, re.MULTILINE) == list(alerts())


def test_alerts_and_panels_ask_only_for_metrics_that_there_are() -> None:
    documented = set(re.findall(r"^\| `(\w+)` \|", DOCUMENT.partition("\n## Scraping")[0], re.MULTILINE))
    for name, expression in {**alerts(), **panels()}.items():
        asked = set(re.findall(r"\bgpu_service_\w+", expression))
        assert {re.sub(r"_(bucket|sum|count)$", "", metric) for metric in asked} <= documented, name
    assert len(panels()) > 20


@needs_promtool
def test_prometheus_reads_the_rules_and_the_configuration() -> None:
    promtool("check", "rules", FOLDER / "alerts.yml")
    promtool("check", "config", "--syntax-only", FOLDER / "prometheus.yml")


@needs_promtool
def test_promtool_has_nothing_to_say_about_the_metrics_of_a_live_service() -> None:
    with serving(settings(), FakeLoader()) as service:
        post(service, "/embed", {"texts": ["a"]})
        promtool("check", "metrics", text=httpx.get(f"{service.url}/metrics").text)


# Values a minute, from the first on: quiet ones, and for each alert those with which it fires.
QUIET = {
    'up{job="gpu-service"}': "1x40",
    "gpu_service_ready": "1x40",
    "gpu_service_worker_restarts_total": "3x40",
    'gpu_service_model_load_failures_total{kind="embed"}': "3x40",
    'gpu_service_requests_total{path="/embed",status="200"}': "0+1000x40",
    'gpu_service_requests_total{path="/health",status="200"}': "0+9000x40",
    'gpu_service_refused_total{reason="busy"}': "0+10x40",
    'gpu_service_refused_total{reason="timeout"}': "0+1x40",
    'gpu_service_refused_total{reason="unauthorized"}': "0+10x40",
    'gpu_service_phase_seconds_bucket{phase="queue",le="2.5"}': "0+1000x40",
    'gpu_service_phase_seconds_bucket{phase="queue",le="10.0"}': "0+1000x40",
    'gpu_service_phase_seconds_bucket{phase="queue",le="+Inf"}': "0+1000x40",
    "gpu_service_out_of_memory_recoveries_total": "0+0.1x40",
    'gpu_service_device_memory_bytes{state="used"}': "90x40",
    'gpu_service_device_memory_bytes{state="total"}': "100x40",
}
FIRES = {
    "GpuServiceDown": {'up{job="gpu-service"}': "0x40"},
    "GpuServiceNotReady": {"gpu_service_ready": "0x40"},
    "GpuServiceEngineRestarted": {"gpu_service_worker_restarts_total": "3x25 4x15"},
    "GpuServiceModelLoadsFail": {'gpu_service_model_load_failures_total{kind="embed"}': "3x25 4x15"},
    "GpuServiceBusy": {'gpu_service_refused_total{reason="busy"}': "0+100x40"},
    "GpuServiceWaitsLong": {'gpu_service_phase_seconds_bucket{phase="queue",le="2.5"}': "0+900x40"},
    "GpuServiceErrors": {'gpu_service_refused_total{reason="timeout"}': "0+200x40"},
    "GpuServiceOutOfMemory": {"gpu_service_out_of_memory_recoveries_total": "0+1x40"},
    "GpuServiceMemoryFull": {'gpu_service_device_memory_bytes{state="used"}': "96x40"},
    "GpuServiceStrangers": {'gpu_service_refused_total{reason="unauthorized"}': "0+100x40"},
}


@needs_promtool
def test_each_alert_fires_on_what_it_is_for_and_on_nothing_else(tmp_path: Path) -> None:
    assert list(FIRES) == list(alerts())
    cases = []
    for name, changed in {"": {}, **FIRES}.items():
        series = [{"series": series, "values": values} for series, values in {**QUIET, **changed}.items()]
        fired = [{"labels": f'{{alertname="{name}"}}', "value": 1}] if name else []
        asked = {"expr": 'count by (alertname) (ALERTS{alertstate="firing"})', "eval_time": "30m", "exp_samples": fired}
        cases.append({"interval": "1m", "input_series": series, "promql_expr_test": [asked]})
    file = tmp_path / "tests.yml"
    tests = {"rule_files": [str(FOLDER / "alerts.yml")], "evaluation_interval": "1m", "tests": cases}
    file.write_text(yaml.safe_dump(tests), encoding="utf-8")
    done = subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@contextlib.contextmanager
def prometheus(service: LiveService, folder: Path) -> Iterator[httpx.Client]:
    """The real program with our configuration, but for the address, the key's file, and how often it asks."""
    (folder / "key").write_text(KEY, encoding="utf-8")
    config = (FOLDER / "prometheus.yml").read_text(encoding="utf-8")
    for ours, here in (
        ("alerts.yml", str(FOLDER / "alerts.yml")),
        ("/etc/prometheus/gpu-service.key", str(folder / "key")),
        ("localhost:8765", service.url.removeprefix("http://")),
        ("interval: 15s", "interval: 1s"),
    ):
        assert ours in config
        config = config.replace(ours, here)
    (folder / "prometheus.yml").write_text(config, encoding="utf-8")
    port = free_port()
    command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    with (folder / "log").open("wb") as log, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
        process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
        try:
            yield client
        finally:
            process.terminate()
            process.wait(30)


def send_load(service: LiveService, number: int) -> None:
    """Requests of every kind: computed, cached, refused."""
    for texts in ([f"text {number}", "always the same"], ["always the same"]):
        assert post(service, "/embed", {"texts": texts}).status_code == 200
    assert post(service, "/bertscore", {"candidates": [f"c {number}"], "references": ["r"]}).status_code == 200
    assert post(service, "/embed", {}).status_code == 422


@needs_prometheus
@pytest.mark.slow
def test_every_expression_of_the_alerts_and_the_dashboard_has_data_in_the_real_prometheus(tmp_path: Path) -> None:
    expressions = {**{name: value_of_alert(alert) for name, alert in alerts().items()}, **panels()}
    with serving(settings(api_key=KEY), FakeLoader()) as service, prometheus(service, tmp_path) as client:
        sent = 0

        def ask(path: str, **parameters: str) -> Any:
            nonlocal sent
            send_load(service, sent := sent + 1)
            try:
                answer = client.get(f"/api/v1/{path}", params=parameters)
            except httpx.TransportError:  # the port is not open yet
                return None
            if answer.status_code == 503:  # it is open, and the program still reads its store
                return None
            assert answer.json()["status"] == "success", answer.text
            return answer.json()["data"]

        def has_data(expression: str) -> bool:
            found = (ask("query", query=expression) or {}).get("result", ())
            return any(math.isfinite(float(entry["value"][1])) for entry in found)

        until(lambda: has_data("up == 1"), "Prometheus could not scrape the service")
        for name, expression in expressions.items():
            if "device_memory" in expression:  # a CPU has none: the expression is asked, and gives nothing
                assert ask("query", query=expression)["result"] == []
            else:
                until(lambda expression=expression: has_data(expression), f"{name} has no data: {expression}")
        (group,) = ask("rules")["groups"]
        assert {rule["name"]: rule["health"] for rule in group["rules"]} == dict.fromkeys(alerts(), "ok")
        assert [rule["name"] for rule in group["rules"] if rule["state"] == "firing"] == []

"""The files of deploy/, read by the programs that they are for, and nginx with the service behind it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from live import free_port, program, until

from gpu_service import Settings, create_app, uvicorn_config

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
UNITS = ("gpu-service.service", "gpu-service@.service")
CHECK_JSONSCHEMA = shutil.which(
    "check-jsonschema", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
)


def tool(name: str) -> str:
    """A program's path. Debian's sbin is not on everybody's path. Skips where it is not installed."""
    found = shutil.which(name, path=f"{os.environ['PATH']}{os.pathsep}/usr/sbin")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def read(name: str) -> str:
    return (DEPLOY / name).read_text(encoding="utf-8")


def changed(text: str, **changes: str) -> str:
    """A text with parts replaced, each of which is there."""
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    return text


def run(*command: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **more)


def drain_s() -> int:
    """Seconds after which a service that was told to stop has stopped: its drain, and its engine's end."""
    config = uvicorn_config(create_app(Settings()), Settings())
    return (config.timeout_graceful_shutdown or 0) + 10


# --- each file alone -----------------------------------------------------------------------------------


@pytest.mark.skipif(CHECK_JSONSCHEMA is None, reason="check-jsonschema is not installed")
def test_the_compose_file_is_one(tmp_path: Path) -> None:
    check = (str(CHECK_JSONSCHEMA), "--builtin-schema", "vendor.compose-spec")
    done = run(*check, str(DEPLOY / "compose.yaml"))
    assert done.returncode == 0, done.stdout + done.stderr
    (tmp_path / "wrong.yaml").write_text(read("compose.yaml").replace("restart:", "restarts:"))
    assert run(*check, str(tmp_path / "wrong.yaml")).returncode != 0


def test_compose_has_a_profile_for_each_machine_and_the_images_health_check() -> None:
    yaml = pytest.importorskip("yaml")
    compose = yaml.safe_load(read("compose.yaml"))
    assert [service["profiles"] for service in compose["services"].values()] == [["cpu"], ["gpu-nvidia"], ["gpu-amd"]]
    for service in compose["services"].values():
        dockerfile = (ROOT / service["build"].get("dockerfile", "Dockerfile")).read_text("utf-8")
        said = re.search(r"HEALTHCHECK (.+) \\\n +CMD (\[.+\])", dockerfile)
        assert said is not None
        check = service["healthcheck"]
        assert check["test"] == ["CMD", *json.loads(said[2])]
        for option in said[1].split():
            name, _, value = option.removeprefix("--").partition("=")
            assert str(check[name.replace("-", "_")]) == value
        assert int(service["stop_grace_period"].removesuffix("s")) > drain_s()
        assert service["restart"] == "unless-stopped"
        assert "/models" in service["volumes"][0]
        volume = compose["volumes"][service["volumes"][0].partition(":")[0]]["name"]
        assert set(re.findall(r"gpu-service[-_]models", read("README.md"))) == {volume}
        assert f"VOLUME {service['volumes'][0].partition(':')[2]}\n" in dockerfile


@pytest.mark.parametrize("unit", UNITS)
def test_systemd_takes_the_unit(unit: str, tmp_path: Path) -> None:
    verify = tool("systemd-analyze")
    text = changed(read(unit), **{"/opt/gpu-service/.venv/bin/python": sys.executable})
    (tmp_path / unit).write_text(text.replace("WorkingDirectory=/opt/gpu-service", f"WorkingDirectory={tmp_path}"))
    assert f"{unit}:" not in run(verify, "verify", str(tmp_path / unit)).stderr  # other units are not ours
    (tmp_path / unit).write_text(text.replace("TimeoutStopSec=80", "TimeoutStopSec=eighty"))
    assert f"{unit}:" in run(verify, "verify", str(tmp_path / unit)).stderr


@pytest.mark.parametrize("unit", UNITS)
def test_the_units_leave_time_to_stop_and_let_torch_compute(unit: str) -> None:
    stop = re.search(r"^TimeoutStopSec=(\d+)$", read(unit), re.MULTILINE)
    assert stop is not None
    assert int(stop[1]) > drain_s()
    assert not re.search(r"^(MemoryDenyWriteExecute|PrivateDevices)=yes", read(unit), re.MULTILINE)


@pytest.mark.skipif(os.name == "nt", reason="needs a shell")
def test_the_template_is_the_unit_with_a_card_and_a_port_for_each_instance() -> None:
    one, many = (read(unit).splitlines() for unit in UNITS)
    different = [line for line in many if line not in one and not line.startswith("#")]
    assert [line.partition("=")[0] for line in different] == ["Description", "ExecStart"]
    script = re.fullmatch(r"ExecStart=/bin/sh -c '(.+)'", different[1])
    assert script is not None
    as_run = script[1].replace("%i", "2").replace("$$", "$")
    told = changed(as_run, **{"/opt/gpu-service/.venv/bin/python gpu_service.py": "printenv CUDA_VISIBLE_DEVICES PORT"})
    assert run("/bin/sh", "-c", told).stdout.split() == ["2", "8767"]


def test_the_windows_service_is_restarted_and_gets_time_to_stop() -> None:
    service = ET.fromstring(read("gpu-service.xml"))
    assert int((service.findtext("stoptimeout") or "").removesuffix(" sec")) > drain_s()
    restart = service.find("onfailure")
    assert restart is not None
    assert restart.get("action") == "restart"
    set_there = {entry.get("name") for entry in service.findall("env")}
    assert "API_KEY" in set_there
    for text in (read("README.md"), read("windows-task.ps1")):
        assert "New-NetFirewallRule" in text
        assert "-LocalPort 8765" in text


def test_caddy_takes_its_file(tmp_path: Path) -> None:
    validate = (tool("caddy"), "validate", "--adapter", "caddyfile", "--config")
    home = {**os.environ, "HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}
    done = run(*validate, str(DEPLOY / "Caddyfile"), env=home)
    assert done.returncode == 0, done.stderr
    (tmp_path / "Caddyfile").write_text(read("Caddyfile").replace("reverse_proxy", "reverse_proxies"))
    assert run(*validate, str(tmp_path / "Caddyfile"), env=home).returncode != 0


def test_the_settings_file_names_settings_only() -> None:
    named = re.findall(r"^#?([A-Z_]+)=", read("gpu-service.env.example"), re.MULTILINE)
    assert named
    assert {name.lower() for name in named} <= set(Settings.model_fields)


def test_a_proxy_on_this_machine_says_for_whom_it_asks_and_others_are_not_believed() -> None:
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["client"][0])

    config = uvicorn_config(app, Settings())  # type: ignore[arg-type]
    config.load()
    for peer in ("127.0.0.1", "192.0.2.1"):
        headers = [(b"x-forwarded-for", b"203.0.113.9")]
        scope = {"type": "http", "scheme": "http", "client": (peer, 1), "headers": headers}
        anyio.run(config.loaded_app, scope, None, None)
    assert seen == ["203.0.113.9", "192.0.2.1"]


# --- nginx ---------------------------------------------------------------------------------------------


def certificate(folder: Path) -> tuple[Path, Path]:
    """A key and a certificate of its own for 127.0.0.1."""
    key, made = folder / "key.pem", folder / "certificate.pem"
    subject = ["-subj", "/CN=gpu.example.com", "-addext", "subjectAltName=IP:127.0.0.1"]
    new = ["-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", str(key), "-out", str(made)]
    done = run(tool("openssl"), "req", "-x509", *new, *subject)
    assert done.returncode == 0, done.stderr
    return key, made


def nginx_command(folder: Path, port: int, service_port: int) -> list[str]:
    """nginx on the file of deploy/, inside the frame that a distribution's nginx.conf is."""
    program_path = tool("nginx")
    key, made = certificate(folder)
    site = changed(
        read("nginx.conf"),
        **{
            "/etc/ssl/gpu-service/certificate.pem": str(made),
            "/etc/ssl/gpu-service/key.pem": str(key),
            "listen 443 ssl": f"listen 127.0.0.1:{port} ssl",
            "127.0.0.1:8765": f"127.0.0.1:{service_port}",
        },
    )
    (folder / "site.conf").write_text(site)
    places = [f"{name}_temp_path {folder}/{name};" for name in ("client_body", "proxy", "fastcgi", "scgi", "uwsgi")]
    http = f"access_log off; {' '.join(places)} include {folder}/site.conf;"
    user = "user root;" if os.geteuid() == 0 else ""
    (folder / "nginx.conf").write_text(
        f"{user} daemon off; pid {folder}/pid; error_log {folder}/errors; events {{}} http {{ {http} }}"
    )
    return [program_path, "-p", str(folder), "-e", str(folder / "errors"), "-c", str(folder / "nginx.conf")]


def test_nginx_takes_its_file(tmp_path: Path) -> None:
    command = nginx_command(tmp_path, free_port(), free_port())
    done = run(*command, "-t")
    assert done.returncode == 0, done.stderr
    (tmp_path / "site.conf").write_text(read("nginx.conf").replace("proxy_pass", "proxy_past"))
    assert run(*command, "-t").returncode != 0


@contextlib.contextmanager
def nginx(folder: Path, service_port: int) -> Iterator[httpx.Client]:
    """A client of nginx that trusts its certificate; it runs until the block ends."""
    port = free_port()
    process = subprocess.Popen(nginx_command(folder, port, service_port))
    trusted = ssl.create_default_context(cafile=str(folder / "certificate.pem"))
    try:
        with httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=trusted, timeout=60) as client:

            def answers() -> bool:
                with contextlib.suppress(httpx.TransportError):
                    return bool(client.get("/health").status_code)
                return False

            until(answers, "nginx never answered")
            yield client
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.slow
def test_nginx_with_tls_and_a_key_passes_all_on_and_says_503_while_the_service_is_down(tmp_path: Path) -> None:
    site = tmp_path / "nginx"
    site.mkdir()
    key = {"X-API-Key": "behind-nginx"}
    texts = [f"sentence number {number}" for number in range(1000)]
    limits = {"GPU_MAX_BATCH_SIZE": "1000", "GPU_MAX_BODY_MB": "1"}
    with program(tmp_path, API_KEY=key["X-API-Key"], **limits) as service, nginx(site, service.port) as client:
        until(lambda: client.get("/ready", headers=key).status_code == 200, "never ready behind nginx")
        assert client.get("/health").json() == {"status": "ok", "device": "cpu"}
        refused = client.post("/embed", json={"texts": ["a"]})
        assert (refused.status_code, refused.json()["detail"]) == (401, "Unauthorized")
        large = client.post("/embed", json={"texts": texts}, headers=key)
        assert len(large.content) > 4_000_000
        assert [len(row) for row in large.json()["embeddings"]] == [384] * 1000
        assert large.headers["Server"] == "nginx"
        too_large = client.post("/embed", json={"texts": ["x" * 2_000_000]}, headers=key)
        assert (too_large.status_code, too_large.json()["code"]) == (413, "body_too_large")  # the service's own
        service.stop()
        down = client.post("/embed", json={"texts": ["a"]}, headers=key)
        assert (down.status_code, down.json()["code"], down.headers["Retry-After"]) == (503, "service_down", "5")
        assert client.get("/health").status_code == 503

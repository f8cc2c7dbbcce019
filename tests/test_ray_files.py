"""deploy/ray/ without Ray: its files fit the service, which knows nothing of it. `make test-ray` runs them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from gpu_service import Settings

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "deploy" / "ray"


def test_the_settings_in_the_configuration_are_the_services_and_hold_no_key() -> None:
    (app,) = yaml.safe_load((FOLDER / "serve.yaml").read_text(encoding="utf-8"))["applications"]
    settings = {name.lower(): value for name, value in app["runtime_env"]["env_vars"].items()}
    assert settings.keys() <= Settings.model_fields.keys() - {"api_key", "host", "port"}
    assert Settings(**settings)


def test_the_service_and_its_engine_know_nothing_of_ray() -> None:
    sources = [ROOT / "gpu_service.py", *(ROOT / "gpu_engine").glob("*.py")]
    assert not [source.name for source in sources if "import ray" in source.read_text(encoding="utf-8")]


@pytest.mark.skipif(not shutil.which("promtool"), reason="needs promtool (Debian: prometheus)")
def test_prometheus_takes_the_configuration_and_its_alerts() -> None:
    command = ["promtool", "check", "config", str(FOLDER / "prometheus.yml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

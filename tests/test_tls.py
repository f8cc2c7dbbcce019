"""TLS by uvicorn's own options, which `python gpu_service.py` doesn't have and `uvicorn gpu_service:app` does."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from live import program


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_uvicorn_serves_the_app_over_https(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    made = ["-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(["openssl", "req", "-x509", *made, *subject], check=True, capture_output=True)
    command = [sys.executable, "-m", "uvicorn", "gpu_service:app", "--host", "127.0.0.1", "--port", "{port}"]
    tls = ["--ssl-keyfile", str(key), "--ssl-certfile", str(certificate), "--no-server-header"]
    with program(tmp_path, command=[*command, *tls], certificate=certificate, API_KEY="tls-key") as service:
        assert service.until_answers("/health", 200).json() == {"status": "ok", "device": "cpu"}
        refused = service.client.get("/status")
        assert (refused.status_code, "Server" in refused.headers) == (401, False)
        assert service.client.get("/status", headers={"X-API-Key": "tls-key"}).status_code == 200
        with pytest.raises(httpx.TransportError):  # the same port speaks nothing else
            httpx.get(f"http://127.0.0.1:{service.port}/health", timeout=60)

"""TLS by uvicorn's own options, which `python gpu_service.py` doesn't have and `uvicorn gpu_service:app` does."""

from __future__ import annotations

import os
import shutil
import ssl
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from test_end_to_end import free_port, poll

import gpu_service


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_uvicorn_serves_the_app_over_https(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    made = ["-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(["openssl", "req", "-x509", *made, *subject], check=True, capture_output=True)
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "gpu_service:app", "--host", "127.0.0.1", "--port", str(port)]
    tls = ["--ssl-keyfile", str(key), "--ssl-certfile", str(certificate), "--no-server-header"]
    env = {
        **os.environ,
        "MODEL_BERTSCORE": "all-MiniLM-L6-v2",
        "HF_HUB_OFFLINE": "1",
        "API_KEY": "tls-key",
        "TORCH_DEVICE": "cpu",
    }
    folder = Path(gpu_service.__file__).parent
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([*command, *tls], cwd=folder, env=env, stdout=log, stderr=log)
        try:
            trusted = ssl.create_default_context(cafile=str(certificate))
            with httpx.Client(base_url=f"https://127.0.0.1:{port}", timeout=60, verify=trusted) as client:
                assert poll(client, "/health", 200, process).json() == {"status": "ok", "device": "cpu"}
                refused = client.get("/status")
                assert (refused.status_code, "Server" in refused.headers) == (401, False)
                assert client.get("/status", headers={"X-API-Key": "tls-key"}).status_code == 200
            with pytest.raises(httpx.TransportError):  # the same port speaks nothing else
                httpx.get(f"http://127.0.0.1:{port}/health", timeout=60)
        finally:
            process.kill()
            process.wait()

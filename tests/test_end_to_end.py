"""The program as it is started: `python gpu_service.py`, real models, HTTP, SIGTERM."""

from __future__ import annotations

import contextlib
import math
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

import gpu_service

KEY = "end-to-end-key"


def free_port() -> int:
    """A port on which nobody listens, below those that systems give to whoever asks for any."""
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port")


def poll(client: httpx.Client, path: str, status: int, process: subprocess.Popen[bytes]) -> httpx.Response:
    """Asks until `path` answers with `status`; fails when the process ends or after a minute."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, "the service ended"
        try:
            response = client.get(path)
        except httpx.ConnectError:
            pass  # the port is not open yet
        else:
            if response.status_code == status:
                return response
        time.sleep(0.05)
    raise AssertionError(f"{path} never answered {status}")


@pytest.mark.skipif(os.name == "nt", reason="SIGTERM")
def test_the_program_serves_real_models_over_http_and_stops_on_sigterm(tmp_path: Path) -> None:
    port = free_port()
    env = {
        **os.environ,
        "MODEL_BERTSCORE": "all-MiniLM-L6-v2",
        "HF_HUB_OFFLINE": "1",
        "HOST": "127.0.0.1",
        "PORT": str(port),
        "API_KEY": KEY,
        "TORCH_DEVICE": "cpu",
        "LOG_LEVEL": "debug",
        "GPU_MAX_CONCURENT": "2",
    }
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, gpu_service.__file__], env=env, stdout=log, stderr=log)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                # 1. The port is open while the models still load.
                assert poll(client, "/health", 200, process).json() == {"status": "ok", "device": "cpu"}
                assert client.get("/ready").status_code == 401
                client.headers["X-API-Key"] = KEY
                loading = client.get("/ready")
                assert loading.status_code == 503
                assert "loading" in {model["state"] for model in loading.json()["models"].values()}

                # 2. Real vectors and real scores.
                poll(client, "/ready", 200, process)
                texts = ["The cat sat on the mat.", "A cat was sitting on a mat.", "Costs rose by an eighth."]
                answer = client.post("/embed", json={"texts": texts}).json()
                assert (answer["model"], answer["dimensions"]) == ("all-MiniLM-L6-v2", 384)
                vectors = answer["embeddings"]
                for vector in vectors:
                    assert math.isclose(sum(x * x for x in vector), 1.0, abs_tol=1e-4)
                near, far = (sum(a * b for a, b in zip(vectors[0], other)) for other in vectors[1:])
                assert near > 0.8 > 0.3 > far
                scores = client.post("/bertscore", json={"candidates": [texts[0]] * 3, "references": texts}).json()
                assert math.isclose(scores["f1"][0], 1.0, abs_tol=1e-4)
                assert scores["f1"][0] > scores["f1"][1] > scores["f1"][2]

                # 3. What only a real server shows: HTTP's own errors, and the jobs that ran.
                assert client.post("/embed", content=b"{").status_code == 422
                assert client.get("/status", headers={"X-API-Key": b"\xff\xfe"}).status_code == 401
                recent = client.get("/status").json()["recent_jobs"]
                assert [(job["type"], job["outcome"]) for job in recent] == [("bertscore", "done"), ("embed", "done")]
                info = client.get("/info").json()
                assert sorted(info["loaded_models"]) == ["bertscore:all-MiniLM-L6-v2", "embed:all-MiniLM-L6-v2"]

            # 4. It ends by the signal, or with 0, and the key is nowhere in what it wrote.
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) in (0, -signal.SIGTERM)
        finally:
            process.kill()
            process.wait()
    written = (tmp_path / "log").read_text()
    assert "bertscore:all-MiniLM-L6-v2 ready" in written
    models = "bertscore all-MiniLM-L6-v2, embed all-MiniLM-L6-v2"
    assert written.count(f"ready: http://127.0.0.1:{port} ({models})\n") == 1
    assert "uvicorn" not in written
    assert "GPU_MAX_CONCURENT is no setting of this service; did you mean GPU_MAX_CONCURRENT?" in written
    assert KEY not in written
    assert "Traceback" not in written

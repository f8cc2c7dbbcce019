"""The program as it is started: `python gpu_service.py`, real models, HTTP, SIGTERM."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
from live import program

KEY = "end-to-end-key"


@pytest.mark.skipif(os.name == "nt", reason="SIGTERM")
def test_the_program_serves_real_models_over_http_and_stops_on_sigterm(tmp_path: Path) -> None:
    env = {"API_KEY": KEY, "GPU_DTYPE": "auto", "LOG_LEVEL": "debug", "GPU_MAX_CONCURENT": "2"}
    with program(tmp_path, **env) as service:
        client = service.client
        # 1. The port is open while the models still load.
        assert service.until_answers("/health", 200).json() == {"status": "ok", "device": "cpu"}
        assert client.get("/ready").status_code == 401
        client.headers["X-API-Key"] = KEY
        loading = client.get("/ready")
        assert loading.status_code == 503
        assert "loading" in {model["state"] for model in loading.json()["models"].values()}

        # 2. Real vectors and real scores.
        service.until_answers("/ready", 200)
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
        if Path("/proc/self/maps").exists():  # nothing that came from the engine may bring torch along
            assert "libtorch" not in Path(f"/proc/{service.process.pid}/maps").read_text()

        # 4. It ends by the signal, or with 0, and the key is nowhere in what it wrote.
        service.stop()
    written = service.log.read_text()
    assert "bertscore:all-MiniLM-L6-v2 ready" in written
    models = "bertscore all-MiniLM-L6-v2, embed all-MiniLM-L6-v2"
    assert written.count(f"ready: http://127.0.0.1:{service.port} ({models})\n") == 1
    assert "uvicorn" not in written
    assert "GPU_MAX_CONCURENT is no setting of this service; did you mean GPU_MAX_CONCURRENT?" in written
    assert KEY not in written
    assert "Traceback" not in written


@pytest.mark.skipif(os.name == "nt", reason="closes descriptors")
def test_the_program_serves_with_its_standard_streams_closed(tmp_path: Path) -> None:
    with program(tmp_path, preexec_fn=lambda: os.closerange(0, 3)) as service:
        service.until_answers("/ready", 200)
        assert service.client.post("/embed", json={"texts": ["a"]}).status_code == 200

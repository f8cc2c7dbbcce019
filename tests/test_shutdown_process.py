"""Stopping the real process: by SIGTERM and Ctrl+C under load, and while a model is still being downloaded."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny_models
from fake_hub import Repository, fake_hub, read_folder
from test_end_to_end import free_port, poll

import gpu_service

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="POSIX signals")]

GRACE_S = 30  # far less than GPU_REQUEST_TIMEOUT: what is waited for is the work, not a timer
# Seconds of work in one request, a text a batch; no two texts are the same, so none comes from the cache.
LONG = [" ".join(f"{word}{n}" for word in ("river", "stone", "market", "winter") * 60) for n in range(100)]


@contextlib.contextmanager
def program(tmp_path: Path, **env: str) -> Iterator[tuple[subprocess.Popen[bytes], httpx.Client]]:
    """`python gpu_service.py` and a client of it."""
    port = free_port()
    common = {"HOST": "127.0.0.1", "PORT": str(port), "TORCH_DEVICE": "cpu", "GPU_DTYPE": "float32"}
    with (tmp_path / "log").open("wb") as log, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        process = subprocess.Popen(
            [sys.executable, gpu_service.__file__], env={**os.environ, **common, **env}, stdout=log, stderr=log
        )
        try:
            yield process, client
        finally:
            process.kill()
            process.wait()


def until_queue(client: httpx.Client, in_flight: int, waiting: int) -> None:
    """Asks /status until so many requests run and so many wait."""
    queue: dict[str, Any] = {}
    for _ in range(2000):
        queue = client.get("/status").json()["queue"]
        if (queue["in_flight"], queue["waiting_estimate"]) == (in_flight, waiting):
            return
    raise AssertionError(f"the queue never got there: {queue}")


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "ctrl-c"])
def test_the_running_finish_and_the_waiting_are_refused_and_the_process_goes(
    tmp_path: Path, sent: signal.Signals
) -> None:
    env = {"MODEL_BERTSCORE": "all-MiniLM-L6-v2", "HF_HUB_OFFLINE": "1", "GPU_QUEUE_TIMEOUT": "600"}
    slow = {"GPU_MAX_CONCURRENT": "1", "GPU_BATCH_TOKENS": "256"}
    with program(tmp_path, **env, **slow) as (process, client), ThreadPoolExecutor(4) as callers:
        poll(client, "/ready", 200, process)

        def embed(texts: list[str]) -> httpx.Response:
            return httpx.post(client.base_url.join("/embed"), json={"texts": texts}, timeout=60)

        running = callers.submit(embed, LONG)
        until_queue(client, in_flight=1, waiting=0)
        waiting = [callers.submit(embed, [f"waits {n}"]) for n in range(3)]
        until_queue(client, in_flight=1, waiting=3)
        process.send_signal(sent)

        for response in (future.result() for future in waiting):
            assert (response.status_code, response.json()["code"]) == (503, "shutting_down")
            assert int(response.headers["Retry-After"]) >= 1
        assert not running.done()
        response = running.result()
        assert response.status_code == 200
        assert len(response.json()["embeddings"]) == len(LONG)
        assert process.wait(GRACE_S) in (0, -sent)
        with pytest.raises(httpx.ConnectError):
            client.get("/health")
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_download_that_never_answers_does_not_hold_the_process(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as hub:
        env = {
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.getsockname()[1]}",
            "HF_HOME": str(tmp_path / "hub"),
            "HF_HUB_OFFLINE": "0",
            "MODEL_BERTSCORE": "someone/not-on-this-machine",
        }
        with program(tmp_path, **env) as (process, client), ThreadPoolExecutor(1) as callers:
            poll(client, "/health", 200, process)
            hub.settimeout(60)
            connection, _ = hub.accept()  # the download has begun, and gets no answer
            with connection:
                body = {"candidates": ["a"], "references": ["b"]}
                asking = callers.submit(httpx.post, client.base_url.join("/bertscore"), json=body, timeout=60)
                for _ in range(2000):
                    if client.get("/status").json()["active_jobs"]:
                        break
                process.send_signal(signal.SIGTERM)
                response = asking.result()
                assert response.status_code == 503
                assert int(response.headers["Retry-After"]) >= 1
                assert process.wait(GRACE_S) in (0, -signal.SIGTERM)
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "ctrl-c"])
def test_a_file_that_is_being_downloaded_does_not_hold_the_process(tmp_path: Path, sent: signal.Signals) -> None:
    """The hub client's threads are not daemons: the interpreter waits for them when it ends by itself."""
    files = read_folder(tiny_models.save_bert(tmp_path / "tiny"))
    hold = threading.Event()
    with fake_hub() as hub:
        hub.repositories["tiny/held"] = Repository(files, hold=hold)
        env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0"}
        with program(tmp_path, **env, MODEL_BERTSCORE="tiny/held") as (process, client):
            poll(client, "/health", 200, process)
            for _ in range(2000):
                if "tiny/held/model.safetensors" in hub.fetched:
                    break
                threading.Event().wait(0.01)
            assert "tiny/held/model.safetensors" in hub.fetched
            try:
                process.send_signal(sent)
                assert process.wait(GRACE_S) in (0, -sent)
            finally:
                hold.set()
    assert "Traceback" not in (tmp_path / "log").read_text()

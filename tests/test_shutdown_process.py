"""Stopping the real process: by SIGTERM and Ctrl+C under load, and while a model is still being downloaded."""

from __future__ import annotations

import os
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import tiny_models
from fake_hub import Repository, fake_hub, read_folder
from live import program, until

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="POSIX signals")]

GRACE_S = 30  # far less than GPU_REQUEST_TIMEOUT: what is waited for is the work, not a timer
# Seconds of work in one request, a text a batch; no two texts are the same, so none comes from the cache.
LONG = [" ".join(f"{word}{n}" for word in ("river", "stone", "market", "winter") * 60) for n in range(100)]


def until_queue(client: httpx.Client, in_flight: int, waiting: int) -> None:
    """Asks /status until so many requests run and so many wait."""

    def there() -> bool:
        queue = client.get("/status").json()["queue"]
        return (queue["in_flight"], queue["waiting_estimate"]) == (in_flight, waiting)

    until(there)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "ctrl-c"])
def test_the_running_finish_and_the_waiting_are_refused_and_the_process_goes(
    tmp_path: Path, sent: signal.Signals
) -> None:
    slow = {"GPU_QUEUE_TIMEOUT": "600", "GPU_MAX_CONCURRENT": "1", "GPU_BATCH_TOKENS": "256"}
    with program(tmp_path, **slow) as service, ThreadPoolExecutor(4) as callers:
        client, process = service.client, service.process
        service.until_answers("/ready", 200)

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
    assert "Traceback" not in service.log.read_text()


def test_a_download_that_never_answers_does_not_hold_the_process(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as hub:
        env = {
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.getsockname()[1]}",
            "HF_HOME": str(tmp_path / "hub"),
            "HF_HUB_OFFLINE": "0",
            "MODEL_BERTSCORE": "someone/not-on-this-machine",
        }
        with program(tmp_path, **env) as service, ThreadPoolExecutor(1) as callers:
            client = service.client
            service.until_answers("/health", 200)
            hub.settimeout(60)
            connection, _ = hub.accept()  # the download has begun, and gets no answer
            with connection:
                body = {"candidates": ["a"], "references": ["b"]}
                asking = callers.submit(httpx.post, client.base_url.join("/bertscore"), json=body, timeout=60)
                until(lambda: client.get("/status").json()["active_jobs"])
                service.process.send_signal(signal.SIGTERM)
                response = asking.result()
                assert response.status_code == 503
                assert int(response.headers["Retry-After"]) >= 1
                assert service.process.wait(GRACE_S) in (0, -signal.SIGTERM)
    assert "Traceback" not in service.log.read_text()


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "ctrl-c"])
def test_a_file_that_is_being_downloaded_does_not_hold_the_process(tmp_path: Path, sent: signal.Signals) -> None:
    """The hub client's threads are not daemons: the interpreter waits for them when it ends by itself."""
    files = read_folder(tiny_models.save_bert(tmp_path / "tiny"))
    hold = threading.Event()
    with fake_hub() as hub:
        hub.repositories["tiny/held"] = Repository(files, hold=hold)
        env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0"}
        with program(tmp_path, **env, MODEL_BERTSCORE="tiny/held") as service:
            service.until_answers("/health", 200)
            until(lambda: "tiny/held/model.safetensors" in hub.fetched)
            try:
                service.stop(sent)
            finally:
                hold.set()
    assert "Traceback" not in service.log.read_text()

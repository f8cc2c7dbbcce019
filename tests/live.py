"""The real app behind a real socket, for clients that bring their own HTTP stack: in this process, or in its own."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from conftest import without_options

import gpu_service
from gpu_engine.loading import EngineLoader
from gpu_engine.model_files import Hub


def until(condition: Callable[[], Any], what: str = "the condition never held") -> Any:
    """The first true value of `condition`; fails after a minute and a half."""
    deadline = time.monotonic() + 90
    while not (value := condition()):
        assert time.monotonic() < deadline, what
        threading.Event().wait(0.005)
    return value


# --- in this process -----------------------------------------------------------------------------------


@dataclass
class LiveService:
    """Where it listens, a key that it accepts, and the app for a look inside."""

    url: str
    app: Any
    key: str = ""

    @property
    def runtime(self) -> gpu_service.Runtime:
        return self.app.state.runtime

    @property
    def address(self) -> tuple[str, int]:
        return ("127.0.0.1", httpx.URL(self.url).port or 0)


def post(service: LiveService, path: str, body: Any, key: str = "") -> httpx.Response:
    headers = {"Authorization": f"Bearer {key or service.key}"} if key or service.key else {}
    return httpx.post(f"{service.url}{path}", json=body, headers=headers, timeout=60)


def answer(service: LiveService, path: str, body: Any) -> Any:
    """What a 200 says."""
    response = post(service, path, body)
    assert response.status_code == 200, response.text
    return response.json()


def request_bytes(path: str, body: bytes, *headers: bytes) -> bytes:
    """A request as it stands on the wire."""
    lines = [f"POST {path} HTTP/1.1".encode(), b"Host: service", b"Content-Length: %d" % len(body), *headers]
    if not any(header.lower().startswith(b"content-type") for header in headers):
        lines.append(b"Content-Type: application/json")
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


@contextlib.contextmanager
def serving(settings: gpu_service.Settings, loader: Any = None, **runtime: Any) -> Iterator[LiveService]:
    """Runs the app under uvicorn in a thread until the block ends; ready when the block begins.

    loader: None for the real engines, here in a thread of this process, which spares each test an import of torch.
    runtime: how its Runtime is made instead, such as `launch=launch_process`.
    """
    load = without_options(loader) if loader else EngineLoader(torch.device("cpu"), Hub()).load
    app = gpu_service.create_app(settings, engines=load)
    if runtime:
        app.state.runtime = gpu_service.Runtime(settings, **runtime)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    config = gpu_service.uvicorn_config(app, settings)
    server = gpu_service.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    key = settings.api_keys[0].decode() if settings.api_keys else ""
    service = LiveService(f"http://127.0.0.1:{listener.getsockname()[1]}", app, key)
    try:
        with httpx.Client(base_url=service.url, headers={b"X-API-Key": key.encode()}) as client:
            until(lambda: answers(client, "/ready", 200), "the service did not become ready")
        yield service
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()
        assert not thread.is_alive(), "the server did not stop"


def answers(client: httpx.Client, path: str, status: int) -> httpx.Response | None:
    """The answer, where there is one and it has this status."""
    with contextlib.suppress(httpx.TransportError):  # the port is not open yet
        response = client.get(path)
        return response if response.status_code == status else None
    return None


# --- in a process of its own ---------------------------------------------------------------------------


def free_port() -> int:
    """A port on which nobody listens, below those that systems give to whoever asks for any."""
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port")


@dataclass
class Program:
    """The process, a client of it, and the file that it logs to."""

    process: subprocess.Popen[bytes]
    client: httpx.Client
    log: Path

    @property
    def port(self) -> int | None:
        return self.client.base_url.port

    def until_answers(self, path: str, status: int) -> httpx.Response:
        """Asks until `path` answers with `status`; fails when the process ends."""

        def asked() -> httpx.Response | None:
            assert self.process.poll() is None, f"the service ended: {self.log.read_text()}"
            return answers(self.client, path, status)

        response: httpx.Response = until(asked, f"{path} never answered {status}")
        return response

    def stop(self, sent: signal.Signals = signal.SIGTERM) -> None:
        """Sends a signal; the process ends by it or with 0, soon: what is waited for is the work, not a timer."""
        self.process.send_signal(sent)
        assert self.process.wait(30) in (0, -sent)


@contextlib.contextmanager
def program(
    folder: Path,
    *,
    command: Sequence[str] = (sys.executable, gpu_service.__file__),
    certificate: Path | None = None,
    preexec_fn: Callable[[], None] | None = None,
    **environment: str,
) -> Iterator[Program]:
    """The service as it is started, with MiniLM for both models; its log is written into `folder`.

    command: `{port}` in it is the port. certificate: the client's, for a service that speaks TLS.
    """
    port = free_port()
    env = {**os.environ, "MODEL_BERTSCORE": "all-MiniLM-L6-v2", "HF_HUB_OFFLINE": "1", "GPU_DTYPE": "float32"}
    env |= {"HOST": "127.0.0.1", "PORT": str(port), "TORCH_DEVICE": "cpu", **environment}
    url = f"http{'s' if certificate else ''}://127.0.0.1:{port}"
    trusted = ssl.create_default_context(cafile=str(certificate)) if certificate else False
    log = folder / f"log-{port}"
    with log.open("wb") as out, httpx.Client(base_url=url, timeout=60, verify=trusted) as client:
        process = subprocess.Popen(
            [part.format(port=port) for part in command],
            cwd=Path(gpu_service.__file__).parent,
            env=env,
            stdout=out,
            stderr=out,
            preexec_fn=preexec_fn,
        )
        try:
            yield Program(process, client, log)
        finally:
            process.kill()
            process.wait()

"""The real app behind a real socket, for clients that bring their own HTTP stack."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx

import gpu_service


@dataclass
class LiveService:
    """Where it listens, and the app for a look inside."""

    url: str
    app: Any

    @property
    def runtime(self) -> gpu_service.Runtime:
        return self.app.state.runtime


@contextlib.contextmanager
def serving(settings: gpu_service.Settings, loader: Any = None) -> Iterator[LiveService]:
    """Runs the app under uvicorn in a thread until the block ends; ready when the block begins."""
    app = gpu_service.create_app(settings, engines=loader)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    config = gpu_service.uvicorn_config(app, settings)
    server = gpu_service.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    headers = {"X-API-Key": settings.api_keys[0].decode()} if settings.api_keys else {}
    deadline = time.monotonic() + 60
    try:
        with httpx.Client() as client:
            while time.monotonic() < deadline:
                with contextlib.suppress(httpx.TransportError):
                    if client.get(f"{url}/ready", headers=headers).status_code == 200:
                        break
                threading.Event().wait(0.02)
            else:
                raise AssertionError("the service did not become ready")
        yield LiveService(url, app)
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()
        assert not thread.is_alive(), "the server did not stop"

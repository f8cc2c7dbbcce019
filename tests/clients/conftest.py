"""The service, a process from its own environment, for the clients of this one. Run by `make test-clients`."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Read by the clients when they are imported: no price list, no usage statistics, no proxy to this machine.
os.environ.update(LITELLM_LOCAL_MODEL_COST_MAP="True", HAYSTACK_TELEMETRY_ENABLED="False", NO_PROXY="127.0.0.1")
os.environ["HF_HUB_OFFLINE"] = "0"  # offline, huggingface_hub refuses to ask any server

import httpx
import numpy as np
import pytest

KEY = "sesame"
MODEL = "all-MiniLM-L6-v2"
QUERY, DOCUMENTS = "Where does the cat sit?", ["Revenue grew.", "The cat sits on the mat.", "Dogs bark at night."]


def refuse_other_hosts(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook that lets connections and look-ups reach this machine only."""
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    elif event == "socket.getaddrinfo":
        host = arguments[0]
    else:
        return
    if host not in ("127.0.0.1", "::1", "localhost"):
        raise PermissionError(f"a client wanted to reach {host!r}")


sys.addaudithook(refuse_other_hosts)


@dataclass(frozen=True)
class Service:
    """The address of the running service, and what it should answer."""

    url: str

    def embed(self, texts: list[str], **more: Any) -> np.ndarray:
        """(texts, dimensions) float64 from our own /embed."""
        answer = httpx.post(f"{self.url}/embed", json={"texts": texts, **more}, headers={"X-API-Key": KEY}, timeout=60)
        return np.array(answer.raise_for_status().json()["embeddings"])

    def cosines(self) -> np.ndarray:
        """(documents,) the cosine of each of DOCUMENTS with QUERY."""
        query, *documents = self.embed([QUERY, *DOCUMENTS], normalize=True)
        return np.array(documents) @ query

    def ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/ready", headers={"X-API-Key": KEY}).status_code == 200
        except httpx.TransportError:
            return False  # the port is not open yet


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """`python gpu_service.py` with the embedded model, behind a key, ready."""
    if "SERVICE_PYTHON" not in os.environ:
        pytest.exit("SERVICE_PYTHON names the interpreter that runs the service; `make test-clients` sets it", 4)
    root = Path(__file__).resolve().parents[2]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {**os.environ, "HOST": "127.0.0.1", "PORT": str(port), "API_KEY": KEY, "MODEL_BERTSCORE": MODEL}
    env |= {"MODEL_EMBED": MODEL, "GPU_DTYPE": "float32", "TORCH_DEVICE": "cpu", "HF_HUB_OFFLINE": "1"}
    log = tmp_path_factory.mktemp("service") / "log"
    command = [root / os.environ["SERVICE_PYTHON"], root / "gpu_service.py"]
    with log.open("wb") as out, subprocess.Popen(command, cwd=root, env=env, stdout=out, stderr=out) as process:
        try:
            running = Service(f"http://127.0.0.1:{port}")
            deadline = time.monotonic() + 120
            while not running.ready():
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
            yield running
        finally:
            process.terminate()

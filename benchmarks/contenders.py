"""Contenders as processes: started, asked, measured, paused while another runs, stopped.

A paused contender is stopped by signal, so an idle server's polling threads take nothing from the one that is
being measured; before it is paused it may finish the requests that the load generator left behind.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import numpy as np
from workload import Pairs

LOAD_SCRIPT = Path(__file__).with_name("load.lua")
START_TIMEOUT_S = 600
REQUEST_TIMEOUT_S = 120
IDLE_SHARE = 0.1  # of one core; below it a server has nothing left to do
SETTLE_TIMEOUT_S = 60


class ContenderError(RuntimeError):
    """A contender that did not start, or did not answer; the message says why."""


@dataclass(frozen=True)
class Measurement:
    """One contender under one load for some seconds."""

    items_per_s: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    requests: int
    failed: int
    seconds: float
    others_share: float = 0.0  # what other processes used of the machine meanwhile, 0 to 1


class Contender:
    """A process that is measured. Subclasses say how it is asked; this class owns its life."""

    def __init__(self, name: str, dtype: str, command: Sequence[str], env: dict[str, str], log: Path) -> None:
        self.name, self.dtype = name, dtype
        self.command, self.env, self.log = list(command), env, log
        self.process: subprocess.Popen[str] | None = None

    def launch(self, **streams: Any) -> subprocess.Popen[str]:
        """Start the process in a group of its own, its output in the log."""
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                self.command,
                env=self.env,
                stderr=log,
                text=True,
                start_new_session=True,
                **{"stdout": log, "stdin": subprocess.DEVNULL, **streams},
            )
        return self.process

    def start(self) -> None:
        """Return when the contender can answer; raise `ContenderError` when it never will."""
        raise NotImplementedError

    def answers(self, kind: str, items: Sequence[str] | Pairs) -> np.ndarray:
        """Embeddings (texts, dimensions), or precision, recall and f1 (3, pairs)."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """What the contender says about itself."""
        return {}

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Let the process run within the block, and stop it in its tracks outside."""
        self.signal_group(signal.SIGCONT)
        try:
            yield
        finally:
            self.settle()
            self.signal_group(signal.SIGSTOP)

    def settle(self) -> None:
        """Wait until the process uses no more processor time worth mentioning."""
        deadline = time.monotonic() + SETTLE_TIMEOUT_S
        while time.monotonic() < deadline:
            before, window_s = self.processor_seconds(), 0.2
            time.sleep(window_s)
            if self.processor_seconds() - before < IDLE_SHARE * window_s:
                return

    def processor_seconds(self) -> float:
        """User and system time of the process so far; 0 where the system has no /proc."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def pid(self) -> int:
        if self.process is None:
            raise ContenderError(f"{self.name} was not started")
        return self.process.pid

    def signal_group(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def stop(self) -> None:
        """End the process, politely first."""
        if self.process is None:
            return
        self.signal_group(signal.SIGCONT)
        self.signal_group(signal.SIGTERM)
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.signal_group(signal.SIGKILL)
            self.process.wait()
        self.process = None

    def failure(self, reason: str) -> ContenderError:
        """The reason together with the last lines of the log."""
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
        return ContenderError("\n    ".join([reason, *text.splitlines()[-6:]]))


# ------------------------------------------------------------------------------------------------------------
# In process
# ------------------------------------------------------------------------------------------------------------


class Worker(Contender):
    """An engine in a process of its own, asked over the line protocol of workers.py."""

    def start(self) -> None:
        self.launch(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.receive()

    def ask(self, **message: Any) -> dict[str, Any]:
        assert self.process is not None
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()
        return self.receive()

    def receive(self) -> dict[str, Any]:
        assert self.process is not None
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise self.failure(f"{self.name} ended with code {self.process.wait()}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise ContenderError(reply["error"])
        return reply

    def answers(self, kind: str, items: Sequence[str] | Pairs) -> np.ndarray:
        if isinstance(items, Pairs):
            reply = self.ask(op=kind, candidates=items.candidates, references=items.references)
        else:
            reply = self.ask(op=kind, texts=list(items))
        return np.asarray(reply["answers"], dtype=np.float64)

    def measure(self, kind: str, pool: Path, per_call: int, start: int, seconds: float) -> Measurement:
        reply = self.ask(op="measure", kind=kind, pool=str(pool), per_call=per_call, start=start, seconds=seconds)
        latencies = reply["latencies_ms"]
        p50, p90, p99 = np.percentile(latencies, (50, 90, 99))
        rate = len(latencies) * per_call / reply["seconds"]
        return Measurement(rate, float(p50), float(p90), float(p99), len(latencies), 0, reply["seconds"])

    def describe(self) -> dict[str, Any]:
        return self.ask(op="describe")


# ------------------------------------------------------------------------------------------------------------
# Over HTTP
# ------------------------------------------------------------------------------------------------------------


class Server(Contender):
    """A service on a port of this machine that speaks gpu_service.py's /embed and /bertscore."""

    dialect = "contract"
    ready_path = "/health"
    paths: ClassVar = {"embed": "/embed", "bertscore": "/bertscore"}

    def __init__(self, *arguments: Any, port: int, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.url = f"http://127.0.0.1:{port}"

    def start(self) -> None:
        process = self.launch()
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise self.failure(f"{self.name} ended with code {process.returncode} before it was ready")
            try:
                with urllib.request.urlopen(self.url + self.ready_path, timeout=5):
                    return
            except OSError:
                time.sleep(0.25)
        raise self.failure(f"{self.name} was not ready after {START_TIMEOUT_S} s")

    def body(self, kind: str, items: Sequence[str] | Pairs) -> dict[str, Any]:
        """The request for these items."""
        if isinstance(items, Pairs):
            return {"candidates": items.candidates, "references": items.references}
        return {"texts": list(items)}

    def parse(self, kind: str, reply: dict[str, Any]) -> np.ndarray:
        """The numbers in the answer."""
        if kind == "embed":
            return np.asarray(reply["embeddings"], dtype=np.float64)
        return np.asarray([reply["precision"], reply["recall"], reply["f1"]], dtype=np.float64)

    def answers(self, kind: str, items: Sequence[str] | Pairs) -> np.ndarray:
        request = urllib.request.Request(
            self.url + self.paths[kind],
            json.dumps(self.body(kind, items)).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S) as response:
                return self.parse(kind, json.load(response))
        except urllib.error.HTTPError as error:
            raise ContenderError(f"{self.name}: HTTP {error.code} {error.read(300)!r}") from error

    def measure(
        self, kind: str, bodies: Path, per_request: int, clients: int, start: int, seconds: float
    ) -> Measurement:
        """Keep `clients` connections busy for `seconds`, each with bodies no other one sends."""
        drive = drive_with_wrk if shutil.which("wrk") else drive_with_threads
        result = drive(self.url + self.paths[kind], bodies, clients, start, seconds)
        if not result["answered"]:
            raise ContenderError(f"{self.name}: no answer in {seconds:.0f} s, {result['failed']} failed")
        return Measurement(
            items_per_s=result["answered"] * per_request / result["seconds"],
            p50_ms=result["p50_ms"],
            p90_ms=result["p90_ms"],
            p99_ms=result["p99_ms"],
            requests=result["answered"],
            failed=result["failed"],
            seconds=result["seconds"],
        )


class OwnServer(Server):
    """gpu_service.py: ready when its default models can answer."""

    ready_path = "/ready"

    def describe(self) -> dict[str, Any]:
        with urllib.request.urlopen(self.url + "/info", timeout=30) as response:
            information: dict[str, Any] = json.load(response)
            return information


class InfinityServer(Server):
    """infinity-emb, which speaks OpenAI's embeddings API and has no BERTScore."""

    dialect = "openai"
    paths: ClassVar = {"embed": "/embeddings"}
    model_name = "all-MiniLM-L6-v2"

    def __init__(self, *arguments: Any, versions: dict[str, str], **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.versions = versions

    def body(self, kind: str, items: Sequence[str] | Pairs) -> dict[str, Any]:
        assert not isinstance(items, Pairs), "infinity has no BERTScore"
        return {"model": self.model_name, "input": list(items)}

    def parse(self, kind: str, reply: dict[str, Any]) -> np.ndarray:
        return np.asarray([entry["embedding"] for entry in reply["data"]], dtype=np.float64)

    def describe(self) -> dict[str, Any]:
        return {"versions": self.versions}


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# ------------------------------------------------------------------------------------------------------------
# Load
# ------------------------------------------------------------------------------------------------------------


def drive_with_wrk(url: str, bodies: Path, clients: int, start: int, seconds: float) -> dict[str, Any]:
    """One wrk thread with `clients` connections; it takes a few percent of a core."""
    command = [
        "wrk",
        "-t1",
        f"-c{clients}",
        f"-d{max(1, round(seconds))}s",
        f"--timeout={REQUEST_TIMEOUT_S}s",
        "-s",
        str(LOAD_SCRIPT),
        url,
        "--",
        str(bodies),
        str(start),
    ]
    output = subprocess.run(command, capture_output=True, text=True, check=False)
    for line in output.stdout.splitlines():
        if line.startswith("RESULT "):
            result: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
            return result
    raise ContenderError(f"wrk reported nothing for {url}: {output.stdout[-300:]} {output.stderr[-300:]}")


def drive_with_threads(url: str, bodies: Path, clients: int, start: int, seconds: float) -> dict[str, Any]:
    """The same without wrk: a thread for each connection. Heavier, so the numbers are lower for everyone."""
    lines = bodies.read_bytes().splitlines()
    address = urlsplit(url)
    lock = threading.Lock()
    latencies: list[float] = []
    cursor, failed, last = start, 0, 0.0
    began = time.perf_counter()

    def client() -> None:
        nonlocal cursor, failed, last
        connection = http.client.HTTPConnection(address.netloc, timeout=REQUEST_TIMEOUT_S)
        while time.perf_counter() - began < seconds:
            with lock:
                body = lines[cursor % len(lines)]
                cursor += 1
            sent = time.perf_counter()
            connection.request("POST", address.path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            response.read()
            with lock:
                last = time.perf_counter()
                latencies.append((last - sent) * 1000)
                failed += response.status != 200
        connection.close()

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    p50, p90, p99 = np.percentile(latencies, (50, 90, 99))
    return {
        "answered": len(latencies) - failed,
        "failed": failed,
        "seconds": last - began,
        "p50_ms": float(p50),
        "p90_ms": float(p90),
        "p99_ms": float(p99),
    }

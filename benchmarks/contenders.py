"""Contenders as processes: started, asked, measured, paused while another runs, stopped.

A paused contender is stopped by signal, so an idle server's polling threads take nothing from the one that is
being measured; before it is paused it may finish the requests that the load generator left behind.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

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
    failed: int


@dataclass(frozen=True)
class Load:
    """What a contender is measured with: items from a pool, so many a call; 0 clients means calls in process."""

    kind: str  # "embed" or "bertscore"
    pool: Path  # a JSON list of texts, or of candidates and references
    items: int
    clients: int
    start: int  # the first call; the same for every contender of a round
    seconds: float
    headers: tuple[str, ...] = ()  # of HTTP requests, each NAME: VALUE


class Contender:
    """A process that is measured. This class owns its life; the two below `start`, ask and `measure` it."""

    def __init__(self, name: str, dtype: str, command: Sequence[str], env: dict[str, str], log: Path) -> None:
        self.name, self.dtype = name, dtype
        self.command, self.env, self.log = list(command), env, log
        self.process: subprocess.Popen[str] | None = None

    def launch(self, **streams: Any) -> subprocess.Popen[str]:
        """Start the process in a group of its own, its output in the log."""
        with self.log.open("w", encoding="utf-8") as log:
            given = {"stdout": log, "stdin": subprocess.DEVNULL, **streams}
            self.process = subprocess.Popen(
                self.command, env=self.env, stderr=log, text=True, start_new_session=True, **given
            )
        return self.process

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
        deadline, window_s = time.monotonic() + SETTLE_TIMEOUT_S, 0.2
        while time.monotonic() < deadline:
            before = self.processor_seconds()
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
        """Of the process. Raises ContenderError where it was not started."""
        if self.process is None:
            raise ContenderError(f"{self.name} was not started")
        return self.process.pid

    def signal_group(self, number: int) -> None:
        """Send a signal to the process and its children, if they are still there."""
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
        return ContenderError("\n    ".join([f"{self.name} {reason}", *text.splitlines()[-6:]]))


class Worker(Contender):
    """An engine in a process of its own, asked over the line protocol of workers.py."""

    def start(self) -> None:
        """Return when the engine is loaded."""
        self.launch(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.receive()

    def ask(self, **message: Any) -> dict[str, Any]:
        """The reply to one line."""
        assert self.process is not None
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()
        return self.receive()

    def receive(self) -> dict[str, Any]:
        """The next line. Raises ContenderError where it is an error, or where there is none."""
        assert self.process is not None
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise self.failure(f"ended with code {self.process.wait()}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise ContenderError(reply["error"])
        return reply

    def answers(self, kind: str, items: Sequence[Any]) -> np.ndarray:
        """Embeddings (texts, dimensions), or precision, recall and f1 (3, pairs)."""
        return np.asarray(self.ask(op="answers", kind=kind, items=items)["answers"], dtype=np.float64)

    def measure(self, load: Load) -> Measurement:
        """One call after the other."""
        given = {"kind": load.kind, "pool": str(load.pool), "per_call": load.items, "start": load.start}
        reply = self.ask(op="measure", seconds=load.seconds, **given)
        latencies = reply["latencies_ms"]
        rate = len(latencies) * load.items / reply["seconds"]
        return Measurement(rate, *map(float, np.percentile(latencies, (50, 90, 99))), 0)


class Server(Contender):
    """A service on this machine: gpu_service.py's /embed and /bertscore or, with `openai`, /embeddings alone."""

    def __init__(self, *arguments: Any, port: int, ready_path: str = "/health", openai: bool = False) -> None:
        super().__init__(*arguments)
        self.url, self.ready_path, self.openai = f"http://127.0.0.1:{port}", ready_path, openai

    def start(self) -> None:
        """Return when the service says that it is ready."""
        process = self.launch()
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise self.failure(f"ended with code {process.returncode} before it was ready")
            try:
                with urllib.request.urlopen(self.url + self.ready_path, timeout=5):
                    return
            except OSError:
                time.sleep(0.25)
        raise self.failure(f"was not ready after {START_TIMEOUT_S} s")

    def request(self, kind: str, items: Sequence[Any]) -> tuple[str, dict[str, Any]]:
        """URL and body of the request for these texts or pairs."""
        if self.openai:
            return f"{self.url}/embeddings", {"model": "all-MiniLM-L6-v2", "input": items}
        if kind == "embed":
            return f"{self.url}/embed", {"texts": items}
        candidates, references = zip(*items, strict=True)
        return f"{self.url}/bertscore", {"candidates": candidates, "references": references}

    def answers(self, kind: str, items: Sequence[Any]) -> np.ndarray:
        """Embeddings (texts, dimensions), or precision, recall and f1 (3, pairs)."""
        url, body = self.request(kind, items)
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S) as response:
                reply = json.load(response)
        except urllib.error.HTTPError as error:
            raise ContenderError(f"{self.name}: HTTP {error.code} {error.read(300)!r}") from error
        if self.openai:
            reply = {"embeddings": [entry["embedding"] for entry in reply["data"]]}
        numbers = reply["embeddings"] if kind == "embed" else [reply[name] for name in ("precision", "recall", "f1")]
        return np.asarray(numbers, dtype=np.float64)

    def bodies(self, load: Load) -> tuple[str, Path]:
        """The URL, and a file of one request body a line, written on first use."""
        items: list[Any] = json.loads(load.pool.read_text(encoding="utf-8"))
        url, _ = self.request(load.kind, items[:1])
        path = load.pool.with_name(f"{load.pool.stem}-{load.items}{'-openai' if self.openai else ''}.jsonl")
        if not path.exists():
            calls = (items[n : n + load.items] for n in range(0, len(items) - load.items + 1, load.items))
            path.write_text("".join(json.dumps(self.request(load.kind, call)[1]) + "\n" for call in calls))
        return url, path

    def measure(self, load: Load) -> Measurement:
        """The load, by wrk, with bodies that no other client sends."""
        url, bodies = self.bodies(load)
        result = drive(url, bodies, load.clients, load.seconds, start=load.start, headers=load.headers)
        if not result["answered"]:
            raise ContenderError(f"{self.name}: no answer in {load.seconds:.0f} s, {result['failed']} failed")
        rate = result["answered"] * load.items / result["seconds"]
        return Measurement(rate, *(result[f"p{share}_ms"] for share in (50, 90, 99)), result["failed"])


def drive(
    url: str, bodies: Path, clients: int, seconds: float, *, start: int = 0, headers: Sequence[str] = ()
) -> dict[str, Any]:
    """What load.lua reports of wrk, which keeps `clients` connections busy from one thread.

    bodies: a file of one request body a line. start: the first of them.
    """
    wrk = ["wrk", "-t1", f"-c{clients}", f"-d{max(1, round(seconds))}s", f"--timeout={REQUEST_TIMEOUT_S}s"]
    wrk += [part for header in headers for part in ("-H", header)]
    command = [*wrk, "-s", str(LOAD_SCRIPT), url, "--", str(bodies), str(start)]
    output = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in output.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise ContenderError(f"wrk reported nothing for {url}: {output.stdout[-300:]} {output.stderr[-300:]}")
    result: dict[str, Any] = json.loads(lines[0].removeprefix("RESULT "))
    return result


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port

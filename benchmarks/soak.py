"""Soak: the real process at twice its capacity, every answer checked, memory and /health watched.

    python benchmarks/soak.py --minutes 10
    python benchmarks/soak.py --minutes 2 --control leak     # leaks on purpose: has to end with exit code 1

Each minute is 10 s at capacity (every slot taken, nobody refused), 40 s of overload (requests arrive at twice the
rate that was answered at capacity, whether answered or not) and 10 s at capacity again, so that a machine that has
other things to do slows both alike. The result is one JSON object on standard output; exit code 1 when a bound is
violated, and `violated` names it. Memory counts from the end of the first third.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import http.client
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson

ROOT = Path(__file__).resolve().parent.parent
SLOTS = 2
TOLERANCE = 1e-4
HANG_UPS = 0.04  # of all calls
HEALTH_P99_MS, GROWTH_MB, THROUGHPUT = 50.0, 50.0, 0.9
GROWTH_NOISE_MB = 8.0  # what an allocator does in a short run is not a trend
WORDS = """the a of and to river stone market winter engine letter doctor window music paper silver question garden
answers carry under between quickly almost never seven twelve Zürich naïve 東京 données teacher bridge measure signal
harvest lantern ocean protocol remember translate compile velocity mountain candle"""


@dataclass
class Call:
    """One request and what makes its answer right; `work` is the characters that the device reads."""

    path: str
    body: dict[str, Any] | bytes | None
    status: int = 200
    work: int = 0
    check: Callable[[Any], bool] = lambda answer: True


class Tally(Counter[str]):
    """What came back in one phase: right, wrong, refused, hung_up, each status, work (characters) and seconds."""

    @property
    def speed(self) -> float:
        """Characters of right answers a second."""
        return self["work"] / max(self["seconds"], 1e-9)

    @property
    def unexplained(self) -> list[str]:
        """What no caller should see."""
        return [name for name in self if name.startswith("unexplained")]


def close(rows: Any, known: np.ndarray) -> bool:
    """Whether numbers are those of the quiet pass."""
    return bool(np.allclose(np.array(rows), known, atol=TOLERANCE, rtol=0))


def measures(answer: Any) -> np.ndarray:
    """(pairs, 3): precision, recall and F1 of an answer of /bertscore."""
    return np.array([answer["precision"], answer["recall"], answer["f1"]]).T


class Workload:
    """Texts, their vectors and scores from a quiet pass, and calls drawn from them at random."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        lengths = [self.random.choice((3, 8, 8, 20, 20, 40, 100)) for _ in range(240)]
        self.texts = [
            f"{n} {' '.join(self.random.choices(WORDS.split(), k=length))}" for n, length in enumerate(lengths)
        ]
        self.pairs = [self.random.sample(range(len(self.texts)), 2) for _ in range(120)]
        self.vectors = np.zeros((0, 0))
        self.scores = np.zeros((0, 0))

    async def learn(self, client: httpx.AsyncClient) -> None:
        """One pass with nobody else there: what every later answer is compared with."""
        rows: list[list[float]] = []
        for start in range(0, len(self.texts), 20):
            answer = await client.post("/embed", json={"texts": self.texts[start : start + 20]})
            rows += answer.raise_for_status().json()["embeddings"]
        self.vectors = np.array(rows)
        scores: list[np.ndarray] = []
        for start in range(0, len(self.pairs), 20):
            body = self._pairs(range(start, start + 20))
            answer = (await client.post("/bertscore", json=body)).raise_for_status().json()
            scores.append(measures(answer))
        self.scores = np.concatenate(scores)
        nearest = np.sort(self.vectors @ self.vectors.T, axis=1)[:, -2].max()
        if nearest > 1 - 10 * TOLERANCE**2:
            raise SystemExit("soak: two texts share a vector, so a mix-up would not show")

    def draw(self) -> Call:
        """One call of the mix."""
        kinds = {self._embed: 38, self._bertscore: 22, self._openai: 25, self._status: 8, self._error: 7}
        return self.random.choices(list(kinds), list(kinds.values()))[0]()

    def _some(self, known: Sequence[Any]) -> list[int]:
        return self.random.choices(range(len(known)), k=self.random.choice((1, 1, 2, 4, 8, 16)))

    def _embeddings(self, path: str, body: dict[str, Any], rows: Callable[[Any], Any]) -> Call:
        """A call for vectors; `rows` finds them in the answer."""
        chosen = self._some(self.texts)
        texts = [self.texts[n] for n in chosen]
        full = {name: texts if value is ... else value for name, value in body.items()}
        return Call(path, full, work=sum(map(len, texts)), check=lambda a: close(rows(a), self.vectors[chosen]))

    def _embed(self) -> Call:
        return self._embeddings("/embed", {"texts": ...}, lambda a: a["embeddings"])

    def _openai(self) -> Call:
        if self.random.random() < 0.3:
            return self._embeddings("/v1/embeddings", {"input": ...}, lambda a: [d["embedding"] for d in a["data"]])
        body = {"input": ..., "encoding_format": "base64"}
        decode = base64.b64decode
        return self._embeddings(
            "/v1/embeddings", body, lambda a: [np.frombuffer(decode(d["embedding"]), "<f4") for d in a["data"]]
        )

    def _pairs(self, chosen: Any) -> dict[str, list[str]]:
        pairs = [self.pairs[n] for n in chosen]
        return {"candidates": [self.texts[a] for a, _ in pairs], "references": [self.texts[b] for _, b in pairs]}

    def _bertscore(self) -> Call:
        chosen = self._some(self.pairs)
        body = self._pairs(chosen)
        work = sum(len(text) for texts in body.values() for text in texts)
        return Call("/bertscore", body, work=work, check=lambda a: close(measures(a), self.scores[chosen]))

    def _status(self) -> Call:
        return Call("/status", None, check=lambda a: a["queue"]["in_flight"] <= SLOTS)

    def _error(self) -> Call:
        mistakes = [
            Call("/embed", b"{", 422),
            Call("/embed", {"texts": ["x"] * 101}, 422),
            Call("/embed", {"texts": ["x" * 10_001]}, 422),
            Call("/embed", {"texts": ["x"], "model": "../etc"}, 400),
            Call("/bertscore", {"candidates": ["x"], "references": []}, 400),
            Call("/v1/embeddings", {"input": [1, 2, 3]}, 400),
            Call("/nowhere", None, 404),
        ]
        return self.random.choice(mistakes)


class Clients:
    """Sends calls and books what comes back."""

    def __init__(self, client: httpx.AsyncClient, workload: Workload) -> None:
        self.client, self.workload = client, workload
        self.wrong: list[str] = []

    async def send(self, tally: Tally) -> None:
        """One call, or one that hangs up on the way."""
        call = self.workload.draw()
        patience = self.workload.random.uniform(0.0, 0.4) if self.workload.random.random() < HANG_UPS else 120.0
        body: dict[str, Any] = {}
        if call.body is not None:
            content = call.body if isinstance(call.body, bytes) else orjson.dumps(call.body)
            body = {"content": content, "headers": {"Content-Type": "application/json"}}
        request = self.client.request("POST" if call.body is not None else "GET", call.path, **body)
        try:
            response = await asyncio.wait_for(request, patience)
        except asyncio.TimeoutError:
            if patience < 120:
                tally["hung_up"] += 1
            else:
                tally["unexplained: no answer in 120 s"] += 1
            return
        except httpx.HTTPError as error:
            tally[f"unexplained: {type(error).__name__}"] += 1
            return
        tally[f"status {response.status_code}"] += 1
        busy = 429 if call.path.startswith("/v1/") else 503
        if response.status_code == busy and call.work:
            tally["refused"] += 1
            wait = response.headers.get("Retry-After", "")
            if not wait.isdecimal() or int(wait) < 1:
                tally[f"unexplained: {busy} with Retry-After {wait!r}"] += 1
        elif response.status_code != call.status:
            tally[f"unexplained: {call.path}: {response.status_code}, not {call.status}"] += 1
        elif response.is_success and not call.check(orjson.loads(response.content)):
            tally["wrong"] += 1
            self.wrong.append(f"{call.path}: {response.text[:200]}")
        else:
            tally["right"] += 1
            tally["work"] += call.work

    async def at_capacity(self, seconds: float) -> Tally:
        """As many callers as keep every slot taken, each sending when it has its answer."""
        tally, began = Tally(), time.monotonic()

        async def caller() -> None:
            while time.monotonic() - began < seconds:
                await self.send(tally)

        await asyncio.gather(*(caller() for _ in range(2 * SLOTS)))
        tally["seconds"] = time.monotonic() - began
        return tally

    async def overloaded(self, seconds: float, per_s: float) -> Tally:
        """Calls arrive at random, `per_s` of them a second, whether the service answers or not."""
        tally, began = Tally(), time.monotonic()
        under_way: set[asyncio.Task[None]] = set()
        due = 0.0
        while due < seconds:
            await asyncio.sleep(max(0.0, began + due - time.monotonic()))
            task = asyncio.create_task(self.send(tally))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
            due += self.workload.random.expovariate(per_s)
        await asyncio.gather(*under_way)
        tally["seconds"] = time.monotonic() - began
        return tally


def resident_mb(pid: int) -> float | None:
    """Resident memory of a process and its children, the engine among them, where the system tells."""
    try:
        threads = Path(f"/proc/{pid}/task").iterdir()  # a child belongs to the thread that started it
        children = sorted({child for thread in threads for child in (thread / "children").read_text().split()})
        pages = sum(int(Path(f"/proc/{each}/statm").read_text().split()[1]) for each in (pid, *children))
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def growth_mb(samples: list[tuple[float, float]]) -> tuple[float, float]:
    """Growth over the samples, and per ten minutes, by the median of the slopes between early and late ones."""
    third = max(1, len(samples) // 3)
    slopes = [(b - a) / (tb - ta) for (ta, a), (tb, b) in zip(samples[:third], samples[-third:]) if tb > ta]
    slope = statistics.median(slopes) if slopes else 0.0
    return slope * (samples[-1][0] - samples[0][0]), slope * 600


async def watch_memory(pid: int, samples: list[tuple[float, float]]) -> None:
    """Adds a sample a second."""
    while (now_mb := resident_mb(pid)) is not None:
        samples.append((time.monotonic(), now_mb))
        await asyncio.sleep(1)


def poll_health(port: int) -> None:
    """Child process: asks /health twenty times a second over new connections, and prints each answer's time."""
    while True:
        began = time.perf_counter()
        status = 0
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection.request("GET", "/health")
            status = connection.getresponse().status
        connection.close()
        print(status, 1e3 * (time.perf_counter() - began), flush=True)
        time.sleep(0.05)


def serve_leaking() -> None:
    """Child process: the service, keeping every answer it gives."""
    sys.path.insert(0, str(ROOT))
    import gpu_service

    kept, write = list[Any](), gpu_service.json_response

    def hoard(*arguments: Any) -> Any:
        kept.append(write(*arguments))
        return kept[-1]

    gpu_service.json_response = hoard
    gpu_service.serve(gpu_service.read_settings())


@contextlib.contextmanager
def running(command: list[str], **more: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A child process that does not outlive the block."""
    process = subprocess.Popen(command, **more)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def until_ready(client: httpx.AsyncClient, process: subprocess.Popen[bytes]) -> None:
    """Waits for /ready, two minutes at most."""
    for _ in range(1200):
        if process.poll() is not None:
            raise SystemExit(f"soak: the service ended with {process.returncode}")
        with contextlib.suppress(httpx.TransportError):
            if (await client.get("/ready")).status_code == 200:
                return
        await asyncio.sleep(0.1)
    raise SystemExit("soak: the service did not become ready")


async def drained(client: httpx.AsyncClient) -> dict[str, int]:
    """What is left once nothing is sent any more, given a few seconds to notice the last hang-up."""
    for _ in range(50):
        status = (await client.get("/status")).json()
        queue = status["queue"]
        left = {"in_flight": queue["in_flight"], "waiting": queue["waiting_estimate"]}
        left["active_jobs"] = len(status["active_jobs"])
        if not any(left.values()):
            break
        await asyncio.sleep(0.1)
    return left


@dataclass
class Seen:
    """What a run saw, phase by phase and on the side."""

    phases: dict[str, Tally] = field(default_factory=lambda: {"capacity": Tally(), "overload": Tally()})
    ratios: list[float] = field(default_factory=list)  # overload to capacity, in each round
    memory: list[tuple[float, float]] = field(default_factory=list)  # seconds (monotonic), MB
    health: list[tuple[str, float]] = field(default_factory=list)  # status, ms
    wrong: list[str] = field(default_factory=list)
    left: dict[str, int] = field(default_factory=dict)
    began: float = 0.0
    exit_code: int = 0


def start_of(control: str | None, port: int) -> tuple[list[str], dict[str, str]]:
    """Command and environment of the service."""
    given = {"HOST": "127.0.0.1", "PORT": str(port), "GPU_MAX_CONCURRENT": str(SLOTS), "API_KEY": ""}
    # A small cache: it hits, and it also has to make room all the time.
    usual = {"MODEL_BERTSCORE": "all-MiniLM-L6-v2", "GPU_DTYPE": "float32", "GPU_CACHE_MB": "1"}
    command = [__file__, "--serve-leaking"] if control == "leak" else [str(ROOT / "gpu_service.py")]
    offline = {"HF_HUB_OFFLINE": "1", "LOG_LEVEL": "warning"}
    return [sys.executable, *command], {**offline, **usual, **os.environ, **given}


async def drive(clients: Clients, minutes: float, seen: Seen) -> None:
    """The phases, round after round."""
    rounds = max(1, round(minutes))
    seconds, seen.began = 60 * minutes / rounds, time.monotonic()
    for _ in range(rounds):
        before = await clients.at_capacity(seconds / 6)
        per_s = 2 * (before["right"] + before["hung_up"]) / before["seconds"]
        under = await clients.overloaded(seconds * 4 / 6, per_s)
        after = await clients.at_capacity(seconds / 6)
        for kind, tally in (("capacity", before), ("overload", under), ("capacity", after)):
            seen.phases[kind].update(tally)
        seen.ratios.append(under.speed / statistics.mean((before.speed, after.speed)))


async def soak(minutes: float, control: str | None, seed: int) -> dict[str, Any]:
    """Starts the service and what watches it, runs the phases and gives the result."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command, env = start_of(control, port)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=16)
    seen = Seen()
    with tempfile.TemporaryFile("w+") as polled, running(command, env=env) as service:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=150, limits=limits) as client:
            await until_ready(client, service)
            workload = Workload(seed)
            await workload.learn(client)
            if hasattr(os, "nice"):
                os.nice(10)  # callers are other machines: what they compute should not come out of the service's share
            with running([sys.executable, __file__, "--poll-health", str(port)], stdout=polled) as poller:
                clients = Clients(client, workload)
                watching = asyncio.create_task(watch_memory(service.pid, seen.memory))
                await drive(clients, minutes, seen)
                watching.cancel()
                assert poller.poll() is None, "the /health poller ended"
            seen.wrong, seen.left = clients.wrong[:3], await drained(client)
        service.send_signal(signal.SIGTERM)
        seen.exit_code = service.wait(60)
        polled.seek(0)
        lines = [line.split() for line in polled.read().splitlines() if line.count(" ") == 1]
        seen.health = [(status, float(spent_ms)) for status, spent_ms in lines]
    return {"minutes": minutes, "control": control, **judge(seen, minutes)}


def judge(seen: Seen, minutes: float) -> dict[str, Any]:
    """What was seen, and which bounds it violates. Memory counts from the end of the first third."""
    phases, memory = seen.phases, seen.memory
    times = sorted(spent_ms for _, spent_ms in seen.health)
    p99 = times[int(0.99 * len(times))]
    ratio = phases["overload"].speed / phases["capacity"].speed
    samples = [(at, mb) for at, mb in memory if at - seen.began >= 20 * minutes]
    grown, grown_in_ten = growth_mb(samples) if samples else (0.0, 0.0)
    bounds = {
        "wrong answers": not any(t["wrong"] for t in phases.values()),
        "unexplained statuses": not any(t.unexplained for t in phases.values()),
        "refused at capacity": not phases["capacity"]["refused"],
        "health status": all(status == "200" for status, _ in seen.health),
        f"health p99 <= {HEALTH_P99_MS:g} ms": p99 <= HEALTH_P99_MS,
        f"memory growth <= {GROWTH_MB:g} MB in ten minutes": grown_in_ten <= GROWTH_MB or grown <= GROWTH_NOISE_MB,
        "nothing left at the end": not any(seen.left.values()),
        f"throughput under overload >= {THROUGHPUT:.0%}": ratio >= THROUGHPUT,
        "exit after SIGTERM": seen.exit_code in (0, -signal.SIGTERM),
    }
    over_time = [round(mb) for _, mb in [*memory[:: max(1, len(memory) // 20)], *memory[-1:]]]
    health_ms = {"p50": statistics.median(times), "p99": p99, "max": times[-1]}
    return {
        "phases": {name: {**tally, "characters_per_s": round(tally.speed)} for name, tally in phases.items()},
        "throughput_of_capacity": {"all": round(ratio, 3), "each_round": [round(r, 2) for r in seen.ratios]},
        "health_ms": {"asked": len(times), **{name: round(ms, 1) for name, ms in health_ms.items()}},
        "memory_mb": {  # empty where the system has no /proc/PID/statm
            "over_time": over_time,
            "growth": round(grown, 1),
            "growth_in_ten_minutes": round(grown_in_ten, 1),
        },
        "left_at_end": seen.left,
        "exit_code": seen.exit_code,
        "wrong_examples": seen.wrong,
        "violated": [name for name, kept in bounds.items() if not kept],
    }


def main() -> int:
    """Exit code 1 when a bound is violated."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--control", choices=["leak"], help="a service with this fault; has to be caught")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--poll-health", type=int, metavar="PORT", help=argparse.SUPPRESS)
    parser.add_argument("--serve-leaking", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.poll_health:
        poll_health(asked.poll_health)
    if asked.serve_leaking:
        serve_leaking()
        return 0
    result = asyncio.run(soak(asked.minutes, asked.control, asked.seed))
    print(json.dumps(result, indent=2))
    return 1 if result["violated"] else 0


if __name__ == "__main__":
    sys.exit(main())

"""Two machines without a cluster: OpenClaw's plugin spreads its calls over `hosts`, here over two real processes.

`Bridge` is how the plugin behaves, as far as a service notices: which host it asks, what it takes for ill, what it
tries again.
"""

from __future__ import annotations

import concurrent.futures
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import pytest
from live import Program, program

KEYS = ("one", "two")
BODY = {"texts": ["The cat sat on the mat.", "Revenue grew last year."], "model": "all-MiniLM-L6-v2"}
PAIR = {"candidates": ["The cat sat."], "references": ["A cat was sitting."], "lang": "en"}
RETRIES = 3  # of a 503, on the same host


@dataclass
class Host:
    """One entry of `hosts`, and what the plugin knows of it."""

    client: httpx.Client
    healthy: bool = True


@dataclass
class Bridge:
    """Asks hosts in turn, or the one whose GPU has the smallest share of its memory in use; goes on to others."""

    hosts: list[Host]
    least_busy: bool = False
    waits_s: list[int] = field(default_factory=list)
    turn: int = 0

    def call(self, path: str, body: Any) -> Any:
        """What the first host answers that does."""
        tried: list[Host] = []
        for _ in self.hosts:
            host = self.choose()
            if host not in tried:
                tried.append(host)
                if (answer := self.ask(host, path, body)) is not None:
                    return answer
        raise AssertionError("all hosts failed")

    def choose(self) -> Host:
        """The next host, among the healthy ones if there are any."""
        if self.least_busy:
            shares = {id(host): self.share_in_use(host) for host in self.healthy()}
            return min(self.healthy(), key=lambda host: shares.get(id(host), math.inf))
        pool = self.healthy()
        self.turn += 1
        return pool[(self.turn - 1) % len(pool)]

    def healthy(self) -> list[Host]:
        """The healthy hosts, or all where none is."""
        return [host for host in self.hosts if host.healthy] or self.hosts

    def share_in_use(self, host: Host) -> float:
        """Of the GPU's memory; infinite where /info names none."""
        info = self.ask(host, "/info") or {}
        return info["vram_used_mb"] / info["vram_total_mb"] if "vram_total_mb" in info else math.inf

    def ask(self, host: Host, path: str, body: Any = None) -> Any:
        """A 200's content. None marks the host as ill: after anything else but 503, or too many of those."""
        for attempt in range(RETRIES + 1):
            try:
                answer = host.client.request("POST" if body else "GET", path, json=body, timeout=45)
            except httpx.TransportError:
                break
            if answer.status_code == 503 and "retry-after" in answer.headers and attempt < RETRIES:
                self.waits_s.append(int(answer.headers["retry-after"]))
                threading.Event().wait(self.waits_s[-1])
                continue
            host.healthy = answer.status_code == 200
            return answer.json() if host.healthy else None
        host.healthy = False
        return None

    def poll(self) -> None:
        """What the plugin does every 30 s: whoever answers is healthy again."""
        for host in self.hosts:
            self.ask(host, "/health")


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Program]]:
    """Two services, each with a key of its own, one request at a time, and room for one that waits."""
    first, second = (
        program(tmp_path_factory.mktemp(key), API_KEY=key, GPU_MAX_CONCURRENT="1", GPU_MAX_QUEUE="1") for key in KEYS
    )
    with first as one, second as two:
        for machine, key in zip((one, two), KEYS):
            machine.client.headers["X-API-Key"] = key
        for machine in (one, two):
            machine.until_answers("/ready", 200)
        yield [one, two]


def bridge(machines: list[Program], **options: Any) -> Bridge:
    return Bridge([Host(machine.client) for machine in machines], **options)


def jobs(machine: Program) -> int:
    """How many requests a service has computed."""
    return len(machine.client.get("/status").json()["recent_jobs"])


def test_hosts_in_turn_share_the_calls_and_answer_alike(machines: list[Program]) -> None:
    plugin = bridge(machines)
    vectors = [plugin.call("/embed", BODY)["embeddings"] for _ in range(6)]
    assert [jobs(machine) for machine in machines] == [3, 3]
    np.testing.assert_allclose(vectors[1:], [vectors[0]] * 5, atol=1e-6)


def test_a_burst_on_two_hosts_is_answered_after_the_times_that_they_name(machines: list[Program]) -> None:
    body = {**BODY, "texts": [f"Text {number} of a list of them, and more of it." for number in range(60)]}
    plugins = [bridge(machines, turn=number) for number in range(8)]  # each a process of its own
    with concurrent.futures.ThreadPoolExecutor(len(plugins)) as callers:
        answers = list(callers.map(lambda plugin: plugin.call("/embed", body)["embeddings"], plugins))
    assert [len(answer) for answer in answers] == [60] * 8
    waits_s = [wait_s for plugin in plugins for wait_s in plugin.waits_s]
    assert waits_s, "nobody was refused"
    assert min(waits_s) >= 1


def test_a_host_that_dies_costs_no_call_and_is_left_out_until_it_answers_again(machines: list[Program]) -> None:
    turns, preferring = bridge(machines), bridge(machines, least_busy=True)
    before = jobs(machines[1])
    f1 = preferring.call("/bertscore", PAIR)["f1"]
    assert jobs(machines[1]) == before  # without a GPU's memory to compare the first host gets every call
    machines[0].process.kill()
    machines[0].process.wait()
    assert preferring.call("/bertscore", PAIR)["f1"] == pytest.approx(f1, abs=1e-6)
    assert all(turns.call("/embed", BODY) for _ in range(4))
    assert jobs(machines[1]) == before + 5
    turns.poll()
    assert [host.healthy for host in turns.hosts] == [False, True]

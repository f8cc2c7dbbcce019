"""The service on a real Ray of this machine, with the real MiniLM: two replicas, and what their callers notice.

The tests stand in the order of a cluster's life: the replicas answer, refuse, one is killed, all are updated, one goes
as too many and comes back as too few.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from live import free_port, program, until

ROOT = Path(__file__).resolve().parents[2]
KEY = f"key-{os.urandom(8).hex()}"  # also what tells this cluster's processes from others'
TEXTS = ["The cat sat on the mat.", "Revenue grew last year.", "Where is the cat?"]
PAIRS = {"candidates": TEXTS, "references": ["A cat was sitting on a mat.", "Sales went up.", "The cat is here."]}
HEADERS = {"X-API-Key": KEY}
SETTINGS = {"MODEL_BERTSCORE": "all-MiniLM-L6-v2", "GPU_DTYPE": "float32", "TORCH_DEVICE": "cpu", "GPU_CACHE_MB": "0"}
SETTINGS |= {"HF_HUB_OFFLINE": "1", "API_KEY": KEY}
RAY = {
    "PYTHONPATH": str(ROOT),
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "deploy.ray.serve_app:proxy_middlewares",
}


@dataclass
class Cluster:
    """A local Ray with two processors, and what is deployed on it."""

    folder: Path
    address: str
    url: str
    client: httpx.Client
    config: dict[str, Any] = field(default_factory=lambda: yaml.safe_load((ROOT / "deploy/ray/serve.yaml").read_text()))

    def deploy(self, fewest: int, most: int, **environment: str) -> None:
        """serve.yaml as it is, but for this machine: no card, a port of its own, shorter delays."""
        (app,) = self.config["applications"]
        (deployment,) = app["deployments"]
        self.config["http_options"] |= {"host": "127.0.0.1", "port": self.client.base_url.port}
        app["runtime_env"]["env_vars"] |= environment
        deployment |= {"ray_actor_options": {"num_gpus": 0, "num_cpus": 1}, "health_check_period_s": 1}
        delays = {"upscale_delay_s": 1, "downscale_delay_s": 1}
        deployment["autoscaling_config"] |= {"min_replicas": fewest, "max_replicas": most, **delays}
        file = self.folder / "serve.yaml"
        file.write_text(yaml.safe_dump(self.config))
        command = [Path(sys.executable).with_name("serve"), "run", "--address", self.address, "--non-blocking", file]
        done = subprocess.run(command, env={**os.environ, **RAY}, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def replicas(self) -> list[int]:
        """The process of each replica."""
        return [pid for pid in processes("ray::ServeReplica:gpu-service") if owned(pid)]

    def names(self) -> set[str]:
        """Which replicas answer, of twenty requests."""
        answers = [self.client.get("/info") for _ in range(20)]
        return {answer.headers["x-replica"] for answer in answers if answer.status_code == 200}

    def until_replicas(self, count: int) -> set[str]:
        """Waits until so many answer."""
        return until(lambda: names if len(names := self.names()) == count else None, f"never {count} replicas")


def processes(named: str = "") -> dict[int, int]:
    """The processes whose command has these words in it, and their parents."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            state, parent, *_ = (process / "stat").read_text().rpartition(") ")[2].split()
            if named in command and state != "Z":
                found[int(process.name)] = int(parent)
    return found


def owned(pid: int) -> bool:
    """Whether a process has this cluster's key: it is of this cluster, and not of another on this machine."""
    with contextlib.suppress(OSError):
        return pid != os.getpid() and KEY.encode() in Path(f"/proc/{pid}/environ").read_bytes()
    return False


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process without Ray answers."""
    with program(tmp_path_factory.mktemp("alone"), **SETTINGS) as service:
        service.client.headers.update(HEADERS)
        service.until_answers("/ready", 200)
        return {path: service.client.post(path, json=body).json() for path, body in ASKED.items()}


ASKED: dict[str, Any] = {"/embed": {"texts": TEXTS}, "/bertscore": PAIRS}


@pytest.fixture(scope="module")
def cluster(alone: dict[str, Any]) -> Iterator[Cluster]:
    """Two replicas of serve.yaml's application, ready."""
    # A short path: Ray's sockets lie in it, and their names may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        port, web = free_port(), free_port()
        options = [f"--port={port}", "--num-cpus=2", "--num-gpus=0", "--object-store-memory=80000000"]
        options += [f"--{name}-port={free_port()}" for name in ("ray-client-server", "dashboard-agent-listen")]
        options += ["--node-ip-address=127.0.0.1", "--include-dashboard=false", "--disable-usage-stats", "--block"]
        command = [str(Path(sys.executable).with_name("ray")), "start", "--head", f"--temp-dir={folder}", *options]
        log = Path(folder, "start.log")
        with log.open("wb") as out:
            ray = subprocess.Popen(command, env={**os.environ, **SETTINGS, **RAY}, cwd=ROOT, stdout=out, stderr=out)
        url = f"http://127.0.0.1:{web}"
        client = httpx.Client(base_url=url, headers=HEADERS, timeout=60)
        try:
            until(lambda: b"--block" in log.read_bytes(), "Ray did not start")
            cluster = Cluster(Path(folder), f"127.0.0.1:{port}", url, client)
            cluster.deploy(2, 2)
            until(lambda: client.get("/ready").status_code == 200, "the application did not start")
            cluster.until_replicas(2)
            yield cluster
        finally:
            client.close()
            for pid in filter(owned, processes()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            ray.wait()


@dataclass
class Callers:
    """Callers who ask all the time, each as an ordinary client does: 503 and lost connections are tried again."""

    cluster: Cluster
    right: np.ndarray
    seen: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def call(self) -> None:
        """One caller's requests, until all are told to stop."""
        with httpx.Client(base_url=self.cluster.url, headers=HEADERS, timeout=45) as client:
            while not self.over.is_set():
                for _attempt in range(12):
                    if self.ask(client):
                        break
                else:
                    self.lost.append("twelve attempts")

    def ask(self, client: httpx.Client) -> bool:
        """Whether a request is settled, be it by a wrong answer."""
        try:
            answer = client.post("/embed", json={"texts": TEXTS})
        except httpx.TransportError as error:
            self.seen[type(error).__name__] += 1
            return self.over.wait(1.0)
        self.seen[str(answer.status_code)] += 1
        if answer.status_code == 503 and answer.headers["retry-after"].isdigit():
            return self.over.wait(int(answer.headers["retry-after"]))
        if answer.status_code != 200 or np.abs(np.array(answer.json()["embeddings"]) - self.right).max() > 1e-5:
            self.lost.append(f"{answer.status_code} {answer.text[:200]}")
        return True


@contextlib.contextmanager
def callers(cluster: Cluster, alone: dict[str, Any], count: int) -> Iterator[Callers]:
    """So many callers meanwhile; afterwards, that none of them lost anything."""
    these = Callers(cluster, np.array(alone["/embed"]["embeddings"]))
    threads = [threading.Thread(target=these.call) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        until(lambda: these.seen["200"], "no caller got an answer")
        yield these
    finally:
        these.over.set()
        for thread in threads:
            thread.join(60)
    assert not these.lost, (these.lost[:3], these.seen)


def test_both_replicas_answer_as_one_process_does(cluster: Cluster, alone: dict[str, Any]) -> None:
    for path, body in ASKED.items():
        answers = [cluster.client.post(path, json=body) for _ in range(12)]
        assert len({answer.headers["x-replica"] for answer in answers}) == 2
        for answer in answers:
            assert {name: kept for name, kept in answer.json().items() if not numbers(kept)} == {
                name: kept for name, kept in alone[path].items() if not numbers(kept)
            }
            for name in filter(lambda name: numbers(alone[path][name]), alone[path]):
                np.testing.assert_allclose(answer.json()[name], alone[path][name], atol=1e-5)


def numbers(value: Any) -> bool:
    """Whether a field of an answer is a list of them."""
    return isinstance(value, list) and bool(value)


def test_every_path_but_health_asks_for_the_one_key(cluster: Cluster) -> None:
    assert httpx.get(f"{cluster.url}/health").status_code == 200
    wrong = {"X-API-Key": "another"}
    refused = [httpx.get(f"{cluster.url}{path}", headers=wrong) for path in ("/info", "/docs", "/none") * 3]
    assert {(answer.status_code, answer.json()["detail"]) for answer in refused} == {(401, "Unauthorized")}
    assert all(len(answer.headers.get_list("x-request-id")) == 1 for answer in refused)


def test_a_killed_replica_costs_nobody_an_answer_and_comes_back(cluster: Cluster, alone: dict[str, Any]) -> None:
    before, names = cluster.replicas(), cluster.names()
    engines = [pid for pid, parent in processes("gpu_engine").items() if parent == before[0]]
    assert (len(before), len(engines)) == (2, 1)
    with callers(cluster, alone, 4):
        os.kill(before[0], signal.SIGKILL)
        until(lambda: not set(engines) & set(processes("gpu_engine")), "its engine lives on")
        until(lambda: len(cluster.replicas()) == 2, "Ray did not start another")
        until(lambda: len(cluster.names()) == 2, "the new one did not answer")
    assert len(cluster.names() & names) == 1


def test_an_update_replaces_every_replica_and_costs_nobody_an_answer(cluster: Cluster, alone: dict[str, Any]) -> None:
    before = cluster.names()
    with callers(cluster, alone, 2):
        cluster.deploy(2, 2, GPU_MAX_CONCURRENT="1", GPU_MAX_QUEUE="2")
        until(lambda: not cluster.names() & before, "the old ones are still there")
        cluster.until_replicas(2)
    limits = [cluster.client.get("/info").json()["limits"] for _ in range(8)]
    assert {limit["max_queue"] for limit in limits} == {2}


def test_a_burst_is_refused_with_the_time_to_come_back(cluster: Cluster) -> None:
    refused: list[httpx.Response] = []
    for path, name, busy in (("/embed", "texts", 503), ("/v1/embeddings", "input", 429)):
        answers = at_once(cluster, path, {name: ["A long text about cats and mats. " * 30] * 60}, 24)
        assert {answer.status_code for answer in answers} == {200, busy}
        refused += [answer for answer in answers if answer.status_code == busy]
    for answer in refused:
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["detail"].startswith("GPU busy - retry later")
        assert answer.headers["x-replica"]  # the service's own refusal, not Ray's


def at_once(cluster: Cluster, path: str, body: Any, count: int) -> list[httpx.Response]:
    """The answers to so many requests that are sent together."""
    answers: list[httpx.Response] = []

    def ask() -> None:
        answers.append(httpx.post(f"{cluster.url}{path}", json=body, headers=HEADERS, timeout=90))

    threads = [threading.Thread(target=ask) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def test_replicas_go_when_there_is_little_to_do_and_come_when_there_is_much(
    cluster: Cluster, alone: dict[str, Any]
) -> None:
    cluster.deploy(1, 2)
    with callers(cluster, alone, 1):
        until(lambda: len(cluster.replicas()) == 1, "both stayed")
    left = cluster.names()
    with callers(cluster, alone, 4):
        grown = cluster.until_replicas(2)
    assert len(left) == 1
    assert len(grown) == 2, "no other one was started"

"""Shared fixtures: the real app with fake or real engines, and small models made on the spot."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from gpu_engine.bertscore import load_bertscore
from gpu_engine.embedding import load_embed
from gpu_engine.work import LoadOptions

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports the hub client

import httpx
import numpy as np
import pytest
import torch

import gpu_service
from gpu_engine.fair_queue import Submission
from gpu_engine.link import Launch, Launched
from gpu_engine.messages import Stop
from gpu_engine.model_files import ModelName
from gpu_engine.process import hand_over
from gpu_engine.work import BertScoreResult, BertScoreTask, EmbedResult, EmbedTask, NotFinite
from gpu_engine.worker import DeviceWorker
from gpu_service import Settings

for _name in [name for name in os.environ if name.lower() in Settings.model_fields]:
    del os.environ[_name]  # what the machine that runs the tests has set for a service of its own

JSON = {"content-type": "application/json"}


def settings(**changes: Any) -> Settings:
    """Settings for tests: no key, CPU, MiniLM names, time for real work on a busy machine; all can be changed."""
    values: dict[str, Any] = {"torch_device": "cpu", "model_bertscore": "all-MiniLM-L6-v2", "gpu_queue_timeout": 60}
    return Settings(**{**values, **changes})


def load_folder(kind: str, folder: Path, name: ModelName | None = None, **options: Any) -> Any:
    """The real engine of a model in a folder, in float32 on the CPU unless the options say otherwise."""
    load = load_bertscore if kind == "bertscore" else load_embed
    wanted = LoadOptions(**{"dtype": "float32", **options})
    return load(name or ModelName(folder.name, path=folder), folder, torch.device("cpu"), wanted, lambda *_: None)


def without_options(load: Callable[..., Any]) -> Callable[..., Any]:
    """A loader as the engine's loop calls it, from one that takes kind, name and progress."""
    return lambda kind, name, options, progress: load(kind, name, progress)


def value_of(text: str) -> float:
    """The number a fake engine gives a text: a function of the text alone."""
    return float(sum(text.encode()) % 997 + 1)


class Gate:
    """An event that can also let a number of batches through while it stays closed."""

    def __init__(self) -> None:
        self._condition, self._open, self._passes = threading.Condition(), True, 0

    def set(self) -> None:
        with self._condition:
            self._open = True
            self._condition.notify_all()

    def clear(self) -> None:
        with self._condition:
            self._open, self._passes = False, 0

    def pass_through(self, count: int = 1) -> None:
        with self._condition:
            self._passes += count
            self._condition.notify_all()

    def wait(self, timeout_s: float) -> bool:
        with self._condition:
            passed = self._condition.wait_for(lambda: self._open or self._passes > 0, timeout_s)
            if not self._open:
                self._passes -= 1
            return passed


@dataclass(eq=False)
class FakeEngine:
    """An engine that computes nothing and can be held, made to fail, and asked what it ran.

    hold: batches wait at it while it is closed. begun, batches: batches that began, and the texts of those
    that were let through. fail: called with each batch's texts before it is answered; it raises what the
    device should raise. output: a text's number, or the exception that stands for it. jobs: what was asked.
    """

    kind: str
    hold: Gate = field(default_factory=Gate)
    fail: Callable[[list[str]], None] = lambda texts: None
    output: Callable[[str], Any] = value_of
    begun: int = 0
    batches: list[list[str]] = field(default_factory=list)
    jobs: list[Any] = field(default_factory=list)

    def prepare(self, request: Any) -> FakeWork:
        self.jobs.append(request)
        return FakeWork(self, request)

    def run(self, texts: Sequence[str], variant: int) -> FakeOutputs:
        self.begun += 1
        assert self.hold.wait(30), "a test never let its batch go"
        self.batches.append(list(texts))
        self.fail(list(texts))
        return self.recall([self.output(text) for text in texts])

    def retry(self, texts: Sequence[str], variant: int) -> FakeOutputs:
        return self.recall([self.output(text) for text in texts])

    def recall(self, kept: Sequence[Any]) -> FakeOutputs:
        return FakeOutputs(list(kept))

    @property
    def texts_run(self) -> list[str]:
        """Every text that was computed, in the order of the batches."""
        return [text for batch in self.batches for text in batch]

    def describe(self) -> dict[str, Any]:
        return {"dtype": "float32", "layers": 1, "backend": "fake"}


@dataclass
class FakeOutputs:
    """A number a text, or the exception that stands for it."""

    values: list[Any]

    def bad(self) -> list[int]:
        return [place for place, value in enumerate(self.values) if isinstance(value, Exception)]

    def nbytes(self, place: int) -> int:
        return 8

    def keep(self, place: int) -> Any:
        return self.values[place]


class FakeWork:
    """One request of a fake engine; a text's tokens are its characters."""

    def __init__(self, engine: FakeEngine, job: Any) -> None:
        self.job = job
        self.texts = list(job.texts if isinstance(job, EmbedTask) else job.candidates)
        self.values: dict[int, Any] = {}
        self.variant = getattr(job, "layers", None) or 0
        self.costs = [max(1, len(text)) for text in self.texts]
        self.order = sorted(range(len(self.texts)), key=lambda index: -self.costs[index])

    def text(self, index: int) -> str:
        return self.texts[index]

    def key(self, index: int) -> str:
        return self.texts[index]

    def absorb(self, indexes: Sequence[int], outputs: FakeOutputs, places: Sequence[int]) -> None:
        self.values.update((index, outputs.values[place]) for index, place in zip(indexes, places))

    def landed(self, indexes: Sequence[int]) -> None:
        pass

    def result(self) -> Any:
        rows = np.array([[self.values[index], 1.0] for index in range(len(self.texts))], np.float32).reshape(-1, 2)
        if isinstance(self.job, BertScoreTask):
            scores = np.ascontiguousarray(rows[:, 0])
            return BertScoreResult(scores, scores, scores, 1, [], [], settings="_L1_no-idf_version=0")
        return EmbedResult(rows if self.texts else np.zeros((0, 0), "f4"), [], [len(text) for text in self.texts])


def raising(error: BaseException) -> Callable[[list[str]], None]:
    """A `FakeEngine.fail` that lets every batch fail so."""

    def fail(texts: list[str]) -> None:
        raise error

    return fail


def in_worker(worker: DeviceWorker, engine: Any, task: Any) -> tuple[Submission, Future[Any]]:
    """What a worker was given of a task, and the future of its result."""
    future: Future[Any] = Future()
    return worker.submit(engine, engine.prepare(task), functools.partial(hand_over, future)), future


def outputs_of(engine: Any, work: Any) -> Any:
    """The result of a work whose texts are computed in one batch, as the worker does it."""
    indexes = work.order
    if indexes:
        outputs = engine.run([work.text(index) for index in indexes], work.variant)
        work.absorb(indexes, outputs, range(len(indexes)))
        if bad := outputs.bad():
            again = engine.retry([work.text(indexes[place]) for place in bad], work.variant)
            work.absorb([indexes[place] for place in bad], again, range(len(bad)))
            if again.bad():
                raise NotFinite("the model gave no finite numbers")
        work.landed(indexes)
    return work.result()


class FakeLoader:
    """Loads fake engines; a load can be held, counted, and made to fail."""

    def __init__(self) -> None:
        self.loads: list[str] = []
        self.hold = threading.Event()
        self.hold.set()
        self.error: BaseException | None = None
        self.errors: dict[str, BaseException] = {}  # of single models
        self.engines: dict[str, FakeEngine] = {}

    def __call__(self, kind: str, name: ModelName, progress: Callable[[str, float], None]) -> FakeEngine:
        self.loads.append(f"{kind}:{name.public}")
        progress("loading", 0.5)
        assert self.hold.wait(30), "a test never let its load go"
        error = self.errors.get(f"{kind}:{name.public}", self.error)
        if error is not None:
            raise error
        return self.engines.setdefault(f"{kind}:{name.public}", FakeEngine(kind))


def speaking(messages: list[Any]) -> Launch:
    """An engine that sends messages, and ends when it is told to."""

    def speak(connection: Any) -> None:
        with connection:
            connection.send(messages)
            while not any(isinstance(message, Stop) for message in connection.recv()):
                pass

    def launch() -> Launched:
        ours, theirs = Pipe()
        threading.Thread(target=speak, args=(theirs,), daemon=True).start()
        return Launched(ours, lambda: None, lambda: "ended")

    return launch


class Client(httpx.AsyncClient):
    """A client that gives up after half a minute, so that a service that hangs is a failed test."""

    async def request(self, *args: Any, **kwargs: Any) -> httpx.Response:
        return await asyncio.wait_for(super().request(*args, **kwargs), 30)


class Service:
    """The real app in this process, its client, and its fake engines."""

    def __init__(self, app: Any, client: httpx.AsyncClient, loader: FakeLoader) -> None:
        self.app, self.client, self.loader = app, client, loader

    @property
    def runtime(self) -> gpu_service.Runtime:
        return self.app.state.runtime

    @property
    def embed_engine(self) -> FakeEngine:
        return self.loader.engines["embed:all-MiniLM-L6-v2"]

    @property
    def bertscore_engine(self) -> FakeEngine:
        return self.loader.engines["bertscore:all-MiniLM-L6-v2"]

    async def embed(self, *texts: str, **more: Any) -> httpx.Response:
        return await self.client.post("/embed", json={"texts": list(texts), **more})

    async def bertscore(self, *candidates: str, **more: Any) -> httpx.Response:
        body = {"candidates": list(candidates), "references": list(candidates), **more}
        return await self.client.post("/bertscore", json=body)

    async def status(self) -> dict[str, Any]:
        response = await self.client.get("/status")
        assert response.status_code == 200
        return response.json()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits until a condition on the service holds; fails after ten seconds."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + 10
        while not condition():
            assert loop.time() < deadline, "the condition never held"
            await asyncio.sleep(0.002)

    async def counted(self, counter: str, value: float) -> None:
        """Waits until /info counts so many; the engine reports a few times a second."""
        await self.until(lambda: self.runtime.state.counters.get(counter) == value)
        assert (await self.client.get("/info")).json()["counters"][counter] == value

    async def raw(
        self, path: str, *, method: str = "GET", headers: Sequence[tuple[bytes, bytes]] = (), receive: Any = None
    ) -> tuple[int, dict[bytes, bytes], bytes]:
        """An ASGI call without an HTTP client in between: status, headers and body of the answer."""
        return await call(self.app, path, method=method, headers=headers, receive=receive)


async def call(
    app: Any,
    path: str,
    *,
    method: str = "GET",
    headers: Sequence[tuple[bytes, bytes]] = (),
    receive: Any = None,
    client: str = "127.0.0.1",
) -> tuple[int, dict[bytes, bytes], bytes]:
    """Calls an ASGI application from an address; `receive` gives the request's messages, by default one empty body."""
    sent: list[dict[str, Any]] = []

    async def empty() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"host", b"service"), *headers],
        "client": (client, 50000),
        "server": ("service", 80),
    }
    await asyncio.wait_for(app(scope, receive or empty, send), 30)
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], dict(sent[0]["headers"]), body


@contextlib.asynccontextmanager
async def running(config: Settings, loader: Any = None, *, wait: bool = True, **runtime: Any) -> AsyncIterator[Service]:
    """The app with its lifespan, ready unless `wait` is false. runtime: what its `Runtime` is to be made with."""
    loader = loader if loader is not None else FakeLoader()
    app = gpu_service.create_app(config, engines=without_options(loader))
    if runtime:
        app.state.runtime = gpu_service.Runtime(config, **{"engines": without_options(loader), **runtime})
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with Client(transport=transport, base_url="http://service") as client:
            service = Service(app, client, loader)
            if wait:
                await service.until(lambda: all(e.state != "loading" for e in service.runtime.models.entries()))
            try:
                yield service
            finally:
                if isinstance(loader, FakeLoader):
                    loader.hold.set()
                    for engine in loader.engines.values():
                        engine.hold.set()


# --- what several files ask and check ------------------------------------------------------------------


def words(name: str, count: int) -> list[str]:
    """`count` different texts of sixteen tokens each."""
    return [f"{name} {n:03}".ljust(16, ".") for n in range(count)]


def advance(seconds: float) -> None:
    """Moves the event loop's clock on, for what waits for a time; the clients' half minute runs on it too."""
    loop = asyncio.get_running_loop()
    now = loop.time
    loop.time = lambda: now() + seconds  # type: ignore[method-assign]


async def ticks(count: int) -> None:
    """Lets the event loop turn so many times."""
    for _ in range(count):
        await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def device_held(config: Settings) -> AsyncIterator[tuple[Service, FakeEngine]]:
    """A service whose device is busy with a batch of another request, so that what comes next queues up.

    `engine.hold.set()` lets everything go; `pass_through` one batch after the other.
    """
    async with running(config) as service:
        engine = service.embed_engine
        engine.hold.clear()
        blocker = asyncio.create_task(service.embed("blocker".ljust(16)))
        await service.until(lambda: engine.begun == 1)
        yield service, engine
        engine.hold.set()
        assert (await blocker).status_code == 200


async def submitted(service: Service, engine: FakeEngine, *texts: str, **more: Any) -> asyncio.Task[httpx.Response]:
    """A request that has reached the worker."""
    before = len(engine.jobs)
    ask = service.bertscore if engine.kind == "bertscore" else service.embed
    task = asyncio.create_task(ask(*texts, **more))
    await service.until(lambda: len(engine.jobs) > before)
    return task


def refused(response: httpx.Response, status: int, code: str) -> str:
    """Checks an error answer's status, code and form; returns its message."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"detail", "code"}
    assert body["code"] == code
    assert isinstance(body["detail"], str)
    assert body["detail"]
    for internal in ("Traceback", 'File "', ".py", "site-packages", "/root", "0x"):
        assert internal not in response.text, response.text
    return str(body["detail"])


def retry_after(response: httpx.Response) -> int:
    """Checks the seconds after which a caller should come back."""
    value = response.headers["Retry-After"]
    assert value.isdecimal()
    assert int(value) >= 1
    return int(value)


def sends_a_text() -> Callable[[], Any]:
    """Gives a request for one embedding, and then stays on the line."""
    messages = [{"type": "http.request", "body": b'{"texts":["a"]}', "more_body": False}]

    async def receive() -> Any:
        return messages.pop() if messages else await asyncio.Event().wait()

    return receive


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"

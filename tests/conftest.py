"""Shared fixtures: the real app with fake or real engines, and small models made on the spot."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports the hub client

import httpx
import numpy as np
import pytest

import gpu_service
from gpu_service import BertScoreJob, BertScoreResult, EmbedJob, EmbedResult, Item, ModelName, Settings

Answer = Callable[[str], float]


def settings(**changes: Any) -> Settings:
    """Settings for tests: no key, CPU, MiniLM names; anything can be changed."""
    values: dict[str, Any] = {"torch_device": "cpu", "model_bertscore": "all-MiniLM-L6-v2", **changes}
    return Settings(**values)


def value_of(text: str) -> float:
    """The number a fake engine gives a text: a function of the text alone."""
    return float(sum(text.encode()) % 997 + 1)


@dataclass(eq=False)
class FakeEngine:
    """An engine that computes nothing and can be held, made to fail, and asked what it ran.

    hold: batches wait until it is set. started: set when a batch begins. fail: called with each batch's
    texts before it is answered; it raises what the device should raise.
    """

    kind: str
    hold: threading.Event = field(default_factory=threading.Event)
    started: threading.Event = field(default_factory=threading.Event)
    fail: Callable[[list[str]], None] = lambda texts: None
    output: Callable[[str], Any] = value_of
    batches: list[list[str]] = field(default_factory=list)
    prepared: int = 0

    def __post_init__(self) -> None:
        self.hold.set()

    def prepare(self, request: Any) -> FakeWork:
        self.prepared += 1
        return FakeWork(self, request)

    def run(self, items: Sequence[Item]) -> list[Any]:
        texts = [item.ids.tobytes().decode() for item in items]
        self.started.set()
        assert self.hold.wait(30), "a test never let its batch go"
        self.batches.append(texts)
        self.fail(texts)
        return [np.array([self.output(text), 1.0], np.float32) for text in texts]

    def describe(self) -> dict[str, Any]:
        return {"dtype": "float32", "layers": 1, "backend": "fake"}


class FakeWork:
    """One request of a fake engine; a text's tokens are its characters."""

    def __init__(self, engine: FakeEngine, job: Any) -> None:
        self.job = job
        self.texts = list(job.texts if isinstance(job, EmbedJob) else job.candidates)
        self.outputs: list[np.ndarray | None] = [None] * len(self.texts)
        self.items = [
            Item((engine.kind, text), np.frombuffer(text.encode(), np.uint8), 0, slot, max(1, len(text)))
            for slot, text in enumerate(self.texts)
        ]

    def absorb(self, outputs: Sequence[tuple[Item, Any]]) -> None:
        for item, output in outputs:
            self.outputs[item.slot] = output

    def result(self) -> Any:
        rows = np.stack([row for row in self.outputs if row is not None]) if self.texts else np.zeros((0, 0), "f4")
        if isinstance(self.job, BertScoreJob):
            scores = np.ascontiguousarray(rows[:, 0]) if self.texts else np.zeros(0, np.float32)
            return BertScoreResult(scores, scores, scores, 1, [], [])
        return EmbedResult(rows, [], [len(text) for text in self.texts])


class FakeLoader:
    """Loads fake engines; a load can be held, counted, and made to fail."""

    def __init__(self) -> None:
        self.loads: list[str] = []
        self.hold = threading.Event()
        self.hold.set()
        self.error: BaseException | None = None
        self.engines: dict[str, FakeEngine] = {}

    def __call__(self, kind: str, name: ModelName, progress: Callable[[str, float], None]) -> FakeEngine:
        self.loads.append(f"{kind}:{name.public}")
        progress("loading", 0.5)
        assert self.hold.wait(30), "a test never let its load go"
        if self.error is not None:
            raise self.error
        return self.engines.setdefault(f"{kind}:{name.public}", FakeEngine(kind))


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

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits until a condition on the service holds; fails after ten seconds."""
        async with asyncio_timeout(10):
            while not condition():  # noqa: ASYNC110 - the condition changes on other threads
                await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def asyncio_timeout(seconds: float) -> AsyncIterator[None]:
    """asyncio.timeout, which Python 3.10 lacks."""
    task = asyncio.current_task()
    assert task is not None
    handle = asyncio.get_running_loop().call_later(seconds, task.cancel)
    try:
        yield
    finally:
        handle.cancel()


@contextlib.asynccontextmanager
async def running(config: Settings, loader: Any = None, *, wait: bool = True) -> AsyncIterator[Service]:
    """The app with its lifespan, ready unless `wait` is false."""
    loader = loader if loader is not None else FakeLoader()
    app = gpu_service.create_app(config, engines=loader)
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
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


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"

"""Callers who hang up, wherever their request stands: the slot, the place and the rest of the work are free at once."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch
from conftest import FakeEngine, FakeLoader, in_worker, running, settings
from live import LiveService, post, request_bytes, serving, until

from gpu_engine.tokenizing import abandoned
from gpu_engine.work import EmbedTask
from gpu_engine.worker import DeviceWorker


def caller(service: LiveService, path: str, body: dict[str, Any], receive_buffer: int | None = None) -> socket.socket:
    """A caller who has sent a request and reads nothing yet."""
    sock = socket.socket()
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.connect(service.address)
    sock.sendall(request_bytes(path, json.dumps(body).encode()))
    return sock


def idle(service: LiveService) -> bool:
    """Whether no slot, no place in the queue and no job is taken."""
    guard, jobs = service.runtime.admission, service.runtime.jobs
    return not guard.in_flight and not guard.waiting and not jobs.active


@pytest.fixture
def fakes() -> Iterator[tuple[LiveService, FakeEngine]]:
    loader = FakeLoader()
    with serving(settings(gpu_max_concurrent=1, gpu_max_queue=1, gpu_batch_tokens=16), loader) as service:
        engine = loader.engines["embed:all-MiniLM-L6-v2"]
        try:
            yield service, engine
        finally:
            engine.hold.set()


def test_a_caller_who_hangs_up_while_running_frees_the_slot_and_drops_the_rest(
    fakes: tuple[LiveService, FakeEngine],
) -> None:
    service, engine = fakes
    engine.hold.clear()
    leaving = caller(service, "/embed", {"texts": [f"text number {n}" for n in range(50)]})
    until(lambda: engine.begun == 1)
    leaving.close()
    until(lambda: idle(service))  # while its batch is on the device
    assert engine.begun == 1
    assert httpx.get(f"{service.url}/status").json()["recent_jobs"][0]["outcome"] == "cancelled"
    with caller(service, "/embed", {"texts": ["next"]}) as following:
        until(lambda: len(engine.jobs) == 2)  # messages keep their order: the engine knows of the one who left
        engine.hold.set()
        assert b" 200 " in following.recv(1000)
    assert len(engine.batches) == 2


def test_a_caller_who_hangs_up_while_waiting_frees_the_place_and_is_never_computed(
    fakes: tuple[LiveService, FakeEngine],
) -> None:
    service, engine = fakes
    engine.hold.clear()
    staying = caller(service, "/embed", {"texts": ["first"]})
    until(lambda: engine.begun == 1)
    leaving = caller(service, "/embed", {"texts": ["second"]})
    until(lambda: service.runtime.admission.waiting == 1)
    leaving.close()
    until(lambda: service.runtime.admission.waiting == 0)
    third = caller(service, "/embed", {"texts": ["third"]})
    until(lambda: service.runtime.admission.waiting == 1)
    engine.hold.set()
    for sock in (staying, third):
        assert b" 200 " in sock.recv(1000)
        sock.close()
    assert engine.texts_run == ["first", "third"]
    until(lambda: idle(service))


def test_a_caller_who_hangs_up_while_the_model_loads_leaves_the_load_to_the_next() -> None:
    loader = FakeLoader()
    with serving(settings(), loader) as service:
        loader.hold.clear()
        leaving = caller(service, "/embed", {"texts": ["a"], "model": "some/model"})
        until(lambda: len(service.runtime.jobs.active) == 1)
        leaving.close()
        until(lambda: idle(service))
        loader.hold.set()
        answer = httpx.post(f"{service.url}/embed", json={"texts": ["a"], "model": "some/model"})
        assert answer.status_code == 200
        assert loader.loads.count("embed:some/model") == 1


def test_a_caller_who_hangs_up_while_reading_a_large_answer_does_no_harm(caplog: pytest.LogCaptureFixture) -> None:
    with serving(settings(gpu_max_concurrent=1, gpu_max_batch_size=2000)) as service:
        texts = [f"text {n % 50}" for n in range(2000)]  # an answer of megabytes, more than sockets buffer
        for _ in range(3):
            reader = caller(service, "/embed", {"texts": texts}, receive_buffer=4096)
            assert reader.recv(15) == b"HTTP/1.1 200 OK"
            assert idle(service), "an answer that is being read holds no slot"
            reader.close()
        assert httpx.post(f"{service.url}/embed", json={"texts": ["next"]}, timeout=30).status_code == 200
        until(lambda: idle(service))
    assert not [record for record in caplog.records if record.exc_info]


def test_a_caller_who_announces_more_than_he_sends_and_goes_leaves_nothing_behind(
    fakes: tuple[LiveService, FakeEngine],
) -> None:
    service, engine = fakes
    request = request_bytes("/embed", b'{"texts":["a"]}').replace(b"Content-Length: 15", b"Content-Length: 500")
    for _ in range(20):
        with socket.create_connection(service.address) as sock:
            sock.sendall(request)
    assert post(service, "/embed", {"texts": ["b"]}).status_code == 200
    assert idle(service)
    assert engine.texts_run == ["b"]


@pytest.mark.anyio
async def test_a_tokenisation_learns_that_its_caller_hung_up() -> None:
    async with running(settings(gpu_max_concurrent=1)) as service:
        engine, begun, learned = service.embed_engine, threading.Event(), threading.Event()

        def prepare(request: Any) -> Any:
            begun.set()
            until(abandoned.get())
            learned.set()
            raise concurrent.futures.CancelledError

        engine.prepare = prepare  # type: ignore[method-assign]
        asking = asyncio.create_task(service.runtime.run(None, EmbedTask(["x" * 9000])))
        await service.until(begun.is_set)
        assert not learned.is_set()
        asking.cancel()
        await service.until(learned.is_set)
        assert service.runtime.admission.in_flight == 0


def test_work_that_is_cancelled_ends_its_future_and_is_never_computed() -> None:
    engine = FakeEngine("embed")
    worker = DeviceWorker(torch.device("cpu"), 16, 0, lambda detail: None, lambda: None)
    (left, nothing), (_, kept) = (in_worker(worker, engine, EmbedTask([name])) for name in ("a", "b"))
    left.cancel()
    worker.start()
    kept.result(30)
    worker.stop(10)
    assert not nothing.done()
    assert engine.texts_run == ["b"]

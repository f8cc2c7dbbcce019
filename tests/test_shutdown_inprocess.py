"""Stopping: newcomers and the waiting are refused with 503 and Retry-After, what is running finishes."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from conftest import advance, call, refused, retry_after, running, sends_a_text, settings, ticks

pytestmark = pytest.mark.anyio


def stopped(response: httpx.Response) -> None:
    refused(response, 503, "shutting_down")
    retry_after(response)


async def test_what_is_running_finishes_and_the_waiting_are_refused() -> None:
    async with running(settings(gpu_max_concurrent=1, gpu_queue_timeout=3600, gpu_batch_tokens=16)) as service:
        engine = service.embed_engine
        engine.hold.clear()
        texts = [f"text number {n:04}" for n in range(5)]
        first = asyncio.create_task(service.embed(*texts))
        await service.until(lambda: engine.begun == 1)
        waiting = [asyncio.create_task(service.embed(f"waits {n}")) for n in range(3)]
        await service.until(lambda: service.runtime.admission.waiting == 3)
        service.runtime.begin_stop()
        for response in await asyncio.gather(*waiting):
            stopped(response)
        stopped(await service.embed("a newcomer"))
        stopped(await service.bertscore("another"))
        assert not first.done()
        engine.hold.set()
        response = await first
        assert response.status_code == 200
        assert len(response.json()["embeddings"]) == 5
        assert engine.texts_run == texts


async def test_those_who_wait_for_a_model_are_refused_too() -> None:
    async with running(settings(gpu_queue_timeout=3600)) as service:
        service.loader.hold.clear()
        waiting = asyncio.create_task(service.embed("a", model="some/model"))
        await service.until(lambda: "embed:some/model" in service.loader.loads)
        service.runtime.begin_stop()
        stopped(await waiting)


async def test_health_answers_while_the_service_stops() -> None:
    async with running(settings()) as service:
        service.runtime.begin_stop()
        assert (await service.client.get("/health")).status_code == 200


async def test_work_that_outlasts_the_worker_is_refused_rather_than_left_hanging() -> None:
    async with running(settings(gpu_batch_tokens=16)) as service:
        engine = service.embed_engine
        engine.hold.clear()
        asking = asyncio.create_task(service.embed(*(f"text number {n:04}" for n in range(5))))
        await service.until(lambda: engine.begun == 1)
        stopping = asyncio.create_task(service.runtime.stop())
        await service.until(lambda: service.runtime.admission.closing)
        stopped(await service.embed("a newcomer"))
        engine.hold.set()
        stopped(await asking)
        await stopping
        assert len(engine.batches) < 5


async def test_stopping_twice_does_no_harm() -> None:
    async with running(settings()) as service:
        await service.runtime.stop()
        stopped(await service.embed("a"))


async def test_what_still_runs_after_the_request_timeout_is_refused_before_the_server_hangs_up() -> None:
    """A request of OpenAI's form may take many times GPU_REQUEST_TIMEOUT; a stop does not wait for that."""
    async with running(settings(gpu_request_timeout=5, gpu_max_batch_size=1, gpu_batch_tokens=16)) as service:
        engine = service.embed_engine
        engine.hold.clear()
        body = {"input": [f"text number {n:04}" for n in range(100)]}  # may take 500 s
        asking = asyncio.create_task(service.client.post("/v1/embeddings", json=body))
        await service.until(lambda: engine.begun == 1)
        advance(6)
        await ticks(50)
        assert not asking.done()
        service.runtime.begin_stop()
        advance(4)
        await ticks(50)
        assert not asking.done(), "it has GPU_REQUEST_TIMEOUT to end by itself"
        advance(2)
        await service.until(asking.done)
        response = await asking
        assert (response.status_code, response.json()["error"]["code"]) == (503, "shutting_down")
        retry_after(response)
        assert service.runtime.admission.in_flight == 0


async def test_a_request_that_outlasts_the_servers_grace_is_told_to_retry(caplog: pytest.LogCaptureFixture) -> None:
    tasks: list[asyncio.Task[Any] | None] = []

    async with running(settings()) as service:

        async def app(scope: Any, receive: Any, send: Any) -> None:
            tasks.append(asyncio.current_task())
            await service.app(scope, receive, send)

        service.embed_engine.hold.clear()
        headers = [(b"content-type", b"application/json")]
        asking = asyncio.create_task(call(app, "/embed", method="POST", headers=headers, receive=sends_a_text()))
        await service.until(lambda: service.embed_engine.begun == 1)
        (task,) = tasks
        assert task is not None
        task.cancel()
        status, answered, body = await asking
        assert status == 503
        assert int(answered[b"retry-after"]) >= 1
        assert b"shutting_down" in body
    assert not [record for record in caplog.records if record.exc_info]

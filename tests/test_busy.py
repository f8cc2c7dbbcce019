"""More callers than slots: they wait, then 503 with a computed Retry-After; and work that takes too long is 504."""

from __future__ import annotations

import asyncio
import math
import time

import pytest
from conftest import refused, retry_after, running, settings, submitted

import gpu_service
from gpu_service import Admission

pytestmark = pytest.mark.anyio


async def test_a_request_over_the_queues_length_is_busy_at_once() -> None:
    async with running(settings(gpu_max_concurrent=1, gpu_max_queue=1, gpu_queue_timeout=3600)) as service:
        service.embed_engine.hold.clear()
        first = asyncio.create_task(service.embed("a"))
        await service.until(lambda: service.runtime.admission.in_flight == 1)
        second = asyncio.create_task(service.embed("b"))
        await service.until(lambda: service.runtime.admission.waiting == 1)
        for response in (await service.embed("c"), await service.bertscore("c")):
            assert refused(response, 503, "busy") == f"GPU busy - retry later, in about {retry_after(response)} s"
        service.embed_engine.hold.set()
        assert [(await first).status_code, (await second).status_code] == [200, 200]
        assert (await service.embed("d")).status_code == 200


async def test_a_burst_gets_no_more_than_the_slots_and_the_queue() -> None:
    async with running(settings(gpu_max_concurrent=2, gpu_max_queue=3, gpu_queue_timeout=3600)) as service:
        service.embed_engine.hold.clear()
        burst = [asyncio.create_task(service.embed(f"text {n}")) for n in range(20)]
        await service.until(lambda: sum(task.done() for task in burst) == 15)
        queue = (await service.status())["queue"]
        assert queue == {"max_concurrent": 2, "in_flight": 2, "available_slots": 0, "waiting_estimate": 3}
        service.embed_engine.hold.set()
        statuses = [response.status_code for response in await asyncio.gather(*burst)]
        assert sorted(statuses) == [200] * 5 + [503] * 15
        assert len(service.embed_engine.texts_run) == 5


async def test_with_no_queue_a_request_is_busy_when_the_slots_are_taken() -> None:
    async with running(settings(gpu_max_concurrent=1, gpu_max_queue=0)) as service:
        service.embed_engine.hold.clear()
        first = asyncio.create_task(service.embed("a"))
        await service.until(lambda: service.runtime.admission.in_flight == 1)
        refused(await service.embed("b"), 503, "busy")
        service.embed_engine.hold.set()
        assert (await first).status_code == 200


async def test_no_slot_within_the_queue_timeout_is_busy() -> None:
    async with running(settings(gpu_max_concurrent=1, gpu_queue_timeout=0.03)) as service:
        service.embed_engine.hold.clear()
        first = asyncio.create_task(service.embed("a"))
        await service.until(lambda: service.runtime.admission.in_flight == 1)
        response = await service.embed("b")
        assert refused(response, 503, "busy") == f"GPU busy - retry later, in about {retry_after(response)} s"
        assert service.runtime.admission.waiting == 0
        service.embed_engine.hold.set()
        assert (await first).status_code == 200
        assert service.embed_engine.texts_run == ["a"]


async def test_longer_than_the_request_timeout_is_504_and_the_work_is_dropped() -> None:
    async with running(settings(gpu_request_timeout=0.05, gpu_batch_tokens=16, gpu_max_concurrent=1)) as service:
        engine = service.embed_engine
        engine.hold.clear()
        response = await service.embed(*(f"text number {n:04}" for n in range(50)))
        assert "GPU_REQUEST_TIMEOUT" in refused(response, 504, "timeout")
        assert service.runtime.admission.in_flight == 0
        following = await submitted(service, service.bertscore_engine, "next")  # messages keep their order
        engine.hold.set()
        assert (await following).status_code == 200
        assert len(engine.batches) <= 1  # what was on the device when the time was up


# --- Retry-After ---------------------------------------------------------------------------------------


async def test_retry_after_follows_the_work_that_is_queued_and_is_spread() -> None:
    for queued_s in (0.0, 4.0, 20.0):
        guard = Admission(settings(), lambda: queued_s)  # noqa: B023
        given = [guard.retry_after_s() for _ in range(50)]
        assert all(isinstance(seconds, int) for seconds in given)
        assert min(given) >= max(1, queued_s)
        assert max(given) <= math.ceil(1.5 * queued_s + 1)
        if queued_s:
            assert len(set(given)) > 1, "a burst would come back in step"
    for queued_s in (59.0, 1e6):
        given = [Admission(settings(), lambda: queued_s).retry_after_s() for _ in range(200)]  # noqa: B023
        assert 30 < min(given) < max(given) <= 60
        assert len(set(given)) > 10, "a burst would come back in step"


async def test_retry_after_of_a_burst_goes_by_how_long_requests_took_before_the_engine_has_heard_of_it() -> None:
    guard, release = Admission(settings(gpu_max_concurrent=1, gpu_max_queue=8), lambda: 0.0), asyncio.Event()

    async def hold() -> None:
        async with guard.slot(math.inf):
            await release.wait()

    guard.held_s, guard.freed_at = 5.0, time.monotonic()
    burst = [asyncio.create_task(hold()) for _ in range(9)]
    await asyncio.sleep(0)
    given = [guard.retry_after_s() for _ in range(200)]
    assert 30 < min(given) < max(given) <= 60
    assert len(set(given)) > 10, "a burst would come back in step"
    guard.freed_at -= 60
    assert guard.retry_after_s() == 1, "that was long ago"
    release.set()
    await asyncio.gather(*burst)
    assert guard.held_s < 2.0, "these were short"
    assert guard.retry_after_s() == 1, "nobody waits"


async def test_the_work_that_is_queued_is_measured() -> None:
    async with running(settings(gpu_batch_tokens=16)) as service:
        assert (await service.embed("measure the speed")).status_code == 200
        await service.counted("batches", 1)
        assert service.runtime.state.seconds_queued == 0
        service.embed_engine.hold.clear()
        asking = [asyncio.create_task(service.embed("few")), asyncio.create_task(service.embed(*["many " * 9] * 9))]
        await service.until(lambda: service.runtime.admission.in_flight == 2)
        await service.until(lambda: service.runtime.state.seconds_queued > 0)
        service.embed_engine.hold.set()
        await asyncio.gather(*asking)
        await service.until(lambda: service.runtime.state.seconds_queued == 0)


async def test_seconds_until_a_retry_are_spread() -> None:
    for seconds, least, most in ((5, 4, 6), (30, 21, 39), (0.1, 1, 1)):
        given = {gpu_service.spread(seconds) for _ in range(200)}
        assert least <= min(given) <= max(given) <= most
        assert len(given) > 1 or seconds < 1
    assert len({str(gpu_service.stopping().headers) for _ in range(200)}) > 1

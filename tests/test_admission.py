"""Slots, waiting for them and for models: no hang-up is lost, no slot either, and nobody waits at others' cost."""

from __future__ import annotations

import asyncio

import pytest
from conftest import advance, refused, running, settings, ticks

from gpu_engine.model_files import ModelName
from gpu_service import Admission, ModelEntry, ServiceError

pytestmark = pytest.mark.anyio


def guard(seconds_queued: float = 0.0, **changes: object) -> Admission:
    return Admission(settings(**{"gpu_max_concurrent": 1, **changes}), lambda: seconds_queued)


def in_a_minute() -> float:
    return asyncio.get_running_loop().time() + 60


async def hold_slot(slots: Admission, release: asyncio.Event, ran: list[str], name: str) -> None:
    async with slots.slot(in_a_minute()):
        ran.append(name)
        await release.wait()


# --- hang-ups ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("late_by", range(7))
async def test_a_hang_up_as_the_slot_comes_is_never_swallowed_and_the_slot_goes_to_the_next(late_by: int) -> None:
    slots, ran = guard(), list[str]()
    released, kept = asyncio.Event(), asyncio.Event()
    first = asyncio.create_task(hold_slot(slots, released, ran, "first"))
    await ticks(1)
    leaving = asyncio.create_task(hold_slot(slots, kept, ran, "leaving"))
    await ticks(1)
    third = asyncio.create_task(hold_slot(slots, kept, ran, "third"))
    await ticks(5)
    assert (slots.in_flight, slots.waiting, ran) == (1, 2, ["first"])
    released.set()
    await ticks(late_by)
    leaving.cancel()
    await asyncio.wait({first, leaving}, timeout=5)
    await ticks(5)
    assert leaving.cancelled()
    assert ran[-1] == "third"
    assert (slots.in_flight, slots.waiting) == (1, 0)
    kept.set()
    await third
    assert (slots.in_flight, slots.waiting) == (0, 0)


@pytest.mark.parametrize("late_by", range(7))
async def test_a_hang_up_as_the_model_comes_is_never_swallowed(late_by: int) -> None:
    entry = ModelEntry(1, "embed", ModelName("some/model"), default=False)
    waiting = asyncio.create_task(guard().loaded(entry, in_a_minute()))
    await ticks(5)
    entry.ended.set()
    await ticks(late_by)
    if not waiting.done():
        waiting.cancel()
        await asyncio.wait({waiting})
        assert waiting.cancelled()


async def test_a_slot_whose_waiter_is_late_by_a_moment_is_not_lost() -> None:
    slots, ran = guard(gpu_max_queue=100), list[str]()
    loop = asyncio.get_running_loop()
    for _ in range(20):
        release = asyncio.Event()
        holding = asyncio.create_task(hold_slot(slots, release, ran, "first"))
        await ticks(1)

        async def wait_briefly() -> None:
            async with slots.slot(loop.time() + 0.001):
                pass

        waiting = [asyncio.create_task(wait_briefly()) for _ in range(10)]
        await asyncio.sleep(0)
        advance(0.001)  # so that the deadline and the release fall into one turn of the loop
        release.set()
        await asyncio.gather(holding, *waiting, return_exceptions=True)
        assert (slots.in_flight, slots.waiting) == (0, 0)


async def test_slots_are_given_in_the_order_of_arrival_and_a_newcomer_takes_none_from_the_waiting() -> None:
    slots, ran = guard(), list[str]()
    released, done = asyncio.Event(), asyncio.Event()
    done.set()
    tasks = [asyncio.create_task(hold_slot(slots, released, ran, "first"))]
    await ticks(1)
    for name in ("second", "third"):
        tasks.append(asyncio.create_task(hold_slot(slots, done, ran, name)))
        await ticks(1)
    released.set()
    await ticks(1)
    tasks.append(asyncio.create_task(hold_slot(slots, done, ran, "newcomer")))
    await asyncio.gather(*tasks)
    assert ran == ["first", "second", "third", "newcomer"]


# --- models that load ----------------------------------------------------------------------------------


async def test_those_who_wait_for_one_model_leave_the_queue_of_the_others_alone() -> None:
    async with running(settings(gpu_max_concurrent=1, gpu_max_queue=2, gpu_queue_timeout=3600)) as service:
        service.loader.hold.clear()
        service.embed_engine.hold.clear()
        slow = [asyncio.create_task(service.embed("a", model="some/model")) for _ in range(2)]
        other = [asyncio.create_task(service.embed("a", model="other/model")) for _ in range(2)]
        await service.until(lambda: len(service.runtime.jobs.active) == 4)
        ready = [asyncio.create_task(service.embed(text)) for text in ("b", "c", "d")]
        await service.until(lambda: service.runtime.admission.waiting == 2)
        service.embed_engine.hold.set()
        assert [(await task).status_code for task in ready] == [200] * 3
        service.loader.hold.set()
        codes = {response.status_code for response in await asyncio.gather(*slow, *other)}
        assert 200 in codes


async def test_the_queue_timeout_holds_for_the_model_and_the_slot_together() -> None:
    async with running(settings(gpu_max_concurrent=1, gpu_queue_timeout=20)) as service:
        service.embed_engine.hold.clear()
        first = asyncio.create_task(service.embed("a"))
        await service.until(lambda: service.embed_engine.begun == 1)
        service.loader.hold.clear()
        asking = asyncio.create_task(service.embed("b", model="some/model"))
        await service.until(lambda: "embed:some/model" in service.loader.loads)
        advance(12)
        service.loader.hold.set()
        await service.until(lambda: service.runtime.admission.waiting == 1)
        advance(9)
        refused(await asking, 503, "busy")
        service.embed_engine.hold.set()
        assert (await first).status_code == 200


async def test_a_load_that_hangs_collects_nothing_of_the_callers_who_gave_up() -> None:
    entry = ModelEntry(1, "embed", ModelName("some/model"), default=False)
    slots = guard()
    for _ in range(20):
        with pytest.raises(ServiceError) as caught:
            await slots.loaded(entry, asyncio.get_running_loop().time())
        assert caught.value.code == "model_loading"
    assert not entry.ended._waiters
    entry.ended.set()
    await slots.loaded(entry, in_a_minute())


# --- Retry-After ---------------------------------------------------------------------------------------


async def test_retry_after_counts_the_requests_that_wait() -> None:
    slots, ran, release = guard(seconds_queued=2.0), list[str](), asyncio.Event()
    tasks = [asyncio.create_task(hold_slot(slots, release, ran, "")) for _ in range(8)]
    await ticks(3)
    assert (slots.in_flight, slots.waiting) == (1, 7)
    assert min(slots.retry_after_s() for _ in range(50)) >= 2 * (1 + 7)
    release.set()
    await asyncio.gather(*tasks)
    assert max(slots.retry_after_s() for _ in range(50)) <= 4


async def test_callers_of_a_model_that_loads_are_not_sent_back_in_step() -> None:
    async with running(settings(gpu_queue_timeout=0.01)) as service:
        service.loader.hold.clear()
        answers = await asyncio.gather(*(service.embed("a", model="some/model") for _ in range(40)))
        assert {answer.json()["code"] for answer in answers} == {"model_loading"}
        assert len({int(answer.headers["Retry-After"]) for answer in answers}) > 1

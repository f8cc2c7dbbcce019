"""Callers take turns in front of the device, and who is refused and comes back at once is slowed down."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from conftest import call, running, settings, ticks

from gpu_service import Admission, ServiceError

pytestmark = pytest.mark.anyio


class Callers:
    """Requests of several callers at one guard, and the order in which they were served."""

    def __init__(self, **changes: Any) -> None:
        self.guard = Admission(settings(**{"gpu_max_concurrent": 1, **changes}), lambda: 0.0)
        self.served: list[str] = []
        self.refused: list[str] = []
        self.release = asyncio.Event()

    async def ask(self, caller: str) -> None:
        try:
            async with self.guard.slot(asyncio.get_running_loop().time() + 60, caller):
                self.served.append(caller)
                await self.release.wait()
                await asyncio.sleep(0)
        except ServiceError:
            self.refused.append(caller)

    async def queue(self, *callers: str) -> list[asyncio.Task[None]]:
        tasks = [asyncio.create_task(self.ask(caller)) for caller in callers]
        await ticks(5)
        return tasks


async def test_callers_take_turns_whoever_came_first_and_has_more_requests() -> None:
    callers = Callers()
    tasks = await callers.queue("flood", *["flood"] * 6, "polite", "polite", "other")
    callers.release.set()
    await asyncio.gather(*tasks)
    assert callers.served[:1] == ["flood"]
    assert callers.served[1:6] == ["flood", "polite", "other", "flood", "polite"]
    assert callers.served[6:] == ["flood"] * 4


async def test_two_callers_who_ask_without_end_get_equal_shares() -> None:
    callers = Callers()
    callers.release.set()

    async def insist(caller: str, at_once: int) -> None:
        async def again() -> None:
            while len(callers.served) < 400:
                await callers.ask(caller)

        await asyncio.gather(*(again() for _ in range(at_once)))

    await asyncio.gather(insist("many", 24), insist("few", 2))
    assert 0.4 < callers.served[:400].count("few") / 400 < 0.6


async def test_a_full_line_of_one_caller_makes_room_for_another_and_not_for_its_own() -> None:
    callers = Callers(gpu_max_queue=4)
    tasks = await callers.queue("flood", *["flood"] * 4)
    assert callers.guard.waiting == 4
    tasks += await callers.queue("flood")
    assert callers.refused == ["flood"], "the newcomer of the longest line"
    tasks += await callers.queue("polite")
    assert callers.refused == ["flood"] * 2, "the last of the longest line"
    tasks += await callers.queue("polite")
    assert (callers.refused, callers.guard.waiting) == (["flood"] * 3, 4)
    tasks += await callers.queue("polite")
    assert callers.refused == ["flood"] * 3 + ["polite"], "two and two: nobody has more than the newcomer would"
    callers.release.set()
    await asyncio.gather(*tasks)
    assert callers.served.count("polite") == 2
    assert (callers.guard.in_flight, callers.guard.waiting, callers.guard._lines) == (0, 0, {})


async def test_a_polite_caller_with_a_key_of_his_own_is_served_beside_a_flood() -> None:
    async with running(settings(api_key="flood,polite", gpu_max_concurrent=1, gpu_max_queue=3)) as service:
        engine = service.embed_engine
        engine.hold.clear()

        def ask(key: str, text: str) -> asyncio.Task[Any]:
            body = {"texts": [text]}
            return asyncio.create_task(service.client.post("/embed", json=body, headers={"X-API-Key": key}))

        flood = [ask("flood", f"f{n}") for n in range(4)]
        await service.until(lambda: service.runtime.admission.waiting == 3)
        polite = ask("polite", "p")
        await service.until(lambda: any(task.done() for task in flood))
        engine.hold.set()
        assert (await polite).status_code == 200
        assert sorted([(await task).status_code for task in flood]) == [200, 200, 200, 503]


async def test_refusals_to_one_caller_beyond_some_hundreds_a_second_are_held_back_and_to_others_not() -> None:
    async with running(settings()) as service:
        loop = asyncio.get_running_loop()

        async def refused(address: str) -> float:
            """When a refusal came, on the loop's clock."""

            async def nothing() -> dict[str, Any]:
                return {"type": "http.request", "body": b"{", "more_body": False}

            headers = [(b"content-type", b"application/json"), (b"content-length", b"1")]
            status, *_ = await call(
                service.app, "/embed", method="POST", headers=headers, receive=nothing, client=address
            )
            assert status == 422
            return loop.time()

        began = loop.time()
        flood = [asyncio.create_task(refused("10.0.0.1")) for _ in range(250)]
        await ticks(3)
        other = await refused("10.0.0.2")
        last = max(await asyncio.gather(*flood))
        assert last - began >= 0.45, "150 more than the burst, at 300 a second"
        assert other < last
        health, *_ = await call(service.app, "/health")
        assert health == 200

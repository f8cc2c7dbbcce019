"""Whatever arrives, hangs up, times out and closes, in any order: slots are neither lost nor taken twice."""

from __future__ import annotations

import asyncio
import random

import pytest
from conftest import settings

from gpu_service import Admission, ServiceError

pytestmark = pytest.mark.anyio


class Crowd:
    """Callers of one guard who do as a seed says, and what is counted of them."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.slots = self.random.randint(1, 4)
        self.guard = Admission(settings(gpu_max_concurrent=self.slots, gpu_max_queue=8), lambda: 0.0)
        self.on_device = self.most = 0
        self.ends: dict[str, int] = {}

    async def ticks(self, most: int) -> None:
        for _ in range(self.random.randint(0, most)):
            await asyncio.sleep(0)

    async def call(self) -> None:
        deadline = asyncio.get_running_loop().time() + self.random.choice([-1, 0, 0.0002, 60, 60])
        end = "hung up"
        try:
            async with self.guard.slot(deadline, self.random.choice("aabc")):
                self.on_device += 1
                self.most = max(self.most, self.on_device)
                try:
                    await self.ticks(6)
                    end = "served"
                finally:
                    self.on_device -= 1
        except ServiceError as error:
            end = error.code
        finally:
            self.ends[end] = self.ends.get(end, 0) + 1


@pytest.mark.parametrize("seed", range(20))
async def test_a_thousand_arrivals_and_hang_ups_lose_no_slot_and_take_none_twice(seed: int) -> None:
    crowd = Crowd(seed)
    calls: list[asyncio.Task[None]] = []
    for _ in range(1000):
        calls.append(asyncio.create_task(crowd.call()))
        await crowd.ticks(3)
        if crowd.random.random() < 0.4:
            crowd.random.choice(calls[-12:]).cancel()
    await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 30)
    assert crowd.most == crowd.slots, "all slots were used, none twice"
    assert (crowd.guard.in_flight, crowd.guard.waiting, crowd.on_device) == (0, 0, 0)
    assert crowd.ends["served"] > 100
    assert crowd.ends["busy"] > 0
    for _ in range(crowd.slots):
        await asyncio.wait_for(crowd.guard._slots.acquire(), 5)
    assert crowd.guard._slots.locked(), "there are as many slots as at the start"


@pytest.mark.parametrize("seed", range(20))
async def test_closing_ends_every_wait_and_leaves_no_slot_taken(seed: int) -> None:
    crowd = Crowd(1000 + seed)
    calls = [asyncio.create_task(crowd.call()) for _ in range(30)]
    await crowd.ticks(8)
    for call in calls[::4]:
        call.cancel()
    await crowd.ticks(2)
    crowd.guard.close()
    calls += [asyncio.create_task(crowd.call()) for _ in range(5)]
    await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 30)
    assert crowd.ends["shutting_down"] >= 5
    assert (crowd.guard.in_flight, crowd.guard.waiting, crowd.guard._lines) == (0, 0, {})
    assert crowd.most <= crowd.slots

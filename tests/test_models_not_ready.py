"""A model that can't be loaded or still loads: 503 with the reason, and the load is neither repeated nor lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from conftest import FakeEngine, refused, retry_after, running, settings

from gpu_engine.model_files import Hub, ModelName, find_model
from gpu_engine.work import ModelError

pytestmark = pytest.mark.anyio


SECRET = "/root/.cache/secret-path at 0x7f00"


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (RuntimeError(f"size mismatch in {SECRET}"), "model_failed", "RuntimeError"),
        (MemoryError(), "model_out_of_memory", "does not fit into memory"),
        (ModelError("no hub", "model_unavailable"), "model_unavailable", "no hub"),
        (SystemExit(3), "model_failed", "SystemExit"),
    ],
    ids=repr,
)
async def test_a_load_that_fails_is_503_with_the_reason(error: BaseException, code: str, reason: str) -> None:
    async with running(settings()) as service:
        service.loader.error = error
        response = await service.embed("a", model="some/model")
        assert reason in refused(response, 503, code)
        retry_after(response)
        assert (await service.embed("the default still answers")).status_code == 200


async def test_a_failed_load_is_remembered_so_that_a_burst_does_not_retry_it() -> None:
    async with running(settings()) as service:
        service.loader.error = RuntimeError("no")
        burst = await asyncio.gather(*(service.embed("a", model="some/model") for _ in range(20)))
        for _ in range(20):
            burst.append(await service.embed("a", model="some/model"))
        for response in burst:
            refused(response, 503, "model_failed")
            retry_after(response)
        assert service.loader.loads.count("embed:some/model") == 1


async def test_a_failed_load_is_tried_again_when_its_memory_ends() -> None:
    async with running(settings()) as service:
        service.loader.error = RuntimeError("no")
        refused(await service.embed("a", model="some/model"), 503, "model_failed")
        service.loader.error = None
        refused(await service.embed("a", model="some/model"), 503, "model_failed")
        (entry,) = [e for e in service.runtime.models.entries() if e.state == "failed"]
        entry.retry_at = 0.0  # the memory of the failure ends
        assert (await service.embed("a", model="some/model")).status_code == 200
        assert service.loader.loads.count("embed:some/model") == 2


async def test_a_default_that_is_not_here_and_not_to_be_had_is_503_naming_both_ways_out() -> None:
    def load(kind: str, name: ModelName, progress: Callable[[str, float], None]) -> FakeEngine:
        if kind == "bertscore":
            find_model(kind, name, Hub(), progress)  # the real search, with the hub cut off
        return FakeEngine(kind)

    async with running(settings(model_bertscore="nobody/is-not-here"), load) as service:
        response = await service.bertscore("a")
        detail = refused(response, 503, "model_unavailable")
        retry_after(response)
        for words in ("nobody/is-not-here", "gpu-service download nobody/is-not-here", "MODEL_BERTSCORE="):
            assert words in detail
        assert (await service.embed("a")).status_code == 200
        shown = (await service.client.get("/ready")).json()["models"]
        assert shown["bertscore:nobody/is-not-here"]["state"] == "failed"
        assert shown["bertscore:nobody/is-not-here"]["reason"] == detail


async def test_a_model_still_loading_past_the_queue_timeout_is_503_and_the_load_goes_on() -> None:
    async with running(settings(gpu_queue_timeout=0.05)) as service:
        service.loader.hold.clear()
        response = await service.embed("a", model="some/model")
        assert "some/model is still loading (50%)" in refused(response, 503, "model_loading")
        retry_after(response)
        service.loader.hold.set()
        await service.until(lambda: all(e.state == "ready" for e in service.runtime.models.entries()))
        assert (await service.embed("a", model="some/model")).status_code == 200
        assert service.loader.loads.count("embed:some/model") == 1

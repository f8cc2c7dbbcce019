"""A worker that dies, a device that breaks, hangs or tells nothing: callers are told, and so is whoever restarts."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FakeLoader, device_held, retry_after, running, settings, submitted, words

import gpu_service
from gpu_engine.work import EmbedTask

pytestmark = pytest.mark.anyio


ILLEGAL = "CUDA error: an illegal memory access was encountered"


# --- death ---------------------------------------------------------------------------------------------


async def test_a_worker_that_dies_is_started_again_once_and_its_callers_get_503() -> None:
    def die(texts: list[str]) -> None:
        raise SystemExit(1)

    async with device_held(settings(gpu_max_concurrent=4, gpu_batch_tokens=16, gpu_exit_on_fatal=False)) as held:
        service, engine = held
        callers = [await submitted(service, engine, text) for text in words("caller", 3)]
        engine.hold.pass_through()
        await service.until(lambda: engine.begun == 2)  # the blocker is answered, a caller's batch runs
        engine.fail = die
        engine.hold.pass_through()
        for caller in callers:
            response = await caller
            assert (response.status_code, response.json()["code"]) == (503, "worker_restarted")
            assert response.headers["Retry-After"] == "1"
        engine.fail = lambda texts: None
        engine.hold.set()
        assert (await service.embed("again")).status_code == 200
        assert (await service.client.get("/health")).status_code == 200
        info = (await service.client.get("/info")).json()
        assert info["counters"]["worker_restarts"] == 1


async def test_a_worker_that_dies_twice_is_reported_by_health_and_ready() -> None:
    def die(texts: list[str]) -> None:
        raise SystemExit(1)

    async with running(settings(gpu_exit_on_fatal=False)) as service:
        service.embed_engine.fail = die
        codes = [(await service.embed("a")).json()["code"] for _ in range(2)]
        assert codes == ["worker_restarted", "device_broken"]
        response = await service.client.get("/health")
        assert response.status_code == 503
        assert response.json() == {"status": "error", "device": "cpu", "detail": "device worker: SystemExit"}
        assert (await service.client.get("/ready")).status_code == 503
        response = await service.bertscore("refused at once")
        assert (response.status_code, response.json()["code"]) == (503, "device_broken")
        assert service.bertscore_engine.batches == []
        assert service.runtime.admission.in_flight == 0


@pytest.mark.parametrize(
    "message",
    [
        ILLEGAL,
        "CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronously reported",
        "HIP error: the operation cannot be performed in the present state",
        "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
    ],
)
async def test_a_broken_device_context_fails_all_in_flight_calls_and_health(message: str) -> None:
    def fail(texts: list[str]) -> None:
        raise RuntimeError(message)

    config = settings(gpu_max_concurrent=2, gpu_batch_tokens=16, gpu_exit_on_fatal=False)
    async with running(config) as service:
        engine = service.embed_engine
        engine.hold.clear()
        engine.fail = fail
        callers = [await submitted(service, engine, text) for text in words("caller", 2)]
        waiting = asyncio.create_task(service.bertscore("waits for a slot"))
        await service.until(lambda: service.runtime.admission.waiting == 1)
        engine.hold.set()
        for response in (*(await asyncio.gather(*callers)), await waiting):
            assert response.status_code == 503
            assert response.json()["code"] == "device_broken"
            assert int(response.headers["Retry-After"]) >= 1
            assert "CUDA" not in response.text
        await service.until(lambda: not service.runtime.worker.alive)
        response = await service.client.get("/health")
        assert (response.status_code, response.json()["status"]) == (503, "error")
        assert (await service.embed("not tried again")).status_code == 503
        assert len(engine.batches) == 1


async def test_an_error_that_only_reads_like_a_broken_device_is_not_one() -> None:
    def fail(texts: list[str]) -> None:
        raise ValueError(ILLEGAL)

    async with running(settings(gpu_exit_on_fatal=False)) as service:
        service.embed_engine.fail = fail
        assert (await service.embed("a")).status_code == 500
        assert (await service.client.get("/health")).status_code == 200


def test_a_broken_device_context_ends_the_process_with_code_70() -> None:
    script = f"""
        import asyncio, sys
        sys.path[:0] = [{str(Path(__file__).parent.parent)!r}, {str(Path(__file__).parent)!r}]
        from conftest import running, settings

        def fail(texts):
            raise RuntimeError({ILLEGAL!r})

        async def main():
            async with running(settings()) as service:
                service.embed_engine.fail = fail
                print((await service.embed("a")).status_code, flush=True)
                await asyncio.sleep(30)

        asyncio.run(main())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("503\n", 70), done.stderr


async def test_a_broken_device_is_503_with_retry_after_on_health_and_ready() -> None:
    async with running(settings(gpu_exit_on_fatal=False)) as service:
        service.runtime.worker.mark_broken("the device context is broken")
        for path in ("/health", "/ready"):
            response = await service.client.get(path)
            assert response.status_code == 503
            retry_after(response)


# --- a device that hangs or tells nothing --------------------------------------------------------------


async def test_a_batch_that_never_ends_is_found_and_only_a_restart_is_said_to_help() -> None:
    loader = FakeLoader()
    config = settings(gpu_request_timeout=0.05, gpu_max_batch_size=1, gpu_exit_on_fatal=False)
    runtime = gpu_service.Runtime(config, loader, hang_s=0.0)
    await runtime.start()

    async def ask(items: int) -> Any:
        return await runtime.run(None, EmbedTask([f"text {number}" for number in range(items)]))

    try:
        await ask(1)
        assert gpu_service.view_health(runtime)[0] == 200, "a device that does nothing does not hang"
        engine = loader.engines["embed:all-MiniLM-L6-v2"]
        engine.hold.clear()
        with pytest.raises(gpu_service.ServiceError) as caught:
            await ask(1000)  # may take 50 s
        assert caught.value.code == "device_broken"
        status, body = gpu_service.view_health(runtime)
        assert (status, body["status"]) == (503, "error")
        assert re.fullmatch(r"a batch has run for \d+ s", body["detail"])
    finally:
        engine.hold.set()
        await runtime.stop()


def test_only_a_batch_of_minutes_is_taken_for_one_that_never_ends() -> None:
    assert gpu_service.Runtime(settings(gpu_request_timeout=1)).hang_s == 300
    assert gpu_service.Runtime(settings(gpu_request_timeout=100)).hang_s == 500


@pytest.mark.parametrize("hangs", [False, True])
async def test_info_answers_without_vram_when_the_driver_does_not(hangs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, go = threading.Event(), threading.Event()
    returned: list[bool] = []

    def no_answer(device: torch.device) -> tuple[int, int]:
        asked.set()
        returned.append(hangs and go.wait(60))
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "mem_get_info", no_answer)
    async with running(settings()) as service:
        service.runtime.device = torch.device("cuda")
        asking = asyncio.create_task(service.client.get("/info"))
        await service.until(asked.is_set)
        assert (await service.client.get("/health")).status_code == 200
        assert not (hangs and returned), "the event loop was held"
        response = await asking
        assert not (hangs and returned), "it waited for the driver"
        go.set()
        assert response.status_code == 200
        assert not [name for name in response.json() if name.startswith("vram_")]

"""An engine that dies, a device that breaks, hangs or tells nothing: callers are told, and another one is started."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import FakeLoader, Service, retry_after, running, settings, submitted, without_options, words
from fake_cuda import ILLEGAL, answer_probes

import gpu_service
from gpu_engine.link import Launched, launch_in_thread

pytestmark = pytest.mark.anyio

MODEL = "all-MiniLM-L6-v2"


class Starts:
    """Starts engines in this process, each once it may; `refusals` of the starts fail."""

    def __init__(self) -> None:
        self.loader, self.may, self.count, self.refusals = FakeLoader(), threading.Event(), 0, 0
        self.may.set()

    def __call__(self) -> Launched:
        self.count += 1
        assert self.may.wait(30), "a test never let its engine start"
        if self.count <= self.refusals:
            raise OSError("no process today")
        return launch_in_thread(without_options(self.loader))


def raising(error: BaseException) -> Callable[[list[str]], None]:
    def fail(texts: list[str]) -> None:
        raise error

    return fail


async def until_health(service: Service, status: int) -> dict[str, str]:
    """The body of /health, once it has this status."""
    await service.until(lambda: gpu_service.view_health(service.runtime)[0] == status)
    response = await service.client.get("/health")
    assert response.status_code == status
    return dict(response.json())


# --- death ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        SystemExit(1),  # kills the device thread
        RuntimeError(ILLEGAL),
        RuntimeError("CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("HIP error: the operation cannot be performed in the present state"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    ],
    ids=str,
)
async def test_a_dead_worker_or_broken_device_ends_the_engine_and_its_callers_get_503(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_probes(monkeypatch, RuntimeError(ILLEGAL))
    config, starts = settings(gpu_max_concurrent=2, gpu_batch_tokens=16), Starts()
    async with running(config, starts.loader, launch=starts, pause_s=0.0) as service:
        engine = starts.loader.engines[f"embed:{MODEL}"]
        engine.hold.clear()
        engine.fail = raising(error)
        callers = [await submitted(service, engine, text) for text in words("caller", 2)]
        waiting = asyncio.create_task(service.bertscore("waits for a slot"))
        await service.until(lambda: service.runtime.admission.waiting == 1)
        starts.may.clear()
        engine.hold.set()
        for response in (*(await asyncio.gather(*callers)), await waiting):
            assert response.status_code == 503
            assert response.json()["code"] in ("device_broken", "engine_died")
            assert retry_after(response) <= 15
            assert "CUDA" not in response.text
        assert len(engine.batches) == 1
        assert service.runtime.admission.in_flight == 0
        await until_health(service, 503)
        starts.may.set()
        engine.fail = lambda texts: None
        assert (await service.embed("again")).status_code == 200


async def test_health_and_ready_say_that_the_engine_is_gone_until_the_next_is_up() -> None:
    starts = Starts()
    async with running(settings(), starts.loader, launch=starts, pause_s=0.0) as service:
        starts.may.clear()
        service.embed_engine.fail = raising(SystemExit(1))
        assert (await service.embed("a")).status_code == 503
        body = await until_health(service, 503)
        said = "the engine ended, because its device is not usable any more"
        assert body == {"status": "error", "device": "cpu", "detail": said}
        for path in ("/health", "/ready"):
            response = await service.client.get(path)
            assert response.status_code == 503
            retry_after(response)
        service.embed_engine.fail = lambda texts: None
        waiting = asyncio.create_task(service.bertscore("waits for the next engine"))
        await service.until(lambda: len(service.runtime.jobs.active) == 1)
        starts.may.set()
        assert (await waiting).status_code == 200
        assert await until_health(service, 200) == {"status": "ok", "device": "cpu"}
        await service.until(lambda: gpu_service.view_ready(service.runtime)[0] == 200)
        assert (await service.client.get("/info")).json()["counters"]["engine_restarts"] == 1


async def test_the_next_engine_has_the_defaults_and_loads_what_else_is_asked_for_anew() -> None:
    starts = Starts()
    async with running(settings(), starts.loader, launch=starts, pause_s=0.0) as service:
        assert (await service.embed("a", model="some/model")).status_code == 200
        service.embed_engine.fail = raising(SystemExit(1))
        assert (await service.embed("b")).status_code == 503
        service.embed_engine.fail = lambda texts: None
        await service.until(lambda: starts.count == 2 and gpu_service.view_ready(service.runtime)[0] == 200)
        defaults = [f"bertscore:{MODEL}", f"embed:{MODEL}"]
        assert sorted((await service.client.get("/info")).json()["loaded_models"]) == defaults
        assert (await service.embed("a", model="some/model")).status_code == 200
        assert sorted(starts.loader.loads) == sorted([*defaults, "embed:some/model"] * 2)


async def test_a_load_whose_engine_dies_fails_for_all_who_wait_and_is_not_remembered() -> None:
    starts = Starts()
    async with running(settings(gpu_max_concurrent=4), starts.loader, launch=starts, pause_s=0.0) as service:
        starts.loader.hold.clear()
        waiting = [asyncio.create_task(service.embed("a", model="some/model")) for _ in range(2)]
        await service.until(lambda: "embed:some/model" in starts.loader.loads)
        service.embed_engine.fail = raising(SystemExit(1))
        assert (await service.embed("b")).status_code == 503
        for response in await asyncio.gather(*waiting):
            assert (response.status_code, response.json()["code"]) == (503, "engine_died")
            assert retry_after(response) <= 10
        starts.loader.hold.set()
        assert (await service.embed("a", model="some/model")).status_code == 200


async def test_a_load_that_finds_the_device_broken_ends_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_probes(monkeypatch, RuntimeError(ILLEGAL))
    starts = Starts()
    async with running(settings(), starts.loader, launch=starts, pause_s=0.0) as service:
        starts.loader.errors["embed:some/model"] = RuntimeError(ILLEGAL)
        response = await service.embed("a", model="some/model")
        assert (response.status_code, response.json()["code"]) in [(503, "device_broken"), (503, "engine_died")]
        assert (await service.embed("b")).status_code == 200
        await service.until(lambda: starts.count == 2)


async def test_an_engine_that_cannot_be_started_is_tried_again() -> None:
    starts = Starts()
    starts.refusals = 2
    async with running(settings(), starts.loader, wait=False, launch=starts, pause_s=0.01) as service:
        assert (await service.embed("waits for the third start")).status_code in (200, 503)
        await service.until(lambda: starts.count == 3)
        assert (await service.embed("a")).status_code == 200
        assert (await service.client.get("/health")).status_code == 200


async def test_an_error_that_only_reads_like_a_broken_device_is_not_one() -> None:
    async with running(settings()) as service:
        service.embed_engine.fail = raising(ValueError(ILLEGAL))
        assert (await service.embed("a")).status_code == 500
        assert (await service.client.get("/health")).status_code == 200
        assert service.runtime.restarts == 0


@pytest.mark.parametrize(("exit_on_fatal", "ended"), [(True, ("503 " * 6, 70)), (False, ("503 " * 7, 0))])
def test_after_the_sixth_death_in_five_minutes_the_service_leaves_with_code_70_unless_told_not_to(
    exit_on_fatal: bool, ended: tuple[str, int]
) -> None:
    script = f"""
        import asyncio, sys
        sys.path[:0] = [{str(Path(__file__).parent.parent)!r}, {str(Path(__file__).parent)!r}]
        import torch
        from conftest import running, settings

        def fail(*given, **more):
            raise RuntimeError({ILLEGAL!r})

        torch.cuda.is_initialized, torch.zeros = lambda: True, fail

        async def main():
            async with running(settings(gpu_exit_on_fatal={exit_on_fatal}), pause_s=0.001) as service:
                service.embed_engine.fail = fail
                for death in range(1, 8):
                    print((await service.embed("a")).status_code, end=" ", flush=True)
                    await service.until(lambda: service.runtime.restarts == death)

        asyncio.run(main())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ended, done.stderr


def pretend_cards(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    answers = {"is_available": count > 0, "device_count": count, "get_device_name": "a card"}
    for name, value in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 2 << 30))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)


async def test_a_card_that_went_with_its_engine_is_waited_for_rather_than_replaced_by_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, starts = settings(torch_device="auto", gpu_exit_on_fatal=False), Starts()
    pretend_cards(monkeypatch, 1)
    async with running(config, starts.loader, launch=starts, pause_s=0.001) as service:
        pretend_cards(monkeypatch, 0)
        answer_probes(monkeypatch, RuntimeError(ILLEGAL))
        service.embed_engine.fail = raising(RuntimeError(ILLEGAL))
        assert (await service.embed("a")).status_code == 503
        service.embed_engine.fail = lambda texts: None
        await service.until(lambda: starts.count > 2)
        assert (await service.client.get("/health")).status_code == 503
        pretend_cards(monkeypatch, 1)
        assert (await until_health(service, 200))["device"] == "cuda"


# --- a device that hangs or tells nothing --------------------------------------------------------------


async def test_a_batch_that_never_ends_is_found_and_its_engine_killed() -> None:
    config, starts = settings(gpu_request_timeout=0.05, gpu_max_batch_size=1), Starts()
    async with running(config, starts.loader, launch=starts, pause_s=0.0, hang_s=0.0) as service:
        engine = service.embed_engine
        assert (await service.embed("a")).status_code == 200
        engine.hold.clear()
        body = {"input": [f"text {number}" for number in range(1000)]}  # may take 50 s
        response = await service.client.post("/v1/embeddings", json=body)
        assert (response.status_code, response.json()["error"]["code"]) == (429, "engine_died")
        retry_after(response)
        engine.hold.set()
        assert (await service.embed("b")).status_code == 200
        assert service.runtime.restarts == 1, "a device that does nothing does not hang"


def test_only_a_batch_of_minutes_is_taken_for_one_that_never_ends() -> None:
    assert gpu_service.Runtime(settings(gpu_request_timeout=1)).hang_s == 300
    assert gpu_service.Runtime(settings(gpu_request_timeout=100)).hang_s == 500


@pytest.mark.parametrize("hangs", [False, True])
async def test_info_answers_without_vram_when_the_driver_does_not(hangs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, go = threading.Event(), threading.Event()

    def no_answer(device: torch.device) -> tuple[int, int]:
        asked.set()
        if hangs:
            go.wait(60)
        raise RuntimeError(ILLEGAL)

    pretend_cards(monkeypatch, 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", no_answer)
    async with running(settings(torch_device="cuda", gpu_batch_tokens=1024)) as service:
        await service.until(asked.is_set)
        assert (await service.embed("a")).status_code == 200
        response = await service.client.get("/info")
        go.set()
        assert response.status_code == 200
        info = response.json()
        assert (info["device"], info["device_name"]) == ("cuda", "a card")
        assert not [name for name in info if name.startswith("vram_")]
        assert (await service.client.get("/health")).status_code == 200

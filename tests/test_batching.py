"""The device worker: fair shares, shared batches, bad batches, memory, death, hang-ups, repeated texts."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from conftest import FakeEngine, Service, running, settings, value_of

from gpu_engine.work import EmbedTask, Item, NotFinite
from gpu_engine.worker import DeviceWorker, OutputCache
from gpu_service import Settings

pytestmark = pytest.mark.anyio

ILLEGAL = "CUDA error: an illegal memory access was encountered"


def words(name: str, count: int) -> list[str]:
    """`count` different texts of sixteen tokens each."""
    return [f"{name} {n:03}".ljust(16, ".") for n in range(count)]


@contextlib.asynccontextmanager
async def device_held(config: Settings) -> AsyncIterator[tuple[Service, FakeEngine]]:
    """A service whose device is busy with a batch of another request, so that what comes next queues up.

    `engine.hold.set()` lets everything go; `pass_through` one batch after the other.
    """
    async with running(config) as service:
        engine = service.embed_engine
        engine.hold.clear()
        blocker = asyncio.create_task(service.embed("blocker".ljust(16)))
        await service.until(lambda: engine.begun == 1)
        yield service, engine
        engine.hold.set()
        assert (await blocker).status_code == 200


async def submitted(service: Service, engine: FakeEngine, *texts: str, **more: Any) -> asyncio.Task[httpx.Response]:
    """A request that has reached the worker."""
    before = len(engine.jobs)
    ask = service.bertscore if engine.kind == "bertscore" else service.embed
    task = asyncio.create_task(ask(*texts, **more))
    await service.until(lambda: len(engine.jobs) > before)
    return task


# --- shares --------------------------------------------------------------------------------------------


async def test_one_text_that_arrives_during_a_job_of_a_hundred_is_answered_within_two_batches() -> None:
    async with running(settings(gpu_batch_tokens=16)) as service:
        engine = service.embed_engine
        engine.hold.clear()
        bulk = await submitted(service, engine, *words("bulk", 100))
        await service.until(lambda: engine.begun == 1)
        small = await submitted(service, engine, "a small question")
        engine.hold.pass_through(3)  # the batch on the device, and two more
        assert (await small).status_code == 200
        assert not bulk.done()
        assert ["a small question"] in engine.batches[1:3]
        engine.hold.set()
        assert (await bulk).status_code == 200


async def test_one_text_for_another_model_is_answered_within_two_batches() -> None:
    async with running(settings(gpu_batch_tokens=16)) as service:
        engine = service.embed_engine
        engine.hold.clear()
        bulk = await submitted(service, engine, *words("bulk", 100))
        await service.until(lambda: engine.begun == 1)
        small = await submitted(service, service.bertscore_engine, "a small question")
        engine.hold.pass_through(2)
        assert (await small).status_code == 200
        assert not bulk.done()
        engine.hold.set()
        assert (await bulk).status_code == 200


async def test_a_newcomer_is_served_before_those_who_were_served_since_it_came() -> None:
    async with running(settings(gpu_batch_tokens=16, gpu_max_concurrent=8)) as service:
        engine = service.bertscore_engine
        engine.hold.clear()
        bulks = [await submitted(service, engine, *words(f"bulk {n}", 9), num_layers=n) for n in (1, 2, 3)]
        engine.hold.pass_through(3)
        await service.until(lambda: engine.begun == 4)  # the first has its second batch on the device
        small = await submitted(service, engine, "a small question", num_layers=4)
        engine.hold.pass_through(3)
        assert (await small).status_code == 200
        assert ["a small question"] in engine.batches[4:7]
        engine.hold.set()
        await asyncio.gather(*bulks)


async def test_requests_share_each_batch_evenly() -> None:
    async with device_held(settings(gpu_batch_tokens=8 * 16, gpu_max_concurrent=4)) as (service, engine):
        jobs = [await submitted(service, engine, *words(name, 16)) for name in ("a", "b")]
        engine.hold.set()
        assert [(await job).status_code for job in jobs] == [200, 200]
        for batch in engine.batches[1:]:
            assert sorted(text[0] for text in batch) == ["a"] * 4 + ["b"] * 4


async def test_what_a_small_request_leaves_of_its_share_goes_to_the_others() -> None:
    async with device_held(settings(gpu_batch_tokens=8 * 16, gpu_max_concurrent=4)) as (service, engine):
        jobs = [await submitted(service, engine, *words(name, n)) for name, n in (("a", 16), ("b", 1), ("c", 16))]
        engine.hold.set()
        assert [(await job).status_code for job in jobs] == [200, 200, 200]
        first = sorted(text[0] for text in engine.batches[1])
        assert first.count("b") == 1
        assert {first.count("a"), first.count("c")} == {3, 4}


async def test_a_batch_stays_within_the_token_budget() -> None:
    async with running(settings(gpu_batch_tokens=64)) as service:
        texts = ["x" * n for n in range(1, 60)]
        assert (await service.embed(*texts)).status_code == 200
        assert max(sum(map(len, batch)) for batch in service.embed_engine.batches) <= 64
        assert len(service.embed_engine.batches) < 59


async def test_a_text_larger_than_the_budget_runs_alone() -> None:
    async with running(settings(gpu_batch_tokens=16)) as service:
        assert (await service.embed("x" * 500, "y")).status_code == 200
        assert service.embed_engine.batches == [["x" * 500], ["y"]]


async def test_requests_for_different_layers_do_not_share_a_batch() -> None:
    async with device_held(settings(gpu_max_concurrent=4)) as (service, engine):
        scorer = service.bertscore_engine
        jobs = [await submitted(service, scorer, "a", "b", num_layers=layer) for layer in (1, 2)]
        engine.hold.set()
        assert [(await job).status_code for job in jobs] == [200, 200]
        assert scorer.batches == [["a", "b"], ["a", "b"]]


# --- the same text twice -------------------------------------------------------------------------------


async def test_a_text_that_two_requests_have_in_common_is_computed_once() -> None:
    async with device_held(settings(gpu_max_concurrent=4, gpu_cache_mb=0)) as (service, engine):
        first = await submitted(service, engine, "common", "first")
        second = await submitted(service, engine, "second", "common")
        engine.hold.set()
        assert (await first).json()["embeddings"] == [[value_of("common"), 1.0], [value_of("first"), 1.0]]
        assert (await second).json()["embeddings"] == [[value_of("second"), 1.0], [value_of("common"), 1.0]]
        (batch,) = engine.batches[1:]
        assert sorted(batch) == ["common", "first", "second"]


async def test_a_text_seen_before_is_not_computed_again() -> None:
    async with running(settings()) as service:
        engine = service.embed_engine
        first = await service.embed("old", "older")
        engine.output = lambda text: 0.5  # a text that is computed again would show it
        again = await service.embed("new", "old", "older")
        assert engine.texts_run == ["older", "old", "new"]
        assert again.json()["embeddings"][1:] == first.json()["embeddings"]
        assert (await service.embed("old")).json()["embeddings"] == first.json()["embeddings"][:1]
        info = (await service.client.get("/info")).json()
        assert info["counters"]["cache_hits"] == 3


async def test_cached_texts_of_one_model_are_not_those_of_another() -> None:
    async with running(settings()) as service:
        await service.embed("same")
        await service.bertscore("same")
        await service.bertscore("same", num_layers=2)
        assert (service.embed_engine.texts_run, service.bertscore_engine.texts_run) == (["same"], ["same", "same"])


async def test_a_cache_of_nothing_computes_every_text_again() -> None:
    async with running(settings(gpu_cache_mb=0)) as service:
        for _ in range(3):
            assert (await service.embed("same")).status_code == 200
        assert service.embed_engine.texts_run == ["same"] * 3


async def test_the_least_recently_used_text_leaves_a_full_cache() -> None:
    # Two entries: an output of eight bytes, a key of six characters, and the entry's own share.
    async with running(settings(gpu_cache_mb=2 * (8 + 4 * 6 + 300) / 2**20)) as service:
        for text in ("a", "b", "a", "c", "a", "b"):
            assert (await service.embed(text)).status_code == 200
        assert service.embed_engine.texts_run == ["a", "b", "c", "b"]


async def test_the_cache_counts_its_keys_so_that_small_outputs_of_long_texts_do_not_fill_memory() -> None:
    async with running(settings(gpu_cache_mb=0.1)) as service:
        for number in range(30):
            assert (await service.embed(f"{number} " + "long " * 1000)).status_code == 200
        cache = service.runtime.worker._runner.cache
        assert len(cache._entries) < 10


# --- bad batches ---------------------------------------------------------------------------------------


async def test_a_failing_batch_fails_only_the_request_that_caused_it() -> None:
    def fail(texts: list[str]) -> None:
        if "bad" in texts:
            raise ValueError("a bug")

    async with device_held(settings(gpu_max_concurrent=4)) as (service, engine):
        good = await submitted(service, engine, "good")
        bad = await submitted(service, engine, "bad", "and its neighbour")
        fine = await submitted(service, engine, "fine")
        engine.fail = fail
        engine.hold.set()
        assert [(await task).status_code for task in (good, bad, fine)] == [200, 500, 200]
        assert len(engine.batches[1]) == 4, "they were in one batch"
        assert (await service.client.get("/health")).status_code == 200
        assert (await service.embed("the worker lives")).status_code == 200


@pytest.mark.parametrize("kind", ["embed", "bertscore"])
async def test_numbers_that_are_not_finite_are_422_and_not_kept(kind: str) -> None:
    async with running(settings()) as service:
        engine = service.loader.engines[f"{kind}:all-MiniLM-L6-v2"]
        engine.output = lambda text: NotFinite("nan") if text == "odd" else value_of(text)
        ask = service.embed if kind == "embed" else service.bertscore
        response = await ask("plain", "odd")
        assert (response.status_code, response.json()["code"]) == (422, "not_finite")
        engine.output = value_of
        assert (await ask("plain", "odd")).status_code == 200


async def test_results_that_cannot_be_put_together_fail_only_their_request() -> None:
    async with running(settings()) as service:
        engine = service.embed_engine
        prepare = FakeEngine.prepare

        def broken(request: Any) -> Any:
            work = prepare(engine, request)
            if "bad" in work.texts:
                work.absorb = lambda outputs: 1 / 0
            return work

        engine.prepare = broken  # type: ignore[method-assign]
        assert (await service.embed("bad")).status_code == 500
        assert (await service.embed("good")).status_code == 200


# --- memory --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()], ids=repr)
async def test_out_of_memory_halves_the_batch_and_the_safe_size_is_remembered(error: Exception) -> None:
    def fail(texts: list[str]) -> None:
        if len(texts) > 2:
            raise error

    async with running(settings(gpu_batch_tokens=8 * 16)) as service:
        engine = service.embed_engine
        engine.fail = fail
        first = words("first", 8)
        answer = await service.embed(*first)
        assert answer.json()["embeddings"] == [[value_of(text), 1.0] for text in first]
        assert [len(batch) for batch in engine.batches] == [8, 4, 2, 2, 4, 2, 2]
        engine.batches.clear()
        assert (await service.embed(*words("second", 8))).status_code == 200
        assert [len(batch) for batch in engine.batches] == [2, 2, 2, 2]
        info = (await service.client.get("/info")).json()
        assert info["counters"]["out_of_memory_recoveries"] == 3
        assert (await service.client.get("/health")).status_code == 200


async def test_a_safe_size_grows_again_once_memory_is_there() -> None:
    def fail(texts: list[str]) -> None:
        if len(texts) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    async with running(settings(gpu_batch_tokens=8 * 16)) as service:
        engine = service.embed_engine
        engine.fail = fail
        assert (await service.embed(*words("first", 8))).status_code == 200
        engine.fail = lambda texts: None
        for n in range(40):
            assert (await service.embed(f"small {n}")).status_code == 200
        engine.batches.clear()
        for n in range(10):
            assert (await service.embed(*words(f"next {n}", 8))).status_code == 200
        sizes = [len(batch) for batch in engine.batches]
        assert sizes[:4] == [2, 2, 2, 2], "remembered, whatever small batches came since"
        assert max(sizes) > 2, "not for ever"


def test_a_batch_that_took_long_makes_the_next_ones_smaller() -> None:
    """Callers wait for whole batches: on a slow device a full one would keep a short request for many seconds."""
    cpu = torch.device("cpu")
    engine = FakeEngine("embed")
    worker = DeviceWorker(cpu, 1024, 0, lambda detail: None, lambda: None, long_batch_s=0.0)  # any time is long
    worker.start()
    job = worker.submit(engine, engine.prepare(EmbedTask(words("bulk", 100))), lambda done, fraction: None)
    assert len(job.future.result(30).vectors) == 100
    worker.stop(10)
    assert [len(batch) for batch in engine.batches] == [64, 16, 16, 4]


def test_a_cache_that_finds_no_memory_empties_itself_and_goes_on() -> None:
    class Unstorable:
        nbytes = 8

        def copy(self) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory")

    engine, cache = FakeEngine("embed"), OutputCache(limit_mb=1)
    first, second = (Item((name,), np.zeros(1, np.uint8), 0, 0, 1) for name in ("first", "second"))
    cache.put(engine, first, np.ones(2, np.float32))
    cache.put(engine, second, Unstorable())
    assert cache.get(engine, first) is None
    assert cache.size == 0


async def test_a_single_text_that_does_not_fit_is_its_callers_error_alone() -> None:
    def fail(texts: list[str]) -> None:
        if any("huge" in text for text in texts):
            raise torch.OutOfMemoryError("CUDA out of memory")

    async with device_held(settings(gpu_max_concurrent=4)) as (service, engine):
        huge = await submitted(service, engine, "a huge text")
        other = await submitted(service, engine, "another", "text")
        engine.fail = fail
        engine.hold.set()
        assert (await other).status_code == 200
        response = await huge
        assert response.status_code == 422
        assert response.json()["code"] == "text_too_large_for_device"
        assert "11 tokens" in response.json()["detail"]


async def test_idle_models_are_unloaded_before_a_text_is_given_up() -> None:
    async with running(settings()) as service:
        assert (await service.embed("a", model="some/model")).status_code == 200
        loaded = {e.name.public for e in service.runtime.models.entries()}
        assert loaded == {"all-MiniLM-L6-v2", "some/model"}

        def fail(texts: list[str]) -> None:
            if any(e.name.public == "some/model" for e in service.runtime.models.entries()):
                raise torch.OutOfMemoryError("CUDA out of memory")

        service.embed_engine.fail = fail
        assert (await service.embed("fits now")).status_code == 200
        info = (await service.client.get("/info")).json()
        assert "embed:some/model" not in info["loaded_models"]


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


# --- callers who hang up -------------------------------------------------------------------------------


async def test_the_work_of_a_caller_who_hangs_up_is_dropped_within_one_batch_and_the_slot_is_free() -> None:
    hung_up = asyncio.Event()
    body = httpx.Request("POST", "http://service", json={"texts": words("bulk", 100)}).content
    messages: list[Any] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        if messages:
            return messages.pop()
        await hung_up.wait()
        return {"type": "http.disconnect"}

    async with running(settings(gpu_batch_tokens=16, gpu_max_concurrent=1)) as service:
        engine = service.embed_engine
        engine.hold.clear()
        headers = [(b"content-type", b"application/json")]
        leaving = asyncio.create_task(service.raw("/embed", method="POST", headers=headers, receive=receive))
        await service.until(lambda: engine.begun == 1)
        hung_up.set()
        await service.until(lambda: service.runtime.admission.in_flight == 0)  # while its batch is on the device
        assert engine.begun == 1
        status = await service.status()
        assert status["active_jobs"] == []
        assert status["recent_jobs"][0]["outcome"] == "cancelled"
        following = await submitted(service, engine, "the next caller")
        engine.hold.set()
        assert (await following).status_code == 200
        assert len(engine.batches) == 2
        assert (await leaving)[0] == 499


async def test_a_job_that_is_cancelled_ends_its_future() -> None:
    async with device_held(settings()) as (service, engine):
        worker = service.runtime.worker
        job = worker.submit(engine, engine.prepare(EmbedTask(["text"])), lambda done, fraction: None)
        job.cancel()
        assert job.future.cancelled()


async def test_a_cancelled_request_leaves_no_work_behind() -> None:
    async with running(settings(gpu_batch_tokens=16, gpu_max_concurrent=1)) as service:
        engine = service.embed_engine
        engine.hold.clear()
        task = await submitted(service, engine, *words("bulk", 100))
        await service.until(lambda: engine.begun == 1)
        task.cancel()
        await asyncio.wait({task})
        assert service.runtime.admission.in_flight == 0
        engine.hold.set()
        assert (await service.embed("the next caller")).status_code == 200
        assert len(engine.batches) == 2

"""The device worker: fair shares, shared batches, bad batches, memory."""

from __future__ import annotations

import asyncio
import weakref
from typing import Any

import pytest
import torch
from conftest import FakeEngine, device_held, in_worker, running, settings, submitted, value_of, words

from gpu_engine.work import EmbedTask, NotFinite
from gpu_engine.worker import DeviceWorker

pytestmark = pytest.mark.anyio

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
                work.absorb = lambda *given: 1 / 0
            return work

        engine.prepare = broken  # type: ignore[method-assign]
        assert (await service.embed("bad")).status_code == 500
        assert (await service.embed("good")).status_code == 200


# --- memory --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("could not create a primitive"),  # oneDNN's
    ],
    ids=repr,
)
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
        await service.counted("out_of_memory_recoveries", 3)
        assert (await service.client.get("/health")).status_code == 200


async def test_no_memory_while_a_request_is_tokenised_is_503() -> None:
    async with running(settings()) as service:
        engine, prepare = service.embed_engine, FakeEngine.prepare
        engine.prepare = lambda request: (_ for _ in ()).throw(MemoryError())  # type: ignore[method-assign]
        response = await service.embed("one")
        assert (response.status_code, response.json()["code"]) == (503, "out_of_memory")
        assert int(response.headers["Retry-After"]) >= 1
        engine.prepare = lambda request: prepare(engine, request)  # type: ignore[method-assign]
        assert (await service.embed("one")).status_code == 200


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
    _, answer = in_worker(worker, engine, EmbedTask(words("bulk", 100)))
    assert len(answer.result(30).vectors) == 100
    worker.stop(10)
    assert [len(batch) for batch in engine.batches] == [64, 16, 16, 4]


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

        idle = weakref.ref(service.loader.engines.pop("embed:some/model"))

        def fail(texts: list[str]) -> None:
            if idle() is not None:
                raise torch.OutOfMemoryError("CUDA out of memory")

        service.embed_engine.fail = fail
        assert (await service.embed("fits now")).status_code == 200
        await service.until(lambda: len(service.runtime.models.entries()) == 2)
        info = (await service.client.get("/info")).json()
        assert "embed:some/model" not in info["loaded_models"]

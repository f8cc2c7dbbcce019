"""The same text twice: computed once for all who ask together, and kept for those who ask later."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import FakeEngine, FakeOutputs, device_held, running, settings, submitted, value_of

from gpu_engine.output_cache import OutputCache

pytestmark = pytest.mark.anyio


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
        await service.counted("cache_hits", 3)


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
    texts = [f"{number} " + "long " * 1000 for number in range(30)]
    async with running(settings(gpu_cache_mb=0.1)) as service:
        for text in [*texts, *reversed(texts)]:
            assert (await service.embed(text)).status_code == 200
        assert 0 < 60 - len(service.embed_engine.texts_run) < 10, "so many of them were kept"


def test_a_cache_that_finds_no_memory_empties_itself_and_goes_on() -> None:
    class Unkeepable(FakeOutputs):
        def keep(self, place: int) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory")

    engine, cache = FakeEngine("embed"), OutputCache(limit_mb=1)
    cache.put(engine, 0, "first", FakeOutputs([1.0]), 0)
    cache.put(engine, 0, "second", Unkeepable([2.0]), 0)
    assert cache.get(engine, 0, "first") == 1.0
    assert cache.get(engine, 0, "second") is None
    assert cache.get(engine, 0, "first") is None
    assert cache.size == 0

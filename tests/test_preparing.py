"""What happens to a request before the device: parsing and tokenising hold up nobody else."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from conftest import FakeEngine, running, settings

from gpu_engine.device import thread_pool
from gpu_engine.tokenizing import _CHUNK_CHARACTERS, TextTokenizer, abandoned, in_chunks


@pytest.mark.anyio
async def test_requests_that_are_tokenised_for_long_leave_the_parsing_and_tokenising_to_others() -> None:
    async with running(settings(gpu_max_concurrent=3)) as service:
        engine, go = service.embed_engine, threading.Event()
        stuck: list[str] = []

        def prepare(request: Any) -> Any:
            if request.texts[0].startswith("bulk"):
                stuck.append(request.texts[0])
                assert go.wait(30)
            return FakeEngine.prepare(engine, request)

        engine.prepare = prepare  # type: ignore[method-assign]
        bulk = [asyncio.create_task(service.embed(f"bulk {n}" + "x" * 9000)) for n in range(2)]
        await service.until(lambda: len(stuck) == 2)
        assert (await service.embed("y" * 6000)).status_code == 200
        assert (await service.embed("tiny")).status_code == 200
        go.set()
        assert [(await task).status_code for task in bulk] == [200, 200]


def test_texts_are_tokenised_in_chunks_of_bounded_length() -> None:
    texts = [f"{n:05}" * 2000 for n in range(100)]
    chunks = list(in_chunks(texts))
    assert [text for chunk in chunks for text in chunk] == texts
    assert max(sum(map(len, chunk)) for chunk in chunks) <= _CHUNK_CHARACTERS
    assert list(in_chunks(["x" * 200_000, "y"])) == [["x" * 200_000], ["y"]]
    assert list(in_chunks([])) == [[]]


def test_a_tokenizer_gives_up_between_two_chunks(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenize = TextTokenizer(AutoTokenizer.from_pretrained(tiny_models.save_bert(tmp_path / "tiny")), 16)
    texts = ["hello world " * 2000] * 10
    alone = [tokenize([text]) for text in texts]
    ids, cut = tokenize(texts)
    assert [row.tolist() for row in ids] == [row.tolist() for ((row,), _) in alone]
    assert cut == set(range(10)), "each of them alone, too"
    assert all(single == {0} for _, single in alone)

    def give_up() -> None:
        abandoned.set(lambda: True)
        tokenize(["short", "list"])
        with pytest.raises(concurrent.futures.CancelledError):
            tokenize(texts)

    contextvars.copy_context().run(give_up)


def test_a_pool_has_all_its_threads_from_the_start() -> None:
    """A thread that finds no memory to begin is waited for without end, by whoever starts it."""
    pool = thread_pool(3, "started-pool", time.sleep, (0,))
    assert sum(thread.name.startswith("started-pool") for thread in threading.enumerate()) == 3
    pool.shutdown()

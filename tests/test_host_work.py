"""What the host does around a forward that costs nothing: operators of a job, messages of a batch, padding."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FakeEngine, device_held, load_folder, settings, submitted
from test_numerics_embed import minilm_folder
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gpu_engine.batches import BatchRunner
from gpu_engine.fair_queue import Submission
from gpu_engine.messages import Answered, Channel
from gpu_engine.output_cache import OutputCache
from gpu_engine.packing import Packed
from gpu_engine.work import BertScoreTask, EmbedTask

WORDS = ["quick", "brown", "fox", "jumps", "over", "lazy", "dog", "while", "rain", "falls", "on", "quiet", "towns"]


class NullEncoder:
    """Hidden states that were there before, on the padded path that a GPU takes."""

    dtype = torch.float32
    rows = torch.randn(1 << 15, 384)
    padded = real = 0

    passes = 0

    def __call__(self, batch: Packed, num_layers: int) -> Tensor:
        self.passes += 1
        self.padded += len(batch.ids)
        self.real += sum(batch.lengths)
        return self.rows[: len(batch.ids)].clone()  # two calls


class Calls(TorchDispatchMode):
    """Counts calls of torch's operators; views and what is nothing but Python are calls too."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[str(operator)] += 1
        return operator(*args, **(kwargs or {}))


def null_engine(kind: str) -> Any:
    engine = load_folder(kind, minilm_folder())
    null = NullEncoder()
    engine.tokens.encoder = lambda dtype: null
    engine.tokens.lanes = None
    return engine


def texts(count: int, seed: int) -> list[str]:
    random = np.random.default_rng(seed)
    return [f"{n} " + " ".join(random.choice(WORDS, size=int(random.integers(4, 40)))) for n in range(count)]


def run(engine: Any, task: Any, cache_mb: float) -> tuple[Any, Calls]:
    """A job's answer, and torch's calls from its first batch to its answer."""
    answers: list[Any] = []
    runner = BatchRunner(torch.device("cpu"), 32_768, OutputCache(cache_mb), lambda: None, 1e9)
    work = engine.prepare(task)
    submission = Submission(engine, work, lambda submission, result, error: answers.append(result), lambda *_: None)
    with Calls() as calls:
        runner.admit(submission)
        runner.run([(submission, list(work.order))])
    (answer,) = answers
    return answer, calls


@pytest.mark.parametrize("cache_mb", [0.0, 256.0])
def test_a_job_of_a_hundred_pairs_makes_few_calls_whether_or_not_its_texts_are_kept(cache_mb: float) -> None:
    engine = null_engine("bertscore")
    task = BertScoreTask(texts(100, 1), [[text] for text in texts(100, 2)])
    answer, calls = run(engine, task, cache_mb)
    assert len(answer.f1) == 100
    around = sum(calls.count.values()) - 2 * engine.tokens.encoder(torch.float32).passes
    assert around <= 60, calls.count.most_common()


@pytest.mark.parametrize("cache_mb", [0.0, 256.0])
def test_the_calls_of_an_embedding_job_grow_with_its_passes_not_with_its_texts(cache_mb: float) -> None:
    engine = null_engine("embed")
    null = engine.tokens.encoder(torch.float32)
    for count in (100, 1000):
        null.passes = 0
        _, calls = run(engine, EmbedTask(texts(count, count)), cache_mb)
        assert sum(calls.count.values()) <= 20 + 20 * null.passes
        assert null.passes <= 8


def test_padding_costs_a_quarter_at_most_in_large_batches() -> None:
    engine = null_engine("embed")
    run(engine, EmbedTask(texts(1000, 5)), 0.0)
    null = engine.tokens.encoder(torch.float32)
    assert null.padded / null.real <= 1.25


@pytest.mark.anyio
async def test_all_answers_of_a_batch_cross_as_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[list[Any]] = []
    send = Channel._send_each

    def noted(self: Channel, messages: list[Any]) -> None:
        sent.append([type(message) for message in messages])
        send(self, messages)

    monkeypatch.setattr(Channel, "_send_each", noted)
    async with device_held(settings(gpu_max_concurrent=16, gpu_cache_mb=0)) as (service, engine):
        asked = [await submitted(service, engine, f"text {n}") for n in range(10)]
        sent.clear()
        engine.hold.set()
        await asyncio.gather(*asked)
    assert isinstance(engine, FakeEngine)
    assert [messages for messages in sent if Answered in messages][-1].count(Answered) == 10

"""Two batches on the device at once, as on a GPU: launched in turn, landed in turn, whatever goes wrong between."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from conftest import FakeEngine, FakeOutputs, in_worker, load_folder, outputs_of, value_of, words
from live import until

from gpu_engine.bertscore import BertScoreEngine
from gpu_engine.matching import TokenRows
from gpu_engine.work import BertScoreTask, EmbedTask, InvalidInput, NotFinite
from gpu_engine.worker import DeviceWorker

CPU = torch.device("cpu")


class Recording(FakeEngine):
    """An engine that notes when a batch begins and when its outputs are waited for."""

    def __init__(self, kind: str = "embed") -> None:
        super().__init__(kind)
        self.events: list[str] = []
        self.lands: dict[str, BaseException] = {}  # what a batch with this text raises when it is waited for
        self.lands_in_company = False  # only where it is not alone

    def run(self, texts: Sequence[str], variant: int) -> FakeOutputs:
        outputs, engine = super().run(texts, variant), self

        class Waiting(FakeOutputs):
            def bad(self) -> list[int]:
                engine.events.append(f"lands {texts[0]}")
                for text in texts:
                    if text in engine.lands and (len(texts) > 1 or not engine.lands_in_company):
                        raise engine.lands[text]
                return super().bad()

        self.events.append(f"launched {texts[0]}")
        return Waiting(outputs.values)


@pytest.fixture
def worker() -> Iterator[DeviceWorker]:
    made = DeviceWorker(CPU, 32, 0, lambda detail: None, lambda: None, in_flight=2)
    yield made
    made.stop(10)


def test_a_batch_is_launched_before_the_one_before_it_lands(worker: DeviceWorker) -> None:
    engine = Recording()
    _, answer = in_worker(worker, engine, EmbedTask(words("t", 6)))  # two texts a batch
    worker.start()
    assert [row[0] for row in answer.result(30).vectors] == [value_of(text) for text in words("t", 6)]
    first, second, third = (batch[0] for batch in engine.batches)
    launched, lands = "launched {}".format, "lands {}".format
    assert engine.events == [
        *(launched(first), launched(second), lands(first)),
        *(launched(third), lands(second), lands(third)),
    ]


def test_nothing_stays_in_the_air_when_nothing_more_comes(worker: DeviceWorker) -> None:
    engine = Recording()
    worker.start()
    for name in ("a", "b"):
        assert in_worker(worker, engine, EmbedTask([name]))[1].result(30).vectors[0, 0] == value_of(name)
    assert engine.events == ["launched a", "lands a", "launched b", "lands b"]


@pytest.mark.parametrize("at", ["launch", "landing"])
def test_memory_that_runs_out_halves_the_batch_that_it_ran_out_for(worker: DeviceWorker, at: str) -> None:
    engine, texts = Recording(), words("t", 6)

    def fail(batch: list[str]) -> None:
        if texts[2] in batch and len(batch) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    if at == "launch":
        engine.fail = fail
    else:
        engine.lands_in_company = True
        engine.lands[texts[2]] = torch.OutOfMemoryError("CUDA out of memory")
    _, answer = in_worker(worker, engine, EmbedTask(texts))
    worker.start()
    assert [row[0] for row in answer.result(30).vectors] == [value_of(text) for text in texts]
    assert [texts[2]] in engine.batches
    assert worker.counters.out_of_memory_recoveries == 1


def test_an_error_that_shows_late_reaches_only_its_request(worker: DeviceWorker) -> None:
    engine = Recording()
    engine.lands["bad"] = InvalidInput("no")
    asked = {name: in_worker(worker, engine, EmbedTask([name]))[1] for name in ("fine", "bad", "good")}
    worker.start()
    with pytest.raises(InvalidInput):
        asked["bad"].result(30)
    assert [asked[name].result(30).vectors[0, 0] for name in ("fine", "good")] == [value_of("fine"), value_of("good")]


def test_a_request_that_is_cancelled_in_the_air_is_not_answered(worker: DeviceWorker) -> None:
    engine = Recording()
    engine.hold.clear()
    left, answer = in_worker(worker, engine, EmbedTask(["left"]))
    worker.start()
    left.cancel()
    engine.hold.set()
    assert in_worker(worker, engine, EmbedTask(["kept"]))[1].result(30).vectors[0, 0] == value_of("kept")
    assert not answer.done()


class Poisoned(BertScoreEngine):
    """Numbers of one text are not finite, except in float32."""

    poison: np.ndarray | None = None
    float32_runs = 0

    def compute(self, ids: Sequence[np.ndarray], variant: int, dtype: Any = None) -> TokenRows:
        found = super().compute(ids, variant, torch.float32)
        if dtype is None and self.poison is not None:
            for place, row in enumerate(ids):
                if np.array_equal(row, self.poison):
                    with torch.inference_mode():
                        found.text(place).fill_(torch.nan)
                    found.usable.numpy()[found.starts[place]] = False
        self.float32_runs += dtype is torch.float32
        return found


def test_a_text_repaired_after_the_next_batch_was_launched_is_matched_again(tmp_path: Path) -> None:
    engine = load_folder("bertscore", tiny_models.save_bert(tmp_path / "tiny"))
    texts = ["the cat", "the dog sat on", "a fox ran", "the mat", "a red hat", "one two"]
    task = BertScoreTask(texts[:3], [[texts[3], texts[1]], [texts[4], texts[0]], [texts[5], texts[0]]])
    expected = outputs_of(engine, engine.prepare(task))
    engine.__class__ = Poisoned
    engine.tokens.dtype = torch.bfloat16  # says so; what computes stays as it is
    engine.poison = engine.encode_texts(["the cat"])[0][0]
    worker = DeviceWorker(CPU, 8, 0, lambda detail: None, lambda: None, in_flight=2)
    _, answer = in_worker(worker, engine, task)
    worker.start()
    found = answer.result(30)
    worker.stop(10)
    np.testing.assert_allclose(found.f1, expected.f1, atol=1e-6)
    assert engine.float32_runs == 1


def test_a_text_that_stays_useless_is_given_up(worker: DeviceWorker) -> None:
    engine = Recording()
    engine.output = lambda text: NotFinite("nan") if text == "odd" else value_of(text)
    asked = {name: in_worker(worker, engine, EmbedTask([name]))[1] for name in ("odd", "even")}
    worker.start()
    with pytest.raises(NotFinite):
        asked["odd"].result(30)
    assert asked["even"].result(30).vectors[0, 0] == value_of("even")


def test_two_texts_of_the_same_ids_are_both_repaired(tmp_path: Path) -> None:
    """Different texts may have equal ids: they share a place in the batch, and in its repair."""
    engine = load_folder("bertscore", tiny_models.save_bert(tmp_path / "tiny"))
    task = BertScoreTask(["the cat", "the  cat"], [["the mat"], ["the mat"]])
    expected = outputs_of(engine, engine.prepare(task))
    engine.__class__ = Poisoned
    engine.tokens.dtype = torch.bfloat16
    engine.poison = engine.encode_texts(["the cat"])[0][0]
    worker = DeviceWorker(CPU, 1024, 0, lambda detail: None, lambda: None)
    _, answer = in_worker(worker, engine, task)
    worker.start()
    found = answer.result(30)
    worker.stop(10)
    np.testing.assert_allclose(found.f1, expected.f1, atol=1e-6)


def test_no_memory_to_repair_a_single_text_ends_its_request_alone(worker: DeviceWorker) -> None:
    engine = Recording()
    engine.output = lambda text: NotFinite("nan") if text == "odd" else value_of(text)
    engine.retry = lambda texts, variant: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory"))
    asked = {name: in_worker(worker, engine, EmbedTask([name]))[1] for name in ("odd", "even")}
    worker.start()
    with pytest.raises(InvalidInput, match="does not fit"):
        asked["odd"].result(30)
    assert asked["even"].result(30).vectors[0, 0] == value_of("even")


def test_an_engine_that_is_unloaded_while_its_batch_is_in_the_air_is_freed() -> None:
    worker = DeviceWorker(CPU, 32, 1.0, lambda detail: None, lambda: None, in_flight=2)
    engine, other = Recording(), Recording()
    engine.hold.clear()
    left, _ = in_worker(worker, engine, EmbedTask(["left"]))
    worker.start()
    left.cancel()
    worker.unload(engine)
    freed = weakref.ref(engine)
    engine.hold.set()
    assert in_worker(worker, other, EmbedTask(["kept"]))[1].result(30) is not None
    del engine, left
    gc.collect()
    assert freed() is None
    worker.stop(10)


def test_what_the_cache_answers_does_not_wait_for_the_next_batch() -> None:
    turns: list[int] = []
    worker = DeviceWorker(CPU, 32, 1.0, lambda detail: None, lambda: None, on_turn=lambda: turns.append(engine.begun))
    engine = Recording()
    worker.start()
    in_worker(worker, engine, EmbedTask(["known"]))[1].result(30)
    engine.hold.clear()
    running = in_worker(worker, engine, EmbedTask(["first"]))[1]
    until(lambda: engine.begun == 2)
    cached, slow = (in_worker(worker, engine, EmbedTask([name]))[1] for name in ("known", "second"))
    before = len(turns)
    engine.hold.pass_through(1)
    cached.result(30)
    until(lambda: engine.begun == 3)
    assert len(turns) > before, "its answer left before the batch that follows"
    engine.hold.set()
    assert running.result(30) is not None
    assert slow.result(30) is not None
    worker.stop(10)


def test_memory_that_is_short_for_a_moment_while_outputs_are_taken_costs_nobody_an_answer(worker: DeviceWorker) -> None:
    engine = Recording()
    prepare, failures = engine.prepare, [torch.OutOfMemoryError("CUDA out of memory")]

    def short_of_memory(task: Any) -> Any:
        work = prepare(task)
        absorb = work.absorb

        def once(*given: Any) -> None:
            if failures:
                raise failures.pop()
            absorb(*given)

        work.absorb = once  # type: ignore[method-assign]
        return work

    engine.prepare = short_of_memory  # type: ignore[method-assign]
    _, answer = in_worker(worker, engine, EmbedTask(["one"]))
    worker.start()
    assert answer.result(30).vectors[0, 0] == value_of("one")

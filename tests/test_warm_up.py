"""A model takes its first steps on the device thread before it is ready, and others are served between them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from conftest import FakeEngine, Gate, load_folder, running, settings
from fake_cuda import FakeCard

from gpu_engine.loading import EngineLoader
from gpu_engine.model_files import Hub, ModelName

pytestmark = pytest.mark.anyio


@dataclass(eq=False)
class Slow(FakeEngine):
    """An engine with three first steps, each of which waits at a gate."""

    gate: Gate = field(default_factory=Gate)
    threads: list[str] = field(default_factory=list)
    budget: int = 0
    error: BaseException | None = None

    def warm_up(self, batch_tokens: int) -> Iterator[bool]:
        self.budget = batch_tokens
        for _ in range(3):
            self.threads.append(threading.current_thread().name)
            assert self.gate.wait(30)
            if self.error is not None:
                raise self.error
            yield True


def loading(slow: Slow) -> Callable[..., Any]:
    return lambda kind, name, progress: slow if name.public == "some/model" else FakeEngine(kind)


async def test_first_steps_run_on_the_device_thread_and_others_are_served_between_them() -> None:
    slow = Slow("embed")
    slow.gate.clear()
    async with running(settings(gpu_batch_tokens=512), loading(slow)) as service:
        waiting = asyncio.create_task(service.embed("a", model="some/model"))
        await service.until(lambda: len(slow.threads) == 1)
        other = asyncio.create_task(service.embed("b"))
        await service.until(lambda: len(service.runtime.jobs.active) == 2)
        slow.gate.pass_through()
        assert (await other).status_code == 200
        assert len(slow.threads) < 3, "it did not wait for all of them"
        assert not slow.batches
        slow.gate.set()
        assert (await waiting).status_code == 200
        assert slow.threads == ["device-worker"] * 3
        assert slow.budget == 512
        await service.counted("texts", 2)


async def test_a_model_whose_first_step_fails_is_not_ready() -> None:
    slow = Slow("embed", error=RuntimeError("it does not run"))
    async with running(settings(), loading(slow)) as service:
        response = await service.embed("a", model="some/model")
        assert (response.status_code, response.json()["code"]) == (503, "model_failed")
        assert (await service.embed("b")).status_code == 200


@pytest.mark.parametrize("kind", ["embed", "bertscore"])
def test_a_real_engine_computes_once_and_captures_nothing_on_a_cpu(kind: str, tmp_path: Path) -> None:
    engine = load_folder(kind, tiny_models.save_bert(tmp_path / "model"))
    computed: list[int] = []
    compute = engine.compute
    engine.compute = lambda items, *more: computed.append(len(items)) or compute(items, *more)
    assert list(engine.warm_up(1024)) == [True]
    assert sum(computed) == 4


@pytest.mark.parametrize(
    ("error", "goes_on"),
    [(torch.OutOfMemoryError("CUDA out of memory"), True), (RuntimeError("it does not run"), False)],
    ids=repr,
)
def test_only_a_lack_of_memory_is_left_to_the_requests(error: Exception, goes_on: bool, tmp_path: Path) -> None:
    engine = load_folder("embed", tiny_models.save_bert(tmp_path / "model"))

    def refuse(*given: Any) -> Any:
        raise error

    engine.compute = refuse
    if goes_on:
        assert list(engine.warm_up(1024)) == [True]
    else:
        with pytest.raises(RuntimeError, match="it does not run"):
            list(engine.warm_up(1024))


def test_a_load_on_a_gpu_keeps_off_the_stream_that_serves_and_is_done_when_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card, seen = FakeCard(monkeypatch), []
    monkeypatch.setattr("gpu_engine.loading.load_embed", lambda *given: seen.append(card.current))
    loader = EngineLoader(torch.device("cuda"), Hub())
    name = ModelName("model", path=tiny_models.save_bert(tmp_path / "model"))
    for _ in range(2):
        loader.load("embed", name, None, lambda phase, fraction: None)  # type: ignore[arg-type]
    (stream,) = card.streams
    assert seen == [stream, stream]
    assert stream.synchronized == 2
    assert card.current is card.main

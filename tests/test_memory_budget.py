"""After memory ran out, batches grow again, but keep clear of the size that failed."""

from __future__ import annotations

import torch
from conftest import FakeEngine, words

from gpu_engine.work import EmbedTask
from gpu_engine.worker import DeviceWorker


def test_batches_grow_to_nine_tenths_of_the_size_that_failed_and_memory_runs_out_no_more() -> None:
    failed: list[int] = []

    def fail(texts: list[str]) -> None:
        if len(texts) > 40:
            failed.append(len(texts))
            raise torch.OutOfMemoryError("CUDA out of memory")

    engine = FakeEngine("embed", fail=fail)
    worker = DeviceWorker(torch.device("cpu"), 64 * 16, 0, lambda detail: None, lambda: None, long_batch_s=1e9)
    worker.start()

    def submit(name: str) -> None:
        work = engine.prepare(EmbedTask(words(name, 64)))
        worker.submit(engine, work, lambda done, fraction: None).future.result(30)

    for n in range(100):
        submit(f"t{n}")
    assert failed == [64, 41], "once more while it grows, then never"
    engine.batches.clear()
    submit("last")
    worker.stop(10)
    assert [len(batch) for batch in engine.batches] == [36, 28], "0.9 of 41 texts"

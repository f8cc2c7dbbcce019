"""After memory ran out, batches grow again, but keep clear of the size that failed."""

from __future__ import annotations

import torch
from conftest import FakeEngine, in_worker, words

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
        in_worker(worker, engine, EmbedTask(words(name, 64)))[1].result(30)

    for n in range(100):
        submit(f"t{n}")
    assert len(failed) == 2, "once more while it grows, then never"
    engine.batches.clear()
    submit("last")
    worker.stop(10)
    assert max(map(len, engine.batches)) == int(0.9 * failed[1])

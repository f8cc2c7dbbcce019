"""Processor time of the host, in process, around a forward that costs nothing: microseconds a text, and a pair.

    python benchmarks/host_time.py      the least of thirty runs, on one thread; MiniLM's tokenizer, rows of width 8

Width 8, because what follows a forward (pooling, matching) is a card's work, and would be most of it at 384.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))

from gpu_engine.batches import BatchRunner
from gpu_engine.fair_queue import FairQueue, Submission
from gpu_engine.loading import EngineLoader
from gpu_engine.model_files import Hub, configured_model
from gpu_engine.output_cache import OutputCache
from gpu_engine.work import BertScoreTask, EmbedTask, LoadOptions

CPU = torch.device("cpu")
WORDS = ["quick", "brown", "fox", "jumps", "over", "lazy", "dog", "while", "rain", "falls", "on", "quiet", "towns"]


class NullEncoder:
    """Hidden states that were there before, on the padded path that a GPU takes."""

    dtype = torch.float32
    rows = torch.randn(1 << 15, 8)

    def __call__(self, batch: Any, num_layers: int) -> torch.Tensor:
        return self.rows[: len(batch.ids)]


def null_engine(kind: str) -> Any:
    options, name = LoadOptions("float32", 512), configured_model("all-MiniLM-L6-v2")
    engine: Any = EngineLoader(CPU, Hub()).load(kind, name, options, lambda *_: None)
    null = NullEncoder()
    engine.tokens.encoder, engine.tokens.lanes = lambda dtype: null, None
    return engine


def spent_us(engine: Any, task: Any) -> float:
    """Microseconds of this thread from a task to its answer, which is left unread."""
    ended: list[BaseException | None] = []
    runner, queue = BatchRunner(CPU, 8192, OutputCache(0), lambda: None, 1e9), FairQueue()
    began = time.thread_time()
    submission = Submission(
        engine, engine.prepare(task), lambda submission, result, error: ended.append(error), lambda *_: None
    )
    queue.add(submission)
    while batch := queue.next_batch(runner.budget):
        runner.run(batch)
    spent_s = time.thread_time() - began
    assert ended == [None]
    return 1e6 * spent_s


def main() -> None:
    random = np.random.default_rng(0)

    def texts(count: int) -> list[str]:
        return [" ".join(random.choice(WORDS, size=int(random.integers(4, 40)))) for _ in range(count)]

    embed, score = null_engine("embed"), null_engine("bertscore")
    torch.set_num_threads(1)
    for count in (1, 100, 1000):
        tokenizing = min(timed_us(embed, texts(count)) for _ in range(30))
        least = min(spent_us(embed, EmbedTask(texts(count))) for _ in range(30))
        print(f"embeddings by {count}: {(least - tokenizing) / count:.1f} us a text, tokenizer apart")
    for count in (1, 100):
        tasks = [BertScoreTask(texts(count), [[text] for text in texts(count)]) for _ in range(30)]
        print(f"BERTScore by {count}: {min(spent_us(score, task) for task in tasks) / count:.1f} us a pair")


def timed_us(engine: Any, texts: list[str]) -> float:
    """Microseconds that the Rust tokenizer takes of this thread for the texts."""
    began = time.thread_time()
    engine.tokenize._fast.encode_batch_fast(texts)
    return 1e6 * (time.thread_time() - began)


if __name__ == "__main__":
    main()

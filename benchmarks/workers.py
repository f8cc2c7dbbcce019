"""Contenders that run in process, each in a process of its own, so that only their own settings touch them.

    python benchmarks/workers.py bert-score --model DIR --layers 5 --device cpu --dtype float32

The process reads one JSON object a line from standard input and answers each with one line. An item is a text, or
a candidate and its reference:

    {"op": "answers", "kind": "embed", "items": […]}   -> {"answers": [[…], …]}
    {"op": "measure", "kind": "bertscore", "pool": PATH, "per_call": 100, "start": 0, "seconds": 8}
                                                       -> {"seconds": …, "latencies_ms": […]}

An error is answered as {"error": "…"}; the end of the input ends the process.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parent.parent


class OwnEngine:
    """This repository's engines behind their device worker: no HTTP, no queue, no cache.

    They are loaded when the first item comes: a directory that can only score is never asked for an embedder.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        sys.path.insert(0, str(REPOSITORY))
        from gpu_engine import work
        from gpu_engine.device import default_batch_tokens, detect_device
        from gpu_engine.loading import EngineLoader
        from gpu_engine.model_files import Hub, configured_model
        from gpu_engine.worker import DeviceWorker

        device = detect_device(options.device)
        self.tasks, self.name = work, configured_model(str(options.model))
        self.options = work.LoadOptions(options.dtype, 512, options.layers)
        self.loader = EngineLoader(device, Hub())
        self.worker = DeviceWorker(device, default_batch_tokens(device), 0, lambda _: None, lambda: None)
        self.worker.start()
        self.engines: dict[str, Any] = {}

    def run(self, kind: str, task: Any) -> Any:
        """The engine's result for one task."""
        if kind not in self.engines:
            self.engines[kind] = self.loader.load(kind, self.name, self.options, lambda *_: None)
        engine = self.engines[kind]
        from gpu_engine.process import hand_over

        answer: concurrent.futures.Future[Any] = concurrent.futures.Future()
        self.worker.submit(engine, engine.prepare(task), functools.partial(hand_over, answer))
        return answer.result()

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """float32 (texts, dimensions)."""
        return np.asarray(self.run("embed", self.tasks.EmbedTask(texts)).vectors)

    def score(self, candidates: Sequence[str], references: Sequence[str]) -> np.ndarray:
        """float32 (3, pairs): precision, recall, f1."""
        task = self.tasks.BertScoreTask(candidates, [[reference] for reference in references])
        result = self.run("bertscore", task)
        return np.stack([result.precision, result.recall, result.f1])


class SentenceTransformersEngine:
    """`SentenceTransformer.encode` as documented: batches of 32, sorted by length by the library."""

    def __init__(self, options: argparse.Namespace) -> None:
        from reference import load_sentence_transformer

        self.model = load_sentence_transformer(options.model, options.device)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """float32 (texts, dimensions)."""
        return np.asarray(self.model.encode(list(texts), batch_size=32), dtype=np.float32)


class OnnxRuntimeEngine:
    """ONNX Runtime, the model exported with its mean pooling: sorted by length, batches of 32, a thread a core."""

    def __init__(self, options: argparse.Namespace) -> None:
        import onnxruntime
        from reference import export_onnx
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_file(str(options.model / "tokenizer.json"))
        limit = json.loads((options.model / "sentence_bert_config.json").read_text(encoding="utf-8"))["max_seq_length"]
        self.tokenizer.enable_truncation(limit)
        self.tokenizer.no_padding()
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
        model = export_onnx(options.model)
        self.session = onnxruntime.InferenceSession(model, settings, providers=["CPUExecutionProvider"])

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """float32 (texts, dimensions)."""
        rows = [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts))]
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        vectors: list[np.ndarray] = [np.zeros(0)] * len(rows)
        for first in range(0, len(order), 32):
            part = order[first : first + 32]
            ids = np.zeros((len(part), len(rows[part[-1]])), np.int64)
            mask = np.zeros_like(ids)
            for row, index in enumerate(part):
                ids[row, : len(rows[index])], mask[row, : len(rows[index])] = rows[index], 1
            for index, vector in zip(part, self.session.run(None, {"ids": ids, "mask": mask})[0], strict=True):
                vectors[index] = vector
        return np.stack(vectors)


class BertScoreEngine:
    """`bert_score.BERTScorer`, its model kept between calls; batches of 64, its default."""

    def __init__(self, options: argparse.Namespace) -> None:
        from reference import load_bert_scorer

        self.scorer = load_bert_scorer(options.model, options.layers, options.device, options.dtype)

    def score(self, candidates: Sequence[str], references: Sequence[str]) -> np.ndarray:
        """float32 (3, pairs): precision, recall, f1."""
        return np.stack([part.float().numpy() for part in self.scorer.score(list(candidates), list(references))])


ENGINES: dict[str, Callable[[argparse.Namespace], Any]] = {
    "engine": OwnEngine,
    "sentence-transformers": SentenceTransformersEngine,
    "onnxruntime": OnnxRuntimeEngine,
    "bert-score": BertScoreEngine,
}


def call(engine: Any, kind: str, items: Sequence[Any]) -> np.ndarray:
    """What the engine makes of these texts or pairs."""
    answers: np.ndarray = engine.embed(items) if kind == "embed" else engine.score(*zip(*items, strict=True))
    return answers


def answers(engine: Any, kind: str, items: Sequence[Any]) -> dict[str, Any]:
    """The answers that are compared. bert-score's for a pair alone: in a batch, padding can move them."""
    if isinstance(engine, BertScoreEngine):
        return {"answers": np.concatenate([call(engine, kind, [pair]) for pair in items], axis=1).tolist()}
    return {"answers": call(engine, kind, items).tolist()}


def measure(engine: Any, kind: str, pool: str, per_call: int, start: int, seconds: float) -> dict[str, Any]:
    """Call with `per_call` items at a time until `seconds` have passed; the last call is finished."""
    items = json.loads(Path(pool).read_text(encoding="utf-8"))
    latencies: list[float] = []
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        first = (start + len(latencies)) % (len(items) // per_call) * per_call
        called = time.perf_counter()
        call(engine, kind, items[first : first + per_call])
        latencies.append((time.perf_counter() - called) * 1000)
    return {"seconds": time.perf_counter() - began, "latencies_ms": latencies}


def main() -> None:
    """Load the engine, say so, then answer lines until the input ends."""
    parser = argparse.ArgumentParser(description="One in-process contender of the benchmark.")
    parser.add_argument("engine", choices=sorted(ENGINES))
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--layers", type=int, required=True, help="the layer BERTScore compares")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints must not get between the replies
    operations: dict[str, Callable[..., dict[str, Any]]] = {"answers": answers, "measure": measure}
    engine = ENGINES[options.engine](options)  # an error here is in the log
    replies.write("{}\n")
    for line in sys.stdin:
        message = json.loads(line)
        try:
            reply = operations[message.pop("op")](engine, **message)
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")


if __name__ == "__main__":
    main()

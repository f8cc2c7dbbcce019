"""Contenders that run in process, each in a process of its own, so that only their own settings touch them.

    python benchmarks/workers.py bert-score --model DIR --layers 5 --device cpu --dtype float32

The process reads one JSON object a line from standard input and answers each with one line:

    {"op": "embed", "texts": […]}                           -> {"answers": [[…], …]}
    {"op": "bertscore", "candidates": […], "references": […]} -> {"answers": [precision, recall, f1]}
    {"op": "measure", "kind": "embed", "pool": PATH, "per_call": 100, "start": 0, "seconds": 8}
                                                            -> {"seconds": …, "latencies_ms": […]}
    {"op": "describe"}                                      -> {"threads": …, …}
    {"op": "peak"}                                          -> {"tflops": …}

An error is answered as {"error": "…"}; the end of the input ends the process.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

REPOSITORY = Path(__file__).resolve().parent.parent


class Engine(Protocol):
    """What a contender can do in process; one that can't do one of the two raises `NotImplementedError`."""

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """float32 (texts, dimensions)."""

    def score(self, candidates: Sequence[str], references: Sequence[str]) -> np.ndarray:
        """float32 (3, pairs): precision, recall, f1."""

    def score_one_by_one(self, candidates: Sequence[str], references: Sequence[str]) -> np.ndarray:
        """The same, for the check of the answers: the way of calling that defines the answer."""

    def describe(self) -> dict[str, Any]:
        """What it says about itself: precision, threads of its own, and the like."""


# ------------------------------------------------------------------------------------------------------------
# This repository's engines: the only lines of the benchmark that know gpu_engine's inside
# ------------------------------------------------------------------------------------------------------------


class OwnEngine:
    """Adapter to this repository's engines behind their device worker: no HTTP, no queue, no cache.

    A DeBERTa-shaped model comes as any other directory, with its layer; engines are loaded when the first text
    or pair comes, so that a directory that can only score is never asked for an embedding model.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        sys.path.insert(0, str(REPOSITORY))
        from gpu_engine.device import default_batch_tokens, detect_device
        from gpu_engine.loading import EngineLoader
        from gpu_engine.model_files import Hub, configured_model
        from gpu_engine.work import LoadOptions
        from gpu_engine.worker import DeviceWorker

        device = detect_device(options.device)
        self.name, self.options = configured_model(str(options.model)), LoadOptions(options.dtype, 512, options.layers)
        self.loader = EngineLoader(device, Hub())
        self.worker = DeviceWorker(device, default_batch_tokens(device), 0, lambda _: None, lambda: None)
        self.worker.start()
        self.engines: dict[str, Any] = {}

    def run(self, kind: str, job: Any) -> Any:
        """The engine's result for one request."""
        if kind not in self.engines:
            self.engines[kind] = self.loader.load(kind, self.name, self.options, lambda *_: None)
        engine = self.engines[kind]
        return self.worker.submit(engine, engine.prepare(job), lambda *_: None).future.result()

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        from gpu_engine.work import EmbedTask

        return np.asarray(self.run("embed", EmbedTask(texts)).vectors)

    def score(self, candidates: Sequence[str], references: Sequence[str]) -> np.ndarray:
        from gpu_engine.work import BertScoreTask

        result = self.run("bertscore", BertScoreTask(candidates, [[reference] for reference in references]))
        return np.stack([result.precision, result.recall, result.f1])

    def score_one_by_one(self, candidates: Sequence[str], references: Sequence[str]) -> np.ndarray:
        return self.score(candidates, references)  # here the answer to a pair does not depend on the others

    def describe(self) -> dict[str, Any]:
        return {kind: engine.describe() for kind, engine in self.engines.items()}


# ------------------------------------------------------------------------------------------------------------
# The libraries
# ------------------------------------------------------------------------------------------------------------


class SentenceTransformersEngine:
    """`SentenceTransformer.encode` as documented: batches of 32, sorted by length by the library."""

    def __init__(self, options: argparse.Namespace) -> None:
        from reference import load_sentence_transformer

        self.model = load_sentence_transformer(options.model, options.device)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        return np.asarray(self.model.encode(list(texts), batch_size=32), dtype=np.float32)

    def score(self, candidates: Sequence[str], references: Sequence[str]) -> np.ndarray:
        raise NotImplementedError("sentence-transformers has no BERTScore")

    score_one_by_one = score

    def describe(self) -> dict[str, Any]:
        return {"dtype": str(self.model.dtype), "batch_size": 32}


class BertScoreEngine:
    """`bert_score.BERTScorer`, its model kept between calls; batches of 64, its default."""

    def __init__(self, options: argparse.Namespace) -> None:
        from reference import load_bert_scorer

        self.scorer = load_bert_scorer(options.model, options.layers, options.device, options.dtype)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        raise NotImplementedError("bert-score has no sentence embeddings")

    def score(self, candidates: Sequence[str], references: Sequence[str]) -> np.ndarray:
        results = self.scorer.score(list(candidates), list(references))
        return np.stack([result.float().numpy() for result in results])

    def score_one_by_one(self, candidates: Sequence[str], references: Sequence[str]) -> np.ndarray:
        """One pair a call: in one batch, padding can move a negative maximum to 0."""
        return np.concatenate(
            [self.score([candidate], [reference]) for candidate, reference in zip(candidates, references, strict=True)],
            axis=1,
        )

    def describe(self) -> dict[str, Any]:
        return {"dtype": str(self.scorer._model.dtype), "batch_size": 64}


ENGINES: dict[str, Callable[[argparse.Namespace], Engine]] = {
    "own": OwnEngine,
    "sentence-transformers": SentenceTransformersEngine,
    "bert-score": BertScoreEngine,
}

# ------------------------------------------------------------------------------------------------------------
# The line protocol
# ------------------------------------------------------------------------------------------------------------


def measure(engine: Engine, kind: str, pool: Path, per_call: int, start: int, seconds: float) -> dict[str, Any]:
    """Call with `per_call` items at a time until `seconds` have passed; the last call is finished."""
    items = json.loads(pool.read_text(encoding="utf-8"))
    calls = len(items["texts" if kind == "embed" else "candidates"]) // per_call
    latencies: list[float] = []
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        first = (start + len(latencies)) % calls * per_call
        span = slice(first, first + per_call)
        called = time.perf_counter()
        if kind == "embed":
            engine.embed(items["texts"][span])
        else:
            engine.score(items["candidates"][span], items["references"][span])
        latencies.append((time.perf_counter() - called) * 1000)
    return {"seconds": time.perf_counter() - began, "latencies_ms": latencies}


def describe(device: str) -> dict[str, Any]:
    """What decides the speed of this process, whichever engine it runs."""
    import torch

    return {
        "torch_threads": torch.get_num_threads(),
        "device_name": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def matmul_tflops(device: str, dtype: str, size: int = 8192) -> float:
    """The matrix product this device reaches, in TFLOP/s: what the arithmetic limit is counted with."""
    import torch

    left, right = torch.randn(2, size, size, device=device, dtype=getattr(torch, dtype)).unbind()
    repeats, best = 20, float("inf")
    for _ in range(5):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(repeats):
            left @ right
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 * repeats / best / 1e12


def answer(engine: Engine, message: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Carry out one line of the protocol."""
    operation = message.pop("op")
    if operation == "embed":
        return {"answers": engine.embed(message["texts"]).tolist()}
    if operation == "bertscore":
        return {"answers": engine.score_one_by_one(message["candidates"], message["references"]).tolist()}
    if operation == "measure":
        return measure(engine, **{**message, "pool": Path(message["pool"])})
    if operation == "describe":
        return {**describe(options.device), **engine.describe()}
    if operation == "peak":
        return {"tflops": matmul_tflops(options.device, message["dtype"])}
    raise ValueError(f"unknown operation {operation!r}")


def serve(options: argparse.Namespace) -> None:
    """Load the engine, say so, then answer lines until the input ends."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints must not get between the replies

    def reply(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")

    try:
        engine = ENGINES[options.engine](options)
    except Exception as error:
        reply({"error": f"{type(error).__name__}: {error}"})
        return
    reply({"ready": True})
    for line in sys.stdin:
        try:
            reply(answer(engine, json.loads(line), options))
        except Exception as error:
            reply({"error": f"{type(error).__name__}: {error}"})


def main() -> None:
    parser = argparse.ArgumentParser(description="One in-process contender of the benchmark.")
    parser.add_argument("engine", choices=sorted(ENGINES))
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--layers", type=int, required=True, help="the layer BERTScore compares")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    serve(parser.parse_args())


if __name__ == "__main__":
    main()

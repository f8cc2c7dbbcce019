"""Reranking by a cross-encoder: its request, its result, its engine. Knows nothing of HTTP."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpu_engine.model_files import ModelName, read_json
from gpu_engine.work import Item, NotFinite, Progress, RerankResult, RerankTask, UnsupportedModel

log = logging.getLogger(__name__)


class RerankEngine:
    """A sentence-transformers CrossEncoder, one pair of texts an item."""

    kind = "rerank"

    def __init__(self, model: Any) -> None:
        self.model = model

    def prepare(self, task: RerankTask) -> RerankWork:
        """Pairs the query with each distinct document."""
        return RerankWork(self, task)

    def run(self, items: Sequence[Item]) -> list[Any]:
        """One score (a float32 scalar array) per pair."""
        pairs = [(item.key[0], item.key[1]) for item in items]
        activation = torch.nn.Identity() if items[0].variant else None  # None: the model's own
        found = self.model.predict(pairs, batch_size=len(pairs), show_progress_bar=False, activation_fn=activation)
        scores = np.asarray(found, np.float32).reshape(-1)
        return [score if np.isfinite(score) else NotFinite("the model gave no finite score") for score in scores]

    def describe(self) -> dict[str, Any]:
        """Precision and backend."""
        return {"dtype": "float32", "backend": "sentence-transformers", "max_tokens": self.model.max_seq_length}


class RerankWork:
    """One reranking request; repeated documents are scored once."""

    def __init__(self, engine: RerankEngine, task: RerankTask) -> None:
        documents = list(dict.fromkeys(task.documents))
        index_of = {text: index for index, text in enumerate(documents)}
        self.indexes = [index_of[text] for text in task.documents]  # of each document among the distinct ones
        self.scores = np.zeros(len(documents), np.float32)
        limit = int(engine.model.max_seq_length or 512)
        # The cross-encoder tokenises pairs itself: there are no ids, and tokens are estimated.
        costs = [min(limit, 3 + len((task.query + text).encode()) // 4) for text in documents]
        no_ids = np.zeros(0, np.int32)
        self.items = [
            Item((task.query, text, task.raw), no_ids, int(task.raw), index, cost)
            for index, (text, cost) in enumerate(zip(documents, costs))
        ]

    def absorb(self, outputs: Sequence[tuple[Item, Any]]) -> None:
        """Stores scores."""
        for item, score in outputs:
            self.scores[item.index] = score

    def result(self) -> RerankResult:
        """Scores in input order."""
        return RerankResult(self.scores[self.indexes])


def load_rerank(name: ModelName, folder: Path, device: torch.device, progress: Progress) -> RerankEngine:
    """Loads a cross-encoder with one output. Raises UnsupportedModel for another kind of model."""
    from sentence_transformers import CrossEncoder

    progress("loading", 0.1)
    architectures = read_json(folder / "config.json").get("architectures") or []
    if architectures and all(each.endswith(("Model", "ForMaskedLM")) for each in architectures):
        # The library would put a random layer on top and score with it.
        detail = f"{name.public} is an encoder ({architectures[0]}), not a cross-encoder; "
        raise UnsupportedModel(detail + 'send "method": "cosine" to compare its embeddings.', "not_a_reranker")
    model = CrossEncoder(str(folder), device=str(device), local_files_only=True, model_kwargs={"dtype": torch.float32})
    if model.num_labels != 1:
        raise UnsupportedModel(f"{name.public} has {model.num_labels} outputs; a reranker has one.")
    log.info("rerank:%s: float32: GPU_DTYPE does not apply to cross-encoders", name.public)
    return RerankEngine(model)

"""Reranking by a cross-encoder: its request, its result, its engine. Knows nothing of HTTP."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpu_engine.model_files import ModelName, read_json
from gpu_engine.work import Progress, RerankResult, RerankTask, UnsupportedModel

log = logging.getLogger(__name__)


class RerankEngine:
    """A sentence-transformers CrossEncoder, one pair of texts an item."""

    kind = "rerank"

    def __init__(self, model: Any) -> None:
        self.model = model

    def prepare(self, task: RerankTask) -> RerankWork:
        """Pairs the query with each distinct document."""
        return RerankWork(self, task)

    def run(self, texts: Sequence[tuple[str, str]], variant: int) -> Scores:
        """One score a pair of query and document. variant: 1 for scores without the model's activation."""
        activation = torch.nn.Identity() if variant else None  # None: the model's own
        found = self.model.predict(
            list(texts), batch_size=len(texts), show_progress_bar=False, activation_fn=activation
        )
        return Scores(np.asarray(found, np.float32).reshape(-1))

    def retry(self, texts: Sequence[tuple[str, str]], variant: int) -> Scores:
        """It is float32 already."""
        return Scores(np.full(len(texts), np.nan, np.float32))

    def recall(self, kept: Sequence[np.ndarray]) -> Scores:
        """As any engine."""
        return Scores(np.array(kept, np.float32))

    def describe(self) -> dict[str, Any]:
        """Precision and backend."""
        return {"dtype": "float32", "backend": "sentence-transformers", "max_tokens": self.model.max_seq_length}


class Scores:
    """Scores of a batch, (pairs,) float32."""

    def __init__(self, scores: np.ndarray) -> None:
        self.scores = scores

    def bad(self) -> list[int]:
        """Places of scores that are not finite."""
        return [int(place) for place in np.flatnonzero(~np.isfinite(self.scores))]

    def nbytes(self, place: int) -> int:
        """Bytes of a score."""
        return 4

    def keep(self, place: int) -> np.ndarray:
        """A copy of a score, ()."""
        return np.array(self.scores[place])


class RerankWork:
    """One reranking request; repeated documents are scored once."""

    def __init__(self, engine: RerankEngine, task: RerankTask) -> None:
        self.query, self.variant = task.query, int(task.raw)
        self.documents = list(dict.fromkeys(task.documents))
        index_of = {text: index for index, text in enumerate(self.documents)}
        self.indexes = [index_of[text] for text in task.documents]  # of each document among the distinct ones
        self.scores = np.zeros(len(self.documents), np.float32)
        limit = int(engine.model.max_seq_length or 512)
        # The cross-encoder tokenises pairs itself: there are no ids, and tokens are estimated.
        self.costs = [min(limit, 3 + len((task.query + text).encode()) // 4) for text in self.documents]
        self.order = sorted(range(len(self.documents)), key=self.costs.__getitem__, reverse=True)

    def text(self, index: int) -> tuple[str, str]:
        """Query and document."""
        return self.query, self.documents[index]

    def key(self, index: int) -> tuple[str, str]:
        """Query and document."""
        return self.text(index)

    def absorb(self, indexes: Sequence[int], outputs: Scores, places: Sequence[int]) -> None:
        """Stores scores."""
        self.scores[list(indexes)] = outputs.scores[list(places)]

    def landed(self, indexes: Sequence[int]) -> None:
        """Nothing is kept that could go."""

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

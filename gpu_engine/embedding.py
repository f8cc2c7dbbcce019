"""Sentence embeddings: their request, their result, their engine. Knows nothing of BERTScore, and nothing of HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpu_engine.device import ToHost
from gpu_engine.model_files import ModelName, is_cross_encoder
from gpu_engine.token_engine import TokenEngine, settle_precision
from gpu_engine.token_model import CALIBRATION_TEXTS, PRECISION_TEXTS, TokenModel
from gpu_engine.tokenizing import TextTokenizer, longest_input
from gpu_engine.work import EmbedResult, EmbedTask, InvalidInput, LoadOptions, Progress, UnsupportedModel


class EmbedEngine(TokenEngine):
    """Sentence embeddings: our forward pass, then the model's own pooling and dense modules.

    A trailing Normalize module is applied to the finished answer instead, so that `normalize=false` and
    cut dimensions mean what they say.
    """

    kind = "embed"

    def __init__(self, model: Any, tokens: TokenModel, tokenize: TextTokenizer) -> None:
        super().__init__(tokens, tokenize)
        self.prompts: dict[str, str] = dict(model.prompts or {})
        self.default_prompt = model.default_prompt_name
        modules = list(model)[1:]
        self.normalizes = type(modules[-1]).__name__ == "Normalize"
        self.modules = modules[:-1] if self.normalizes else modules
        self.skips_prompt = any(getattr(module, "include_prompt", True) is False for module in modules)
        self.dimensions = int(model.get_embedding_dimension())

    def prepare(self, task: EmbedTask) -> EmbedWork:
        """Tokenises each distinct text once. Raises InvalidInput."""
        if task.dimensions is not None and task.dimensions > self.dimensions:
            raise InvalidInput(f"dimensions: got {task.dimensions}, the model has {self.dimensions}")
        if task.prompt_name is not None and task.prompt_name not in self.prompts:
            known = ", ".join(sorted(self.prompts)) or "none"
            raise InvalidInput(f"prompt_name: the model has no prompt {task.prompt_name!r:.60}; it has: {known}")
        optional = task.optional_prompt if task.optional_prompt in self.prompts else self.default_prompt
        name = optional if task.prompt_name is None else task.prompt_name
        return EmbedWork(self, task, self.prompts.get(name or "", ""))

    def prompt_tokens(self, prompt: str) -> int:
        """Tokens at the start of a text that pooling leaves out."""
        if not prompt or not self.skips_prompt:
            return 0
        ((ids,), _) = self.tokenize([prompt])
        return len(ids) - int(len(ids) > 0 and int(ids[-1]) in self.tokenize.tokenizer.all_special_ids)

    def compute(self, ids: Sequence[np.ndarray], variant: int, dtype: torch.dtype | None = None) -> Vectors:
        """Vectors before normalising. variant: tokens of the prompt, which pooling leaves out."""
        found: list[Tensor] = []
        order: list[int] = []
        with torch.inference_mode():
            for block in self.tokens.blocks(ids, self.tokens.layers, dtype):
                real = (
                    torch.ones(block.hidden.shape[:2], device=block.hidden.device) if block.real is None else block.real
                )
                features: dict[str, Any] = {"token_embeddings": block.hidden, "attention_mask": real.long()}
                if variant:
                    features["prompt_length"] = variant
                for module in self.modules:
                    features = module(features)
                found.append(features["sentence_embedding"].float())
                order += block.indexes
            if not found:
                return Vectors(np.zeros((len(ids), self.dimensions), np.float32), None)
            vectors = ToHost(found[0] if len(found) == 1 else torch.cat(found))
        rows = np.full(len(ids), -1)
        rows[order] = np.arange(len(order))
        return Vectors(vectors, rows)

    def join(self, outputs: Sequence[Vectors], order: Sequence[int]) -> Vectors:
        """As any engine of tokens."""
        return Vectors(np.concatenate([each.array() for each in outputs]), np.asarray(order))

    def recall(self, kept: Sequence[np.ndarray]) -> Vectors:
        """As any engine."""
        return Vectors(np.stack(kept), None)

    def deviation(self, dtype: torch.dtype) -> dict[str, float]:
        """Worst 1 - cosine over the calibration texts."""
        work = self.prepare(EmbedTask(PRECISION_TEXTS))
        types = (torch.float32, dtype)
        exact, reduced = (unit_rows(self.compute_finite(work.ids, work.variant, each).array()) for each in types)
        return {"cosine": float(1 - (exact * reduced).sum(axis=1).min())}

    def describe(self) -> dict[str, Any]:
        """As any engine of tokens, and dimensions and prompts."""
        return {**super().describe(), "dimensions": self.dimensions, "prompts": sorted(self.prompts)}


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled to unit length; (n, d) float32."""
    unit: np.ndarray = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return unit


class Vectors:
    """Vectors of a batch, each (dimensions,) float32: rows of what came or is coming from the device.

    rows: the row of each text, -1 for a text without tokens; None where they are in order.
    """

    def __init__(self, found: ToHost | np.ndarray, rows: np.ndarray | None) -> None:
        self._found: ToHost | np.ndarray | None = found
        self._rows = rows
        self._array = np.zeros(0, np.float32)

    def array(self) -> np.ndarray:
        """(texts, dimensions) in the batch's order; waits for the device."""
        if self._found is not None:
            found = self._found.numpy() if isinstance(self._found, ToHost) else self._found
            self._array = found if self._rows is None else found[self._rows]
            if self._rows is not None and (self._rows < 0).any():
                self._array[self._rows < 0] = 0.0
            self._found = None  # vectors that are kept do not keep pinned memory
        return self._array

    def bad(self) -> list[int]:
        """Places of vectors that are not finite, or zero."""
        vectors = self.array()
        usable = np.isfinite(vectors).all(axis=1) & vectors.any(axis=1)
        return [] if usable.all() else np.flatnonzero(~usable).tolist()

    def nbytes(self, place: int) -> int:
        """Bytes of a vector."""
        return int(self.array()[place].nbytes)

    def keep(self, place: int) -> np.ndarray:
        """A copy of a vector."""
        return np.array(self.array()[place])


class EmbedWork:
    """One embedding request; repeated texts are encoded once."""

    def __init__(self, engine: EmbedEngine, task: EmbedTask, prompt: str) -> None:
        self.engine, self.task = engine, task
        texts = list(dict.fromkeys(task.texts))
        index_of = {text: index for index, text in enumerate(texts)}
        self.indexes = [index_of[text] for text in task.texts]  # of each text among the distinct ones
        self.variant = engine.prompt_tokens(prompt)
        self.ids, self.cut = engine.tokenize([prompt + text for text in texts]) if texts else ([], set())
        self.costs = list(map(len, self.ids))
        self.order = sorted(range(len(texts)), key=self.costs.__getitem__, reverse=True)
        around = len(engine.tokenize([prompt])[0][0]) if prompt else engine.tokenize.special_tokens
        self.unknown = engine.tokenize.mostly_unknown(self.ids, around)
        self._found: list[tuple[Sequence[int], Vectors, Sequence[int]]] = []

    def text(self, index: int) -> np.ndarray:
        """Token ids."""
        return self.ids[index]

    def key(self, index: int) -> bytes:
        """Token ids, as bytes."""
        return self.ids[index].tobytes()

    def absorb(self, indexes: Sequence[int], outputs: Vectors, places: Sequence[int]) -> None:
        """Notes whose vectors are where."""
        self._found.append((indexes, outputs, places))

    def landed(self, indexes: Sequence[int]) -> None:
        """Nothing is kept that could go."""

    def result(self) -> EmbedResult:
        """Rows in input order, cut and normalised as asked."""
        if not self.indexes:
            return EmbedResult(np.zeros((0, 0), np.float32), [], [])
        row_of = np.empty(len(self.costs), np.int64)
        arrays, total = [], 0
        for indexes, outputs, places in self._found:
            arrays.append(outputs.array())
            row_of[indexes] = total + np.asarray(places)
            total += len(arrays[-1])
        rows = (arrays[0] if len(arrays) == 1 else np.concatenate(arrays))[row_of[self.indexes]]
        normalize, dimensions = self.task.normalize, self.task.dimensions
        if normalize is None and dimensions is None and self.engine.normalizes:  # the library's order
            rows = unit_rows(rows)[:, : self.engine.dimensions]  # a saved `truncate_dim` is less than there is
        else:
            rows = rows[:, : dimensions or self.engine.dimensions]
            if self.engine.normalizes if normalize is None else normalize:
                rows = unit_rows(rows)
        truncated = [row for row, index in enumerate(self.indexes) if index in self.cut] if self.cut else []
        unknown = [row for row, index in enumerate(self.indexes) if index in self.unknown] if self.unknown else []
        tokens = [self.costs[index] for index in self.indexes]
        return EmbedResult(np.ascontiguousarray(rows), truncated, tokens, unknown)


def load_embed(
    name: ModelName, folder: Path, device: torch.device, options: LoadOptions, progress: Progress
) -> EmbedEngine:
    """Loads an embedding engine from a sentence-transformers folder and checks it against the library.

    Raises:
        UnsupportedModel: it is not a text encoder, or its pipeline is not one that we reproduce.
    """
    from sentence_transformers import SentenceTransformer

    progress("loading", 0.1)
    if is_cross_encoder(folder):
        raise UnsupportedModel(f"{name.public} is a cross-encoder: it reranks, it has no embeddings.")
    model = SentenceTransformer(
        str(folder), device="cpu", local_files_only=True, model_kwargs={"dtype": torch.float32}
    ).eval()
    progress("checking", 0.6)
    module = getattr(model[0], "auto_model", None)
    if module is None or "text" not in getattr(model[0], "modality_config", {"text": None}):
        raise UnsupportedModel(f"{name.public} is not a transformer that embeds text.")
    tokens = TokenModel(module, model.tokenizer.pad_token_id or 0, device, options.experimental)
    limit = min(int(model.max_seq_length or 512), longest_input(module, model.tokenizer))
    texts = list(CALIBRATION_TEXTS)  # one by one: some models look at padding
    expected = model.encode(texts, batch_size=1, convert_to_numpy=True, show_progress_bar=False)
    engine = EmbedEngine(model, tokens, TextTokenizer(model.tokenizer, limit))
    for part in engine.modules:
        part.to(device)
    work = engine.prepare(EmbedTask(CALIBRATION_TEXTS, normalize=True))
    tokens.verify(work.ids, tokens.layers)
    outputs = engine.compute(work.ids, work.variant)
    if outputs.bad():
        raise UnsupportedModel(f"{name.public} gives NaN, infinity or zeros for ordinary text.")
    work.absorb(range(len(work.ids)), outputs, range(len(work.ids)))
    worst = float((work.result().vectors * unit_rows(expected)).sum(axis=1).min())
    if worst < 0.9999:
        detail = f"{name.public} uses a pipeline that this service does not reproduce exactly; name another model."
        raise UnsupportedModel(detail)
    settle_precision(engine, name, device, options.dtype, {"cosine": options.dtype_bound / 2})
    return engine

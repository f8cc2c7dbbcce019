"""Sentence embeddings: their request, their result, their engine. Knows nothing of BERTScore, and nothing of HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpu_engine.model_files import ModelName, is_cross_encoder
from gpu_engine.token_engine import TokenEngine, settle_precision
from gpu_engine.token_model import CALIBRATION_TEXTS, PRECISION_TEXTS, TokenModel
from gpu_engine.tokenizing import TextTokenizer, longest_input
from gpu_engine.work import EmbedResult, EmbedTask, InvalidInput, Item, LoadOptions, Progress, UnsupportedModel


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
        ids, _ = self.tokenize([prompt])[0]
        return len(ids) - int(len(ids) > 0 and int(ids[-1]) in self.tokenize.tokenizer.all_special_ids)

    def compute(self, items: Sequence[Item], dtype: torch.dtype | None = None) -> list[np.ndarray | None]:
        """Vectors before normalising, (dimensions,) float32 on the host; None where not finite or zero."""
        outputs: list[np.ndarray | None] = [None] * len(items)
        with torch.inference_mode():
            for block in self.tokens.blocks([item.ids for item in items], self.tokens.layers, dtype):
                real = block.hidden.new_ones(block.hidden.shape[:2]) if block.real is None else block.real
                features: dict[str, Any] = {"token_embeddings": block.hidden, "attention_mask": real.long()}
                if items[0].variant:
                    features["prompt_length"] = items[0].variant
                for module in self.modules:
                    features = module(features)
                vectors = features["sentence_embedding"].float().cpu().numpy()
                usable = np.isfinite(vectors).all(axis=1) & vectors.any(axis=1)
                for index, ok, vector in zip(block.indexes, usable, vectors):
                    outputs[index] = vector if ok else None
        return outputs

    def deviation(self, dtype: torch.dtype) -> dict[str, float]:
        """Worst 1 - cosine over the calibration texts."""
        items = self.prepare(EmbedTask(PRECISION_TEXTS)).items
        exact, reduced = (unit_rows(np.stack(self.compute_finite(items, each))) for each in (torch.float32, dtype))
        return {"cosine": float(1 - (exact * reduced).sum(axis=1).min())}

    def describe(self) -> dict[str, Any]:
        """As any engine of tokens, and dimensions and prompts."""
        return {**super().describe(), "dimensions": self.dimensions, "prompts": sorted(self.prompts)}


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled to unit length; (n, d) float32."""
    unit: np.ndarray = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return unit


class EmbedWork:
    """One embedding request; repeated texts are encoded once."""

    def __init__(self, engine: EmbedEngine, task: EmbedTask, prompt: str) -> None:
        self.engine, self.task = engine, task
        texts = list(dict.fromkeys(task.texts))
        index_of = {text: index for index, text in enumerate(texts)}
        self.indexes = [index_of[text] for text in task.texts]  # of each text among the distinct ones
        skipped = engine.prompt_tokens(prompt)
        encoded = engine.tokenize([prompt + text for text in texts]) if texts else []
        self.cut = [cut for _, cut in encoded]
        around = len(engine.tokenize([prompt])[0][0]) if prompt else engine.tokenize.special_tokens
        self.unknown = engine.tokenize.mostly_unknown([ids for ids, _ in encoded], around)
        self.items = [
            Item((ids.tobytes(), skipped), ids, skipped, index, len(ids)) for index, (ids, _) in enumerate(encoded)
        ]
        self.vectors: list[Any] = [None] * len(texts)  # arrays, as they come

    def absorb(self, outputs: Sequence[tuple[Item, Any]]) -> None:
        """Stores vectors, (dimensions,) float32."""
        for item, vector in outputs:
            self.vectors[item.index] = vector

    def result(self) -> EmbedResult:
        """Rows in input order, cut and normalised as asked."""
        if not self.indexes:
            return EmbedResult(np.zeros((0, 0), np.float32), [], [])
        rows = np.stack([self.vectors[index] for index in self.indexes])
        if self.task.dimensions is not None:
            rows = rows[:, : self.task.dimensions]
        if self.engine.normalizes if self.task.normalize is None else self.task.normalize:
            rows = unit_rows(rows)
        truncated = [row for row, index in enumerate(self.indexes) if self.cut[index]]
        unknown = [row for row, index in enumerate(self.indexes) if index in self.unknown]
        tokens = [self.items[index].cost for index in self.indexes]
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
    tokens = TokenModel(module, model.tokenizer.pad_token_id or 0, device)
    limit = min(int(model.max_seq_length or 512), longest_input(module, model.tokenizer))
    expected = unit_rows(model.encode(list(CALIBRATION_TEXTS), convert_to_numpy=True, show_progress_bar=False))
    engine = EmbedEngine(model, tokens, TextTokenizer(model.tokenizer, limit))
    for part in engine.modules:
        part.to(device)
    work = engine.prepare(EmbedTask(CALIBRATION_TEXTS, normalize=True))
    tokens.verify([item.ids for item in work.items], tokens.layers)
    outputs = engine.compute(work.items)
    if any(output is None for output in outputs):
        raise UnsupportedModel(f"{name.public} gives NaN, infinity or zeros for ordinary text.")
    work.absorb(list(zip(work.items, outputs)))
    worst = float((work.result().vectors * expected).sum(axis=1).min())
    if worst < 0.9999:
        detail = f"{name.public} uses a pipeline that this service does not reproduce exactly; name another model."
        raise UnsupportedModel(detail)
    settle_precision(engine, name, device, options.dtype, {"cosine": options.dtype_bound / 2})
    return engine

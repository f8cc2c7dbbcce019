"""Reranking by a cross-encoder: its request, its result, its engine. Knows nothing of HTTP."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from gpu_engine.device import ToHost
from gpu_engine.model_files import ModelName, read_json
from gpu_engine.packing import cut_by_length, pack_padded
from gpu_engine.token_model import CALIBRATION_TEXTS
from gpu_engine.tokenizing import in_chunks, longest_input, longest_positions
from gpu_engine.work import LoadOptions, Progress, RerankResult, RerankTask, UnsupportedModel

log = logging.getLogger(__name__)


class PairIds(NamedTuple):
    """A query and a document as one sequence: token ids, and which of the two each is of; (tokens,) int32."""

    ids: np.ndarray
    types: np.ndarray


class OwnPairs:
    """A sequence classifier on our tokenising and padding: one output a pair, without the model's activation.

    Raises UnsupportedModel for a model that is more than that: with prompts, other modules, no Rust tokenizer.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        first, *others = model
        tokenizer: Any = getattr(first, "tokenizer", None)
        self.module: Any = getattr(first, "auto_model", None)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if others or model.prompts or backend is None or not hasattr(self.module, "num_labels"):
            raise UnsupportedModel(f"{type(self.module).__name__} with more around it")
        self.device, self.longest = device, longest_positions(self.module)
        self.source: Any = None  # the float32 module on the host, where another type serves
        self.exact: Any = None  # the same on the device, once it had to help out
        limit = min(int(model.max_seq_length or 512), longest_input(self.module, tokenizer))
        self.tokenizer = Tokenizer.from_str(backend.to_str())
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(limit, strategy="longest_first", direction=tokenizer.truncation_side)
        self.pad_id = tokenizer.pad_token_id or 0
        self.typed = "token_type_ids" in tokenizer.model_input_names

    def encode(self, query: str, documents: Sequence[str]) -> tuple[list[PairIds], list[int], set[int]]:
        """Pairs, their costs in tokens, and the indexes of those that were cut."""
        pairs: list[PairIds] = []
        cut: set[int] = set()
        for chunk in in_chunks(documents, len(query)):
            for encoding in self.tokenizer.encode_batch_fast([(query, text) for text in chunk]):
                if encoding.overflowing:
                    cut.add(len(pairs))
                pairs.append(PairIds(np.array(encoding.ids, np.int32), np.array(encoding.type_ids, np.int32)))
        return pairs, [len(pair.ids) for pair in pairs], cut

    @torch.inference_mode()
    def logits(self, pairs: Sequence[PairIds], exact: bool = False) -> Tensor:
        """(pairs,) float32 on the device. exact: in float32, whatever serves."""
        if exact and self.exact is None:
            self.exact = copy.deepcopy(self.source).to(self.device)
        module = self.exact if exact else self.module
        order = sorted(range(len(pairs)), key=lambda index: -len(pairs[index].ids))
        found = torch.empty(len(pairs), device=self.device)
        for part in cut_by_length(order, [pair.ids for pair in pairs]):
            (batch,) = pack_padded(
                [[pairs[i].ids for i in part]], self.pad_id, self.device, torch.float32, self.longest
            )
            rows, tokens = len(part), batch.groups[0].tokens
            mask = torch.ones(rows, tokens, device=self.device) if batch.real is None else batch.real
            inputs = {"input_ids": batch.ids.view(rows, tokens), "attention_mask": mask.long()}
            if self.typed:
                (types,) = pack_padded([[pairs[i].types for i in part]], 0, self.device, torch.float32, self.longest)
                inputs["token_type_ids"] = types.ids.view(rows, tokens)
            found[torch.tensor(part, device=self.device)] = module(**inputs).logits[:, 0].float()
        return found


class LibraryPairs:
    """A CrossEncoder as the library runs it, for models that are more than a sequence classifier; always float32."""

    module: Any = None
    source: Any = None
    exact: Any = None

    def __init__(self, model: Any) -> None:
        self.model, self.limit = model, int(model.max_seq_length or 512)

    def encode(self, query: str, documents: Sequence[str]) -> tuple[list[tuple[str, str]], list[int], set[int]]:
        """Pairs, their costs, which are estimates, and nothing of what is cut: the library does not tell."""
        costs = [min(self.limit, 3 + len((query + text).encode()) // 4) for text in documents]
        return [(query, text) for text in documents], costs, set()

    def logits(self, pairs: Sequence[tuple[str, str]], exact: bool = False) -> Tensor:
        """(pairs,) float32."""
        identity = torch.nn.Identity()
        found = self.model.predict(
            list(pairs), batch_size=len(pairs), show_progress_bar=False, activation_fn=identity, convert_to_tensor=True
        )
        return cast(Tensor, found).float().reshape(-1)


class RerankEngine:
    """A cross-encoder: one score for each pair of a query and a document."""

    kind = "rerank"

    def __init__(self, pairs: OwnPairs | LibraryPairs, activation: Any, limit: int) -> None:
        self.pairs, self.activation, self.limit = pairs, activation, limit
        self.dtype, self.measured = torch.float32, 0.0  # and its worst deviation from float32

    def prepare(self, task: RerankTask) -> RerankWork:
        """Pairs the query with each distinct document, tokenised."""
        return RerankWork(self, task)

    def run(self, texts: Sequence[Any], variant: int) -> Scores:
        """One score a pair. variant: 1 for scores without the model's activation."""
        return self._scores(self.pairs.logits(texts), variant)

    def retry(self, texts: Sequence[Any], variant: int) -> Scores:
        """In float32."""
        if self.dtype == torch.float32:
            return Scores(ToHost(torch.full((len(texts),), torch.nan)))
        return self._scores(self.pairs.logits(texts, exact=True), variant)

    def _scores(self, logits: Tensor, variant: int) -> Scores:
        with torch.inference_mode():
            return Scores(ToHost(logits if variant else self.activation(logits)))

    def release_memory(self) -> None:
        """Frees the float32 fallback."""
        self.pairs.exact = None

    def recall(self, kept: Sequence[np.ndarray]) -> Scores:
        """As any engine."""
        return Scores(ToHost(torch.from_numpy(np.array(kept, np.float32))))

    def choose_precision(self, wanted: str, device: torch.device, bound: float) -> str:
        """Serves in the type that GPU_DTYPE names or, on a GPU, in float16 if no score changes by more than `bound`."""
        reduced = getattr(torch, wanted) if wanted != "auto" else torch.float16 if device.type == "cuda" else None
        if self.pairs.module is None or reduced in (None, torch.float32):
            return "float32"
        work = self.prepare(RerankTask(CALIBRATION_TEXTS[0], CALIBRATION_TEXTS))
        exact, module = self.run(work.pairs, 0).array(), self.pairs.module
        self.pairs.module = copy.deepcopy(module).to(reduced)
        self.measured = float(np.abs(self.run(work.pairs, 0).array() - exact).max())
        if wanted == "auto" and not self.measured <= bound:
            self.pairs.module = module
            return f"float32: {reduced} deviates {self.measured:.2e}, bound {bound:.1e}"
        self.dtype, self.pairs.source = reduced, module.cpu()
        return f"{reduced} deviates {self.measured:.1e} at most".replace("torch.", "")

    def describe(self) -> dict[str, Any]:
        """Precision, its deviation, and what computes."""
        own = isinstance(self.pairs, OwnPairs)
        return {
            "dtype": str(self.dtype).removeprefix("torch."),
            "deviation": {"score": round(self.measured, 7)} if self.measured else {},
            "backend": "transformers" if own else "sentence-transformers",
            "max_tokens": self.limit,
        }


class Scores:
    """Scores of a batch, (pairs,) float32, on their way to the host."""

    def __init__(self, scores: ToHost) -> None:
        self._scores = scores

    def array(self) -> np.ndarray:
        """(pairs,) float32; waits for the device."""
        return self._scores.numpy()

    def bad(self) -> list[int]:
        """Places of scores that are not finite."""
        return [int(place) for place in np.flatnonzero(~np.isfinite(self.array()))]

    def nbytes(self, place: int) -> int:
        """Bytes of a score."""
        return 4

    def keep(self, place: int) -> np.ndarray:
        """A copy of a score, ()."""
        return np.array(self.array()[place])


class RerankWork:
    """One reranking request; repeated documents are scored once."""

    def __init__(self, engine: RerankEngine, task: RerankTask) -> None:
        self.variant = int(task.raw)
        documents = list(dict.fromkeys(task.documents))
        index_of = {text: index for index, text in enumerate(documents)}
        self.indexes = [index_of[text] for text in task.documents]  # of each document among the distinct ones
        self.pairs: Sequence[Any]
        self.pairs, self.costs, self.cut = engine.pairs.encode(task.query, documents)
        self.order = sorted(range(len(documents)), key=self.costs.__getitem__, reverse=True)
        self._found: list[tuple[Sequence[int], Scores, Sequence[int]]] = []

    def text(self, index: int) -> Any:
        """The pair as the engine takes it."""
        return self.pairs[index]

    def key(self, index: int) -> Any:
        """The pair, in a form that can be compared."""
        pair = self.pairs[index]
        return (pair.ids.tobytes(), pair.types.tobytes()) if isinstance(pair, PairIds) else pair

    def absorb(self, indexes: Sequence[int], outputs: Scores, places: Sequence[int]) -> None:
        """Notes whose scores are where."""
        self._found.append((indexes, outputs, places))

    def landed(self, indexes: Sequence[int]) -> None:
        """Nothing is kept that could go."""

    def result(self) -> RerankResult:
        """Scores in input order."""
        scores = np.zeros(len(self.costs), np.float32)
        for indexes, outputs, places in self._found:
            scores[list(indexes)] = outputs.array()[list(places)]
        truncated = [row for row, index in enumerate(self.indexes) if index in self.cut]
        return RerankResult(scores[self.indexes], truncated)


def load_rerank(
    name: ModelName, folder: Path, device: torch.device, options: LoadOptions, progress: Progress
) -> RerankEngine:
    """Loads a cross-encoder with one output and checks it. Raises UnsupportedModel for another kind of model."""
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
    progress("checking", 0.6)
    engine = RerankEngine(verified_pairs(model, device), model.activation_fn, int(model.max_seq_length or 512))
    bound = options.dtype_bound
    log.info("rerank:%s: %s", name.public, engine.choose_precision(options.dtype, device, bound))
    return engine


def verified_pairs(model: Any, device: torch.device) -> OwnPairs | LibraryPairs:
    """Our tokenising and padding around the model if they give the library's numbers, else the library."""
    theirs = LibraryPairs(model)
    query, documents = CALIBRATION_TEXTS[0], [*CALIBRATION_TEXTS, " ".join(3 * CALIBRATION_TEXTS)]
    try:
        own = OwnPairs(model, device)
        expected = theirs.logits(theirs.encode(query, documents)[0])
        worst = float((own.logits(own.encode(query, documents)[0]) - expected).abs().max())
        if not worst <= 1e-3 * max(1.0, float(expected.abs().max())):
            raise UnsupportedModel(f"differs from sentence-transformers by {worst:.1e}")
    except (UnsupportedModel, AttributeError, TypeError) as reason:
        log.info("%s runs through sentence-transformers: %s", type(model).__name__, reason)
        return theirs
    return own

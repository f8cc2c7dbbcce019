"""BERTScore: its request, its result, its arithmetic (https://arxiv.org/abs/1904.09675), its engine.

Knows nothing of embeddings of whole texts, and nothing of HTTP.
"""

from __future__ import annotations

import csv
import functools
import logging
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gpu_engine.model_files import ModelName, table_name
from gpu_engine.token_engine import TokenEngine, settle_precision
from gpu_engine.token_model import CALIBRATION_TEXTS, PRECISION_TEXTS, TokenModel
from gpu_engine.tokenizing import TextTokenizer, at_indexes, longest_input, unknown_tokens
from gpu_engine.work import (
    BertScoreResult,
    BertScoreTask,
    InvalidInput,
    Item,
    LoadOptions,
    ModelError,
    NotFinite,
    Progress,
)

log = logging.getLogger(__name__)

MEASURES = ("precision", "recall", "f1")


class BertScoreEngine(TokenEngine):
    """BERTScore (https://arxiv.org/abs/1904.09675) with bert-score's definitions, computed pair by pair."""

    kind = "bertscore"

    def __init__(self, tokens: TokenModel, tokenize: TextTokenizer, default_layers: int, baselines: Baselines) -> None:
        super().__init__(tokens, tokenize)
        self.default_layers = self.default_variant = default_layers
        self.baselines = baselines
        tokenizer = tokenize.tokenizer
        family = {cls.__name__ for cls in type(tokenizer).__mro__}
        self.prefix = " " if family & {"GPT2Tokenizer", "RobertaTokenizer"} else ""
        self.weightless = np.array(sorted({tokenizer.cls_token_id, tokenizer.sep_token_id} - {None}), np.int32)
        self.deviations: dict[int, dict[str, float]] = {}  # of the type that was tried, by layer
        self.float32_layers: list[int] = []  # which that type is too coarse for

    def encode_texts(self, texts: Sequence[str]) -> list[tuple[np.ndarray, bool]]:
        """Token ids of stripped texts, as bert-score cuts and prefixes them."""
        stripped = (text.strip() for text in texts)
        return self.tokenize([self.prefix + text if text else "" for text in stripped])

    def prepare(self, task: BertScoreTask) -> BertScoreWork:
        """Tokenises each distinct text once. Raises InvalidInput."""
        layers = self.default_layers if task.layers is None else task.layers
        if not self.tokens.first_layer <= layers <= self.tokens.layers:
            allowed = f"{self.tokens.first_layer} to {self.tokens.layers}"
            raise InvalidInput(f"num_layers: got {layers}, the model has {self.tokens.layers} layers; send {allowed}")
        baseline = self.baselines.row(task.lang or "en", layers) if task.rescale else None
        return BertScoreWork(self, task, layers, baseline)

    def compute(self, items: Sequence[Item], dtype: torch.dtype | None = None) -> list[Tensor | None]:
        """Unit-length token embeddings of each text, (tokens, hidden) float32; None where not finite."""
        outputs: list[Tensor | None] = [None] * len(items)
        layers = items[0].variant
        dtype = dtype or (torch.float32 if layers in self.float32_layers else None)
        for block in self.tokens.blocks([item.ids for item in items], layers, dtype):
            norms = block.hidden.norm(dim=-1)  # (count, tokens)
            usable = norms.isfinite() & (norms > 0)
            if block.real is not None:
                usable |= ~block.real
            unit = block.hidden / norms.unsqueeze(-1)
            for index, ok, rows, length in zip(block.indexes, usable.all(1).tolist(), unit, block.lengths):
                outputs[index] = rows[:length] if ok else None
        return outputs

    def deviation(self, dtype: torch.dtype) -> dict[str, float]:
        """Worst |ΔP|, |ΔR|, |ΔF1| over the calibration pairs at the default layer; `deviations` gets other layers' too.

        Raises NotFinite: a score of the default layer is not.
        """
        exact, reduced = (self._calibration_scores(each) for each in (torch.float32, dtype))
        for layers, scores in exact.items():
            worst = np.abs(scores - reduced[layers]).max(axis=0)
            self.deviations[layers] = {name: float(value) for name, value in zip(MEASURES, worst)}
        if not np.isfinite(list(self.deviations[self.default_layers].values())).all():
            raise NotFinite(f"not finite in {dtype}")
        return self.deviations[self.default_layers]

    def _calibration_scores(self, dtype: torch.dtype) -> dict[int, np.ndarray]:
        """Scores at every layer, (pairs, 3), NaN where a text's numbers are; of neighbours, and of texts far apart.

        A type that GPU_DTYPE names serves at all layers: only the default one is measured.
        """
        texts, found = PRECISION_TEXTS, {}
        every = range(self.tokens.first_layer, self.tokens.layers + 1)
        references = [[texts[(i ^ 1) % len(texts)], texts[(i + 3) % len(texts)]] for i in range(len(texts))]
        with self.tokens.layer_by_layer(dtype):
            for layers in [self.default_layers] if self.demanded else every:
                work = self.prepare(BertScoreTask(texts, references, layers))
                outputs = self.compute(work.items, dtype)
                if all(output is not None for output in outputs):
                    work.absorb(list(zip(work.items, outputs)))
                    found[layers] = work.pair_scores()
                else:
                    found[layers] = np.full((1, 3), np.nan, np.float32)
        return found

    def choose_precision(self, wanted: str, fast: torch.dtype | None, bounds: dict[str, float]) -> str:
        """As any engine of tokens, for the default layer; a layer that the type is too coarse for keeps float32."""
        why = super().choose_precision(wanted, fast, bounds)
        if self.demanded or self.tokens.dtype == torch.float32:
            return why
        self.float32_layers = [layer for layer, seen in self.deviations.items() if not self.within_bounds(seen)]
        listed = ", ".join(map(str, self.float32_layers))
        return f"{why}; float32 where a request names layer {listed}" if listed else why

    def describe(self) -> dict[str, Any]:
        """As any engine of tokens, the default layer, and the layers that are computed in float32 nevertheless."""
        more = {"default_layers": self.default_layers, "float32_layers": self.float32_layers}
        return {**super().describe(), **more}


class Pair(NamedTuple):
    """Indexes of a candidate and a reference among a request's distinct texts, and of the candidate in the request."""

    candidate: int
    reference: int
    row: int


class BertScoreWork:
    """One BERTScore request: its distinct texts, the pairs they form, and the answer."""

    def __init__(self, engine: BertScoreEngine, task: BertScoreTask, layers: int, baseline: np.ndarray | None) -> None:
        self.engine, self.task, self.layers, self.baseline = engine, task, layers, baseline
        references = [text for alternatives in task.references for text in alternatives]
        texts = list(dict.fromkeys([*task.candidates, *references]))
        index_of = {text: index for index, text in enumerate(texts)}
        encoded = engine.encode_texts(texts)
        self.ids = [ids for ids, _ in encoded]
        self.pairs = [
            Pair(index_of[candidate], index_of[reference], row)
            for row, (candidate, alternatives) in enumerate(zip(task.candidates, task.references))
            for reference in alternatives
        ]
        self.weights = self._token_weights([index_of[text] for text in references])
        self.truncated = sorted({p.row for p in self.pairs if encoded[p.candidate][1] or encoded[p.reference][1]})
        empty = {index for index, ids in enumerate(self.ids) if len(ids) <= engine.tokenize.special_tokens}
        self.warnings = self._warnings(empty)
        full = {number: pair for number, pair in enumerate(self.pairs) if empty.isdisjoint(pair[:2])}
        self.matcher = PairMatcher(full, self.weights, task.explain)
        # Texts of many pairs first: each of the others is matched, and let go, as soon as it is encoded.
        self.items = [
            Item((ids.tobytes(), layers), ids, layers, index, len(ids), rank=0 if len(numbers) > 1 else 1)
            for index, numbers in self.matcher.open.items()
            for ids in [self.ids[index]]
        ]

    def _token_weights(self, references: list[int]) -> list[np.ndarray]:
        """Weight of each token of each text: 1, or log((N + 1) / (df + 1)) over the request's references."""
        if not self.task.idf:
            return [(~np.isin(ids, self.engine.weightless)).astype(np.float32) for ids in self.ids]
        count = len(references)
        frequency = Counter(token for index in references for token in set(self.ids[index].tolist()))
        unseen = math.log(count + 1)
        idf = {token: math.log((count + 1) / (found + 1)) for token, found in frequency.items()}
        weights = [np.array([idf.get(t, unseen) for t in ids.tolist()], np.float32) for ids in self.ids]
        if not any(weights[index].sum() > 0 for index in references):
            raise InvalidInput(
                f"idf: every token of the {count} reference(s) has weight 0, because each stands in all of them; "
                "send more, different references in one request, or idf=false",
                "idf_undefined",
            )
        return weights

    def _warnings(self, empty: set[int]) -> list[str]:
        unknown = self.engine.tokenize.mostly_unknown(self.ids, self.engine.tokenize.special_tokens)
        found: dict[str, list[int]] = {}
        for pair in self.pairs:
            for side, measure, index in zip(("candidate", "reference"), ("precision", "recall"), pair[:2]):
                if index in empty:
                    found.setdefault(f"empty {side}: precision, recall and F1 are 0", []).append(pair.row)
                elif not self.weights[index].sum() > 0:
                    found.setdefault(f"no token of the {side} has weight: its {measure} is 0", []).append(pair.row)
                if index in unknown:
                    found.setdefault(unknown_tokens(side), []).append(pair.row)
        of_language = self.engine.baselines.language_warnings(self.task.lang) if self.task.lang else []
        return of_language + [at_indexes(text, rows) for text, rows in found.items()]

    def absorb(self, outputs: Sequence[tuple[Item, Any]]) -> None:
        """Takes token embeddings, (tokens, hidden) float32 on the device, and matches the pairs now complete."""
        self.matcher.absorb(outputs)

    def pair_scores(self) -> np.ndarray:
        """(pairs, 3) float32: raw precision, recall and F1; rows of empty texts are 0."""
        scores = np.zeros((len(self.pairs), 3), np.float32)
        for numbers, found in self.matcher.scores:
            scores[numbers] = found.cpu().numpy()
        return scores

    def result(self) -> BertScoreResult:
        """Best reference of each measure on its own, then the baseline. Raises NotFinite."""
        from bert_score.utils import get_hash  # the engine's load has imported it

        task, scores = self.task, self.pair_scores()
        if not np.isfinite(scores).all():
            raise NotFinite("a score is not finite")
        best = np.full((len(task.candidates), 3), -np.inf, np.float32)
        np.maximum.at(best, [pair.row for pair in self.pairs], scores)
        if self.baseline is not None:
            best = (best - self.baseline) / (1 - self.baseline)
        precision, recall, f1 = best.T.copy()
        explanations = [self._explain(number) for number in range(len(self.pairs))] if task.explain else []
        settings = get_hash("", self.layers, task.idf, task.rescale, False, False)
        return BertScoreResult(
            precision, recall, f1, self.layers, self.truncated, self.warnings, explanations, settings
        )

    def _explain(self, number: int) -> dict[str, Any]:
        """The tokens of a pair, their weights and similarities, and which token each one matched."""
        candidate, reference, row = self.pairs[number]
        to_tokens = self.engine.tokenize.tokenizer.convert_ids_to_tokens
        similarity = self.matcher.similarities.get(number, np.zeros((0, 0), np.float32))
        return {
            "index": row,
            "candidate_tokens": to_tokens(self.ids[candidate].tolist()),
            "reference_tokens": to_tokens(self.ids[reference].tolist()),
            "candidate_weights": self.weights[candidate],
            "reference_weights": self.weights[reference],
            "similarity": similarity,
            "candidate_matches": similarity.argmax(1).tolist() if similarity.size else [],
            "reference_matches": similarity.argmax(0).tolist() if similarity.size else [],
        }


class PairMatcher:
    """Matches pairs as soon as both their texts are encoded, then lets the texts go. Device thread only.

    scores: numbers of pairs, and their (pairs, 3) on the device. similarities: of each pair, where they are kept.
    """

    def __init__(self, pairs: dict[int, Pair], weights: Sequence[np.ndarray], keep_similarities: bool) -> None:
        self.pairs, self.weights, self.keep_similarities = pairs, weights, keep_similarities
        self.scores: list[tuple[list[int], Tensor]] = []
        self.similarities: dict[int, np.ndarray] = {}
        self.embeddings: dict[int, Tensor] = {}
        self.open: dict[int, list[int]] = {}  # of each text, the numbers of its pairs that are not matched yet
        for number, pair in pairs.items():
            for index in dict.fromkeys(pair[:2]):
                self.open.setdefault(index, []).append(number)

    def absorb(self, outputs: Sequence[tuple[Item, Tensor]]) -> None:
        """Stores token embeddings and matches every pair that is now complete."""
        known = self.embeddings
        known.update((item.index, embedding) for item, embedding in outputs)
        done = set()
        for item, _ in outputs:
            for number in self.open[item.index]:
                candidate, reference, _ = self.pairs[number]
                if candidate in known and reference in known:
                    done.add(number)
        self._match(sorted(done, key=lambda number: sum(self._lengths(number))))
        for number in done:
            for index in set(self.pairs[number][:2]):
                self.open[index].remove(number)
                if not self.open[index]:
                    del known[index]

    def _lengths(self, number: int) -> tuple[int, int]:
        """Tokens of a pair's candidate and reference."""
        candidate, reference, _ = self.pairs[number]
        return len(self.weights[candidate]), len(self.weights[reference])

    def _match(self, numbers: list[int]) -> None:
        """Scores pairs in chunks whose padded sides and similarity matrices stay within some 16 MB each."""
        width = max((embedding.shape[1] for embedding in self.embeddings.values()), default=1)
        chunk: list[int] = []
        longest = 1
        for number in numbers:
            lengths = self._lengths(number)
            longest = max(longest, *lengths)
            if chunk and (len(chunk) + 1) * longest * max(longest, width) > 4_000_000:
                self._score(chunk)
                chunk, longest = [], max(lengths)
            chunk.append(number)
        if chunk:
            self._score(chunk)

    def _score(self, numbers: list[int]) -> None:
        candidates, references = ([self.pairs[number][side] for number in numbers] for side in (0, 1))
        scores, similarity = greedy_match(
            [self.embeddings[index] for index in candidates],
            [self.embeddings[index] for index in references],
            [self.weights[index] for index in candidates],
            [self.weights[index] for index in references],
        )
        self.scores.append((numbers, scores))
        if self.keep_similarities:
            for number, matrix in zip(numbers, similarity.cpu()):
                rows, columns = self._lengths(number)
                self.similarities[number] = matrix[:rows, :columns].contiguous().numpy()


def greedy_match(
    candidates: Sequence[Tensor],
    references: Sequence[Tensor],
    candidate_weights: Sequence[np.ndarray],
    reference_weights: Sequence[np.ndarray],
) -> tuple[Tensor, Tensor]:
    """Scores and similarities of pairs of texts, by greedy matching (equations 1 to 3 of the paper).

    Each text is (tokens, hidden) of unit rows with (tokens,) weights. Returns precision, recall and F1, (pairs, 3),
    and the similarity matrices, (pairs, candidate tokens, reference tokens), padded; float32 on the device.
    Padding can't be matched, so a pair's result does not depend on the others. A side whose weights sum to 0
    scores 0; so does F1 where it is undefined.
    """
    device = candidates[0].device
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    candidate_words, reference_words = pad(list(candidates)), pad(list(references))  # (pairs, tokens, hidden)
    similarity = torch.bmm(candidate_words, reference_words.transpose(1, 2))

    def padded(weights: Sequence[np.ndarray], tokens: int) -> tuple[Tensor, Tensor]:
        beyond = np.arange(tokens) >= np.array([[len(values)] for values in weights])
        table = np.zeros((len(weights), tokens), np.float32)
        table[~beyond] = np.concatenate(weights)
        return torch.from_numpy(table).to(device), torch.from_numpy(beyond).to(device)

    def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
        total = weights.sum(1, keepdim=True)
        return (values * (weights / total.where(total > 0, 1.0))).sum(1)

    candidate_table, beyond_candidate = padded(candidate_weights, similarity.shape[1])
    reference_table, beyond_reference = padded(reference_weights, similarity.shape[2])
    best_reference = similarity.masked_fill(beyond_reference[:, None, :], -math.inf).amax(2)
    best_candidate = similarity.masked_fill(beyond_candidate[:, :, None], -math.inf).amax(1)
    precision = weighted_mean(best_reference, candidate_table)
    recall = weighted_mean(best_candidate, reference_table)
    total = precision + recall
    f1 = torch.where(total == 0, 0.0, 2 * precision * recall / total.where(total != 0, 1.0))
    return torch.stack([precision, recall, f1], dim=1), similarity


_MULTILINGUAL = re.compile(r"multilingual|xlm|m-?bert|mt5|mbart|mdeberta|bge-m3|labse|byt5|canine", re.IGNORECASE)


@dataclass(frozen=True)
class Baselines:
    """bert-score's rescaling baselines of one model, from the files in its package, and its languages.

    model: its name in bert-score's tables, if it is there. shown: the name that callers know.
    by_language: bert-score's model for each language that it names (`lang2model`). otherwise: its model for the rest.
    """

    folder: Path
    model: str | None
    shown: str
    by_language: Mapping[str, str] = field(default_factory=dict)
    otherwise: str = ""

    def language_warnings(self, lang: str) -> list[str]:
        """A warning, where a caller's `lang` is not the model's language.

        A model that bert-score takes for no language is for English, unless its name says that it knows many.
        """
        if _MULTILINGUAL.search(f"{self.model} {self.shown}"):
            return []
        code = lang.lower().replace("_", "-")
        base = code.partition("-")[0]
        spoken = {language.partition("-")[0] for language, model in self.by_language.items() if model == self.model}
        if base in (spoken or {"en"}):
            return []
        usual = self.by_language.get(code) or self.by_language.get(base) or self.otherwise
        more = f"unless {self.shown} knows this language, send model_type={usual!r}, as bert-score does"
        return [f"lang {lang!r} chooses only the rescaling baseline, not the model: {more}"]

    def row(self, lang: str, layers: int) -> np.ndarray:
        """(3,) float32: baseline of precision, recall, F1. Raises InvalidInput where there is none."""
        lang = lang.lower()
        path = self.folder / lang / f"{self.model}.tsv"
        if re.fullmatch("[a-z-]+", lang) and path.is_file():  # nothing that leads to another folder
            with path.open(newline="") as file:
                for row in csv.DictReader(file):
                    if int(row["LAYER"]) == layers:
                        return np.array([row["P"], row["R"], row["F"]], np.float32)
        raise InvalidInput(
            f"rescale_with_baseline: bert-score has no baseline for model {self.shown}, lang {lang!r:.40}, "
            f"layer {layers}; send rescale_with_baseline=false",
            "no_baseline",
        )


def load_bertscore(
    name: ModelName, folder: Path, device: torch.device, options: LoadOptions, progress: Progress
) -> BertScoreEngine:
    """Loads a BERTScore engine from a folder and checks its forward pass and precision. Raises ModelError."""
    import bert_score
    from bert_score.utils import lang2model, model2layers
    from transformers import AutoModel, AutoTokenizer

    progress("loading", 0.1)
    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    module = AutoModel.from_pretrained(str(folder), dtype=torch.float32, local_files_only=True)
    module = (module.encoder if hasattr(module, "decoder") and hasattr(module, "encoder") else module).eval()
    progress("checking", 0.6)
    tokens = TokenModel(module, tokenizer.pad_token_id or 0, device)
    tokenize = TextTokenizer(tokenizer, min(longest_input(module, tokenizer), options.max_tokens))
    row = table_name(name, model2layers)
    layers = options.layers
    if layers is not None and layers > tokens.layers:
        detail = f"MODEL_BERTSCORE_LAYERS={layers}: {name.public} has {tokens.layers} layers; set at most that."
        raise ModelError(detail)
    if layers is None:
        listed = model2layers.get(row, tokens.layers + 1)
        layers = listed if listed <= tokens.layers else math.ceil(0.75 * tokens.layers)
    files = Path(bert_score.__file__).parent / "rescale_baseline"
    baselines = Baselines(files, row, name.public, dict(lang2model), lang2model.default_factory())
    engine = BertScoreEngine(tokens, tokenize, layers, baselines)
    tokens.verify([ids for ids, _ in engine.encode_texts(CALIBRATION_TEXTS)], layers)
    settle_precision(engine, name, device, options.dtype, dict.fromkeys(MEASURES, options.dtype_bound))
    return engine

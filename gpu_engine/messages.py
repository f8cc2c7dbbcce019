"""What crosses between the service and the engine's process: names, texts, numbers, arrays. Imports no torch.

A message is one of the dataclasses below; they cross in lists, pickled, all that piled up at once. `model` is a
number that the service gives each load, `number` one that it gives each computation; both are its own, and an
engine's answers repeat them.
"""

from __future__ import annotations

import contextlib
import contextvars
import queue
import threading
from dataclasses import dataclass, field
from typing import Any

from gpu_engine.model_files import ModelName
from gpu_engine.work import LoadOptions, Task

# The request that a log line is about, on either side of the boundary: its id and, after a blank, the trace that it
# is part of, where its caller named one.
request_id_var: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="-")


class Channel:
    """One side of the boundary. Messages are sent by a thread of its own, so that `send` never waits."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._sending = threading.Lock()
        self._thread = threading.Thread(target=self._send_all, name="outbox", daemon=True)
        self._thread.start()

    def send(self, message: Any) -> None:
        """Sends a message soon; nothing happens where the other side is gone. From any thread."""
        self._outbox.put(message)

    def send_now(self, messages: list[Any]) -> None:
        """Sends messages, by the calling thread where nothing else is being sent; it may wait for the other side."""
        if self._outbox.empty() and self._sending.acquire(blocking=False):
            with contextlib.suppress(OSError):
                self._send_each(messages)
            self._sending.release()
        else:
            for message in messages:
                self._outbox.put(message)

    def receive(self) -> list[Any]:
        """The messages that come next. Raises EOFError or OSError where the other side is gone."""
        received: list[Any] = self._connection.recv()
        return received

    def finish(self, timeout_s: float = 1.0) -> None:
        """Sends what is left, and no more after it."""
        self._outbox.put(None)
        self._thread.join(timeout_s)

    def _send_all(self) -> None:
        with contextlib.suppress(OSError):  # it is gone, or closed here: `receive` tells
            more = True
            while more:
                messages = [self._outbox.get()]
                while not self._outbox.empty():
                    messages.append(self._outbox.get_nowait())
                more = None not in messages
                with self._sending:
                    self._send_each([message for message in messages if message is not None])

    def _send_each(self, messages: list[Any]) -> None:
        """Sends messages together or, where one of them can't be pickled, the others and an error in its place."""
        try:
            self._connection.send(messages)
        except OSError:
            raise
        except Exception as error:
            if len(messages) > 1:
                for message in messages:
                    self._send_each([message])
            elif isinstance(messages[0], Answered):
                self._connection.send([Erred(messages[0].number, "internal", type(error).__name__)])


# --- to the engine --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Configure:
    """The first message. batch_tokens: None for the device's own. threads: that tokenise large requests."""

    device: str
    dtype: str
    batch_tokens: int | None
    cache_mb: float
    threads: int
    log_level: str


@dataclass(frozen=True)
class Load:
    """Find and load a model. keep: it is never unloaded to make room."""

    model: int
    kind: str
    name: ModelName
    options: LoadOptions
    keep: bool
    request_id: str


@dataclass(frozen=True)
class Unload:
    """Let a loaded model go."""

    model: int


@dataclass(frozen=True)
class Compute:
    """Answer a task with a loaded model."""

    number: int
    model: int
    task: Task
    request_id: str


@dataclass(frozen=True)
class Cancel:
    """Nobody waits for a computation any more."""

    number: int


@dataclass(frozen=True)
class Stop:
    """Finish the batch that runs, and end."""


# --- to the service -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """The engine is up: what /info says of its device. versions: of torch, CUDA and ROCm; attention on a GPU."""

    device: str
    device_name: str
    threads: int
    batch_tokens: int
    versions: dict[str, str | None]


@dataclass(frozen=True)
class Refused:
    """The engine can't start with its settings; one line for the person who starts the service."""

    detail: str


@dataclass(frozen=True)
class Loading:
    """How far a load is, 0.0 to 1.0 within its phase."""

    model: int
    phase: str
    fraction: float


@dataclass(frozen=True)
class Loaded:
    """A model can answer; description: what /info says of it."""

    model: int
    description: dict[str, Any]


@dataclass(frozen=True)
class Failed:
    """A model could not be loaded."""

    model: int
    code: str
    detail: str


@dataclass(frozen=True)
class Unloaded:
    """The engine let models go, to make room for a text."""

    models: list[int]


@dataclass(frozen=True)
class Progress:
    """Texts and the fraction of the tokens of a computation that are done."""

    number: int
    texts_done: int
    fraction: float


@dataclass(frozen=True)
class Answered:
    """The result of a computation: EmbedResult, BertScoreResult or RerankResult.

    times: seconds of tokenising, of waiting for the device, and on it. tokens: of the distinct texts.
    """

    number: int
    result: Any
    times: tuple[float, float, float] = (0.0, 0.0, 0.0)
    tokens: int = 0


@dataclass(frozen=True)
class Erred:
    """A computation failed, with the code and the sentence of an EngineError, or with `internal`."""

    number: int
    code: str
    detail: str


@dataclass(frozen=True)
class State:
    """What changes all the time, a few times a second. batch_age_s: how long the current batch has run; 0.0 for none.

    sizes: how many batches had up to 2**n "tokens" or "texts" and more than half of it, by (measure, n).
    memory: `vram_*` of /info in MiB. descriptions: of the loaded models.
    """

    counters: dict[str, float] = field(default_factory=dict)
    sizes: dict[tuple[str, int], int] = field(default_factory=dict)
    seconds_queued: float = 0.0
    batch_age_s: float = 0.0
    memory: dict[str, int] = field(default_factory=dict)
    descriptions: dict[int, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Logged:
    """A line for the service's log. level: logging's number. exception: a traceback, or nothing."""

    logger: str
    level: int
    message: str
    request_id: str
    exception: str = ""

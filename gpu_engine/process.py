"""The engine's side of the boundary: reads what the service asks, loads, computes, answers.

`serve` is the loop, in a process of its own (`main`) or, for tests, in a thread. Its caller's thread reads messages
and tokenises small requests; large ones have a few threads, each load has one, the device has one. It knows no HTTP,
and ends by itself when the service is gone.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import contextvars
import faulthandler
import functools
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection
from typing import Any

import torch

from gpu_engine.device import (
    available_cores,
    build_versions,
    default_batch_tokens,
    detect_device,
    device_memory,
    is_out_of_memory,
    settle_backends,
    thread_pool,
)
from gpu_engine.device import device_name as name_of_device
from gpu_engine.fair_queue import Submission
from gpu_engine.loading import EngineLoader, explain_load
from gpu_engine.messages import (
    Answered,
    Cancel,
    Channel,
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
from gpu_engine.model_files import Hub, ModelName
from gpu_engine.token_engine import fast_dtype
from gpu_engine.tokenizing import abandoned
from gpu_engine.work import DeviceBroken, Engine, EngineError, LoadOptions, ModelError
from gpu_engine.work import Progress as OnProgress
from gpu_engine.worker import DeviceWorker

log = logging.getLogger(__name__)

Loader = Callable[[str, ModelName, LoadOptions, OnProgress], Engine]

STATE_EVERY_S = 0.25
WARM_UP_S = 20.0  # what is not captured by then waits until it comes back often
INLINE_CHARACTERS = 4_000  # smaller requests are tokenised by the reading thread itself
MOST_PREPARING = 32  # threads that tokenise large requests
BROKEN_EXIT_CODE = 70
LARGE_BYTES = 1 << 20  # of answers that leave the device thread at once


class Step:
    """A work without texts: its result is made on the device thread, between two batches."""

    costs: Sequence[int] = ()
    order: Sequence[int] = ()
    variant = 0

    def __init__(self, make: Callable[[], Any]) -> None:
        self.result = make

    def text(self, index: int) -> Any:
        """There is none."""

    def key(self, index: int) -> Any:
        """There is none."""

    def absorb(self, indexes: Sequence[int], outputs: Any, places: Sequence[int]) -> None:
        """There are none."""

    def landed(self, indexes: Sequence[int]) -> None:
        """There are none."""


def size_of(answer: Any) -> int:
    """About how many bytes an answer has."""
    result = getattr(answer, "result", None)
    vectors = getattr(result, "vectors", None)
    explained: int = sum(pair["similarity"].nbytes for pair in getattr(result, "explanations", ()))
    return explained + (0 if vectors is None else int(vectors.nbytes))


def hand_over(
    answer: concurrent.futures.Future[Any], submission: Submission, result: Any, error: BaseException | None
) -> None:
    """A submission's end, to whoever waits for a future."""
    if error is not None:
        answer.set_exception(error)
    else:
        answer.set_result(result)


@dataclass
class Computation:
    """One request on its way, and what the worker was given of it. It is listed as long as somebody waits for it."""

    engine: Engine | None = None
    submission: Submission | None = None
    tokenize_s: float = 0.0

    def cancel(self) -> None:
        """Drops what has not reached the device yet."""
        if self.submission is not None:
            self.submission.cancel()


class EngineProcess:
    """Models, device worker and computations of one service.

    channel: messages to and from the service. leave: called with an exit code
    when the device is broken; it does not return in a process.
    """

    def __init__(
        self,
        channel: Channel,
        config: Configure,
        device: torch.device,
        load: Loader,
        leave: Callable[[int], None],
    ) -> None:
        self.device, self.channel, self._load, self._leave = device, channel, load, leave
        self.send = channel.send
        self.batch_tokens = config.batch_tokens or default_batch_tokens(device)
        self._answers: list[Any] = []  # the device thread's
        self.worker = DeviceWorker(
            device,
            self.batch_tokens,
            config.cache_mb,
            self._on_broken,
            self._unload_idle,
            on_turn=self._send_answers,
        )
        self._engines: dict[int, Engine] = {}
        self._kept: set[int] = set()
        self._computations: dict[int, Computation] = {}
        self._prepare_threads = thread_pool(min(config.threads, MOST_PREPARING), "prepare")
        self._ended = threading.Event()
        self._memory: dict[str, int] = {}

    def run(self, messages: Sequence[Any] = ()) -> None:
        """Reads messages, first those that came already, until the service says stop, or is gone."""
        versions = {**build_versions(), **settle_backends(self.device)}
        self.worker.start()
        self.send(Facts(str(self.device), name_of_device(self.device), available_cores(), self.batch_tokens, versions))
        for target in (self._report, self._watch_memory):
            threading.Thread(target=target, name=target.__name__, daemon=True).start()
        handlers: dict[type[Any], Callable[[Any], None]] = {
            Load: self._begin_load,
            Unload: self._unload,
            Compute: self._begin_compute,
            Cancel: self._cancel,
            Stop: lambda message: self._ended.set(),
        }
        with contextlib.suppress(EOFError, OSError):
            while not self._ended.is_set():
                for message in messages or self.channel.receive():
                    handlers[type(message)](message)
                messages = ()
            self.worker.stop(timeout_s=10.0)
        self._ended.set()
        self._prepare_threads.shutdown(wait=False, cancel_futures=True)
        self.channel.finish()

    # --- models

    def _begin_load(self, message: Load) -> None:
        threading.Thread(
            target=self._run_load, args=(message,), name=f"load-{message.name.public}", daemon=True
        ).start()

    def _run_load(self, message: Load) -> None:
        request_id_var.set(message.request_id)
        model, name = message.model, message.name
        phase = ""

        def progress(reached: str, fraction: float) -> None:
            nonlocal phase
            if reached != phase:
                log.info("%s:%s: %s", message.kind, name.public, reached)
            phase = reached
            self.send(Loading(model, reached, fraction))

        try:
            engine = self._load(message.kind, name, message.options, progress)
            self._warm_up(engine)
            loaded = Loaded(model, engine.describe())
            self._engines[model] = engine
            if message.keep:
                self._kept.add(model)
            self.send(loaded)
        except BaseException as error:
            explained = self._explain(name, error)
            if isinstance(explained, DeviceBroken):
                self.worker.mark_broken(explained.detail)
            self.send(Failed(model, explained.code, explained.detail))

    def _warm_up(self, engine: Engine) -> None:
        """Lets an engine that has first steps take them on the device thread, between the batches of others."""
        warm_up = getattr(engine, "warm_up", None)
        if warm_up is None:
            return
        steps, until, more = warm_up(self.batch_tokens), time.monotonic() + WARM_UP_S, True
        while more and time.monotonic() < until:
            answer: concurrent.futures.Future[Any] = concurrent.futures.Future()
            self.worker.submit(engine, Step(lambda: next(steps, False)), functools.partial(hand_over, answer))
            more = answer.result()

    @staticmethod
    def _explain(name: ModelName, error: BaseException) -> EngineError:
        try:
            return explain_load(name, error)
        except BaseException:  # an error that can't even be shown must not leave its model loading for ever
            return ModelError(f"{name.public} could not be loaded.")

    def _unload(self, message: Unload) -> None:
        self._kept.discard(message.model)
        if (engine := self._engines.pop(message.model, None)) is not None:
            self.worker.unload(engine)

    def _unload_idle(self) -> None:
        """Makes room for a text that does not fit; on the device thread."""
        busy = [computation.engine for computation in list(self._computations.values())]
        idle = [m for m, e in list(self._engines.items()) if m not in self._kept and e not in busy]
        for model in idle:
            if (engine := self._engines.pop(model, None)) is not None:  # the reading thread may have been first
                self.worker.unload(engine)
        if idle:
            self.send(Unloaded(idle))

    # --- computations

    def _begin_compute(self, message: Compute) -> None:
        computation = self._computations[message.number] = Computation()
        request_id_var.set(message.request_id)
        if message.task.characters <= INLINE_CHARACTERS:
            self._prepare(message, computation)
        else:
            context = contextvars.copy_context()
            self._prepare_threads.submit(context.run, self._prepare, message, computation)

    def _prepare(self, message: Compute, computation: Computation) -> None:
        """Tokenises a request and gives it to the device worker."""
        number, began, listed = message.number, time.perf_counter(), self._computations
        abandoned.set(lambda: number not in listed)  # no more: contexts are kept, and would keep the engine
        try:
            if number not in listed:
                raise concurrent.futures.CancelledError
            engine = computation.engine = self._engines.get(message.model)
            if engine is None:
                raise ModelError("The model was unloaded to make room - retry", "model_unloaded")
            work = engine.prepare(message.task)
            computation.tokenize_s = time.perf_counter() - began
            computation.submission = self.worker.submit(
                engine, work, functools.partial(self._on_end, number), functools.partial(self._on_progress, number)
            )
            if number not in listed:  # cancelled meanwhile, or over already
                computation.cancel()
        except BaseException as error:
            self._refuse(number, error)

    def _on_progress(self, number: int, texts_done: int, fraction: float) -> None:
        self._answers.append(Progress(number, texts_done, fraction))

    def _on_end(self, number: int, submission: Submission, result: Any, error: BaseException | None) -> None:
        """Notes a computation's end, for `_send_answers`; on the device thread, unless that has ended."""
        if error is not None:
            submission.context.copy().run(self._refuse, number, error)  # the device thread may be in the context
        elif (computation := self._computations.pop(number, None)) is not None:
            begun = submission.begun or time.perf_counter()
            times = (computation.tokenize_s, begun - submission.came, time.perf_counter() - begun)
            self._answers.append(Answered(number, result, times, sum(submission.work.costs)))

    def _send_answers(self) -> None:
        """Sends all that became complete on the device thread, as one message."""
        if self._answers:
            answers, self._answers = self._answers, []
            if sum(map(size_of, answers)) < LARGE_BYTES:
                self.channel.send_now(answers)
            else:
                for answer in answers:  # the outbox's thread writes them: the device does not wait for a socket
                    self.send(answer)

    def _refuse(self, number: int, error: BaseException) -> None:
        if self._computations.pop(number, None) is None or isinstance(error, concurrent.futures.CancelledError):
            return
        if isinstance(error, EngineError):
            self.send(Erred(number, error.code, error.detail))
        elif is_out_of_memory(error):
            log.warning("no memory for a request: %s", error)
            self.send(Erred(number, "out_of_memory", "There is no memory for this request now - retry later"))
        else:
            log.error("a request failed", exc_info=error)
            self.send(Erred(number, "internal", type(error).__name__))

    def _cancel(self, message: Cancel) -> None:
        computation = self._computations.pop(message.number, None)
        if computation is not None:
            computation.cancel()

    # --- the process

    def _on_broken(self, detail: str) -> None:
        log.critical("%s: the process ends", detail)
        self.channel.finish()
        self._leave(BROKEN_EXIT_CODE)

    def _report(self) -> None:
        """Sends what changes, and so that the engine lives; ends it where its service is gone and nobody else noticed.

        The thread that reads hears of that first, unless it hangs.
        """
        last, unsaid, parent = State(), 0, os.getppid()
        while not self._ended.wait(STATE_EVERY_S):
            if os.getppid() != parent:
                self._ended.wait(2.0)
                self._leave(1)
            state = State(
                dict(vars(self.worker.counters)),
                dict(self.worker.sizes),
                self.worker.seconds_queued(),
                self.worker.batch_age_s,
                self._memory,
                {model: engine.describe() for model, engine in list(self._engines.items())},
            )
            unsaid += 1
            if state != last or unsaid > 8:
                self.send(state)
                last, unsaid = state, 0

    def _watch_memory(self) -> None:
        """Reads the device's memory once a second, on a thread of its own: a driver may hang."""
        while self.device.type == "cuda" and not self._ended.wait(1.0):
            with contextlib.suppress(RuntimeError):
                self._memory = device_memory(self.device)


class LibraryLogger(logging.Logger):
    """A library's logger, whose lines go the way of all others: its own handlers would write them beside the log."""

    propagate = property(lambda self: True, lambda self, value: None)

    def addHandler(self, handler: logging.Handler) -> None:  # noqa: N802
        """Takes none."""


class ToService(logging.Handler):
    """Sends log records to the service, which writes them into its own log."""

    def __init__(self, send: Callable[[Any], None]) -> None:
        super().__init__()
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        """Sends one record."""
        try:
            exception = logging.Formatter().formatException(record.exc_info) if record.exc_info else ""
            self._send(Logged(record.name, record.levelno, record.getMessage(), request_id_var.get(), exception))
        except Exception:  # a library's line that can't be formatted must not fail what it tells of
            self.handleError(record)


def serve(
    connection: Connection,
    leave: Callable[[int], None],
    load: Loader | None = None,
    log_to: Callable[[Configure, Callable[[Any], None]], None] = lambda config, send: None,
) -> None:
    """Answers one service until it stops or is gone. load: None for the real models. log_to: sets the log up."""
    channel = Channel(connection)
    try:
        config, *early = channel.receive()
        device = detect_device(config.device)
        if device.type == "cpu" and config.dtype == "float16":
            raise ValueError("GPU_DTYPE='float16': slower than float32 on a CPU; allowed: auto, float32, bfloat16")
    except ValueError as error:
        detail = str(error)
        channel.send(Refused(detail if detail.startswith("GPU_") else f"TORCH_DEVICE={config.device!r}: {detail}"))
        channel.finish()
        return
    except (EOFError, OSError):
        return
    engine = EngineProcess(channel, config, device, load or EngineLoader(device, Hub()).load, leave)
    log_to(config, engine.send)
    if config.dtype == "bfloat16" and fast_dtype(device) is None:
        log.warning(
            "GPU_DTYPE=bfloat16: this processor only emulates it, four to five times slower than float32; "
            "GPU_DTYPE=auto serves float32 here"
        )
    try:
        engine.run(early)
    except Exception:
        log.exception("the engine ends")
        channel.finish()
        raise


def log_to_service(config: Configure, send: Callable[[Any], None]) -> None:
    """Sends this process's log to the service."""
    logging.basicConfig(level=config.log_level, handlers=[ToService(send)], force=True)
    usual = logging.getLoggerClass()
    logging.setLoggerClass(LibraryLogger)
    for library in ("transformers", "huggingface_hub"):  # they bring handlers when they are imported
        logging.getLogger(library)
    logging.setLoggerClass(usual)
    for chatty in ("httpx", "httpx2", "httpcore", "sentence_transformers", "urllib3", "filelock", "matplotlib"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def main(arguments: list[str]) -> None:
    """The process: `arguments` are a file descriptor, or an address, whose key comes on standard input."""
    faulthandler.enable()
    if len(arguments) != 1:
        sys.exit("gpu_engine is started by gpu_service.py; run that instead")
    (where,) = arguments
    if where.isdecimal():
        connection: Any = Connection(int(where))
    else:
        connection = Client(where, authkey=sys.stdin.buffer.read())
    code = 1
    try:
        serve(connection, leave=os._exit, log_to=log_to_service)
        code = 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(code)  # downloads, and whatever else runs, end with it

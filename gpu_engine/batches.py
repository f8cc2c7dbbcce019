"""Batches on the device: launched and landed, their results handed out, errors and a lack of memory outlived.

Knows no model, and no thread but the one that calls it.
"""

from __future__ import annotations

import gc
import logging
import math
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from gpu_engine.device import is_fatal, is_out_of_memory, settled_heap
from gpu_engine.fair_queue import Batch, Submission
from gpu_engine.output_cache import OutputCache
from gpu_engine.work import DeviceBroken, Engine, EngineError, InvalidInput, NotFinite, Outputs

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass
class Counters:
    """What operators count since the start; one place, written by the device thread."""

    batches: int = 0
    texts: int = 0
    tokens: int = 0
    busy_s: float = 0.0
    cache_hits: int = 0
    out_of_memory_recoveries: int = 0
    padding_tokens: int = 0  # rows that were computed beside the tokens


@dataclass
class Pace:
    """What is known of an engine: its speed, and how many tokens a batch may have, for memory and time."""

    tokens_per_s: float = 0.0
    most_tokens: float = math.inf
    too_many_tokens: float = math.inf  # found no memory

    def no_memory(self, tokens: int) -> None:
        """A batch of so many tokens did not fit: half of it from now on, and more again only well below it."""
        self.too_many_tokens = tokens
        self.most_tokens = max(16, min(self.most_tokens, tokens // 2))

    def measure(self, tokens: int, spent_s: float, batch_tokens: int, long_batch_s: float) -> None:
        """A batch that took long makes the next ones smaller: callers wait for whole batches."""
        speed = tokens / max(spent_s, 1e-6)
        self.tokens_per_s = speed if not self.tokens_per_s else 0.8 * self.tokens_per_s + 0.2 * speed
        if tokens < 0.5 * min(batch_tokens, self.most_tokens):
            return  # it says nothing of large ones
        # Memory or time may be there again: a little more each time.
        self.most_tokens = max(16, min(1.02 * self.most_tokens, 0.9 * self.too_many_tokens))
        if spent_s > long_batch_s:
            self.most_tokens = min(self.most_tokens, max(256, speed * long_batch_s / 2))


@dataclass
class Flight:
    """A batch on the device: whose texts it has, at which places of its outputs, and what is known of it.

    parts: submissions, indexes of their texts, and the place of each. keys: of each place.
    """

    batch: Batch
    outputs: Outputs
    texts: list[Any]
    keys: list[Any]
    parts: list[tuple[Submission, list[int], Sequence[int]]]
    tokens: int
    began: float  # perf_counter, as `ended`

    @property
    def engine(self) -> Engine:
        """Whose batch it is."""
        return self.batch[0][0].engine

    @property
    def variant(self) -> int:
        """Of its works."""
        return self.batch[0][0].work.variant


@dataclass(eq=False)
class BatchRunner:
    """Runs batches on the device and gives every submission its outputs. The device thread alone calls it.

    A batch is launched, and lands: on a GPU the next one may be launched between the two.
    """

    device: torch.device
    batch_tokens: int
    cache: OutputCache
    free_memory: Callable[[], None]
    long_batch_s: float
    counters: Counters = field(default_factory=Counters)
    sizes: Counter[tuple[str, int]] = field(default_factory=Counter)  # batches by the bits of their tokens and texts
    paces: defaultdict[Engine, Pace] = field(default_factory=lambda: defaultdict(Pace))
    unloaded: deque[Engine] = field(default_factory=deque)  # any thread may append to it
    flights: deque[Flight] = field(default_factory=deque)  # launched, and not landed yet
    landed_at: float = 0.0  # when a batch last landed; perf_counter

    def budget(self, engine: Engine) -> float:
        """Tokens that a batch of `engine` may have."""
        return min(self.batch_tokens, self.paces[engine].most_tokens)

    def forget_unloaded(self) -> None:
        """Lets unloaded engines go, cached outputs and all, and frees their memory."""
        if not self.unloaded:
            return
        with settled_heap():
            gc.unfreeze()  # a model may hang together in cycles
            while self.unloaded:
                engine = self.unloaded.popleft()
                self.cache.forget(engine)
                self.paces.pop(engine, None)
                del engine
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def admit(self, submission: Submission) -> None:
        """Answers what the cache knows; ends a submission that needs no device at all."""
        submission.admitted = True
        engine, work = submission.engine, submission.work
        known: dict[int, Any] = {}
        if self.cache.limit:
            found = ((index, self.cache.get(engine, work.variant, work.key(index))) for index in submission.pending)
            known = {index: output for index, output in found if output is not None}
        if known:
            self.counters.cache_hits += len(known)
            submission.pending = [index for index in submission.pending if index not in known]
            recalled = self._guarded(submission, lambda: engine.recall(list(known.values())))
            if recalled is not None:
                self._absorb(submission, list(known), recalled, range(len(known)))
        if known or not submission.pending:
            self._deliver(submission, list(known))

    def run(self, batch: Batch) -> None:
        """Launches a batch and lands it; an error reaches only those who caused it. Raises DeviceBroken."""
        self.launch(batch)
        self.land_all()

    def launch(self, batch: Batch) -> None:
        """Begins a batch. Where that fails, it is run in parts, to the end. Raises DeviceBroken."""
        engine, variant = batch[0][0].engine, batch[0][0].work.variant
        texts: list[Any] = []
        keys: list[Any] = []
        parts: list[tuple[Submission, list[int], Sequence[int]]] = []
        place_of: dict[Any, int] = {}
        tokens, now = 0, time.perf_counter()
        for submission, indexes in batch:
            work = submission.work
            submission.begun = submission.begun or now
            places: list[int] = []
            for index in indexes:
                key = work.key(index)
                place = place_of.setdefault(key, len(texts))
                if place == len(texts):
                    texts.append(work.text(index))
                    keys.append(key)
                    tokens += work.costs[index]
                places.append(place)
            parts.append((submission, indexes, places))
        outputs, failure = None, None
        try:
            outputs = engine.run(texts, variant)
        except Exception as error:
            failure = error
        if outputs is None or failure is not None:  # outside of the block, which would hold the error's frames
            self.land_all()
            self._fall_back(batch, tokens, failure)
            return
        self.flights.append(Flight(batch, outputs, texts, keys, parts, tokens, now))
        for part in parts:
            self._absorb(*part[:2], outputs, part[2])

    def land_all(self) -> None:
        """Lands everything that was launched."""
        while self.flights:
            self.land()

    def land(self) -> None:
        """Waits for the batch that was launched first, and gives out its outputs."""
        flight = self.flights.popleft()
        bad: Sequence[int] = ()
        retried, given_up, failure = None, set[int](), None
        try:
            bad = flight.outputs.bad()
            if bad:
                retried = flight.engine.retry([flight.texts[place] for place in bad], flight.variant)
                given_up = {bad[place] for place in retried.bad()}
        except Exception as error:
            failure = error
        if failure is not None:
            self.land_all()
            self._fall_back(flight.batch, flight.tokens, failure)
            return
        now = time.perf_counter()
        spent_s = now - max(flight.began, self.landed_at)
        self.landed_at = now
        self._count(flight, spent_s)
        for submission, indexes, places in flight.parts:
            if not given_up.isdisjoint(places):
                submission.settle(error=NotFinite("the model gave no finite numbers"))
            elif retried:
                again = {list(bad).index(place): index for index, place in zip(indexes, places) if place in bad}
                self._absorb(submission, list(again.values()), retried, list(again))
            self._deliver(submission, indexes)
        for place, key in enumerate(flight.keys if self.cache.limit else ()):
            if place not in bad:
                self.cache.put(flight.engine, flight.variant, key, flight.outputs, place)

    def _count(self, flight: Flight, spent_s: float) -> None:
        self.counters.batches += 1
        self.counters.texts += len(flight.texts)
        self.counters.tokens += flight.tokens
        self.counters.busy_s += spent_s
        self.counters.padding_tokens += getattr(flight.engine, "take_padding", lambda: 0)()
        for measure, size in (("tokens", flight.tokens), ("texts", len(flight.texts))):
            self.sizes[measure, max(0, size - 1).bit_length()] += 1
        self.paces[flight.engine].measure(flight.tokens, spent_s, self.batch_tokens, self.long_batch_s)

    def _fall_back(self, batch: Batch, tokens: int, error: Exception | None) -> None:
        """Runs a batch that failed in parts: halves where memory ran out, else one submission at a time."""
        assert error is not None
        if is_fatal(error):
            raise DeviceBroken(str(error)) from error
        if is_out_of_memory(error):
            error.__traceback__ = None  # its frames would hold the memory
            self._halve(batch, tokens)
        elif len(batch) == 1:
            submission = batch[0][0]
            submission.context.run(log.error, "a batch failed", exc_info=error)
            submission.settle(error=error)
        else:
            for entry in batch:
                self.run([entry])

    def _halve(self, batch: Batch, tokens: int) -> None:
        """Runs both halves of a batch for which memory ran out; a single text is tried once more, then given up."""
        engine = batch[0][0].engine
        self.counters.out_of_memory_recoveries += 1
        self.cache.forget()
        getattr(engine, "release_memory", lambda: None)()
        entries = [(submission, index) for submission, indexes in batch for index in indexes]
        if len(entries) == 1:
            self.free_memory()
            self.forget_unloaded()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(entries) == 1:
            self._last_try(batch, tokens)
            return
        self.paces[engine].no_memory(tokens)
        middle = len(entries) // 2
        log.warning("out of memory at %d tokens: halving the batch", tokens)
        for half in (entries[:middle], entries[middle:]):
            again: dict[Submission, list[int]] = {}
            for submission, index in half:
                again.setdefault(submission, []).append(index)
            self.run(list(again.items()))

    def _last_try(self, batch: Batch, tokens: int) -> None:
        """Runs a text for which all memory was freed; if that was not enough, its sender is told."""
        ((submission, (index,)),) = batch
        detail = f"a text of {tokens} tokens does not fit into the device's memory; send a shorter one"
        outputs = self._guarded(
            submission,
            lambda: submission.engine.run([submission.work.text(index)], submission.work.variant),
            InvalidInput(detail, "text_too_large_for_device"),
        )
        if outputs is not None:
            texts, now = [submission.work.text(index)], time.perf_counter()
            keys = [submission.work.key(index)]
            self.flights.append(Flight(batch, outputs, texts, keys, [(submission, [index], [0])], tokens, now))
            self._absorb(submission, [index], outputs, [0])
            self.land()

    def _absorb(self, submission: Submission, indexes: Sequence[int], outputs: Outputs, places: Sequence[int]) -> None:
        self._guarded(submission, lambda: submission.work.absorb(indexes, outputs, places))

    def _deliver(self, submission: Submission, indexes: Sequence[int]) -> None:
        """Tells a submission that outputs have landed and, when they were the last, its result."""
        if submission.ended:
            return
        work = submission.work
        self._guarded(submission, lambda: work.landed(indexes))
        submission.tokens_left -= sum(work.costs[index] for index in indexes)
        submission.texts_done += len(indexes)
        if submission.texts_done < len(work.order):
            fraction = 1.0 - submission.tokens_left / submission.tokens_total
            submission.context.run(submission.on_progress, submission.texts_done, fraction)
        else:
            submission.settle(self._guarded(submission, work.result))

    def _guarded(self, submission: Submission, call: Callable[[], T], too_large: EngineError | None = None) -> T | None:
        """What `call` gives; None where it fails, which is the end of the submission. too_large: for want of memory."""
        try:
            return call()
        except Exception as error:
            if is_fatal(error):
                raise DeviceBroken(str(error)) from error
            if is_out_of_memory(error):
                self.cache.forget()
                detail = "the request does not fit into the device's memory; send fewer or shorter texts"
                submission.settle(error=too_large or InvalidInput(detail, "request_too_large_for_device"))
            elif isinstance(error, EngineError):
                submission.settle(error=error)
            else:
                submission.context.run(log.error, "a request's results could not be put together", exc_info=error)
                submission.settle(error=error)
        return None

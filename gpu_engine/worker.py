"""The device thread: runs batches, hands out results, outlives errors and a lack of memory. Knows no model."""

from __future__ import annotations

import gc
import logging
import math
import threading
import time
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch

from gpu_engine.device import available_cores, bind_thread, is_fatal, is_out_of_memory, settled_heap
from gpu_engine.fair_queue import Batch, FairQueue, Submission
from gpu_engine.work import DeviceBroken, Engine, EngineError, InvalidInput, NotFinite, Outputs, Stopping, Work

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


class Lent(NamedTuple):
    """An output that still lies in its batch's memory."""

    outputs: Outputs
    place: int


class OutputCache:
    """Outputs of repeated texts, least recently used first to go, bounded by bytes. Device thread only.

    An output stays in its batch's memory until it is asked for: a batch's outputs come together and, where nobody
    asks for them, go together. One that is asked for gets memory of its own.
    """

    def __init__(self, limit_mb: float) -> None:
        self.limit, self.size = int(limit_mb * 2**20), 0  # bytes
        self._entries: OrderedDict[tuple[Engine, int, Any], tuple[Any, int]] = OrderedDict()  # an output and its bytes

    def get(self, engine: Engine, variant: int, text: Any) -> Any | None:
        """The stored output as `Outputs.keep` gave it, or None. text: its `Work.key`."""
        key = (engine, variant, text)
        output, size = self._entries.get(key, (None, 0))
        if isinstance(output, Lent):
            try:
                output = output.outputs.keep(output.place)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self.forget()  # the next batch needs the memory more
                return None
            self._entries[key] = output, size
        if output is not None:
            self._entries.move_to_end(key)
        return output

    def put(self, engine: Engine, variant: int, text: Any, outputs: Outputs, place: int) -> None:
        """Stores an output under its text's `Work.key`."""
        key = (engine, variant, text)
        parts = text if isinstance(text, tuple) else (text,)
        characters = sum(len(part) * (4 if isinstance(part, str) else 1) for part in parts if hasattr(part, "__len__"))
        size = outputs.nbytes(place) + characters + 300  # the dictionary's own share
        if size > self.limit or key in self._entries:
            return
        self._entries[key] = Lent(outputs, place), size
        self.size += size
        while self.size > self.limit:
            self.size -= self._entries.popitem(last=False)[1][1]

    def forget(self, engine: Engine | None = None) -> None:
        """Forgets everything of `engine`, or everything."""
        for key in [key for key in self._entries if engine is None or key[0] is engine]:
            self.size -= self._entries.pop(key)[1]


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


class DeviceWorker:
    """The one thread that runs inference.

    No timer: whatever arrived while the device was busy forms the next batch. The thread outlives bad batches;
    if it dies all the same, the process does. batch_tokens: the most that a batch may have. cache_mb: MiB of
    outputs. on_broken: told why no more work will be done, by whichever thread found out. free_memory: called on
    the device thread when one text does not fit; it may `unload`. on_turn: called on the device thread when some
    submissions may have ended. in_flight: batches that are launched before the first of them has to land.
    """

    def __init__(
        self,
        device: torch.device,
        batch_tokens: int,
        cache_mb: float,
        on_broken: Callable[[str], None],
        free_memory: Callable[[], None],
        long_batch_s: float = 2.0,
        on_turn: Callable[[], None] = lambda: None,
        in_flight: int | None = None,
    ) -> None:
        self._runner = BatchRunner(device, batch_tokens, OutputCache(cache_mb), free_memory, long_batch_s)
        self._in_flight = in_flight or (2 if device.type == "cuda" else 1)
        self._on_turn = on_turn
        self.counters, self.sizes = self._runner.counters, self._runner.sizes
        self.broken: str | None = None
        self._batch_began = 0.0  # monotonic
        self._on_broken = on_broken
        self._queue = FairQueue()
        self._wake = threading.Condition()  # its lock guards the queue
        self._stopping = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Starts the thread."""
        self._thread = threading.Thread(target=self._main, name="device-worker", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Ends the thread after its current batch; what is left fails as Stopping."""
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

    def submit(
        self,
        engine: Engine,
        work: Work,
        on_end: Callable[[Submission, Any, BaseException | None], None],
        on_progress: Callable[[int, float], None] = lambda texts_done, fraction: None,
    ) -> Submission:
        """Queues a request's work, from any thread. The callbacks are `Submission`'s.

        Raises:
            Stopping, DeviceBroken: no work is done any more.
        """
        submission = Submission(engine, work, on_end, on_progress)
        with self._wake:
            if self._stopping:
                raise Stopping("the device worker has stopped")
            if self.broken is not None:
                raise DeviceBroken(self.broken)
            self._queue.add(submission)
            self._wake.notify()
        return submission

    def mark_broken(self, detail: str) -> None:
        """For whatever thread finds the device broken: every caller gets an error, and the process ends."""
        with self._wake:
            self.broken = detail
        self._fail_all(lambda: DeviceBroken(detail))
        self._on_broken(detail)

    def unload(self, engine: Engine) -> None:
        """Lets an engine and its cached outputs go before the next batch; from any thread."""
        with self._wake:
            self._runner.unloaded.append(engine)
            self._wake.notify()

    def seconds_queued(self) -> float:
        """How long the work that is queued will take at its measured speed; nothing for what was not measured yet."""
        with self._wake:
            queued = [(s.tokens_left, self._runner.paces.get(s.engine, Pace())) for s in self._queue.waiting()]
        return sum(tokens / pace.tokens_per_s for tokens, pace in queued if pace.tokens_per_s)

    def _main(self) -> None:
        self._batch_began = 0.0
        bind_thread(self._runner.device, available_cores())
        runner = self._runner
        try:
            while (batch := self._next_batch()) is not None:
                if batch or runner.flights:
                    self._batch_began = time.monotonic()
                if batch:
                    runner.launch(batch)
                if runner.flights and (len(runner.flights) >= self._in_flight or not batch):
                    runner.land()
                if not runner.flights:
                    self._batch_began = 0.0
                self._on_turn()
                batch = None
            runner.land_all()
            self._on_turn()
        except BaseException as error:  # the thread's last words: without it every later call would hang
            broken = isinstance(error, DeviceBroken)
            log.exception("the device worker died")
            self.mark_broken(
                "the device context is broken" if broken else f"the device worker died: {type(error).__name__}"
            )

    def _fail_all(self, error: Callable[[], BaseException]) -> None:
        with self._wake:
            queue, self._queue = self._queue, FairQueue()
        for submission in queue.submissions:
            submission.settle(error=error())

    def _next_batch(self) -> Batch | None:
        """Takes a batch of what waits, and waits for work where nothing is on the device; None to stop.

        It is empty when only bookkeeping was due, or nothing new came.
        """
        with self._wake:
            while not (self._queue.submissions or self._stopping or self._runner.unloaded or self._runner.flights):
                self._wake.wait()
            if self._stopping:
                return None
            arrived = [submission for submission in self._queue.waiting() if not submission.admitted]
        self._runner.forget_unloaded()
        for submission in arrived:
            self._runner.admit(submission)
        with self._wake:
            return self._queue.next_batch(self._runner.budget)

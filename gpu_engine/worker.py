"""The device thread: runs batches, hands out results, outlives errors and a lack of memory. Knows no model."""

from __future__ import annotations

import gc
import logging
import math
import threading
import time
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gpu_engine.device import available_cores, bind_thread, is_fatal, is_out_of_memory, settled_heap
from gpu_engine.fair_queue import Batch, FairQueue, Submission
from gpu_engine.work import DeviceBroken, Engine, InvalidInput, Item, Stopping, Work

log = logging.getLogger(__name__)


@dataclass
class Counters:
    """What operators count since the start; one place, written by the device thread."""

    batches: int = 0
    texts: int = 0
    tokens: int = 0
    busy_s: float = 0.0
    cache_hits: int = 0
    out_of_memory_recoveries: int = 0


class OutputCache:
    """Outputs of repeated texts, least recently used first to go, bounded by bytes. Device thread only."""

    def __init__(self, limit_mb: float) -> None:
        self.limit, self.size = int(limit_mb * 2**20), 0  # bytes
        self._entries: OrderedDict[tuple[Any, ...], tuple[Any, int]] = OrderedDict()  # an output and its bytes

    def get(self, engine: Engine, item: Item) -> Any | None:
        """The stored output, or None."""
        key = (engine, *item.key)
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key][0]

    def put(self, engine: Engine, item: Item, output: Any) -> None:
        """Stores an output (a tensor as a copy: a slice would keep its whole batch alive)."""
        key = (engine, *item.key)
        parts = sum(len(part) * (4 if isinstance(part, str) else 1) for part in key if isinstance(part, (str, bytes)))
        size = int(output.nbytes) + parts + 300  # the dictionary's own share
        if size > self.limit or key in self._entries:
            return
        try:
            self._entries[key] = (output.clone() if isinstance(output, Tensor) else output.copy()), size
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self.forget()  # the next batch needs the memory more
            return
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


@dataclass(eq=False)
class BatchRunner:
    """Runs batches on the device and gives every submission its outputs. The device thread alone calls it."""

    device: torch.device
    batch_tokens: int
    cache: OutputCache
    free_memory: Callable[[], None]
    long_batch_s: float
    counters: Counters = field(default_factory=Counters)
    paces: defaultdict[Engine, Pace] = field(default_factory=lambda: defaultdict(Pace))
    unloaded: deque[Engine] = field(default_factory=deque)  # any thread may append to it

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
        found = ((item, self.cache.get(submission.engine, item)) for item in submission.pending)
        known = [(item, output) for item, output in found if output is not None]
        if known:
            self.counters.cache_hits += len(known)
            indexes = {item.index for item, _ in known}
            submission.pending = deque(item for item in submission.pending if item.index not in indexes)
        self._deliver(submission, known)

    def run(self, batch: Batch) -> None:
        """Runs a batch; an error reaches only those who caused it. Raises DeviceBroken."""
        engine = batch[0][0].engine
        sharing: dict[tuple[Any, ...], Batch] = {}
        for submission, item in batch:
            sharing.setdefault(item.key, []).append((submission, item))
        items = [same[0][1] for same in sharing.values()]
        began = time.perf_counter()
        try:
            outputs = self._compute(engine, items)
        except Exception as error:
            if is_fatal(error):
                raise DeviceBroken(str(error)) from error
            self._isolate(batch, error)
            return
        spent_s, tokens = time.perf_counter() - began, sum(item.cost for item in items)
        self.counters.batches += 1
        self.counters.texts += len(items)
        self.counters.tokens += tokens
        self.counters.busy_s += spent_s
        self.paces[engine].measure(tokens, spent_s, self.batch_tokens, self.long_batch_s)
        results: dict[Submission, list[tuple[Item, Any]]] = {}
        for same, output in zip(sharing.values(), outputs):
            for submission, item in same:
                results.setdefault(submission, []).append((item, output))
            if self.cache.limit and not isinstance(output, Exception):
                self.cache.put(engine, same[0][1], output)
        for submission, its_outputs in results.items():
            self._deliver(submission, its_outputs)

    def _isolate(self, batch: Batch, error: Exception) -> None:
        """After a failed batch: its only submission fails; several are tried one by one."""
        submissions = list(dict.fromkeys(submission for submission, _ in batch))
        if len(submissions) == 1:
            submissions[0].context.run(log.error, "a batch failed", exc_info=error)
            submissions[0].settle(error=error)
            return
        for submission in submissions:
            self.run([entry for entry in batch if entry[0] is submission])

    def _compute(self, engine: Engine, items: Sequence[Item], last_try: bool = False) -> list[Any]:
        """Engine outputs; when memory runs out the batch is halved, and a single text tried once more."""
        try:
            return list(engine.run(items))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # Outside of the block: the error's frames would hold the memory.
        cost = sum(item.cost for item in items)
        if last_try:
            detail = f"a text of {cost} tokens does not fit into the device's memory; send a shorter one"
            raise InvalidInput(detail, "text_too_large_for_device")
        self.counters.out_of_memory_recoveries += 1
        self.cache.forget()
        getattr(engine, "release_memory", lambda: None)()
        if len(items) == 1:
            self.free_memory()
            self.forget_unloaded()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(items) == 1:
            return self._compute(engine, items, last_try=True)
        self.paces[engine].no_memory(cost)
        middle = len(items) // 2
        log.warning("out of memory at %d tokens: halving the batch", cost)
        return self._compute(engine, items[:middle]) + self._compute(engine, items[middle:])

    def _deliver(self, submission: Submission, outputs: list[tuple[Item, Any]]) -> None:
        """Gives a submission its outputs and, when they were the last, its result."""
        if (failed := next((output for _, output in outputs if isinstance(output, Exception)), None)) is not None:
            submission.settle(error=failed)
            return
        try:
            submission.work.absorb(outputs)
            submission.tokens_left -= sum(item.cost for item, _ in outputs)
            submission.texts_done += len(outputs)
            complete = submission.texts_done >= len(submission.work.items)
            result = submission.work.result() if complete else None
        except Exception as error:
            if is_fatal(error):
                raise DeviceBroken(str(error)) from error
            if is_out_of_memory(error):
                self.cache.forget()
                detail = "the request does not fit into the device's memory; send fewer or shorter texts"
                error = InvalidInput(detail, "request_too_large_for_device")
            else:
                submission.context.run(log.error, "a request's results could not be put together", exc_info=error)
            submission.settle(error=error)
            return
        if complete:
            submission.settle(result)
        else:
            fraction = 1.0 - submission.tokens_left / submission.tokens_total
            submission.context.run(submission.on_progress, submission.texts_done, fraction)


class DeviceWorker:
    """The one thread that runs inference.

    No timer: whatever arrived while the device was busy forms the next batch. The thread outlives bad batches;
    if it dies all the same, the process does. batch_tokens: the most that a batch may have. cache_mb: MiB of
    outputs. on_broken: told why no more work will be done, by whichever thread found out. free_memory: called on
    the device thread when one text does not fit; it may `unload`.
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
        self._runner = BatchRunner(device, batch_tokens, OutputCache(cache_mb), free_memory, long_batch_s)
        self.counters = self._runner.counters
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

    def submit(self, engine: Engine, work: Work, on_progress: Callable[[int, float], None]) -> Submission:
        """Queues a request's work, from any thread; its future is settled on the device thread.

        on_progress: gets the number of texts done and the fraction of tokens done, on the device thread.

        Raises:
            Stopping, DeviceBroken: no work is done any more.
        """
        submission = Submission(engine, work, on_progress)
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
        try:
            while (batch := self._next_batch()) is not None:
                if batch:
                    self._batch_began = time.monotonic()
                    self._runner.run(batch)
                    self._batch_began = 0.0
                batch = None
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
        """Waits for work and takes a batch of it; empty when only bookkeeping was due, None to stop."""
        with self._wake:
            while not (self._queue.submissions or self._stopping or self._runner.unloaded):
                self._wake.wait()
            if self._stopping:
                return None
            arrived = [submission for submission in self._queue.waiting() if not submission.admitted]
        self._runner.forget_unloaded()
        for submission in arrived:
            self._runner.admit(submission)
        with self._wake:
            return self._queue.next_batch(self._runner.budget)

"""The device thread: batches across requests, fair shares, out of memory. Knows no model and no task."""

from __future__ import annotations

import concurrent.futures
import contextlib
import contextvars
import gc
import logging
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpu_engine.device import available_cores, bind_thread, is_fatal, is_out_of_memory, settled_heap
from gpu_engine.work import DeviceBroken, Engine, InvalidInput, Item, Stopping, Work, WorkerDied

log = logging.getLogger(__name__)


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


class Submission:
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
        self._jobs: list[Submission] = []
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

    def submit(self, engine: Engine, work: Work, on_progress: Callable[[int, float], None]) -> Submission:
        """Queues a request's work; `on_progress` gets texts done and the fraction, from the device thread."""
        job = Submission(engine, work, on_progress)
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

    def _next_batch(self) -> list[tuple[Submission, Item]] | None:
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

    def _admit(self, job: Submission) -> None:
        """Answers what the cache knows; ends jobs that need no device at all."""
        job.admitted = True
        known = [(item, output) for item in job.pending if (output := self._cache.get(job.engine, item)) is not None]
        if known:
            self.counters.cache_hits += len(known)
            slots = {item.index for item, _ in known}
            job.pending = deque(item for item in job.pending if item.index not in slots)
        self._deliver(job, known)

    def _share_budget(self) -> list[tuple[Submission, Item]]:
        """Items for the next batch: the job served longest ago leads, its group's jobs share the tokens."""
        waiting = sorted((job for job in self._jobs if job.pending), key=lambda job: job.served)
        if not waiting:
            return []
        group = waiting[0].group
        sharing = [job for job in waiting if job.group == group]
        budget = min(self.batch_tokens, self._pace(group[0]).most_tokens)
        taken = dict.fromkeys(sharing, 0)
        batch: list[tuple[Submission, Item]] = []
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

    def _run_batch(self, batch: list[tuple[Submission, Item]]) -> None:
        """Runs a batch and hands every job its outputs; an error reaches only the jobs that caused it."""
        engine = batch[0][0].engine
        sharing: dict[tuple[Any, ...], list[tuple[Submission, Item]]] = {}
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
        by_job: dict[Submission, list[tuple[Item, Any]]] = {}
        for same, output in zip(sharing.values(), outputs):
            for job, item in same:
                by_job.setdefault(job, []).append((item, output))
            if self._cache.limit and not isinstance(output, Exception):
                self._cache.put(engine, same[0][1], output)
        for job, results in by_job.items():
            self._deliver(job, results)

    def _isolate(self, batch: list[tuple[Submission, Item]], error: Exception) -> None:
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

    def _deliver(self, job: Submission, outputs: list[tuple[Item, Any]]) -> None:
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

    def _finish(self, job: Submission, result: Any = None, error: BaseException | None = None) -> None:
        with self._wake:
            if job in self._jobs:
                self._jobs.remove(job)
        job.settle(result, error)

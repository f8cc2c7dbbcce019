"""The device thread: takes what waits, launches it, lands it. Knows no model."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from gpu_engine.batches import BatchRunner, Pace
from gpu_engine.device import available_cores, bind_thread
from gpu_engine.fair_queue import Batch, FairQueue, Submission
from gpu_engine.output_cache import OutputCache
from gpu_engine.work import DeviceBroken, Engine, Stopping, Work

log = logging.getLogger(__name__)
T = TypeVar("T")


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

"""Who is next on the device: what is submitted, and its fair share of a batch. Knows no thread and no model."""

from __future__ import annotations

import concurrent.futures
import contextlib
import contextvars
from collections import deque
from collections.abc import Callable
from typing import Any

from gpu_engine.work import Engine, Item, Work


class Submission:
    """One request's work on the device, and the future that always ends; it waits until its future is done."""

    def __init__(self, engine: Engine, work: Work, on_progress: Callable[[int, float], None]) -> None:
        self.engine, self.work, self.on_progress = engine, work, on_progress
        self.future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        self.pending = deque(sorted(work.items, key=lambda item: (item.rank, -item.cost)))
        self.tokens_total = self.tokens_left = sum(item.cost for item in work.items)
        self.texts_done = 0
        self.last_batch = 0  # the number of the batch that last had an item of it
        self.admitted = False
        self.context = contextvars.copy_context()  # for the log: the request's id

    @property
    def batch_key(self) -> tuple[Engine, int]:
        """Submissions of one key can share a batch."""
        return self.engine, self.pending[0].variant

    def cancel(self) -> None:
        """Drops what has not reached the device yet; safe from any thread."""
        self.future.cancel()

    def settle(self, result: Any = None, error: BaseException | None = None) -> None:
        """Ends the future, unless its waiter is already gone."""
        with contextlib.suppress(concurrent.futures.InvalidStateError):
            if error is not None:
                self.future.set_exception(error)
            else:
                self.future.set_result(result)


Batch = list[tuple[Submission, Item]]


class FairQueue:
    """Deals out batches, so that nobody waits for all of a larger request. Threads share it under a lock of theirs."""

    def __init__(self) -> None:
        self.submissions: list[Submission] = []  # the last done ones too, until somebody asks who is waiting
        self._batch_number = 0

    def add(self, submission: Submission) -> None:
        """Queues it before those who were served since, after those who wait longer."""
        submission.last_batch = self._batch_number - 2
        self.submissions.append(submission)

    def waiting(self) -> list[Submission]:
        """Those whose futures are not done, in the order they came; the others are let go, engines and all."""
        self.submissions = [submission for submission in self.submissions if not submission.future.done()]
        return self.submissions

    def next_batch(self, budget: Callable[[Engine], float]) -> Batch:
        """Items of one engine and variant: whoever was served longest ago leads, its like share the tokens evenly.

        budget: tokens that an engine's batch may have; a larger text goes alone. Empty where nothing waits.
        """
        hungry = sorted((each for each in self.waiting() if each.pending), key=lambda each: each.last_batch)
        if not hungry:
            return []
        sharing = [each for each in hungry if each.batch_key == hungry[0].batch_key]
        most_tokens = budget(hungry[0].engine)
        taken = dict.fromkeys(sharing, 0)
        batch: Batch = []
        spent = 0
        self._batch_number += 1
        while sharing:
            submission = min(sharing, key=taken.__getitem__)
            cost = submission.pending[0].cost
            if batch and spent + cost > most_tokens:
                sharing.remove(submission)
                continue
            batch.append((submission, submission.pending.popleft()))
            submission.last_batch = self._batch_number
            taken[submission] += cost
            spent += cost
            if not submission.pending:
                sharing.remove(submission)
        return batch

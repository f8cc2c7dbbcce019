"""Who is next on the device: what is submitted, and its fair share of a batch. Knows no thread and no model."""

from __future__ import annotations

import contextvars
import time
from collections.abc import Callable
from typing import Any

from gpu_engine.work import Engine, Work


class Submission:
    """One request's work on the device; it waits until it has ended, with a result or an error, or was cancelled.

    on_end: called once with the submission, its result and its error, on the device thread, or on the one that stops
    it. on_progress: called with texts done and the fraction of tokens done, on the device thread.
    """

    def __init__(
        self,
        engine: Engine,
        work: Work,
        on_end: Callable[[Submission, Any, BaseException | None], None],
        on_progress: Callable[[int, float], None],
    ) -> None:
        self.engine, self.work, self.on_progress = engine, work, on_progress
        self.pending = list(work.order)  # indexes, the next one last
        self.pending.reverse()
        self.tokens_total = self.tokens_left = sum(work.costs[index] for index in work.order)
        self.texts_done = 0
        self.last_batch = 0  # the number of the batch that last had a text of it
        self.admitted = self.ended = False
        self.came, self.begun = time.perf_counter(), 0.0  # when it was submitted, and first was in a batch
        self.context = contextvars.copy_context()  # for the log: the request's id
        self._on_end = on_end

    @property
    def batch_key(self) -> tuple[Engine, int]:
        """Submissions of one key can share a batch."""
        return self.engine, self.work.variant

    def cancel(self) -> None:
        """Drops what has not reached the device yet, and all that would come of the rest; safe from any thread."""
        self.ended = True

    def settle(self, result: Any = None, error: BaseException | None = None) -> None:
        """Ends it, unless it has ended."""
        if not self.ended:
            self.ended = True
            self._on_end(self, result, error)


Batch = list[tuple[Submission, list[int]]]  # each submission once, with the indexes of its texts


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
        """Those who have not ended, in the order they came; the others are let go, engines and all."""
        self.submissions = [submission for submission in self.submissions if not submission.ended]
        return self.submissions

    def next_batch(self, budget: Callable[[Engine], float]) -> Batch:
        """Texts of one engine and variant: whoever was served longest ago leads, its like share the tokens evenly.

        budget: tokens that an engine's batch may have; a larger text goes alone. Empty where nothing waits.
        """
        hungry = sorted((each for each in self.waiting() if each.pending), key=lambda each: each.last_batch)
        if not hungry:
            return []
        sharing = [each for each in hungry if each.batch_key == hungry[0].batch_key]
        left = budget(hungry[0].engine)
        taken = dict.fromkeys(sharing, 0)
        batch: dict[Submission, list[int]] = {}
        self._batch_number += 1
        while sharing:
            submission = min(sharing, key=taken.__getitem__) if len(sharing) > 1 else sharing[0]
            cost = submission.work.costs[submission.pending[-1]]
            if batch and cost > left:
                sharing.remove(submission)
                continue
            batch.setdefault(submission, []).append(submission.pending.pop())
            submission.last_batch = self._batch_number
            taken[submission] += cost
            left -= cost
            if not submission.pending:
                sharing.remove(submission)
        return list(batch.items())

"""`gpu-service download`: fetches models into the hub cache, for a machine that goes offline. Imports no torch."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from gpu_engine.model_files import Hub, configured_model, find_model, model_unavailable
from gpu_engine.work import HubUnreachable, ModelError, Progress


@contextlib.contextmanager
def shown(title: str) -> Iterator[Progress]:
    """A bar on a terminal, nothing elsewhere; the block gets what moves it."""
    from tqdm.auto import tqdm

    form = "{desc}: {percentage:3.0f} % |{bar}| {elapsed} (left: {remaining})"
    with tqdm(total=1.0, desc=title, bar_format=form, disable=None, leave=False, file=sys.stderr) as bar:

        def progress(phase: str, fraction: float) -> None:
            if fraction > bar.n:  # several files come at once, and their threads report in any order
                bar.update(fraction - bar.n)

        yield progress


def fetch_all(wanted: dict[str, str]) -> int:
    """Fetches what is not here. wanted: the kind (`embed`, `bertscore`, `rerank`) of each model's name.

    Prints where each is on standard output, and a line for each that can't be had on standard error. Returns the
    process's exit code: 1 where one is missing.
    """
    hub, missing = Hub(), 0
    for given, kind in wanted.items():
        try:
            print(f"{given}: {fetch(given, kind, hub)}", flush=True)
        except (ModelError, ValueError) as error:
            missing += 1
            reason = re.sub(r" \(gpu-service download \S+\)", "", str(error))  # that is what was tried just now
            print(f"gpu_service: {given}: {reason}", file=sys.stderr)
    return min(missing, 1)


def fetch(given: str, kind: str, hub: Hub) -> Path:
    """The folder of a model, fetched if need be.

    Raises:
        ValueError: it is no model name.
        ModelError: it can't be had.
    """
    name = configured_model(given)
    with shown(given) as progress:
        try:
            return find_model(kind, name, hub, progress)
        except HubUnreachable as error:
            raise model_unavailable(str(name.repo), error.detail) from None

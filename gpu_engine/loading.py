"""Loads an engine of any kind, and explains a load that failed. The one room that knows all tasks."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import Any

import torch

from gpu_engine.bertscore import load_bertscore
from gpu_engine.device import available_cores, bind_thread, is_fatal, is_out_of_memory, settled_heap
from gpu_engine.embedding import load_embed
from gpu_engine.model_files import Hub, ModelName, find_model
from gpu_engine.reranking import load_rerank
from gpu_engine.work import DeviceBroken, Engine, EngineError, LoadOptions, ModelError, Progress

log = logging.getLogger(__name__)


class EngineLoader:
    """Loads engines on one device. Files are fetched side by side; weights are read by one thread at a time."""

    def __init__(self, device: torch.device, hub: Hub) -> None:
        self.device, self.hub = device, hub
        self._build = threading.Lock()  # memory, and imports of half-loaded libraries
        self._stream: Any = None

    def load(self, kind: str, name: ModelName, options: LoadOptions, progress: Progress) -> Engine:
        """Finds a model's files, reads them and checks the result; takes seconds to minutes.

        Raises:
            ModelError: for callers; anything else is for `explain_load`.
        """
        progress("importing libraries", 0.0)
        bind_thread(self.device, available_cores())
        folder = find_model(kind, name, self.hub, progress)
        with self._build, settled_heap(), self._beside_the_worker():
            if kind == "rerank":
                return load_rerank(name, folder, self.device, options, progress)
            load = load_bertscore if kind == "bertscore" else load_embed
            return load(name, folder, self.device, options, progress)

    @contextlib.contextmanager
    def _beside_the_worker(self) -> Iterator[None]:
        """Keeps what a load does on a GPU off the stream that serves, and waits for it at the end.

        One stream for all loads: each has memory and a workspace of its own.
        """
        if self.device.type != "cuda":
            yield
            return
        self._stream = self._stream or torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()


def explain_load(name: ModelName, error: BaseException) -> EngineError:
    """What callers are told of a load that failed; the log gets a traceback of what was not expected."""
    if isinstance(error, EngineError):
        return error
    if is_fatal(error):
        return DeviceBroken("the device context is broken")
    if is_out_of_memory(error):
        detail = f"{name.public} does not fit into memory; idle models were unloaded: retry, or name a smaller."
        return ModelError(detail, "model_out_of_memory")
    log.error("loading %s failed", name.public, exc_info=error)
    detail = f"{name.public} could not be loaded ({type(error).__name__}); the service's log has the reason."
    return ModelError(detail)

"""Stand-ins for what torch has only where there is a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ILLEGAL = "CUDA error: an illegal memory access was encountered"


def answer_probes(monkeypatch: pytest.MonkeyPatch, refusal: BaseException | None) -> None:
    """A GPU that was used already, and that still adds two numbers, or refuses to."""

    def zeros(size: int, device: str) -> torch.Tensor:
        assert device == "cuda"
        if refusal is not None:
            raise refusal
        return torch.ones(size) - 1

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch, "zeros", zeros)


class Recorder(TorchDispatchMode):
    """Notes every operator that runs, with its arguments and its result."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


class FakeGraph:
    """A CUDA graph on the CPU: a replay runs the captured operators on the captured memory, whatever is in it now."""

    card: FakeCard

    def __init__(self) -> None:
        self.recorder, self.pool, self.replays = Recorder(), None, 0
        self.card.graphs.append(self)

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        assert self.card.current is not self.card.main, "a capture needs a stream of its own"
        assert capture_error_mode == "thread_local"
        self.pool = pool
        self.card.capturing = self
        self.recorder.__enter__()

    def capture_end(self) -> None:
        self.recorder.__exit__(None, None, None)
        self.card.capturing = None
        if self.card.break_off is not None:
            raise self.card.break_off

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, before in self.recorder.calls:
            pairs = zip(tree_leaves(before), tree_leaves(func(*args, **kwargs)))
            for old, new in pairs:
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class FakeStream:
    """A stream of a card that has none: everything happens at once."""

    card: FakeCard

    def __init__(self, device: Any = None) -> None:
        self.waited_for: list[Any] = []
        self.synchronized = 0
        self.card.streams.append(self)

    def wait_stream(self, other: Any) -> None:
        self.waited_for.append(other)

    def synchronize(self) -> None:
        self.synchronized += 1


class FakeCard:
    """What torch.cuda has for graphs and streams. break_off: what the end of a capture raises."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.streams: list[FakeStream] = []
        self.graphs: list[FakeGraph] = []
        self.capturing: FakeGraph | None = None
        self.break_off: RuntimeError | None = None
        self.ended_pools: list[Any] = []  # for which the allocator was told that a capture is over
        kinds = {kind: type(kind.__name__, (kind,), {"card": self}) for kind in (FakeGraph, FakeStream)}
        self.main = self.current = kinds[FakeStream]()
        self.streams.clear()
        for name, stand_in in {  # classes: libraries name them in annotations
            "CUDAGraph": kinds[FakeGraph],
            "Stream": kinds[FakeStream],
            "stream": self._on,
            "current_stream": lambda: self.current,
            "current_device": lambda: 0,
            "graph_pool_handle": lambda: (0, len(self.graphs)),
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        ended = self.ended_pools
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda device, pool: ended.append(pool), raising=False)

    @contextlib.contextmanager
    def _on(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

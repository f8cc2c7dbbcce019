"""Outputs of repeated texts, kept within a bound of bytes. Knows no model and no thread."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

from gpu_engine.device import is_out_of_memory
from gpu_engine.work import Engine, Outputs


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

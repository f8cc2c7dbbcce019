"""Token ids to batches: cut by length, laid end to end on a CPU, padded or end to end on a GPU. Computes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Group:
    """A block of texts inside a packed batch: rows [start, start + count * tokens) of (rows, hidden)."""

    start: int
    count: int
    tokens: int
    mask: Tensor | None = None  # (count, 1, 1, tokens) additive, -inf on padding; None where there is none

    @property
    def end(self) -> int:
        """The row after its last."""
        return self.start + self.count * self.tokens


@dataclass(frozen=True)
class Packed:
    """Token ids of a batch laid end to end, so that linear layers see no padding they need not see.

    ids: (rows,) int64. Texts of equal length form groups on a CPU (no padding at all); on a GPU one padded
    group holds them all (few kernels), unless its attention takes texts of any lengths at once. real: (texts,
    tokens) bool, None where nothing is padded. bounds: (texts + 1,) or one more int32, the row at which each
    text begins, then the end; rows of no text count as one. None where nobody asks for them.
    """

    ids: Tensor
    offsets: Tensor  # (rows,) position of each row in its text
    groups: tuple[Group, ...]
    lengths: tuple[int, ...]
    real: Tensor | None
    bounds: Tensor | None = None


def pack_by_length(ids: Sequence[np.ndarray], device: torch.device = CPU, bounded: bool = False) -> Packed:
    """Packs texts that are sorted longest first: one group per length, no padding. bounded: with their bounds."""
    lengths = tuple(len(row) for row in ids)
    groups: list[Group] = []
    start = 0
    for tokens, count in sorted(Counter(lengths).items(), reverse=True):
        groups.append(Group(start, count, tokens))
        start += count * tokens
    flat, offsets = np.zeros((2, round_rows(start)), np.int64)  # rows beyond the texts belong to no group
    flat[:start] = np.concatenate(ids)
    offsets[:start] = np.concatenate([np.arange(n) for n in lengths])
    ends = [0, *np.cumsum(lengths).tolist(), len(flat)][: len(lengths) + 1 + (len(flat) > start)]
    bounds = to_device(np.array(ends, np.int32), device) if bounded else None
    return Packed(to_device(flat, device), to_device(offsets, device), tuple(groups), lengths, None, bounds)


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """The array as a tensor on `device`, copied without waiting where the device allows it."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def round_rows(rows: int) -> int:
    """Rows to make of a packed batch: a few sizes, because oneDNN keeps memory for each it has ever seen."""
    step = 4 if rows <= 64 else 16 if rows <= 256 else 32 if rows <= 512 else 128
    return -(-rows // step) * step


def pack_padded(
    ids: Sequence[np.ndarray],
    pad_id: int,
    device: torch.device,
    dtype: torch.dtype,
    longest: int,
    rows_for: Callable[[int, int], int],
) -> Packed:
    """Packs texts into one group padded to a multiple of eight tokens, copied to `device` without waiting.

    longest: positions the model has; padding stops there. rows_for: how many rows to make of (texts, tokens);
    rows beyond the texts attend to themselves.
    """
    lengths = tuple(len(row) for row in ids)
    most = max(lengths)
    tokens = max(most, min(-(-most // 8) * 8, longest))
    rows = rows_for(len(ids), tokens)
    padded = np.full((rows, tokens), pad_id, np.int64)
    for row, text in zip(padded, ids):
        row[: len(text)] = text
    lengths += (tokens,) * (rows - len(ids))
    real = np.arange(tokens)[None, :] < np.asarray(lengths)[:, None]  # (rows, tokens)

    mask = None
    if not real.all():
        mask = to_device(np.where(real, 0.0, -np.inf).astype(np.float32)[:, None, None, :], device).to(dtype)
    offsets = np.tile(np.arange(tokens), rows)
    groups = (Group(0, rows, tokens, mask),)
    flat = to_device(padded.reshape(-1), device)
    return Packed(flat, to_device(offsets, device), groups, lengths, None if mask is None else to_device(real, device))


def cut_by_length(order: list[int], ids: Sequence[np.ndarray]) -> Iterator[list[int]]:
    """Cuts texts, sorted longest first, into parts that are padded each for itself."""
    start = 0
    for end in part_ends([len(ids[index]) for index in order]):
        yield order[start:end]
        start = end


PART_TOKENS = 256  # what a forward costs beside its tokens: launches, and a device that is not filled


def part_ends(lengths: Sequence[int]) -> list[int]:
    """Where to cut lengths, sorted longest first, so that the parts cost least: the end of each, the last one included.

    A part costs PART_TOKENS and its texts padded to its longest. A dynamic programme over the distinct lengths,
    rounded up as pack_padded does: equal ones are never cut apart.
    """
    rounded, counts = np.unique(-(-np.asarray(lengths) // 8) * -8, return_counts=True)  # negative: longest first
    ends = np.concatenate([[0], counts.cumsum()])  # texts before each distinct length
    least = np.zeros(len(ends), np.int64)  # cost of the texts before
    begins = np.zeros(len(ends), np.int64)  # of the part that ends there
    for end in range(1, len(ends)):
        costs = least[:end] + PART_TOKENS - (ends[end] - ends[:end]) * rounded[:end]
        begins[end] = costs.argmin()
        least[end] = costs[begins[end]]
    cuts = [len(ends) - 1]
    while cuts[-1] > 0:
        cuts.append(int(begins[cuts[-1]]))
    return [int(ends[cut]) for cut in reversed(cuts[:-1])]

"""Token ids to batches: cut by length, laid end to end on a CPU, padded or end to end on a GPU. Computes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
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
    parts: Sequence[Sequence[np.ndarray]],
    pad_id: int,
    device: torch.device,
    dtype: torch.dtype,
    longest: int,
    spare_rows: int = 0,
) -> list[Packed]:
    """Packs the texts of each part into one group padded to a multiple of eight tokens, all moved to `device` at once.

    longest: positions the model has; padding stops there. spare_rows: of no text; they attend to themselves.
    """
    shapes = [(len(part) + spare_rows, padded_tokens(max(map(len, part)), longest)) for part in parts]
    sizes = [rows * tokens for rows, tokens in shapes]
    ids, offsets = whole = np.empty((2, sum(sizes)), np.int64)
    real = np.empty(sum(sizes), bool)
    masked, lengths_of, first = [], [], 0
    for part, (rows, tokens) in zip(parts, shapes):
        lengths = np.array([*map(len, part), *[tokens] * spare_rows])
        last = first + rows * tokens
        inside = np.arange(tokens) < lengths[:, None]  # (rows, tokens)
        padded = np.full((rows, tokens), pad_id, np.int64)
        padded[: len(part)][inside[: len(part)]] = np.concatenate(part)
        ids[first:last], offsets[first:last], real[first:last] = (
            padded.ravel(),
            np.tile(np.arange(tokens), rows),
            inside.ravel(),
        )
        masked.append(not inside.all())
        lengths_of.append(tuple(lengths.tolist()))
        first = last
    all_ids, all_offsets = (each.split_with_sizes(sizes) for each in to_device(whole, device).unbind())
    reals: tuple[Tensor, ...] = ()
    masks: tuple[Tensor, ...] = ()
    if any(masked):
        all_real = to_device(real, device)
        mask = torch.zeros(len(real), dtype=dtype, device=device).masked_fill_(~all_real, -torch.inf)
        reals, masks = all_real.split_with_sizes(sizes), mask.split_with_sizes(sizes)
    batches = []
    for number, (rows, tokens) in enumerate(shapes):
        group_mask = masks[number].view(rows, 1, 1, tokens) if masked[number] else None
        shown = reals[number].view(rows, tokens) if masked[number] else None
        groups = (Group(0, rows, tokens, group_mask),)
        batches.append(Packed(all_ids[number], all_offsets[number], groups, lengths_of[number], shown))
    return batches


def padded_tokens(longest_text: int, longest: int) -> int:
    """Tokens that a text of so many is padded to: a multiple of eight, as far as the model has positions."""
    return max(longest_text, min(-(-longest_text // 8) * 8, longest))


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

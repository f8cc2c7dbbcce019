"""Where a batch is cut so that padding costs little."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from test_numerics_embed import minilm_folder

from benchmarks.workload import Texts
from gpu_engine.packing import PART_TOKENS, cut_by_length, part_ends


def padded_tokens(lengths: Sequence[int], ends: Sequence[int]) -> list[tuple[int, int]]:
    """(texts, tokens of each with padding) of the parts."""
    return [(end - start, -(-lengths[start] // 8) * 8) for start, end in zip([0, *ends], ends)]


def cost(lengths: Sequence[int], ends: Sequence[int]) -> int:
    return sum(PART_TOKENS + texts * tokens for texts, tokens in padded_tokens(lengths, ends))


def test_no_other_cuts_cost_less() -> None:
    rng = np.random.default_rng(0)
    for count in range(1, 9):
        for most in (20, 200, 512):
            lengths = sorted(rng.integers(1, most, count).tolist(), reverse=True)
            every = ([*cuts, count] for n in range(count) for cuts in itertools.combinations(range(1, count), n))
            assert cost(lengths, part_ends(lengths)) == min(cost(lengths, ends) for ends in every), lengths


@pytest.mark.parametrize(("count", "ratio"), [(400, 1.25), (1000, 1.18)])
def test_the_benchmarks_texts_are_padded_by_less_than_a_quarter_and_in_few_shapes(count: int, ratio: float) -> None:
    texts = Texts(minilm_folder())
    parts: list[tuple[int, int]] = []
    real = 0
    for _ in range(20):
        lengths = sorted(texts.lengths(count), reverse=True)
        parts += padded_tokens(lengths, part_ends(lengths))
        real += sum(lengths)
    assert sum(texts * tokens for texts, tokens in parts) / real <= ratio
    assert len(parts) / 20 <= 14, "forwards a batch"
    assert len({tokens for _, tokens in parts}) <= 300 / 8 + 1, "lengths that a graph would be made for"


def test_parts_hold_every_text_once_longest_first() -> None:
    ids = [np.zeros(length, np.int32) for length in (3, 90, 4, 400, 91, 88)]
    order = [3, 4, 1, 5, 2, 0]
    parts = list(cut_by_length(order, ids))
    assert [index for part in parts for index in part] == order
    assert parts == [[3], [4, 1, 5, 2, 0]], "padding the two short ones to 96 costs less than a part of their own"
    assert list(cut_by_length([], ids)) == []

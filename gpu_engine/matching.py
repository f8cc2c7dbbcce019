"""Greedy matching of token embeddings, pair by pair, a block of pairs at a time. Knows no tokenizer and no request."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gpu_engine.device import ToHost


class TokenRows:
    """Token embeddings of a batch: texts are slices of rows, (rows, hidden) float32 on the device, of unit length.

    usable: (rows,) bool, on its way to the host. starts, lengths: (texts,) int64, of each text in its rows.
    """

    def __init__(self, rows: Tensor, usable: ToHost, starts: np.ndarray, lengths: np.ndarray) -> None:
        self.rows, self.usable, self.starts, self.lengths = rows, usable, starts, lengths

    def bad(self) -> list[int]:
        """Places of texts with a row that is not finite, or zero; waits for the device."""
        usable = self.usable.numpy()
        if usable.all():
            return []
        unusable = np.concatenate([[0], np.cumsum(~usable)])
        return [int(n) for n in np.flatnonzero(unusable[self.starts + self.lengths] > unusable[self.starts])]

    def text(self, place: int) -> Tensor:
        """(tokens, hidden) of one text."""
        return self.rows[self.starts[place] : self.starts[place] + self.lengths[place]]

    def nbytes(self, place: int) -> int:
        """Bytes of one text's embeddings."""
        return int(self.lengths[place]) * self.rows.shape[1] * self.rows.element_size()

    def keep(self, place: int) -> Tensor:
        """A copy of one text's embeddings."""
        return self.text(place).clone()


class PairMatcher:
    """Matches pairs as soon as both their texts are encoded, then lets the texts go. Device thread only.

    pairs: by their numbers, indexes of a candidate and a reference. scores: numbers of pairs, and their (pairs, 2) on
    the way to the host; the last for a pair counts. similarities: of each pair, where they are kept.
    """

    def __init__(
        self, pairs: dict[int, tuple[int, int]], weights: Sequence[np.ndarray], keep_similarities: bool
    ) -> None:
        self.pairs, self.weights, self.keep_similarities = pairs, weights, keep_similarities
        self.lengths = list(map(len, weights))
        self.scores: list[tuple[list[int], ToHost]] = []
        self.similarities: dict[int, np.ndarray] = {}
        self.known: dict[int, tuple[TokenRows, int]] = {}  # of each text, its rows and its place in them
        self.open: dict[int, list[int]] = {}  # of each text, the numbers of its pairs that are not matched for good
        self._landed: set[int] = set()
        for number, pair in pairs.items():
            for index in dict.fromkeys(pair):
                self.open.setdefault(index, []).append(number)

    def absorb(self, indexes: Sequence[int], outputs: TokenRows, places: Sequence[int]) -> None:
        """Takes token embeddings and matches every pair that is complete with them."""
        known = self.known
        known.update((index, (outputs, place)) for index, place in zip(indexes, places))
        complete = {
            number
            for index in indexes
            for number in self.open.get(index, ())
            if self.pairs[number][0] in known and self.pairs[number][1] in known
        }
        self._match(sorted(complete, key=lambda number: (sum(self._lengths(number)), number)))

    def landed(self, indexes: Sequence[int]) -> None:
        """Lets every text go all of whose pairs are matched, with texts that have landed."""
        landed = self._landed
        landed.update(indexes)
        for number in {number for index in indexes for number in self.open.get(index, ())}:
            candidate, reference = self.pairs[number]
            if candidate in landed and reference in landed:
                for index in {candidate, reference}:
                    self.open[index].remove(number)
                    if not self.open[index]:
                        del self.open[index], self.known[index]

    def _lengths(self, number: int) -> tuple[int, int]:
        """Tokens of a pair's candidate and reference."""
        candidate, reference = self.pairs[number]
        return self.lengths[candidate], self.lengths[reference]

    def _match(self, numbers: list[int]) -> None:
        """Scores pairs in chunks whose padded sides and similarity matrices stay within some 16 MB each."""
        if not numbers:
            return
        width = self.known[self.pairs[numbers[0]][0]][0].rows.shape[1]
        chunk: list[int] = []
        longest = 1
        for number in numbers:
            longer = max(self._lengths(number))
            longest = max(longest, longer)
            if chunk and (len(chunk) + 1) * longest * max(longest, width) > 4_000_000:
                self._score(chunk)
                chunk, longest = [], longer
            chunk.append(number)
        self._score(chunk)

    def _score(self, numbers: list[int]) -> None:
        candidates, references = ([self.pairs[number][side] for number in numbers] for side in (0, 1))
        rows, starts = self._rows([*candidates, *references])
        count = len(numbers)
        of_candidates = Side(starts[:count], [self.weights[index] for index in candidates])
        of_references = Side(starts[count:], [self.weights[index] for index in references])
        with torch.inference_mode():
            scores, similarity = greedy_match(rows, of_candidates, of_references)
        self.scores.append((numbers, ToHost(scores)))
        if self.keep_similarities:
            for number, matrix in zip(numbers, similarity.cpu()):
                of_candidate, of_reference = self._lengths(number)
                self.similarities[number] = matrix[:of_candidate, :of_reference].contiguous().numpy()

    def _rows(self, indexes: list[int]) -> tuple[Tensor, np.ndarray]:
        """Rows that hold all of these texts, and where each begins; those of one batch lie together already."""
        found = [self.known[index] for index in indexes]
        if all(outputs is found[0][0] for outputs, _ in found):
            return found[0][0].rows, found[0][0].starts[[place for _, place in found]]
        distinct = dict.fromkeys(indexes)
        texts = [self.known[index][0].text(self.known[index][1]) for index in distinct]
        ends = itertools.accumulate(map(len, texts), initial=0)
        start_of = dict(zip(distinct, ends))
        return torch.cat(texts), np.array([start_of[index] for index in indexes])


class Side(NamedTuple):
    """The candidates or the references of some pairs: first rows, (pairs,) int64, and each token's weight."""

    starts: np.ndarray
    weights: Sequence[np.ndarray]

    def rows_and_weights(self) -> tuple[np.ndarray, np.ndarray]:
        """(pairs, longest) rows, the last one again beyond a text's end; weights that sum to 1, or are all 0."""
        lengths = np.array(list(map(len, self.weights)))
        inside = np.arange(lengths.max()) < lengths[:, None]
        table = np.zeros(inside.shape, np.float32)
        table[inside] = np.concatenate(self.weights)
        total = table.sum(1, keepdims=True)
        rows = self.starts[:, None] + np.minimum(np.arange(lengths.max()), lengths[:, None] - 1)
        return rows, table / np.where(total > 0, total, 1.0)


def greedy_match(rows: Tensor, candidates: Side, references: Side) -> tuple[Tensor, Tensor]:
    """Scores and similarities of pairs of texts, by greedy matching (equations 1 to 3 of the paper).

    rows: (rows, hidden) of unit length. Returns precision and recall, (pairs, 2), and the similarity matrices,
    (pairs, candidate tokens, reference tokens); float32 on the device. Beyond a text's end its last token stands
    again: that changes no maximum, and has no weight. A side whose weights sum to 0 scores 0.
    """
    (candidate_rows, candidate_weights), (reference_rows, reference_weights) = (
        side.rows_and_weights() for side in (candidates, references)
    )
    pairs, split = len(candidate_rows), candidate_rows.size
    both = torch.from_numpy(np.concatenate([candidate_rows, reference_rows], axis=None)).to(rows.device)
    weights = torch.from_numpy(np.concatenate([candidate_weights, reference_weights], axis=None)).to(rows.device)
    candidate_words, reference_words = (
        words.view(pairs, -1, rows.shape[1])
        for words in rows.index_select(0, both).split_with_sizes([split, len(both) - split])
    )
    similarity = torch.bmm(candidate_words, reference_words.transpose(1, 2))
    of_candidate, of_reference = (side.view(pairs, -1) for side in weights.split_with_sizes([split, len(both) - split]))
    precision = (similarity.amax(2) * of_candidate).sum(1)
    recall = (similarity.amax(1) * of_reference).sum(1)
    return torch.stack([precision, recall], dim=1), similarity

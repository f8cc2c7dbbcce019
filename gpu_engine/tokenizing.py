"""Texts to token ids, cut at the model's maximum. Knows no model but its limits."""

from __future__ import annotations

import concurrent.futures
import contextvars
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

# Asked between the chunks of a long list of texts, in a thread: whether nobody waits for them any more.
abandoned: contextvars.ContextVar[Callable[[], bool]] = contextvars.ContextVar("abandoned", default=lambda: False)

# The Rust tokenizer's threads finish one list before they look at the next: a short text would wait for all
# of a long list, on the event loop too. This much takes about ten milliseconds.
_CHUNK_CHARACTERS = 65_536


def in_chunks(texts: Sequence[str], beside: int = 0) -> Iterator[list[str]]:
    """`texts` in lists of bounded length. Raises CancelledError between two of them when they are abandoned.

    beside: characters that are tokenised with each of them.
    """
    chunk: list[str] = []
    room = _CHUNK_CHARACTERS
    for text in texts:
        if chunk and room < len(text) + beside:
            yield chunk
            if abandoned.get()():
                raise concurrent.futures.CancelledError
            chunk, room = [], _CHUNK_CHARACTERS
        chunk.append(text)
        room -= len(text) + beside
    yield chunk


class TextTokenizer:
    """Texts to token ids, cut at `max_tokens`; thread-safe, through the Rust tokenizer where there is one."""

    def __init__(self, tokenizer: Any, max_tokens: int) -> None:
        from tokenizers import Tokenizer

        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        self.special_tokens = int(tokenizer.num_special_tokens_to_add(pair=False))
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._fast = None
        if backend is not None:  # a copy: the wrapper resets truncation and padding at each of its calls
            self._fast = Tokenizer.from_str(backend.to_str())
            self._fast.no_padding()
            self._fast.enable_truncation(max_tokens, direction=getattr(tokenizer, "truncation_side", "right"))
        others = {getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad", "cls", "sep", "mask")}
        unknown = getattr(tokenizer, "unk_token_id", None)
        self._unknown = None if unknown in others else unknown  # GPT-2's is its end of text: it tells nothing
        # SentencePiece's word boundary stands alone before an unknown word, so it counts as no token.
        boundary = tokenizer.convert_tokens_to_ids("▁") if self._unknown is not None else None
        self._boundary = -1 if boundary in (None, unknown) else boundary

    def __call__(self, texts: Sequence[str]) -> tuple[list[np.ndarray], set[int]]:
        """For each text its ids, (tokens,) int32, special tokens included; and the indexes of those that were cut.

        The ids are slices of one array.
        """
        if self._fast is None:
            encoded = [self._encode_slowly(text) for chunk in in_chunks(texts) for text in chunk]
            return [ids for ids, _ in encoded], {index for index, (_, cut) in enumerate(encoded) if cut}
        lists: list[list[int]] = []
        cut: set[int] = set()
        for chunk in in_chunks(texts):
            for encoding in self._fast.encode_batch_fast(chunk):
                if encoding.overflowing:
                    cut.add(len(lists))
                lists.append(encoding.ids)
        flat = np.fromiter(itertools.chain.from_iterable(lists), np.int32, sum(map(len, lists)))
        ends = list(itertools.accumulate(map(len, lists), initial=0))
        return [flat[first:last] for first, last in itertools.pairwise(ends)], cut

    def mostly_unknown(self, texts: Sequence[np.ndarray], around: int) -> set[int]:
        """Indexes of the texts (each its ids) more than half of whose tokens are the unknown token.

        around: how many tokens of each are not the text's own, which are special tokens and a prompt's.
        """
        if self._unknown is None or not texts or not (np.concatenate(texts) == self._unknown).any():
            return set()
        found = set()
        for index, ids in enumerate(texts):
            unknown = np.count_nonzero(ids == self._unknown)
            if unknown and 2 * unknown > len(ids) - around - np.count_nonzero(ids == self._boundary):
                found.add(index)
        return found

    def _encode_slowly(self, text: str) -> tuple[np.ndarray, bool]:
        """For tokenizers written in Python."""
        ids = self.tokenizer(text, truncation=True, max_length=self.max_tokens)["input_ids"]
        cut = len(ids) >= self.max_tokens and len(self.tokenizer(text)["input_ids"]) > self.max_tokens
        return np.asarray(ids, np.int32), cut


def longest_positions(module: Any) -> int:
    """Positions that the model has, or a very large number where it has no limit."""
    names = ["max_position_embeddings", "n_positions", "max_encoder_position_embeddings"]
    names += ["max_decoder_position_embeddings"] if hasattr(module, "decoder") else []
    stated = [getattr(module.config, name, None) or 0 for name in names]
    limits = [int(limit) for limit in stated if int(limit) > 0]
    positions: Any = getattr(getattr(module, "embeddings", None), "position_embeddings", None)
    padding = getattr(positions, "padding_idx", None)
    if padding is not None:  # RoBERTa's positions start after the padding index
        limits.append(len(positions.weight) - padding - 1)
    return min(limits, default=1 << 30)


def longest_input(module: Any, tokenizer: Any) -> int:
    """The model's own maximum in tokens, special tokens included."""
    return min(int(tokenizer.model_max_length), longest_positions(module))


def unknown_tokens(side: str) -> str:
    """The warning of a text that the model can't read."""
    return f"more than half of the {side}'s tokens are unknown to the model: the result means little"


def at_indexes(text: str, indexes: Iterable[int]) -> str:
    """A warning and the places in the request that it is of."""
    return f"{text} (at {', '.join(map(str, sorted(set(indexes))))})"

"""The texts of the benchmark: generated, seeded, never repeated between two requests.

Words are whole alphabetic words of the model's own vocabulary, so that a word is one token and the length of
a text in tokens is known without a tokenizer: its words, the full stop, and the two special tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist

import numpy as np

Pair = tuple[str, str]  # a candidate and its reference

MEAN_TOKENS = 25
LOGNORMAL_SIGMA = 0.9  # median 17 tokens, one text in fifteen over 64, one in a thousand at the limit
MIN_TOKENS, MAX_TOKENS = 5, 300
TOKENS_BESIDE_WORDS = 3  # [CLS], the full stop, [SEP]
REPLACED, DROPPED = 0.25, 0.10  # how a candidate differs from its reference, as shares of the words


class Texts:
    """Texts and pairs of given lengths, drawn from a model's vocabulary with one seed."""

    def __init__(self, model_dir: Path, seed: int = 20240131) -> None:
        vocabulary = json.loads((model_dir / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
        self.vocabulary = sorted(word for word in vocabulary if len(word) > 1 and word.isascii() and word.isalpha())
        self.rng = np.random.default_rng(seed)

    def lengths(self, count: int, per_call: int = 100, *, jitter: bool = True) -> list[int]:
        """`count` lengths in tokens, lognormal about `MEAN_TOKENS`, cut to `MIN_TOKENS` … `MAX_TOKENS`.

        Every `per_call` of them are spread evenly: one of each hundredth of the distribution for a hundred, the very
        same lengths each time without `jitter`. A slow contender answers a few requests in the time in which a fast
        one answers many, and both are to see the same spread.
        """
        blocks = -(-count // per_call)
        within = self.rng.random((blocks, per_call)) if jitter else 0.5
        shares = self.rng.permuted((np.arange(per_call) + within) / per_call * np.ones((blocks, 1)), axis=1)
        mu = np.log(MEAN_TOKENS) - LOGNORMAL_SIGMA**2 / 2  # the mean of a lognormal is exp(mu + sigma²/2)
        normal = [NormalDist().inv_cdf(min(max(share, 1e-9), 1 - 1e-9)) for share in shares.ravel()[:count]]
        drawn = np.exp(mu + LOGNORMAL_SIGMA * np.array(normal))
        lengths: list[int] = np.clip(np.round(drawn), MIN_TOKENS, MAX_TOKENS).astype(int).tolist()
        return lengths

    def draw(self, lengths: Sequence[int]) -> list[str]:
        """One text for each length in tokens, all of them different."""
        texts: dict[str, None] = {}
        for length in lengths:
            while (text := sentence(self.words(length - TOKENS_BESIDE_WORDS))) in texts:
                pass
            texts[text] = None
        return list(texts)

    def pairs(self, references: Sequence[str], *, same_length: bool = False) -> list[Pair]:
        """A candidate for each reference: words replaced and, unless `same_length`, words left out."""
        pairs = []
        for reference in references:
            words = reference.rstrip(".").lower().split(" ")
            replaced = self.rng.random(len(words)) < REPLACED
            kept = np.ones(len(words), bool) if same_length else self.rng.random(len(words)) >= DROPPED
            kept[0] = True
            fresh = self.words(len(words))
            candidate = [fresh[i] if replaced[i] else word for i, word in enumerate(words) if kept[i]]
            pairs.append((sentence(candidate), reference))
        return pairs

    def words(self, count: int) -> list[str]:
        """Words at random, with repeats."""
        return [self.vocabulary[index] for index in self.rng.integers(0, len(self.vocabulary), count)]


def sentence(words: Sequence[str]) -> str:
    """The words with a capital and a full stop."""
    return " ".join(words).capitalize() + "."

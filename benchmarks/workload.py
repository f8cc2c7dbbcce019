"""The texts of the benchmark: generated, seeded, never repeated between two requests.

Words are whole alphabetic words of the model's own vocabulary, so that a word is one token and the length of
a text in tokens is known without a tokenizer: its words, the full stop, and the two special tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

MEAN_TOKENS = 25
LOGNORMAL_SIGMA = 0.9  # median 17 tokens, one text in fifteen over 64, one in a thousand at the limit
MIN_TOKENS, MAX_TOKENS = 5, 300
STRATA = 100
TOKENS_BESIDE_WORDS = 3  # [CLS], the full stop, [SEP]
REPLACED, DROPPED = 0.25, 0.10  # how a candidate differs from its reference, as shares of the words


@dataclass(frozen=True)
class Pairs:
    """Candidates and references of equal number; the i-th candidate belongs to the i-th reference."""

    candidates: list[str]
    references: list[str]

    def __len__(self) -> int:
        return len(self.candidates)

    def shortest(self, count: int) -> Pairs:
        """The `count` pairs with the shortest references, in order of length."""
        order = sorted(range(len(self)), key=lambda index: len(self.references[index]))[:count]
        return Pairs([self.candidates[index] for index in order], [self.references[index] for index in order])

    def chunks(self, size: int) -> Iterator[Pairs]:
        """Whole chunks of `size` pairs."""
        for candidates, references in zip(chunks(self.candidates, size), chunks(self.references, size), strict=True):
            yield Pairs(candidates, references)


def read_vocabulary(model_dir: Path) -> list[str]:
    """Whole lower-case alphabetic words, two letters or more, of the tokenizer in `model_dir`, sorted."""
    vocabulary = json.loads((model_dir / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    return sorted(word for word in vocabulary if len(word) > 1 and word.isascii() and word.isalpha())


def draw_lengths(count: int, rng: np.random.Generator) -> list[int]:
    """`count` lengths in tokens, lognormal about `MEAN_TOKENS`, cut to `MIN_TOKENS` … `MAX_TOKENS`.

    Every hundred of them hold one of each hundredth of the distribution. A slow contender answers a few
    requests in the time in which a fast one answers many, and both are to see the same spread of lengths.
    """
    blocks = -(-count // STRATA)
    shares = (np.arange(STRATA) + rng.random((blocks, STRATA))) / STRATA  # one of each hundredth
    rng.permuted(shares, axis=1, out=shares)
    return quantiles(shares.ravel()[:count])


def even_lengths(count: int, per_call: int) -> list[int]:
    """`count` lengths in tokens, in which every `per_call` are the same evenly spread quantiles."""
    once = quantiles((np.arange(per_call) + 0.5) / per_call)
    return (once * -(-count // per_call))[:count]


def quantiles(shares: np.ndarray) -> list[int]:
    """Lengths below which these shares of all texts lie."""
    mu = np.log(MEAN_TOKENS) - LOGNORMAL_SIGMA**2 / 2  # the mean of a lognormal is exp(mu + sigma²/2)
    normal = np.array([NormalDist().inv_cdf(share) for share in np.clip(shares, 1e-9, 1 - 1e-9)])
    drawn = np.exp(mu + LOGNORMAL_SIGMA * normal)
    lengths: list[int] = np.clip(np.round(drawn), MIN_TOKENS, MAX_TOKENS).astype(int).tolist()
    return lengths


def make_texts(vocabulary: Sequence[str], lengths: Sequence[int], rng: np.random.Generator) -> list[str]:
    """One text for each length in tokens, all of them different."""
    seen: set[str] = set()
    texts = []
    for length in lengths:
        while (text := sentence(random_words(vocabulary, length - TOKENS_BESIDE_WORDS, rng))) in seen:
            pass
        seen.add(text)
        texts.append(text)
    return texts


def make_pairs(
    vocabulary: Sequence[str],
    references: Sequence[str],
    rng: np.random.Generator,
    *,
    same_length: bool = False,
) -> Pairs:
    """A candidate for each reference: words replaced and, unless `same_length`, words left out."""
    candidates = []
    for reference in references:
        words = reference.rstrip(".").lower().split(" ")
        replaced = rng.random(len(words)) < REPLACED
        kept = np.ones(len(words), bool) if same_length else rng.random(len(words)) >= DROPPED
        kept[0] = True
        fresh = random_words(vocabulary, len(words), rng)
        candidates.append(sentence([fresh[i] if replaced[i] else word for i, word in enumerate(words) if kept[i]]))
    return Pairs(candidates, list(references))


def random_words(vocabulary: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
    return [vocabulary[index] for index in rng.integers(0, len(vocabulary), count)]


def sentence(words: Sequence[str]) -> str:
    return " ".join(words).capitalize() + "."


@dataclass(frozen=True)
class Workload:
    """What every contender of one run is given.

    `texts` and `pairs` have the spread of lengths that is drawn, `fixed_pairs` lengths that are given, by name.
    The samples answer for exactness, before anything is timed, and hold the longest text there is.
    """

    texts: list[str]
    pairs: Pairs
    fixed_pairs: dict[str, Pairs]
    sample_texts: list[str]
    sample_pairs: Pairs
    mean_tokens: float
    max_tokens: int


def make_workload(
    model_dir: Path, *, texts: int, pairs: int, fixed: dict[str, list[int]], sample: int, seed: int = 20240131
) -> Workload:
    """Draw a workload: so many texts and pairs, pairs of given lengths in tokens by name, and samples."""
    vocabulary = read_vocabulary(model_dir)
    rng = np.random.default_rng(seed)
    lengths = draw_lengths(texts, rng)
    fixed_pairs = {}
    for name, given in fixed.items():
        references = make_texts(vocabulary, given, rng)
        fixed_pairs[name] = make_pairs(vocabulary, references, rng, same_length=True)
    sample_lengths = [MIN_TOKENS, MAX_TOKENS, *draw_lengths(sample - 2, rng)]
    sample_texts = make_texts(vocabulary, sample_lengths, rng)
    return Workload(
        texts=make_texts(vocabulary, lengths, rng),
        pairs=make_pairs(vocabulary, make_texts(vocabulary, draw_lengths(pairs, rng), rng), rng),
        fixed_pairs=fixed_pairs,
        sample_texts=sample_texts,
        sample_pairs=make_pairs(vocabulary, sample_texts, rng),
        mean_tokens=sum(lengths) / len(lengths),
        max_tokens=max(lengths),
    )


def chunks(items: Sequence[str], size: int) -> Iterator[list[str]]:
    """Whole chunks of `size`; a rest is left out, so that every request carries the same number of items."""
    for start in range(0, len(items) - size + 1, size):
        yield list(items[start : start + size])


def write_bodies(path: Path, bodies: Iterator[dict[str, Any]]) -> Path:
    """One JSON request body a line; JSON escapes line ends, so a line is a body."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(body) + "\n" for body in bodies)
    return path

"""What a run says: medians, ratios (or why there is none), the machine; as Markdown."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import numpy as np
from contenders import Measurement

# The largest difference between two contenders' answers with which their speeds may be compared. A reduced
# precision has the bound that GPU_DTYPE=auto is held to; bfloat16 asked for by name has a wider one, because
# its eight bits over forty layers differ from float32 by 3e-3 in any implementation, bert-score's included.
EMBED_FLOAT32_MAX_ABS = 1e-4
EMBED_REDUCED_MIN_COSINE = 0.9995
SCORE_BOUNDS = {"float32": 5e-5, "float16": 1e-3, "auto": 1e-3, "bfloat16": 1e-2}

PACKAGES = ("torch", "transformers", "sentence-transformers", "bert-score", "fastapi", "uvicorn", "orjson")
OURS = ("service", "engine")


@dataclass(frozen=True)
class Case:
    """A load: `items` texts or pairs a request, from so many clients; 0 clients means calls in process."""

    name: str
    kind: str  # "embed" or "bertscore"
    items: int
    clients: int
    contenders: tuple[str, ...]
    pool: str = ""  # texts of one length, or evenly spread ones, instead of the pool of the kind

    @property
    def block(self) -> str:
        """Cases of one block share a model and therefore their processes."""
        return "deberta" if self.name.startswith("deberta") else "minilm"

    @property
    def waits(self) -> bool:
        """Whether one caller waits for one item, so that the latency says more than the rate."""
        return self.items == 1 and self.clients <= 1


@dataclass(frozen=True)
class Answers:
    """What a contender answered to the sample, and the precision it was asked to work in."""

    dtype: str
    values: np.ndarray


@dataclass
class Results:
    """Everything a run found out; filled as it goes, so that a run cut short still says what it knows."""

    cases: Sequence[Case]
    rounds: dict[tuple[str, str], list[Measurement]] = field(default_factory=dict)  # case, contender
    answers: dict[tuple[str, str, str], Answers] = field(default_factory=dict)  # block, kind, contender

    def shown(self, case: Case) -> list[str]:
        """The contenders that were measured in a case, in the order of the tables."""
        return [name for name in case.contenders if (case.name, name) in self.rounds]

    def values(self, case: Case, contender: str, measure: str) -> list[float]:
        """A measure's value in each round."""
        return [getattr(one, measure) for one in self.rounds[case.name, contender]]


def compare(kind: str, left: Answers, right: Answers) -> tuple[str, bool]:
    """The difference of two answers to one sample, and whether it is small enough for their precisions."""
    if left.values.shape != right.values.shape:
        return f"shapes {left.values.shape} and {right.values.shape}", False
    measure, value = "max Δ", float(np.abs(left.values - right.values).max())
    bound = EMBED_FLOAT32_MAX_ABS if kind == "embed" else max(SCORE_BOUNDS[side.dtype] for side in (left, right))
    if kind == "embed" and (left.dtype, right.dtype) != ("float32", "float32"):
        norms = np.linalg.norm(left.values, axis=1) * np.linalg.norm(right.values, axis=1)
        cosines = (left.values * right.values).sum(axis=1) / norms
        measure, value, bound = "1 - cosine", float(1 - cosines.min()), 1 - EMBED_REDUCED_MIN_COSINE
    return f"{measure} {value:.1e} (bound {bound:.0e})", value <= bound  # False for NaN, as it should be


def markdown(results: Results, settings: str, gpu: bool) -> str:
    """The whole report, as Markdown that reads well on a terminal too."""
    if not results.rounds:
        return "Nothing was measured.\n"
    header = ("case", "contender", "items/s", "lowest to highest", "p50 ms", "p90 ms", "p99 ms", "failed")
    parts = [f"{machine_line(gpu)} {settings}", table(header, median_rows(results))]
    ratios = ratio_rows(results)
    if ratios:
        parts.append(table(("comparison", "ratio", "over the rounds", "answers differ by"), ratios))
    return "\n\n".join(parts) + "\n"


def median_rows(results: Results) -> list[tuple[str, ...]]:
    """A row for each contender of each case: the medians over the rounds."""
    rows = []
    for case, name in [(one, name) for one in results.cases for name in results.shown(one)]:
        rates = results.values(case, name, "items_per_s")
        latencies = [number(statistics.median(results.values(case, name, f"p{n}_ms"))) for n in (50, 90, 99)]
        spread = f"{number(min(rates))} to {number(max(rates))}"
        failed = f"{sum(results.values(case, name, 'failed')):.0f}"
        rows.append((case.name, name, number(statistics.median(rates)), spread, *latencies, failed))
    return rows


def ratio_rows(results: Results) -> list[tuple[str, ...]]:
    """How many times better each of ours is than each other contender of its case, and HTTP than our own engine."""
    rows = []
    for case in results.cases:
        names = results.shown(case)
        sides = [((case, us), (case, them)) for us in names for them in names if us.startswith(OURS)]
        rows += [ratio_row(results, *pair) for pair in sides if not pair[1][1].startswith(OURS)]
    by_name = {case.name: case for case in results.cases}
    for http in (case for case in results.cases if case.clients and case.items > 1):
        inside = by_name.get(f"{http.kind}-{http.items}")
        for us in results.shown(http) if inside else ():
            engine = us.replace("service", "engine")
            if inside and us.startswith("service") and engine in results.shown(inside):
                rows.append(ratio_row(results, (http, us), (inside, engine)))
    return rows


def ratio_row(results: Results, ours: tuple[Case, str], theirs: tuple[Case, str]) -> tuple[str, ...]:
    """The ratio of the medians and its spread over the rounds; refused where the answers differ too much."""
    (case, us), (other, them) = ours, theirs
    measure = "p50_ms" if case.waits else "items_per_s"
    title = case.name if case is other else f"{case.name} / {other.name}"
    title = f"{title}: {us} / {them}{', p50' if case.waits else ''}"
    left, right = (results.answers[case.block, case.kind, name] for name in (us, them))
    difference, allowed = compare(case.kind, left, right)
    if not allowed:
        return title, "refused", "", difference
    numbers = results.values(case, us, measure), results.values(other, them, measure)
    above, below = reversed(numbers) if case.waits else numbers  # of latencies less is better
    by_round = [a / b for a, b in zip(above, below, strict=False)]  # one may have dropped out
    spread = f"{min(by_round):.2f} to {max(by_round):.2f}"
    return title, f"{statistics.median(above) / statistics.median(below):.2f}", spread, difference


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in padded)


def machine_line(gpu: bool) -> str:
    """What the numbers depend on beside the code."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    device = torch.cuda.get_device_name() if gpu else f"{cpu_model()}, {cores} cores"
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)
    system = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    return f"{device}, {memory_gb:.0f} GB, {system}; {versions}."


def cpu_model() -> str:
    """Name, family and model of the processor: virtual machines often hide all but the last two."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return f"{fields.get('model name')} (family {fields.get('cpu family')}, model {fields.get('model')})"

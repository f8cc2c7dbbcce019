"""What a run says: medians, ratios (or why there is none), the machine, JSON, Markdown and a plot."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from contenders import Measurement

# The largest difference between two contenders' answers with which their speeds may be compared. A reduced
# precision has the bound that GPU_DTYPE=auto is held to; bfloat16 asked for by name has a wider one, because
# its eight bits over forty layers differ from float32 by 3e-3 in any implementation, bert-score's included.
EMBED_FLOAT32_MAX_ABS = 1e-4
EMBED_REDUCED_MIN_COSINE = 0.9995
SCORE_BOUNDS = {"float32": 5e-5, "float16": 1e-3, "auto": 1e-3, "bfloat16": 1e-2}

DISTURBED_SHARE = 0.05  # of the machine, used by others, from which on the report says so

PACKAGES = ("torch", "transformers", "sentence-transformers", "bert-score", "fastapi", "uvicorn", "orjson")

# ------------------------------------------------------------------------------------------------------------
# Answers
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """What a contender answered to the sample, and the precision it was asked to work in."""

    dtype: str
    values: np.ndarray


@dataclass(frozen=True)
class Difference:
    """How far two contenders' answers lie apart, in the measure that has a bound."""

    measure: str
    value: float
    bound: float

    @property
    def allowed(self) -> bool:
        return bool(self.value <= self.bound)  # False for NaN, as it should be

    def __str__(self) -> str:
        return f"{self.measure} {self.value:.1e} (bound {self.bound:.0e})"


def compare(kind: str, left: Answers, right: Answers) -> Difference:
    """The difference of two answers to one sample; the coarser precision of the two sets the bound."""
    reduced = [side.dtype for side in (left, right) if side.dtype != "float32"]
    if left.values.shape != right.values.shape:
        return Difference(f"shapes {left.values.shape} and {right.values.shape},", float("inf"), 0.0)
    if kind != "embed":
        bound = max(SCORE_BOUNDS[dtype] for dtype in (left.dtype, right.dtype))
        return Difference("max Δ", float(np.abs(left.values - right.values).max()), bound)
    if reduced:
        norms = np.linalg.norm(left.values, axis=1) * np.linalg.norm(right.values, axis=1)
        cosines = (left.values * right.values).sum(axis=1) / norms
        return Difference("1 - cosine", float(1 - cosines.min()), 1 - EMBED_REDUCED_MIN_COSINE)
    return Difference("max Δ", float(np.abs(left.values - right.values).max()), EMBED_FLOAT32_MAX_ABS)


# ------------------------------------------------------------------------------------------------------------
# Comparisons
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """A ratio to report: how many times better `ours` is, and the goal it was set."""

    ours: tuple[str, str]  # case, contender
    theirs: tuple[str, str]
    goal: float | None = None
    measure: str = "items_per_s"

    @property
    def title(self) -> str:
        (our_case, us), (their_case, them) = self.ours, self.theirs
        case = our_case if our_case == their_case else f"{our_case} / {their_case}"
        return f"{case}: {us} / {them}" + (", p50" if self.measure == "p50_ms" else "")


@dataclass(frozen=True)
class Mark:
    """An absolute number that a contender is to reach in a case."""

    case: str
    contender: str
    goal: float
    measure: str = "items_per_s"

    @property
    def title(self) -> str:
        return f"{self.case}: {self.contender}, {'p50 in ms' if self.measure == 'p50_ms' else 'items/s'}"


@dataclass
class Results:
    """Everything a run found out; filled as it goes, so that a run cut short still says what it knows."""

    settings: dict[str, Any]
    machine: dict[str, Any]
    kinds: dict[str, str] = field(default_factory=dict)  # case -> sample its answers were checked on
    units: dict[str, str] = field(default_factory=dict)  # case -> "texts" or "pairs"
    order: list[tuple[str, str]] = field(default_factory=list)  # case, contender, as they are to be shown
    rounds: dict[tuple[str, str], list[Measurement]] = field(default_factory=dict)
    answers: dict[tuple[str, str], Answers] = field(default_factory=dict)  # sample, contender
    missing: dict[str, str] = field(default_factory=dict)  # contender -> why it is not here
    descriptions: dict[str, dict[str, Any]] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)  # case -> items/s that the arithmetic allows

    def shown(self) -> list[tuple[str, str]]:
        """The measured (case, contender), in the order of the tables."""
        return [key for key in self.order if key in self.rounds]

    def median(self, case: str, contender: str, measure: str) -> float:
        values: list[float] = [getattr(one, measure) for one in self.rounds[case, contender]]
        return statistics.median(values)

    def difference(self, ours: tuple[str, str], theirs: tuple[str, str]) -> Difference:
        sample = self.kinds[ours[0]]
        left, right = self.answers[sample, ours[1]], self.answers[sample, theirs[1]]
        return compare("embed" if sample.endswith("embed") else "bertscore", left, right)


def ratio(results: Results, comparison: Comparison) -> dict[str, Any] | None:
    """The ratio of the medians and its spread over the rounds; refused where the answers differ too much."""
    sides = (comparison.ours, comparison.theirs)
    if any(side not in results.rounds for side in sides):
        return None
    entry: dict[str, Any] = {"title": comparison.title, "goal": comparison.goal}
    difference = results.difference(*sides)
    entry["difference"] = str(difference)
    if not difference.allowed:
        return {**entry, "refused": f"answers differ by {difference}"}
    ours, theirs = ([getattr(one, comparison.measure) for one in results.rounds[side]] for side in sides)
    if comparison.measure == "p50_ms":
        ours, theirs = theirs, ours  # less is better
    by_round = [our / their for our, their in zip(ours, theirs, strict=False)]  # one may have dropped out
    entry["ratio"] = statistics.median(ours) / statistics.median(theirs)
    entry["lowest"], entry["highest"] = min(by_round), max(by_round)
    return entry


def mark(results: Results, wanted: Mark) -> dict[str, Any] | None:
    """An absolute number beside its goal, and beside the arithmetic limit where there is one."""
    if (wanted.case, wanted.contender) not in results.rounds:
        return None
    value = results.median(wanted.case, wanted.contender, wanted.measure)
    entry: dict[str, Any] = {"title": wanted.title, "value": value, "goal": wanted.goal}
    entry["reached"] = value <= wanted.goal if wanted.measure == "p50_ms" else value >= wanted.goal
    if wanted.measure == "items_per_s" and wanted.case in results.limits:
        entry["share_of_limit"] = value / results.limits[wanted.case]
    return entry


# ------------------------------------------------------------------------------------------------------------
# Tables
# ------------------------------------------------------------------------------------------------------------


def markdown(results: Results, comparisons: Sequence[Comparison], marks: Sequence[Mark]) -> str:
    """The whole report, as Markdown that reads well on a terminal too."""
    parts = [machine_line(results), table(MEDIAN_HEADER, median_rows(results))]
    ratios = [entry for entry in (ratio(results, comparison) for comparison in comparisons) if entry]
    if ratios:
        parts.append(table(RATIO_HEADER, [ratio_row(entry) for entry in ratios]))
    reached = [entry for entry in (mark(results, wanted) for wanted in marks) if entry]
    if reached:
        parts.append(table(MARK_HEADER, [mark_row(entry) for entry in reached]))
    parts += [f"Not measured: {name}: {reason}" for name, reason in results.missing.items()]
    others = [one.others_share for rounds in results.rounds.values() for one in rounds]
    if others and max(others) > DISTURBED_SHARE:
        parts.append(
            f"Disturbed: other processes used {statistics.mean(others):.0%} of this machine on average, and up "
            f"to {max(others):.0%}, while it was measured. Such numbers say little."
        )
    return "\n\n".join(parts) + "\n"


MEDIAN_HEADER = ("case", "contender", "items/s", "lowest to highest", "p50 ms", "p90 ms", "p99 ms", "failed")
RATIO_HEADER = ("comparison", "ratio", "over the rounds", "goal", "answers differ by")
MARK_HEADER = ("number", "value", "goal", "of the arithmetic limit")


def median_rows(results: Results) -> list[tuple[str, ...]]:
    rows = []
    for case, contender in results.shown():
        rounds = results.rounds[case, contender]
        rates = [one.items_per_s for one in rounds]
        latencies = [results.median(case, contender, key) for key in ("p50_ms", "p90_ms", "p99_ms")]
        rows.append(
            (
                case,
                contender,
                number(statistics.median(rates)),
                f"{number(min(rates))} to {number(max(rates))}",
                *map(number, latencies),
                str(sum(one.failed for one in rounds)),
            )
        )
    return rows


def ratio_row(entry: dict[str, Any]) -> tuple[str, ...]:
    if "refused" in entry:
        return entry["title"], f"refused: {entry['refused']}", "", goal_text(entry["goal"], None), ""
    spread = f"{entry['lowest']:.2f} to {entry['highest']:.2f}"
    goal = goal_text(entry["goal"], entry["ratio"])
    return entry["title"], f"{entry['ratio']:.2f}", spread, goal, entry["difference"]


def mark_row(entry: dict[str, Any]) -> tuple[str, ...]:
    share = f"{entry['share_of_limit']:.0%}" if "share_of_limit" in entry else ""
    verdict = "reached" if entry["reached"] else "missed"
    return entry["title"], number(entry["value"]), f"{number(entry['goal'])}, {verdict}", share


def goal_text(goal: float | None, value: float | None) -> str:
    if goal is None:
        return ""
    if value is None:
        return f"{goal:g}"
    return f"{goal:g}, reached" if value >= goal else f"{goal:g}, short by {1 - value / goal:.0%}"


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in padded)


def machine_line(results: Results) -> str:
    machine, settings = results.machine, results.settings
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    device = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores"
    return (
        f"{device}, {machine['memory_gb']:.0f} GB, {machine['system']}, Python {machine['python']}; "
        f"{versions}. "
        f"{settings['rounds']} rounds of {settings['seconds']:g} s each. `{settings['command']}`"
    )


# ------------------------------------------------------------------------------------------------------------
# The machine
# ------------------------------------------------------------------------------------------------------------


def describe_machine(gpu: bool) -> dict[str, Any]:
    """What the numbers depend on beside the code."""
    affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return {
        "cpu": cpu_model(),
        "cores": len(affinity),
        "cgroup_cpu_max": read_text("/sys/fs/cgroup/cpu.max"),
        "memory_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        "gpu": gpu_name() if gpu else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": installed_versions(),
    }


def cpu_model() -> str:
    """Name, family and model of the processor: virtual machines often hide all but the last two."""
    fields: dict[str, str] = {}
    for line in (read_text("/proc/cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    if "model name" not in fields:
        return platform.processor() or platform.machine()
    return f"{fields['model name']} (family {fields.get('cpu family')}, model {fields.get('model')})"


def gpu_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"


def installed_versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def read_text(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return None


# ------------------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------------------


def write_json(path: Path, results: Results, comparisons: Sequence[Comparison], marks: Sequence[Mark]) -> None:
    """Every measurement of every round, and what was concluded from them."""
    report = {
        "settings": results.settings,
        "machine": results.machine,
        "contenders": results.descriptions,
        "missing": results.missing,
        "limits_items_per_s": results.limits,
        "rounds": [
            {"case": case, "contender": contender, "unit": results.units[case], **asdict(one), "round": index}
            for (case, contender), rounds in results.rounds.items()
            for index, one in enumerate(rounds)
        ],
        "ratios": [entry for entry in (ratio(results, one) for one in comparisons) if entry],
        "marks": [entry for entry in (mark(results, one) for one in marks) if entry],
    }
    path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_plot(path: Path, results: Results) -> str:
    """A panel for each case, a bar for each contender; returns a line that says what happened."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return "No plot: matplotlib is not installed (pip install matplotlib)."
    cases = list(dict.fromkeys(case for case, _ in results.shown()))
    columns = min(3, len(cases))
    figure, axes = pyplot.subplots(
        -(-len(cases) // columns),
        columns,
        figsize=(5.2 * columns, 2.2 * -(-len(cases) // columns)),
        squeeze=False,
        layout="constrained",
    )
    for axis, case in zip(axes.flat, cases, strict=False):  # the last row may be longer than its cases
        draw_case(axis, results, case)
    for axis in axes.flat[len(cases) :]:
        axis.set_visible(False)
    figure.suptitle(machine_title(results.machine), fontsize=9)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return f"Plot: {path}"


def draw_case(axis: Any, results: Results, case: str) -> None:
    """Median rate of each contender in one case; the latency instead where one client waits for one item."""
    contenders = [contender for measured, contender in results.shown() if measured == case]
    waits = case.endswith("1x1")
    measure, label = ("p50_ms", "p50, ms") if waits else ("items_per_s", f"{results.units[case]}/s")
    values = [results.median(case, contender, measure) for contender in contenders]
    colours = ["#1b7f5c" if name.startswith(("service", "engine")) else "#9aa0a6" for name in contenders]
    bars = axis.barh(contenders, values, color=colours)
    axis.bar_label(bars, [number(value) for value in values], padding=3, fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.18)
    axis.set_title(f"{case} ({label})", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def machine_title(machine: dict[str, Any]) -> str:
    device = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores"
    return f"{device}, torch {machine['versions']['torch']}"

"""What the engines of tokens share: calibration, the choice of a precision, lanes, the float32 retry."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from gpu_engine.device import is_fatal, is_out_of_memory
from gpu_engine.fast_encoder import runs_prepacked
from gpu_engine.model_files import ModelName
from gpu_engine.token_model import TokenModel
from gpu_engine.tokenizing import TextTokenizer
from gpu_engine.work import Item, NotFinite

log = logging.getLogger(__name__)
T = TypeVar("T")


class TokenEngine:
    """What the two engines share: a token model, its check at load, and the float32 retry."""

    kind = ""

    def __init__(self, tokens: TokenModel, tokenize: TextTokenizer) -> None:
        self.tokens, self.tokenize = tokens, tokenize
        self.float32_retries = 0
        self.short = Faster()  # of all threads and one, for a single short text
        self.bounds: dict[str, float] = {}  # of the deviation, by measure
        self.measured: dict[str, float] = {}  # the deviation of the type that was tried
        self.demanded = True  # GPU_DTYPE names the type: it serves whatever its deviation is

    def compute(self, items: Sequence[Item], dtype: torch.dtype | None = None) -> list[Any]:
        """One output an item, of one variant; None where the model's numbers were not finite. dtype: what serves."""
        raise NotImplementedError

    def compute_finite(self, items: Sequence[Item], dtype: torch.dtype) -> list[Any]:
        """`compute` for a check. Raises NotFinite where an output is None."""
        outputs = self.compute(items, dtype)
        if any(output is None for output in outputs):
            raise NotFinite(f"not finite in {dtype}")
        return outputs

    def deviation(self, dtype: torch.dtype) -> dict[str, float]:
        """Worst differences between `dtype` and float32 on the calibration texts."""
        raise NotImplementedError

    def run(self, items: Sequence[Item]) -> list[Any]:
        """Outputs in order. What is not finite is computed once more in float32, then given up."""
        outputs = self._compute_in_lanes(items)
        bad = [index for index, output in enumerate(outputs) if output is None]
        if bad and self.tokens.dtype != torch.float32:
            self.float32_retries += len(bad)
            for index, output in zip(bad, self.compute([items[index] for index in bad], torch.float32)):
                outputs[index] = output
        return [NotFinite("the model gave no finite numbers") if output is None else output for output in outputs]

    def _compute_in_lanes(self, items: Sequence[Item]) -> list[Any]:
        """`compute` with the batch dealt out to the cores, one thread each; on a GPU and for one long text whole.

        Two single-threaded halves finish sooner than one batch on two OpenMP threads, which meet at a barrier
        after every operator (1.2 to 1.3 times the texts a second on two cores). A single short text is finished up to
        1.6 times as soon by two threads while both cores are free, and later than by one while they are not.
        """
        lanes = self.tokens.lanes
        if lanes is None or (len(items) == 1 and items[0].cost > 64):
            return self.compute(items)
        if len(items) == 1:
            ways = (lambda: self.compute(items), lambda: next(lanes.map(self.compute, [items])))
            return self.short.run(ways, items[0].cost)
        shards = deal_out([item.cost for item in items], self.tokens.lane_count)
        outputs: list[Any] = [None] * len(items)
        for shard, done in zip(shards, lanes.map(self.compute, [[items[i] for i in shard] for shard in shards])):
            for index, output in zip(shard, done):
                outputs[index] = output
        return outputs

    def release_memory(self) -> None:
        """Frees the CUDA graphs and the float32 fallback."""
        self.tokens.release()

    def choose_precision(self, wanted: str, fast: torch.dtype | None, bounds: dict[str, float]) -> str:
        """Serves in `fast` if each of its deviations from float32 is inside its bound, else in float32.

        wanted: GPU_DTYPE. A type that it names, not "auto", serves wherever it runs at all; its deviation is
        measured and shown all the same. Returns what serves and why, in one line.
        """
        self.bounds, self.demanded = bounds, wanted != "auto"
        candidate = getattr(torch, wanted) if self.demanded else fast
        if candidate is None:
            chosen, why = torch.float32, "no bfloat16 in this processor"
        elif candidate == torch.float32:
            chosen, why = candidate, "as GPU_DTYPE asks"
        else:
            chosen, why = self._judge(candidate)
        self.tokens.use(chosen)
        return f"{type_name(chosen)}: {why}"

    def _judge(self, reduced: torch.dtype) -> tuple[torch.dtype, str]:
        """`reduced` or float32, and why."""
        try:
            deviation = self.measured = self.deviation(reduced)
        except RuntimeError as error:
            if is_fatal(error):
                raise
            if self.demanded and (isinstance(error, NotFinite) or is_out_of_memory(error)):  # for some texts, or now
                return reduced, f"as GPU_DTYPE asks; not measured ({error})"
            return torch.float32, f"{type_name(reduced)} does not run here ({error})"
        worst = max(deviation, key=lambda name: deviation[name] - self.bounds[name])
        seen, bound = (f"{value:.1e}".replace("e-0", "e-") for value in (deviation[worst], self.bounds[worst]))
        if self.demanded:
            return reduced, f"as GPU_DTYPE asks; deviates {seen} at most"
        if self.within_bounds(deviation):
            return reduced, f"deviates {seen} at most, bound {bound}"
        return torch.float32, f"{type_name(reduced)} deviates {seen}, bound {bound}"

    def within_bounds(self, deviation: dict[str, float]) -> bool:
        """Whether every deviation was measured and is inside its bound."""
        return all(deviation.get(name, math.inf) <= bound for name, bound in self.bounds.items())

    def describe(self) -> dict[str, Any]:
        """Precision chosen and measured, layers, backend."""
        return {
            "dtype": type_name(self.tokens.dtype),
            "deviation": {name: round(value, 7) for name, value in self.measured.items()},
            "layers": self.tokens.layers,
            "backend": self.tokens.backend,
            "max_tokens": self.tokenize.max_tokens,
            "float32_retries": self.float32_retries,
        }


class Faster:
    """Takes the faster of two ways to the same result, and the other one now and then to see whether it still is."""

    EVERY = 32  # uses between two trials of the slower way
    START = 12  # tokens that cost as much as what every text costs

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock, self.uses = clock, 0
        self.costs = [0.0, 0.0]  # seconds a token of each way, smoothed; 0 until it was used

    def run(self, ways: Sequence[Callable[[], T]], tokens: int) -> T:
        """The result of one of the two."""
        self.uses += 1
        way = self.costs.index(min(self.costs))
        if self.uses % self.EVERY == 0:
            way = 1 - way
        began = self.clock()
        result = ways[way]()
        cost = (self.clock() - began) / (tokens + self.START)
        self.costs[way] += (cost - self.costs[way]) * (0.25 if self.costs[way] else 1.0)
        return result


def deal_out(costs: Sequence[int], lanes: int) -> list[list[int]]:
    """Indexes of `costs` in up to `lanes` shares of about equal work; equal costs stay together where they can.

    Texts of one length share an attention call; a token of a long text costs more, by its attention.
    """
    shares: list[list[int]] = [[] for _ in range(lanes)]
    loads = [0.0] * lanes
    by_cost: dict[int, list[int]] = {}
    for index, cost in enumerate(costs):
        by_cost.setdefault(cost, []).append(index)
    for cost, equal in sorted(by_cost.items(), reverse=True):
        whole = len(equal) * cost <= sum(costs) / (4 * lanes)
        for part in [equal] if whole else [[index] for index in equal]:
            lane = loads.index(min(loads))
            shares[lane] += part
            loads[lane] += len(part) * cost * (1 + cost / 1000)
    return [share for share in shares if share]


def type_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def fast_dtype(device: torch.device) -> torch.dtype | None:
    """The reduced type worth trying: float16 on a GPU, bfloat16 on a CPU that multiplies it in hardware."""
    if device.type == "cuda":
        return torch.float16
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    native = any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
    return torch.bfloat16 if native and runs_prepacked(torch.bfloat16) else None


def settle_precision(
    engine: TokenEngine, name: ModelName, device: torch.device, dtype: str, bounds: dict[str, float]
) -> None:
    """Chooses an engine's precision as GPU_DTYPE (`dtype`) says, and logs in one line what serves and why."""
    why = engine.choose_precision(dtype, fast_dtype(device), bounds)
    as_asked = dtype in ("auto", type_name(engine.tokens.dtype))
    log.log(logging.INFO if as_asked else logging.WARNING, "%s:%s: %s", engine.kind, name.public, why)

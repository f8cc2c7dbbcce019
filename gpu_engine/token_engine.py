"""What the engines of tokens share: calibration, the choice of a precision, lanes, the float32 retry."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from gpu_engine.device import is_fatal, is_out_of_memory
from gpu_engine.fast_encoder import runs_prepacked
from gpu_engine.model_files import ModelName
from gpu_engine.token_model import CALIBRATION_TEXTS, TokenModel
from gpu_engine.tokenizing import TextTokenizer
from gpu_engine.work import NotFinite, Outputs

log = logging.getLogger(__name__)
T = TypeVar("T")

SLOW = (
    "A GPU is several times slower in float32, data-centre cards ten times and more: "
    "a larger GPU_DTYPE_BOUND, or GPU_DTYPE=float16, serves float16 all the same."
)


class Unusable:
    """Outputs none of which is finite."""

    def __init__(self, count: int) -> None:
        self.count = count

    def bad(self) -> Sequence[int]:
        """All places."""
        return range(self.count)

    def nbytes(self, place: int) -> int:
        """Nothing."""
        return 0

    def keep(self, place: int) -> Any:
        """Nothing is kept of them."""
        raise NotFinite("there is no output")


class TokenEngine:
    """What the two engines share: a token model, its check at load, and the float32 retry."""

    kind = ""

    def __init__(self, tokens: TokenModel, tokenize: TextTokenizer) -> None:
        self.tokens, self.tokenize = tokens, tokenize
        self.default_layers, self.default_variant = tokens.layers, 0  # of items that a request says no more of
        self.float32_retries = 0
        self.short = Faster()  # of all threads and one, for a single short text
        self.bounds: dict[str, float] = {}  # of the deviation, by measure
        self.measured: dict[str, float] = {}  # the deviation of the type that was tried
        self.warning = ""  # for operators, of a precision that costs them speed
        self.demanded = True  # GPU_DTYPE names the type: it serves whatever its deviation is

    def compute(self, ids: Sequence[np.ndarray], variant: int, dtype: torch.dtype | None = None) -> Outputs:
        """Outputs of texts, each (tokens,) int32, in order. dtype: what serves."""
        raise NotImplementedError

    def compute_finite(self, ids: Sequence[np.ndarray], variant: int, dtype: torch.dtype) -> Any:
        """`compute` for a check. Raises NotFinite."""
        outputs = self.compute(ids, variant, dtype)
        if outputs.bad():
            raise NotFinite(f"not finite in {dtype}")
        return outputs

    def join(self, outputs: Sequence[Any], order: Sequence[int]) -> Outputs:
        """Outputs of several batches as one. order: for each text, its place in all of them, one after another."""
        raise NotImplementedError

    def deviation(self, dtype: torch.dtype) -> dict[str, float]:
        """Worst differences between `dtype` and float32 on the calibration texts."""
        raise NotImplementedError

    def run(self, texts: Sequence[np.ndarray], variant: int) -> Outputs:
        """Outputs in order, the batch dealt out to the cores, one thread each; on a GPU and for one long text whole.

        Two single-threaded halves finish sooner than one batch on two OpenMP threads, which meet at a barrier
        after every operator (1.2 to 1.3 times the texts a second on two cores). A single short text is finished up to
        1.6 times as soon by two threads while both cores are free, and later than by one while they are not.
        """
        lanes = self.tokens.lanes
        if lanes is None or (len(texts) == 1 and len(texts[0]) > 64):
            return self.compute(texts, variant)
        if len(texts) == 1:
            ways = (lambda: self.compute(texts, variant), lambda: next(lanes.map(self.compute, [texts], [variant])))
            return self.short.run(ways, len(texts[0]))
        shards = deal_out([len(text) for text in texts], self.tokens.lane_count)
        shares = [[texts[index] for index in shard] for shard in shards]
        outputs = list(lanes.map(self.compute, shares, [variant] * len(shares)))
        place_of = {index: place for place, index in enumerate(index for shard in shards for index in shard)}
        return self.join(outputs, [place_of[index] for index in range(len(texts))])

    def retry(self, texts: Sequence[np.ndarray], variant: int) -> Outputs:
        """What was not finite in float32 either stays so."""
        if self.tokens.dtype == torch.float32:
            return Unusable(len(texts))
        self.float32_retries += len(texts)
        return self.compute(texts, variant, torch.float32)

    def warm_up(self, batch_tokens: int) -> Iterator[bool]:
        """An engine's first steps, for the device thread, before any request: a batch, then CUDA graphs.

        batch_tokens: the most that a batch will have. True after each step.
        """
        texts, _ = self.tokenize(CALIBRATION_TEXTS[:4])
        try:
            self.run(texts, self.default_variant).bad()  # it waits for the device
        except RuntimeError as error:
            if not is_out_of_memory(error):  # requests get over that: the worker frees memory for them
                raise
        yield True
        yield from self.tokens.capture(batch_tokens, self.default_layers, np.concatenate(texts))

    def release_memory(self) -> None:
        """Frees the CUDA graphs and the float32 fallback."""
        self.tokens.release()

    def take_padding(self) -> int:
        """Rows without a token, of all passes since it was last asked. Device thread."""
        rows, passes = 0, self.tokens.padding
        while passes:
            rows += passes.popleft()
        return rows

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
        except Exception as error:  # of a module's own code too, in a type that nobody tried it in
            if is_fatal(error):
                raise
            if self.demanded and isinstance(error, (NotFinite, torch.OutOfMemoryError)):  # for some texts, or now
                return reduced, f"as GPU_DTYPE asks; not measured ({error})"
            if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
                raise  # float32 would need more still
            return torch.float32, f"{type_name(reduced)} does not run here ({error})"
        worst = max(deviation, key=lambda name: deviation[name] - self.bounds[name])
        shown = f"{deviation[worst]:.2e} {self.bounds[worst]:.1e}"  # a digit more: it may be just over its bound
        seen, bound = shown.replace("e-0", "e-").split()
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
            **({"warning": self.warning} if self.warning else {}),
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
    if dtype == "auto" and device.type == "cuda" and engine.tokens.dtype == torch.float32:
        engine.warning = f"{why}. {SLOW}"
    as_asked = dtype in ("auto", type_name(engine.tokens.dtype)) and not engine.warning
    level = logging.INFO if as_asked else logging.WARNING
    log.log(level, "%s:%s: %s", engine.kind, name.public, engine.warning or why)

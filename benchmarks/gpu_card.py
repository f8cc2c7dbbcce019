"""What the checks of gpu_report.py share: what a check is, the card, its models, and an engine behind its worker."""

from __future__ import annotations

import functools
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reference import DEBERTA_XLARGE_SHAPE, quiet_libraries
from torch import Tensor
from workload import Texts

from gpu_engine.bertscore import MEASURES, Baselines, BertScoreEngine
from gpu_engine.device import available_cores, bind_thread, default_batch_tokens, detect_device, settle_backends
from gpu_engine.loading import EngineLoader
from gpu_engine.model_files import Hub, configured_model, find_model
from gpu_engine.process import Step
from gpu_engine.token_model import CALIBRATION_TEXTS, TokenModel
from gpu_engine.tokenizing import TextTokenizer
from gpu_engine.work import LoadOptions
from gpu_engine.worker import DeviceWorker

MINILM = "all-MiniLM-L6-v2"
HALF_BOUND = 3e-2  # of a row that two forwards in float16 gave, whose sums have another order
Numbers = dict[str, Any]


class Missed(Exception):
    """A bound was not kept; the numbers are kept all the same."""

    def __init__(self, why: str, numbers: Numbers) -> None:
        super().__init__(why)
        self.numbers = numbers


class NotHere(Exception):
    """What a check is of needs another device, or something that is not installed; the message says what."""


@dataclass(frozen=True)
class Check:
    """A check, the section it belongs to, and the seconds that it may take at most."""

    section: int
    name: str
    run: Callable[[Card], Numbers]
    seconds: float = 30.0
    gpu: bool = True  # it means nothing on a CPU


class Card:
    """What the checks of one process share: the device, how large things are, and models made on first use.

    quick: everything tiny. folder: where models may be written.
    """

    def __init__(self, device: str, quick: bool, folder: Path) -> None:
        self.device, self.quick, self.folder = detect_device(device), quick, folder
        self.on_gpu = self.device.type == "cuda"
        bind_thread(self.device, available_cores())
        self.backends = settle_backends(self.device)
        self.fast = torch.float16 if self.on_gpu else torch.float32  # what serves
        self.batch_tokens = default_batch_tokens(self.device)
        self.load_steps: dict[str, Numbers] = {}  # of the large model
        self.random = np.random.default_rng(7)
        quiet_libraries()

    def size(self, whole: int, quick: int) -> int:
        """The first, or the second in a quick run."""
        return quick if self.quick else whole

    def wait(self) -> None:
        """Returns when the device has nothing left to do."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def empty_cache(self) -> None:
        """Gives memory that nothing uses back to the device."""
        if self.on_gpu:
            torch.cuda.empty_cache()

    def memory_mb(self) -> Numbers:
        """Allocated now, the most since the last look, and used by all processes, in MiB; nothing on a CPU."""
        if not self.on_gpu:
            return {}
        free, total = torch.cuda.mem_get_info(self.device)
        most = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        found = {"allocated": torch.cuda.memory_allocated(self.device), "peak": most, "used": total - free}
        return {f"{name} MB": value >> 20 for name, value in found.items()}

    def seconds(self, call: Callable[[], Any], window_s: float = 0.4) -> float:
        """Median seconds of a call and the device's work for it, after one that is not counted."""
        call()
        self.wait()
        taken: list[float] = []
        while len(taken) < 3 or sum(taken) < (0.02 if self.quick else window_s):
            began = time.perf_counter()
            call()
            self.wait()
            taken.append(time.perf_counter() - began)
        return statistics.median(taken)

    @functools.cached_property
    def minilm(self) -> Path:
        """The folder of the embedded model."""
        return find_model("embed", configured_model(MINILM), Hub(), lambda *_: None)

    @functools.cached_property
    def texts(self) -> Texts:
        """Texts of any length in tokens of MiniLM's vocabulary."""
        return Texts(self.minilm)

    def pairs(self, count: int, tokens: int) -> list[tuple[str, str]]:
        """Pairs of two texts of so many tokens."""
        return self.texts.pairs(self.texts.draw([tokens] * count), same_length=True)

    def ids(self, lengths: Sequence[int]) -> list[np.ndarray]:
        """Token ids of texts of these lengths, drawn from MiniLM's ordinary words."""
        return [self.random.integers(1996, 29_000, length).astype(np.int32) for length in lengths]

    def load(self, kind: str) -> Any:
        """MiniLM's engine, loaded as the service loads it, in what serves here."""
        options = LoadOptions(str(self.fast).removeprefix("torch."))
        return EngineLoader(self.device, Hub()).load(kind, configured_model(MINILM), options, lambda *_: None)

    @functools.cached_property
    def embedder(self) -> Any:
        """MiniLM's engine of embeddings."""
        return self.load("embed")

    @functools.cached_property
    def xlarge(self) -> BertScoreEngine:
        """deberta-xlarge-mnli's shape, with random weights, loaded as a real one from the host's memory."""
        from transformers import AutoTokenizer

        return self.token_engine(self.xlarge_module, AutoTokenizer.from_pretrained(str(self.minilm)))

    @functools.cached_property
    def xlarge_module(self) -> Any:
        """transformers' module of that shape, made on the device."""
        from transformers import DebertaConfig, DebertaModel

        shape = {**DEBERTA_XLARGE_SHAPE, **(QUICK_SHAPE if self.quick else {})}
        with torch.device(self.device):
            torch.manual_seed(0)
            module = DebertaModel(DebertaConfig(**shape, num_hidden_layers=self.size(40, 2)))
            for name, parameter in module.named_parameters():
                if name.endswith("bias"):  # zeros would hide a mistake in folding them
                    parameter.data.normal_(0.0, 0.02)
        return module.eval()

    def token_engine(self, module: Any, tokenizer: Any) -> BertScoreEngine:
        """A BERTScore engine of a module with MiniLM's tokenizer, in what serves; notes what each step took."""
        began = time.perf_counter()

        def step(name: str) -> None:
            self.wait()
            self.load_steps[name] = {"s": time.perf_counter() - began, **self.memory_mb()}

        step("made on the device")
        module.to("cpu")
        self.empty_cache()
        step("on the host")
        tokens = TokenModel(module, tokenizer.pad_token_id, self.device)
        baselines = Baselines(Path(), None, "random weights")
        engine = BertScoreEngine(tokens, TextTokenizer(tokenizer, 512), tokens.layers, baselines)
        tokens.verify(engine.encode_texts(CALIBRATION_TEXTS)[0], tokens.layers)
        step("float32, compared with transformers")
        engine.choose_precision(str(self.fast).removeprefix("torch."), None, dict.fromkeys(MEASURES, 1e-3))
        step("in what serves")
        return engine


# deberta-xlarge-mnli's shape, small
QUICK_SHAPE = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}


class Served:
    """An engine behind a device worker, as the service has it, its caches off."""

    def __init__(self, card: Card, engine: Any, in_flight: int | None = None, batch_tokens: int = 0) -> None:
        self.engine, self.broken = engine, list[str]()
        tokens = batch_tokens or card.batch_tokens
        self.worker = DeviceWorker(card.device, tokens, 0, self.broken.append, lambda: None, in_flight=in_flight)
        self.worker.start()

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self.worker.stop(30)

    def __call__(self, tasks: Sequence[Any]) -> list[Any]:
        """Results of tasks that are submitted together."""
        return self.finish([self.engine.prepare(task) for task in tasks])

    def warm_up(self, batch_tokens: int, most_s: float) -> None:
        """Lets the engine take its first steps, on the device thread."""
        steps, until = self.engine.warm_up(batch_tokens), time.monotonic() + most_s
        while time.monotonic() < until and self.finish([Step(lambda: next(steps, False))])[0]:
            pass

    def finish(self, works: Sequence[Any]) -> list[Any]:
        """Results of works. Raises the error of the first that failed."""
        ended, all_ended = dict[Any, Any](), threading.Event()

        def end(submission: Any, result: Any, error: BaseException | None) -> None:
            ended[submission.work] = error or result
            if len(ended) == len(works):
                all_ended.set()

        for work in works:
            self.worker.submit(self.engine, work, end)
        all_ended.wait()
        failed = next((each for each in ended.values() if isinstance(each, BaseException)), None)
        if failed is not None:
            raise failed
        return [ended[work] for work in works]


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference of a row, as a share of the row; NaN where a number is none."""
    return float((found - expected).norm(dim=-1).div(expected.norm(dim=-1)).max())


def within(numbers: Numbers, value: float, bound: float) -> Numbers:
    """The numbers, if the value keeps the bound. Raises Missed."""
    if not value <= bound:
        raise Missed(f"{value:.1e} is above the bound {bound:.0e}", numbers)
    return numbers

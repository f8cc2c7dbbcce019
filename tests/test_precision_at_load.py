"""GPU_DTYPE=auto measures at load, at every layer and on long texts, and says what it costs where float32 stays."""

from __future__ import annotations

import logging
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from conftest import FakeEngine, load_folder, running, settings
from test_numerics_bertscore import load, rows, score
from test_precision import BOUNDS, WIDE, engine_of, overflowing

from gpu_engine.bertscore import BertScoreEngine
from gpu_engine.embedding import EmbedEngine
from gpu_engine.fast_encoder import FastEncoder
from gpu_engine.model_files import configured_model
from gpu_engine.token_engine import settle_precision
from gpu_engine.work import NotFinite

pytestmark = pytest.mark.anyio
PAIR = (["the cat sat"], ["a dog ran"])
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FAMILIES = ["bert", "roberta", "deberta", "distilbert", "mpnet", "albert", "t5", "deberta-v2"]


def saved(family: str, folder: Path) -> Path:
    own = {"bert": tiny_models.save_bert, "roberta": tiny_models.save_roberta, "deberta": tiny_models.save_deberta}
    return own[family](folder) if family in own else tiny_models.save_other(folder, family)


class Uneven(BertScoreEngine):
    """An engine to which the tried type is too coarse at its second layer; it counts how often it measured."""

    measured_times = 0

    def deviation(self, dtype: torch.dtype) -> dict[str, float]:
        self.measured_times += 1
        found = super().deviation(dtype)
        self.deviations[2] = dict.fromkeys(found, 9.0)
        return found


# --- every layer ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_layer_by_layer_gives_what_a_forward_of_as_many_layers_gives(family: str, tmp_path: Path) -> None:
    tokens = load(saved(family, tmp_path / "model")).tokens
    ids = [np.arange(5, 5 + length, dtype=np.int32) for length in (9, 3, 9, 40)]

    def states(layers: int) -> list[torch.Tensor]:
        found = dict.fromkeys(range(len(ids)), torch.empty(0))
        for block in tokens.blocks(ids, layers):
            for index, hidden, length in zip(block.indexes, block.hidden, block.lengths):
                found[index] = hidden[:length].clone()
        return list(found.values())

    every = range(tokens.first_layer, tokens.layers + 1)
    expected = {layers: states(layers) for layers in every}
    with tokens.layer_by_layer(torch.float32):
        for layers in [*every, tokens.layers, every[0], 3]:
            for found, exact in zip(states(layers), expected[layers]):
                torch.testing.assert_close(found, exact, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(states(3)[0], expected[3][0])


def test_measuring_every_layer_computes_each_once_in_either_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(tiny_models.save_bert(tmp_path / "model"))
    computed: list[int] = []
    forward = FastEncoder.__call__
    monkeypatch.setattr(FastEncoder, "__call__", lambda self, batch, n: computed.append(n) or forward(self, batch, n))
    engine.choose_precision("auto", torch.bfloat16, WIDE)
    assert sum(computed) == 2 * engine.tokens.layers


def test_a_layer_that_the_faster_type_is_too_coarse_for_is_served_in_float32_and_nothing_is_measured_again(
    tmp_path: Path,
) -> None:
    engine = engine_of(tiny_models.save_bert(tmp_path / "model"), Uneven)
    assert isinstance(engine, Uneven)
    why = engine.choose_precision("auto", torch.bfloat16, WIDE)
    assert why.endswith("; float32 where a request names layer 2")
    assert engine.describe()["float32_layers"] == [2]
    assert sorted(engine.deviations) == [0, 1, 2, 3, 4]
    exact = load(tmp_path / "model")
    for layers in (1, 2, 3, 4):
        off = np.abs(rows(score(engine, *PAIR, layers=layers)) - rows(score(exact, *PAIR, layers=layers))).max()
        assert off < 1e-6 if layers == 2 else 1e-6 < off < 0.1, layers
    assert engine.measured_times == 1


def test_a_layer_whose_numbers_overflow_costs_no_other_layer_the_faster_type(tmp_path: Path) -> None:
    folder = overflowing(tmp_path / "model")  # in its first layer
    engine = engine_of(folder)
    engine.default_layers = engine.default_variant = 0
    engine.choose_precision("auto", torch.float16, WIDE)
    assert engine.describe()["dtype"] == "float16"
    assert engine.describe()["float32_layers"] == [1, 2, 3, 4]
    exact = rows(score(load(folder), *PAIR, layers=2))
    np.testing.assert_allclose(rows(score(engine, *PAIR, layers=2)), exact, atol=1e-6)


def test_a_type_that_is_demanded_is_measured_at_the_default_layer_alone(tmp_path: Path) -> None:
    engine = engine_of(tiny_models.save_bert(tmp_path / "model"))
    engine.choose_precision("bfloat16", None, BOUNDS)
    assert list(engine.deviations) == [3]
    assert engine.describe()["float32_layers"] == []


def test_a_type_is_judged_by_a_text_that_every_model_cuts_too(tmp_path: Path) -> None:
    engine = engine_of(tiny_models.save_bert(tmp_path / "model"))
    computed: list[int] = []
    compute = engine.compute
    engine.compute = lambda items, *more: computed.extend(map(len, items)) or compute(items, *more)  # type: ignore[method-assign]
    engine.deviation(torch.bfloat16)
    assert max(computed) == 512
    embed = load_folder("embed", tmp_path / "model", dtype="bfloat16")
    computed, again = [], embed.compute
    embed.compute = lambda items, *more: computed.extend(map(len, items)) or again(items, *more)
    embed.deviation(torch.bfloat16)
    assert max(computed) == 512


# --- memory --------------------------------------------------------------------------------------------


class Frugal(BertScoreEngine):
    """Notes whether float32's weights are still there when the faster type computes; it may find no memory then."""

    error: BaseException | None = None
    float32: Any = None
    alive: bool | None = None

    def compute(self, ids: Any, variant: int, dtype: torch.dtype | None = None) -> Any:
        if dtype == torch.bfloat16:
            self.alive = self.float32() is not None
            if self.error is not None:
                raise self.error
        return super().compute(ids, variant, dtype)


def frugal(folder: Path, error: BaseException | None = None) -> Frugal:
    engine = engine_of(tiny_models.save_bert(folder), Frugal)
    assert isinstance(engine, Frugal)
    engine.float32, engine.error = weakref.ref(engine.tokens.encoder(torch.float32)), error
    engine.tokens.one_at_a_time = True  # as on a GPU
    return engine


@pytest.mark.parametrize("bound", [0.0, 1.0])
def test_on_a_gpu_float32_leaves_before_the_faster_type_comes_and_returns_if_it_has_to(
    bound: float, tmp_path: Path
) -> None:
    engine = frugal(tmp_path / "model")
    engine.choose_precision("auto", torch.bfloat16, dict.fromkeys(BOUNDS, bound))
    assert engine.alive is False
    assert engine.describe()["dtype"] == ("bfloat16" if bound else "float32")
    exact = rows(score(load(tmp_path / "model"), *PAIR))
    np.testing.assert_allclose(rows(score(engine, *PAIR)), exact, atol=0.1 if bound else 1e-6)
    if bound:
        kept = weakref.ref(engine.tokens.encoder(torch.bfloat16))
        engine.tokens.encoder(torch.float32)
        assert kept() is not None, "what serves stays when float32 has to help out"


def test_no_memory_for_the_faster_type_fails_the_load_because_float32_needs_more(tmp_path: Path) -> None:
    engine = frugal(tmp_path / "model", torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        engine.choose_precision("auto", torch.bfloat16, WIDE)


def test_a_demanded_type_that_there_is_no_memory_to_measure_is_served_all_the_same(tmp_path: Path) -> None:
    engine = frugal(tmp_path / "model", torch.OutOfMemoryError("CUDA out of memory"))
    why = engine.choose_precision("bfloat16", None, WIDE)
    assert why == "bfloat16: as GPU_DTYPE asks; not measured (CUDA out of memory)"
    engine.error = None
    assert np.isfinite(rows(score(engine, *PAIR))).all()


def test_a_type_in_which_the_models_own_code_fails_leaves_float32_and_the_reason(tmp_path: Path) -> None:
    engine = frugal(tmp_path / "model", TypeError("gather(): argument must be Tensor"))
    why = engine.choose_precision("auto", torch.bfloat16, WIDE)
    assert why == "float32: bfloat16 does not run here (gather(): argument must be Tensor)"
    assert np.isfinite(rows(score(engine, *PAIR))).all()


# --- what it costs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "wanted", "warned"), [(CUDA, "auto", True), (CPU, "auto", False), (CUDA, "float32", False)]
)
def test_float32_that_auto_leaves_a_gpu_with_is_warned_of_with_figures_and_what_it_costs(
    device: torch.device, wanted: str, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = engine_of(tiny_models.save_bert(tmp_path / "model"))
    with caplog.at_level(logging.INFO):
        settle_precision(engine, configured_model("all-MiniLM-L6-v2"), device, wanted, dict.fromkeys(BOUNDS, 0.0))
    (line,) = [record for record in caplog.records if record.getMessage().startswith("bertscore:")]
    assert (line.levelno == logging.WARNING) == warned == ("warning" in engine.describe())
    if warned:
        warning = engine.describe()["warning"]
        assert line.getMessage() == f"bertscore:all-MiniLM-L6-v2: {warning}"
        assert warning.startswith("float32: float16 deviates ")
        assert "bound 0.0e+00" in warning
        assert "several times slower in float32" in warning
        assert "GPU_DTYPE_BOUND" in warning


class Slow(FakeEngine):
    """A fake engine with a warning to show."""

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "warning": "float32: several times slower"}


async def test_ready_and_info_show_the_warning() -> None:
    async with running(settings(), lambda kind, name, progress: Slow(kind)) as service:
        ready = (await service.client.get("/ready")).json()
        assert {shown["warning"] for shown in ready["models"].values()} == {"float32: several times slower"}
        models = (await service.client.get("/info")).json()["models"]
        assert {shown["warning"] for shown in models} == {"float32: several times slower"}


@pytest.mark.parametrize(("bound", "served"), [(0.0, "float32"), (0.9, "bfloat16")])
@pytest.mark.parametrize("kind", ["bertscore", "embed"])
def test_the_bound_is_the_environments(
    kind: str, bound: float, served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpu_engine.token_engine.fast_dtype", lambda device: torch.bfloat16)
    engine = load_folder(kind, tiny_models.save_bert(tmp_path / "model"), dtype="auto", dtype_bound=bound)
    assert engine.describe()["dtype"] == served
    assert set(engine.bounds.values()) == {bound / 2 if isinstance(engine, EmbedEngine) else bound}


async def test_the_service_hands_the_bound_to_its_loads() -> None:
    seen: list[float] = []

    def load_it(kind: str, name: Any, options: Any, progress: Any) -> FakeEngine:
        seen.append(options.dtype_bound)
        return FakeEngine(kind)

    async with running(settings(gpu_dtype_bound=0.02), engines=load_it):
        pass
    assert seen == [0.02, 0.02]


def test_a_default_layer_that_is_not_finite_is_no_measurement(tmp_path: Path) -> None:
    engine = engine_of(overflowing(tmp_path / "model"))
    with pytest.raises(NotFinite):
        engine.deviation(torch.float16)

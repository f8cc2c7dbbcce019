"""What a processor, a system or a library may refuse is tried, and there is another way.

A processor of today turns into one without AVX-512 by `ONEDNN_MAX_CPU_ISA=AVX2 pytest`; `operators` does so
inside one test, on any machine.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import tiny_models
import torch
from conftest import FakeLoader, settings
from fake_onednn import Operators
from live import serving
from test_numerics_bertscore import load, rows, score
from test_precision import BOUNDS, WIDE, engine_of

from gpu_engine.bertscore import BertScoreEngine
from gpu_engine.device import available_cores
from gpu_engine.model_files import configured_model
from gpu_engine.token_engine import fast_dtype, settle_precision

CPU = torch.device("cpu")
PAIR = (["the cat sat"], ["a dog ran"])


@pytest.fixture
def operators(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """torch's oneDNN operators replaced: None for a torch without any."""
    found = SimpleNamespace() if request.param is None else Operators(request.param)
    monkeypatch.setattr(torch.ops, "mkldnn", found)
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, probe, lambda: True, raising=False)
    return found


@pytest.mark.parametrize("operators", ["weight", "none", "gelu", "add", None], indirect=True)
def test_bfloat16_that_was_asked_for_is_served_by_plain_products_where_the_fused_ones_refuse(
    operators: Any, tmp_path: Path
) -> None:
    exact = rows(score(load(tiny_models.save_bert(tmp_path / "model")), *PAIR))
    engine = engine_of(tmp_path / "model")
    assert engine.choose_precision("bfloat16", None, BOUNDS).startswith("bfloat16: as GPU_DTYPE asks; deviates ")
    assert 0 < np.abs(rows(score(engine, *PAIR)) - exact).max() < 0.1, "bfloat16 is really used"
    assert engine.describe()["float32_retries"] == 0
    assert torch.bfloat16 not in getattr(operators, "served", set())


@pytest.mark.parametrize("operators", [""], indirect=True)
def test_bfloat16_is_served_by_the_fused_products_where_they_run(operators: Any, tmp_path: Path) -> None:
    engine = engine_of(tiny_models.save_bert(tmp_path / "model"))
    engine.choose_precision("auto", fast_dtype(CPU), WIDE)
    assert engine.describe()["dtype"] == "bfloat16"
    assert torch.bfloat16 in operators.served


@pytest.mark.parametrize("operators", ["weight", "add", None], indirect=True)
def test_a_type_that_the_library_refuses_is_not_fast_whatever_the_processor_says(operators: Any) -> None:
    assert fast_dtype(CPU) is None


@pytest.mark.parametrize("operators", [""], indirect=True)
def test_a_torch_that_cannot_tell_what_the_processor_has_stays_in_float32(
    operators: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fast_dtype(CPU) == torch.bfloat16
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, probe)
    assert fast_dtype(CPU) is None


@pytest.mark.parametrize("operators", ["weight", None], indirect=True)
def test_a_service_that_was_asked_for_emulated_bfloat16_serves_and_warns_once(
    operators: Any, caplog: pytest.LogCaptureFixture
) -> None:
    texts = ["The cat sat on the mat.", "A cat was sitting on a mat.", "Costs rose by an eighth."]
    with caplog.at_level(logging.INFO), serving(settings(gpu_dtype="bfloat16")) as service:
        answer = httpx.post(f"{service.url}/embed", json={"texts": texts}, timeout=60).json()
        body = {"candidates": [texts[0]] * 3, "references": texts}
        scores = httpx.post(f"{service.url}/bertscore", json=body, timeout=60).json()
        models = httpx.get(f"{service.url}/info").json()["models"]
    assert {model["dtype"] for model in models} == {"bfloat16"}
    same, near, far = np.array(answer["embeddings"]) @ np.array(answer["embeddings"][0])
    assert same > 0.999 > near > 0.8 > 0.3 > far
    assert scores["f1"][0] > 0.99 > scores["f1"][1] > scores["f1"][2]
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert warning.startswith("GPU_DTYPE=bfloat16: this processor only emulates it, four to five times slower")
    for kind in ("bertscore", "embed"):
        assert f"{kind}:all-MiniLM-L6-v2: bfloat16: as GPU_DTYPE asks; deviates " in caplog.text


@pytest.mark.parametrize("operators", [""], indirect=True)
def test_nobody_is_warned_of_bfloat16_that_the_processor_has(operators: Any, caplog: pytest.LogCaptureFixture) -> None:
    with serving(settings(gpu_dtype="bfloat16"), FakeLoader()):
        pass
    assert "emulates" not in caplog.text


class Refusing(BertScoreEngine):
    """An engine whose forward runs in float32 alone."""

    def deviation(self, dtype: torch.dtype) -> dict[str, float]:
        raise RuntimeError("could not create a primitive")


@pytest.mark.parametrize(("wanted", "device"), [("auto", "cuda"), ("bfloat16", "cpu")])
def test_a_type_that_does_not_run_at_all_leaves_float32_and_is_warned_of_where_it_was_asked_for_or_a_gpu_waits(
    wanted: str, device: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = engine_of(tiny_models.save_bert(tmp_path / "model"), Refusing)
    name = configured_model("all-MiniLM-L6-v2")
    with caplog.at_level(logging.INFO):
        settle_precision(engine, name, torch.device(device), wanted, BOUNDS)
    assert engine.describe()["dtype"] == "float32"
    tried = "float16" if wanted == "auto" else wanted
    (line,) = [record for record in caplog.records if record.getMessage().startswith("bertscore:")]
    expected = f"bertscore:all-MiniLM-L6-v2: float32: {tried} does not run here (could not create a primitive)"
    assert line.getMessage().partition(". ")[0] == expected
    assert line.levelno == logging.WARNING


@pytest.mark.parametrize(
    ("wanted", "fast", "bound", "line"),
    [
        ("auto", None, 1e-3, r"float32: no bfloat16 in this processor"),
        ("auto", torch.bfloat16, 1e-9, r"float32: bfloat16 deviates \d\.\d\de-\d, bound 1.0e-9"),
        ("auto", torch.bfloat16, 0.5, r"bfloat16: deviates \d\.\d\de-\d at most, bound 5.0e-1"),
        ("bfloat16", None, 1e-9, r"bfloat16: as GPU_DTYPE asks; deviates \d\.\d\de-\d at most"),
        ("float32", torch.bfloat16, 0.5, r"float32: as GPU_DTYPE asks"),
    ],
)
def test_what_serves_and_why_is_said_in_one_line(
    wanted: str, fast: torch.dtype | None, bound: float, line: str, tmp_path: Path
) -> None:
    engine = engine_of(tiny_models.save_bert(tmp_path / "model"))
    found = engine.choose_precision(wanted, fast, dict.fromkeys(BOUNDS, bound))
    assert re.fullmatch(line, found)


@pytest.mark.parametrize("refusal", [AttributeError, PermissionError])
def test_cores_are_counted_where_the_affinity_cannot_be_asked(
    refusal: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(pid: int) -> set[int]:
        raise refusal

    monkeypatch.setattr(os, "sched_getaffinity", refuse, raising=False)
    assert 1 <= available_cores() <= (os.cpu_count() or 1)

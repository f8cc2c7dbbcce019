"""GPU_DTYPE: the faster type is kept only where it was measured to be good enough."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from fake_onednn import Operators
from test_numerics_bertscore import load, rows, score
from transformers import AutoModel, AutoTokenizer

from gpu_engine.bertscore import BertScoreEngine
from gpu_engine.token_model import TokenModel
from gpu_engine.tokenizing import TextTokenizer

BOUNDS = {"precision": 1e-3, "recall": 1e-3, "f1": 1e-3}
WIDE = dict.fromkeys(BOUNDS, 1.0)


@pytest.fixture(params=[None, "weight"], ids=["onednn", "onednn-refuses"], autouse=True)
def _operators(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it on this machine's processor, and once more on one without AVX-512."""
    if request.param is not None:
        monkeypatch.setattr(torch.ops, "mkldnn", Operators(request.param))


def engine_of(folder: Path, kind: type[BertScoreEngine] = BertScoreEngine) -> BertScoreEngine:
    """An engine whose precision is not chosen yet."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    module = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = TokenModel(module, tokenizer.pad_token_id, torch.device("cpu"))
    engine = kind(tokens, TextTokenizer(tokenizer, 512), 3, Any)  # type: ignore[arg-type]
    tokens.verify(engine.encode_texts(["the cat sat", "a dog"])[0], 3)
    return engine


def overflowing(folder: Path) -> Path:
    """A BERT that is fine in float32 and infinite in float16."""
    tiny_models.save_bert(folder)
    module = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        module.encoder.layer[0].intermediate.dense.weight.mul_(1e6)
    module.save_pretrained(folder)
    return folder


def test_a_model_that_overflows_in_half_precision_stays_in_float32(tmp_path: Path) -> None:
    engine = engine_of(overflowing(tmp_path / "model"))
    engine.choose_precision("auto", torch.float16, WIDE)
    assert engine.describe()["dtype"] == "float32"
    assert np.isfinite(rows(score(engine, ["the cat"], ["a dog"]))).all()


def test_half_precision_that_was_demanded_is_repaired_in_float32_text_by_text(tmp_path: Path) -> None:
    folder = overflowing(tmp_path / "model")
    exact = rows(score(load(folder), ["the cat", "red"], ["a dog", "blue"]))
    engine = engine_of(folder)
    engine.choose_precision("float16", None, WIDE)
    assert engine.describe()["dtype"] == "float16"
    np.testing.assert_allclose(rows(score(engine, ["the cat", "red"], ["a dog", "blue"])), exact, atol=1e-6)
    assert engine.describe()["float32_retries"] == 4


def test_the_faster_type_is_kept_inside_the_bound_and_its_deviation_shown(tmp_path: Path) -> None:
    engine = engine_of(tiny_models.save_bert(tmp_path / "model"))
    engine.choose_precision("auto", torch.bfloat16, WIDE)
    shown = engine.describe()
    assert shown["dtype"] == "bfloat16"
    assert 0 < shown["deviation"]["f1"] < 0.1
    exact = rows(score(load(tmp_path / "model"), ["the cat sat"], ["a dog ran"]))
    found = rows(score(engine, ["the cat sat"], ["a dog ran"]))
    assert 0 < np.abs(found - exact).max() < 0.1, "bfloat16 is really used"


def test_the_faster_type_is_dropped_outside_the_bound(tmp_path: Path) -> None:
    engine = engine_of(tiny_models.save_bert(tmp_path / "model"))
    engine.choose_precision("auto", torch.bfloat16, dict.fromkeys(BOUNDS, 0.0))
    assert engine.describe()["dtype"] == "float32"
    assert engine.describe()["deviation"]["f1"] > 0


@pytest.mark.parametrize("family", ["roberta", "deberta", "distilbert"])
def test_reduced_precision_stays_close_for_every_kind_of_forward(family: str, tmp_path: Path) -> None:
    save = {"roberta": tiny_models.save_roberta, "deberta": tiny_models.save_deberta}
    folder = save[family](tmp_path / family) if family in save else tiny_models.save_other(tmp_path / family, family)
    engine = engine_of(folder)
    assert max(engine.deviation(torch.bfloat16).values()) < 0.05


def test_a_model_of_nan_is_refused_text_by_text(tmp_path: Path) -> None:
    folder = tiny_models.save_bert(tmp_path / "model")
    module = AutoModel.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():  # one poisoned word
        module.embeddings.word_embeddings.weight[tokenizer.convert_tokens_to_ids("fox")] = torch.nan
    module.save_pretrained(folder)
    engine = load(folder)
    good, bad = (engine.prepare(_job(text)).text(0) for text in ("the cat", "the fox"))
    outputs = engine.run([good, bad], engine.default_layers)
    assert outputs.bad() == [1]
    assert list(engine.retry([bad], engine.default_layers).bad()) == [0]
    assert torch.isfinite(outputs.keep(0)).all()


def _job(text: str) -> Any:
    from gpu_engine.work import BertScoreTask

    return BertScoreTask([text], [["a dog"]])

"""Cross-encoders: our tokenising and padding around transformers' module give the library's scores, in any type."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from conftest import outputs_of
from test_dialects import save_cross_encoder

from gpu_engine.model_files import ModelName
from gpu_engine.reranking import LibraryPairs, OwnPairs, RerankEngine, load_rerank
from gpu_engine.work import LoadOptions, NotFinite, RerankTask

QUERY = "where does the cat sit"
DOCUMENTS = ["the cat sat on the mat", "a dog", "", "the fox " * 700, "two cats, one mat; a red hat", "a dog"]


def save_roberta_cross_encoder(folder: Path) -> Path:
    from transformers import AutoTokenizer, RobertaConfig, RobertaForSequenceClassification

    tiny_models.save_roberta(folder)
    size = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    vocabulary = len(AutoTokenizer.from_pretrained(folder))
    config = RobertaConfig(vocab_size=vocabulary, num_labels=1, max_position_embeddings=514, pad_token_id=1, **size)
    tiny_models.spread(RobertaForSequenceClassification(config), 5).save_pretrained(folder)
    return folder


FAMILIES: dict[str, Callable[[Path], Path]] = {"bert": save_cross_encoder, "roberta": save_roberta_cross_encoder}


def load(folder: Path, **options: Any) -> RerankEngine:
    wanted = LoadOptions(**{"dtype": "float32", **options})
    return load_rerank(ModelName("reranker", path=folder), folder, torch.device("cpu"), wanted, lambda *_: None)


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_the_librarys_and_what_was_cut_is_told(family: str, raw: bool, tmp_path: Path) -> None:
    from sentence_transformers import CrossEncoder

    folder = FAMILIES[family](tmp_path / "reranker")
    engine = load(folder)
    assert isinstance(engine.pairs, OwnPairs)
    result = outputs_of(engine, engine.prepare(RerankTask(QUERY, DOCUMENTS, raw)))
    activation = torch.nn.Identity() if raw else None
    pairs = [(QUERY, document) for document in DOCUMENTS]
    expected = CrossEncoder(str(folder), device="cpu").predict(pairs, activation_fn=activation)
    np.testing.assert_allclose(result.scores, expected, atol=2e-6)
    assert result.truncated == [3]


def test_a_pairs_tokens_are_counted_not_guessed(tmp_path: Path) -> None:
    work = load(save_cross_encoder(tmp_path / "reranker")).prepare(RerankTask("the cat", ["a dog sat", "the cat"]))
    assert work.costs == [8, 7]


def test_a_model_with_a_prompt_runs_as_the_library_runs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sentence_transformers import CrossEncoder

    folder = save_cross_encoder(tmp_path / "reranker")
    plain = CrossEncoder(str(folder), device="cpu")
    plain.prompts, plain.default_prompt_name = {"query": "find: "}, "query"
    plain.save_pretrained(str(folder))
    engine = load(folder)
    assert isinstance(engine.pairs, LibraryPairs)
    assert engine.describe()["backend"] == "sentence-transformers"
    result = outputs_of(engine, engine.prepare(RerankTask(QUERY, DOCUMENTS)))
    np.testing.assert_allclose(result.scores, plain.predict([(QUERY, text) for text in DOCUMENTS]), atol=2e-6)


def test_numbers_that_differ_from_the_librarys_leave_the_model_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = OwnPairs.logits
    monkeypatch.setattr(OwnPairs, "logits", lambda self, pairs, exact=False: logits(self, pairs, exact) + 0.1)
    assert isinstance(load(save_cross_encoder(tmp_path / "reranker")).pairs, LibraryPairs)


def test_the_type_that_is_asked_for_serves_and_its_deviation_is_shown(tmp_path: Path) -> None:
    folder = save_cross_encoder(tmp_path / "reranker")
    engine, exact = load(folder, dtype="bfloat16"), load(folder)
    shown = engine.describe()
    assert shown["dtype"] == "bfloat16"
    assert 0 < shown["deviation"]["score"] < 0.1
    task = RerankTask(QUERY, DOCUMENTS)
    found, expected = (outputs_of(each, each.prepare(task)).scores for each in (engine, exact))
    np.testing.assert_allclose(found, expected, atol=0.1)
    assert load(folder, dtype="auto").describe()["dtype"] == "float32", "on a CPU"


@pytest.mark.parametrize(("bound", "serves"), [(0.5, "float16"), (1e-12, "float32")])
def test_auto_on_a_gpu_is_float16_inside_the_bound(bound: float, serves: str, tmp_path: Path) -> None:
    engine = load(save_cross_encoder(tmp_path / "reranker"))
    engine.choose_precision("auto", torch.device("cuda"), bound)
    assert engine.describe()["dtype"] == serves


def test_a_score_that_is_not_finite_is_computed_in_float32_then_given_up(tmp_path: Path) -> None:
    engine = load(save_cross_encoder(tmp_path / "reranker"), dtype="bfloat16")
    logits = engine.pairs.logits
    engine.pairs.logits = lambda pairs, exact=False: logits(pairs, exact) * (1 if exact else torch.nan)  # type: ignore[method-assign]
    assert np.isfinite(outputs_of(engine, engine.prepare(RerankTask(QUERY, DOCUMENTS))).scores).all()
    engine.pairs.logits = lambda pairs, exact=False: logits(pairs, exact) * torch.nan  # type: ignore[method-assign]
    with pytest.raises(NotFinite):
        outputs_of(engine, engine.prepare(RerankTask(QUERY, DOCUMENTS)))

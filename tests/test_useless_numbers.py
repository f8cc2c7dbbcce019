"""A model whose own numbers are not finite: 422 and never a number, and no other text is harmed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny_models
import torch
from conftest import FakeEngine, load_folder, settings
from live import serving

import gpu_service
from gpu_engine.model_files import ModelName
from gpu_engine.work import Progress


def tiny_bert(folder: Path, change: Callable[[Any], None]) -> Path:
    """A small BERT with changed weights, saved."""
    from transformers import BertModel

    module = BertModel.from_pretrained(tiny_models.save_bert(folder))
    with torch.no_grad():
        change(module)
    module.save_pretrained(folder)
    return folder


def on_demand(folder: Path) -> gpu_service.Loader:
    """Fakes for the defaults, the real loading code for `tiny/model`."""

    def load(kind: str, name: ModelName, progress: Progress) -> Any:
        if name.public != "tiny/model":
            return FakeEngine(kind)
        return load_folder(kind, folder, name, dtype="auto")

    return load


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), 0.0])
def test_a_model_whose_outputs_are_all_useless_gives_no_answer(tmp_path: Path, weight: float) -> None:
    def spoil(module: Any) -> None:
        module.encoder.layer[-1].output.LayerNorm.weight.fill_(weight)
        module.encoder.layer[-1].output.LayerNorm.bias.fill_(0.0)

    scored = {"candidates": ["hello"], "references": ["hello"], "num_layers": 4}
    with serving(settings(), on_demand(tiny_bert(tmp_path / "model", spoil))) as service:
        for path, body, code in (
            ("/embed", {"texts": ["hello"]}, "model_unsupported"),  # found when it is loaded
            ("/embed", {"texts": ["hello"], "normalize": False}, "model_unsupported"),
            ("/bertscore", scored, "not_finite"),
        ):
            response = httpx.post(f"{service.url}{path}", json={**body, "model": "tiny/model"}, timeout=30)
            assert (response.status_code, response.json().get("code")) == (422, code), response.text
        assert httpx.get(f"{service.url}/health").status_code == 200
        assert httpx.post(f"{service.url}/embed", json={"texts": ["fine"]}).status_code == 200


def test_a_word_that_breaks_the_numbers_is_refused_and_harms_no_other_text(tmp_path: Path) -> None:
    def spoil(module: Any) -> None:
        from transformers import AutoTokenizer

        token = AutoTokenizer.from_pretrained(tmp_path / "model").convert_tokens_to_ids("moon")
        module.embeddings.word_embeddings.weight[token].fill_(float("nan"))

    with serving(settings(), on_demand(tiny_bert(tmp_path / "model", spoil))) as service:

        def ask(*texts: str) -> httpx.Response:
            body = {"texts": texts, "model": "tiny/model"}
            return httpx.post(f"{service.url}/embed", json=body, timeout=30)

        good = ["the sun", "the cat sat on the mat", "a tree"]
        alone = [ask(text).json()["embeddings"][0] for text in good]
        with ThreadPoolExecutor() as callers:
            bad, fine = callers.submit(ask, "the moon", *good), callers.submit(ask, *good)
        assert (bad.result().status_code, bad.result().json()["code"]) == (422, "not_finite")
        for first, second in zip(alone, fine.result().json()["embeddings"]):
            assert second == pytest.approx(first, abs=1e-5)
        assert ask("the moon").status_code == 422, "what is not finite is not kept"
        scored = {"candidates": ["the moon"], "references": ["the sun"], "model": "tiny/model"}
        assert httpx.post(f"{service.url}/bertscore", json=scored, timeout=30).json()["code"] == "not_finite"

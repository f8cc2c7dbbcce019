"""Bodies of other services' clients: text-embeddings-inference's, and rerankers' that must name a model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tiny_models
from conftest import load_folder, running, settings
from live import LiveService, answer, post, serving

from gpu_engine.work import UnsupportedModel

SOURCE, TEXTS = "Where does the cat sit?", ["Revenue grew.", "The cat sits on the mat.", "Dogs bark at night."]
BARE = "all-MiniLM-L6-v2"
ASKED = {"method": "cross-encoder"}


@pytest.fixture(scope="module")
def real() -> Iterator[LiveService]:
    with serving(settings(gpu_dtype="float32", gpu_max_batch_size=10)) as service:
        yield service


def vectors(service: LiveService, texts: list[str], **more: Any) -> np.ndarray:
    return np.array(answer(service, "/embed", {"texts": texts, **more})["embeddings"], np.float32)


def save_cross_encoder(folder: Path, **config: Any) -> Path:
    """A small cross-encoder with one output."""
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    tiny_models.save_bert(folder)
    size = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    vocabulary = len(AutoTokenizer.from_pretrained(folder))
    made = BertForSequenceClassification(BertConfig(vocab_size=vocabulary, num_labels=1, **size, **config))
    tiny_models.spread(made, 5).save_pretrained(folder)
    return folder


# --- text-embeddings-inference: embeddings and similarity ----------------------------------------------


@pytest.mark.parametrize("path", ["/", "/embed"])
def test_inputs_are_answered_with_a_bare_list_of_vectors(path: str, real: LiveService) -> None:
    np.testing.assert_allclose(answer(real, path, {"inputs": TEXTS}), vectors(real, TEXTS), atol=1e-6)
    one = answer(real, path, {"inputs": "a cat", "truncate": True, "truncation_direction": "Right"})
    np.testing.assert_allclose(one, vectors(real, ["a cat"]), atol=1e-6)


def test_inputs_are_normalised_unless_asked_otherwise_and_cut_to_dimensions(tmp_path: Path) -> None:
    from test_numerics_embed import build

    build(tmp_path, "mean", prompts={"query": "the query: "})
    with serving(settings(model_embed=str(tmp_path / "model"), gpu_dtype="float32")) as service:
        unit = np.array(answer(service, "/embed", {"inputs": ["a cat", "dog"]}), np.float32)
        raw = np.array(answer(service, "/embed", {"inputs": ["a cat", "dog"], "normalize": False}), np.float32)
        short = answer(service, "/", {"inputs": ["a cat", "dog"], "dimensions": 8})
        asked = answer(service, "/", {"inputs": ["a cat"], "prompt_name": "query", "normalize": False})
        np.testing.assert_allclose(raw, vectors(service, ["a cat", "dog"], normalize=False), atol=1e-6)
        np.testing.assert_allclose(short, vectors(service, ["a cat", "dog"], dimensions=8, normalize=True), atol=1e-6)
        np.testing.assert_allclose(asked, vectors(service, ["a cat"], prompt_name="query"), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-5)
    assert (np.linalg.norm(raw, axis=1) > 1.5).all()


def test_a_text_that_would_be_cut_is_refused_where_truncate_is_false(real: LiveService) -> None:
    body = {"inputs": ["short", "cat " * 600]}
    assert len(answer(real, "/embed", body)) == 2
    refused = post(real, "/embed", {**body, "truncate": False})
    assert (refused.status_code, refused.json()["error_type"]) == (413, "Validation")
    assert "inputs[1]" in refused.json()["error"]


@pytest.mark.parametrize("path", ["/", "/similarity"])
def test_sentences_are_answered_with_a_bare_list_of_cosines(path: str, real: LiveService) -> None:
    body = {"inputs": {"source_sentence": SOURCE, "sentences": TEXTS}, "parameters": {}}
    expected = answer(real, "/similarity", {"source": SOURCE, "texts": TEXTS})["similarities"]
    np.testing.assert_allclose(answer(real, path, body), expected, atol=1e-6)


def test_our_own_field_decides_where_both_are_sent(real: LiveService) -> None:
    ours = answer(real, "/embed", {"texts": ["a"], "inputs": ["b"]})
    np.testing.assert_allclose(ours["embeddings"], vectors(real, ["a"]), atol=1e-6)
    assert "unknown field 'inputs'" in ours["warnings"][0]


TEI_REFUSED = [
    ("/", {"inputs": []}, 400, "Empty", "inputs is empty"),
    ("/", {}, 422, "Validation", "inputs"),
    ("/embed", {"inputs": [1, 2]}, 400, "Validation", "token ids"),
    ("/embed", {"inputs": ["a", 5]}, 422, "Validation", "inputs[1]"),
    ("/embed", {"inputs": ["a"] * 11}, 422, "Validation", "inputs has 11 items, the limit is 10"),
    ("/embed", {"inputs": ["a", "x" * 10_001]}, 422, "Validation", "inputs[1] has 10001 characters"),
    ("/embed", {"inputs": ["a"], "prompt_name": "none"}, 422, "Validation", "prompt_name"),
    ("/embed", {"inputs": ["a"], "truncation_direction": "Left"}, 422, "Validation", "truncation_direction"),
    ("/embed", {"inputs": ["a"], "model": "no/such"}, 404, "Validation", "no/such"),
    ("/similarity", {"inputs": {"source_sentence": "a"}}, 422, "Validation", "inputs.sentences"),
    ("/similarity", {"inputs": {"source_sentence": "a", "sentences": ["b"] * 11}}, 422, "Validation", "11 items"),
    ("/similarity", {"inputs": {"source_sentence": "x" * 10_001, "sentences": []}}, 422, "Validation", "source_sen"),
    ("/rerank", {"query": "a", "texts": []}, 422, "Empty", "texts is empty"),
    ("/embed", {"inputs": 5}, 422, "Validation", "inputs: Input should be a valid"),
    ("/embed", {"inputs": 5, "texts": None}, 422, "Validation", "inputs: "),
    ("/rerank", {"texts": ["a"]}, 422, "Validation", "query"),
]


@pytest.mark.parametrize(("path", "body", "status", "kind", "words"), TEI_REFUSED)
def test_errors_come_in_the_shape_of_that_server(
    path: str, body: Any, status: int, kind: str, words: str, real: LiveService
) -> None:
    refused = post(real, path, body)
    assert (refused.status_code, refused.json().get("error_type")) == (status, kind), refused.text
    assert words in refused.json()["error"]
    assert set(refused.json()) == {"error", "error_type"}


def test_json_that_breaks_off_is_answered_in_that_shape_where_the_path_is_theirs_alone(real: LiveService) -> None:
    refused = httpx.post(f"{real.url}/", content=b'{"inputs"', headers={"Content-Type": "application/json"})
    assert (refused.status_code, refused.json()["error_type"]) == (422, "Validation")
    assert httpx.get(f"{real.url}/").headers["Content-Type"] == "text/html; charset=utf-8"  # the page


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/", {"inputs": "b"}),
        ("/embed", {"inputs": ["b"]}),
        ("/similarity", {"inputs": {"source_sentence": "a", "sentences": ["b"]}}),
        ("/rerank", {"query": "a", "texts": ["b"]}),
    ],
)
async def test_busy_is_429_overloaded_with_retry_after(path: str, body: Any) -> None:
    async with running(settings(gpu_max_concurrent=1, gpu_max_queue=0)) as service:
        engine = service.embed_engine
        engine.hold.clear()
        first = asyncio.create_task(service.embed("a"))
        await service.until(lambda: engine.begun > 0)
        busy = await service.client.post(path, json=body)
        engine.hold.set()
        await first
    assert (busy.status_code, busy.json()["error_type"]) == (429, "Overloaded")
    assert int(busy.headers["Retry-After"]) >= 1


# --- text-embeddings-inference: rerank -----------------------------------------------------------------


def test_texts_are_ranked_in_a_bare_list_best_first(real: LiveService) -> None:
    ranked = answer(real, "/rerank", {"query": SOURCE, "texts": TEXTS, "raw_scores": False, "return_text": True})
    assert ranked[0] == {"index": 1, "score": pytest.approx(ranked[0]["score"]), "text": TEXTS[1]}
    assert [entry["score"] for entry in ranked] == sorted((entry["score"] for entry in ranked), reverse=True)
    assert set(answer(real, "/rerank", {"query": SOURCE, "texts": TEXTS})[0]) == {"index", "score"}


def test_a_cross_encoders_scores_are_sigmoids_unless_raw_ones_are_asked(tmp_path: Path) -> None:
    from sentence_transformers import CrossEncoder
    from torch.nn import Identity

    folder = save_cross_encoder(tmp_path / "reranker")
    pairs = [(SOURCE, text) for text in TEXTS]
    logits = CrossEncoder(str(folder), device="cpu").predict(pairs, activation_fn=Identity())
    with serving(settings(model_rerank=str(folder))) as service:
        raw = answer(service, "/rerank", {"query": SOURCE, "texts": TEXTS, "raw_scores": True})
        sigmoids = answer(service, "/rerank", {"query": SOURCE, "texts": TEXTS})
        ours = answer(service, "/v1/rerank", {"query": SOURCE, "documents": TEXTS})
    by_index = [{entry["index"]: entry["score"] for entry in ranked} for ranked in (raw, sigmoids)]
    np.testing.assert_allclose([by_index[0][i] for i in range(3)], logits, atol=1e-5)
    np.testing.assert_allclose([by_index[1][i] for i in range(3)], 1 / (1 + np.exp(-logits)), atol=1e-6)
    assert (ours["method"], ours["model"]) == ("cross-encoder", "reranker")
    scores = [entry["relevance_score"] for entry in ours["results"]]
    assert scores == pytest.approx([entry["score"] for entry in sigmoids], abs=1e-6)


# --- rerankers' clients, which must name a model -------------------------------------------------------


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
@pytest.mark.parametrize("model", [BARE, f"sentence-transformers/{BARE}"])
def test_a_model_that_is_known_as_an_embedder_means_cosine(path: str, model: str, real: LiveService) -> None:
    body = {"model": model, "query": SOURCE, "documents": TEXTS, "top_n": 2, "return_documents": True}
    ranked = answer(real, path, body)
    assert (ranked["method"], ranked["model"], ranked["results"][0]["index"]) == ("cosine", model, 1)
    assert ranked["results"][0]["document"] == {"text": TEXTS[1]}
    assert len(ranked["results"]) == 2


@pytest.mark.anyio
async def test_a_model_is_reranked_by_what_it_is_known_as_and_by_a_cross_encoder_otherwise() -> None:
    body = {"query": "a", "documents": ["b"]}
    async with running(settings(model_bertscore="some/scorer", model_embed="some/embedder")) as service:
        loads = service.loader.loads
        for model, method in (("some/scorer", "bertscore"), ("some/embedder", "cosine")):
            response = await service.client.post("/v2/rerank", json={**body, "model": model})
            assert (response.status_code, response.json().get("method")) == (200, method), response.text
        await service.client.post("/v2/rerank", json={**body, "model": "some/other"})
        assert loads[-1] == "rerank:some/other"
        service.loader.errors["rerank:some/encoder"] = UnsupportedModel("an encoder", "not_a_reranker")
        response = await service.client.post("/v2/rerank", json={**body, "model": "some/encoder"})
        assert (response.status_code, response.json()["method"]) == (200, "cosine"), "clients can't send a method"
        response = await service.client.post("/v2/rerank", json={**body, "model": "some/encoder", **ASKED})
        assert (response.status_code, response.json()["error"]["code"]) == (400, "not_a_reranker")
        await service.embed("a", model="some/second")
        response = await service.client.post("/v1/rerank", json={**body, "model": "some/second"})
        assert response.json()["method"] == "cosine"


def test_a_cross_encoder_named_for_embeddings_is_refused_and_an_embedder_for_scores_of_pairs(
    tmp_path: Path, real: LiveService
) -> None:
    folder = save_cross_encoder(tmp_path / "reranker")
    with serving(settings(model_rerank=str(folder))) as service:
        assert post(service, "/v1/rerank", {"query": "a", "documents": ["b"], "model": "reranker"}).status_code == 200
    with serving(settings(model_bertscore=str(folder), gpu_dtype="float32")) as service:
        assert post(service, "/bertscore", {"candidates": ["a"], "references": ["b"]}).status_code == 200

    with pytest.raises(UnsupportedModel, match="is a cross-encoder"):
        load_folder("embed", folder)
    refused = post(real, "/v1/rerank", {"query": "a", "documents": ["b"], "model": BARE, "method": "cross-encoder"})
    assert refused.status_code == 400
    assert '"method": "cosine"' in refused.json()["detail"]


def test_a_folder_that_says_it_is_a_cross_encoder_is_one_and_a_pipeline_is_not(tmp_path: Path) -> None:
    from gpu_engine.model_files import is_cross_encoder

    folder = save_cross_encoder(tmp_path / "m")
    assert is_cross_encoder(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "id2label": {"0": "no", "1": "yes"}}))
    assert not is_cross_encoder(folder), "a classifier"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modules.json").write_text("[]")
    assert not is_cross_encoder(folder)
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"model_type": "CrossEncoder"}))
    assert is_cross_encoder(folder)


def test_documents_with_more_fields_than_their_text_are_taken(real: LiveService) -> None:
    documents = [{"title": "t", "text": TEXTS[0], "_rank": 3}, {"text": TEXTS[1]}]
    body = {"query": SOURCE, "documents": documents, "model": BARE, "rank_fields": ["text"], "max_chunks_per_doc": 1}
    assert answer(real, "/v1/rerank", body)["results"][0]["index"] == 1


# --- null is the default -------------------------------------------------------------------------------

NULLS = [
    ("/embed", {"texts": ["a"]}, ["model", "normalize", "prompt_name", "dimensions"]),
    ("/embed", {"inputs": ["a"]}, ["normalize", "truncate", "truncation_direction", "prompt_name", "dimensions"]),
    ("/similarity", {"source": "a", "texts": ["b"]}, ["model"]),
    (
        "/bertscore",
        {"candidates": ["a cat"], "references": ["a dog"]},
        ["lang", "model_type", "num_layers", "idf", "rescale_with_baseline", "explain"],
    ),
    (
        "/v1/embeddings",
        {"input": "a"},
        ["model", "encoding_format", "dimensions", "input_type", "prompt_name", "user"],
    ),
    ("/v1/rerank", {"query": "a", "documents": ["b"]}, ["model", "top_n", "return_documents", "method"]),
    ("/rerank", {"query": "a", "texts": ["b"]}, ["raw_scores", "return_text"]),
]


@pytest.mark.parametrize(("path", "body", "optional"), NULLS)
def test_null_is_the_default_of_every_optional_field(
    path: str, body: Any, optional: list[str], real: LiveService
) -> None:
    def computed(body: Any) -> Any:
        found = answer(real, path, body)
        return {k: v for k, v in found.items() if k != "id"} if isinstance(found, dict) else found

    assert computed({**body, **dict.fromkeys(optional)}) == computed(body)


def test_every_optional_field_is_described_as_nullable(real: LiveService) -> None:
    schemas = httpx.get(f"{real.url}/openapi.json").json()["components"]["schemas"]
    for name, schema in schemas.items():
        if name.endswith("Request"):
            for field, shown in schema["properties"].items():
                nullable = {"type": "null"} in shown.get("anyOf", ())
                assert nullable == (field not in schema["required"]), f"{name}.{field}"


@pytest.mark.parametrize(("path", "field"), [("/embed", "texts"), ("/embed", "inputs"), ("/v1/embeddings", "input")])
def test_null_for_a_field_that_is_needed_is_refused(path: str, field: str, real: LiveService) -> None:
    assert post(real, path, {field: None}).status_code in (400, 422)


@pytest.mark.parametrize(("path", "field"), [("/embed", "texts"), ("/embed", "inputs"), ("/embeddings", "input")])
def test_no_dimensions_are_all_of_them(path: str, field: str, real: LiveService) -> None:
    assert answer(real, path, {field: ["a"], "dimensions": 0}) == answer(real, path, {field: ["a"]})

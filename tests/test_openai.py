"""OpenAI-compatible clients: the real openai package over HTTP, and the bodies other clients are known to send."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from conftest import FakeLoader, running, settings
from live import LiveService, post, serving, until

from gpu_service import openai_error

KEY = "sesame"


@pytest.fixture(scope="module")
def real() -> Iterator[LiveService]:
    """The real MiniLM behind a real socket."""
    with serving(settings(api_key=KEY, gpu_dtype="float32", gpu_max_batch_size=10)) as service:
        yield service


@pytest.fixture
def client(real: LiveService) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{real.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def native(service: LiveService, texts: list[str], **more: Any) -> np.ndarray:
    return np.array(post(service, "/embed", {"texts": texts, **more}).json()["embeddings"], np.float32)


def test_the_openai_client_gets_the_vectors_of_embed_in_input_order(client: openai.OpenAI, real: LiveService) -> None:
    texts = ["hello world", "the cat", "hello world"]
    answer = client.embeddings.create(model="all-MiniLM-L6-v2", input=texts)
    assert [entry.index for entry in answer.data] == [0, 1, 2]
    np.testing.assert_allclose([entry.embedding for entry in answer.data], native(real, texts), atol=1e-6)
    assert answer.model == "all-MiniLM-L6-v2"
    assert answer.object == "list"
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == 4 + 4 + 4


def test_float_and_base64_are_the_same_numbers(real: LiveService) -> None:
    body = {"input": "the cat", "model": "all-MiniLM-L6-v2"}
    plain = post(real, "/v1/embeddings", body).json()["data"][0]["embedding"]
    packed = post(real, "/v1/embeddings", {**body, "encoding_format": "base64"}).json()["data"][0]["embedding"]
    decoded = np.frombuffer(base64.b64decode(packed), "<f4")
    assert decoded.shape == (384,)
    np.testing.assert_array_equal(decoded, np.array(plain, np.float32))


def test_dimensions_are_cut_and_renormalised_and_refused_above_the_models(
    client: openai.OpenAI, real: LiveService
) -> None:
    short = client.embeddings.create(model="all-MiniLM-L6-v2", input="the cat", dimensions=16).data[0].embedding
    whole = native(real, ["the cat"])[0][:16]
    np.testing.assert_allclose(short, whole / np.linalg.norm(whole), atol=1e-6)
    with pytest.raises(openai.BadRequestError, match="got 385, the model has 384") as refused:
        client.embeddings.create(model="all-MiniLM-L6-v2", input="the cat", dimensions=385)
    assert refused.value.param == "dimensions"


def test_more_texts_than_a_batch_and_up_to_2048_are_answered(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model="all-MiniLM-L6-v2", input=[f"text {n % 7}" for n in range(2048)])
    assert len(answer.data) == 2048
    assert answer.data[7].embedding == answer.data[0].embedding


def test_too_many_texts_get_the_message_that_openclaw_understands(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"batch size is invalid, it should not be larger than 2048"):
        client.embeddings.create(model="all-MiniLM-L6-v2", input=["a"] * 2049)


@pytest.mark.parametrize("ids", [[1, 2, 3], [[1, 2], [3]]])
def test_token_ids_are_refused_with_the_option_that_helps(ids: Any, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False"):
        client.embeddings.create(model="all-MiniLM-L6-v2", input=ids)


RECORDED = {
    "openclaw memory search": {"model": "all-MiniLM-L6-v2", "input": ["a note", "another"], "input_type": "document"},
    "langchain with check_embedding_ctx_length=False": {
        "input": ["a", "b"],
        "model": "all-MiniLM-L6-v2",
        "encoding_format": "base64",
    },
    "llamaindex": {"input": ["a b"], "model": "all-MiniLM-L6-v2", "user": "someone"},
    "chroma": {"input": ["one", "two", "three"], "model": "all-MiniLM-L6-v2"},
    "curl with a single string": {"input": "a", "model": "sentence-transformers/all-MiniLM-L6-v2"},
    "no model at all": {"input": ["a"]},
    "an unknown input_type": {"input": ["a"], "input_type": "classification"},
}


@pytest.mark.parametrize("path", ["/v1/embeddings", "/embeddings"])
@pytest.mark.parametrize("sender", RECORDED)
def test_bodies_of_known_clients_are_answered(sender: str, path: str, real: LiveService) -> None:
    body = RECORDED[sender]
    answer = post(real, path, body)
    assert answer.status_code == 200, answer.text
    count = 1 if isinstance(body["input"], str) else len(body["input"])
    assert len(answer.json()["data"]) == count
    assert answer.json()["model"] == body.get("model", "all-MiniLM-L6-v2")


def test_input_type_uses_the_models_prompt_where_it_has_one(tmp_path: Path) -> None:
    from test_numerics_embed import build

    build(tmp_path, "mean", prompts={"query": "the query: ", "document": "text: "})
    config = settings(model_embed=str(tmp_path / "model"), gpu_dtype="float32")
    with serving(config) as service:
        vectors = {
            kind: post(service, "/v1/embeddings", {"input": "cat", "input_type": kind}).json()["data"][0]["embedding"]
            for kind in ("query", "search_query", "document", "none such")
        }
        asked = native(service, ["cat"], prompt_name="query")[0]
        plain = native(service, ["cat"])[0]
    np.testing.assert_allclose(vectors["query"], asked, atol=1e-6)
    assert vectors["search_query"] == vectors["query"] != vectors["document"]
    np.testing.assert_allclose(vectors["none such"], plain, atol=1e-6)


def test_models_are_listed_and_found_by_id_with_what_they_can_do(client: openai.OpenAI, real: LiveService) -> None:
    assert [model.id for model in client.models.list()] == ["all-MiniLM-L6-v2"]
    card = client.models.retrieve("all-MiniLM-L6-v2").model_dump()
    assert card["tasks"]["embed"]["dimensions"] == 384
    assert card["tasks"]["bertscore"]["state"] == "ready"
    long = httpx.get(
        f"{real.url}/v1/models/sentence-transformers/all-MiniLM-L6-v2", headers={"Authorization": f"Bearer {KEY}"}
    )
    assert long.json()["id"] == "all-MiniLM-L6-v2"
    with pytest.raises(openai.NotFoundError, match="neither a default nor loaded"):
        client.models.retrieve("text-embedding-3-small")


def test_errors_come_in_openais_envelope(real: LiveService) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    cases = [
        (httpx.get(f"{real.url}/v1/models"), 401, "authentication_error"),
        (httpx.get(f"{real.url}/v1/nothing", headers=headers), 404, "not_found_error"),
        (httpx.get(f"{real.url}/v1/embeddings", headers=headers), 405, "invalid_request_error"),
        (post(real, "/v1/embeddings", {"input": 5}), 400, "invalid_request_error"),
        (post(real, "/v1/embeddings", {"input": []}), 400, "invalid_request_error"),
        (post(real, "/v1/embeddings", {"input": "a", "encoding_format": "hex"}), 400, "invalid_request_error"),
        (post(real, "/v1/embeddings", {"input": ["a", "x" * 10_001]}), 400, "invalid_request_error"),
        (post(real, "/v1/embeddings", {"input": "a", "model": "../etc"}), 400, "invalid_request_error"),
        (httpx.post(f"{real.url}/v1/embeddings", content=b"{", headers=headers), 400, "invalid_request_error"),
    ]
    for answer, status, kind in cases:
        error = answer.json()["error"]
        assert (answer.status_code, error["type"]) == (status, kind), answer.text
        assert error["message"]
        assert set(error) == {"message", "type", "param", "code"}
        assert answer.json()["detail"] in (error["message"], "Unauthorized")
    assert cases[6][0].json()["error"]["param"] == "input"
    assert "input[1] has 10001 characters" in cases[6][0].json()["error"]["message"]


def test_a_body_over_the_limit_is_413_in_the_envelope() -> None:
    with serving(settings(gpu_max_body_mb=0.001), FakeLoader()) as service:
        answer = post(service, "/v1/embeddings", {"input": "x" * 2000})
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "body_too_large"


@pytest.mark.anyio
async def test_busy_is_429_with_retry_after_under_v1_and_503_elsewhere() -> None:
    async with running(settings(gpu_max_concurrent=1, gpu_max_queue=0)) as service:
        engine = service.embed_engine
        engine.hold.clear()

        first = asyncio.create_task(service.embed("a"))
        await service.until(lambda: engine.begun > 0)
        openais = await service.client.post("/v1/embeddings", json={"input": "b"})
        ours = await service.embed("b")
        engine.hold.set()
        assert (await first).status_code == 200
    assert (openais.status_code, ours.status_code) == (429, 503)
    assert int(openais.headers["retry-after"]) >= 1
    assert openais.json()["error"]["type"] == "rate_limit_error"


def test_too_many_models_is_429_too() -> None:
    assert [openai_error(503, "a", code)[0] for code in ("too_many_models", "busy", "model_failed")] == [429, 429, 503]


def test_a_client_that_hits_busy_finishes_by_its_own_retries() -> None:
    loader = FakeLoader()
    with serving(settings(gpu_max_concurrent=1, gpu_max_queue=0, gpu_cache_mb=0), loader) as service:
        engine = loader.engines["embed:all-MiniLM-L6-v2"]
        engine.hold.clear()
        statuses: list[int] = []
        seen_busy = threading.Event()

        def record(response: Any) -> None:
            statuses.append(response.status_code)
            if response.status_code == 429:
                seen_busy.set()

        blocker = threading.Thread(
            target=lambda: httpx.post(f"{service.url}/embed", json={"texts": ["block"]}, timeout=60)
        )
        blocker.start()
        until(lambda: engine.begun > 0)
        hooked = openai.DefaultHttpxClient(event_hooks={"response": [record]})
        with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=5, http_client=hooked) as client:
            releaser = threading.Thread(target=lambda: (seen_busy.wait(30), engine.hold.set()))
            releaser.start()
            answer = client.embeddings.create(model="all-MiniLM-L6-v2", input=["a", "b"])
        blocker.join()
        releaser.join()
    assert len(answer.data) == 2
    assert 429 in statuses
    assert statuses[-1] == 200


QUERY, DOCUMENTS = "Where does the cat sit?", ["Revenue grew.", "The cat sits on the mat.", "Dogs bark at night."]


@pytest.mark.parametrize("method", [None, "cosine", "bertscore"])
def test_rerank_needs_no_further_model(method: str | None, real: LiveService) -> None:
    body = {"query": QUERY, "documents": [DOCUMENTS[0], {"text": DOCUMENTS[1]}, DOCUMENTS[2]], "return_documents": True}
    answer = post(real, "/v1/rerank", body if method is None else {**body, "method": method}).json()
    assert answer["method"] == (method or "cosine")
    results = answer["results"]
    scores = [entry["relevance_score"] for entry in results]
    assert scores == sorted(scores, reverse=True)
    assert results[0]["index"] == 1
    assert results[0]["document"] == {"text": DOCUMENTS[1]}
    best = post(real, "/v1/rerank", {**body, "top_n": 1, "method": method}).json()["results"]
    assert [entry["index"] for entry in best] == [1]


def test_rerank_refuses_what_it_cannot_do(real: LiveService) -> None:
    nothing = post(real, "/v1/rerank", {"query": "a", "documents": []})
    assert nothing.status_code == 400
    unnamed = post(real, "/v1/rerank", {"query": "a", "documents": ["b"], "method": "cross-encoder"})
    assert unnamed.status_code == 400
    assert "MODEL_RERANK" in unnamed.json()["error"]["message"]


def test_similarity_is_the_cosine_of_the_embeddings(real: LiveService) -> None:
    answer = post(real, "/similarity", {"source": QUERY, "texts": DOCUMENTS}).json()
    vectors = native(real, [QUERY, *DOCUMENTS])
    np.testing.assert_allclose(answer["similarities"], vectors[1:] @ vectors[0], atol=1e-6)
    assert answer["truncated"] == []
    assert post(real, "/similarity", {"source": "a", "texts": []}).json()["similarities"] == []


def test_explain_shows_the_tokens_matches_and_weights_that_make_the_score(real: LiveService) -> None:
    body = {"candidates": ["the cat sat", ""], "references": [["a cat", "cats sit"], ["a"]], "explain": True}
    answer = post(real, "/bertscore", body).json()
    first, second, empty = answer["explanations"]
    assert first["candidate_tokens"] == ["[CLS]", "the", "cat", "sat", "[SEP]"]
    assert first["candidate_weights"] == [0, 1, 1, 1, 0]
    similarity = np.array(first["similarity"])
    assert similarity.shape == (5, len(first["reference_tokens"]))
    assert first["candidate_matches"] == similarity.argmax(1).tolist()
    precisions = []
    for shown in (first, second):
        weights, best = np.array(shown["candidate_weights"]), np.array(shown["similarity"]).max(1)
        precisions.append((weights * best).sum() / weights.sum())
    assert answer["precision"][0] == pytest.approx(max(precisions), abs=1e-5)
    assert (second["index"], empty["index"]) == (0, 1)
    assert empty["similarity"] == []
    without = post(real, "/bertscore", {**body, "explain": False}).json()
    assert "explanations" not in without
    many = {"candidates": ["a"] * 6, "references": ["b"] * 6, "explain": True}
    assert post(real, "/bertscore", many).status_code == 422


def test_every_operation_is_described_with_an_example_that_works(real: LiveService) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    description = httpx.get(f"{real.url}/openapi.json", headers=headers).json()
    schemas = description["components"]["schemas"]
    posts = 0
    for path, operations in description["paths"].items():
        for method, operation in operations.items():
            assert operation["summary"], path
            assert operation["description"], path
            if method != "post":
                continue
            posts += 1
            schema = operation["requestBody"]["content"]["application/json"]["schema"]
            for shown in schema.get("oneOf", [schema]):  # one for each dialect that the path understands
                example = schemas[shown["$ref"].rsplit("/", 1)[1]]["example"]
                answer = post(real, path, example)
                assert answer.status_code == 200, (path, answer.text)
            assert {"200", "503"} <= set(operation["responses"]), path
    assert posts == 8

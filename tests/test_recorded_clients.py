"""Requests that real clients were recorded sending, word for word, and what each of them reads from the answer.

Open WebUI's is as its source has it. Those whose packages install quickly are driven for real by
`make test-clients`, from tests/clients.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import running, settings
from live import LiveService, post, serving
from live import answer as answered

KEY, MODEL = "sesame", "all-MiniLM-L6-v2"
QUERY, TEXTS = "Where does the cat sit?", ["Revenue grew.", "The cat sits on the mat.", "Dogs bark at night."]
NAMED = {"model": MODEL, "query": QUERY, "documents": TEXTS}
UNNAMED = {"query": QUERY, "texts": TEXTS}
SENTENCES = {"source_sentence": QUERY, "sentences": TEXTS}
INFINITY = {"input": TEXTS, "model": MODEL, "dimensions": 0, "modality": "text"}

Recorded = dict[str, tuple[str, dict[str, Any]]]

RERANK: Recorded = {  # answered with `results`
    "cohere 7 v2": ("/v2/rerank", {**NAMED, "top_n": 2, "max_tokens_per_doc": 100}),
    "cohere 7 v1": (
        "/v1/rerank",
        {
            **NAMED,
            "documents": [{"text": text, "title": "a title"} for text in TEXTS],
            "top_n": 2,
            "rank_fields": ["text"],
            "return_documents": True,
            "max_chunks_per_doc": 3,
        },
    ),
    "cohere 7 v1 without a model": ("/v1/rerank", {"query": QUERY, "documents": TEXTS}),
    "langchain-cohere 0.6": ("/v2/rerank", {**NAMED, "top_n": 2, "max_tokens_per_doc": None}),
    "langchain-community 0.4 jina": ("/v1/rerank", {**NAMED, "top_n": 2}),
    "llama-index cohere 0.10": ("/v2/rerank", {**NAMED, "top_n": 2}),
    "llama-index jina 0.6": ("/v1/rerank", {**NAMED, "top_n": 2}),
    "litellm 1.110 cohere": ("/v2/rerank", {**NAMED, "return_documents": True}),
    "litellm 1.110 jina": ("/v1/rerank", {**NAMED, "top_n": 1, "return_documents": True}),
    "litellm 1.110 vllm": ("/rerank", {**NAMED, "return_documents": True}),
    "open webui": ("/v1/rerank", {**NAMED, "top_n": len(TEXTS)}),
}
TEI_RERANK: Recorded = {  # answered with a bare list of index and score
    "haystack 3.4": ("/rerank", {**UNNAMED, "raw_scores": False}),
    "haystack 3.4 cutting": (
        "/rerank",
        {**UNNAMED, "raw_scores": False, "truncate": True, "truncation_direction": "Right"},
    ),
    "litellm 1.110 huggingface": (
        "/rerank",
        {**UNNAMED, "raw_scores": False, "truncation_direction": "Right", "return_text": True},
    ),
}
TEI_EMBED: Recorded = {  # answered with a bare list of vectors
    "huggingface_hub 2.4": ("/", {"inputs": TEXTS}),
    "huggingface_hub 2.4 with one text": ("/embed", {"inputs": QUERY}),
    "huggingface_hub 2.4 with all it has": (
        "/",
        {"inputs": QUERY, "normalize": True, "truncate": True, "truncation_direction": "right", "dimensions": 16},
    ),
    "haystack 3.4 query": ("/", {"inputs": QUERY, "normalize": False, "truncate": True}),
    "haystack 3.4 documents": ("/", {"inputs": TEXTS, "normalize": True, "truncate": True}),
    "llama-index tei 0.6": ("/embed", {"inputs": TEXTS, "truncate": True}),
}
TEI_SIMILARITY: Recorded = {  # answered with a bare list of numbers
    "huggingface_hub 2.4": ("/", {"inputs": SENTENCES, "parameters": {}}),
    "huggingface_hub 2.4 at the path": ("/similarity", {"inputs": SENTENCES, "parameters": {}}),
    "litellm 1.110 huggingface": ("/similarity", {"inputs": SENTENCES}),
}
EMBEDDINGS: Recorded = {  # answered as OpenAI does
    "infinity_client 0.0.78": ("/embeddings", INFINITY),
    "infinity_client 0.0.78 with all it has": ("/embeddings", {**INFINITY, "encoding_format": "float", "user": "u"}),
    "litellm 1.110 openai": ("/v1/embeddings", {"model": MODEL, "input": TEXTS}),
    "litellm 1.110 infinity": ("/embeddings", {"input": TEXTS, "model": MODEL}),
}


@pytest.fixture(scope="module")
def real() -> Iterator[LiveService]:
    """The real MiniLM behind a real socket and a key."""
    with serving(settings(api_key=KEY, gpu_dtype="float32")) as service:
        yield service


def vectors(service: LiveService, texts: list[str], **more: Any) -> np.ndarray:
    return np.array(answered(service, "/embed", {"texts": texts, **more})["embeddings"])


def cosines(service: LiveService) -> np.ndarray:
    query, *texts = vectors(service, [QUERY, *TEXTS], normalize=True)
    return np.array(texts) @ query


def check_ranking(service: LiveService, ranking: list[tuple[int, float]], count: int) -> None:
    expected = cosines(service)
    assert [index for index, _ in ranking] == np.argsort(-expected).tolist()[:count]
    np.testing.assert_allclose([score for _, score in ranking], np.sort(expected)[::-1][:count], atol=1e-6)


@pytest.mark.parametrize("sender", RERANK)
def test_rerank_requests_get_results_by_cosine(sender: str, real: LiveService) -> None:
    path, body = RERANK[sender]
    answer = answered(real, path, body)
    assert (answer["model"], answer["method"]) == (MODEL, "cosine")
    assert isinstance(answer["id"], str)
    results = answer["results"]
    check_ranking(real, [(one["index"], one["relevance_score"]) for one in results], body.get("top_n", len(TEXTS)))
    echoed = [one.get("document") for one in results]
    wanted = body.get("return_documents", False)
    assert echoed == [{"text": TEXTS[one["index"]]} if wanted else None for one in results]


@pytest.mark.parametrize("sender", TEI_RERANK)
def test_requests_to_rank_texts_get_a_bare_list_best_first(sender: str, real: LiveService) -> None:
    path, body = TEI_RERANK[sender]
    ranking = answered(real, path, body)
    check_ranking(real, [(one["index"], one["score"]) for one in ranking], len(TEXTS))
    assert [one.get("text") for one in ranking] == [
        TEXTS[one["index"]] if body.get("return_text") else None for one in ranking
    ]


@pytest.mark.parametrize("sender", TEI_EMBED)
def test_requests_with_inputs_get_a_bare_list_of_vectors(sender: str, real: LiveService) -> None:
    path, body = TEI_EMBED[sender]
    texts = [body["inputs"]] if isinstance(body["inputs"], str) else body["inputs"]
    options = {name: body[name] for name in ("normalize", "dimensions") if name in body}
    np.testing.assert_allclose(answered(real, path, body), vectors(real, texts, **options), atol=1e-5)


@pytest.mark.parametrize("sender", TEI_SIMILARITY)
def test_requests_to_compare_sentences_get_a_bare_list_of_numbers(sender: str, real: LiveService) -> None:
    np.testing.assert_allclose(answered(real, *TEI_SIMILARITY[sender]), cosines(real), atol=1e-6)


@pytest.mark.parametrize("sender", EMBEDDINGS)
def test_embeddings_requests_get_whole_vectors_in_openais_shape(sender: str, real: LiveService) -> None:
    answer = answered(real, *EMBEDDINGS[sender])
    np.testing.assert_allclose([one["embedding"] for one in answer["data"]], vectors(real, TEXTS), atol=1e-6)
    assert [(one["object"], one["index"]) for one in answer["data"]] == [("embedding", i) for i in range(len(TEXTS))]
    assert (answer["object"], answer["model"], set(answer["usage"])) == (
        "list",
        MODEL,
        {"prompt_tokens", "total_tokens"},
    )


def test_infinitys_client_lists_models_without_v1(real: LiveService) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    short, long = (httpx.get(f"{real.url}{path}", headers=headers).json() for path in ("/models", "/v1/models"))
    assert short == long
    assert [model["id"] for model in short["data"]] == [MODEL]


REFUSALS = {  # what is wrong, and words that say so
    "an unknown model": ({"model": "no-such/model"}, "no-such/model"),
    "a text too long": ({"query": "x" * 10_001}, "10001 characters"),
    "a field of another type": ({"query": 5}, "query"),
}


@pytest.mark.parametrize("wrong", REFUSALS)
@pytest.mark.parametrize("sender", ["llama-index jina 0.6", "cohere 7 v2", "litellm 1.110 vllm"])
def test_refusals_of_rerank_requests_say_why_in_detail_and_in_error(wrong: str, sender: str, real: LiveService) -> None:
    (change, words), (path, body) = REFUSALS[wrong], RERANK[sender]
    answer = post(real, path, body | change)
    assert answer.status_code in (400, 404)
    assert words in answer.json()["detail"]
    assert answer.json()["detail"] == answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/", {"inputs": "x" * 10_001}, "10001 characters"),
        ("/embed", {"inputs": [QUERY, 5], "truncate": True}, "inputs"),
        ("/embed", {"inputs": QUERY, "dimensions": 385}, "385"),
        ("/", {"inputs": {"source_sentence": QUERY, "sentences": 5}, "parameters": {}}, "sentences"),
        ("/similarity", {"inputs": {"source_sentence": QUERY}, "parameters": {}}, "sentences"),
        ("/rerank", {"query": QUERY, "texts": [], "raw_scores": False}, "texts"),
        ("/rerank", {**UNNAMED, "truncate": True, "truncation_direction": "Left"}, "truncation_direction"),
    ],
)
def test_refusals_of_text_embeddings_inferences_requests_say_why_in_error(
    path: str, body: Any, words: str, real: LiveService
) -> None:
    answer = post(real, path, body)
    assert answer.status_code in (400, 413, 422)
    assert words in answer.json()["error"]
    assert set(answer.json()) == {"error", "error_type"}


@pytest.mark.parametrize(
    ("path", "body"), [call for group in (RERANK, TEI_RERANK, TEI_EMBED) for call in group.values()]
)
def test_a_wrong_key_is_unauthorized_in_detail_on_every_path(path: str, body: Any, real: LiveService) -> None:
    answer = post(real, path, body, key="wrong")
    assert (answer.status_code, answer.json()["detail"]) == (401, "Unauthorized")


@pytest.mark.anyio
async def test_when_busy_every_client_gets_the_status_and_the_words_that_it_understands() -> None:
    asked: list[tuple[str, dict[str, Any], int, str]] = [
        *((path, body, 429, "detail") for path, body in (RERANK | EMBEDDINGS).values()),
        *(
            (path, body, 429, "error")
            for group in (TEI_RERANK, TEI_EMBED, TEI_SIMILARITY)
            for path, body in group.values()
        ),
        ("/embed", {"texts": TEXTS}, 503, "detail"),
        ("/similarity", {"source": QUERY, "texts": TEXTS}, 503, "detail"),
    ]
    async with running(settings(gpu_max_concurrent=1, gpu_max_queue=0)) as service:
        service.embed_engine.hold.clear()
        first = asyncio.create_task(service.embed("it holds the only slot"))
        await service.until(lambda: service.embed_engine.begun > 0)
        for path, body, status, field in asked:
            answer = await service.client.post(path, json=body)
            assert answer.status_code == status, (path, answer.text)
            assert "GPU busy" in answer.json()[field]
            assert int(answer.headers["Retry-After"]) >= 1
        service.embed_engine.hold.set()
        assert (await first).status_code == 200

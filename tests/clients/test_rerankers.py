"""Rerankers of Cohere, Jina, LiteLLM, LlamaIndex and Haystack, as their documentation sets them up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cohere
import litellm
import numpy as np
import pytest
from conftest import DOCUMENTS, KEY, MODEL, QUERY, Service
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.postprocessor.jinaai_rerank import JinaRerank

Ranking = list[tuple[int, float]]
Reranker = Callable[..., Ranking]


def cohere_v1(url: str, key: str = KEY, model: str = MODEL, **more: Any) -> Ranking:
    answer = cohere.Client(api_key=key, base_url=url).rerank(model=model, query=QUERY, documents=DOCUMENTS, **more)
    return [(result.index, result.relevance_score) for result in answer.results]


def cohere_v2(url: str, key: str = KEY, model: str = MODEL, **more: Any) -> Ranking:
    answer = cohere.ClientV2(api_key=key, base_url=url).rerank(model=model, query=QUERY, documents=DOCUMENTS, **more)
    return [(result.index, result.relevance_score) for result in answer.results]


def through_litellm(provider: str, path: str = "") -> Reranker:
    """LiteLLM speaking as one of its providers, with `api_base` ending in `path`."""

    def rerank(url: str, key: str = KEY, model: str = MODEL, **more: Any) -> Ranking:
        answer = litellm.rerank(
            f"{provider}/{model}", QUERY, DOCUMENTS, api_base=url + path, api_key=key, num_retries=0, **more
        )
        return [(result["index"], result["relevance_score"]) for result in answer.results]

    return rerank


def llama_index_jina(url: str, key: str = KEY, model: str = MODEL, top_n: int = 3) -> Ranking:
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in DOCUMENTS]
    reranker = JinaRerank(api_key=key, model=model, base_url=f"{url}/v1", top_n=top_n)
    return [(DOCUMENTS.index(found.text), found.score) for found in reranker.postprocess_nodes(nodes, query_str=QUERY)]


def haystack_tei(url: str, key: str = KEY, top_n: int = 3) -> Ranking:
    rankers = pytest.importorskip("haystack_integrations.components.rankers.huggingface_api")
    from haystack import Document
    from haystack.utils import Secret

    ranker = rankers.HuggingFaceTEIRanker(url=url, token=Secret.from_token(key), max_retries=1)
    answer = ranker.run(query=QUERY, documents=[Document(content=text) for text in DOCUMENTS], top_k=top_n)
    return [(DOCUMENTS.index(found.content), found.score) for found in answer["documents"]]


NAMING = {  # those that must name a model
    "cohere v1": cohere_v1,
    "cohere v2": cohere_v2,
    "litellm cohere": through_litellm("cohere"),
    "litellm jina": through_litellm("jina_ai"),
    "litellm vllm": through_litellm("hosted_vllm"),
    "litellm vllm under v1": through_litellm("hosted_vllm", "/v1"),
    "llama-index jina": llama_index_jina,
}
NAMELESS = {"litellm tei": through_litellm("huggingface"), "haystack tei": haystack_tei}
UNAUTHORIZED = (cohere.UnauthorizedError, litellm.AuthenticationError, RuntimeError)
REFUSED = (cohere.NotFoundError, litellm.NotFoundError, RuntimeError)


@pytest.mark.parametrize("rerank", [pytest.param(call, id=name) for name, call in (NAMING | NAMELESS).items()])
def test_documents_come_best_first_with_their_cosines(rerank: Reranker, service: Service) -> None:
    ranking, expected = rerank(service.url), service.cosines()
    assert [index for index, _ in ranking] == np.argsort(-expected).tolist()
    assert ranking[0][0] == 1
    np.testing.assert_allclose([score for _, score in ranking], np.sort(expected)[::-1], atol=1e-6)


@pytest.mark.parametrize("name", sorted(NAMING))
def test_only_the_best_are_answered_on_demand(name: str, service: Service) -> None:
    assert [index for index, _ in NAMING[name](service.url, top_n=1)] == [1]


@pytest.mark.parametrize("name", sorted(NAMING))
def test_a_model_that_cannot_be_had_is_refused_in_words_that_the_client_shows(name: str, service: Service) -> None:
    with pytest.raises(REFUSED, match="no-such/reranker"):
        NAMING[name](service.url, model="no-such/reranker")


@pytest.mark.parametrize("rerank", [pytest.param(call, id=name) for name, call in (NAMING | NAMELESS).items()])
def test_a_wrong_key_is_what_the_client_calls_unauthorized(rerank: Reranker, service: Service) -> None:
    with pytest.raises(UNAUTHORIZED, match="Unauthorized"):
        rerank(service.url, key="wrong")


def test_cohere_v1_sends_objects_and_gets_their_texts_back(service: Service) -> None:
    documents = [{"text": text, "title": "a title"} for text in DOCUMENTS]
    answer = cohere.Client(api_key=KEY, base_url=service.url).rerank(
        model=MODEL,
        query=QUERY,
        documents=documents,
        top_n=1,
        rank_fields=["text"],
        return_documents=True,
        max_chunks_per_doc=2,
    )
    assert [result.document.text for result in answer.results] == [DOCUMENTS[1]]

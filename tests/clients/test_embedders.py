"""Embedders of huggingface_hub, Haystack and LlamaIndex for text-embeddings-inference, and LiteLLM's."""

from __future__ import annotations

import litellm
import numpy as np
import pytest
from conftest import DOCUMENTS, KEY, MODEL, QUERY, Service
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from llama_index.embeddings.text_embeddings_inference import TextEmbeddingsInference


@pytest.mark.parametrize("path", ["", "/", "/embed"])
def test_huggingface_hub_gets_the_vectors_of_embed(path: str, service: Service) -> None:
    client = InferenceClient(model=service.url + path, token=KEY)
    np.testing.assert_allclose(client.feature_extraction(QUERY), service.embed([QUERY]), atol=1e-6)
    np.testing.assert_allclose(client.feature_extraction(DOCUMENTS), service.embed(DOCUMENTS), atol=1e-6)


def test_huggingface_hub_sets_every_option(service: Service) -> None:
    client = InferenceClient(model=service.url, token=KEY)
    raw = client.feature_extraction(QUERY, normalize=False, truncate=True, truncation_direction="right")
    np.testing.assert_allclose(raw, service.embed([QUERY], normalize=False), atol=1e-5)
    short = client.feature_extraction(QUERY, normalize=True, dimensions=16)
    np.testing.assert_allclose(short, service.embed([QUERY], normalize=True, dimensions=16), atol=1e-6)


@pytest.mark.parametrize("path", ["", "/similarity"])
def test_huggingface_hub_compares_sentences(path: str, service: Service) -> None:
    client = InferenceClient(model=service.url + path, token=KEY)
    found = client.sentence_similarity(QUERY, other_sentences=DOCUMENTS)
    np.testing.assert_allclose(found, service.cosines(), atol=1e-6)


def test_huggingface_hub_shows_what_was_wrong(service: Service) -> None:
    client = InferenceClient(model=service.url, token=KEY)
    with pytest.raises(HfHubHTTPError, match="10001 characters"):
        client.feature_extraction("x" * 10_001)
    with pytest.raises(HfHubHTTPError, match="385"):
        client.feature_extraction(QUERY, dimensions=385)
    with pytest.raises(HfHubHTTPError, match="no such prompt"):
        client.feature_extraction(QUERY, prompt_name="no such prompt")


@pytest.mark.parametrize("path", ["", "/embed", "/similarity"])
def test_huggingface_hub_calls_a_wrong_key_unauthorized(path: str, service: Service) -> None:
    with pytest.raises(HfHubHTTPError, match="401 Unauthorized"):
        InferenceClient(model=service.url + path, token="wrong").feature_extraction(QUERY)


def test_haystack_embeds_queries_and_documents(service: Service) -> None:
    embedders = pytest.importorskip("haystack_integrations.components.embedders.huggingface_api")
    from haystack import Document
    from haystack.utils import Secret

    server = {"api_type": "text_embeddings_inference", "api_params": {"url": service.url}}
    token = Secret.from_token(KEY)
    query = embedders.HuggingFaceAPITextEmbedder(**server, token=token).run(text=QUERY)["embedding"]
    np.testing.assert_allclose(query, service.embed([QUERY], normalize=False)[0], atol=1e-5)  # its default
    embedder = embedders.HuggingFaceAPIDocumentEmbedder(**server, token=token, normalize=True, progress_bar=False)
    documents = embedder.run(documents=[Document(content=text) for text in DOCUMENTS])["documents"]
    found = [document.embedding for document in documents]
    np.testing.assert_allclose(found, service.embed(DOCUMENTS, normalize=True), atol=1e-6)


def test_llama_index_embeds_queries_and_documents(service: Service) -> None:
    embedder = TextEmbeddingsInference(model_name=MODEL, base_url=service.url, auth_token=KEY)
    np.testing.assert_allclose(embedder.get_query_embedding(QUERY), service.embed([QUERY])[0], atol=1e-6)
    found = embedder.get_text_embedding_batch(DOCUMENTS)
    np.testing.assert_allclose(found, service.embed(DOCUMENTS), atol=1e-6)


@pytest.mark.parametrize(("provider", "path"), [("openai", "/v1"), ("hosted_vllm", "/v1"), ("infinity", "")])
def test_litellm_embeds(provider: str, path: str, service: Service) -> None:
    answer = litellm.embedding(f"{provider}/{MODEL}", DOCUMENTS, api_base=service.url + path, api_key=KEY)
    np.testing.assert_allclose([entry["embedding"] for entry in answer.data], service.embed(DOCUMENTS), atol=1e-6)


def test_litellm_shows_which_model_cannot_be_had_and_that_a_key_is_wrong(service: Service) -> None:
    base = f"{service.url}/v1"
    with pytest.raises(litellm.NotFoundError, match="no-such/embedder"):
        litellm.embedding("openai/no-such/embedder", ["a"], api_base=base, api_key=KEY, max_retries=0)
    with pytest.raises(litellm.AuthenticationError, match="Unauthorized"):
        litellm.embedding(f"openai/{MODEL}", ["a"], api_base=base, api_key="wrong", max_retries=0)


def test_litellm_compares_sentences_as_text_embeddings_inference_does(service: Service) -> None:
    answer = litellm.embedding(
        "huggingface/tei",
        [QUERY, *DOCUMENTS],
        input_type="sentence-similarity",
        api_base=f"{service.url}/similarity",
        api_key=KEY,
    )
    np.testing.assert_allclose([entry["embedding"] for entry in answer.data], service.cosines(), atol=1e-6)

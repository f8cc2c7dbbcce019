"""A model that a request names and that is not to be had: 404 at once, with the reason and what is here."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from conftest import FakeEngine, FakeLoader, running, settings

import gpu_service
from gpu_engine.model_files import Hub, ModelName, find_model
from gpu_engine.work import HubUnreachable, ModelError

pytestmark = pytest.mark.anyio


def not_to_be_had(response: httpx.Response, code: str, *words: str) -> None:
    assert response.status_code == 404, response.text
    assert "Retry-After" not in response.headers, "clients would wait for what does not come"
    body = response.json()
    assert body.get("code", body.get("error", {}) and body["error"]["code"]) == code
    for expected in words:
        assert expected in body["detail"]


def only_minilm(hub: Hub) -> gpu_service.Loader:
    """Fakes for the defaults; the real search for every other model."""

    def load(kind: str, name: ModelName, progress: Any) -> FakeEngine:
        if name.public != "all-MiniLM-L6-v2":
            find_model(kind, name, hub, progress)
        return FakeEngine(kind)

    return load


async def test_with_the_hub_off_a_name_is_404_as_it_was_typed_with_the_reason_and_what_is_loaded() -> None:
    async with running(settings(), only_minilm(Hub())) as service:
        for typed in ("no/such", "nosuch", "sentence-transformers/nosuch"):
            words = [f"The model {typed} is not on this machine", "HF_HUB_OFFLINE", "Loaded: all-MiniLM-L6-v2;"]
            response = await service.embed("a", model=typed)
            not_to_be_had(response, "model_unavailable", *words, "/v1/models")
        openais = await service.client.post("/v1/embeddings", json={"input": "a", "model": "no/such"})
        not_to_be_had(openais, "model_unavailable", "no/such")
        assert (await service.embed("a")).status_code == 200


async def test_a_hub_that_could_not_be_reached_is_not_asked_again_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def refuse(self: Any, repo: str, timeout: float) -> Any:
        asked.append(repo)
        raise httpx.ConnectError("refused by 10.0.0.1")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
    hub = Hub()
    async with running(settings(), only_minilm(hub)) as service:
        for typed in ("no/such", "no/other"):
            response = await service.embed("a", model=typed)
            not_to_be_had(response, "model_unavailable", typed, "can't be reached: ConnectError")
            assert "10.0.0.1" not in response.text
    assert asked == ["no/such"]
    later = Hub(memory_s=0)
    for _ in range(2):
        with pytest.raises(HubUnreachable):
            later.download("no/such", lambda phase, fraction: None)
    assert asked == ["no/such"] * 3


@pytest.mark.parametrize("code", ["model_not_found", "model_gated"])
async def test_a_model_that_the_hub_refuses_for_good_is_404(code: str) -> None:
    async with running(settings()) as service:
        service.loader.error = ModelError("The hub says no.", code)
        not_to_be_had(await service.embed("a", model="no/such"), code, "no/such", "Loaded: all-MiniLM-L6-v2")


@pytest.mark.parametrize("typed", ["all-minilm-l6-v2", "Sentence-Transformers/all-MiniLM-L6-v2"])
async def test_a_name_that_differs_in_case_only_gets_the_right_one(typed: str) -> None:
    async with running(settings(), only_minilm(Hub())) as service:
        response = await service.embed("a", model=typed)
        not_to_be_had(response, "model_unavailable", "Did you mean all-MiniLM-L6-v2?")


async def test_an_alias_that_differs_in_case_only_is_named_and_a_name_is_no_hint_to_itself() -> None:
    aliases = settings(model_aliases="Our-Embedder=all-MiniLM-L6-v2", model_bertscore="some/scorer")
    async with running(aliases, only_minilm(Hub())) as service:
        response = await service.embed("a", model="our-embedder")
        not_to_be_had(response, "model_unavailable", "Did you mean Our-Embedder?")
        response = await service.embed("a", model="some/scorer")  # of which an embedder can't be made
        assert "Did you mean" not in response.text


@pytest.mark.parametrize("typed", ["all-minilm", "Nomic-Embed-Text", "text-embedding-3-small", "rerank-v3.5"])
async def test_names_of_other_services_get_a_hint(typed: str) -> None:
    async with running(settings(), only_minilm(Hub())) as service:
        response = await service.embed("a", model=typed)
        not_to_be_had(response, "model_unavailable", f"MODEL_ALIASES={typed}=all-MiniLM-L6-v2")
        tagged = await service.embed("a", model=f"{typed}:latest")
        assert (tagged.status_code, tagged.json()["code"]) == (400, "invalid_model_name")
        assert f"MODEL_ALIASES={typed}:latest=all-MiniLM-L6-v2" in tagged.json()["detail"]


@pytest.mark.parametrize(
    "typed", ["embed-" + "-v1:" * 900 + "\n", "text-embedding-" + ":" * 40_000 + "\n", "a-" * 9000]
)
async def test_a_name_that_was_made_to_be_looked_at_for_long_is_refused_at_once(typed: str) -> None:
    async with running(settings()) as service:
        response = await service.embed("a", model=typed)  # it took minutes, with every thread of the process held
    assert (response.status_code, response.json()["code"]) == (400, "invalid_model_name")


async def test_a_hint_names_the_model_of_the_kind_that_was_asked_for() -> None:
    async with running(settings(model_bertscore="some/scorer", model_rerank="some/reranker"), FakeLoader()) as service:
        service.loader.error = ModelError("none", "model_not_found")
        body = {"query": "a", "documents": ["b"], "model": "rerank-v3.5"}
        ranked = await service.client.post("/v2/rerank", json=body)
        not_to_be_had(ranked, "model_not_found", "MODEL_ALIASES=rerank-v3.5=some/reranker")
        scored = await service.bertscore("a", model="text-embedding-3-small")
        not_to_be_had(scored, "model_not_found", "MODEL_ALIASES=text-embedding-3-small=some/scorer")


async def test_an_alias_is_the_model_that_it_stands_for_under_the_name_that_was_asked() -> None:
    aliases = "text-embedding-3-small=all-MiniLM-L6-v2, nomic-embed-text:latest = some/model"
    async with running(settings(model_aliases=aliases, gpu_allowed_models="all-MiniLM-L6-v2")) as service:
        answer = await service.embed("a", model="text-embedding-3-small")
        assert (answer.status_code, answer.json()["model"]) == (200, "text-embedding-3-small")
        assert (await service.embed("a", model="nomic-embed-text:latest")).status_code == 200
        assert service.loader.loads[-1] == "embed:some/model"
        assert (await service.embed("a", model="some/other")).status_code == 403
        card = await service.client.get("/v1/models/text-embedding-3-small")
        assert card.json()["id"] == "all-MiniLM-L6-v2"
        scored = (await service.bertscore("a", model="text-embedding-3-small")).json()
        assert (scored["model"], scored["hash"].split("_L")[0]) == ("text-embedding-3-small", "all-MiniLM-L6-v2")
        body = {"query": "a", "documents": ["b"], "model": "text-embedding-3-small"}
        ranked = (await service.client.post("/v2/rerank", json=body)).json()
        assert (ranked["method"], ranked["model"]) == ("cosine", "text-embedding-3-small")


async def test_models_are_listed_without_v1_too() -> None:
    async with running(settings(), FakeLoader()) as service:
        for path in ("/models", "/models/all-MiniLM-L6-v2"):
            assert (await service.client.get(path)).json() == (await service.client.get(f"/v1{path}")).json()
        missing = await service.client.get("/models/none")
        assert missing.json()["error"]["message"] == missing.json()["detail"]


class Unspeakable(Exception):
    """An error that fails when it is shown."""

    def __str__(self) -> str:
        raise RuntimeError("no words")


async def test_a_load_whose_failure_cannot_even_be_explained_ends_all_the_same() -> None:
    async with running(settings()) as service:
        service.loader.error = MemoryError()
        assert (await service.embed("a", model="some/large")).json()["code"] == "model_out_of_memory"
        service.loader.error = Unspeakable()
        response = await service.embed("a", model="some/model")
        assert (response.status_code, response.json()["code"]) == (503, "model_failed")

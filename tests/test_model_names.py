"""Names that are no hub id, and models that are not allowed: 400 and 403, and nothing is loaded."""

from __future__ import annotations

import pytest
from conftest import JSON, refused, running, settings

pytestmark = pytest.mark.anyio


NOT_NAMES = [
    "",
    " ",
    "..",
    "../x",
    "a/../b",
    "/etc/passwd",
    "/root/model",
    "./model",
    "~/model",
    "C:\\model",
    "\\\\host\\share",
    "https://example.com/model",
    "file:///etc/passwd",
    "owner/name/more",
    "owner/",
    "/name",
    "a--b",
    ".hidden",
    "owner/.hidden",
    "a\0b",
    "a\nb",
    "name\n",
    "a\x1b[31mb",
    "a\u202eb",
    "модель",
    "x" * 10_240,
    "x" * 97,
    "a b",
    "a%2Fb",
    "a?b",
    "../../etc/passwd",
    "%2e%2e%2fetc",
    "$(id)",
]


@pytest.mark.parametrize("name", NOT_NAMES, ids=lambda name: ascii(name)[:30])
async def test_a_model_name_that_is_not_a_hub_id_is_400(name: str) -> None:
    async with running(settings()) as service:
        for response in (
            await service.embed("a", model=name),
            await service.bertscore("a", model_type=name),
            await service.bertscore("a", model=name),
            await service.client.post("/similarity", json={"source": "a", "texts": ["b"], "model": name}),
            await service.client.post("/v1/embeddings", json={"input": "a", "model": name}),
            await service.client.post("/v1/rerank", json={"query": "a", "documents": ["b"], "model": name}),
        ):
            # The name itself is shown, in part and escaped.
            body = response.json()
            assert response.status_code == 400
            assert body.get("error", body)["code"] == "invalid_model_name"
            assert len(response.content) < 600
        assert len(service.loader.loads) == 2


async def test_a_model_name_with_a_lone_surrogate_is_400() -> None:
    async with running(settings()) as service:
        body = r'{"texts":["ok"],"model":"a\udfff"}'
        refused(await service.client.post("/embed", content=body, headers=JSON), 400, "invalid_model_name")


async def test_a_model_outside_the_allowed_patterns_is_403() -> None:
    async with running(settings(gpu_allowed_models="BAAI/*, intfloat/e5-small")) as service:
        for name in ("evil/model", "all-mpnet-base-v2", "intfloat/e5-large"):
            assert name in refused(await service.embed("a", model=name), 403, "model_not_allowed")
        for name in ("BAAI/bge-small-en", "intfloat/e5-small", "all-MiniLM-L6-v2"):
            assert (await service.embed("a", model=name)).status_code == 200, name
        assert len(service.loader.loads) == 4


async def test_a_pattern_allows_the_short_and_the_long_name() -> None:
    async with running(settings(gpu_allowed_models="sentence-transformers/*")) as service:
        for name in ("all-mpnet-base-v2", "sentence-transformers/all-mpnet-base-v2"):
            assert (await service.embed("a", model=name)).status_code == 200

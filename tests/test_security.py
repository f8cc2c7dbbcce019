"""Secrets stay inside, and every answer has the headers of one that is nobody else's business."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from conftest import Service, refused, running, settings

pytestmark = pytest.mark.anyio

KEY, TOKEN = "a-key-nobody-may-see", "hf_a-token-nobody-may-see"


async def answers(service: Service) -> list[httpx.Response]:
    """Every page and every kind of refusal, with the right key and with a wrong one."""
    client = service.client
    pages = ("/health", "/ready", "/info", "/status", "/openapi.json", "/docs", "/v1/models", "/v1/no", "/no")
    bodies: list[Any] = [{}, {"texts": ["a"]}, {"texts": ["a"] * 101}, {"texts": ["a"], "model": "../a"}, []]
    posts = [b"{", *(json.dumps(body).encode() for body in bodies)]
    collected = []
    for key in ({"X-API-Key": KEY}, {"Authorization": f"Bearer {KEY}"}, {"X-API-Key": KEY[:-1]}):
        collected += [await client.get(path, headers=key, params={"api_key": KEY}) for path in pages]
        headers = {**key, "Content-Type": "application/json"}
        for path in ("/embed", "/bertscore", "/v1/embeddings"):
            collected += [await client.post(path, headers=headers, content=body) for body in posts]
    return collected


async def test_no_answer_holds_the_key_or_the_hubs_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    async with running(settings(api_key=f"{KEY}, another-{KEY}")) as service:
        collected = await answers(service)
    assert {200, 400, 401, 404, 422} <= {response.status_code for response in collected}
    for response in collected:
        written = response.text + str(response.headers)
        assert KEY not in written
        assert TOKEN not in written


async def test_no_answer_is_cached_sniffed_or_offered_to_other_origins() -> None:
    async with running(settings(api_key=KEY)) as service:
        for response in await answers(service):
            page = response.status_code == 200 and response.url.path == "/docs"  # says nothing of anybody
            assert response.headers["Cache-Control"] == ("private, no-cache" if page else "no-store")
            assert response.headers["X-Content-Type-Options"] == "nosniff"
            assert response.headers["X-Request-Id"]
            assert "Server" not in response.headers
            assert not [name for name in response.headers if name.lower().startswith("access-control-")]


async def test_a_browsers_preflight_and_its_simple_posts_are_refused() -> None:
    async with running(settings()) as service:
        asking = {"Origin": "http://elsewhere", "Access-Control-Request-Method": "POST"}
        preflight = await service.client.options("/embed", headers=asking)
        assert preflight.status_code == 405
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=a"):
            response = await service.client.post("/embed", content=b'{"texts": ["a"]}', headers={"Content-Type": kind})
            assert "application/json" in refused(response, 422, "invalid_content_type")
        nameless = await service.client.post("/embed", content=b'{"texts": ["a"]}')
        assert nameless.status_code == 422
        assert not service.embed_engine.jobs

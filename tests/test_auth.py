"""The API key: nothing but /health answers without it, whatever is sent in its place."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest
from conftest import Service, running, settings

import gpu_service
from gpu_service import speaks_openai

pytestmark = pytest.mark.anyio

UNKNOWN = ["/", "/nothing", "/v1/embeddings", "/metrics", "/admin", "/favicon.ico", "/health/", "/healthz", "/HEALTH"]
UNKNOWN += ["//health", "/health/../embed", "/embed/", "/docs/", "/static/../health", "/%2e%2e/health", "/é"]


def every_path(service: Service) -> list[tuple[str, str]]:
    """(method, path) of every route of the app but /health, and of some that don't exist."""
    routes = [(method, route.path) for route in flat(service.app.routes) for method in route.methods]
    assert ("POST", "/embed") in routes
    assert ("GET", "/openapi.json") in routes
    known = [(method, path) for method, path in routes if path != "/health"]
    return known + [(method, path) for path in UNKNOWN for method in ("GET", "POST", "OPTIONS")]


def flat(routes: Any) -> list[Any]:
    """Routes that have a path, those of included routers too."""
    found: list[Any] = []
    for route in routes:
        nested = getattr(route, "original_router", None)
        found += flat(nested.routes) if nested is not None else [route]
    return found


REFUSAL = {"detail": "Unauthorized", "hint": "send the header X-API-Key: KEY, or Authorization: Bearer KEY"}
WRONG: dict[str, list[tuple[bytes, bytes]]] = {
    "no header": [],
    "a wrong key": [(b"x-api-key", b"wrong")],
    "an empty key": [(b"x-api-key", b"")],
    "the start of the key": [(b"x-api-key", b"secre")],
    "the key and more": [(b"x-api-key", b"secret-key2")],
    "the key in capitals": [(b"x-api-key", b"SECRET-KEY")],
    "bytes that are not UTF-8": [(b"x-api-key", b"\xff\xfe\x80secret-key")],
    "a bearer that is not UTF-8": [(b"authorization", b"Bearer \xff\xfe")],
    "a wrong bearer": [(b"authorization", b"Bearer wrong")],
    "twenty thousand bytes": [(b"x-api-key", b"k" * 20_000)],
    "the key twice": [(b"x-api-key", b"secret-key,secret-key")],
    "an empty bearer": [(b"authorization", b"Bearer ")],
    "the key as basic authentication": [(b"authorization", b"Basic secret-key")],
    "the key without a scheme": [(b"authorization", b"secret-key")],
    "the key under another name": [(b"api-key", b"secret-key")],
}


@pytest.mark.parametrize("headers", WRONG.values(), ids=WRONG.keys())
async def test_every_path_but_health_answers_401_to(headers: list[tuple[bytes, bytes]]) -> None:
    async with running(settings(api_key="secret-key")) as service:
        for method, path in every_path(service):
            status, _, body = await service.raw(path, method=method, headers=headers)
            answer = orjson.loads(body)
            message = answer.pop("error")["message"] if speaks_openai(path) else answer["hint"]
            assert (status, answer) == (401, REFUSAL), (method, path)
            assert REFUSAL["hint"] in message


async def test_health_needs_no_key() -> None:
    async with running(settings(api_key="secret-key")) as service:
        for headers in WRONG.values():
            status, _, _ = await service.raw("/health", headers=headers)
            assert status == 200


async def test_a_request_without_the_key_reaches_no_engine_and_no_model() -> None:
    async with running(settings(api_key="secret-key")) as service:
        for name in ("all-MiniLM-L6-v2", "BAAI/bge-small-en"):
            response = await service.client.post("/embed", json={"texts": ["a"], "model": name})
            assert response.status_code == 401
        assert service.embed_engine.jobs == []
        assert len(service.loader.loads) == 2
        assert gpu_service.view_status(service.app.state.runtime)["recent_jobs"] == []


async def test_a_refused_request_is_refused_before_its_body_is_read() -> None:
    async def receive() -> Any:
        raise AssertionError("the body was asked for")

    async with running(settings(api_key="secret-key")) as service:
        status, _, _ = await service.raw("/embed", method="POST", receive=receive)
        assert status == 401


@pytest.mark.parametrize(
    "header",
    [
        ("X-API-Key", "secret-key"),
        ("x-api-key", "secret-key"),
        ("Authorization", "Bearer secret-key"),
        ("authorization", "bearer secret-key"),
    ],
)
async def test_the_key_opens_every_path_as(header: tuple[str, str]) -> None:
    async with running(settings(api_key="secret-key")) as service:
        service.client.headers.update([header])
        for path in ("/ready", "/info", "/status", "/docs", "/openapi.json"):
            assert (await service.client.get(path)).status_code == 200, path
        assert (await service.embed("a")).status_code == 200
        assert (await service.bertscore("a")).status_code == 200
        assert (await service.client.get("/nothing")).status_code == 404


async def test_each_of_several_keys_is_accepted_and_nothing_between_them() -> None:
    async with running(settings(api_key="first, second ,third,")) as service:
        answers = {}
        for key in ("first", "second", "third", "first, second", "first,second", "", " ", ",", "fourth"):
            answers[key] = (await service.client.get("/status", headers={"X-API-Key": key})).status_code
    accepted = [key for key, status in answers.items() if status == 200]
    assert accepted == ["first", "second", "third"]
    assert set(answers.values()) == {200, 401}


async def test_a_key_outside_ascii_is_sent_as_utf_8() -> None:
    async with running(settings(api_key="schlüssel")) as service:
        for sent, expected in (("schlüssel".encode(), 200), ("schlüssel".encode("latin-1"), 401)):
            status, _, _ = await service.raw("/status", headers=[(b"x-api-key", sent)])
            assert status == expected


@pytest.mark.parametrize("blanks", [b" %s ", b"\t%s", b"%s \t "])
@pytest.mark.parametrize("header", [(b"x-api-key", b""), (b"authorization", b"Bearer ")])
async def test_blanks_around_a_key_are_no_part_of_it(blanks: bytes, header: tuple[bytes, bytes]) -> None:
    async with running(settings(api_key="secret-key")) as service:
        for key, expected in ((b"secret-key", 200), (b"secret key", 401), (b"", 401)):
            status, _, _ = await service.raw("/status", headers=[(header[0], header[1] + blanks % key)])
            assert status == expected, key


async def test_without_a_key_in_the_environment_everything_is_open() -> None:
    async with running(settings()) as service:
        assert (await service.embed("a")).status_code == 200


async def test_a_websocket_without_the_key_is_closed() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async with running(settings(api_key="secret-key")) as service:
        scope = {"type": "websocket", "path": "/embed", "headers": [], "query_string": b"", "subprotocols": []}
        await asyncio.wait_for(service.app(scope, receive, send), 10)
    assert [message["type"] for message in sent] == ["websocket.close"]

"""What stands beside an answer, and the answer as an array: timing, tokens, truncation, npy."""

from __future__ import annotations

import asyncio
import io
import json
import re
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import running, settings, value_of
from live import LiveService, serving

import gpu_service

pytestmark = pytest.mark.anyio

NPY = {"Accept": "application/x-npy"}
ENDPOINTS: dict[str, dict[str, Any]] = {
    "/embed": {"texts": ["one", "two"]},
    "/bertscore": {"candidates": ["one"], "references": ["two"]},
    "/similarity": {"source": "one", "texts": ["two"]},
    "/v1/embeddings": {"input": ["one", "two"]},
    "/v1/rerank": {"query": "one", "documents": ["two"], "method": "cosine"},
    "/rerank": {"query": "one", "texts": ["two"]},
}


def timing_of(response: httpx.Response) -> dict[str, float]:
    """The phases of `Server-Timing`, in milliseconds."""
    entries = response.headers["Server-Timing"].split(", ")
    return {name: float(dur) for name, dur in (re.fullmatch(r"(\w+);dur=([\d.]+)", each).groups() for each in entries)}  # type: ignore[union-attr]


@pytest.mark.parametrize("path", ENDPOINTS)
async def test_each_computed_answer_says_where_its_time_went_and_how_many_tokens_it_had(path: str) -> None:
    async with running(settings()) as service:
        response = await service.client.post(path, json=ENDPOINTS[path])
        assert response.status_code == 200
        assert list(timing_of(response)) == ["queue", "tokenize", "compute", "write"]
        assert int(response.headers["X-Compute-Tokens"]) >= 3  # of a fake, a character is a token


async def test_what_was_not_computed_has_no_timing() -> None:
    async with running(settings()) as service:
        for response in (await service.client.get("/info"), await service.client.post("/embed", json={})):
            assert not {"server-timing", "x-compute-tokens"} & set(response.headers)


async def test_the_wait_for_a_slot_and_the_time_on_the_device_are_told_apart() -> None:
    async with running(settings(gpu_max_concurrent=1)) as service:
        engine = service.embed_engine
        engine.hold.clear()
        first = asyncio.create_task(service.embed("first"))
        await service.until(lambda: engine.begun == 1)
        second = asyncio.create_task(service.embed("second"))
        await service.until(lambda: service.runtime.admission.waiting == 1)
        engine.hold.set()
        first_ms, second_ms = timing_of(await first), timing_of(await second)
        assert first_ms["compute"] > first_ms["queue"]
        assert second_ms["queue"] > second_ms["compute"]


async def test_an_array_is_what_the_json_says() -> None:
    async with running(settings()) as service:
        body = {"texts": ["one", "two", "three"]}
        listed = (await service.client.post("/embed", json=body)).json()["embeddings"]
        response = await service.client.post("/embed", json=body, headers=NPY)
        assert response.headers["Content-Type"] == "application/x-npy"
        array = np.load(io.BytesIO(response.content), allow_pickle=False)
        assert (array.dtype, array.shape) == (np.float32, (3, 2))
        np.testing.assert_array_equal(array, np.array(listed, np.float32))


@pytest.mark.parametrize("accept", ["application/json, application/x-npy;q=0.9", "Application/X-NPY"])
async def test_an_array_is_given_to_whoever_lists_it(accept: str) -> None:
    async with running(settings()) as service:
        response = await service.client.post("/embed", json={"texts": ["one"]}, headers={"Accept": accept})
        assert np.load(io.BytesIO(response.content)).tolist() == [[np.float32(value_of("one")), 1.0]]


async def test_no_texts_give_an_empty_array_and_errors_stay_json() -> None:
    async with running(settings()) as service:
        empty = await service.client.post("/embed", json={"texts": []}, headers=NPY)
        assert np.load(io.BytesIO(empty.content)).shape == (0, 0)
        refused = await service.client.post("/embed", json={"texts": [1]}, headers=NPY)
        assert (refused.status_code, refused.json()["code"]) == (422, "invalid_request")
        theirs = await service.client.post("/embed", json={"inputs": "one"}, headers=NPY)
        assert isinstance(theirs.json(), list), "another dialect's answer is a bare list"


@pytest.fixture(scope="module")
def minilm() -> Any:
    with serving(settings(gpu_dtype="float32")) as service:
        yield service


LONG = "word " * 400


def test_what_was_cut_is_told_in_every_dialect_and_beside_an_array(minilm: LiveService) -> None:
    with httpx.Client(base_url=minilm.url, timeout=60) as client:
        texts = ["short", LONG]
        assert client.post("/v1/embeddings", json={"input": texts}).json()["truncated"] == [1]
        body = {"query": "short", "documents": texts, "method": "cosine"}
        assert client.post("/v1/rerank", json=body).json()["truncated"] == [1]
        body = {"query": "short", "documents": ["a", "word " * 600], "method": "bertscore"}
        assert client.post("/v1/rerank", json=body).json()["truncated"] == [1]
        response = client.post("/embed", json={"texts": texts}, headers=NPY)
        assert response.headers["X-Truncated"] == "1"
        assert np.load(io.BytesIO(response.content)).shape == (2, 384)


def test_tokens_are_those_of_the_distinct_texts(minilm: LiveService) -> None:
    with httpx.Client(base_url=minilm.url, timeout=60) as client:
        once = client.post("/v1/embeddings", json={"input": ["the cat sat"]})
        twice = client.post("/v1/embeddings", json={"input": ["the cat sat"] * 2})
        assert int(once.headers["X-Compute-Tokens"]) == once.json()["usage"]["prompt_tokens"] == 5
        assert int(twice.headers["X-Compute-Tokens"]) == 5
        assert twice.json()["usage"]["prompt_tokens"] == 10


async def test_the_line_of_a_computed_request_says_how_much_it_was(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        async with running(settings()) as service:
            await service.embed("one", "three")
            await service.client.get("/info")
    lines = [record for record in caplog.records if "'/embed'" in record.getMessage()]
    assert re.search(r" ms, 2 items, 8 tokens, queue [\d.]+ ms, compute [\d.]+ ms$", lines[0].getMessage())
    fields = json.loads(json.dumps(lines[0].fields))  # type: ignore[attr-defined]
    assert (fields["status"], fields["items"], fields["tokens"], fields["path"]) == (200, 2, 8, "/embed")
    assert not any(" items" in record.getMessage() for record in caplog.records if "/info" in record.getMessage())


async def test_an_array_that_is_ruled_out_is_not_given() -> None:
    async with running(settings()) as service:
        accept = {"Accept": "application/json, application/x-npy; q=0"}
        assert (await service.client.post("/embed", json={"texts": ["one"]}, headers=accept)).json()["dimensions"] == 2


def test_a_header_names_a_hundred_texts_that_were_cut_at_most() -> None:
    response = gpu_service.npy_response(np.zeros((500, 2), np.float32), range(500))
    assert response.headers["X-Truncated"].startswith("0,1,2,")
    assert response.headers["X-Truncated"].endswith(",99,...")

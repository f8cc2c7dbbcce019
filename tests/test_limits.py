"""Counts and lengths over a limit: 422 that names the field, its index, what was seen and the limit."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest
from conftest import JSON, refused, running, settings

import gpu_service

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/embed", {"texts": ["x"] * 4}, "texts"),
        ("/bertscore", {"candidates": ["x"] * 4, "references": ["x"] * 4}, "candidates"),
        ("/bertscore", {"candidates": ["x", "y"], "references": [["x"], ["x"] * 4]}, "references[1]"),
    ],
)
async def test_too_many_items_are_422_naming_the_field_the_count_and_the_limit(
    path: str, body: dict[str, Any], field: str
) -> None:
    async with running(settings(gpu_max_batch_size=3)) as service:
        detail = refused(await service.client.post(path, json=body), 422, "batch_too_large")
    assert detail.startswith(f"{field} has 4 items, the limit is 3 (GPU_MAX_BATCH_SIZE)")


async def test_as_many_items_as_the_limit_are_accepted() -> None:
    async with running(settings(gpu_max_batch_size=3, gpu_max_text_length=5)) as service:
        assert (await service.embed("12345", "é" * 5, "")).status_code == 200
        assert (await service.bertscore("12345", "2", "3")).status_code == 200


async def test_as_many_references_in_all_as_ten_batches_are_accepted() -> None:
    async with running(settings(gpu_max_batch_size=3)) as service:
        body = {"candidates": ["a"] * 3, "references": [["b"] * 3] * 3}
        assert (await service.client.post("/bertscore", json=body)).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/embed", {"texts": ["ok", "é" * 6]}, "texts[1]"),
        ("/bertscore", {"candidates": ["x" * 6], "references": ["x"]}, "candidates[0]"),
        ("/bertscore", {"candidates": ["x", "x"], "references": ["x", "x" * 6]}, "references[1]"),
        ("/bertscore", {"candidates": ["x", "x"], "references": [["x"], ["x", "x" * 6]]}, "references[1][1]"),
    ],
)
async def test_a_text_that_is_too_long_is_422_naming_its_place_length_and_limit(
    path: str, body: dict[str, Any], field: str
) -> None:
    async with running(settings(gpu_max_text_length=5)) as service:
        detail = refused(await service.client.post(path, json=body), 422, "text_too_long")
    assert detail.startswith(f"{field} has 6 characters, the limit is 5 (GPU_MAX_TEXT_LENGTH)")


@pytest.mark.parametrize(
    ("path", "body", "status", "seen"),
    [
        ("/embed", b'{"texts":[' + b'"",' * 2_000_000 + b'""]}', 422, "texts has 2000001 items, the limit is 100"),
        ("/bertscore", b'{"candidates":["a"],"references":[' + b'[""],' * 1_000_000 + b'[""]]}', 400, "1 and 1000001"),
        ("/bertscore", b'{"references":[' + b'[""],' * 1_000_000 + b'[""]]}', 422, "references has 1000001 items"),
        (
            "/bertscore",
            b'{"candidates":["a"],"references":[[' + b'"",' * 2_000_000 + b'""]]}',
            422,
            "references[0] has",
        ),
        ("/rerank", b'{"query":"a","documents":[' + b'{"text":""},' * 500_000 + b'""]}', 400, "documents has 500001"),
        ("/embeddings", b'{"input":[' + b'"",' * 2_000_000 + b'""]}', 400, "batch size is invalid"),
        ("/embed", b'{"texts":[' + b"[]," * 2_000_000 + b'""]}', 422, "more than 4,000,000 brackets"),
        ("/embeddings", b'{"input":[[' + b"1," * 3_000_000 + b"1]]}", 400, "check_embedding_ctx_length"),
    ],
    ids=lambda value: str(value)[:30],
)
async def test_millions_of_items_are_refused_without_holding_the_event_loop(
    path: str, body: bytes, status: int, seen: str
) -> None:
    async with running(settings()) as service:
        asking = asyncio.create_task(service.client.post(path, content=body, headers=JSON))
        longest = 0.0
        while not asking.done():
            began = time.thread_time()
            await asyncio.sleep(0.001)
            longest = max(longest, time.thread_time() - began)
        response = await asking
    assert response.status_code == status
    assert seen in response.text
    # Processor time of the loop's thread alone: what else the machine does is no part of it. Validation took a second.
    assert longest < 0.2, f"the event loop computed for {longest:.2f} s"


@pytest.mark.parametrize(
    ("body", "marks"),
    [({"texts": ["a,[{", "b"]}, 3), ({"texts": ['a",[', "b,\\", 'c\\"', '\\\\",']}, 5), ([[], []], 4)],
)
def test_marks_are_counted_beside_texts_only(body: Any, marks: int) -> None:
    assert gpu_service.count_marks(json.dumps(body).encode()) == marks


async def test_texts_full_of_commas_are_no_reason_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_service, "MOST_MARKS", 10)
    async with running(settings()) as service:
        assert (await service.embed("1,2,3,4,5,6,7,8,9,10,11,12", "[[[[[[[[[[[[[[")).status_code == 200
        refusal = await service.embed(*("abcdefghijkl"))
        assert "more than 10 brackets and commas" in refused(refusal, 422, "batch_too_large")

"""How answers are written: the bytes of orjson, in pieces, so that a large one holds nobody up."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson
import pytest
from conftest import running, settings

from gpu_service import json_pieces

RANDOM = np.random.default_rng(1)
BODIES: list[Any] = [
    {},
    [],
    {"texts": []},
    {"model": "m", "embeddings": RANDOM.random((3, 4), np.float32), "truncated": [1, 2]},
    {"explanations": [{"similarity": RANDOM.random((300, 300), np.float32), "tokens": ["a", '"']}] * 3},
    {"data": [{"index": n, "embedding": RANDOM.random(8, np.float32)} for n in range(120)]},
    RANDOM.random((2000, 384), np.float32),
    np.zeros((0, 0), np.float32),
    np.zeros((5, 0), np.float32),
    RANDOM.random(30_000, np.float32),
    list(range(3000)),
    {"a": {"b": [{"c": None, "é": "\x00"}]}},
]


@pytest.mark.parametrize("body", BODIES, ids=range(len(BODIES)))
def test_an_answer_in_pieces_is_the_answer(body: Any) -> None:
    assert b"".join(json_pieces(body)) == orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)


@pytest.mark.parametrize("body", [BODIES[4], BODIES[6]], ids=["similarities", "vectors"])
def test_no_piece_of_a_large_answer_is_large(body: Any) -> None:
    assert max(map(len, json_pieces(body))) < 500_000


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("path", "body", "place"),
    [
        ("/similarity", {"source": "x" * 11, "texts": ["a"]}, "source"),
        ("/v1/embeddings", {"input": "x" * 11}, "input"),
        ("/v1/embeddings", {"input": ["a", "x" * 11]}, "input[1]"),
        ("/v1/rerank", {"query": "x" * 11, "documents": ["a"]}, "query"),
        ("/rerank", {"query": "x" * 11, "texts": ["a"]}, "query"),
        ("/bertscore", {"candidates": ["a"], "references": ["x" * 11]}, "references[0]"),
        ("/bertscore", {"candidates": ["a"], "references": [["a", "x" * 11]]}, "references[0][1]"),
    ],
)
async def test_a_text_that_is_too_long_is_named_by_its_place_in_the_request(path: str, body: Any, place: str) -> None:
    async with running(settings(gpu_max_text_length=10)) as service:
        answer = await service.client.post(path, json=body)
    assert answer.status_code in (400, 422)
    message = answer.json().get("detail") or answer.json()["error"]
    assert message.startswith(f"{place} has 11 characters")


@pytest.mark.anyio
async def test_similarity_and_rerank_by_cosine_count_the_same_work_the_same() -> None:
    async with running(settings()) as service:
        await service.client.post("/similarity", json={"source": "a", "texts": ["b", "c"]})
        await service.client.post("/v1/rerank", json={"query": "a", "documents": ["b", "c"]})
        assert [job["items"] for job in (await service.status())["recent_jobs"]] == [3, 3]

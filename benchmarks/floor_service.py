"""The least that a service like this costs: FastAPI, the tokenizer, the numbers; nothing is computed.

It validates the same body, tokenises it with the same Rust tokenizer and writes as many numbers. No key, no limits,
no queue, no jobs, no log, and no forward pass.

    MODEL_DIR=/models/all-MiniLM-L6-v2 PORT=8766 python benchmarks/floor_service.py
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import uvicorn
from fastapi import FastAPI, Response
from pydantic import BaseModel
from tokenizers import Tokenizer

DIMENSIONS = 384
MOST_ITEMS = 100
EMBED_TOKENS, SCORE_TOKENS = 256, 512  # where the service cuts a text


def load_tokenizer(max_tokens: int) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(Path(os.environ["MODEL_DIR"]) / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_tokens)
    return tokenizer


app = FastAPI()
embed_tokenizer, score_tokenizer = load_tokenizer(EMBED_TOKENS), load_tokenizer(SCORE_TOKENS)
vectors = np.random.default_rng(0).standard_normal((MOST_ITEMS, DIMENSIONS), np.float32)


class EmbedRequest(BaseModel):
    texts: list[str]


class BertScoreRequest(BaseModel):
    candidates: list[str]
    references: list[str]


def answer(body: dict[str, Any]) -> Response:
    return Response(orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")


@app.get("/ready")
async def ready() -> dict[str, str]:
    return {"status": "ready"}


@app.post("/embed")
async def embed(body: EmbedRequest) -> Response:
    encoded = embed_tokenizer.encode_batch_fast(body.texts)
    return answer({"embeddings": vectors[: len(encoded)], "model": "floor", "dimensions": DIMENSIONS})


@app.post("/bertscore")
async def bertscore(body: BertScoreRequest) -> Response:
    encoded = score_tokenizer.encode_batch_fast([*body.candidates, *body.references])
    precision, recall, f1 = vectors.T[:3, : len(encoded) // 2].copy()
    return answer({"precision": precision, "recall": recall, "f1": f1, "model": "floor"})


if __name__ == "__main__":
    port = int(os.environ["PORT"])
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)

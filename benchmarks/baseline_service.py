"""The simplest service that does the job: what one would write in an afternoon, to be measured against.

Two models, loaded at start; two sync endpoints, which FastAPI runs in its thread pool; each calls its library
directly. No queue, no batching across requests, no limits. Same paths and bodies as gpu_service.py.

    MODEL_DIR=/models/all-MiniLM-L6-v2 NUM_LAYERS=5 PORT=8766 python benchmarks/baseline_service.py
"""

from __future__ import annotations

import os
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from reference import load_bert_scorer, load_sentence_transformer

MODEL_DIR = Path(os.environ["MODEL_DIR"])
DEVICE = os.environ.get("DEVICE", "cpu")

app = FastAPI()
embedder = load_sentence_transformer(MODEL_DIR, DEVICE)
scorer = load_bert_scorer(MODEL_DIR, int(os.environ["NUM_LAYERS"]), DEVICE)


class EmbedRequest(BaseModel):
    texts: list[str]


class EmbedResponse(BaseModel):
    embeddings: list[list[float]]
    model: str
    dimensions: int


class BertScoreRequest(BaseModel):
    candidates: list[str]
    references: list[str]


class BertScoreResponse(BaseModel):
    precision: list[float]
    recall: list[float]
    f1: list[float]
    model: str


@app.get("/health")
def health() -> dict[str, str]:
    return {"status": "ok", "device": DEVICE}


@app.post("/embed")
def embed(request: EmbedRequest) -> EmbedResponse:
    vectors = embedder.encode(request.texts)
    return EmbedResponse(embeddings=vectors.tolist(), model=MODEL_DIR.name, dimensions=vectors.shape[1])


@app.post("/bertscore")
def bertscore(request: BertScoreRequest) -> BertScoreResponse:
    precision, recall, f1 = scorer.score(request.candidates, request.references)
    return BertScoreResponse(precision=precision.tolist(), recall=recall.tolist(), f1=f1.tolist(), model=MODEL_DIR.name)


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(os.environ["PORT"]), log_level="warning")

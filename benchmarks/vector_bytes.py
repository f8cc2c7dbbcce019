"""Bytes of a vector in each form in which the service answers, measured on its own writers.

python benchmarks/vector_bytes.py
"""

from __future__ import annotations

import base64
import sys
import zlib
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parent.parent))

import gpu_service

TEXTS = 100
FORMS = {
    "JSON": lambda vectors: gpu_service.json_response({"embeddings": vectors}).body,
    "JSON, base64": lambda vectors: gpu_service.json_response([base64.b64encode(row).decode() for row in vectors]).body,
    "npy": lambda vectors: gpu_service.npy_response(vectors, ()).body,
}


def main() -> None:
    """Prints a row for each number of dimensions: bytes a vector, and in brackets after zlib (level 1)."""
    random = np.random.default_rng(0)
    print("| dimensions | " + " | ".join(FORMS) + " |\n|---|" + "---|" * len(FORMS))
    for dimensions in (384, 768, 1024):
        vectors = random.standard_normal((TEXTS, dimensions)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        bodies = [write(vectors) for write in FORMS.values()]
        cells = [f"{len(body) / TEXTS:,.0f} ({len(zlib.compress(body, 1)) / TEXTS:,.0f})" for body in bodies]
        print(f"| {dimensions} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()

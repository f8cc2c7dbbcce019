"""The operators that torch has from oneDNN, refusing as on a processor without AVX-512."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

REFUSAL = "mkldnn_reorder_linear_weight: bf16 path needs the cpu support avx512bw, avx512vl and avx512dq"


class Operators:
    """oneDNN's operators as torch offers them, computed by torch's own; in bfloat16 one of them may refuse."""

    def __init__(self, refused: str = "") -> None:
        self.refused, self.served = refused, set[torch.dtype]()  # types of a model's products
        self._linear_pointwise = self

    def _note(self, name: str, x: torch.Tensor) -> None:
        if name == self.refused and x.dtype == torch.bfloat16:
            raise RuntimeError(REFUSAL)
        if x.shape[-1] > 8:  # a trial's are small
            self.served.add(x.dtype)

    def _reorder_linear_weight(self, weight: torch.Tensor, rows: int) -> torch.Tensor:
        self._note("weight", weight)
        return weight

    def __call__(self, x: Any, weight: Any, bias: Any, fused: str, scalars: list[Any], algorithm: str) -> Any:
        self._note(fused, x)
        product = F.linear(x, weight, bias)
        return F.gelu(product) if fused == "gelu" else product

    def binary(self, x: Any, other: Any, weight: Any, bias: Any, fused: str) -> Any:
        self._note(fused, x)
        return F.linear(x, weight, bias) + other

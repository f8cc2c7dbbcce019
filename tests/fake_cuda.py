"""Stand-ins for what torch has only where there is a GPU."""

from __future__ import annotations

import pytest
import torch

ILLEGAL = "CUDA error: an illegal memory access was encountered"


def answer_probes(monkeypatch: pytest.MonkeyPatch, refusal: BaseException | None) -> None:
    """A GPU that was used already, and that still adds two numbers, or refuses to."""

    def zeros(size: int, device: str) -> torch.Tensor:
        assert device == "cuda"
        if refusal is not None:
            raise refusal
        return torch.ones(size) - 1

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch, "zeros", zeros)

"""The Triton kernel of DeBERTa's attention, interpreted on the CPU, against torch's attention with a bias."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel

from gpu_engine.attention import check_kernel
from gpu_engine.fast_encoder import FastEncoder
from gpu_engine.packing import pack_by_length, pack_padded

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent
COMPARISON = """if True:
    import torch
    from gpu_engine.attention import check_kernel
    from gpu_engine.deberta_kernel import disentangled_attention
    torch.manual_seed(0)
    for head_dim in (12, 16, 64):
        check_kernel(disentangled_attention, torch.float32, torch.device("cpu"), head_dim)
"""


def test_the_kernel_gives_what_torchs_attention_with_a_bias_gives() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", COMPARISON], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def attention_text_by_text(q: Tensor, k: Tensor, v: Tensor, c2p: Tensor, p2c: Tensor, lengths: Tensor) -> Tensor:
    """What the kernel computes, one text after the other, the position terms gathered one by one."""
    count, heads, tokens, head_dim = q.shape
    out = torch.zeros(count, tokens, heads, head_dim)
    for text, length in enumerate(lengths.tolist()):
        i, j = torch.arange(length)[:, None], torch.arange(length)[None, :]
        of_text = [product.view(heads, count, tokens, -1)[:, text] for product in (c2p, p2c)]
        bias = of_text[0][:, i, j - i + tokens - 1] + of_text[1][:, j, i - j + tokens - 1]
        sides = (side[text, :, :length] for side in (q, k, v))
        out[text, :length] = F.scaled_dot_product_attention(*sides, attn_mask=bias, scale=1.0).transpose(0, 1)
    return out.view(count * tokens, -1)


def test_a_stand_in_for_the_kernel_gives_what_the_packed_forward_gives(tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(tiny_models.save_deberta(tmp_path / "model"), dtype=torch.float32).eval()
    encoder = FastEncoder(model, torch.float32, CPU, kernel=True)
    assert encoder.kernel is None, "there is none for a CPU"
    rng = np.random.default_rng(0)
    texts = [rng.integers(5, 60, length).astype(np.int32) for length in (70, 65, 9, 1)]
    with torch.inference_mode():
        packed = encoder(pack_by_length(texts), 4)
        encoder.kernel = attention_text_by_text
        padded = encoder(pack_padded([texts], 1, CPU, torch.float32, 512, 2)[0], 4)
    rows = padded.view(6, 72, -1)
    found = torch.cat([rows[index, : len(text)] for index, text in enumerate(texts)])
    np.testing.assert_allclose(found, packed[: len(found)], atol=2e-5)


def test_a_kernel_whose_numbers_are_others_is_refused() -> None:
    check_kernel(attention_text_by_text, torch.float32, CPU, 16)
    with pytest.raises(RuntimeError, match="its numbers are others"):
        check_kernel(lambda q, k, v, c2p, p2c, n: attention_text_by_text(q, k, v, p2c, c2p, n), torch.float32, CPU, 16)

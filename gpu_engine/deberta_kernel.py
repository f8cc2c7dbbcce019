"""A Triton kernel for DeBERTa v1's attention; needs Triton, so nothing imports this room before it was asked for."""

# Triton is not there everywhere, and its language is not Python's.
# mypy: ignore-errors

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


def disentangled_attention(q: Tensor, k: Tensor, v: Tensor, c2p: Tensor, p2c: Tensor, lengths: Tensor) -> Tensor:
    """Attention of padded texts with DeBERTa's position terms read where their products lie, without a mask.

    q, k, v: (count, heads, tokens, head_dim), q scaled, one step between neighbours in a head. c2p, p2c: (heads,
    count * tokens, 2 * tokens) contiguous, content times positions. lengths: (count,) int32, at least 1, on the
    device. Returns (count * tokens, heads * head_dim). Rows beyond a text's length hold numbers of no meaning.
    """
    count, heads, tokens, head_dim = q.shape
    out = torch.empty(count * tokens, heads * head_dim, dtype=q.dtype, device=q.device)
    block = min(64, max(16, triton.next_power_of_2(tokens)))
    kernel: Any = _attend
    kernel[(triton.cdiv(tokens, block), count * heads)](
        q, k, v, c2p, p2c, lengths, out,
        q.stride(0), q.stride(1), q.stride(2), k.stride(0), k.stride(1), k.stride(2),
        v.stride(0), v.stride(1), v.stride(2), heads, count * tokens, tokens, head_dim,
        BLOCK=block, HEAD=triton.next_power_of_2(max(16, head_dim)), EXACT=q.dtype == torch.float32,
    )  # fmt: skip
    return out


@triton.jit
def _attend(
    q_ptr, k_ptr, v_ptr, c2p_ptr, p2c_ptr, lengths_ptr, out_ptr,
    q_text, q_head, q_row, k_text, k_head, k_row, v_text, v_head, v_row, heads, all_rows, tokens, head_dim,
    BLOCK: tl.constexpr, HEAD: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One block of rows of one head of one text: the online softmax over blocks of keys up to the text's length."""
    text = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    length = tl.load(lengths_ptr + text)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dims = tl.arange(0, HEAD)
    at_row = (rows < tokens)[:, None] & (dims < head_dim)[None, :]
    q = tl.load(q_ptr + text * q_text + head * q_head + rows[:, None] * q_row + dims[None, :], at_row, 0.0)
    # Entry [row, column] of a position term lies at row * (width - 1) + column + tokens - 1 of its product.
    step = 2 * tokens - 1
    start = (head.to(tl.int64) * all_rows + text * tokens) * (2 * tokens) + tokens - 1
    best = tl.full((BLOCK,), -1e30, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    mixed = tl.zeros((BLOCK, HEAD), tl.float32)
    for first in range(0, length, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        at_column = (columns < length)[:, None] & (dims < head_dim)[None, :]
        both = (rows < tokens)[:, None] & (columns < length)[None, :]
        k = tl.load(k_ptr + text * k_text + head * k_head + columns[:, None] * k_row + dims[None, :], at_column, 0.0)
        v = tl.load(v_ptr + text * v_text + head * v_head + columns[:, None] * v_row + dims[None, :], at_column, 0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee" if EXACT else "tf32")
        scores += tl.load(c2p_ptr + start + rows[:, None] * step + columns[None, :], both, 0.0)
        # By columns, so that neighbours in memory are neighbours in the tile; then turned.
        turned = tl.load(p2c_ptr + start + columns[:, None] * step + rows[None, :], tl.trans(both), 0.0)
        scores += tl.trans(turned)
        scores = tl.where((columns < length)[None, :], scores, -1e30)
        higher = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp(scores - higher[:, None])
        shrink = tl.exp(best - higher)
        total = total * shrink + tl.sum(weights, 1)
        mixed = mixed * shrink[:, None]
        mixed += tl.dot(weights.to(v.dtype), v, input_precision="ieee" if EXACT else "tf32")
        best = higher
    out = out_ptr + (text * tokens + rows)[:, None] * (heads * head_dim) + head * head_dim + dims[None, :]
    tl.store(out, (mixed / total[:, None]).to(out_ptr.dtype.element_ty), at_row)

"""Kinds of attention: DeBERTa's position terms, and kernels that a device may have, each tried once. Knows no model."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_engine.device import is_fatal, is_out_of_memory
from gpu_engine.packing import Packed

log = logging.getLogger(__name__)


def disentangled_bias(q: Tensor, k: Tensor, tokens: int, *, keys: Tensor | None, queries: Tensor | None) -> Tensor:
    """DeBERTa's position terms, to be added to the attention scores.

    q, k: (count, heads, tokens, head_dim), q scaled. keys, queries: (heads, head_dim, distances + 1).
    Returns (count, heads, tokens, tokens). Entry [i, j] needs the column of distance i - j; in a row-major
    (tokens, 2 * tokens) product that is a fixed step from its neighbours, so a strided view replaces the
    gather. (One column more than there are distances: tensor cores want sizes that are multiples of eight.)
    """
    count, heads, _, _ = q.shape
    width = 2 * tokens

    def skewed(product: Tensor, row_step: int, column_step: int) -> Tensor:
        steps = (tokens * width, count * tokens * width, row_step, column_step)
        return product.as_strided((count, heads, tokens, tokens), steps, tokens - 1)

    terms = []
    if keys is not None:
        terms.append(skewed(position_product(q, keys), width - 1, 1))
    if queries is not None:
        terms.append(skewed(position_product(k, queries), 1, width - 1))
    if not terms:
        return q.new_zeros(count, heads, tokens, tokens)
    return terms[0].contiguous() if len(terms) == 1 else terms[0] + terms[1]


def position_product(content: Tensor, table: Tensor) -> Tensor:
    """Content times the positions in reach, one product a head: (heads, count * tokens, 2 * tokens).

    content: (count, heads, tokens, head_dim). table: (heads, head_dim, distances + 1).
    """
    count, heads, tokens, head_dim = content.shape
    middle = table.shape[-1] // 2
    flat = content.transpose(0, 1).reshape(heads, count * tokens, head_dim)
    return torch.bmm(flat, table[:, :, middle - tokens : middle + tokens])


Varlen = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int], Tensor]  # as torch's varlen_attn


def find_varlen(dtype: torch.dtype, device: torch.device, head_dim: int) -> Varlen | None:
    """torch's attention over texts of any lengths laid end to end, if it runs here, by trying it once.

    It is flash-attention: half precision, no bias, an NVIDIA device of compute capability 8.0 or newer, torch 2.10.
    """
    if device.type != "cuda" or torch.version.hip or dtype not in (torch.float16, torch.bfloat16):
        return None
    if torch.cuda.get_device_capability(device) < (8, 0):
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn

        x = torch.randn(16, 1, head_dim, dtype=dtype, device=device)
        bounds = torch.tensor([0, 16], dtype=torch.int32, device=device)
        found = cast(Tensor, varlen_attn(x, x, x, bounds, bounds, 16, 16))
        expected = F.scaled_dot_product_attention(*(x.transpose(0, 1).float(),) * 3).transpose(0, 1)
        if not torch.allclose(found.float(), expected, atol=1e-2):
            raise RuntimeError("its numbers are others")
    except (ImportError, RuntimeError) as refusal:
        if is_fatal(refusal) or is_out_of_memory(refusal):
            raise
        log.info("no attention over texts of any lengths: %s", refusal)
        return None
    return cast(Varlen, varlen_attn)


Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]  # as disentangled_attention


def find_kernel(dtype: torch.dtype, device: torch.device, head_dim: int) -> Kernel | None:
    """Our kernel of DeBERTa's attention, if it compiles here and gives torch's numbers, by trying it once.

    It needs Triton, a C compiler, and an NVIDIA device of compute capability 8.0 or newer.
    """
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    try:
        from gpu_engine.deberta_kernel import disentangled_attention

        check_kernel(disentangled_attention, dtype, device, head_dim)
    except Exception as refusal:  # Triton and the compiler have errors of their own kinds
        if is_fatal(refusal) or is_out_of_memory(refusal):
            raise
        log.info("no Triton kernel for DeBERTa's attention: %s", refusal)
        return None
    return disentangled_attention


def check_kernel(kernel: Kernel, dtype: torch.dtype, device: torch.device, head_dim: int) -> None:
    """Compares the kernel with torch's attention on padded texts. Raises RuntimeError where its numbers are others."""
    count, heads, tokens = 2, 2, 72
    random = functools.partial(torch.randn, dtype=dtype, device=device)
    q, k, v = random(count, tokens, 3, heads, head_dim).permute(2, 0, 3, 1, 4)
    keys, queries = (random(heads, head_dim, 2 * tokens) / head_dim for _ in range(2))
    q = q / head_dim
    lengths = torch.tensor([tokens, 9], dtype=torch.int32, device=device)
    beyond = torch.arange(tokens, device=device)[None, :] >= lengths[:, None]
    bias = disentangled_bias(q, k, tokens, keys=keys, queries=queries).masked_fill(beyond[:, None, None], -math.inf)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0).transpose(1, 2)
    found = kernel(q, k, v, position_product(q, keys), position_product(k, queries), lengths).view(expected.shape)
    bound = 1e-4 if dtype == torch.float32 else 2e-2
    if not torch.allclose(found[~beyond].float(), expected[~beyond].float(), atol=bound, rtol=bound):
        raise RuntimeError("its numbers are others")


def padded_lengths(batch: Packed) -> Tensor | None:
    """Tokens of each text of one padded group, (count,) int32, on the device; None for a packed batch.

    From the mask, not from `real`: the mask is what a replayed graph has written anew.
    """
    if len(batch.groups) != 1 or batch.groups[0].end != batch.ids.shape[0]:
        return None
    group = batch.groups[0]
    if group.mask is None:
        return torch.full((group.count,), group.tokens, dtype=torch.int32, device=batch.ids.device)
    return (group.mask.view(group.count, -1) == 0).sum(1, dtype=torch.int32)

"""Our forward pass for BERT, RoBERTa, XLM-R, ELECTRA, CamemBERT and DeBERTa v1. Knows no task."""

from __future__ import annotations

import functools
import itertools
import logging
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_engine.attention import disentangled_bias, find_kernel, find_varlen, padded_lengths, position_product
from gpu_engine.packing import Group, Packed
from gpu_engine.work import UnsupportedModel

log = logging.getLogger(__name__)


class Projection:
    """A linear layer for inference with its activation or residual fused in where the backend can.

    On a CPU with oneDNN the weights are prepacked once (`prepack`), which MKL's matrix product, half speed
    on AMD processors, can't do.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, prepack: bool) -> None:
        weight = weight.to(dtype).contiguous()
        self.bias = None if bias is None else bias.to(dtype)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, 512) if prepack else weight
        # (x, weight, bias, fused operator …), or None for torch's own product
        self.fused: Any = torch.ops.mkldnn._linear_pointwise if prepack else None
        # Without AVX-512 oneDNN's erf takes a quarter of the product's time, torch's a twelfth.
        wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        self.fuses_gelu = prepack and (dtype != torch.float32 or wide)

    def __call__(self, x: Tensor) -> Tensor:
        """(rows, in) to (rows, out)."""
        if self.fused is not None:
            return cast(Tensor, self.fused(x, self.weight, self.bias, "none", [], ""))
        return F.linear(x, self.weight, self.bias)

    def gelu(self, x: Tensor) -> Tensor:
        """The exact (erf) GELU of the projection."""
        if self.fuses_gelu:
            return cast(Tensor, self.fused(x, self.weight, self.bias, "gelu", [], "none"))
        return cast(Tensor, torch.ops.aten.gelu_(self(x)))

    def onto(self, residual: Tensor, x: Tensor) -> Tensor:
        """`residual`, (rows, out), plus the projection without its bias; may overwrite `residual`."""
        if self.fused is not None:
            return cast(Tensor, self.fused.binary(x, residual, self.weight, None, "add"))
        return residual.addmm_(x, self.weight.t())


def runs_prepacked(dtype: torch.dtype) -> bool:
    """Whether oneDNN has all of Projection's prepacked products in `dtype` here, by trying each once.

    In bfloat16 they refuse a processor without AVX-512; builds of torch without oneDNN do not have them.
    """
    x = torch.ones(8, 8, dtype=dtype)
    try:
        layer = Projection(x, x[0], dtype, prepack=True)
        layer.onto(x.clone(), layer.gelu(layer(x)))
    except (RuntimeError, AttributeError) as refusal:  # NotImplementedError is a RuntimeError
        log.debug("no prepacked products in %s: %s", dtype, refusal)
        return False
    return True


@functools.lru_cache(maxsize=8)
def wins_race(width: int) -> bool:
    """Whether prepacked float32 weights beat torch's own matrix product here, by a short race at load."""
    x, weight = torch.randn(256, width), torch.randn(2 * width, width)
    contenders = [Projection(weight, None, torch.float32, prepack) for prepack in (False, True)]
    best = [math.inf, math.inf]
    for _ in range(7):
        for index, layer in enumerate(contenders):
            began = time.perf_counter()
            layer(x)
            best[index] = min(best[index], time.perf_counter() - began)
    return best[1] < best[0]


def prefers_prepacked(dtype: torch.dtype, width: int) -> bool:
    """Whether to prepack: float32 where it is faster, bfloat16 wherever it runs.

    No race in bfloat16: fused operators round once less, and two starts should agree.
    """
    if dtype not in (torch.float32, torch.bfloat16) or not runs_prepacked(dtype):
        return False
    return dtype == torch.bfloat16 or wins_race(width)


@dataclass(frozen=True)
class Reader:
    """Reads weights of a transformers module: onto `device`, in `dtype`, prepacked for oneDNN or not."""

    device: torch.device
    dtype: torch.dtype
    prepack: bool

    def take(self, parameter: Any) -> Tensor:
        """A parameter in float32."""
        return cast(Tensor, parameter.detach().to(self.device, torch.float32))

    def linear(self, *modules: Any) -> tuple[Tensor, Tensor | None]:
        """Weight (out, in) and bias of linear layers of one input as one, their outputs side by side, in float32."""
        bias = None if modules[0].bias is None else torch.cat([self.take(module.bias) for module in modules])
        return torch.cat([self.take(module.weight) for module in modules]), bias

    def projection(self, weight: Tensor, bias: Tensor | None, carried: Tensor | None = None) -> Projection:
        """A projection of float32 weights whose input comes with `carried` added, (in,), which it takes out."""
        if carried is not None:
            taken_out = -(weight @ carried)
            bias = taken_out if bias is None else bias + taken_out
        return Projection(weight, bias, self.dtype, self.prepack)


class Norm:
    """Layer normalisation, plus `carried`; torch's kernels compute it in float32 whatever the batch's type."""

    def __init__(self, module: Any, read: Reader, carried: Tensor | None = None) -> None:
        bias = read.take(module.bias)
        self.weight = read.take(module.weight).to(read.dtype)
        self.bias = (bias if carried is None else bias + carried).to(read.dtype)
        self.eps = float(getattr(module, "eps", None) or module.variance_epsilon)

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


Positions = tuple[Tensor | None, Tensor | None]  # DeBERTa's keys and queries of positions, of `disentangled_bias`


class Layer:
    """Weights of one post-norm transformer layer, around the bias of its attention.

    The two products that are added onto their residual have no bias: the norm before has added it to that
    residual already, and the product in between takes it out of its input again. So a norm and a product
    serve where a sum would be a pass over memory of its own.
    """

    def __init__(
        self,
        layer: Any,
        following: Any | None,
        read: Reader,
        qkv: tuple[Tensor, Tensor | None],
        positions: Positions | None = None,
    ) -> None:
        """layer, following: transformers' modules. qkv: weight (3 * hidden, hidden) and bias, q, k, v in this order."""
        weight, self.entry = read.linear(layer.attention.output.dense)  # entry: added to the layer's input, (hidden,)
        self.qkv, self.positions = read.projection(*qkv, carried=self.entry), positions
        self.output = read.projection(weight, None)
        weight, down_bias = read.linear(layer.output.dense)
        self.output_norm = Norm(layer.attention.output.LayerNorm, read, down_bias)
        self.up = read.projection(*read.linear(layer.intermediate.dense), carried=down_bias)
        self.down = read.projection(weight, None)
        self.last_norm = Norm(layer.output.LayerNorm, read)
        onward = None if following is None else read.linear(following.attention.output.dense)[1]
        self.down_norm = Norm(layer.output.LayerNorm, read, onward)


class Embeddings:
    """Token ids to the first layer's input: words, positions and the type of a first sentence, normalised."""

    def __init__(self, model: Any, read: Reader) -> None:
        module = model.embeddings
        self.words = read.take(module.word_embeddings.weight).to(read.dtype)
        positions = getattr(module, "position_embeddings", None)
        self.positions = None if positions is None else read.take(positions.weight).to(read.dtype)
        # RoBERTa counts positions from padding_idx + 1 and leaves pad tokens out of the count.
        self.position_pad = None if positions is None else positions.padding_idx
        types = getattr(module, "token_type_embeddings", None)
        self.token_type = None if types is None else read.take(types.weight)[0].to(read.dtype)
        self.norm = Norm(module.LayerNorm, read)
        project = getattr(model, "embeddings_project", None) or getattr(module, "embed_proj", None)
        self.project = None if project is None else read.projection(*read.linear(project))
        self.project_first = model.config.model_type == "deberta"

    def __call__(self, batch: Packed) -> Tensor:
        """(rows, hidden) of a batch."""
        x = F.embedding(batch.ids, self.words)
        if self.positions is not None:
            offsets = batch.offsets if self.position_pad is None else self._roberta_positions(batch, self.position_pad)
            x = x + F.embedding(offsets, self.positions)
        if self.token_type is not None:
            x = x + self.token_type
        if self.project is not None and self.project_first:
            x = self.project(x)
        x = self.norm(x)
        return self.project(x) if self.project is not None and not self.project_first else x

    @staticmethod
    def _roberta_positions(batch: Packed, pad: int) -> Tensor:
        """Positions where a literal pad token inside a text takes the pad position and is not counted."""
        positions = torch.zeros_like(batch.ids)
        for group in batch.groups:
            rows = slice(group.start, group.end)
            real = (batch.ids[rows] != pad).view(group.count, group.tokens).long()
            positions[rows] = (real.cumsum(1) * real + pad).view(-1)
        return positions


class FastEncoder:
    """An inference forward for post-norm encoders: BERT, RoBERTa, XLM-R, ELECTRA, CamemBERT, DeBERTa v1.

    It reads the weights of a transformers module and computes the same hidden states on packed batches,
    with fused QKV, fused activations and SDPA. Raises UnsupportedModel for anything it does not know;
    whoever builds one compares it with the module (`TokenModel.verify`) before trusting it.

    varlen: asks for one attention over texts of any lengths, of batches that have `bounds`. `self.varlen` is then
    that function, or None where there is none for this model, type and device: such batches run all the same.
    kernel: asks for our Triton kernel of DeBERTa's attention, for padded batches; `self.kernel` in the same way.
    """

    def __init__(
        self, model: Any, dtype: torch.dtype, device: torch.device, varlen: bool = False, kernel: bool = False
    ) -> None:
        config = model.config
        if getattr(config, "hidden_act", "") != "gelu" or getattr(config, "is_decoder", False):
            raise UnsupportedModel(config.model_type)
        self.dtype, self.heads = dtype, int(config.num_attention_heads)
        self.prepack = device.type == "cpu" and prefers_prepacked(dtype, int(config.hidden_size))
        read = Reader(device, dtype, self.prepack)
        self.embed = Embeddings(model, read)
        if config.model_type == "deberta":
            self.layers = deberta_layers(model, read)
        elif config.model_type in ("bert", "roberta", "xlm-roberta", "camembert", "electra"):
            if getattr(config, "position_embedding_type", "absolute") not in ("absolute", None):
                raise UnsupportedModel("relative positions")
            self.layers = bert_layers(model, read)
        else:
            raise UnsupportedModel(config.model_type)
        biased = any(layer.positions is not None for layer in self.layers)
        head_dim = int(config.hidden_size) // self.heads
        self.varlen = find_varlen(dtype, device, head_dim) if varlen and not biased else None
        whole = all(layer.positions is not None and None not in layer.positions for layer in self.layers)
        self.kernel = find_kernel(dtype, device, head_dim) if kernel and whole else None

    def __call__(self, batch: Packed, num_layers: int) -> Tensor:
        """Hidden states (rows, hidden) after `num_layers` layers, in this encoder's dtype."""
        x = self.embed(batch)
        layers = self.layers[:num_layers]
        if layers and layers[0].entry is not None:
            x = x + layers[0].entry.to(self.dtype)
        lengths = None if self.kernel is None else padded_lengths(batch)
        for layer in layers:
            x = layer.output_norm(layer.output.onto(x, self._attend(layer, layer.qkv(x), batch, lengths)))
            norm = layer.last_norm if layer is layers[-1] else layer.down_norm
            x = norm(layer.down.onto(x, layer.up.gelu(x)))
        return x

    def _attend(self, layer: Layer, qkv: Tensor, batch: Packed, lengths: Tensor | None) -> Tensor:
        """Attention within each text. qkv: (rows, 3 * hidden), q, k, v in this order; result (rows, hidden).

        lengths: of the texts, (count,) int32, where our kernel takes the whole batch.
        """
        if self.kernel is not None and lengths is not None and layer.positions is not None:
            q, k, v = self._sides(qkv, batch.groups[0])
            keys, queries = layer.positions
            products = position_product(q, cast(Tensor, keys)), position_product(k, cast(Tensor, queries))
            return self.kernel(q, k, v, *products, lengths)
        if self.varlen is not None and batch.bounds is not None:
            q, k, v = qkv.view(qkv.shape[0], 3, self.heads, -1).unbind(1)  # (rows, heads, head_dim)
            most = max(batch.groups[0].tokens, qkv.shape[0] - batch.groups[-1].end)
            return self.varlen(q, k, v, batch.bounds, batch.bounds, most, most).reshape(qkv.shape[0], -1)
        mixed = [self._attend_group(layer, qkv, group) for group in batch.groups]
        rest = qkv.shape[0] - sum(part.shape[0] for part in mixed)
        if rest:  # rows of no text; what memory holds there may be NaN, or slow
            mixed.append(qkv.new_zeros(rest, mixed[0].shape[1]))
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed)

    def _sides(self, qkv: Tensor, group: Group) -> Tensor:
        """q, k and v of a group: (3, count, heads, tokens, head_dim)."""
        return qkv.view(group.count, group.tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)

    def _attend_group(self, layer: Layer, qkv: Tensor, group: Group) -> Tensor:
        """(count * tokens, hidden) of one group; a view of what the fused kernels of attention write."""
        rows = slice(group.start, group.end)
        q, k, v = self._sides(qkv[rows], group)
        mask, scale = group.mask, None
        if layer.positions is not None:
            keys, queries = layer.positions
            bias = disentangled_bias(q, k, group.tokens, keys=keys, queries=queries)
            mask = bias if mask is None else bias + mask
            scale = 1.0  # folded into the projections
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        return attended.transpose(1, 2).reshape(group.count * group.tokens, -1)


def bert_layers(model: Any, read: Reader) -> list[Layer]:
    """Layers of BERT and its kin: q, k and v become one product."""
    layers = []
    for layer, following in with_following(model.encoder.layer):
        own = layer.attention.self
        layers.append(Layer(layer, following, read, read.linear(own.query, own.key, own.value)))
    return layers


def with_following(layers: Iterable[Any]) -> Iterator[tuple[Any, Any | None]]:
    """Each layer and the one after it, None after the last."""
    return itertools.pairwise([*layers, None])


def deberta_layers(model: Any, read: Reader) -> list[Layer]:
    """DeBERTa v1 (https://arxiv.org/abs/2006.03654): position projections cached, scale folded in."""
    config = model.config
    kinds = list(config.pos_att_type or [])
    if getattr(config, "talking_head", False):
        raise UnsupportedModel("deberta with talking heads")
    if not model.encoder.relative_attention or not set(kinds) <= {"c2p", "p2c"}:
        raise UnsupportedModel("deberta variant")
    span = int(model.encoder.max_relative_positions)
    longest = int(config.max_position_embeddings)
    # One row per distance query - key in [-(longest - 1), longest - 1], clamped as the module clamps.
    distances = (torch.arange(-(longest - 1), longest, device=read.device) + span).clamp(0, 2 * span - 1)
    relative = read.take(model.encoder.rel_embeddings.weight)[distances]  # (2 * longest - 1, hidden)
    heads = int(config.num_attention_heads)
    return [
        Layer(layer, following, read, *deberta_attention(layer.attention.self, read, relative, kinds, heads))
        for layer, following in with_following(model.encoder.layer)
    ]


def deberta_attention(
    attention: Any, read: Reader, relative: Tensor, kinds: Sequence[str], heads: int
) -> tuple[tuple[Tensor, Tensor], Positions]:
    """Weight and bias of q, k, v of one layer of DeBERTa, and its keys and queries of positions.

    relative: (distances, hidden) float32; kinds: `c2p`, `p2c` or both.
    """
    hidden = relative.shape[1]
    head_dim = hidden // heads
    scale = 1.0 / math.sqrt(head_dim * (1 + len(kinds)))
    # in_proj is interleaved per head, [head, (q, k, v), head_dim]: sort it into q, k, v.
    weight = read.take(attention.in_proj.weight).view(heads, 3, head_dim, hidden)
    weight = weight.transpose(0, 1).reshape(3, hidden, hidden).clone()
    q_bias = read.take(attention.q_bias)
    bias = torch.stack([q_bias, torch.zeros_like(q_bias), read.take(attention.v_bias)])
    weight[0] *= scale
    bias[0] *= scale

    def by_head(table: Tensor) -> Tensor:  # (distances, hidden) to (heads, head_dim, distances + 1)
        return F.pad(table.view(-1, heads, head_dim).permute(1, 2, 0), (0, 1)).to(read.dtype)

    keys = queries = None
    if "c2p" in kinds:  # reversed, so that the skewed view reads forward
        keys = by_head(F.linear(relative, read.take(attention.pos_proj.weight)).flip(0))
    if "p2c" in kinds:
        projection = attention.pos_q_proj
        queries = by_head(F.linear(relative, read.take(projection.weight), read.take(projection.bias)) * scale)
    return (weight.view(3 * hidden, hidden), bias.view(-1)), (keys, queries)

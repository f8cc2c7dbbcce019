"""The forward that serves: ours or transformers', its CUDA graphs, its precision. Knows no task."""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import logging
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpu_engine.device import available_cores, bind_thread, is_fatal, is_out_of_memory
from gpu_engine.fast_encoder import FastEncoder
from gpu_engine.packing import Packed, cut_by_length, pack_by_length, pack_padded
from gpu_engine.tokenizing import longest_positions
from gpu_engine.work import InvalidInput, UnsupportedModel

log = logging.getLogger(__name__)


class ModuleEncoder:
    """Any other encoder, through its transformers module, on padded batches (same interface)."""

    def __init__(self, model: Any, dtype: torch.dtype, device: torch.device) -> None:
        same = model.dtype == dtype and model.device == device
        self.model = model if same else copy.deepcopy(model).to(device=device, dtype=dtype)
        self.dtype, self.device = dtype, device

    def __call__(self, batch: Packed, num_layers: int) -> Tensor:
        """Hidden states (rows, hidden) after `num_layers` layers; layers above are not run."""
        (group,) = batch.groups
        ids = batch.ids.view(group.count, group.tokens)
        mask = torch.ones_like(ids) if batch.real is None else batch.real.long()
        with layers_cut(self.model, num_layers):
            hidden: Tensor = self.model(input_ids=ids, attention_mask=mask)[0]
        return hidden.reshape(group.count * group.tokens, -1)


def _layer_list(model: Any) -> tuple[Any, str]:
    """Where a transformers encoder keeps its layers: (owner, attribute). Same order as bert-score's search."""
    encoder = getattr(model, "encoder", None)
    for owner, attribute in (
        (model, "n_layers"),  # XLM: a number
        (model, "layer"),  # XLNet
        (model.config if hasattr(encoder, "albert_layer_groups") else None, "num_hidden_layers"),  # a number too
        (model, "block"),  # T5's encoder
        (encoder, "layer"),  # BERT and most others
        (getattr(model, "transformer", None), "layer"),  # DistilBERT
        (model, "layers"),  # BART's encoder, ModernBERT
        (model, "h"),  # GPT-2
    ):
        if owner is not None and hasattr(owner, attribute):
            return owner, attribute
    raise UnsupportedModel(f"{type(model).__name__} is no text encoder")


def count_layers(model: Any) -> int:
    """Layers of a transformers encoder."""
    layers = getattr(*_layer_list(model))
    return int(layers) if isinstance(layers, int) else len(layers)


@contextlib.contextmanager
def layers_cut(model: Any, num_layers: int) -> Iterator[None]:
    """Runs only the first `num_layers` layers of a transformers encoder inside the block."""
    owner, attribute = _layer_list(model)
    whole = getattr(owner, attribute)
    cut = num_layers if isinstance(whole, int) else whole[:num_layers]
    setattr(owner, attribute, cut)
    try:
        yield
    finally:
        setattr(owner, attribute, whole)


class GraphedEncoder:
    """Replays CUDA graphs of a FastEncoder for small batches, where launching kernels costs more than they do.

    A shape is captured when it comes back often enough, its first replay is compared with the eager
    forward, and any failure turns graphs off for good: the eager forward is always there.
    """

    def __init__(self, encoder: FastEncoder, most_tokens: int = 4096, most_graphs: int = 64) -> None:
        self.encoder, self.dtype = encoder, encoder.dtype
        self.most_tokens, self.most_graphs = most_tokens, most_graphs
        self.enabled = False  # until the model is chosen: captures belong on the device thread alone
        self._pool: Any = None  # one memory pool for all: their outputs are copied before the next replay
        self._seen: Counter[tuple[int, ...]] = Counter()
        self._graphs: dict[tuple[int, ...], tuple[torch.cuda.CUDAGraph, Packed, Tensor]] = {}

    def rows_for(self, count: int, tokens: int) -> int:
        """Rows to pad a batch to, so that few shapes serve all while it is small: 1, 2, 3, 4, 6, 8, 12, 16, 24 …"""
        step = 1 << max(0, (count - 1).bit_length() - 2)
        rows = -(-count // step) * step
        return rows if self.enabled and rows * tokens <= self.most_tokens else count

    def __call__(self, batch: Packed, num_layers: int) -> Tensor:
        """As FastEncoder; the result is the caller's to keep."""
        (group,) = batch.groups
        key = (group.count, group.tokens, num_layers, group.mask is not None)
        if not self.enabled or group.count * group.tokens > self.most_tokens:
            return self.encoder(batch, num_layers)
        self._seen[key] += 1
        try:
            if key not in self._graphs:
                if self._seen[key] < 3 or len(self._graphs) >= self.most_graphs:
                    return self.encoder(batch, num_layers)
                self._graphs[key] = self._capture(batch, num_layers)
            return self._replay(key, batch)
        except RuntimeError as error:
            if is_out_of_memory(error) or is_fatal(error):
                raise
            log.warning("CUDA graphs are off: %s", error)
            torch.cuda.set_stream(torch.cuda.default_stream())  # a capture that broke off may leave its own
            self.release()
            return self.encoder(batch, num_layers)

    def release(self) -> None:
        """Frees the graphs' memory and goes on without them."""
        self.enabled, self._graphs, self._pool = False, {}, None

    def _capture(self, batch: Packed, num_layers: int) -> tuple[torch.cuda.CUDAGraph, Packed, Tensor]:
        (group,) = batch.groups
        groups = (replace(group, mask=None if group.mask is None else group.mask.clone()),)
        still = replace(batch, ids=batch.ids.clone(), offsets=batch.offsets.clone(), groups=groups)
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            expected = self.encoder(still, num_layers)  # also warms the libraries up, outside the capture
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = self.encoder(still, num_layers)
        output.zero_()  # the check must not see what the capture left behind
        graph.replay()
        if not torch.allclose(output.float(), expected.float(), rtol=1e-2, atol=1e-2, equal_nan=True):
            raise RuntimeError("a replay differs from the eager forward")
        return graph, still, output

    def _replay(self, key: tuple[int, ...], batch: Packed) -> Tensor:
        graph, still, output = self._graphs[key]
        still.ids.copy_(batch.ids)
        still.offsets.copy_(batch.offsets)
        if still.groups[0].mask is not None and batch.groups[0].mask is not None:
            still.groups[0].mask.copy_(batch.groups[0].mask)
        graph.replay()
        return output.clone()


Encoder = FastEncoder | GraphedEncoder | ModuleEncoder  # each: (batch, num_layers) -> (rows, hidden)


@dataclass(frozen=True)
class Block:
    """Hidden states of some texts: hidden (count, tokens, hidden) float32, real (count, tokens) bool or None."""

    indexes: Sequence[int]  # of the texts, in the order they were given
    hidden: Tensor
    lengths: Sequence[int]
    real: Tensor | None  # None where no text is padded


# Sentences of many lengths and kinds on which a freshly loaded model is checked; never shown to callers.
CALIBRATION_TEXTS = (
    "The cat sat on the mat.",
    "A cat was sitting on a mat.",
    "Yes.",
    "No, not today!",
    "The quarterly report shows that revenue grew by 12.4 % while costs stayed flat at 3,100 euros.",
    "Costs stayed flat in the last quarter, and revenue rose by about an eighth.",
    "Restart the server, wait until the disk check has finished, and only then open the firewall again.",
    "She had never seen the sea before; it was wider, louder and greyer than any picture had told her.",
    "def add(a, b):\n    return a + b  # returns the sum",
    "A function that returns the sum of its two arguments.",
    "Zürich, São Paulo and 東京 are cities 🙂 with very different weather in January.",
    "The weather in Tokyo differs from that in Zurich.",
    (
        "Water boils at a lower temperature on a mountain because the air presses less on its surface, which is "
        "why rice takes longer to cook up there and why recipes written at the coast disappoint hikers."
    ),
    "At altitude, lower air pressure lets water boil before it is hot enough to cook food quickly.",
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "Long words are rare.",
)


class TokenModel:
    """Token ids in, hidden states out: an encoder in the chosen precision with its float32 fallback."""

    def __init__(self, module: Any, pad_id: int, device: torch.device) -> None:
        self.device, self.pad_id = device, pad_id
        self.module: Any = module  # transformers' float32 module on the host: the source of every encoder
        self.layers = count_layers(module)
        self.first_layer = 1 if module.config.model_type == "deberta-v2" else 0  # whose module fails without a layer
        self.longest = longest_positions(module)
        self.vocabulary = int(module.get_input_embeddings().num_embeddings)
        self.dtype = torch.float32
        self.backend = "transformers"
        self.lanes: concurrent.futures.ThreadPoolExecutor | None = None
        self.padding: deque[int] = deque()  # rows without a token of each pass, until they are taken; lanes append
        self.lane_count = available_cores() if device.type == "cpu" else 1
        self._encoders: dict[torch.dtype, Encoder] = {}

    def verify(self, ids: Sequence[np.ndarray], num_layers: int) -> None:
        """Adopts the hand-written forward if it agrees with transformers' module on `ids`, else the module."""
        expected = self._texts(ModuleEncoder(self.module, torch.float32, self.device), ids, num_layers)
        own: Encoder
        try:
            own = self._fast(torch.float32)
            worst = max(
                float((a - b).norm(dim=-1).div(b.norm(dim=-1)).max())
                for a, b in zip(self._texts(own, ids, num_layers), expected)
            )
            if not worst <= 1e-3:
                raise UnsupportedModel(f"differs from transformers by {worst:.1e}")
            self.backend = "fused+onednn" if isinstance(own, FastEncoder) and own.prepack else "fused"
        except (UnsupportedModel, AttributeError, RuntimeError) as reason:
            if is_fatal(reason) or is_out_of_memory(reason):
                raise
            log.info("%s runs through transformers: %s", type(self.module).__name__, reason)
            own = ModuleEncoder(self.module, torch.float32, self.device)
        self._encoders[torch.float32] = own
        if self.lane_count > 1 and isinstance(own, FastEncoder):  # a module is changed while it runs: one at a time
            self.lanes = concurrent.futures.ThreadPoolExecutor(
                self.lane_count, "lane", initializer=bind_thread, initargs=(self.device, 1)
            )

    def keep_served(self) -> None:
        """Frees every encoder but that of the type that is served."""
        self._encoders = {self.dtype: self._encoders[self.dtype]}

    def release(self) -> None:
        """Frees the CUDA graphs and the float32 fallback's weights."""
        self.keep_served()
        encoder = self._encoders[self.dtype]
        if isinstance(encoder, GraphedEncoder):
            encoder.release()

    def use(self, dtype: torch.dtype) -> None:
        """Serves in `dtype` from now on and frees what that does not need."""
        self.dtype = dtype
        self.padding.clear()  # of the checks
        encoder = self.encoder(dtype)
        self.keep_served()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what the check took; other processes may want it
        if isinstance(encoder, GraphedEncoder):
            encoder.enabled = True
        if dtype == torch.float32:
            self.module = None  # float32 needs no fallback

    def encoder(self, dtype: torch.dtype) -> Encoder:
        """The encoder in `dtype`, built on first use."""
        if dtype not in self._encoders:
            ours = self.backend != "transformers"
            self._encoders[dtype] = self._fast(dtype) if ours else ModuleEncoder(self.module, dtype, self.device)
        return self._encoders[dtype]

    def _fast(self, dtype: torch.dtype) -> Encoder:
        fast = FastEncoder(self.module, dtype, self.device)
        return GraphedEncoder(fast) if self.device.type == "cuda" else fast

    @torch.inference_mode()
    def blocks(self, ids: Sequence[np.ndarray], num_layers: int, dtype: torch.dtype | None = None) -> Iterator[Block]:
        """Hidden states after `num_layers` layers, in blocks that together hold every text once."""
        yield from self._blocks(self.encoder(dtype or self.dtype), ids, num_layers)

    @torch.inference_mode()
    def rows(
        self, ids: Sequence[np.ndarray], num_layers: int, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, np.ndarray]:
        """All hidden states after `num_layers` layers, (rows, hidden) float32, and each text's first row, (texts,)."""
        starts = np.zeros(len(ids), np.int64)
        parts, total = [], 0
        for part, batch, hidden in self._forward(self.encoder(dtype or self.dtype), ids, num_layers):
            first = 0
            for group in batch.groups:
                last = min(first + group.count, len(part))
                starts[part[first:last]] = total + group.start + group.tokens * np.arange(last - first)
                first = last
            parts.append(hidden)
            total += len(hidden)
        if not parts:
            return torch.zeros(0, 1, device=self.device), starts
        return parts[0] if len(parts) == 1 else torch.cat(parts), starts

    def _forward(
        self, encoder: Encoder, ids: Sequence[np.ndarray], num_layers: int
    ) -> Iterator[tuple[list[int], Packed, Tensor]]:
        """Indexes of the texts of each pass over the encoder, the pass's batch, and its (rows, hidden) float32."""
        lengths = [len(row) for row in ids]
        order = sorted((index for index, length in enumerate(lengths) if length), key=lengths.__getitem__, reverse=True)
        if not order:  # tokenizers without special tokens leave nothing of an empty text
            return
        if int(np.concatenate(ids).max()) >= self.vocabulary:
            raise InvalidInput("the model's tokenizer gives ids that the model has no embedding for")
        packed = isinstance(encoder, FastEncoder) and self.device.type == "cpu"
        for part in [order] if packed else cut_by_length(order, ids):
            texts = [ids[index] for index in part]
            if packed:
                batch = pack_by_length(texts)
            else:
                rows_for = getattr(encoder, "rows_for", lambda count, tokens: count)
                batch = pack_padded(texts, self.pad_id, self.device, encoder.dtype, self.longest, rows_for)
            self.padding.append(batch.ids.numel() - sum(map(len, texts)))
            yield part, batch, encoder(batch, num_layers).float()

    def _blocks(self, encoder: Encoder, ids: Sequence[np.ndarray], num_layers: int) -> Iterator[Block]:
        for part, batch, hidden in self._forward(encoder, ids, num_layers):
            first = 0
            for group in batch.groups:
                rows = hidden[group.start : group.start + group.count * group.tokens]
                last = min(first + group.count, len(part))
                texts_hidden = rows.view(group.count, group.tokens, -1)[: last - first]
                real = None if batch.real is None else batch.real[: last - first]
                yield Block(part[first:last], texts_hidden, batch.lengths[first:last], real)
                first = last

    @torch.inference_mode()
    def _texts(self, encoder: Encoder, ids: Sequence[np.ndarray], num_layers: int) -> list[Tensor]:
        """Hidden states per text, (tokens, hidden), in the order given."""
        texts: dict[int, Tensor] = {}
        for block in self._blocks(encoder, ids, num_layers):
            for index, rows, length in zip(block.indexes, block.hidden, block.lengths):
                texts[index] = rows[:length]
        return [texts[index] for index in range(len(ids))]

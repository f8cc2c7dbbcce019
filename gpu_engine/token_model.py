"""The forward that serves: ours or transformers', its precision. Knows no task."""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import functools
import itertools
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpu_engine.device import available_cores, bind_thread, is_fatal, is_out_of_memory, thread_pool
from gpu_engine.fast_encoder import FastEncoder
from gpu_engine.graphs import GraphedEncoder
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
        with layers_cut(self.model, num_layers):
            hidden: Tensor = self.model(**self.inputs(batch))[0]
        return hidden.flatten(0, 1)

    @staticmethod
    def inputs(batch: Packed) -> dict[str, Tensor]:
        """Ids and attention mask, each (texts, tokens), of a padded batch."""
        (group,) = batch.groups
        ids = batch.ids.view(group.count, group.tokens)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids) if batch.real is None else batch.real.long()}


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
        (encoder, "block"),  # T5 and BART as sentence-transformers loads them; bert-score takes them apart
        (encoder, "layers"),
    ):
        if owner is not None and hasattr(owner, attribute):
            return owner, attribute
    raise UnsupportedModel(f"{type(model).__name__} is no text encoder")


def count_ids(model: Any) -> int:
    """Token ids that a transformers encoder has embeddings for."""
    try:
        return len(model.get_input_embeddings().weight)
    except NotImplementedError:
        raise UnsupportedModel(f"{type(model).__name__} has no table of token embeddings: it is not served.") from None


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


class LayerSteps(FastEncoder):
    """A FastEncoder that goes on from where it left the same batch."""

    def __init__(self, whole: FastEncoder) -> None:
        vars(self).update(vars(whole))
        self.whole, self.states = whole, dict[bytes, tuple[int, Tensor]]()  # layers done, and what they gave

    def __call__(self, batch: Packed, num_layers: int) -> Tensor:
        """As FastEncoder."""
        key = batch.ids.cpu().numpy().tobytes()
        done, hidden = self.states.get(key, (0, None))
        if hidden is None or done > num_layers:
            done, hidden = 0, self.whole(batch, 0)
        step = copy.copy(self.whole)
        for layer in self.whole.layers[done:num_layers]:
            step.layers, step.embed = [layer], functools.partial(_given, hidden)  # type: ignore[assignment]
            hidden = step(batch, 1)
        self.states[key] = num_layers, hidden
        return hidden.clone()


def _given(hidden: Tensor, batch: Packed) -> Tensor:
    """In place of embeddings: a copy, since the forward may write into its input."""
    return hidden.clone()


class ModuleSteps(ModuleEncoder):
    """A ModuleEncoder that runs each batch once, where its module tells what every layer gave."""

    def __init__(self, whole: ModuleEncoder) -> None:
        vars(self).update(vars(whole))
        self.states: dict[bytes, Sequence[Tensor]] = {}

    def __call__(self, batch: Packed, num_layers: int) -> Tensor:
        """As ModuleEncoder."""
        key = batch.ids.cpu().numpy().tobytes()
        if key not in self.states:
            self.states[key] = self._all_states(batch)
        states = self.states[key]
        return states[num_layers] if states else super().__call__(batch, num_layers)

    def _all_states(self, batch: Packed) -> Sequence[Tensor]:
        """Hidden states after 0, 1 … layers, each (rows, hidden); nothing where those are not a cut model's.

        A module with a norm after its last layer gives a cut model's states through that norm, others' without.
        """
        states = getattr(self.model(**self.inputs(batch), output_hidden_states=True), "hidden_states", None) or ()
        flat = [state.flatten(0, 1) for state in states]
        cut = super().__call__(batch, 1)
        usual = len(flat) == count_layers(self.model) + 1 and torch.allclose(flat[1], cut, rtol=1e-2, atol=1e-3)
        return flat if usual else ()


def worst_row(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest distance between two rows of the same place, in parts of the expected row's length; NaN if one is."""
    parts = [(a - b).norm(dim=-1).div(b.norm(dim=-1)) for a, b in zip(found, expected)]
    return float(torch.cat(parts).max())


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

# A type of numbers is also judged by a text that every model cuts, 512 tokens and more.
PRECISION_TEXTS = (*CALIBRATION_TEXTS, " ".join(3 * CALIBRATION_TEXTS))


class TokenModel:
    """Token ids in, hidden states out: an encoder in the chosen precision with its float32 fallback."""

    def __init__(self, module: Any, pad_id: int, device: torch.device, experimental: Sequence[str] = ()) -> None:
        if hasattr(module, "set_attention_type"):
            module.set_attention_type("original_full")  # BigBird goes over to it by itself, for good, at a short text
        self.device, self.pad_id, self.experimental = device, pad_id, experimental
        self.module: Any = module  # transformers' float32 module on the host: the source of every encoder
        self.layers = count_layers(module)
        self.first_layer = 0  # 1 where the module fails without a layer
        self.unpadded = False  # texts of one length at a time: the module looks at padding in spite of its mask
        self.longest = longest_positions(module)
        self.vocabulary = count_ids(module)
        self.dtype = torch.float32
        self.backend = "transformers"
        self.lanes: concurrent.futures.ThreadPoolExecutor | None = None
        self.padding: deque[int] = deque()  # rows without a token of each pass, until they are taken; lanes append
        self.lane_count = available_cores() if device.type == "cpu" else 1
        self.one_at_a_time = device.type == "cuda"  # until the precision is chosen: it has to hold only what serves
        self._encoders: dict[torch.dtype, Encoder] = {}

    def verify(self, ids: Sequence[np.ndarray], num_layers: int) -> None:
        """Adopts the hand-written forward if it agrees with transformers' module on `ids`, else the module."""
        module = ModuleEncoder(self.module, torch.float32, self.device)
        expected = self._texts(module, ids, num_layers)
        self._try_without_layers(module, ids)
        del module  # on a card a copy: none beside the one that comes
        own: Encoder
        try:
            own = self._fast(torch.float32)
            worst = worst_row(self._texts(own, ids, num_layers), expected)
            if not worst <= 1e-3:
                raise UnsupportedModel(f"differs from transformers by {worst:.1e}")
            self.backend = "fused+onednn" if isinstance(own, FastEncoder) and own.prepack else "fused"
        except (UnsupportedModel, AttributeError, RuntimeError) as reason:
            if is_fatal(reason) or is_out_of_memory(reason):
                raise
            log.info("%s runs through transformers: %s", type(self.module).__name__, reason)
            own = ModuleEncoder(self.module, torch.float32, self.device)
            self.unpadded = self._looks_at_padding(own, ids, num_layers, expected)
        self._encoders[torch.float32] = own
        if self.lane_count > 1 and isinstance(own, FastEncoder):  # a module is changed while it runs: one at a time
            self.lanes = thread_pool(self.lane_count, "lane", bind_thread, (self.device, 1))

    def _looks_at_padding(
        self, module: ModuleEncoder, ids: Sequence[np.ndarray], num_layers: int, padded: Sequence[Tensor]
    ) -> bool:
        self.unpadded = True
        try:
            worst = worst_row(self._texts(module, ids, num_layers), padded)
        except Exception as reason:
            if is_fatal(reason) or is_out_of_memory(reason):
                raise
            return False  # it takes no lengths but those that texts are padded to
        if worst <= 3e-4:
            return False
        log.info("%s looks at padding: it runs texts of one length at a time", type(self.module).__name__)
        return True

    def _try_without_layers(self, module: ModuleEncoder, ids: Sequence[np.ndarray]) -> None:
        """Notes whether the module gives its embeddings where no layer is run."""
        try:
            self._texts(module, ids[:1], 0)
        except Exception as reason:
            if is_fatal(reason) or is_out_of_memory(reason):
                raise
            self.first_layer = 1

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
        self.encoder(dtype)
        self.keep_served()
        self.one_at_a_time = False
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what the check took; other processes may want it
        if dtype == torch.float32:
            self.module = None  # float32 needs no fallback

    @torch.inference_mode()
    def capture(self, batch_tokens: int, num_layers: int, ids: np.ndarray) -> Iterator[bool]:
        """Captures CUDA graphs for batches of up to `batch_tokens`, in steps; True after each. Device thread only."""
        encoder = self.encoder(self.dtype)
        if isinstance(encoder, GraphedEncoder):
            yield from encoder.capture(batch_tokens, num_layers, torch.from_numpy(ids).long().to(self.device))

    def encoder(self, dtype: torch.dtype) -> Encoder:
        """The encoder in `dtype`, built on first use."""
        if dtype not in self._encoders:
            if self.one_at_a_time:
                self._encoders.clear()
            ours = self.backend != "transformers"
            self._encoders[dtype] = self._fast(dtype) if ours else ModuleEncoder(self.module, dtype, self.device)
        return self._encoders[dtype]

    @contextlib.contextmanager
    def layer_by_layer(self, dtype: torch.dtype) -> Iterator[None]:
        """Makes calls in `dtype` for the same texts, at one layer after the other, cost a layer each in the block."""
        encoder = self.encoder(dtype)
        whole = encoder.encoder if isinstance(encoder, GraphedEncoder) else encoder
        self._encoders[dtype] = LayerSteps(whole) if isinstance(whole, FastEncoder) else ModuleSteps(whole)
        try:
            yield
        finally:
            self._encoders[dtype] = encoder

    def _fast(self, dtype: torch.dtype) -> Encoder:
        varlen, kernel = ("varlen" in self.experimental, "triton" in self.experimental)
        fast = FastEncoder(self.module, dtype, self.device, varlen, kernel)
        return GraphedEncoder(fast, self.pad_id, self.longest) if self.device.type == "cuda" else fast

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
        fast = encoder.encoder if isinstance(encoder, GraphedEncoder) else encoder
        varlen = isinstance(fast, FastEncoder) and fast.varlen is not None
        packed = varlen or (isinstance(encoder, FastEncoder) and self.device.type == "cpu")
        if self.unpadded:
            parts = [list(part) for _, part in itertools.groupby(order, key=lengths.__getitem__)]
        else:
            parts = [order] if packed else list(cut_by_length(order, ids))
        texts = [[ids[index] for index in part] for part in parts]
        if packed:
            batches = [pack_by_length(texts[0], self.device, bounded=varlen)]
        else:
            longest = 0 if self.unpadded else self.longest
            batches = pack_padded(texts, self.pad_id, self.device, encoder.dtype, longest)
        for part, batch in zip(parts, batches):
            self.padding.append(batch.ids.numel() - sum(batch.lengths[: len(part)]))
            hidden = encoder(batch, num_layers)
            yield part, batch, hidden if hidden.dtype == torch.float32 else hidden.float()

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

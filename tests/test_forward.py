"""Our forward where there is no device to run it on: padded batches, the true shape, what a layer costs."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
import torch.nn.functional as F
from conftest import load_folder
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, AutoTokenizer, DebertaConfig, DebertaModel

from gpu_engine import fast_encoder
from gpu_engine.fast_encoder import FastEncoder
from gpu_engine.packing import Packed, pack_by_length, pack_padded

CPU, META = torch.device("cpu"), torch.device("meta")
LENGTHS = [512, 511, 300, 129, 128, 127, 65, 64, 33, 17, 16, 9, 8, 7, 3, 2, 1]  # longest first
FAMILIES: dict[str, Callable[[Path], Path]] = {
    "bert": tiny_models.save_bert,
    "roberta": tiny_models.save_roberta,
    "deberta": tiny_models.save_deberta,
    "deberta c2p": lambda folder: tiny_models.save_deberta(folder, pos_att_type="c2p"),
    "electra": lambda folder: tiny_models.save_other(folder, "electra"),
}


@torch.inference_mode()
def hidden_of_each(encoder: Any, batch: Packed, layers: int) -> list[Tensor]:
    """(tokens, hidden) of each text of a batch."""
    hidden = encoder(batch, layers)
    rows = []
    lengths = iter(batch.lengths)
    for group in batch.groups:
        block = hidden[group.start : group.end].view(group.count, group.tokens, -1)
        rows += [text[: next(lengths)] for text in block]
    return rows


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_gives_what_a_packed_one_gives(family: str, tmp_path: Path) -> None:
    folder = FAMILIES[family](tmp_path / "model")
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    pad = int(AutoTokenizer.from_pretrained(folder).pad_token_id)
    encoder = FastEncoder(model, torch.float32, CPU)
    rng = np.random.default_rng(0)
    texts = [rng.integers(5, 60, length).astype(np.int32) for length in LENGTHS]
    for text in texts[::3]:
        text[len(text) // 2] = pad  # one that stands in the text
    for layers in (0, 2, 4):
        padded = pack_padded([texts], pad, CPU, torch.float32, 512, 3)[0]
        found = hidden_of_each(encoder, padded, layers)
        for text, one, other in zip(texts, found, hidden_of_each(encoder, pack_by_length(texts), layers)):
            np.testing.assert_allclose(one, other, atol=2e-5, err_msg=f"{len(text)} tokens, {layers} layers")


def attention_text_by_text(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, same: Tensor, most: int, most_too: int
) -> Tensor:
    """What torch's varlen_attn computes, one text after the other. q, k, v: (rows, heads, head_dim)."""
    assert (bounds.dtype, int(bounds[-1]), most) == (torch.int32, len(q), int(bounds.diff().max()))
    texts = [slice(first, last) for first, last in zip(bounds[:-1].tolist(), bounds[1:].tolist())]
    sides = [[side[text].transpose(0, 1) for side in (q, k, v)] for text in texts]
    return torch.cat([F.scaled_dot_product_attention(*side).transpose(0, 1) for side in sides])


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("lengths", [LENGTHS, [9, 5, 2], [2], [64, 64, 32]])
def test_one_attention_over_texts_of_any_lengths_gives_the_same(
    family: str, lengths: list[int], tmp_path: Path
) -> None:
    model = AutoModel.from_pretrained(FAMILIES[family](tmp_path / "model"), dtype=torch.float32).eval()
    encoder = FastEncoder(model, torch.float32, CPU, varlen=True)
    assert encoder.varlen is None, "there is none for a CPU"
    rng = np.random.default_rng(0)
    batch = pack_by_length([rng.integers(5, 60, length).astype(np.int32) for length in lengths], bounded=True)
    expected = hidden_of_each(encoder, batch, 4)
    encoder.varlen = attention_text_by_text
    for one, other in zip(expected, hidden_of_each(encoder, batch, 4)):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_a_model_with_a_bias_of_attention_has_no_attention_over_any_lengths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast_encoder, "find_varlen", lambda *_: attention_text_by_text)
    for family, varlen, found in (("bert", True, True), ("bert", False, False), ("deberta", True, False)):
        model = AutoModel.from_pretrained(FAMILIES[family](tmp_path / family)).eval()
        encoder = FastEncoder(model, torch.float32, CPU, varlen=varlen)
        assert (encoder.varlen is not None) == found, family


class Kernels(TorchDispatchMode):
    """Counts the operators that run a kernel, and the bytes that all but matrix products read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.bytes_beside_products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "scaled_dot_product_attention":  # as CUDA computes it with a mask
            result = torch.ops.aten._scaled_dot_product_efficient_attention(*args, False, **kwargs)[0]
        else:
            result = func(*args, **(kwargs or {}))
        if not shares_memory(result, args) and name != "unbind" and not name.startswith("empty"):
            self.count[name] += 1
            outputs = result if isinstance(result, (tuple, list)) else [result]
            if name not in ("linear", "addmm", "addmm_", "mm", "bmm"):
                self.bytes_beside_products += sum(
                    tensor.numel() * tensor.element_size() for tensor in [*args, *outputs] if isinstance(tensor, Tensor)
                )
        return result


def shares_memory(result: Any, args: Sequence[Any]) -> bool:
    """Whether an operator's result is a view of its first argument; not so where `reshape` had to copy."""
    pair = [result, args[0]] if args and isinstance(args[0], Tensor) else [None]
    if not all(isinstance(tensor, Tensor) for tensor in pair) or result is args[0]:
        return False
    return bool(result.untyped_storage()._cdata == args[0].untyped_storage()._cdata)


@pytest.fixture(scope="module")
def xlarge() -> FastEncoder:
    """deberta-xlarge-mnli's 40 layers in float16, on a device that keeps no numbers."""
    with torch.device("meta"):
        from benchmarks.reference import DEBERTA_XLARGE_SHAPE

        module = DebertaModel(DebertaConfig(**DEBERTA_XLARGE_SHAPE, num_hidden_layers=40)).eval()
    return FastEncoder(module, torch.float16, META)


def padded_on_meta(texts: int, tokens: int) -> Packed:
    """A batch in which one text is padded."""
    ids = [np.full(tokens - (row == texts - 1), 7, np.int32) for row in range(texts)]
    return pack_padded([ids], 0, META, torch.float16, 512)[0]


@pytest.mark.parametrize(("texts", "tokens", "most_bytes"), [(16, 32, 40_000), (4, 128, 60_000)])
def test_the_largest_default_runs_few_kernels_a_layer(
    xlarge: FastEncoder, texts: int, tokens: int, most_bytes: int
) -> None:
    batch = padded_on_meta(texts, tokens)
    with torch.inference_mode():
        with Kernels() as all_layers:
            hidden = xlarge(batch, 40)
        with Kernels() as one_less:
            xlarge(batch, 39)
    assert (hidden.shape, hidden.device.type, hidden.dtype) == ((texts * tokens, 1024), "meta", torch.float16)
    layer = all_layers.count - one_less.count
    assert layer.total() <= 12, layer
    moved = all_layers.bytes_beside_products - one_less.bytes_beside_products
    assert moved / (texts * tokens) <= most_bytes, "bytes a token and layer beside the products"


def test_a_layer_keeps_its_residual_in_the_products(xlarge: FastEncoder) -> None:
    with torch.inference_mode(), Kernels() as kernels:
        xlarge(padded_on_meta(16, 32), 40)
    assert kernels.count["addmm_"] == 80, "onto the residual, twice a layer"
    assert kernels.count["add"] <= 3 * 40 + 2, "three in the bias of attention, none for residuals"


def test_attention_over_texts_of_any_lengths_is_taken_where_it_is_asked_for_and_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for torch's kernel, which no CPU has; what serves is compared with what serves without."""
    calls: list[int] = []

    def each_text(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, *more: Any) -> Tensor:
        ends = bounds.tolist()
        calls.append(len(ends) - 1)
        texts = [[x[first:last].transpose(0, 1)[None] for x in (q, k, v)] for first, last in itertools.pairwise(ends)]
        return torch.cat([F.scaled_dot_product_attention(*text)[0].transpose(0, 1) for text in texts])

    monkeypatch.setattr(fast_encoder, "find_varlen", lambda dtype, device, head_dim: each_text)
    folder = tiny_models.save_bert(tmp_path / "tiny")
    plain = load_folder("bertscore", folder)
    asked = load_folder("bertscore", folder, experimental=("varlen",))
    texts, _ = plain.encode_texts(["the cat sat on the mat", "a dog", "one two three"])
    expected, found = (engine.compute(texts, 2) for engine in (plain, asked))
    assert calls, "it was taken"
    for place in range(3):
        torch.testing.assert_close(found.text(place), expected.text(place), atol=1e-5, rtol=0)

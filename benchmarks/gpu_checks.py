"""Checks of gpu_report.py that ask whether things are right on a card; gpu_speed.py asks how fast they are.

A check takes what its process shares, a `Card`, and returns numbers by their names, or raises: `Missed` where a
bound was not kept, anything else where it could not be done. Names of numbers carry their unit.
"""

from __future__ import annotations

import functools
import math
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import numpy as np
import torch
from gpu_card import HALF_BOUND, Card, Check, Numbers, Served, relative, within
from report import PACKAGES
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from gpu_engine.device import available_cores, build_versions, device_name
from gpu_engine.graphs import GraphedEncoder
from gpu_engine.packing import Packed, pack_padded
from gpu_engine.process import Step
from gpu_engine.token_model import TokenModel

# --- 1 and 2: the card and its libraries ---------------------------------------------------------------


def versions(card: Card) -> Numbers:
    """What the other numbers depend on."""
    found: Numbers = {"card": device_name(card.device), **build_versions()}
    if card.on_gpu:
        properties = torch.cuda.get_device_properties(card.device)
        found["compute capability"] = f"{properties.major}.{properties.minor}"
        found |= {"multiprocessors": properties.multi_processor_count, "memory MB": properties.total_memory >> 20}
        found["driver"] = driver()
        found["cudnn"] = torch.backends.cudnn.version()
    found |= {"python": sys.version.split()[0], "cores": available_cores(), **card.backends}
    found |= {"c compiler": bool(shutil.which("cc") or shutil.which("gcc")), "triton": version("triton")}
    return found | {name: version(name) for name in PACKAGES if name != "torch"}


def version(package: str) -> str:
    """A package's version, or that it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def driver() -> str:
    """The driver, as its own tool tells it."""
    asked = {
        "nvidia-smi": ["--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"],
        "rocm-smi": ["--showdriverversion"],
    }
    for tool, arguments in asked.items():
        if shutil.which(tool):
            done = subprocess.run([tool, *arguments], capture_output=True, text=True, timeout=10, check=False)
            return " ".join(done.stdout.split()) or done.stderr.strip()[:100]
    return "unknown"


def products(card: Card) -> Numbers:
    """TFLOP/s of a square product and of the four of a DeBERTa-xlarge layer, in what serves."""
    square = card.size(8192, 256)
    shapes = {f"{square}³": (square, square, square)}
    for out, into in ((3072, 1024), (1024, 1024), (4096, 1024), (1024, 4096)):
        for rows in (card.size(6_400, 64), card.size(32_768, 128)):
            shapes[f"{out}×{into} at {rows}"] = (rows, into, out)
    found: Numbers = {}
    for name, (rows, into, out) in shapes.items():
        x, weight = (torch.randn(size, dtype=card.fast, device=card.device) for size in ((rows, into), (out, into)))
        seconds = card.seconds(lambda x=x, weight=weight: torch.nn.functional.linear(x, weight))
        found[f"{name} TFLOP/s"] = 2e-12 * rows * into * out / seconds
    return found


def copies(card: Card) -> Numbers:
    """GB/s of copies inside the device (read and written), to it and from it, from pinned memory and from other."""
    count = card.size(1 << 28, 1 << 20)
    here, there = (torch.zeros(count, dtype=torch.uint8, device=card.device) for _ in range(2))
    found = {"inside GB/s": 2e-9 * count / card.seconds(lambda: there.copy_(here))}
    if card.on_gpu:
        for name, host in {"pinned": torch.zeros(count, dtype=torch.uint8).pin_memory(), "other": here.cpu()}.items():
            found[f"to it, {name} GB/s"] = 1e-9 * count / card.seconds(lambda host=host: here.copy_(host))
            found[f"from it, {name} GB/s"] = 1e-9 * count / card.seconds(lambda host=host: host.copy_(here))
    return found


def attention_inputs(card: Card, texts: int, tokens: int, head_dim: int = 64) -> tuple[Tensor, dict[str, Any]]:
    """q, which is k and v too, (texts, 16, tokens, head_dim); and the three kinds of mask that our forward has."""
    q = torch.randn(texts, 16, tokens, head_dim, dtype=card.fast, device=card.device)
    kinds = {"no mask": None, "mask": q.new_zeros(texts, 1, 1, tokens), "bias": q.new_zeros(texts, 16, tokens, tokens)}
    return q, kinds


def attention_backends(card: Card) -> Numbers:
    """Which kernel attention chooses, with cuDNN left out as we serve, and with it."""
    from torch.nn.attention import SDPBackend

    found: Numbers = {}
    for cudnn in (False, True) if card.on_gpu else (False,):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        for head_dim in (32, 64):
            q, kinds = attention_inputs(card, 4, 128, head_dim)
            chosen = {
                kind: SDPBackend(torch._fused_sdp_choice(q, q, q, attn_mask=mask)).name.removesuffix("_ATTENTION")
                for kind, mask in kinds.items()
            }
            found[f"head of {head_dim}, cuDNN {'on' if cudnn else 'off'}"] = chosen
    torch.backends.cuda.enable_cudnn_sdp(False)
    return found


def new_shapes(card: Card) -> Numbers:
    """Milliseconds of attention's first and second call at five shapes that were never there, cuDNN off and on."""
    found: Numbers = {}
    for cudnn in (False, True):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        for kind in ("no mask", "mask", "bias"):
            first, second = [], []
            for tokens in (40, 72, 104, 168, 232):
                q, kinds = attention_inputs(card, 5 + 2 * cudnn, tokens)
                for taken in (first, second):
                    card.wait()
                    began = time.perf_counter()
                    scaled_dot_product_attention(q, q, q, attn_mask=kinds[kind])
                    card.wait()
                    taken.append(1000 * (time.perf_counter() - began))
            name = f"{kind}, cuDNN {'on' if cudnn else 'off'}"
            found[name] = {"first ms": first, "second ms": statistics.median(second)}
    torch.backends.cuda.enable_cudnn_sdp(False)
    return found


# --- 3: the forward ------------------------------------------------------------------------------------

PARITY_BOUND = 2e-5


def parity(family: str, card: Card) -> Numbers:
    """The worst relative difference of a text's hidden states in float32 from transformers', on the host."""
    import tiny_models
    from transformers import AutoModel

    save = getattr(tiny_models, f"save_{family}", lambda folder: tiny_models.save_other(folder, family))
    module = AutoModel.from_pretrained(str(save(card.folder / family)), dtype=torch.float32).eval()
    tokens = TokenModel(module, module.config.pad_token_id or 0, card.device)
    lengths = [1, 2, 3, 7, 8, 9, 31, 64, 65, 200, card.size(512, 100)]
    ids = [card.random.integers(5, tokens.vocabulary, length).astype(np.int32) for length in lengths]
    tokens.verify(ids, tokens.layers)
    worst = 0.0
    for found, text in zip(states(tokens, ids, torch.float32), ids):
        with torch.inference_mode():
            given = torch.from_numpy(text).long()[None]
            expected = module(input_ids=given, attention_mask=torch.ones_like(given))[0][0]
        worst = max(worst, relative(found, expected))
    numbers = {"backend": tokens.backend, "deviation": worst, "bound": PARITY_BOUND}
    return within(numbers, worst, PARITY_BOUND)


def states(tokens: TokenModel, ids: Sequence[np.ndarray], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Hidden states of each text after all layers, (tokens, hidden) float32 on the host."""
    rows, starts = tokens.rows(ids, tokens.layers, dtype)
    host = rows.cpu()
    return [host[start : start + len(text)] for start, text in zip(starts, ids)]


# --- 4 and 5: the largest default, and its graphs ------------------------------------------------------


def xlarge_load(card: Card) -> Numbers:
    """Seconds and memory of each step of a load."""
    return {"backend": card.xlarge.tokens.backend, "layers": card.xlarge.tokens.layers, **card.load_steps}


def xlarge_precision(card: Card) -> Numbers:
    """By how much scores in float16 differ from float32's, over the calibration pairs, at every layer."""
    engine = card.xlarge
    engine.demanded = False  # so that every layer is measured
    try:
        at_default = engine.deviation(card.fast)
    finally:
        engine.demanded = True
        engine.tokens.keep_served()
    worst = {layer: max(seen.values()) for layer, seen in engine.deviations.items()}
    coarse = sum(value > 1e-3 for value in worst.values())
    top = max(worst, key=lambda layer: worst[layer])
    numbers = {"default layer": at_default, "worst layer": top, "its": worst[top], "layers above 1e-3": coarse}
    return within(numbers, max(at_default.values()), 1e-3)


def not_finite(card: Card) -> Numbers:
    """Texts of every length from 1 to 512 tokens in what serves: how many are not finite."""
    engine, step = card.xlarge, card.size(1, 73)
    lengths = list(range(1, 513, step))
    bad: list[int] = []
    for first in range(16):  # each batch holds short ones beside long ones
        batch = lengths[first::16]
        if batch:
            outputs = engine.compute(card.ids(batch), engine.default_layers)
            bad += [batch[place] for place in outputs.bad()]
    numbers: Numbers = {"texts": len(lengths), "not finite": len(bad), "of so many tokens": sorted(bad)[:20]}
    return within(numbers, len(bad), 0)


LADDER_S = 30.0


def graph_ladder(card: Card) -> Numbers:
    """Seconds and memory of the graphs that a load captures; the service too stops after a while."""
    engine = card.xlarge
    encoder, before = engine.tokens.encoder(engine.tokens.dtype), card.memory_mb()
    began = time.perf_counter()
    for _ in engine.warm_up(card.batch_tokens):
        if time.perf_counter() - began > LADDER_S:
            break
    card.wait()
    seconds, graphs = time.perf_counter() - began, len(encoder._graphs)
    largest = max((shape.rows * shape.tokens for shape in encoder._graphs), default=0)
    numbers = {"graphs": graphs, "s": seconds, "largest tokens": largest, "before": before, "after": card.memory_mb()}
    return within(numbers, 1 - min(graphs, 1), 0)


def padded(card: Card, tokens: TokenModel, rows: int, most: int) -> Packed:
    """A padded batch of texts of up to `most` tokens."""
    ids = card.ids([most, *card.random.integers(1, most + 1, rows - 1)])
    return pack_padded([ids], tokens.pad_id, card.device, tokens.dtype, tokens.longest)[0]


GRAPH_SHAPES = ((1, 5), (2, 32), (2, 33), (3, 64), (5, 100), (8, 24), (17, 40), (32, 32), (7, 130), (4, 512))


@torch.inference_mode()
def replays(card: Card) -> Numbers:
    """Replays beside the eager forward at ten shapes: how they differ, and how much sooner the small ones end."""
    tokens = card.xlarge.tokens
    graphed: Any = tokens.encoder(tokens.dtype)
    if not graphed.most_tokens:
        for _ in tokens.capture(4096, tokens.layers, card.ids([64])[0]):
            pass
    worst, replayed, gains = 0.0, 0, {}
    for rows, most in GRAPH_SHAPES:
        batch = padded(card, tokens, rows, most)
        for _ in range(3):  # a shape that comes back gets a graph
            found = graphed(batch, tokens.layers)
        replayed += graphed._shape(batch, tokens.layers) in graphed._graphs
        expected = graphed.encoder(batch, tokens.layers)
        real = slice(None) if batch.real is None else batch.real.flatten()
        worst = max(worst, relative(found[real].float(), expected[real].float()))
        eager_s = card.seconds(lambda batch=batch: graphed.encoder(batch, tokens.layers), 0.1)
        graph_s = card.seconds(lambda batch=batch: graphed(batch, tokens.layers), 0.1)
        gains[f"{rows}×{most}"] = {"eager ms": 1000 * eager_s, "graph ms": 1000 * graph_s, "ratio": eager_s / graph_s}
    numbers = {"replayed": f"{replayed} of {len(GRAPH_SHAPES)}", "deviation": worst, **gains}
    return within(numbers, worst if replayed else math.nan, HALF_BOUND)


def own_graphs(card: Card, encoder: Any, most_graphs: int) -> GraphedEncoder:
    """A graphed encoder of its own around a forward of the large model."""
    tokens = card.xlarge.tokens
    return GraphedEncoder(encoder, tokens.pad_id, tokens.longest, most_graphs)


@torch.inference_mode()
def capture_beside_load(card: Card) -> Numbers:
    """64 captures while another thread loads a model as the service does: do both come to a good end?"""
    tokens = card.xlarge.tokens
    graphed = own_graphs(card, tokens.encoder(tokens.dtype).encoder, 64)
    loaded: list[Any] = []

    def load() -> None:
        try:
            loaded.append(card.load("embed"))
        except Exception as error:
            loaded.append(error)

    loader = threading.Thread(target=load, daemon=True)
    before = card.memory_mb()
    loader.start()
    captured = sum(graphed.capture(4096, tokens.layers, torch.from_numpy(card.ids([64])[0]).long().to(card.device)))
    loading = loader.is_alive()
    loader.join(20)
    result = loaded[0] if loaded else "it did not end"
    numbers = {"captured": captured, "before": before, "after": card.memory_mb(), "still loading then": loading}
    numbers["load"] = "ok" if hasattr(result, "tokens") else f"{type(result).__name__}: {result}"
    return within(numbers, (captured < 64) + (numbers["load"] != "ok"), 0)


@torch.inference_mode()
def failing_capture(card: Card) -> Numbers:
    """A capture in which something waits for the device: the eager forward has to go on, and so has the device."""
    tokens = card.xlarge.tokens
    encoder = tokens.encoder(tokens.dtype).encoder

    class Waiting:
        dtype = encoder.dtype

        def __call__(self, batch: Packed, num_layers: int) -> Tensor:
            hidden: Tensor = encoder(batch, num_layers)
            float(hidden[0, 0])  # what no capture allows
            return hidden

    graphed, batch = own_graphs(card, Waiting(), 4), padded(card, tokens, 2, 32)
    expected = encoder(batch, tokens.layers)
    captured = sum(graphed.capture(64, tokens.layers, batch.ids[:8]))
    worst = relative(graphed(batch, tokens.layers).float(), expected.float())
    again = own_graphs(card, encoder, 4)
    after = sum(again.capture(64, tokens.layers, batch.ids[:8]))
    numbers = {"captured": captured, "eager afterwards deviates": worst, "captures of another encoder": after}
    return within(numbers, captured + (after < 4) + (not worst <= 1e-3), 0)


# --- 6: memory -----------------------------------------------------------------------------------------


def out_of_memory(card: Card) -> Numbers:
    """Large batches where little memory is left: halved, finished, equal; and larger ones again when there is more."""
    from gpu_engine.work import EmbedTask

    engine, total = card.embedder, torch.cuda.get_device_properties(card.device).total_memory
    task = EmbedTask(card.texts.draw([256] * 1024))
    with Served(card, engine, batch_tokens=1 << 18) as served:
        expected = served([task])[0].vectors
        card.empty_cache()
        free_mb = 160
        torch.cuda.set_per_process_memory_fraction(
            (torch.cuda.memory_reserved(card.device) + (free_mb << 20)) / total, card.device
        )
        began = time.perf_counter()
        tight = served([task])[0].vectors
        numbers: Numbers = {"MB left": free_mb, "s": time.perf_counter() - began}
        recoveries, batches = served.worker.counters.out_of_memory_recoveries, served.worker.counters.batches
        torch.cuda.set_per_process_memory_fraction(1.0, card.device)
        began = time.perf_counter()
        freed = served([task])[0].vectors
        numbers |= {"s afterwards": time.perf_counter() - began, "halvings": recoveries, "batches": batches}
    worst = max(float(np.abs(each - expected).max()) for each in (tight, freed))
    numbers["deviation"] = worst
    return within(numbers, worst if recoveries else math.nan, 1e-2)


# --- the last: a broken device -------------------------------------------------------------------------


def device_assert(card: Card) -> Numbers:
    """An index out of bounds on the device: its error has to count as fatal, and the worker has to say so."""
    engine = card.embedder
    outside = torch.tensor([1 << 20], device=card.device)

    def look() -> float:
        return float(torch.zeros(4, device=card.device)[outside].sum())

    seen = ""
    with Served(card, engine) as served:
        try:
            served.finish([Step(look)])
        except Exception as error:
            seen = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        for _ in range(50):
            if served.broken:
                break
            time.sleep(0.1)
        numbers = {"caller gets": seen, "worker says": list(served.broken), "alive": served.worker.alive}
    return within(numbers, int(not served.broken), 0)


CARD = (
    Check(1, "versions", versions, gpu=False),
    Check(1, "matrix products", products, gpu=False),
    Check(1, "copies", copies, gpu=False),
    Check(2, "attention's backends", attention_backends, gpu=False),
    Check(2, "attention's first calls", new_shapes, 60),
)
FORWARD = tuple(
    Check(3, f"float32, {family}", functools.partial(parity, family), gpu=False)
    for family in ("deberta", "bert", "roberta", "distilbert")
)
XLARGE = (
    Check(4, "xlarge: load", xlarge_load, 90, gpu=False),
    Check(4, "xlarge: precision at every layer", xlarge_precision, 60, gpu=False),
    Check(4, "xlarge: 1 to 512 tokens", not_finite, 60, gpu=False),
    Check(5, "graphs: the ladder", graph_ladder, LADDER_S + 15),
    Check(5, "graphs: replay and eager", replays, 90),
    Check(5, "graphs: capture beside a load", capture_beside_load, 60),
    Check(5, "graphs: a capture that fails", failing_capture),
)
MEMORY = (Check(6, "out of memory", out_of_memory, 60),)
ASSERT = (Check(8, "a device-side assert", device_assert),)

"""Checks of gpu_report.py that ask how fast things are; gpu_checks.py asks whether they are right.

Where two things are compared, both were measured in this run, one after the other, and their ratio is given:
above 1 the first of the two is faster.
"""

from __future__ import annotations

import concurrent.futures
import copy
import functools
import http.client
import importlib.util
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from bench import make_service
from contenders import Server, free_port
from gpu_card import HALF_BOUND, Card, Check, NotHere, Numbers, Served, relative, within
from reference import load_bert_scorer, load_sentence_transformer
from workload import Pair

from gpu_engine.fast_encoder import FastEncoder
from gpu_engine.packing import cut_by_length, pack_by_length, pack_padded
from gpu_engine.work import BertScoreTask, EmbedTask

GRAPHS_S = 15.0  # for the graphs of a model whose speed is measured


def scoring(pairs: Sequence[Pair]) -> BertScoreTask:
    """The task of these pairs."""
    return BertScoreTask([candidate for candidate, _ in pairs], [[reference] for _, reference in pairs])


def served(card: Card, engine: Any, in_flight: int | None = None) -> Served:
    """The engine as the service has it once it is ready: graphs and all."""
    found = Served(card, engine, in_flight)
    if card.on_gpu and not getattr(engine.tokens.encoder(engine.tokens.dtype), "most_tokens", 0):
        found.warm_up(card.batch_tokens, GRAPHS_S)
    return found


def rate(card: Card, running: Served, tasks: Sequence[Any]) -> float:
    """Items a second, of these tasks submitted together, texts to results."""
    return sum(task.items for task in tasks) / card.seconds(lambda: running(tasks), 1.5)


# --- BERTScore, on the largest default's shape ---------------------------------------------------------


def batches(card: Card) -> Numbers:
    """Pairs a second of one call of many pairs of one length."""
    found: Numbers = {}
    with served(card, card.xlarge) as running:
        for count, tokens in ((512, 32), (256, 128), (64, 512)):
            tokens = card.size(tokens, tokens // 4)
            pairs = card.pairs(card.size(count, 4), tokens)
            per_s = rate(card, running, [scoring(pairs)])
            found[f"{len(pairs)} × 2×{tokens} pairs/s"] = per_s
            found[f"{len(pairs)} × 2×{tokens} tokens/s"] = per_s * 2 * tokens
    return found


def mixed_pairs(card: Card, calls: int, per_call: int) -> list[BertScoreTask]:
    """Calls of pairs of mixed lengths."""
    lengths = card.texts.lengths(calls * per_call, per_call)
    pairs = card.texts.pairs(card.texts.draw(lengths))
    return [scoring(pairs[n : n + per_call]) for n in range(0, len(pairs), per_call)]


def calls(card: Card) -> Numbers:
    """Pairs of mixed lengths: calls of 100 alone and eight at once, and one pair at a time."""
    per_call = card.size(100, 4)
    with served(card, card.xlarge) as running:
        tasks = mixed_pairs(card, card.size(8, 2), per_call)
        alone, together = (rate(card, running, each) for each in (tasks[:1], tasks))
        found = {"one call pairs/s": alone, f"{len(tasks)} calls at once pairs/s": together, "ratio": together / alone}
        return {**found, "one pair": latency(running, mixed_pairs(card, card.size(100, 5), 1))}


def latency(running: Served, tasks: Sequence[Any]) -> Numbers:
    """Milliseconds of one task after the other, each another one."""
    running(tasks[:1])
    taken = []
    for task in tasks:
        began = time.perf_counter()
        running([task])
        taken.append(1000 * (time.perf_counter() - began))
    return {f"p{share} ms": float(np.percentile(taken, share)) for share in (50, 90)}


def flights(make: Callable[[Card], tuple[Any, list[Any]]], card: Card) -> Numbers:
    """Items a second with two batches on the device and with one, in turns: medians of three rounds."""
    engine, tasks = make(card)
    rates: dict[int, list[float]] = {2: [], 1: []}
    for _ in range(card.size(3, 1)):
        for in_flight, found in rates.items():
            with served(card, engine, in_flight) as running:
                found.append(rate(card, running, tasks))
    two, one = (statistics.median(found) for found in rates.values())
    return {"two in flight items/s": two, "one items/s": one, "ratio": two / one}


def direct(engine: Any, task: Any) -> Any:
    """A task's result without the worker, on the calling thread."""
    work = engine.prepare(task)
    outputs = engine.run([work.text(index) for index in work.order], work.variant)
    work.absorb(work.order, outputs, range(len(work.order)))
    outputs.bad()
    work.landed(work.order)
    return work.result()


def profile(make: Callable[[Card], tuple[Any, list[Any]]], card: Card) -> Numbers:
    """The kernels of one call that take longest, and for how much of it the device does nothing."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    engine, (task, *_) = make(card)
    for _ in range(4):  # graphs are captured at the third sight of a shape
        direct(engine, task)
    card.wait()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if card.on_gpu else [])]
    with torch.profiler.profile(activities=activities) as seen:
        direct(engine, task)
        card.wait()
    device = DeviceType.CUDA if card.on_gpu else DeviceType.CPU
    events = sorted((e.time_range.start, e.time_range.end, e.name) for e in seen.events() if e.device_type == device)
    busy_us, reached = 0.0, 0.0
    totals: dict[str, float] = {}
    for began, ended, name in events:
        busy_us += max(0.0, ended - max(began, reached))
        reached = max(reached, ended)
        totals[name[:60]] = totals.get(name[:60], 0.0) + ended - began
    whole_us = max(reached - events[0][0], 1e-9) if events else 1e-9
    longest = sorted(totals, key=lambda name: -totals[name])[:8]
    numbers = {"ms": whole_us / 1000, "device idle share": 1 - busy_us / whole_us, "kernels": len(events)}
    return {**numbers, "share of the busy time": {name: totals[name] / busy_us for name in longest}}


def pair_load(card: Card) -> tuple[Any, list[Any]]:
    """The large model and calls of 100 pairs."""
    return card.xlarge, mixed_pairs(card, card.size(8, 2), card.size(100, 4))


@torch.inference_mode()
def triton_kernel(card: Card) -> Numbers:
    """Our Triton kernel of attention beside torch's, in the eager forward: speed, and how they differ."""
    tokens = card.xlarge.tokens
    plain: Any = tokens.encoder(tokens.dtype)
    plain = getattr(plain, "encoder", plain)
    own = FastEncoder(card.xlarge_module, tokens.dtype, card.device, kernel=True)
    if own.kernel is None:
        raise NotHere("it needs Triton, a C compiler and compute capability 8.0")
    numbers: Numbers = {}
    for rows, most in ((256, 32), (128, 128), (64, 512)):
        ids = card.ids([most, *card.random.integers(most // 2, most + 1, rows - 1)])
        batch = pack_padded([ids], tokens.pad_id, card.device, tokens.dtype, tokens.longest)[0]
        real = slice(None) if batch.real is None else batch.real.flatten()
        found, expected = (encoder(batch, tokens.layers)[real].float() for encoder in (own, plain))
        on_s, off_s = (card.seconds(functools.partial(each, batch, tokens.layers)) for each in (own, plain))
        numbers[f"{rows}×{most}"] = {"ms": 1000 * on_s, "without ms": 1000 * off_s, "ratio": off_s / on_s}
        numbers[f"{rows}×{most} deviation"] = worst = relative(found, expected)
        within(numbers, worst, HALF_BOUND)
    return numbers


def with_transformers(card: Card) -> Numbers:
    """Encoding alone, texts of 32 tokens: our forward beside transformers' own, same weights and type."""
    engine, count = card.xlarge, card.size(512, 8)
    module = copy.deepcopy(card.xlarge_module).to(card.device, card.fast)
    ids = card.ids([32] * count)
    given = torch.from_numpy(np.stack(ids)).long().to(card.device)

    @torch.inference_mode()
    def theirs() -> list[Any]:
        return [module(input_ids=part, attention_mask=torch.ones_like(part))[0] for part in given.split(64)]

    their_s = card.seconds(theirs, 1.0)
    our_s = card.seconds(lambda: engine.tokens.rows(ids, engine.tokens.layers), 1.0)
    rows, _ = engine.tokens.rows(ids, engine.tokens.layers)
    worst = relative(rows, torch.cat(theirs()).flatten(0, 1).float())
    numbers = {"ours texts/s": count / our_s, "theirs": count / their_s, "ratio": their_s / our_s, "deviation": worst}
    return within(numbers, worst, HALF_BOUND)


def with_bert_score(card: Card) -> Numbers:
    """The bert-score package beside us, 2×32 pairs, same weights: in what we serve, and in its own float32."""
    engine, numbers = card.xlarge, dict[str, Any]()
    pairs = card.pairs(card.size(256, 4), 32)
    scorer: Any = load_bert_scorer(card.minilm, 5, str(card.device))
    with served(card, engine) as running:
        (ours,) = running([scoring(pairs)])
        our_rate = numbers["ours pairs/s"] = rate(card, running, [scoring(pairs)])
    for dtype in (card.fast, torch.float32):
        scorer._model = copy.deepcopy(card.xlarge_module).to(card.device, dtype)
        scorer.score(*map(list, zip(*pairs[:8])))
        began = time.perf_counter()
        _, _, f1 = scorer.score(*map(list, zip(*pairs)))
        theirs = len(pairs) / (time.perf_counter() - began)
        name = str(dtype).removeprefix("torch.")
        worst = float(np.abs(f1.float().numpy() - ours.f1).max())
        numbers[f"theirs, {name}"] = {"pairs/s": theirs, "ratio": our_rate / theirs, "deviation": worst}
        within(numbers, worst, 1e-2)
    return numbers


def old_figure(card: Card) -> Numbers:
    """66 pairs of 12 texts on roberta-large's shape; the old service published about 110 pairs/s (RTX 2080 Ti)."""
    from transformers import AutoTokenizer, RobertaConfig, RobertaModel

    large = {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096, "num_hidden_layers": 17}
    small = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "num_hidden_layers": 2}
    with torch.device(card.device):
        config = RobertaConfig(
            vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, pad_token_id=0, layer_norm_eps=1e-5,
            **(small if card.quick else large),
        )  # fmt: skip
        module = RobertaModel(config, add_pooling_layer=False).eval()
    engine = card.token_engine(module, AutoTokenizer.from_pretrained(str(card.minilm)))
    texts = card.texts.draw([64] * 12)
    with served(card, engine) as running:
        per_s = rate(card, running, [scoring(list(itertools.combinations(texts, 2)))])
    return {"pairs/s": per_s, "texts of tokens": 64, "published": 110, "ratio": per_s / 110}


# --- embeddings, MiniLM --------------------------------------------------------------------------------


def embed_load(card: Card) -> tuple[Any, list[Any]]:
    """MiniLM and calls of 100 texts of mixed lengths."""
    per_call = card.size(100, 8)
    texts = card.texts.draw(card.texts.lengths(card.size(32, 2) * per_call, per_call))
    return card.embedder, [EmbedTask(texts[n : n + per_call]) for n in range(0, len(texts), per_call)]


def embeddings(card: Card) -> Numbers:
    """Texts a second of one call of 1,000, of calls of 100 at once, and one text at a time."""
    engine, tasks = embed_load(card)
    many = EmbedTask(card.texts.draw(card.texts.lengths(card.size(1000, 16))))
    with served(card, engine) as running:
        return {
            f"one call of {many.items} texts/s": rate(card, running, [many]),
            f"{len(tasks)} calls at once texts/s": rate(card, running, tasks),
            "one text": latency(running, [EmbedTask([text]) for text in many.texts[: card.size(200, 5)]]),
        }


def with_sentence_transformers(card: Card) -> Numbers:
    """SentenceTransformer.encode beside us, 1,000 texts, same type; with flash-attention where that is installed."""
    texts = card.texts.draw(card.texts.lengths(card.size(1000, 16)))
    with served(card, card.embedder) as running:
        (ours,) = running([EmbedTask(texts)])
        our_rate = rate(card, running, [EmbedTask(texts)])
    numbers: Numbers = {"ours texts/s": our_rate}
    model = load_sentence_transformer(card.minilm, str(card.device)).to(card.fast)
    kinds = ["sdpa", *(["flash_attention_2"] if importlib.util.find_spec("flash_attn") else [])]
    for kind in kinds:
        model[0].auto_model.set_attn_implementation(kind)
        encode = functools.partial(model.encode, texts, batch_size=256, show_progress_bar=False)
        theirs = len(texts) / card.seconds(encode, 1.0)
        found = np.asarray(encode(), np.float32)
        cosine = float(1 - (found * ours.vectors).sum(1).min())
        numbers[f"theirs, {kind}"] = {"texts/s": theirs, "ratio": our_rate / theirs, "1 - cosine": cosine}
    return numbers


@torch.inference_mode()
def varlen(card: Card) -> Numbers:
    """1,000 texts laid end to end through torch's varlen attention, beside padded parts, both without graphs."""
    tokens = card.embedder.tokens
    plain: Any = tokens.encoder(tokens.dtype).encoder
    own = FastEncoder(tokens.module, tokens.dtype, card.device, varlen=True)
    if own.varlen is None:
        raise NotHere("it needs torch 2.10 and compute capability 8.0")
    ids = card.ids(sorted(card.texts.lengths(card.size(1000, 16)), reverse=True))

    def packed() -> torch.Tensor:
        return own(pack_by_length(ids, card.device, bounded=True), tokens.layers)[: sum(map(len, ids))]

    def padded() -> list[torch.Tensor]:
        found = []
        for part in cut_by_length(list(range(len(ids))), ids):
            texts = [ids[index] for index in part]
            batch = pack_padded([texts], tokens.pad_id, card.device, plain.dtype, tokens.longest)[0]
            hidden = plain(batch, tokens.layers)
            found.append(hidden if batch.real is None else hidden[batch.real.flatten()])
        return found

    worst = relative(packed().float(), torch.cat(padded()).float())
    on_s, off_s = card.seconds(packed, 1.0), card.seconds(padded, 1.0)
    graphs_s = card.seconds(lambda: tokens.rows(ids, tokens.layers), 1.0)
    numbers = {"ms": 1000 * on_s, "padded ms": 1000 * off_s, "as served ms": 1000 * graphs_s, "ratio": off_s / on_s}
    return within({**numbers, "deviation": worst}, worst, HALF_BOUND)


# --- 8: the service ------------------------------------------------------------------------------------


def start(card: Card, *settings: str) -> Server:
    """The service in processes of its own, ready, MiniLM for both of its models."""
    options: Any = SimpleNamespace(device=str(card.device), set=settings)
    server = make_service("service-auto", card.minilm, options, card.folder / "service.log", free_port())
    assert isinstance(server, Server)
    server.start()
    return server


def over_http(card: Card) -> Numbers:
    """Items a second of 16 callers with one item and of two with 100, each a thread of this process."""
    texts, numbers = card.texts.draw(card.texts.lengths(card.size(20_000, 800))), dict[str, Any]()
    pools = {"embed": texts, "bertscore": card.texts.pairs(texts)}
    server = start(card)
    try:
        for (kind, pool), (clients, items) in itertools.product(pools.items(), ((16, 1), (2, 100))):
            server.answers(kind, pool[:items])
            calls = [pool[first : first + items] for first in range(0, len(pool), items)]
            bodies = [json.dumps(server.request(kind, call)[1]).encode() for call in calls]
            url, _ = server.request(kind, pool[:1])
            numbers[f"{kind} {clients}×{items} items/s"] = items * answered(url, bodies, clients, card.size(3, 1))
    finally:
        server.stop()
    return numbers


def answered(url: str, bodies: Sequence[bytes], clients: int, seconds: float) -> float:
    """Answers a second that so many threads get, each with a connection and bodies of its own."""
    host, _, route = url.removeprefix("http://").partition("/")
    began = time.monotonic()

    def ask(client: int) -> int:
        connection, done = http.client.HTTPConnection(host, timeout=60), 0
        for body in itertools.cycle(bodies[client::clients]):
            if time.monotonic() >= began + seconds:
                break
            connection.request("POST", f"/{route}", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            response.read()
            done += response.status == 200
        connection.close()
        return done

    with concurrent.futures.ThreadPoolExecutor(clients) as threads:
        total = sum(threads.map(ask, range(clients)))
    return total / (time.monotonic() - began)


def eviction(card: Card) -> Numbers:
    """A model that a request names is loaded, and unloaded when it is idle: is its memory free again?"""
    save_in_hub_cache(card, "bench/bert")
    server = start(card, f"HF_HUB_CACHE={card.folder / 'hub'}", f"GPU_MODEL_TTL={card.size(5, 2)}")
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)

    def answer(method: str, route: str, body: Any = None) -> Any:
        connection.request(method, route, json.dumps(body) if body else None, {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read()
        if response.status != 200:
            raise RuntimeError(f"{route}: HTTP {response.status} {text[:200]!r}")
        return json.loads(text)

    def memory_mb(until: Callable[[dict[str, Any]], bool]) -> list[int]:
        """What /info said of it, until it says so, for half a minute at most."""
        seen: list[int] = []
        for _ in range(120):
            facts = answer("GET", "/info")
            seen.append(int(facts.get("vram_allocated_mb", 0)))
            if until(facts):
                break
            time.sleep(0.25)
        return seen

    try:
        time.sleep(card.size(3, 0))  # what /info says of memory is that old
        (before,) = memory_mb(lambda facts: True)
        answer("POST", "/bertscore", {"candidates": ["a cat"], "references": ["the dog"], "model_type": "bench/bert"})
        most = max(memory_mb(lambda facts: "bertscore:bench/bert" not in facts["loaded_models"]))
        after = memory_mb(lambda facts: facts.get("vram_allocated_mb", 0) <= before + 16)[-1]
    finally:
        server.stop()
    numbers = {"MB before": before, "with it": most, "afterwards": after}
    return within(numbers, after - before if most > before or not card.on_gpu else np.nan, 16)


def save_in_hub_cache(card: Card, name: str) -> Path:
    """A BERT of random weights, where the hub's client finds what it has downloaded."""
    import tiny_models

    commit, repository = "0" * 40, card.folder / "hub" / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    size = {} if card.quick else {"layers": 12, "hidden": 768, "heads": 12}
    return Path(tiny_models.save_bert(repository / "snapshots" / commit, **size))


BERTSCORE = (
    Check(7, "pairs of one length", batches, 120, gpu=False),
    Check(7, "pairs of mixed lengths", calls, 60, gpu=False),
    Check(7, "pairs: profile", functools.partial(profile, pair_load), gpu=False),
    Check(7, "pairs: two batches in flight", functools.partial(flights, pair_load), gpu=False),
    Check(7, "pairs: Triton kernel", triton_kernel, 90),
    Check(7, "transformers beside us", with_transformers, 45, gpu=False),
    Check(7, "bert-score beside us", with_bert_score, 60, gpu=False),
    Check(7, "66 pairs of 12 texts", old_figure, 60, gpu=False),
)
EMBED = (
    Check(7, "texts", embeddings, 60, gpu=False),
    Check(7, "texts: profile", functools.partial(profile, embed_load), gpu=False),
    Check(7, "texts: two batches in flight", functools.partial(flights, embed_load), gpu=False),
    Check(7, "texts: varlen attention", varlen),
    Check(7, "sentence-transformers beside us", with_sentence_transformers, 45, gpu=False),
)
HTTP = (
    Check(8, "over HTTP", over_http, 90, gpu=False),
    Check(8, "eviction", eviction, 90, gpu=False),
)

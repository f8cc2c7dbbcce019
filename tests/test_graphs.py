"""CUDA graphs, with a stand-in that replays on the CPU: every batch's numbers, their memory, and their failures."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from conftest import load_folder
from fake_cuda import ILLEGAL, FakeCard, answer_probes
from test_numerics_bertscore import rows, score
from transformers import AutoModel

from gpu_engine.fast_encoder import FastEncoder
from gpu_engine.graphs import CALM_BATCHES, SIGHTINGS, GraphedEncoder, ladder, step_up
from gpu_engine.packing import Group, Packed

CPU, PAD, LONGEST = torch.device("cpu"), 1, 512
LAYERS = 3


class Watched(FastEncoder):
    """Counts how often it runs; `refuse` is asked before each."""

    eager = 0

    def refuse(self) -> None:
        """Raises what the forward should raise."""

    def __call__(self, batch: Packed, num_layers: int) -> torch.Tensor:
        self.eager += 1
        self.refuse()
        return super().__call__(batch, num_layers)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> FakeCard:
    return FakeCard(monkeypatch)


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(params=["bert", "roberta", "deberta"])
def encoder(request: pytest.FixtureRequest, tmp_path: Path) -> Watched:
    save = {"bert": tiny_models.save_bert, "roberta": tiny_models.save_roberta, "deberta": tiny_models.save_deberta}
    return watched(save[request.param](tmp_path / "model"))


@pytest.fixture
def bert(tmp_path: Path) -> Watched:
    return watched(tiny_models.save_bert(tmp_path / "model"))


def watched(folder: Path) -> Watched:
    return Watched(AutoModel.from_pretrained(folder, dtype=torch.float32).eval(), torch.float32, CPU)


def padded(lengths: Sequence[int], seed: int = 0) -> Packed:
    """A batch of random texts, padded to the longest."""
    random, tokens = np.random.default_rng(seed), max(lengths)
    ids = np.full((len(lengths), tokens), PAD, np.int64)
    for row, length in zip(ids, lengths):
        row[:length] = random.integers(5, 60, length)
    real = torch.from_numpy(np.arange(tokens) < np.array(lengths)[:, None])
    mask = None if real.all() else torch.zeros(real.shape).masked_fill(~real, -torch.inf)[:, None, None, :]
    offsets = torch.arange(tokens).repeat(len(lengths))
    group = Group(0, len(lengths), tokens, mask)
    return Packed(torch.from_numpy(ids.reshape(-1)), offsets, (group,), tuple(lengths), None if mask is None else real)


def graphed(encoder: Watched, most_tokens: int = 256, layers: int = LAYERS, **more: Any) -> GraphedEncoder:
    """An encoder with its ladder captured."""
    found = GraphedEncoder(encoder, PAD, LONGEST, **more)
    ids = torch.from_numpy(np.random.default_rng(9).integers(5, 60, 37))
    assert all(found.capture(most_tokens, layers, ids))
    encoder.eager = 0
    return found


def agrees(encoder: GraphedEncoder, batch: Packed, layers: int = LAYERS) -> None:
    """Checks the real rows of a batch against the forward without graphs."""
    found = encoder(batch, layers).view(len(batch.lengths), -1, 48)
    expected = FastEncoder.__call__(encoder.encoder, batch, layers).view(len(batch.lengths), -1, 48)
    for row, (length, exact) in enumerate(zip(batch.lengths, expected)):
        torch.testing.assert_close(found[row, :length], exact[:length], atol=2e-5, rtol=1e-5)


# --- numbers -------------------------------------------------------------------------------------------


BATCHES = ([5], [8], [1, 7, 3], [16] * 3, [30, 2, 17, 30, 9], [9] * 7, [100, 64], [8] * 32)


def test_a_replay_gives_what_the_forward_gives_for_batches_that_fill_a_shape_and_that_do_not(
    encoder: Watched, card: FakeCard
) -> None:
    graphs = graphed(encoder)
    for seed in range(SIGHTINGS - 1):
        for lengths in BATCHES:
            agrees(graphs, padded(lengths, seed))
    assert encoder.eager == 0, "all of them are replays"
    for lengths in BATCHES:  # from now on without a mask, where the batch needs none
        agrees(graphs, padded(lengths, 7))
    encoder.eager = 0
    for lengths in BATCHES:
        agrees(graphs, padded(lengths, 8))
    assert encoder.eager == 0


def test_what_one_batch_leaves_in_the_graphs_memory_does_not_reach_the_next(bert: Watched, card: FakeCard) -> None:
    graphs = graphed(bert)
    alone = graphs(padded([3, 7], 5), LAYERS)
    graphs(padded([16] * 16, 1), LAYERS)
    again = graphs(padded([3, 7], 5), LAYERS)
    torch.testing.assert_close(again, alone, atol=0, rtol=0)
    torch.testing.assert_close(alone, again, atol=0, rtol=0)
    full = graphs(padded([8, 8], 5), LAYERS)
    kept = again.clone(), full.clone()
    graphs(padded([5, 6], 8), LAYERS)
    assert torch.equal(again, kept[0]), "an answer is its caller's to keep"
    assert torch.equal(full, kept[1])


def test_a_text_that_overflows_does_not_spoil_the_texts_after_it(bert: Watched, card: FakeCard) -> None:
    graphs, poison = graphed(bert), padded([16, 16], 1)
    bert.embed.words[2] = torch.inf
    poison.ids.fill_(2)
    assert not graphs(poison, LAYERS).isfinite().any()
    assert graphs(padded([13]), LAYERS).isfinite().all(), "even infinity that weighs nothing would be NaN"


def test_an_engine_captures_the_ladder_serves_from_it_and_frees_it_for_want_of_memory(
    card: FakeCard, tmp_path: Path
) -> None:
    folder = tiny_models.save_bert(tmp_path / "model")
    exact, engine = load_folder("bertscore", folder), load_folder("bertscore", folder)
    fast, engine.tokens.lanes = watched(folder), None  # as on a GPU: one thread
    engine.tokens._encoders[torch.float32] = GraphedEncoder(fast, engine.tokens.pad_id, engine.tokens.longest)
    assert list(engine.warm_up(64)) == [True] * (1 + len(ladder(64, 512)))
    assert len(card.graphs) == len(ladder(64, 512))
    pair, fast.eager = (["the cat sat"], ["a dog ran"]), 0
    np.testing.assert_allclose(rows(score(engine, *pair)), rows(score(exact, *pair)), atol=2e-6)
    assert fast.eager == 0
    engine.release_memory()
    np.testing.assert_allclose(rows(score(engine, *pair)), rows(score(exact, *pair)), atol=2e-6)
    assert fast.eager == 1


def test_layers_and_masks_have_graphs_of_their_own(bert: Watched, card: FakeCard) -> None:
    graphs = graphed(bert)
    for _ in range(SIGHTINGS):
        for layers in (1, 2, LAYERS):
            agrees(graphs, padded([8, 8]), layers)
            agrees(graphs, padded([8, 3]), layers)
    bert.eager = 0
    for layers in (1, 2, LAYERS):
        agrees(graphs, padded([8, 8], 7), layers)
        agrees(graphs, padded([8, 3], 7), layers)
    assert bert.eager == 0


@pytest.mark.parametrize("batch", [padded([300]), padded([40] * 7)], ids=["no shape is as large", "over the budget"])
def test_a_batch_that_no_shape_holds_runs_as_it_is(batch: Packed, bert: Watched, card: FakeCard) -> None:
    graphs = graphed(bert)
    for _ in range(SIGHTINGS + 1):
        agrees(graphs, batch)
    assert bert.eager == SIGHTINGS + 1
    assert not [graph for graph in card.graphs if graph.replays > 1]


def test_a_batch_with_rows_of_no_text_runs_as_it_is(bert: Watched, card: FakeCard) -> None:
    graphs, batch = graphed(bert), padded([8])
    batch = replace(batch, ids=torch.cat([batch.ids, batch.ids]), offsets=batch.offsets.repeat(2))
    assert graphs(batch, LAYERS).shape == (16, 48)
    assert bert.eager == 1


def test_a_large_batch_runs_as_it_is_where_its_shape_would_be_mostly_padding(bert: Watched, card: FakeCard) -> None:
    graphs = graphed(bert, 9216, 1, most_graphs=1)
    for _ in range(SIGHTINGS + 1):
        graphs(padded([65] * 65), 1)  # 96 * 96, twice what is there
    assert bert.eager == SIGHTINGS + 1
    for _ in range(SIGHTINGS + 1):
        graphs(padded([90] * 90), 1)
    assert len(card.graphs) == 2
    assert card.graphs[-1].replays > 1


# --- the ladder ----------------------------------------------------------------------------------------


def test_the_ladder_holds_every_batch_within_the_budget_whose_shape_does_too() -> None:
    shapes = ladder(2048, 100)
    assert shapes == sorted(shapes, key=lambda shape: shape[0] * shape[1])
    assert max(rows * tokens for rows, tokens in shapes) <= 2048
    assert {tokens for _, tokens in shapes} == {8, 16, 24, 32, 48, 64, 96, 100}
    assert sorted({rows for rows, tokens in shapes if tokens == 64}) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32]
    assert [step_up(count) for count in (1, 5, 9, 13, 17, 4096)] == [1, 6, 12, 16, 24, 4096]
    assert len(ladder(32_768, 512)) <= 256, "what is captured at load fits among the graphs that are kept"


def test_all_graphs_share_one_stream_and_one_pool_and_nothing_waits_for_the_device(
    bert: Watched, card: FakeCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: pytest.fail("a capture stops the device"))
    graphs = graphed(bert)
    assert len(card.graphs) == len(ladder(256, LONGEST)) > 20
    assert len(card.streams) == 1
    assert len({graph.pool for graph in card.graphs}) == 1
    assert card.current is card.main
    (side,) = card.streams
    assert (side.waited_for, card.main.waited_for) == ([card.main] * len(card.graphs), [side] * len(card.graphs))
    graphs.release()
    for _ in range(CALM_BATCHES + SIGHTINGS):
        graphs(padded([5]), LAYERS)
    assert len(card.streams) == 1


def test_the_least_recently_used_graph_goes_first(bert: Watched, card: FakeCard) -> None:
    graphs = GraphedEncoder(bert, PAD, LONGEST, most_graphs=2)
    assert all(graphs.capture(256, LAYERS, torch.arange(5, 60)))
    for lengths in ([3], *[[3, 3]] * SIGHTINGS, [3]):  # captured at load: 1 and 2 texts of 8 tokens
        agrees(graphs, padded(lengths))
    for _ in range(SIGHTINGS):
        agrees(graphs, padded([3, 3, 3]))
    bert.eager = 0
    agrees(graphs, padded([3]))
    agrees(graphs, padded([3, 3, 3]))
    assert bert.eager == 0
    agrees(graphs, padded([3, 3]))
    assert bert.eager == 1, "it went, and has to come back often again"


# --- failures ------------------------------------------------------------------------------------------


def test_before_the_ladder_is_captured_nothing_is(bert: Watched, card: FakeCard) -> None:
    graphs = GraphedEncoder(bert, PAD, LONGEST)
    for _ in range(SIGHTINGS + 1):
        agrees(graphs, padded([5]))
    assert not card.graphs


def test_a_capture_that_fails_is_ended_and_the_forward_goes_on_without_graphs(
    bert: Watched, card: FakeCard, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse() -> None:
        if card.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing")

    bert.refuse = refuse  # type: ignore[method-assign]
    graphs = GraphedEncoder(bert, PAD, LONGEST)
    with caplog.at_level(logging.WARNING):
        assert list(graphs.capture(256, LAYERS, torch.arange(5, 60))) == []
    assert "CUDA graphs are off: operation not permitted when stream is capturing" in caplog.text
    assert card.capturing is None
    assert card.current is card.main
    for _ in range(CALM_BATCHES + SIGHTINGS + 1):
        agrees(graphs, padded([5]))
    assert len(card.graphs) == 1, "for good"


def test_a_capture_that_breaks_off_gives_its_memory_pool_back(bert: Watched, card: FakeCard) -> None:
    card.break_off = RuntimeError("CUDA error: operation failed due to a previous error during capture")
    graphs = GraphedEncoder(bert, PAD, LONGEST)
    assert list(graphs.capture(256, LAYERS, torch.arange(5, 60))) == []
    assert card.ended_pools == [card.graphs[0].pool]
    agrees(graphs, padded([5]))


def test_a_replay_that_differs_from_the_forward_is_never_served(
    bert: Watched, card: FakeCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = GraphedEncoder(bert, PAD, LONGEST)
    monkeypatch.setattr("fake_cuda.FakeGraph.replay", lambda graph: None)
    assert list(graphs.capture(256, LAYERS, torch.arange(5, 60))) == []
    agrees(graphs, padded([5]))


@pytest.mark.parametrize("during", ["capture", "replay"])
def test_memory_that_runs_out_frees_the_graphs_and_after_some_calm_they_come_back(
    during: str, bert: Watched, card: FakeCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = graphed(bert)

    def no_memory(*given: Any) -> None:
        if during == "replay" or card.capturing is not None:
            raise torch.OutOfMemoryError("CUDA out of memory")

    if during == "replay":
        with monkeypatch.context() as patches:
            patches.setattr("fake_cuda.FakeGraph.replay", no_memory)
            agrees(graphs, padded([5]))
    else:
        bert.refuse = no_memory  # type: ignore[method-assign]
        for _ in range(SIGHTINGS):
            agrees(graphs, padded([5]), 2)
        bert.refuse = lambda: None  # type: ignore[method-assign]
    captured = len(card.graphs)
    for _ in range(CALM_BATCHES):
        agrees(graphs, padded([5]))
    assert len(card.graphs) == captured, "all is quiet"
    for _ in range(SIGHTINGS):
        agrees(graphs, padded([5]))
    assert len(card.graphs) == captured + 1
    bert.eager = 0
    agrees(graphs, padded([6]))
    assert bert.eager == 0


def test_a_context_that_breaks_in_a_replay_is_told(
    bert: Watched, card: FakeCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(graph: Any) -> None:
        answer_probes(monkeypatch, RuntimeError(ILLEGAL))
        raise RuntimeError(ILLEGAL)

    graphs = graphed(bert)
    monkeypatch.setattr("fake_cuda.FakeGraph.replay", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        graphs(padded([5]), LAYERS)

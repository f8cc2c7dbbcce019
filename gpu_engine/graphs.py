"""CUDA graphs of our forward: one call replaces the thousand that launch its kernels. Knows no task."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter, OrderedDict
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpu_engine.device import is_fatal, is_out_of_memory
from gpu_engine.fast_encoder import FastEncoder
from gpu_engine.packing import Group, Packed

log = logging.getLogger(__name__)

SMALL_TOKENS = 4096  # launching costs more than computing: any shape that holds the batch will do
MOST_SPARE = 1.25  # of larger batches: tokens that are computed for each that is there
CALM_BATCHES = 64  # after memory ran out
SIGHTINGS = 3  # of a shape that has no graph, before it gets one


class Shape(NamedTuple):
    """What a graph is good for. masked: it can hold texts shorter than `tokens`."""

    rows: int
    tokens: int
    num_layers: int
    masked: bool


class Graph(NamedTuple):
    """A captured forward: its inputs, views of memory that all graphs share, and its output (rows, tokens, hidden)."""

    graph: torch.cuda.CUDAGraph
    inputs: Packed
    output: Tensor


def step_up(count: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24 …, so that few sizes serve all."""
    step = 1 << max(0, (count - 1).bit_length() - 2)
    return -(-count // step) * step


def ladder(most_tokens: int, longest: int) -> list[tuple[int, int]]:
    """Every (rows, tokens) of at most `most_tokens` that batches are laid into, the smallest first."""
    widths = {width_of(tokens, longest) for tokens in range(1, longest + 1)}
    shapes = {(step_up(rows), width) for width in widths for rows in range(1, most_tokens // width + 1)}
    return sorted((s for s in shapes if s[0] * s[1] <= most_tokens), key=lambda s: (s[0] * s[1], s))


def width_of(tokens: int, longest: int) -> int:
    """Tokens of the shape that texts of so many are laid into."""
    return min(8 * step_up(-(-tokens // 8)), longest)


class GraphedEncoder:
    """A FastEncoder whose batches replay graphs, each in the smallest shape of a ladder that holds it.

    What fits none, or would fill too little of it, runs eagerly; so does everything before `capture` was called,
    and all for good once a graph failed. The thread that calls `capture` is the only one that may call it then.
    pad_id: a token to fill up with. longest: positions the model has.
    """

    def __init__(self, encoder: FastEncoder, pad_id: int, longest: int, most_graphs: int = 256) -> None:
        self.encoder, self.dtype = encoder, encoder.dtype
        self.pad_id, self.longest, self.most_graphs = pad_id, longest, most_graphs
        self.most_tokens = 0  # that a graph holds
        self._calm = 0  # batches to go until graphs are captured again
        self._seen: Counter[Shape] = Counter()
        self._graphs: OrderedDict[Shape, Graph] = OrderedDict()  # least recently used first
        self._memory: tuple[Tensor, Tensor, Tensor] | None = None  # ids, mask, output of whichever graph runs
        self._pool: Any = None  # what graphs need in between; one runs at a time
        self._side: Any = None  # the stream that captures: each new one would keep a workspace of its own

    def __call__(self, batch: Packed, num_layers: int) -> Tensor:
        """As FastEncoder; the result is the caller's to keep."""
        shape = self._shape(batch, num_layers)
        try:
            if shape is not None:
                return self._replay(shape, batch)
        except RuntimeError as error:
            self._give_up(error)
        return self.encoder(batch, num_layers)  # outside of the block: the error's frames would hold the memory

    def capture(self, most_tokens: int, num_layers: int, ids: Tensor) -> Iterator[bool]:
        """Captures the ladder, a shape a step; True after each. ids: (n,) of any text, to try the graphs on."""
        self.most_tokens, shapes = most_tokens, ladder(most_tokens, self.longest)[: self.most_graphs]
        for rows, tokens in shapes:
            size = rows * tokens
            tiled = ids.repeat(-(-size // len(ids)))[:size]
            example = Packed(tiled, tiled, (Group(0, rows, tokens),), (tokens,) * rows, None)
            try:
                self._capture(Shape(rows, tokens, num_layers, True), example)
            except RuntimeError as error:
                self._give_up(error)
                return
            yield True

    def release(self) -> None:
        """Frees the graphs' memory; they are captured anew, one by one, after some calm."""
        self._graphs.clear()
        self._seen.clear()
        self._memory = self._pool = None
        self._calm = CALM_BATCHES

    def _shape(self, batch: Packed, num_layers: int) -> Shape | None:
        """The shape to lay a batch into, if it has a graph or came back often enough; None for the eager forward."""
        if not self.most_tokens or len(batch.groups) != 1:
            return None
        if self._calm:
            self._calm -= 1
            return None
        (group,) = batch.groups
        rows, tokens = step_up(group.count), width_of(group.tokens, self.longest)
        most_worth = max(SMALL_TOKENS, MOST_SPARE * group.count * group.tokens)
        if rows * tokens > min(self.most_tokens, most_worth) or len(batch.ids) != group.count * group.tokens:
            return None
        bare = group.mask is None and group.tokens == tokens  # attention without a mask is faster
        for shape in (Shape(rows, tokens, num_layers, masked) for masked in ([False, True] if bare else [True])):
            self._seen[shape] += 1
            if shape in self._graphs or self._seen[shape] >= SIGHTINGS:
                return shape
        return None

    def _give_up(self, error: RuntimeError) -> None:
        """Goes on without graphs: for a while where memory ran out, else for good. Raises what broke the device."""
        if is_fatal(error):
            raise error
        self.release()
        if is_out_of_memory(error):
            log.warning("no memory for CUDA graphs now: %s", error)
        else:
            log.warning("CUDA graphs are off: %s", error)
            self.most_tokens = 0

    def _capture(self, shape: Shape, batch: Packed) -> None:
        """Captures a shape, and compares its replay with the eager forward of a batch that it holds."""
        while len(self._graphs) >= self.most_graphs:
            evicted, _ = self._graphs.popitem(last=False)
            del self._seen[evicted]
        main = torch.cuda.current_stream()
        self._side = self._side or torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        self._side.wait_stream(main)
        with torch.cuda.stream(self._side):
            inputs = self._inputs(shape, batch.ids.device)
            lay(batch, inputs, self.pad_id)
            expected = self.encoder(inputs, shape.num_layers)  # it also warms the libraries up, outside the capture
            output = self._output(expected)
            graph = torch.cuda.CUDAGraph()
            with capturing(graph, self._pool):
                output.copy_(self.encoder(inputs, shape.num_layers))
            output.zero_()  # the check must not see what is left of another run
            graph.replay()
            if not torch.allclose(output.float(), expected.float(), rtol=1e-2, atol=1e-2, equal_nan=True):
                raise RuntimeError("a replay differs from the eager forward")
        main.wait_stream(self._side)
        self._graphs[shape] = Graph(graph, inputs, output.view(shape.rows, shape.tokens, -1))

    def _inputs(self, shape: Shape, device: torch.device) -> Packed:
        """A shape's part of the memory that every graph reads."""
        rows, tokens, _, masked = shape
        if self._memory is None:
            ids = torch.full((self.most_tokens,), self.pad_id, dtype=torch.int64, device=device)
            self._memory = ids, torch.empty_like(ids, dtype=self.dtype), torch.empty(0, device=device)
        ids, mask, _ = self._memory
        group = Group(0, rows, tokens, mask[: rows * tokens].view(rows, 1, 1, tokens) if masked else None)
        offsets = torch.arange(tokens, device=device).repeat(rows)
        return Packed(ids[: rows * tokens], offsets, (group,), (tokens,) * rows, None)

    def _output(self, like: Tensor) -> Tensor:
        """As much of the memory that every graph writes as `like`, (rows, hidden), needs."""
        assert self._memory is not None
        ids, mask, output = self._memory
        if not output.numel():
            output = like.new_empty(self.most_tokens, like.shape[1])
            self._memory = ids, mask, output
        return output[: like.shape[0]]

    def _replay(self, shape: Shape, batch: Packed) -> Tensor:
        if shape not in self._graphs:
            self._capture(shape, batch)
        self._graphs.move_to_end(shape)
        graph, inputs, output = self._graphs[shape]
        lay(batch, inputs, self.pad_id)
        graph.replay()
        (group,) = batch.groups
        kept = output[: group.count, : group.tokens].clone(memory_format=torch.contiguous_format)
        return kept.view(group.count * group.tokens, -1)


def lay(batch: Packed, inputs: Packed, pad_id: int) -> None:
    """Writes a batch into a graph's inputs, which may have more rows and tokens; all else is padding.

    Rows beyond the texts attend to themselves: a row without any token to attend to would be NaN.
    """
    (group,), (whole,) = batch.groups, inputs.groups
    count, tokens = group.count, group.tokens
    inputs.ids.fill_(pad_id)
    inputs.ids.view(whole.count, whole.tokens)[:count, :tokens].copy_(batch.ids.view(count, tokens))
    if whole.mask is not None:
        whole.mask.zero_()
        whole.mask[:count, :, :, tokens:] = -torch.inf
        if group.mask is not None:
            whole.mask[:count, :, :, :tokens].copy_(group.mask)


@contextlib.contextmanager
def capturing(graph: torch.cuda.CUDAGraph, pool: Any) -> Iterator[None]:
    """Captures what the current stream is given in the block.

    torch.cuda.graph would wait for the device first and empty its caches, in the middle of serving.
    """
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")  # a loader may allocate meanwhile
    try:
        yield
    except BaseException:
        with contextlib.suppress(RuntimeError):
            _end_capture(graph, pool)
        raise
    _end_capture(graph, pool)


def _end_capture(graph: torch.cuda.CUDAGraph, pool: Any) -> None:
    try:
        graph.capture_end()
    except RuntimeError:  # of a capture that broke off torch ends the stream's part, not the allocator's
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        raise

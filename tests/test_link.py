"""What may go wrong between the service and its engine is told: nobody waits for an answer that can't come."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import pytest
from conftest import FakeEngine, FakeLoader, raising, running, settings, value_of, without_options

from gpu_engine.link import Launched, Life, LoopChannel, launch_in_thread
from gpu_engine.messages import Answered, Channel, Erred, Logged
from gpu_engine.process import ToService
from gpu_engine.work import InvalidInput

pytestmark = pytest.mark.anyio


async def test_an_engine_that_does_not_die_when_it_is_killed_is_given_up_and_replaced() -> None:
    loader, launches = FakeLoader(), list[Launched]()

    def launch() -> Launched:
        launched = launch_in_thread(without_options(loader))
        launches.append(launched)
        return replace(launched, kill=lambda: None) if len(launches) == 1 else launched

    config = settings(gpu_request_timeout=0.02, gpu_max_batch_size=1000, gpu_cache_mb=0)
    async with running(config, loader, launch=launch, hang_s=0.0, pause_s=0.01) as service:
        first = service.embed_engine
        first.hold.clear()
        await service.embed("hangs")
        loader.engines.clear()
        await service.until(lambda: service.runtime.restarts > 0)
        await service.until(lambda: service.runtime.facts is not None and not service.runtime.down)
        await service.until(lambda: all(e.state == "ready" for e in service.runtime.models.entries()))
        assert (await service.client.get("/health")).status_code == 200
        first.hold.set()
        launches[0].kill()


async def test_each_engine_that_is_ready_is_announced(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        async with running(settings(), pause_s=0.01) as service:
            service.runtime._life.kill()  # type: ignore[union-attr]
            await service.until(lambda: service.runtime.restarts == 1)
            await service.until(lambda: all(e.state == "ready" for e in service.runtime.models.entries()))
    assert sum(record.getMessage().startswith("ready (") for record in caplog.records) == 2


class Unpicklable(FakeEngine):
    """An engine whose result can't cross."""

    def prepare(self, request: Any) -> Any:
        work = super().prepare(request)
        work.result = lambda: threading.Lock()  # type: ignore[method-assign]
        return work


async def test_an_answer_that_cannot_cross_is_an_error_and_the_next_one_crosses() -> None:
    async with running(settings()) as service:
        engine = service.embed_engine
        prepare = engine.prepare
        engine.prepare = Unpicklable("embed").prepare  # type: ignore[method-assign]
        refused = await service.embed("a")
        assert (refused.status_code, refused.json()["code"]) == (500, "internal")
        engine.prepare = prepare  # type: ignore[method-assign]
        assert (await service.embed("b")).status_code == 200


def test_messages_that_pile_up_cross_together_and_a_bad_one_harms_no_other() -> None:
    ours, theirs = socket.socketpair()
    channel, other = Channel(Connection(ours.detach())), Connection(theirs.detach())
    for message in (Answered(1, "one"), Answered(2, threading.Lock()), Answered(3, "three")):
        channel.send(message)
    channel.finish()
    seen: list[Any] = []
    while len(seen) < 3:
        seen += other.recv()
    assert seen == [Answered(1, "one"), Erred(2, "internal", "TypeError"), Answered(3, "three")]


@pytest.mark.skipif(os.name == "nt", reason="the loop can't watch a socket there")
async def test_the_first_messages_of_a_long_turn_are_sent_in_it_and_all_in_order() -> None:
    ours, theirs = socket.socketpair()
    heard, other = list[Any](), Connection(theirs.detach())
    channel = LoopChannel(asyncio.get_running_loop(), Connection(ours.detach()), heard.extend, lambda: None)
    for number in range(6):
        assert not other.poll()
        channel.send(number)
        if number == 3:
            assert other.recv() == [0, 1, 2, 3], "before the turn ends"
    await asyncio.sleep(0)
    assert other.recv() == [4, 5]
    channel.send(6)
    await asyncio.sleep(0)
    assert other.recv() == [6]
    channel.close()
    other.close()


@pytest.fixture(params=["the loop watches", "a thread receives"])
async def receiving(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways in which the service hears from its engine: where the loop can't watch a connection, as on Windows."""

    def refuse(self: Any, descriptor: int, call: Any, *args: Any) -> None:
        raise NotImplementedError

    if request.param == "a thread receives":
        monkeypatch.setattr(type(asyncio.get_running_loop()), "add_reader", refuse)


@pytest.mark.usefixtures("receiving")
async def test_what_is_no_message_ends_the_life_and_says_so() -> None:
    ours, theirs = socket.socketpair()
    ends: list[str] = []
    over = asyncio.Event()

    def launch() -> Launched:
        return Launched(Connection(ours.detach()), lambda: None, lambda: "was killed by signal 9")

    def on_end(life: Life, how: str) -> None:
        ends.append(how)
        over.set()

    Life(asyncio.get_running_loop(), launch, lambda life, messages: None, on_end)
    with Connection(theirs.detach()) as other:
        other.send_bytes(b"no pickle")
        await asyncio.wait_for(over.wait(), 30)
    assert ends == ["was killed by signal 9"]


def test_a_library_whose_log_line_cannot_be_formatted_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)
    sent: list[Logged] = []
    logger = logging.getLogger("a library of the tests")
    logger.propagate = False
    logger.addHandler(ToService(sent.append))
    logger.warning("%d texts", "three")
    logger.warning("fine")
    assert [line.message for line in sent] == ["fine"]


@pytest.mark.usefixtures("receiving")
async def test_a_service_asks_computes_and_stops_either_way() -> None:
    async with running(settings(gpu_cache_mb=0)) as service:
        answers = await asyncio.gather(*(service.embed(f"text {n}") for n in range(20)))
        assert [answer.status_code for answer in answers] == [200] * 20
        assert [answer.json()["embeddings"] for answer in answers] == [
            [[value_of(f"text {n}"), 1.0]] for n in range(20)
        ]


@pytest.mark.usefixtures("receiving")
async def test_what_does_not_fit_into_the_socket_at_once_crosses_whole() -> None:
    """Both directions: a body of megabytes, and an answer of as many."""
    texts = [f"{number:06} " + "x" * 9000 for number in range(1500)]
    async with running(settings(gpu_max_batch_size=2000, gpu_max_body_mb=64)) as service:
        answer = await service.embed(*texts)
        assert answer.status_code == 200
        assert [row[0] for row in answer.json()["embeddings"]] == [value_of(text) for text in texts]
        echo = "y" * 3_000_000
        service.embed_engine.fail = raising(InvalidInput(echo))
        refused = await service.embed("z")
        assert refused.json()["detail"] == echo


async def test_an_engine_whose_service_is_gone_ends_although_it_hears_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parent is another process then; the thread that reads may hang and not hear of it."""
    async with running(settings(), pause_s=0.01) as service:
        parent = os.getppid()
        monkeypatch.setattr(os, "getppid", lambda: parent + 1)
        await service.until(lambda: service.runtime.restarts > 0)
        monkeypatch.undo()
        await service.until(lambda: all(e.state == "ready" for e in service.runtime.models.entries()))

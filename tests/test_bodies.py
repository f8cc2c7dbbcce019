"""Bodies that are too large, too many at once, or slow: 413, 503, 408, and the connection is closed where needed."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Any

import pytest
from conftest import JSON, call, refused, running, sends_a_text, settings

import gpu_service
from gpu_service import BodyLimit

pytestmark = pytest.mark.anyio


async def test_an_announced_body_over_the_limit_is_413_and_not_read() -> None:
    async def receive() -> Any:
        return {"type": "http.disconnect"}  # a body that was asked for would be no 413

    async with running(settings(gpu_max_body_mb=1)) as service:
        headers = [(b"content-length", b"1048577"), (b"content-type", b"application/json")]
        status, answered, body = await service.raw("/embed", method="POST", headers=headers, receive=receive)
        assert status == 413
        assert answered[b"connection"] == b"close"
        assert b"1,048,577" in body
        assert b"1,048,576" in body


@pytest.mark.parametrize(("zeros", "status"), [(b"0" * 5000, 200), (b"", 200), (b"9" * 5000, 413)])
async def test_a_length_of_thousands_of_digits_is_read(zeros: bytes, status: int) -> None:
    async with running(settings()) as service:
        headers = [(b"content-length", zeros + b"15"), (b"content-type", b"application/json")]
        assert (await service.raw("/embed", method="POST", headers=headers, receive=sends_a_text()))[0] == status


async def test_a_chunked_body_over_the_limit_is_413_before_it_is_read_whole() -> None:
    read = read_when_answered = 0

    async def receive() -> Any:
        nonlocal read
        read += 65_536
        return {"type": "http.request", "body": b" " * 65_536, "more_body": True}

    async with running(settings(gpu_max_body_mb=1)) as service:

        async def app(scope: Any, receive: Any, send: Any) -> None:
            async def noting(message: Any) -> None:
                nonlocal read_when_answered
                read_when_answered = read_when_answered or read
                await send(message)

            await service.app(scope, receive, noting)

        headers = [(b"transfer-encoding", b"chunked"), (b"content-type", b"application/json")]
        status, answered, body = await call(app, "/embed", method="POST", headers=headers, receive=receive)
    assert (status, answered[b"connection"]) == (413, b"close")
    assert b"more than 1,048,576 bytes" in body
    assert b"GPU_MAX_BODY_MB" in body
    assert read_when_answered == 2**20 + 65_536
    assert read <= read_when_answered + gpu_service.LINGER_BYTES, "an endless body is thrown away for a while only"


async def test_an_answer_before_its_body_ends_the_connection_and_one_after_does_not() -> None:
    headers = [(b"content-length", b"15"), (b"content-type", b"application/json")]
    async with running(settings(api_key="secret-key")) as service:
        with_key = [*headers, (b"x-api-key", b"secret-key")]
        for path, method, sent, status in (
            ("/embed", "POST", headers, 401),
            ("/nothing", "POST", with_key, 404),
            ("/embed", "GET", with_key, 405),
            ("/health", "GET", headers, 200),
        ):
            seen, answered, _ = await service.raw(path, method=method, headers=sent, receive=sends_a_text())
            assert (seen, answered.get(b"connection")) == (status, b"close"), path
        seen, answered, _ = await service.raw("/embed", method="POST", headers=with_key, receive=sends_a_text())
        assert (seen, answered.get(b"connection")) == (200, None)
        seen, answered, _ = await service.raw("/status", headers=headers[1:])
        assert (seen, answered.get(b"connection")) == (401, None)


async def test_a_body_longer_than_announced_is_413() -> None:
    messages = [{"type": "http.request", "body": b" " * 700_000, "more_body": True}] * 3

    async def receive() -> Any:
        return messages.pop() if messages else {"type": "http.disconnect"}

    async with running(settings(gpu_max_body_mb=1)) as service:
        headers = [(b"content-length", b"10"), (b"content-type", b"application/json")]
        status, _, _ = await service.raw("/embed", method="POST", headers=headers, receive=receive)
        assert status == 413


async def test_a_body_of_exactly_the_limit_is_read() -> None:
    body = b'{"texts":["a"]}'.ljust(2**20)
    async with running(settings(gpu_max_body_mb=1)) as service:
        assert (await service.client.post("/embed", content=body, headers=JSON)).status_code == 200
        refused(await service.client.post("/embed", content=body + b" ", headers=JSON), 413, "body_too_large")


async def test_a_sender_that_stalls_is_cut_with_408() -> None:
    first = [{"type": "http.request", "body": b'{"texts":', "more_body": True}]

    async def receive() -> Any:
        return first.pop() if first else await asyncio.Event().wait()

    async with running(settings()) as service:
        impatient = BodyLimit(service.app, 2**20, timeout_s=0.02)
        status, _, body = await call(impatient, "/embed", method="POST", receive=receive)
        assert status == 408
        assert b"body_timeout" in body


async def test_a_sender_that_trickles_has_one_deadline_for_the_whole_body() -> None:
    async def receive() -> Any:
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": b" ", "more_body": True}

    async with running(settings()) as service:
        impatient = BodyLimit(service.app, 2**20, timeout_s=0.1)
        status, _, body = await call(impatient, "/embed", method="POST", receive=receive)
        assert status == 408
        assert b"within 0.1 s" in body


async def test_bodies_that_are_held_at_once_have_a_limit_together_and_give_it_back() -> None:
    body, rest, waiting = b'{"texts":["a"],"input":"a"}'.ljust(2**20), asyncio.Event(), []
    headers = [(b"content-type", b"application/json"), (b"content-length", b"1048576")]

    def sender(stays: bool) -> Callable[[], Any]:
        parts = [body[-1:], body[:-1]]

        async def receive() -> Any:
            if not parts:
                return await asyncio.Event().wait()
            if len(parts) == 1 and not stays:
                return {"type": "http.disconnect"}
            if len(parts) == 1:
                waiting.append(receive)
                await rest.wait()
            return {"type": "http.request", "body": parts.pop(), "more_body": bool(parts)}

        return receive

    async with running(settings(gpu_max_body_mb=1)) as service:

        async def send(path: str, stays: bool) -> tuple[int, dict[bytes, bytes], bytes]:
            return await service.raw(path, method="POST", headers=headers, receive=sender(stays))

        held = [asyncio.create_task(send("/embed", True)) for _ in range(gpu_service.BODIES_HELD)]
        await service.until(lambda: len(waiting) == len(held))
        for path, expected in (("/embed", 503), ("/v1/embeddings", 429)):
            status, answered, text = await send(path, False)
            assert (status, answered[b"connection"]) == (expected, b"close")
            assert int(answered[b"retry-after"]) >= 1
            assert b"8,388,608" in text
        rest.set()
        assert [(await task)[0] for task in held] == [200] * len(held)
        assert (await send("/embed", True))[0] == 200


@pytest.mark.anyio
@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 does not count cancellations")
async def test_a_cancellation_in_the_turn_of_the_deadline_is_not_taken_for_it() -> None:
    loop = asyncio.get_running_loop()

    async def wait(deadline: float) -> None:
        await gpu_service.before(deadline, loop.create_future())

    deadline = loop.time() + 0.01
    late = asyncio.ensure_future(wait(deadline))
    with pytest.raises(TimeoutError):
        await late
    cancelled = asyncio.ensure_future(wait(deadline := loop.time() + 0.01))
    loop.call_at(deadline, cancelled.cancel)
    with pytest.raises(asyncio.CancelledError):
        await cancelled

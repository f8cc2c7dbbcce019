"""Hostile input on a real socket, against real models: a clear 4xx or a right answer, and never a 5xx.

What needs neither a wire nor a real tokenizer stands in the files on bad requests, limits, bodies and model names.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from conftest import FakeLoader, settings
from live import LiveService, request_bytes, serving, until

import gpu_service

KEY = "sesame"


@pytest.fixture(scope="module")
def live() -> Iterator[LiveService]:
    with serving(settings(gpu_max_body_mb=1)) as service:
        yield service


@pytest.fixture(autouse=True)
def alive_afterwards(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test sends, the service answers the next caller."""
    yield
    if "live" in request.fixturenames:
        service: LiveService = request.getfixturevalue("live")
        assert embed(service, "still here").status_code == 200
        assert httpx.get(f"{service.url}/health").status_code == 200


def embed(service: LiveService, *texts: str) -> httpx.Response:
    return httpx.post(f"{service.url}/embed", json={"texts": list(texts)}, timeout=60)


def vectors(response: httpx.Response) -> np.ndarray:
    """Checks an answer's vectors: finite and of unit length."""
    assert response.status_code == 200, response.text
    rows = np.array(response.json()["embeddings"])
    assert np.isfinite(rows).all()
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-4)
    return rows


def refused(status: int, body: bytes, *, among: tuple[int, ...] = (400, 404, 405, 408, 413, 422)) -> dict[str, Any]:
    """Checks an error's form: nothing internal, and short."""
    assert status in among, (status, body[:300])
    error = json.loads(body)
    assert error["detail"]
    assert len(body) < 600
    for internal in (b"Traceback", b".py", b"site-packages", b"/root"):
        assert internal not in body
    return dict(error)


def raw(service: LiveService, data: bytes) -> tuple[int, bytes]:
    """Sends bytes as they are; the status and body of the first answer."""
    with socket.create_connection(service.address, timeout=30) as sock:
        with contextlib.suppress(ConnectionError):  # refused while we still send
            sock.sendall(data)
        answer = b""
        while b"\r\n\r\n" not in answer:
            more = sock.recv(65536)
            assert more, f"closed without an answer: {answer!r}"
            answer += more
        head, _, body = answer.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        while length is None or len(body) < int(length[1]):
            more = sock.recv(65536)
            if not more:
                break
            body += more
    return int(head.split(b" ", 2)[1]), body


# --- texts ---------------------------------------------------------------------------------------------

ODD_TEXTS = {
    "a hundred empty strings": [""] * 100,
    "NUL": ["\0", "a\0b", "\0" * 1000],
    "right-to-left marks": ["\u200fshalom\u202e abc \u202c", "\u2066\u2067\u2068\u2069"],
    "words of ten thousand characters": ["x" * 10_000, "ab" * 5_000, "é" * 10_000, "日" * 10_000],
    "characters beyond the first plane": ["𝕏" * 10_000, "🙂" * 100, "👩‍👩‍👧‍👦" * 100],
    "a letter under a thousand accents": ["a" + "\u0301" * 1000],
    "only white space": [" ", "\n\t\r", "\u00a0\u2003\u3000", "\u200b\u200c\u200d\ufeff"],
    "noncharacters and private use": ["\uffff\ufffe", "\U0010ffff", "\ue000"],
    "what looks like special tokens": ["[CLS] [SEP] [PAD] [MASK] [UNK]", "<s></s><pad>", "[PAD]" * 600],
    "control characters": ["\x01\x02\x1b[31m\x7f\x85"],
}


@pytest.mark.parametrize("texts", ODD_TEXTS.values(), ids=ODD_TEXTS)
def test_odd_texts_have_finite_embeddings_and_each_its_own(live: LiveService, texts: list[str]) -> None:
    rows = vectors(embed(live, *texts[:99], "The cat sat on the mat."))
    assert len(rows) == min(len(texts), 99) + 1
    assert len(vectors(embed(live, *texts))) == len(texts)
    np.testing.assert_allclose(rows[-1], vectors(embed(live, "The cat sat on the mat."))[0], atol=1e-4)


@pytest.mark.parametrize("texts", ODD_TEXTS.values(), ids=ODD_TEXTS)
def test_odd_texts_are_scored_with_finite_numbers(live: LiveService, texts: list[str]) -> None:
    candidates, references = [*texts, "The cat sat."][:100], ["A cat sat there.", *texts][: min(len(texts) + 1, 100)]
    for more in ({}, {"idf": True}):
        body = {"candidates": candidates, "references": references, **more}
        response = httpx.post(f"{live.url}/bertscore", json=body, timeout=60)
        assert response.status_code == 200, response.text
        for measure in ("precision", "recall", "f1"):
            assert np.isfinite(response.json()[measure]).all()


@pytest.mark.parametrize("texts", ODD_TEXTS.values(), ids=ODD_TEXTS)
def test_odd_texts_pass_the_other_endpoints(live: LiveService, texts: list[str]) -> None:
    some = texts[:5]
    for path, body in (
        ("/v1/embeddings", {"input": some}),
        ("/similarity", {"source": some[0], "texts": some}),
        ("/v1/rerank", {"query": some[0], "documents": some, "return_documents": True}),
        ("/bertscore", {"candidates": some[:1], "references": some[:1], "explain": True}),
    ):
        response = httpx.post(f"{live.url}{path}", json=body, timeout=60)
        assert response.status_code == 200, (path, response.text)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", r'{"input":["ok","\ud800"]}'),
        ("/v1/embeddings", r'{"input":"\udfff"}'),
        ("/similarity", r'{"source":"\ud800","texts":["a"]}'),
        ("/v1/rerank", r'{"query":"a","documents":["\ud800"]}'),
        ("/v1/rerank", r'{"query":"a","documents":[{"text":"\ud800"}]}'),
        ("/embed", r'{"texts":["a"],"prompt_name":"\ud800"}'),
        ("/v1/embeddings", r'{"input":"a","user":"\ud800"}'),
        ("/v1/embeddings", r'{"input":"a","input_type":"\ud800"}'),
        ("/bertscore", r'{"candidates":["a"],"references":["a"],"lang":"\ud800","rescale_with_baseline":true}'),
    ],
)
def test_a_lone_surrogate_anywhere_is_an_error_or_ignored(live: LiveService, path: str, body: str) -> None:
    status, answer = raw(live, request_bytes(path, body.encode()))
    assert status in (200, 400, 422), answer
    json.loads(answer)


# --- numbers and names ---------------------------------------------------------------------------------


@pytest.mark.parametrize("number", ["1e999", "-1", "0", "99999999999999999999999", "1e3", "true", '"7"', "[]", "{}"])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/embed", '{"texts":["a"],"dimensions":%s}'),
        ("/v1/embeddings", '{"input":"a","dimensions":%s}'),
        ("/bertscore", '{"candidates":["a"],"references":["b"],"num_layers":%s}'),
        ("/v1/rerank", '{"query":"a","documents":["b"],"top_n":%s}'),
    ],
)
def test_any_number_is_an_answer_or_an_error(live: LiveService, path: str, body: str, number: str) -> None:
    status, answer = raw(live, request_bytes(path, (body % number).encode()))
    assert status in (200, 400, 422), answer
    if status == 200 and path == "/embed":
        assert json.loads(answer)["dimensions"] <= 384


@pytest.mark.parametrize("name", ["%00", "..%2f..%2fetc%2fpasswd", "%ff%fe", "a%0d%0aX-Evil:1", "x" * 10_240, "%"])
def test_a_model_in_the_path_that_tries_something_else_is_404(live: LiveService, name: str) -> None:
    status, body = raw(live, f"GET /v1/models/{name} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert status == 404, body
    assert b"X-Evil:1\r\n" not in body
    assert len(body) < 600


# --- bytes of HTTP -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content_type",
    [b"", b"application/xml", b"application/json; charset=utf-16", b"text/html", b"\xff\xfe", b"a" * 1000, b"/", b";"],
)
def test_any_content_type_is_a_right_answer_or_422(live: LiveService, content_type: bytes) -> None:
    status, body = raw(live, request_bytes("/embed", b'{"texts":["a"]}', b"Content-Type: " + content_type))
    if status == 200:
        assert json.loads(body)["dimensions"] == 384
    else:
        refused(status, body, among=(400, 415, 422))


def test_a_hundred_thousand_keys_are_ignored_and_of_repeated_ones_the_last_counts(live: LiveService) -> None:
    keys = b",".join(b'"k%d":0' % n for n in range(70_000))
    status, body = raw(live, request_bytes("/embed", b'{"texts":["a"],' + keys + b',"texts":["b","c"]}'))
    assert status == 200
    assert len(json.loads(body)["embeddings"]) == 2


def test_a_million_wrong_items_are_a_short_422(live: LiveService) -> None:
    for path, field in (("/v1/embeddings", "input"), ("/similarity", "texts"), ("/v1/rerank", "documents")):
        body = b'{"query":"a","source":"a","%s":[%s null]}' % (field.encode(), b"null," * 100_000)
        status, answer = raw(live, request_bytes(path, body))
        assert status in (400, 422)
        assert len(answer) < 600


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE", "PROPFIND"])
def test_a_wrong_method_is_405_and_names_the_right_one(live: LiveService, method: str) -> None:
    for path in ("/embed", "/bertscore", "/similarity", "/v1/embeddings", "/v1/rerank", "/rerank", "/embeddings"):
        response = httpx.request(method, f"{live.url}{path}")
        assert (response.status_code, response.headers["Allow"]) == (405, "POST"), path


@pytest.mark.parametrize(
    "path",
    ["/nothing", "//embed", "/embed/..", "/../etc/passwd", "/%00", "/%ff", "/embed%2f", "/EMBED", "/" + "x" * 10_000],
)
def test_an_unknown_path_is_404(live: LiveService, path: str) -> None:
    refused(*raw(live, request_bytes(path, b"{}")), among=(404,))


@pytest.mark.parametrize(
    "data",
    [
        b"\0\0\0\0\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 500 + b"\r\n\r\n",  # TLS
        b"GET\r\n\r\n",
        b"GET /health HTTP/9.9\r\n\r\n",
        b"GET /health HTTP/1.1\r\nbad header\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nX: a\0b\r\n\r\n",
        b"GET /he alth HTTP/1.1\r\nHost: x\r\n\r\n",
        request_bytes("/embed", b"").replace(b"Content-Length: 0", b"Content-Length: -5"),
        request_bytes("/embed", b"").replace(b"Content-Length: 0", b"Content-Length: 5e3"),
        request_bytes("/embed", b"").replace(b"Content-Length: 0", b"Content-Length: " + b"9" * 30),
        request_bytes("/embed", b" ").replace(b"Content-Length: 1", b"Content-Length: " + b"0" * 5000 + b"1"),
        request_bytes("/embed", b"zz\r\nhello\r\n").replace(b"Content-Length: 11", b"Transfer-Encoding: chunked"),
        request_bytes("/embed", b"1\r\na\r\n0\r\n\r\n", b"Transfer-Encoding: chunked"),  # both lengths: smuggling
    ],
    ids=lambda data: ascii(data)[:40],
)
def test_what_is_not_http_is_a_4xx_at_most(live: LiveService, data: bytes) -> None:
    status, _ = raw(live, data)
    assert status == 200 or 400 <= status < 500


def test_an_offered_upgrade_is_not_taken_up_and_costs_no_body(live: LiveService) -> None:
    offers = [b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAAQAAP__"]
    request = request_bytes("/embed", b'{"texts":["a"],"dimensions":4}', *offers)
    head = request.index(b"\r\n\r\n") + 4
    with socket.create_connection(live.address, timeout=30) as sock:
        for parts in ([request], [request[:head], request[head:]]):  # the second on a connection that was used
            for part in parts:
                sock.sendall(part)
                threading.Event().wait(0.05)
            answer = sock.recv(65_536)
            assert answer.startswith(b"HTTP/1.1 200 "), answer
            assert b'"dimensions":4' in answer
    with socket.create_connection(live.address, timeout=30) as sock:
        middle = request.index(b"Upgrade: h2c") + 4
        for part in (request[:middle], request[middle:]):
            sock.sendall(part)
            threading.Event().wait(0.05)
        assert sock.recv(65_536).startswith(b"HTTP/1.1 400 "), "refused rather than read without its body"


def test_headers_without_end_are_refused(live: LiveService) -> None:
    status, _ = raw(live, b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"X-Filler: " + b"a" * 2_000_000)
    assert 400 <= status < 500


@contextlib.contextmanager
def on_bounded_http(app: Any, timeout_s: float) -> Iterator[tuple[str, int]]:
    """The address of a server of `app` on the service's own HTTP protocol."""
    config = uvicorn.Config(app, http=gpu_service.bounded_http(timeout_s), lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        yield listener.getsockname()
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def test_who_never_ends_a_head_is_cut_off() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("there was no request")

    with on_bounded_http(app, 0.05) as address:
        for sent in (b"", b"G", b"GET /health HTTP/1.1\r\nHost: x\r\n"):
            with socket.create_connection(address, timeout=30) as sock:
                sock.sendall(sent)
                assert sock.recv(100) == b"", "closed"


LARGE = 20 << 20


async def answer_large(scope: Any, receive: Any, send: Any, connection: bytes = b"close") -> None:
    headers = [(b"content-length", b"%d" % LARGE), (b"connection", connection)]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": bytes(LARGE)})


def ask_and_do_not_read(address: tuple[str, int]) -> socket.socket:
    """A connection whose answer has begun to arrive."""
    sock = socket.create_connection(address, timeout=30)
    sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    sock.recv(1, socket.MSG_PEEK)
    return sock


def read_whole(sock: socket.socket, pause_s: float = 0.0) -> bool:
    """Whether all of the answer arrives."""
    read = 0
    with sock, contextlib.suppress(ConnectionError):
        while more := sock.recv(1 << 20):
            read += len(more)
            threading.Event().wait(pause_s)
    return read > LARGE


@pytest.mark.skipif(os.name == "nt", reason="transports do not tell there")
def test_who_reads_nothing_of_an_answer_is_cut_off_and_who_reads_slowly_is_not() -> None:
    with on_bounded_http(answer_large, 3.0) as address:
        unread = ask_and_do_not_read(address)
        assert read_whole(ask_and_do_not_read(address), 0.2), "it took longer than the limit"
        assert not read_whole(unread)


@pytest.mark.skipif(os.name == "nt", reason="transports do not tell there")
def test_unread_answers_are_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_service, "UNREAD_BYTES", 3 * LARGE)
    with on_bounded_http(answer_large, 60) as address:
        socks = [ask_and_do_not_read(address) for _ in range(8)]
        arrived = [read_whole(sock) for sock in socks]
    assert not any(arrived[:2]), "those who had theirs for longest"
    assert all(arrived[-2:])


@pytest.mark.skipif(os.name == "nt", reason="transports do not tell there")
def test_the_next_answer_is_not_made_while_one_is_unread() -> None:
    asked = 0

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal asked
        asked += 1
        await answer_large({}, receive, send, b"keep-alive")

    with on_bounded_http(app, 60) as address:
        sock = socket.create_connection(address, timeout=30)
        sock.sendall(3 * b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        sock.recv(1, socket.MSG_PEEK)
        threading.Event().wait(0.2)
        assert asked == 1
        with sock:
            left = 3 * LARGE
            while left > 0 and (more := sock.recv(1 << 20)):
                left -= len(more)
        assert left <= 0, "the others came when it was read"


@pytest.mark.skipif(os.name == "nt", reason="transports do not tell there")
def test_a_little_that_nobody_reads_does_not_hold_a_stop() -> None:
    taken = list[int]()  # bytes that went out before a probe's answer was held back, some 64 KiB of them held

    async def app(scope: Any, receive: Any, send: Any) -> None:
        most = taken[0] - 48 * 1024 if taken else LARGE
        await send({"type": "http.response.start", "status": 200, "headers": []})
        sent = 0
        with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
            while sent < most:
                await asyncio.wait_for(
                    send({"type": "http.response.body", "body": bytes(8192), "more_body": True}), 0.3
                )
                sent += 8192
        taken.append(sent)
        await send({"type": "http.response.body", "body": b""})

    with contextlib.ExitStack() as kept, on_bounded_http(app, 0.5) as address:
        for _ in range(2):
            sock = kept.enter_context(socket.socket())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(address)
            sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            answered = len(taken) + 1
            until(lambda: len(taken) == answered)  # noqa: B023
        # The stop ends, which `on_bounded_http` waits for, with the connections still open.


def test_a_url_without_end_is_refused(live: LiveService) -> None:
    status, _ = raw(live, b"GET /" + b"a" * 2_000_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n")
    assert 400 <= status < 500


def test_the_answer_to_a_body_that_is_far_too_large_is_not_lost(live: LiveService) -> None:
    """A connection that is closed with bytes unread is reset, and the 413 goes with it."""
    for _ in range(5):
        sent = urllib.request.Request(f"{live.url}/embed", data=b" " * (20 << 20), headers={"Content-Type": "a/b"})
        with pytest.raises(urllib.error.HTTPError) as refusal:
            urllib.request.urlopen(sent, timeout=60)
        with refusal.value as answer:
            refused(answer.code, answer.read(), among=(413,))
            assert answer.headers["Connection"] == "close"


def test_who_goes_on_sending_after_the_answer_is_cut_off() -> None:
    chunked = b"Host: x\r\nTransfer-Encoding: chunked\r\nContent-Type: application/json\r\n\r\n1\r\na\r\n"
    asked = {b"POST /embed": b"401", b"GET /health": b"200", b"POST /nothing": b"401"}
    with serving(settings(api_key=KEY), FakeLoader()) as service, contextlib.ExitStack() as stack:
        socks = {what: stack.enter_context(socket.create_connection(service.address, timeout=0.1)) for what in asked}
        for what, sock in socks.items():
            sock.sendall(what + b" HTTP/1.1\r\n" + chunked)
        answers, deadline = dict.fromkeys(asked, b""), time.monotonic() + 10 * gpu_service.LINGER_S
        open_ones = set(asked)
        while open_ones:
            assert time.monotonic() < deadline, f"still open: {open_ones}"
            for what in list(open_ones):
                with contextlib.suppress(TimeoutError):
                    try:
                        socks[what].sendall(b"1\r\na\r\n")
                        more = socks[what].recv(65_536)
                    except ConnectionError:
                        more = b""
                    answers[what] += more
                    open_ones -= set() if more else {what}
    for what, status in asked.items():
        assert answers[what].startswith(b"HTTP/1.1 " + status), what
        assert b"connection: close" in answers[what].lower()

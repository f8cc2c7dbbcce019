"""The log: both formats, the request's id on every line, the level, progress, and never the key."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import io
import json
import logging
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from conftest import FakeEngine, FakeLoader, raising, running, settings, speaking
from live import serving

import gpu_service
from gpu_engine.messages import Logged, request_id_var
from gpu_engine.process import ToService
from gpu_service import Settings

pytestmark = pytest.mark.anyio

KEY = "top-secret-key"


@dataclass
class Written:
    """What the service logs to standard error."""

    stream: io.StringIO = field(default_factory=io.StringIO)

    def configure(self, config: Settings) -> None:
        """Configures logging as `main` does."""
        with contextlib.redirect_stderr(self.stream):
            gpu_service.configure_logging(config)

    @property
    def text(self) -> str:
        return self.stream.getvalue()

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()


@pytest.fixture
def written() -> Iterator[Written]:
    """The service's log; the logging of the tests is restored afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    levels = {name: logger.level for name, logger in root.manager.loggerDict.items() if hasattr(logger, "level")}
    yield Written()
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, logger in root.manager.loggerDict.items():
        if isinstance(logger, logging.Logger):
            logger.setLevel(levels.get(name, logging.NOTSET))


async def requests(written: Written, log_format: str, log_level: str, **more: Any) -> dict[str, int]:
    """Runs a service with its logging and sends some requests; gives each request's id and status."""
    config = settings(log_format=log_format, log_level=log_level, api_key=KEY, **more)
    written.configure(config)
    answers: dict[str, int] = {}
    async with running(config) as service:

        async def send(request_id: str, method: str, path: str, key: str | None = KEY, **how: Any) -> None:
            headers = {"X-Request-ID": request_id}
            if key is not None:
                headers["X-API-Key"] = key
            response = await service.client.request(method, path, headers=headers, **how)
            assert response.headers["X-Request-ID"] == request_id
            answers[request_id] = response.status_code

        await send("id-embed", "POST", "/embed", json={"texts": [f"text number {n:04}" for n in range(8)]})
        await send("id-models", "GET", "/v1/models")
        for path in ("/health", "/ready", "/info", "/status", "/metrics"):
            await send(f"id-{path[1:]}", "GET", path)
        await send("id-wrong-key", "GET", "/status", key=f"{KEY}x")
        await send("id-no-key", "GET", "/status", key=None)
        service.embed_engine.fail = raising(ValueError("an engine's bug"))
        await send("id-bug", "POST", "/embed", json={"texts": ["unseen"]})
    return answers


async def test_text_lines_carry_the_requests_id(written: Written) -> None:
    answers = await requests(written, "text", "info")
    assert answers["id-embed"] == 200
    assert answers["id-bug"] == 500
    lines = written.lines
    assert any("[id-embed]" in line and "'/embed' 200" in line for line in lines)
    assert any("[id-no-key]" in line and "401" in line for line in lines)
    assert any("[id-bug]" in line and "request failed" in line for line in lines)
    assert any("ValueError: an engine's bug" in line for line in lines)


async def test_the_line_of_a_refused_request_ends_with_the_code_of_its_error(written: Written) -> None:
    gpu_service.error_code_var.set("of_an_earlier_one")  # as a pipelined request's task has it
    sent = {"/embed": "invalid_request", "/nothing": "not_found", "/v1/embeddings": "invalid_request"}
    for log_format in ("text", "json"):
        written.stream = io.StringIO()
        written.configure(settings(log_format=log_format))
        async with running(settings(api_key=KEY)) as service:
            assert (await service.client.post("/embed")).status_code == 401
            service.client.headers["X-API-Key"] = KEY
            for path in sent:
                assert (await service.client.post(path, json={})).status_code >= 400
            assert (await service.embed("a")).status_code == 200
        lines = [line for line in written.lines if "'/" in line]
        codes = ["unauthorized", *sent.values(), None]
        assert len(lines) == len(codes)
        for line, code in zip(lines, codes):
            message = json.loads(line)["message"] if log_format == "json" else line
            assert message.endswith(f" ms {code}" if code else " ms"), line
            if log_format == "json":
                assert json.loads(line).get("code") == code


async def test_json_lines_are_objects_that_carry_the_requests_id(written: Written) -> None:
    await requests(written, "json", "info")
    entries = [json.loads(line) for line in written.lines]
    for entry in entries:
        assert {"time", "level", "logger", "request_id", "message"} <= set(entry)
    (bug,) = [e for e in entries if e["request_id"] == "id-bug" and e["message"] == "a request failed"]
    assert bug["level"] == "error"
    assert "ValueError: an engine's bug" in bug["exception"]
    assert [e["message"].split()[2] for e in entries if e["request_id"] == "id-embed" and "/embed" in e["message"]] == [
        "200"
    ]


@pytest.mark.parametrize("log_format", ["text", "json"])
async def test_the_key_is_in_no_log_line(written: Written, log_format: str) -> None:
    await requests(written, log_format, "debug")
    assert written.text
    assert KEY not in written.text


async def test_the_level_decides_what_is_logged(written: Written) -> None:
    seen = {}
    for level in ("debug", "info", "error"):
        written.stream = io.StringIO()
        await requests(written, "text", level)
        seen[level] = tuple(name in written.text for name in ("id-health", "id-models", "id-bug"))
    assert seen == {"debug": (True, True, True), "info": (False, True, True), "error": (False, False, True)}


async def test_what_pages_and_monitors_poll_is_logged_at_debug_unless_it_is_refused(written: Written) -> None:
    await requests(written, "text", "info")
    for path in ("health", "ready", "info", "status", "metrics"):
        assert f"[id-{path}]" not in written.text
    assert "'/status' 401" in written.text
    written.stream = io.StringIO()
    await requests(written, "text", "debug")
    for path in ("health", "ready", "info", "status", "metrics"):
        assert f"DEBUG    [id-{path}] gpu_service: GET '/{path}' 200" in written.text


TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


async def test_the_trace_of_a_caller_stands_in_each_line_of_its_request_the_engines_too(written: Written) -> None:
    for log_format in ("text", "json"):
        written.stream = io.StringIO()
        written.configure(settings(log_format=log_format))
        async with running(settings()) as service:
            service.client.headers.update({"X-Request-ID": "id-traced", "traceparent": f"00-{TRACE}-{PARENT}-01"})
            answer = await service.client.post("/v1/rerank", json={"query": "q", "documents": ["d"]})
            assert answer.json()["id"] == "id-traced"
            service.embed_engine.fail = raising(ValueError("an engine's bug"))
            response = await service.embed("a")
            assert "under request id id-traced." in response.json()["detail"]
            assert response.headers["X-Request-ID"] == "id-traced"
        lines = [line for line in written.lines if "id-traced" in line]
        assert any("a batch failed" in line for line in lines)  # the device thread's
        assert any("'/embed' 500" in line for line in lines)
        if log_format == "json":
            assert {(e["request_id"], e["trace_id"]) for e in map(json.loads, lines)} == {("id-traced", TRACE)}
        else:
            assert all(f"[id-traced {TRACE}]" in line for line in lines)


async def test_the_trace_crosses_to_the_engines_process_and_back(written: Written) -> None:
    written.configure(settings(log_format="json"))
    logged = Logged("gpu_engine.test", logging.ERROR, "a batch failed", f"id-engine {TRACE}")
    async with running(settings(), wait=False, launch=speaking([logged])) as service:
        await service.until(lambda: "a batch failed" in written.text)
    (entry,) = [entry for entry in map(json.loads, written.lines) if entry["logger"] == "gpu_engine.test"]
    assert (entry["request_id"], entry["trace_id"]) == ("id-engine", TRACE)


@pytest.mark.parametrize(
    ("sent", "taken"),
    [
        ([f"00-{TRACE}-{PARENT}-00"], True),
        ([f"cc-{TRACE}-{PARENT}-01"], True),  # a version that is to come
        ([f"cc-{TRACE}-{PARENT}-01-what-it-adds"], True),
        ([f"00-{TRACE}-{PARENT}-01-more"], False),
        ([f"00-{TRACE}-{PARENT}-01-"], False),
        ([f"cc-{TRACE}-{PARENT}-01.more"], False),
        ([f"ff-{TRACE}-{PARENT}-01"], False),
        ([f"00-{'0' * 32}-{PARENT}-01"], False),
        ([f"00-{TRACE}-{'0' * 16}-01"], False),
        ([f"00-{TRACE.upper()}-{PARENT}-01"], False),
        ([f"00-{TRACE[:-1]}-{PARENT}-01"], False),
        ([f"00-{TRACE}-{PARENT}"], False),
        ([f"00-{TRACE}-{PARENT}-01\n"], False),
        (["", "00", TRACE], False),
        ([f"00-{TRACE}-{PARENT}-01"] * 2, False),  # of two nobody knows which one counts
    ],
)
async def test_a_traceparent_that_is_malformed_is_ignored(written: Written, sent: list[str], taken: bool) -> None:
    written.configure(settings(log_format="json"))
    async with running(settings()) as service:
        headers = [(b"traceparent", value.encode()) for value in sent]
        status, _, _ = await service.raw("/v1/models", headers=headers)
    (entry,) = [entry for entry in map(json.loads, written.lines) if "/v1/models" in entry["message"]]
    assert (status, entry.get("trace_id")) == (200, TRACE if taken else None)


async def test_an_embedding_job_logs_its_progress_every_so_many_texts(written: Written) -> None:
    await requests(written, "text", "info", gpu_embed_batch=2, gpu_batch_tokens=16)
    lines = [line for line in written.lines if "texts done" in line]
    assert all("[id-embed]" in line for line in lines)
    assert [line.partition("job ")[2].partition(": ")[2] for line in lines] == [
        "2 texts done (25 %)",
        "4 texts done (50 %)",
        "6 texts done (75 %)",
        "8 texts done (100 %)",
    ]


async def test_a_failure_on_the_device_or_at_load_is_logged_under_the_requests_id(written: Written) -> None:
    written.configure(settings())
    async with running(settings()) as service:
        service.embed_engine.fail = lambda texts: {}["no such key"]
        await service.client.post("/embed", json={"texts": ["a"]}, headers={"X-Request-ID": "id-device"})
        service.loader.error = RuntimeError("weights of the wrong shape")
        body = {"texts": ["a"], "model": "some/model"}
        await service.client.post("/embed", json=body, headers={"X-Request-ID": "id-load"})
    assert any("[id-device]" in line and "a batch failed" in line for line in written.lines)
    assert any("[id-load]" in line and "loading some/model failed" in line for line in written.lines)
    assert "RuntimeError: weights of the wrong shape" in written.text


def logged_in_the_engine() -> list[Any]:
    """The messages of an engine's process that logs a bug under a request's id."""
    sent: list[Any] = []
    logger, to_service = logging.getLogger("gpu_engine.test"), ToService(sent.append)
    logger.addHandler(to_service)
    try:
        {}["no such key"]
    except KeyError as error:
        context = contextvars.copy_context()
        context.run(request_id_var.set, "id-engine")
        context.run(logger.error, "a batch of %d failed", 3, exc_info=error)
    finally:
        logger.removeHandler(to_service)
    return sent


@pytest.mark.parametrize("log_format", ["text", "json"])
async def test_a_line_of_the_engines_process_keeps_its_level_its_request_and_its_traceback(
    written: Written, log_format: str
) -> None:
    messages = logged_in_the_engine()
    written.configure(settings(log_format=log_format))
    async with running(settings(), wait=False, launch=speaking(messages)) as service:
        await service.until(lambda: "a batch of 3 failed" in written.text)
    if log_format == "json":
        (entry,) = [entry for entry in map(json.loads, written.lines) if entry["logger"] == "gpu_engine.test"]
        assert (entry["level"], entry["request_id"], entry["message"]) == ("error", "id-engine", "a batch of 3 failed")
        assert entry["exception"].endswith("KeyError: 'no such key'")
    else:
        assert any("ERROR    [id-engine] gpu_engine.test: a batch of 3 failed" in line for line in written.lines)
        assert "KeyError: 'no such key'" in written.lines


async def test_a_model_that_a_request_loads_is_ready_or_failed_under_the_requests_id(written: Written) -> None:
    written.configure(settings())
    async with running(settings()) as service:
        service.loader.errors["embed:bad/model"] = RuntimeError("weights of the wrong shape")
        for name in ("good/model", "bad/model"):
            body = {"texts": ["a"], "model": name}
            await service.client.post("/embed", json=body, headers={"X-Request-ID": f"id-{name[:3]}"})
    assert any("[id-goo]" in line and "embed:good/model ready after" in line for line in written.lines)
    assert any("[id-bad]" in line and "embed:bad/model failed" in line for line in written.lines)


async def test_an_id_that_is_not_plain_is_replaced_by_one_of_our_own(written: Written) -> None:
    written.configure(settings())
    async with running(settings()) as service:
        for sent in (b"two\nlines", b"a b", b"x" * 65, b"\xff", b"", b'"quoted"'):
            _, headers, _ = await service.raw("/status", headers=[(b"x-request-id", sent)])
            assert len(headers[b"x-request-id"]) == 12
            assert headers[b"x-request-id"].isalnum()
        first, second = [(await service.raw("/status"))[1][b"x-request-id"] for _ in range(2)]
        assert first != second


async def test_a_path_cannot_forge_a_log_line(written: Written) -> None:
    written.configure(settings())
    async with running(settings()) as service:
        await service.raw("/x\nforged line")
    assert not [line for line in written.lines if line.startswith("forged")]


def starts(written: Written) -> list[str]:
    """Level and text of the lines that say whether the service is ready."""
    found = [re.search(r"(\w+) +\[\S+\] gpu_service: ((?:not )?ready\b.*)", line) for line in written.lines]
    return [f"{line[1]} {line[2]}" for line in found if line]


async def test_the_end_of_the_start_is_said_once_when_every_default_model_is_ready(written: Written) -> None:
    written.configure(settings())
    held = threading.Event()

    def load(kind: str, name: Any, progress: Any) -> FakeEngine:
        assert kind != "rerank" or held.wait(30)
        return FakeEngine(kind)

    async with running(settings(model_rerank="some/reranker"), load, wait=False) as service:
        await service.until(lambda: [e.state for e in service.runtime.models.entries()].count("ready") == 2)
        assert (await service.embed("a")).status_code == 200
        assert starts(written) == []
        held.set()
        await service.until(lambda: bool(starts(written)))
        await service.embed("a", model="some/model")  # one more model is not another start
    models = "bertscore all-MiniLM-L6-v2, embed all-MiniLM-L6-v2, rerank some/reranker"
    assert starts(written) == [f"INFO ready ({models})"]  # without an address: another server chose it


async def test_a_default_model_that_fails_is_said_at_the_end_of_the_start_and_when_it_is_ready_after_all(
    written: Written,
) -> None:
    written.configure(settings())
    loader = FakeLoader()
    loader.error = RuntimeError("weights of the wrong shape")
    async with running(settings(model_bertscore="some/scorer"), loader) as service:
        await service.until(lambda: bool(starts(written)))
        loader.error = None
        for entry in service.runtime.models.entries():
            entry.retry_at = 0.0
        assert (await service.embed("a")).status_code == 200
        await service.until(lambda: len(starts(written)) == 2)
        assert (await service.bertscore("a")).status_code == 200
        await service.until(lambda: len(starts(written)) == 3)
    assert starts(written) == [
        "WARNING not ready: bertscore some/scorer, embed all-MiniLM-L6-v2 failed",
        "WARNING not ready: bertscore some/scorer failed",
        "INFO ready (bertscore some/scorer, embed all-MiniLM-L6-v2)",
    ]


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("0.0.0.0", "http://localhost:8765"),
        ("::", "http://localhost:8765"),
        ("127.0.0.1", "http://127.0.0.1:8765"),
        ("::1", "http://[::1]:8765"),
        ("gpu.example", "http://gpu.example:8765"),
    ],
)
def test_the_address_is_one_that_a_person_can_open(host: str, url: str) -> None:
    assert gpu_service.url_to_open(host, 8765) == url


def test_uvicorns_own_lines_are_left_out_and_its_warnings_and_errors_kept(written: Written) -> None:
    written.configure(settings(log_level="debug"))
    with serving(settings(), FakeLoader()):
        pass
    logging.getLogger("uvicorn.error").warning("a warning of uvicorn's")
    lines = [line for line in written.lines if "uvicorn" in line]
    assert len(lines) == 1
    assert "a warning of uvicorn's" in lines[0]
    assert "gpu_service: stopping: what runs may go on for 60 s" in written.text


class Writes(io.StringIO):
    """A stream that counts how often it is written to."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def write(self, text: str) -> int:
        self.count += 1
        return super().write(text)


def logger_of_turns() -> tuple[logging.Logger, Writes]:
    handler, stream = gpu_service.LinesOfATurn(), Writes()
    handler.setStream(stream)
    logger = logging.getLogger("the tests' turns")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
    return logger, stream


async def test_lines_of_one_turn_of_the_loop_are_one_write_and_what_matters_is_written_at_once() -> None:
    logger, stream = logger_of_turns()
    logger.info("one")
    logger.info("two")
    assert stream.count == 0
    await asyncio.sleep(0)
    assert (stream.count, stream.getvalue()) == (1, "one\ntwo\n")
    logger.info("three")
    logger.warning("four")
    assert stream.getvalue().endswith("three\nfour\n"), "in their order, and at once"
    await asyncio.to_thread(logger.info, "five")
    assert stream.getvalue().endswith("five\n"), "a thread has no turn"


async def test_a_line_that_cannot_be_formatted_harms_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)
    logger, stream = logger_of_turns()
    logger.info("%d", "no number")
    logger.info("fine")
    await asyncio.sleep(0)
    assert stream.getvalue() == "fine\n"


async def test_a_log_that_cannot_be_written_ends_nothing() -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    handler = gpu_service.LinesOfATurn()
    handler.setStream(Full())
    logger = logging.getLogger("the tests' full disk")
    logger.handlers, logger.propagate = [handler], False
    logger.warning("one")
    logger.error("two")
    await asyncio.sleep(0)


def test_what_libraries_log_in_the_engines_process_comes_once_and_nowhere_else() -> None:
    program = """
import logging, sys
from gpu_engine.messages import Configure
from gpu_engine.process import log_to_service
sent = []
log_to_service(Configure("cpu", "auto", None, 0, 1, "INFO"), sent.append)
import huggingface_hub, transformers
for library in (huggingface_hub, transformers):
    library.logging.get_logger(f"{library.__name__}.part").warning("seen")
print([(line.logger, line.message) for line in sent if line.message == "seen"])
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=300)
    assert done.stdout == "[('huggingface_hub.part', 'seen'), ('transformers.part', 'seen')]\n"
    assert "seen" not in done.stderr


async def test_a_path_is_logged_as_it_came_and_not_whole_where_it_is_long(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        async with running(settings()) as service:
            await service.client.get("/a%25b")
            await service.client.get("/" + "x" * 5000)
    messages = [record.getMessage() for record in caplog.records if " 404 " in record.getMessage()]
    assert "'/a%b'" in messages[0]
    assert len(messages[1]) < 400

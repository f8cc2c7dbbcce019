"""The log: both formats, the request's id on every line, the level, progress, and never the key."""

from __future__ import annotations

import contextlib
import io
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from conftest import running, settings

import gpu_service
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
        await send("id-status", "GET", "/status")
        await send("id-health", "GET", "/health")
        await send("id-wrong-key", "GET", "/status", key=f"{KEY}x")
        await send("id-no-key", "GET", "/status", key=None)
        service.embed_engine.output = lambda text: ValueError(f"an engine's bug {len(text)}")
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
    assert any("ValueError: an engine's bug 6" in line for line in lines)


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
    (bug,) = [e for e in entries if e["request_id"] == "id-bug" and e["message"] == "request failed"]
    assert bug["level"] == "error"
    assert "ValueError: an engine's bug 6" in bug["exception"]
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
        seen[level] = tuple(name in written.text for name in ("id-health", "id-status", "id-bug"))
    assert seen == {"debug": (True, True, True), "info": (False, True, True), "error": (False, False, True)}


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

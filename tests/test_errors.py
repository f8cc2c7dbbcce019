"""Every row of the error table: status, code, a message that says what was seen, and nothing internal."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from conftest import FakeEngine, call, running, settings

import gpu_service
from gpu_engine.model_files import Hub, ModelName, find_model
from gpu_engine.work import InvalidInput, ModelError
from gpu_service import Admission, BodyLimit

pytestmark = pytest.mark.anyio

SECRET = "/root/.cache/secret-path at 0x7f00"


def refused(response: httpx.Response, status: int, code: str) -> str:
    """Checks an error answer's status, code and form; returns its message."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"detail", "code"}
    assert body["code"] == code
    assert isinstance(body["detail"], str)
    assert body["detail"]
    for internal in ("Traceback", 'File "', ".py", "site-packages", "/root", "0x"):
        assert internal not in response.text, response.text
    return str(body["detail"])


def retry_after(response: httpx.Response) -> int:
    value = response.headers["Retry-After"]
    assert value.isdecimal()
    assert int(value) >= 1
    return int(value)


# --- 400, 422: the request -----------------------------------------------------------------------------


@pytest.mark.parametrize(("candidates", "references"), [(["a", "b"], ["c"]), ([], ["c"]), (["a"], [])])
async def test_lists_of_unequal_length_are_400(candidates: list[str], references: list[str]) -> None:
    async with running(settings()) as service:
        body = {"candidates": candidates, "references": references}
        detail = refused(await service.client.post("/bertscore", json=body), 400, "unequal_length")
    assert "equal length" in detail
    assert str(len(candidates)) in detail
    assert str(len(references)) in detail


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/embed", {"texts": ["x"] * 4}, "texts"),
        ("/bertscore", {"candidates": ["x"] * 4, "references": ["x"] * 4}, "candidates"),
        ("/bertscore", {"candidates": ["x", "y"], "references": [["x"], ["x"] * 4]}, "references[1]"),
    ],
)
async def test_too_many_items_are_422_naming_the_field_the_count_and_the_limit(
    path: str, body: dict[str, Any], field: str
) -> None:
    async with running(settings(gpu_max_batch_size=3)) as service:
        detail = refused(await service.client.post(path, json=body), 422, "batch_too_large")
    assert detail.startswith(f"{field} has 4 items, the limit is 3 (GPU_MAX_BATCH_SIZE)")


async def test_as_many_items_as_the_limit_are_accepted() -> None:
    async with running(settings(gpu_max_batch_size=3, gpu_max_text_length=5)) as service:
        assert (await service.embed("12345", "é" * 5, "")).status_code == 200
        assert (await service.bertscore("12345", "2", "3")).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/embed", {"texts": ["ok", "é" * 6]}, "texts[1]"),
        ("/bertscore", {"candidates": ["x" * 6], "references": ["x"]}, "candidates[0]"),
        ("/bertscore", {"candidates": ["x", "x"], "references": ["x", "x" * 6]}, "references[1]"),
        ("/bertscore", {"candidates": ["x", "x"], "references": [["x"], ["x", "x" * 6]]}, "references[1][1]"),
    ],
)
async def test_a_text_that_is_too_long_is_422_naming_its_place_length_and_limit(
    path: str, body: dict[str, Any], field: str
) -> None:
    async with running(settings(gpu_max_text_length=5)) as service:
        detail = refused(await service.client.post(path, json=body), 422, "text_too_long")
    assert detail.startswith(f"{field} has 6 characters, the limit is 5 (GPU_MAX_TEXT_LENGTH)")


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/embed", r'{"texts":["ok","a\ud800b"]}', "texts[1]"),
        ("/bertscore", r'{"candidates":["\udc00"],"references":["x"]}', "candidates[0]"),
        ("/bertscore", r'{"candidates":["x","y"],"references":["x","\ud800"]}', "references[1]"),
        ("/bertscore", r'{"candidates":["x","y"],"references":[["x"],["z","\ud800"]]}', "references[1][1]"),
        ("/bertscore", r'{"candidates":["x"],"references":["x"],"lang":"\ud800"}', "lang"),
    ],
)
async def test_a_lone_surrogate_is_422_naming_its_place(path: str, body: str, field: str) -> None:
    async with running(settings()) as service:
        detail = refused(await service.client.post(path, content=body, headers=JSON), 422, "invalid_unicode")
    assert detail.startswith(f"{field} is not valid Unicode")
    assert "surrogate" in detail


JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("path", "body", "place", "seen"),
    [
        ("/embed", {"texts": "one text"}, "texts:", "str of length 8"),
        ("/embed", {"texts": ["a", 5]}, "texts[1]:", "int 5"),
        ("/embed", {"texts": ["a", None]}, "texts[1]:", "None"),
        ("/embed", {"texts": ["a", ["b"]]}, "texts[1]:", "list of length 1"),
        ("/embed", {"texts": None}, "texts:", "None"),
        ("/embed", {}, "texts:", "required"),
        ("/embed", {"texts": ["a"], "normalize": "perhaps"}, "normalize:", "str of length 7"),
        ("/embed", {"texts": ["a"], "dimensions": -1}, "dimensions:", "int -1"),
        ("/embed", {"texts": ["a"], "dimensions": 1.5}, "dimensions:", "float 1.5"),
        ("/embed", {"texts": ["a"], "dimensions": True}, "dimensions:", "bool True"),
        ("/embed", {"texts": ["a"], "dimensions": "7"}, "dimensions:", "str of length 1"),
        ("/embed", {"texts": ["a"], "normalize": "off"}, "normalize:", "str of length 3"),
        ("/embed", {"texts": ["a"], "model": 7}, "model:", "int 7"),
        ("/embed", ["a"], "body:", "list of length 1"),
        ("/bertscore", {"candidates": ["a"]}, "references:", "required"),
        ("/bertscore", {"candidates": "a", "references": ["b"]}, "candidates:", "str of length 1"),
        ("/bertscore", {"candidates": ["a"], "references": "b"}, "references:", "str of length 1"),
        ("/bertscore", {"candidates": ["a", "b"], "references": ["b", 5]}, "references[1]:", "int 5"),
        ("/bertscore", {"candidates": ["a", "b"], "references": [["b"], [5]]}, "references[1][0]:", "int 5"),
        ("/bertscore", {"candidates": ["a", "b"], "references": [["b"], "c"]}, "references[1]:", "str of length 1"),
        ("/bertscore", {"candidates": ["a"], "references": ["b"], "num_layers": -1}, "num_layers:", "int -1"),
        ("/bertscore", {"candidates": ["a"], "references": ["b"], "num_layers": True}, "num_layers:", "bool True"),
        ("/bertscore", {"candidates": ["a"], "references": ["b"], "idf": []}, "idf:", "list of length 0"),
        ("/bertscore", {"candidates": ["a"], "references": ["b"], "idf": "off"}, "idf:", "str of length 3"),
        ("/bertscore", {"candidates": ["a"], "references": ["b"], "lang": "x" * 33}, "lang:", "str of length 33"),
    ],
)
async def test_a_wrong_type_is_422_naming_its_place_and_what_was_seen(
    path: str, body: Any, place: str, seen: str
) -> None:
    async with running(settings()) as service:
        detail = refused(await service.client.post(path, json=body), 422, "invalid_request")
    assert detail.startswith(place)
    assert seen in detail


async def test_a_candidate_without_any_reference_is_422() -> None:
    async with running(settings()) as service:
        body = {"candidates": ["a", "b"], "references": [["x"], []]}
        detail = refused(await service.client.post("/bertscore", json=body), 422, "invalid_request")
    assert detail.startswith("references[1] is an empty list")


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_request"),
        (b"{", "invalid_json"),
        (b"not json", "invalid_json"),
        (b'{"texts": ["a"],}', "invalid_json"),
        (b'{"texts": [NaN]}', "invalid_json"),
        (b'{"texts": ["\xff\xfe"]}', "invalid_json"),
        (b'{"texts": ["\\ud800", "\xff"]}', "invalid_json"),
        (b'{"texts": ["a"]} trailing', "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b'{"texts":["\\ud800",' + b"[" * 100_000, "invalid_json"),
        (b'{"texts":' + b"[" * 100 + b"]" * 100 + b"}", "invalid_request"),
        (b'{"a":' * 2000 + b"1" + b"}" * 2000, "invalid_json"),
        (b'{"texts":[' + b"9" * 5000 + b"]}", "invalid_json"),
        (b'{"texts":["\\ud800",' + b"9" * 5000 + b"]}", "invalid_json"),
        (b'{"texts":[' + b"1," * 99 + b"1]}", "invalid_request"),
        (b'{"texts":[' + b"1," * 200_000 + b"1]}", "batch_too_large"),
        (b'{"texts":["a"],"x":["\\u0041",NaN]}', "invalid_json"),
        (b'{"texts":["a"],"x":["\\ud800",NaN]}', "invalid_json"),
        (b'{"texts":["a"],"x":["\\ud800",-Infinity]}', "invalid_json"),
        (b'{"texts":["a"],"x":"\\ud800","dimensions":' + b"9" * 4200 + b"}", "invalid_json"),
        (b'{"texts":["a"],"x":"\\ud800","dimensions":' + b"9" * 30 + b"}", "invalid_request"),
        (b"null", "invalid_request"),
        (b'"texts"', "invalid_request"),
    ],
    ids=lambda value: repr(value)[:24],
)
async def test_a_body_that_is_not_the_json_expected_is_a_short_422(body: bytes, code: str) -> None:
    async with running(settings()) as service:
        detail = refused(await service.client.post("/embed", content=body, headers=JSON), 422, code)
        assert len(detail) < 300
        assert (await service.embed("still alive")).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "detail"),
    [
        ("/embed", {"text": ["a"]}, "texts: Field required; you sent: text"),
        ("/embed", {}, "texts: Field required; you sent: nothing"),
        ("/embed", {"model": "m", "Texts": []}, "texts: Field required; you sent: model, Texts"),
        ("/embed", {"k" * 50: 1, "a\n": 1, "é": 1}, rf"texts: Field required; you sent: {'k' * 40}, a\n, é"),
        ("/embed", dict.fromkeys("abcdef"), "texts: Field required; you sent: a, b, c, d, e, …"),
        ("/bertscore", {"candidates": ["a"]}, "references: Field required; you sent: candidates"),
    ],
)
async def test_where_a_field_is_missing_the_fields_that_were_sent_are_named(
    path: str, body: dict[str, Any], detail: str
) -> None:
    async with running(settings()) as service:
        assert refused(await service.client.post(path, json=body), 422, "invalid_request") == detail


async def test_a_name_that_cannot_be_written_is_named_all_the_same() -> None:
    async with running(settings()) as service:
        response = await service.client.post("/embed", content=rb'{"\ud800":1}', headers=JSON)
    assert refused(response, 422, "invalid_request") == r"texts: Field required; you sent: \ud800"


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (b'{"texts": ["a"],}', "the body is not JSON: trailing comma is not allowed at line 1, column 16"),
        (b'{"texts":\n  [a]}', "the body is not JSON: unexpected character, expected a JSON value at line 2, column 4"),
        (b'{"texts": ["\\ud800", NaN]}', "the body is not JSON: NaN is no number"),
        (b'{"texts":["\\ud800",' + b"[" * 100_000, "the body is not JSON: it is nested too deeply"),
    ],
    ids=lambda value: repr(value)[:24],
)
async def test_a_body_that_is_not_json_is_told_where_it_stops_being_json(body: bytes, detail: str) -> None:
    async with running(settings()) as service:
        told = refused(await service.client.post("/embed", content=body, headers=JSON), 422, "invalid_json")
    assert told == detail


async def test_beside_a_lone_surrogate_too_the_place_is_told() -> None:
    async with running(settings()) as service:
        body = b'{"texts": ["\\ud800",\n "a",]}'
        told = refused(await service.client.post("/embed", content=body, headers=JSON), 422, "invalid_json")
    assert told.startswith("the body is not JSON: ")
    assert " at line 2, column " in told


@pytest.mark.parametrize(
    ("body", "seen"),
    [
        ('{"texts": ["für"]}'.encode("latin-1"), "byte FC at position 13"),
        ('{"texts": ["a"]}'.encode("utf-16"), "byte FF at position 0"),
        (b'{"texts": ["\\ud800", "\xff"]}', "byte FF at position 22"),
    ],
    ids=["latin-1", "utf-16", "with a lone surrogate"],
)
async def test_a_body_that_is_not_utf_8_is_told_so_and_what_to_set_in_powershell(body: bytes, seen: str) -> None:
    async with running(settings()) as service:
        detail = refused(await service.client.post("/embed", content=body, headers=JSON), 422, "invalid_json")
    assert detail.startswith(f"the body is not UTF-8: {seen}; ")
    assert "-ContentType 'application/json; charset=utf-8'" in detail


async def test_a_byte_order_mark_before_the_json_is_accepted() -> None:
    async with running(settings()) as service:
        for body in (b'{"texts": ["a", "b"]}', rb'{"texts": ["a", "b"], "x": "\ud800"}'):
            answer = await service.client.post("/embed", content=b"\xef\xbb\xbf" + body, headers=JSON)
            assert answer.status_code == 200, answer.text
            assert len(answer.json()["embeddings"]) == 2


@pytest.mark.parametrize("lang", ["english", "", "e", "de-", "de DE", "日本", "en-scientific1", "../en"])
async def test_a_language_that_is_no_code_is_422_and_says_what_a_code_looks_like(lang: str) -> None:
    async with running(settings()) as service:
        detail = refused(await service.bertscore("a", lang=lang), 422, "invalid_request")
        assert service.bertscore_engine.jobs == []
    assert detail == f"lang: got {lang!r}, which is no language code; send one such as en, de or zh-CN"


@pytest.mark.parametrize("lang", ["en", "EN", "de-DE", "zh_CN", "zh-Hant-TW", "en-sci", "yue", None])
async def test_a_language_code_or_none_is_accepted(lang: str | None) -> None:
    async with running(settings()) as service:
        assert (await service.bertscore("a", lang=lang)).status_code == 200


async def test_references_of_a_wrong_type_are_given_up_at_the_first() -> None:
    body = {"candidates": ["a"] * 100, "references": [1] * 100}
    async with running(settings()) as service:
        detail = refused(await service.client.post("/bertscore", json=body), 422, "invalid_request")
    assert detail.startswith("references[0]:")


@pytest.mark.parametrize(
    ("path", "body", "status", "seen"),
    [
        ("/embed", b'{"texts":[' + b'"",' * 2_000_000 + b'""]}', 422, "texts has 2000001 items, the limit is 100"),
        ("/bertscore", b'{"candidates":["a"],"references":[' + b'[""],' * 1_000_000 + b'[""]]}', 400, "1 and 1000001"),
        ("/bertscore", b'{"references":[' + b'[""],' * 1_000_000 + b'[""]]}', 422, "references has 1000001 items"),
        (
            "/bertscore",
            b'{"candidates":["a"],"references":[[' + b'"",' * 2_000_000 + b'""]]}',
            422,
            "references[0] has",
        ),
        ("/rerank", b'{"query":"a","documents":[' + b'{"text":""},' * 500_000 + b'""]}', 400, "documents has 500001"),
        ("/embeddings", b'{"input":[' + b'"",' * 2_000_000 + b'""]}', 400, "batch size is invalid"),
        ("/embeddings", b'{"input":[[' + b"1," * 3_000_000 + b"1]]}", 400, "check_embedding_ctx_length"),
    ],
    ids=lambda value: str(value)[:30],
)
async def test_millions_of_items_are_refused_without_holding_the_event_loop(
    path: str, body: bytes, status: int, seen: str
) -> None:
    async with running(settings()) as service:
        asking = asyncio.create_task(service.client.post(path, content=body, headers=JSON))
        longest, loop = 0.0, asyncio.get_running_loop()
        while not asking.done():
            began = loop.time()
            await asyncio.sleep(0.001)
            longest = max(longest, loop.time() - began)
        response = await asking
    assert response.status_code == status
    assert seen in response.text
    # orjson itself holds the interpreter's lock while it parses; what validation added was a second and more.
    assert longest < 0.8, f"the event loop stood still for {longest:.2f} s"


async def test_as_many_references_in_all_as_ten_batches_are_accepted() -> None:
    async with running(settings(gpu_max_batch_size=3)) as service:
        body = {"candidates": ["a"] * 3, "references": [["b"] * 3] * 3}
        assert (await service.client.post("/bertscore", json=body)).status_code == 200


async def test_a_field_that_is_not_known_is_ignored_and_named() -> None:
    async with running(settings()) as service:
        scored = (await service.bertscore("a", rescale=True, numlayers=3)).json()
        assert scored["warnings"] == [
            f"unknown field {name!r} was ignored; known: candidates, references, lang, model_type, model, num_layers, "
            "idf, rescale_with_baseline, explain"
            for name in ("rescale", "numlayers")
        ]
        embedded = (await service.embed("a", dimension=3)).json()
        known = "texts, model, normalize, prompt_name, dimensions"
        assert embedded["warnings"] == [f"unknown field 'dimension' was ignored; known: {known}"]
        compared = await service.client.post("/similarity", json={"source": "a", "texts": [], "Model": "b"})
        assert compared.json()["warnings"] == ["unknown field 'Model' was ignored; known: source, texts, model"]

        openais = (await service.client.post("/v1/embeddings", json={"input": "a", "dimension": 3})).json()
        assert set(openais) == {"object", "data", "model", "usage"}
        assert "warnings" not in (await service.embed("a", model=None)).json()
        many = (await service.embed("a", **{f"k{n}" * 50: n for n in range(1000)})).json()
        assert len(many["warnings"]) == 5
        assert max(map(len, many["warnings"])) < 200
        odd = await service.client.post("/embed", content=rb'{"texts":["a"],"\ud800":1}', headers=JSON)
        assert odd.json()["warnings"][0].startswith(r"unknown field '\ud800'")


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
async def test_a_wrong_content_type_is_422_and_says_which_is_right(content_type: str) -> None:
    async with running(settings()) as service:
        headers = {"content-type": content_type}
        response = await service.client.post("/embed", content=b'{"texts": ["a"]}', headers=headers)
    assert "application/json" in refused(response, 422, "invalid_content_type")


@pytest.mark.parametrize(
    "texts",
    [[""] * 100, ["\0", "a\0b"], ["\u200fright to left\u202e"], ["x" * 10_000], ["𝕏" * 10_000], ["\ufeff", "\uffff"]],
)
async def test_odd_but_valid_texts_are_answered(texts: list[str]) -> None:
    async with running(settings()) as service:
        answer = await service.embed(*texts)
        assert answer.status_code == 200
        assert len(answer.json()["embeddings"]) == len(texts)
        assert (await service.bertscore(*texts)).status_code == 200


async def test_of_repeated_keys_the_last_counts() -> None:
    async with running(settings()) as service:
        response = await service.client.post("/embed", content=b'{"texts":["a"],"texts":["b","c"]}', headers=JSON)
        assert response.status_code == 200
        assert len(response.json()["embeddings"]) == 2


async def test_unknown_paths_and_wrong_methods_have_the_same_form() -> None:
    async with running(settings()) as service:
        detail = refused(await service.client.get("/nothing"), 404, "not_found")
        assert detail == "there is no '/nothing'; /docs shows the paths that there are"
        detail = refused(await service.client.get("/embed"), 405, "method_not_allowed")
        assert detail == "'/embed' does not take GET, only POST"
        response = await service.client.delete("/health")
        refused(response, 405, "method_not_allowed")
        assert response.headers["Allow"] == "GET"
        for method in ("HEAD", "OPTIONS"):
            response = await service.client.request(method, "/health")
            assert (response.status_code, response.headers["Allow"]) == (405, "GET")


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/embed/", "/embed"),
        ("/Embed", "/embed"),
        ("/health/", "/health"),
        ("/healthz", "/health"),
        ("/embeddings/", "/embeddings"),
        ("/scores", "/bertscore"),
        ("/v1/embedding", "/v1/embeddings"),
        ("/v1/chat/completions", None),
        ("/favicon.ico", None),
        ("/" + "embed" * 5_000, None),
    ],
    ids=lambda value: str(value)[:30],
)
async def test_a_path_that_is_close_to_one_of_ours_is_told_which(path: str, meant: str | None) -> None:
    async with running(settings()) as service:
        response = await service.client.post(path, json={"texts": []})
    assert response.status_code == 404
    hint = f"did you mean {meant}? " if meant else ""
    assert f"; {hint}/docs shows the paths that there are" in response.text


# --- 413, 408: the body --------------------------------------------------------------------------------


def sends_a_text() -> Callable[[], Any]:
    """Gives a request for one embedding, and then stays on the line."""
    messages = [{"type": "http.request", "body": b'{"texts":["a"]}', "more_body": False}]

    async def receive() -> Any:
        return messages.pop() if messages else await asyncio.Event().wait()

    return receive


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


# --- 400, 403, 404: the model --------------------------------------------------------------------------

NOT_NAMES = [
    "",
    " ",
    "..",
    "../x",
    "a/../b",
    "/etc/passwd",
    "/root/model",
    "./model",
    "~/model",
    "C:\\model",
    "\\\\host\\share",
    "https://example.com/model",
    "file:///etc/passwd",
    "owner/name/more",
    "owner/",
    "/name",
    "a--b",
    ".hidden",
    "owner/.hidden",
    "a\0b",
    "a\nb",
    "name\n",
    "a\x1b[31mb",
    "a\u202eb",
    "модель",
    "x" * 10_240,
    "x" * 97,
    "a b",
    "a%2Fb",
    "a?b",
    "$(id)",
]


@pytest.mark.parametrize("name", NOT_NAMES, ids=lambda name: ascii(name)[:30])
async def test_a_model_name_that_is_not_a_hub_id_is_400(name: str) -> None:
    async with running(settings()) as service:
        for response in (
            await service.embed("a", model=name),
            await service.bertscore("a", model_type=name),
            await service.bertscore("a", model=name),
        ):
            # The name itself is shown, in part and escaped.
            assert response.status_code == 400
            assert response.json()["code"] == "invalid_model_name"
            assert len(response.content) < 400
        assert len(service.loader.loads) == 2


async def test_a_model_name_with_a_lone_surrogate_is_400() -> None:
    async with running(settings()) as service:
        body = r'{"texts":["ok"],"model":"a\udfff"}'
        refused(await service.client.post("/embed", content=body, headers=JSON), 400, "invalid_model_name")


async def test_a_model_outside_the_allowed_patterns_is_403() -> None:
    async with running(settings(gpu_allowed_models="BAAI/*, intfloat/e5-small")) as service:
        for name in ("evil/model", "all-mpnet-base-v2", "intfloat/e5-large"):
            assert name in refused(await service.embed("a", model=name), 403, "model_not_allowed")
        for name in ("BAAI/bge-small-en", "intfloat/e5-small", "all-MiniLM-L6-v2"):
            assert (await service.embed("a", model=name)).status_code == 200, name
        assert len(service.loader.loads) == 4


async def test_a_pattern_allows_the_short_and_the_long_name() -> None:
    async with running(settings(gpu_allowed_models="sentence-transformers/*")) as service:
        for name in ("all-mpnet-base-v2", "sentence-transformers/all-mpnet-base-v2"):
            assert (await service.embed("a", model=name)).status_code == 200


async def test_a_model_that_does_not_exist_is_404() -> None:
    async with running(settings()) as service:
        service.loader.error = ModelError("The hub has no model no/such.", "model_not_found")
        refused(await service.embed("a", model="no/such"), 404, "model_not_found")


# --- 503: the model can't be loaded now ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (RuntimeError(f"size mismatch in {SECRET}"), "model_failed", "RuntimeError"),
        (MemoryError(), "model_out_of_memory", "does not fit into memory"),
        (ModelError("no hub", "model_unavailable"), "model_unavailable", "no hub"),
        (SystemExit(3), "model_failed", "SystemExit"),
    ],
    ids=repr,
)
async def test_a_load_that_fails_is_503_with_the_reason(error: BaseException, code: str, reason: str) -> None:
    async with running(settings()) as service:
        service.loader.error = error
        response = await service.embed("a", model="some/model")
        assert reason in refused(response, 503, code)
        retry_after(response)
        assert (await service.embed("the default still answers")).status_code == 200


async def test_a_failed_load_is_remembered_so_that_a_burst_does_not_retry_it() -> None:
    async with running(settings()) as service:
        service.loader.error = RuntimeError("no")
        burst = await asyncio.gather(*(service.embed("a", model="some/model") for _ in range(20)))
        for _ in range(20):
            burst.append(await service.embed("a", model="some/model"))
        for response in burst:
            refused(response, 503, "model_failed")
            retry_after(response)
        assert service.loader.loads.count("embed:some/model") == 1


async def test_a_failed_load_is_tried_again_when_its_memory_ends() -> None:
    async with running(settings()) as service:
        service.loader.error = RuntimeError("no")
        refused(await service.embed("a", model="some/model"), 503, "model_failed")
        service.loader.error = None
        refused(await service.embed("a", model="some/model"), 503, "model_failed")
        (entry,) = [e for e in service.runtime.models.entries() if e.state == "failed"]
        entry.retry_at = 0.0  # the memory of the failure ends
        assert (await service.embed("a", model="some/model")).status_code == 200
        assert service.loader.loads.count("embed:some/model") == 2


async def test_a_default_that_is_not_here_and_not_to_be_had_is_503_naming_both_ways_out() -> None:
    def load(kind: str, name: ModelName, progress: Callable[[str, float], None]) -> FakeEngine:
        if kind == "bertscore":
            find_model(kind, name, Hub(), progress)  # the real search, with the hub cut off
        return FakeEngine(kind)

    async with running(settings(model_bertscore="nobody/is-not-here"), load) as service:
        response = await service.bertscore("a")
        detail = refused(response, 503, "model_unavailable")
        retry_after(response)
        for words in ("nobody/is-not-here", "hf download nobody/is-not-here", "MODEL_BERTSCORE="):
            assert words in detail
        assert (await service.embed("a")).status_code == 200
        shown = (await service.client.get("/ready")).json()["models"]
        assert shown["bertscore:nobody/is-not-here"]["state"] == "failed"
        assert shown["bertscore:nobody/is-not-here"]["reason"] == detail


async def test_a_model_still_loading_past_the_queue_timeout_is_503_and_the_load_goes_on() -> None:
    async with running(settings(gpu_queue_timeout=0.05)) as service:
        service.loader.hold.clear()
        response = await service.embed("a", model="some/model")
        assert "some/model is still loading (50%)" in refused(response, 503, "model_loading")
        retry_after(response)
        service.loader.hold.set()
        await service.until(lambda: all(e.state == "ready" for e in service.runtime.models.entries()))
        assert (await service.embed("a", model="some/model")).status_code == 200
        assert service.loader.loads.count("embed:some/model") == 1


# --- 503: busy; 504 ------------------------------------------------------------------------------------


async def test_a_request_over_the_queues_length_is_busy_at_once() -> None:
    async with running(settings(gpu_max_concurrent=1, gpu_max_queue=1, gpu_queue_timeout=3600)) as service:
        service.embed_engine.hold.clear()
        first = asyncio.create_task(service.embed("a"))
        await service.until(lambda: service.runtime.admission.in_flight == 1)
        second = asyncio.create_task(service.embed("b"))
        await service.until(lambda: service.runtime.admission.waiting == 1)
        for response in (await service.embed("c"), await service.bertscore("c")):
            assert refused(response, 503, "busy") == f"GPU busy - retry later, in about {retry_after(response)} s"
        service.embed_engine.hold.set()
        assert [(await first).status_code, (await second).status_code] == [200, 200]
        assert (await service.embed("d")).status_code == 200


async def test_a_burst_gets_no_more_than_the_slots_and_the_queue() -> None:
    async with running(settings(gpu_max_concurrent=2, gpu_max_queue=3, gpu_queue_timeout=3600)) as service:
        service.embed_engine.hold.clear()
        burst = [asyncio.create_task(service.embed(f"text {n}")) for n in range(20)]
        await service.until(lambda: sum(task.done() for task in burst) == 15)
        queue = (await service.status())["queue"]
        assert queue == {"max_concurrent": 2, "in_flight": 2, "available_slots": 0, "waiting_estimate": 3}
        service.embed_engine.hold.set()
        statuses = [response.status_code for response in await asyncio.gather(*burst)]
        assert sorted(statuses) == [200] * 5 + [503] * 15
        assert len(service.embed_engine.texts_run) == 5


async def test_with_no_queue_a_request_is_busy_when_the_slots_are_taken() -> None:
    async with running(settings(gpu_max_concurrent=1, gpu_max_queue=0)) as service:
        service.embed_engine.hold.clear()
        first = asyncio.create_task(service.embed("a"))
        await service.until(lambda: service.runtime.admission.in_flight == 1)
        refused(await service.embed("b"), 503, "busy")
        service.embed_engine.hold.set()
        assert (await first).status_code == 200


async def test_no_slot_within_the_queue_timeout_is_busy() -> None:
    async with running(settings(gpu_max_concurrent=1, gpu_queue_timeout=0.03)) as service:
        service.embed_engine.hold.clear()
        first = asyncio.create_task(service.embed("a"))
        await service.until(lambda: service.runtime.admission.in_flight == 1)
        response = await service.embed("b")
        assert refused(response, 503, "busy") == f"GPU busy - retry later, in about {retry_after(response)} s"
        assert service.runtime.admission.waiting == 0
        service.embed_engine.hold.set()
        assert (await first).status_code == 200
        assert service.embed_engine.texts_run == ["a"]


async def test_a_caller_who_leaves_the_queue_frees_its_place() -> None:
    async with running(settings(gpu_max_concurrent=1, gpu_max_queue=1, gpu_queue_timeout=3600)) as service:
        service.embed_engine.hold.clear()
        first = asyncio.create_task(service.embed("a"))
        await service.until(lambda: service.runtime.admission.in_flight == 1)
        leaving = asyncio.create_task(service.embed("b"))
        await service.until(lambda: service.runtime.admission.waiting == 1)
        leaving.cancel()
        await service.until(lambda: service.runtime.admission.waiting == 0)
        second = asyncio.create_task(service.embed("c"))
        await service.until(lambda: service.runtime.admission.waiting == 1)
        service.embed_engine.hold.set()
        assert [(await first).status_code, (await second).status_code] == [200, 200]
        assert service.embed_engine.texts_run == ["a", "c"]
        assert service.runtime.admission.in_flight == 0


async def test_retry_after_follows_the_work_that_is_queued_and_is_spread() -> None:
    for queued_s in (0.0, 4.0, 20.0):
        guard = Admission(settings(), lambda: queued_s)  # noqa: B023
        given = [guard.retry_after_s() for _ in range(50)]
        assert all(isinstance(seconds, int) for seconds in given)
        assert min(given) >= max(1, queued_s)
        assert max(given) <= math.ceil(1.5 * queued_s + 1)
        if queued_s:
            assert len(set(given)) > 1, "a burst would come back in step"
    for queued_s in (59.0, 1e6):
        given = [Admission(settings(), lambda: queued_s).retry_after_s() for _ in range(200)]  # noqa: B023
        assert 30 < min(given) < max(given) <= 60
        assert len(set(given)) > 10, "a burst would come back in step"


async def test_the_work_that_is_queued_is_measured() -> None:
    async with running(settings(gpu_batch_tokens=16)) as service:
        assert (await service.embed("measure the speed")).status_code == 200
        assert service.runtime.worker.seconds_queued() == 0
        service.embed_engine.hold.clear()
        asking = [asyncio.create_task(service.embed("few")), asyncio.create_task(service.embed(*["many " * 9] * 9))]
        await service.until(lambda: service.runtime.admission.in_flight == 2)
        await service.until(lambda: service.runtime.worker.seconds_queued() > 0)
        service.embed_engine.hold.set()
        await asyncio.gather(*asking)
        assert service.runtime.worker.seconds_queued() == 0


async def test_longer_than_the_request_timeout_is_504_and_the_work_is_dropped() -> None:
    async with running(settings(gpu_request_timeout=0.05, gpu_batch_tokens=16, gpu_max_concurrent=1)) as service:
        engine = service.embed_engine
        engine.hold.clear()
        response = await service.embed(*(f"text number {n:04}" for n in range(50)))
        assert "GPU_REQUEST_TIMEOUT" in refused(response, 504, "timeout")
        assert service.runtime.admission.in_flight == 0
        engine.hold.set()
        assert (await service.bertscore("next")).status_code == 200
        assert len(engine.batches) <= 1  # what was on the device when the time was up


async def test_seconds_until_a_retry_are_spread() -> None:
    for seconds, least, most in ((5, 4, 6), (30, 21, 39), (0.1, 1, 1)):
        given = {gpu_service.spread(seconds) for _ in range(200)}
        assert least <= min(given) <= max(given) <= most
        assert len(given) > 1 or seconds < 1
    assert len({str(gpu_service.stopping().headers) for _ in range(200)}) > 1


async def test_a_broken_device_is_503_with_retry_after_on_health_and_ready() -> None:
    async with running(settings(gpu_exit_on_fatal=False)) as service:
        service.runtime.worker.mark_broken("the device context is broken")
        for path in ("/health", "/ready"):
            response = await service.client.get(path)
            assert response.status_code == 503
            retry_after(response)


async def test_a_request_that_outlasts_the_servers_grace_is_told_to_retry(caplog: pytest.LogCaptureFixture) -> None:
    tasks: list[asyncio.Task[Any] | None] = []

    async with running(settings()) as service:

        async def app(scope: Any, receive: Any, send: Any) -> None:
            tasks.append(asyncio.current_task())
            await service.app(scope, receive, send)

        service.embed_engine.hold.clear()
        headers = [(b"content-type", b"application/json")]
        asking = asyncio.create_task(call(app, "/embed", method="POST", headers=headers, receive=sends_a_text()))
        await service.until(lambda: service.embed_engine.begun == 1)
        (task,) = tasks
        assert task is not None
        task.cancel()
        status, answered, body = await asking
        assert status == 503
        assert int(answered[b"retry-after"]) >= 1
        assert b"shutting_down" in body
    assert not [record for record in caplog.records if record.exc_info]


# --- 500 -----------------------------------------------------------------------------------------------


async def test_a_bug_in_an_engine_is_500_with_nothing_but_the_request_id(caplog: pytest.LogCaptureFixture) -> None:
    def bug(texts: list[str]) -> None:
        raise KeyError(f"secret {SECRET}")

    async with running(settings()) as service:
        service.embed_engine.fail = bug
        with caplog.at_level(logging.ERROR, "gpu_service"):
            response = await service.embed("a")
        detail = refused(response, 500, "internal")
        assert "secret" not in response.text
        assert response.headers["X-Request-ID"] in detail
        assert any(record.exc_info for record in caplog.records), "the log has the traceback"
        assert (await service.bertscore("the service goes on")).status_code == 200


async def test_a_bug_while_a_request_is_prepared_is_500_and_frees_the_slot() -> None:
    async with running(settings(gpu_max_concurrent=1)) as service:
        engine = service.embed_engine
        prepare, engine.prepare = engine.prepare, lambda request: 1 / 0  # type: ignore[method-assign]
        refused(await service.embed("a"), 500, "internal")
        engine.prepare = prepare  # type: ignore[method-assign]
        assert service.runtime.admission.in_flight == 0
        assert (await service.embed("a")).status_code == 200


async def test_what_an_engine_cannot_compute_is_422_with_its_own_words() -> None:
    async with running(settings()) as service:
        service.embed_engine.output = lambda text: InvalidInput("no prompt 'x'", "invalid_request")
        assert refused(await service.embed("a"), 422, "invalid_request") == "no prompt 'x'"

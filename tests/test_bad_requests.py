"""Requests that are not what an endpoint takes: 400, 404, 405 or 422 with what was seen and what is right."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import JSON, refused, running, settings

pytestmark = pytest.mark.anyio


# --- types and texts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("candidates", "references"), [(["a", "b"], ["c"]), ([], ["c"]), (["a"], [])])
async def test_lists_of_unequal_length_are_400(candidates: list[str], references: list[str]) -> None:
    async with running(settings()) as service:
        body = {"candidates": candidates, "references": references}
        detail = refused(await service.client.post("/bertscore", json=body), 400, "unequal_length")
    assert "equal length" in detail
    assert str(len(candidates)) in detail
    assert str(len(references)) in detail


async def test_a_candidate_without_any_reference_is_422() -> None:
    async with running(settings()) as service:
        body = {"candidates": ["a", "b"], "references": [["x"], []]}
        detail = refused(await service.client.post("/bertscore", json=body), 422, "invalid_request")
    assert detail.startswith("references[1] is an empty list")


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


async def test_references_of_a_wrong_type_are_given_up_at_the_first() -> None:
    body = {"candidates": ["a"] * 100, "references": [1] * 100}
    async with running(settings()) as service:
        detail = refused(await service.client.post("/bertscore", json=body), 422, "invalid_request")
    assert detail.startswith("references[0]:")


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


@pytest.mark.parametrize(
    "lang", ["english", "", "e", "de-", "de DE", "日本", "en-scientific1", "../en", "a\nb", "\0", "%2e%2e", "en.tsv"]
)
async def test_a_language_that_is_no_code_is_422_and_says_what_a_code_looks_like(lang: str) -> None:
    async with running(settings()) as service:
        detail = refused(await service.bertscore("a", lang=lang), 422, "invalid_request")
        assert service.bertscore_engine.jobs == []
    assert detail == f"lang: got {lang!r}, which is no language code; send one such as en, de or zh-CN"


@pytest.mark.parametrize("lang", ["en", "EN", "de-DE", "zh_CN", "zh-Hant-TW", "en-sci", "yue", None])
async def test_a_language_code_or_none_is_accepted(lang: str | None) -> None:
    async with running(settings()) as service:
        assert (await service.bertscore("a", lang=lang)).status_code == 200


# --- fields that are missing or unknown ----------------------------------------------------------------


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
        assert set(openais) == {"object", "data", "model", "usage", "truncated"}
        assert "warnings" not in (await service.embed("a", model=None)).json()
        many = (await service.embed("a", **{f"k{n}" * 50: n for n in range(1000)})).json()
        assert len(many["warnings"]) == 5
        assert max(map(len, many["warnings"])) < 200
        odd = await service.client.post("/embed", content=rb'{"texts":["a"],"\ud800":1}', headers=JSON)
        assert odd.json()["warnings"][0].startswith(r"unknown field '\ud800'")


# --- what is not JSON ----------------------------------------------------------------------------------


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
        (b'{"texts":' + b"[" * 900 + b"1" + b"]" * 900 + b"}", "invalid_request"),
        (b'{"texts":["\\ud800"],"a":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001, "invalid_json"),
        (b'{"texts":["\\ud800"],"a":' + b"[" * 1100 + b"1" + b"]" * 1100 + b"}", "invalid_json"),
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
        ('{"texts": ["a"]}'.encode("utf-32"), "byte FF at position 0"),
        (b'{"texts": ["\\ud800", "\xff"]}', "byte FF at position 22"),
    ],
    ids=["latin-1", "utf-16", "utf-32", "with a lone surrogate"],
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


# --- paths and methods ---------------------------------------------------------------------------------


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

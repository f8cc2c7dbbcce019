"""The page as it is served: its headers, what a browser without a key gets, and a service without the page's folder."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import orjson
import pytest
from conftest import running, settings

import gpu_service
from gpu_service import PAGES

pytestmark = pytest.mark.anyio

ROOT = Path(gpu_service.__file__).parent
HTML = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
FILES = ["/web/page.js", "/web/page.css", "/web/docs.js", "/web/swagger-ui-bundle.js", "/web/swagger-ui.css"]
REFUSAL = {"detail": "Unauthorized", "hint": "send the header X-API-Key: KEY, or Authorization: Bearer KEY"}


def policy(answer: httpx.Response) -> dict[str, list[str]]:
    """The answer's Content-Security-Policy: the sources of each directive."""
    directives = (part.split() for part in answer.headers["Content-Security-Policy"].split(";"))
    return {name: sources for name, *sources in directives}


def sha256(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@pytest.mark.parametrize("path", PAGES)
async def test_a_page_runs_and_loads_only_what_its_own_origin_serves(path: str) -> None:
    async with running(settings()) as service:
        answer = await service.client.get(path)
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    allowed = policy(answer)
    assert allowed["default-src"] == allowed["base-uri"] == allowed["form-action"] == ["'none'"]
    assert allowed["frame-ancestors"] == ["'none'"]
    assert allowed["script-src"] == allowed["style-src"] == allowed["connect-src"] == ["'self'"]
    assert allowed["img-src"] == ["'self'", "data:"]
    assert "unsafe" not in str(allowed)
    assert ("trusted-types" in allowed) is (path == "/")
    assert not re.search(r"<script(?![^>]* src=)|<style|style=| on\w+=|https?://(?!www\.w3\.org)", answer.text)


@pytest.mark.parametrize("path", [*PAGES, *FILES])
async def test_a_file_of_the_page_is_kept_by_browsers_and_asked_for_again(path: str) -> None:
    async with running(settings()) as service:
        first = await service.client.get(path)
        tag = {"If-None-Match": first.headers["ETag"]}
        again = await service.client.get(path, headers=tag)
        weak = await service.client.get(path, headers={"If-None-Match": f"W/{first.headers['ETag']}"})
        other = await service.client.get(path, headers={"If-None-Match": '"another"'})
        status, head, body = await service.raw(path, method="HEAD")
    assert [answer.status_code for answer in (first, again, weak, other)] == [200, 304, 304, 200]
    assert again.content == b""
    assert first.headers["Cache-Control"] == again.headers["Cache-Control"] == "private, no-cache"
    assert (status, int(head[b"content-length"])) == (200, len(first.content))
    assert body in (b"", first.content)  # the server leaves it out


async def test_paths_beside_the_pages_files_do_not_exist() -> None:
    async with running(settings()) as service:
        for path in ("/web/", "/web/index.html", "/web/sign-in.html", "/web/..%2fgpu_service.py", "/redoc"):
            assert (await service.client.get(path)).status_code == 404, path


async def test_the_root_still_takes_the_bodies_of_text_embeddings_inference() -> None:
    async with running(settings()) as service:
        assert (await service.client.post("/", json={"inputs": "a"})).status_code == 200
        refused = await service.client.put("/")
        assert (refused.status_code, refused.headers["Allow"]) == (405, "GET, HEAD, POST")
        assert refused.json()["detail"] == "'/' does not take PUT, only GET, HEAD, POST"


@pytest.mark.parametrize("path", PAGES)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_browser_without_the_key_gets_the_sign_in_form_and_401(path: str, method: str) -> None:
    async with running(settings(api_key="secret-key")) as service:
        for key in ({}, {"X-API-Key": "wrong"}):
            answer = await service.client.request(method, path, headers={"Accept": HTML, **key})
            assert answer.status_code == 401
            assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
            assert answer.headers["Cache-Control"] == "no-store"
            assert answer.headers["WWW-Authenticate"] == "Bearer"
            assert method == "HEAD" or 'type="password"' in answer.text


async def test_the_sign_in_form_runs_its_own_script_and_those_of_the_pages_and_no_other() -> None:
    async with running(settings(api_key="secret-key")) as service:
        form = await service.client.get("/", headers={"Accept": HTML})
        files = {path: await service.client.get(path, headers={"X-API-Key": "secret-key"}) for path in FILES}
    allowed = policy(form)
    for name, tag, end in (("script-src", "script", ".js"), ("style-src", "style", ".css")):
        [own] = re.findall(rf"<{tag}>(.*?)</{tag}>", form.text, re.DOTALL)
        texts = [own, *(answer.text for path, answer in files.items() if path.endswith(end))]
        assert sorted(allowed[name]) == sorted(map(sha256, texts))
    assert allowed["default-src"] == allowed["form-action"] == ["'none'"]
    assert not re.search(r"(?:src|href)=(?!\"data:)", form.text)


@pytest.mark.parametrize("accept", [None, "*/*", "application/json", "text/*", "image/avif,*/*"])
async def test_whoever_does_not_ask_for_html_gets_the_json_401_on_every_path(accept: str | None) -> None:
    headers = [] if accept is None else [(b"accept", accept.encode())]
    async with running(settings(api_key="secret-key")) as service:
        for path in (*PAGES, *FILES, "/embed"):
            status, _, body = await service.raw(path, headers=headers)
            assert (status, orjson.loads(body)) == (401, REFUSAL), path


async def test_a_browser_without_the_key_gets_the_json_401_everywhere_else() -> None:
    headers = [(b"accept", HTML.encode())]
    others = [("GET", path) for path in (*FILES, "/web/", "/openapi.json", "/status", "/docs/", "/no", "/index.html")]
    async with running(settings(api_key="secret-key")) as service:
        for method, path in [*others, ("POST", "/"), ("OPTIONS", "/"), ("PUT", "/docs")]:
            status, _, body = await service.raw(path, method=method, headers=headers)
            assert (status, orjson.loads(body)) == (401, REFUSAL), (method, path)


@pytest.mark.parametrize("path", [*PAGES, *FILES])
async def test_the_key_opens_the_page_and_its_files(path: str) -> None:
    async with running(settings(api_key="secret-key")) as service:
        answer = await service.client.get(path, headers={"X-API-Key": "secret-key", "Accept": HTML})
        assert answer.status_code == 200


def test_no_script_of_ours_writes_markup() -> None:
    for file in sorted((ROOT / "web").iterdir()):
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            file
        )


PROBE = """if True:
    import sys
    from starlette.testclient import TestClient
    import gpu_service
    client = TestClient(gpu_service.create_app(gpu_service.Settings(api_key=sys.argv[1] or None)))
    for path in ("/", "/docs", "/web/page.js"):
        answer = client.get(path, headers={"Accept": "text/html"})
        print(path, answer.status_code, answer.headers["content-type"].partition(";")[0])
"""


def probe(folder: Path, key: str) -> list[str]:
    """What a copy of the service in `folder` answers to a browser."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-W", "ignore", "-c", PROBE, key]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("web", [None, "web", "gpu_service_web"])
def test_the_service_works_without_the_pages_folder_and_finds_it_where_the_wheel_puts_it(
    tmp_path: Path, web: str | None
) -> None:
    shutil.copy(gpu_service.__file__, tmp_path)
    shutil.copytree(ROOT / "gpu_engine", tmp_path / "gpu_engine", ignore=shutil.ignore_patterns("__pycache__"))
    if web is None:
        assert probe(tmp_path, "") == [
            "/ 405 application/json",
            "/docs 200 text/html",
            "/web/page.js 404 application/json",
        ]
        assert {line.split(" ", 1)[1] for line in probe(tmp_path, "secret-key")} == {"401 application/json"}
        return
    shutil.copytree(ROOT / "web", tmp_path / web)
    assert probe(tmp_path, "") == ["/ 200 text/html", "/docs 200 text/html", "/web/page.js 200 text/javascript"]


def test_the_images_hold_the_page() -> None:
    assert "!web/*" in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for name in ("Dockerfile", "Dockerfile.rocm"):
        assert "COPY web/ web/" in (ROOT / name).read_text(encoding="utf-8").splitlines()


async def test_windows_line_ends_change_no_hash(tmp_path: Path) -> None:
    file = tmp_path / "page.js"
    file.write_bytes(b"one\ntwo\n")
    written = gpu_service.WebFile(file).body
    file.write_bytes(b"one\r\ntwo\r\n")
    assert gpu_service.WebFile(file).body == written

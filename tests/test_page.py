"""The page in a real browser: the live view, the playground, signing in, /docs, and who can use all of them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from conftest import FakeLoader, settings, words
from live import LiveService, answer, post, serving
from playwright.sync_api import Browser, BrowserContext, Page, Route, expect, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,  # together they take most of a minute
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
]

KEY = "schlüssel-1"
HOSTILE = '<img src=x onerror="window.hacked = 1"> it\'s 100 % `id` $(id) \\ "ü" ☃ & !!'
VIEWS = ("live", "score", "embed", "rerank")
Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """`gpu.lan` is this machine: a name for which browsers see no secure context, as on a network."""
    arguments = ["--host-resolver-rules=MAP gpu.lan 127.0.0.1"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        arguments.append("--no-sandbox")
    expect.set_options(timeout=30_000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def real() -> Iterator[LiveService]:
    """The real MiniLM behind a real socket, open to all."""
    with serving(settings(gpu_dtype="float32")) as service:
        yield service


@pytest.fixture(scope="module")
def locked() -> Iterator[LiveService]:
    """The same with a key."""
    with serving(settings(gpu_dtype="float32", api_key=KEY)) as service:
        yield service


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """Opens an address in a tab of its own. In the end nothing broke, and no tab asked another origin for anything."""
    complaints: list[str] = []
    contexts: list[BrowserContext] = []

    def open_page(address: str, prepare: Callable[[Page], Any] = lambda page: None, **options: Any) -> Page:
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        watch(page, urlsplit(address).netloc, complaints)
        prepare(page)
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not complaints


def watch(page: Page, host: str, complaints: list[str]) -> None:
    def on_request(request: Any) -> None:
        if urlsplit(request.url).netloc not in (host, ""):
            complaints.append(f"asked for {request.url}")

    def on_console(message: Any) -> None:
        if message.type == "error" and "Failed to load resource" not in message.text:
            complaints.append(message.text)

    page.on("request", on_request)
    page.on("console", on_console)
    page.on("pageerror", lambda error: complaints.append(str(error)))


def submit(page: Page, view: str, button: str, **fields: str) -> None:
    """Fills in the form of a view and sends it."""
    for name, value in fields.items():
        page.locator(f"#{view}-form [name={name}]").fill(value)
    page.get_by_role("button", name=button, exact=True).click()


def numbers(page: Page, selector: str) -> list[float]:
    return [float(text.replace("−", "-")) for text in page.locator(selector).all_text_contents()]


# --- live ----------------------------------------------------------------------------------------------


def test_the_live_view_shows_device_models_queue_and_the_last_jobs(real: LiveService, open_page: Open) -> None:
    answer(real, "/embed", {"texts": ["a", "b"]})
    page = open_page(real.url)
    expect(page.get_by_role("status").first).to_have_text("Ready")
    info = httpx.get(f"{real.url}/info").json()
    expect(page.locator("#device-name")).to_have_text(info["device_name"])
    expect(page.locator("#memory progress")).to_have_count(0)  # a processor has no numbers of its own
    expect(page.locator("#models li")).to_have_count(2)
    expect(page.locator("#models li").first).to_contain_text("all-MiniLM-L6-v2")
    expect(page.locator("#models li").first).to_contain_text("float32")
    expect(page.locator("#queue-now")).to_have_text("0 of 2 slots in use, 0 waiting")
    expect(page.locator("#recent tr").first).to_contain_text("done")
    expect(page.get_by_role("img", name="Last 5 minutes: ")).to_have_count(3)
    expect(page.locator("#latency .mark.embed")).not_to_have_count(0)


def test_a_gpus_memory_is_a_bar_with_its_numbers(real: LiveService, open_page: Open) -> None:
    def with_memory(route: Route) -> None:
        body = {**route.fetch().json(), "device": "cuda", "vram_total_mb": 24576, "vram_used_mb": 6144}
        route.fulfill(json=body)

    page = open_page(real.url, lambda page: page.route("**/info", with_memory))
    bar = page.get_by_role("progressbar", name="Device memory: 6.0 GiB of 24.0 GiB in use")
    expect(bar).to_have_attribute("value", "0.25")
    expect(page.locator("#memory")).to_contain_text("25 %")


@contextlib.contextmanager
def asking(service: LiveService, path: str, body: Any) -> Iterator[None]:
    """A request that runs beside the block and is answered at its end."""
    thread = threading.Thread(target=post, args=(service, path, body))
    thread.start()
    yield
    thread.join(30)
    assert not thread.is_alive()


def test_a_job_shows_its_progress_and_the_time_that_is_left_and_goes_to_the_last_jobs(open_page: Open) -> None:
    loader = FakeLoader()
    with serving(settings(gpu_batch_tokens=16), loader) as service:
        engine = loader.engines["embed:all-MiniLM-L6-v2"]
        engine.hold.clear()
        page = open_page(service.url)
        expect(page.locator("#jobs")).to_have_text("No job at the moment.")
        with asking(service, "/embed", {"texts": words("job", 4)}):
            expect(page.locator("#jobs li")).to_contain_text("4 items on all-MiniLM-L6-v2")
            expect(page.locator("#queue-now")).to_contain_text("1 of 2 slots in use")
            engine.hold.pass_through(2)
            expect(page.locator("#jobs progress")).to_have_attribute("value", "0.5")
            expect(page.locator("#jobs li .amount")).to_contain_text("50 %, ")
            expect(page.locator("#jobs li .amount")).to_contain_text("left")
            engine.hold.set()
        expect(page.locator("#jobs")).to_have_text("No job at the moment.")
        expect(page.locator("#recent tr").first).to_contain_text("embed4")
        expect(page.locator("#throughput .bars")).to_have_attribute("d", re.compile("^M"))


def test_of_many_jobs_the_first_are_listed(real: LiveService, open_page: Open) -> None:
    def with_many(route: Route) -> None:
        body = route.fetch().json()
        job = {
            "id": "a",
            "type": "embed",
            "model": "m",
            "items": 1,
            "state": "waiting",
            "progress": 0,
            "eta_seconds": None,
        }
        route.fulfill(json={**body, "active_jobs": [job] * 50})

    page = open_page(real.url, lambda page: page.route("**/status", with_many))
    expect(page.locator("#jobs li")).to_have_count(21)
    expect(page.locator("#jobs li").last).to_have_text("and 30 more")


def test_a_model_that_is_loaded_or_downloaded_shows_how_far_it_is(open_page: Open) -> None:
    loader = FakeLoader()
    with serving(settings(), loader) as service:
        loader.hold.clear()
        page = open_page(service.url)
        with asking(service, "/embed", {"texts": ["a"], "model": "BAAI/bge-small-en"}):
            row = page.locator("#models li", has_text="BAAI/bge-small-en")
            expect(row).to_contain_text("loading 50 %")
            expect(row.get_by_role("progressbar")).to_have_attribute("value", "0.5")
            loader.hold.set()
        expect(row).to_contain_text("ready")


def test_a_default_model_that_failed_says_why(real: LiveService, open_page: Open) -> None:
    failed = {"model": HOSTILE, "type": "bertscore", "state": "failed", "reason": f"Not to be had: {HOSTILE}"}
    body = {"status": "not ready", "models": {f"bertscore:{HOSTILE}": failed}}
    page = open_page(real.url, lambda page: page.route("**/ready", lambda route: route.fulfill(status=503, json=body)))
    expect(page.locator("#state")).to_have_text("Not ready")
    expect(page.locator("#models .reason")).to_have_text(f"Not to be had: {HOSTILE}")
    assert page.evaluate("window.hacked") is None


def test_a_service_that_is_gone_and_comes_back_is_said_so(real: LiveService, open_page: Open) -> None:
    page = open_page(real.url, lambda page: page.clock.install())
    expect(page.locator("#state")).to_have_text("Ready")
    page.route("**/status", lambda route: route.abort())
    page.clock.run_for(4_000)
    expect(page.locator("#state")).to_have_text("The service does not answer")
    page.unroute("**/status")
    page.clock.run_for(6_000)
    expect(page.locator("#state")).to_have_text("Ready")


def test_a_hidden_page_asks_seldom(real: LiveService, open_page: Open) -> None:
    asked: list[str] = []

    def prepare(page: Page) -> None:
        page.on("request", lambda request: asked.append(urlsplit(request.url).path))
        page.clock.install()

    page = open_page(real.url, prepare)

    def polls(seconds: int) -> int:
        """How often /status is asked for in so many seconds of the page's clock."""
        before = asked.count("/status")
        for _ in range(seconds):
            page.clock.run_for(1_000)
            page.wait_for_load_state("networkidle")
        return asked.count("/status") - before

    assert 10 <= polls(60) <= 30
    page.evaluate("Object.defineProperty(document, 'hidden', { value: true })")
    polls(3)
    assert 1 <= polls(60) <= 4


# --- playground ----------------------------------------------------------------------------------------


def test_scores_and_their_alignment_are_the_services(real: LiveService, open_page: Open) -> None:
    page = open_page(f"{real.url}/#score")
    body = {"candidates": ["The cat sat.", "Revenue grew."], "references": ["A cat was sitting.", "It rained."]}
    submit(page, "score", "Score", **{name: "\n".join(texts) for name, texts in body.items()})
    told = answer(real, "/bertscore", {**body, "explain": True})
    expect(page.locator("#score-answer tbody tr")).to_have_count(2)
    expected = [told[name][index] for index in range(2) for name in ("precision", "recall", "f1")]
    np.testing.assert_allclose(numbers(page, "#score-answer .value"), expected, atol=5.1e-4)
    script = "all => all.map(bar => bar.clientWidth && Number(bar.style.getPropertyValue('--v')))"
    np.testing.assert_allclose(page.locator("#score-answer .meter").evaluate_all(script), expected, atol=5.1e-4)
    for index, pair in enumerate(told["explanations"]):
        page.get_by_role("radio", name=str(index + 1)).check()
        shown = np.array(numbers(page, "#alignment .heat td[data-r]")).reshape(np.shape(pair["similarity"]))
        np.testing.assert_allclose(shown, pair["similarity"], atol=5.1e-3)
        assert marked(page) == matches(pair)


def marked(page: Page) -> set[tuple[str, int, int]]:
    """The cells that are marked as matches: what for, row, column."""
    script = """all => all.flatMap(cell => ["row", "column", "both"].filter(name => cell.classList.contains(name))
        .map(name => [name, Number(cell.dataset.r), Number(cell.dataset.c)]))"""
    return {tuple(found) for found in page.locator("#alignment .heat td[data-r]").evaluate_all(script)}


def matches(pair: dict[str, Any]) -> set[tuple[str, int, int]]:
    """The same, of an explanation."""
    rows = {(r, c) for r, c in enumerate(pair["candidate_matches"]) if pair["candidate_weights"][r]}
    columns = {(r, c) for c, r in enumerate(pair["reference_matches"]) if pair["reference_weights"][c]}
    kinds = {"both": rows & columns, "row": rows - columns, "column": columns - rows}
    return {(kind, *place) for kind, places in kinds.items() for place in places}


def test_a_token_shows_its_partner_under_the_pointer_and_by_keyboard(real: LiveService, open_page: Open) -> None:
    page = open_page(f"{real.url}/#score")
    submit(page, "score", "Score")
    lit = page.locator(".token.lit")
    page.locator(".token", has_text="sat").hover()
    expect(lit).to_have_text(["sat", "sitting"])
    expect(page.locator("#alignment .told")).to_contain_text("“sat” is closest to “sitting”: 0.7")
    page.locator(".token").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(lit).to_have_text(["cat", "cat"])
    page.keyboard.press("ArrowDown")  # to the reference's tokens
    expect(page.locator(".token:focus")).to_have_attribute("data-side", "reference")
    page.keyboard.press("Tab")  # all tokens are one stop, and the heat map is the next
    cell = page.locator("#alignment td:focus")
    expect(cell).to_have_attribute("data-r", "0")
    for press in ("ArrowDown", "ArrowDown", "ArrowRight", "ArrowRight"):
        page.keyboard.press(press)
    expect(cell).to_have_attribute("aria-label", "“cat”, “cat”: 0.99, each other's best match")
    expect(lit).to_have_text(["cat", "cat"])
    expect(page.locator("#alignment .told")).to_contain_text("“cat” and “cat”: 0.9")


def test_a_long_pair_is_shown_in_part(real: LiveService, open_page: Open) -> None:
    page = open_page(f"{real.url}/#score")
    submit(page, "score", "Score", candidates="word " * 80, references="A word.")
    expect(page.locator("#alignment .heat tbody tr")).to_have_count(48)
    expect(page.locator("#alignment")).to_contain_text("The first 48 of 82 by 5 are shown.")


def test_a_text_without_tokens_is_scored_and_said_to_have_no_alignment(real: LiveService, open_page: Open) -> None:
    page = open_page(f"{real.url}/#score")
    submit(page, "score", "Score", candidates="x\n\ny", references="x\nz\ny")
    expect(page.locator("#alignment .heat tbody tr").first).to_be_visible()
    page.get_by_role("radio", name="2", exact=True).check()
    expect(page.locator("#alignment")).to_contain_text("nothing to align")
    expect(page.locator("#alignment .heat")).to_have_count(0)
    submit(page, "score", "Score", candidates="hello", references="\u200b")
    expect(page.locator("#score-note")).to_contain_text("all-MiniLM-L6-v2")
    expect(page.locator("#alignment")).to_contain_text("nothing to align")


def test_many_pairs_are_scored_without_an_alignment(real: LiveService, open_page: Open) -> None:
    page = open_page(f"{real.url}/#score")
    submit(page, "score", "Score", candidates="\n".join("abcdef"), references="\n".join("abcdef"))
    expect(page.locator("#score-answer tbody tr")).to_have_count(6)
    expect(page.locator("#alignment")).to_contain_text("shown for up to 5 pairs")


def test_cosines_are_those_of_the_vectors(real: LiveService, open_page: Open) -> None:
    texts = ["The cat sat on the mat.", "A kitten slept.", "Revenue grew."]
    page = open_page(f"{real.url}/#embed")
    submit(page, "embed", "Embed", texts="\n\n".join(texts))
    expect(page.locator("#cosines td[data-r]")).to_have_count(9)
    vectors = np.array(answer(real, "/embed", {"texts": texts, "normalize": True})["embeddings"])
    np.testing.assert_allclose(numbers(page, "#cosines td[data-r]"), (vectors @ vectors.T).ravel(), atol=5.1e-3)
    page.locator("#cosines td[data-r='1'][data-c='0']").hover()
    expect(page.locator("#cosines .told")).to_contain_text("“A kitten slept.” and “The cat sat on the mat.”: 0.")


def test_documents_are_ranked_by_the_query(real: LiveService, open_page: Open) -> None:
    documents = ["Revenue grew.", "The cat sleeps on the stove.", "A dog barks."]
    page = open_page(f"{real.url}/#rerank")
    submit(page, "rerank", "Rerank", query="Where is the cat?", documents="\n".join(documents))
    told = answer(real, "/rerank", {"query": "Where is the cat?", "documents": documents})["results"]
    expect(page.locator("#rerank-answer .texts")).to_have_text([documents[result["index"]] for result in told])
    np.testing.assert_allclose(
        numbers(page, "#rerank-answer .value"), [result["relevance_score"] for result in told], atol=5.1e-4
    )
    expect(page.locator("#rerank-note")).to_contain_text("cosine")


def test_an_error_is_shown_in_the_services_words(real: LiveService, open_page: Open) -> None:
    page = open_page(f"{real.url}/#score")
    submit(page, "score", "Score", candidates="a\nb", references="a")
    expect(page.locator("#score-note")).to_contain_text("must be of equal length: got 2 and 1")
    page.goto(f"{real.url}/#embed")
    submit(page, "embed", "Embed", model="<b>no</b>")
    expect(page.locator("#embed-note")).to_contain_text("model '<b>no</b>' is not a hub id")
    expect(page.locator("#embed-note b")).to_have_count(0)
    submit(page, "embed", "Embed", model="")
    expect(page.locator("#cosines td").first).to_be_visible()
    submit(page, "embed", "Embed", model="<b>no</b>")
    expect(page.locator("#embed-note")).to_contain_text("is not a hub id")
    expect(page.locator("#cosines")).to_be_empty()


def test_hostile_texts_stay_texts(real: LiveService, open_page: Open) -> None:
    page = open_page(f"{real.url}/#score")
    submit(page, "score", "Score", candidates=HOSTILE, references=HOSTILE)
    expect(page.locator("#score-answer .texts p").first).to_have_text(HOSTILE)
    page.goto(f"{real.url}/#embed")
    submit(page, "embed", "Embed", texts=f"{HOSTILE}\na")
    expect(page.locator("#cosines tbody th").first).to_contain_text("onerror")
    page.goto(f"{real.url}/#rerank")
    submit(page, "rerank", "Rerank", query=HOSTILE, documents=HOSTILE)
    expect(page.locator("#rerank-answer .texts")).to_have_text(HOSTILE)
    expect(page.locator("img")).to_have_count(0)
    assert page.evaluate("window.hacked") is None


@pytest.mark.skipif(not (shutil.which("bash") and shutil.which("curl")), reason="needs bash and curl")
def test_the_curl_lines_do_the_same(real: LiveService, open_page: Open) -> None:
    page = open_page(f"{real.url}/#score")
    fields = {
        "score": ("Score", {"candidates": HOSTILE, "references": "It's.\n"}),
        "embed": ("Embed", {"texts": HOSTILE}),
    }
    fields["rerank"] = ("Rerank", {"query": HOSTILE, "documents": f"a\n{HOSTILE}"})
    long = ("Embed", {"texts": "\n".join(HOSTILE * 50 for _ in range(30))})  # longer than an argument may be
    for view, (button, texts) in (*fields.items(), ("embed", long)):
        page.get_by_role("navigation").get_by_role("link", name=button).click()
        with page.expect_response(lambda got: got.request.method == "POST") as got:
            submit(page, view, button, **texts)
        expect(page.locator(f"#{view}-note")).to_contain_text("all-MiniLM-L6-v2")
        line = page.locator(f"#{view}-curl code").text_content() or ""
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60)
        assert same(json.loads(done.stdout), got.value.json()), done.stdout


def same(one: Any, other: Any) -> bool:
    """Whether two answers agree, numbers to five digits, but for the answer's own id."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(name == "id" or same(one[name], other[name]) for name in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return abs(one - other) < 1e-5 if isinstance(one, float) else bool(one == other)


@pytest.mark.parametrize("host", ["127.0.0.1", "gpu.lan"])
def test_the_curl_line_is_copied_where_the_browser_has_a_clipboard_for_pages_and_where_not(
    real: LiveService, open_page: Open, host: str
) -> None:
    page = open_page(f"{real.url.replace('127.0.0.1', host)}/#embed")
    assert page.evaluate("Boolean(navigator.clipboard)") is (host == "127.0.0.1")
    button = page.locator("#embed-curl").get_by_role("button")
    button.click()
    expect(button).to_have_text("Copied")
    expect(button).to_be_focused()
    field = page.locator("#embed-form textarea")
    line = page.locator("#embed-curl code").text_content() or ""
    field.fill("")
    field.focus()
    page.keyboard.press("ControlOrMeta+v")
    expect(field).to_have_value(line)
    assert f"http://{host}:" in line


# --- signing in ----------------------------------------------------------------------------------------


def sign_in(page: Page, key: str = KEY) -> None:
    page.get_by_label("Key").fill(key)
    page.keyboard.press("Enter")


def test_the_key_opens_the_page_in_this_tab_until_it_signs_out(locked: LiveService, open_page: Open) -> None:
    page = open_page(locked.url)
    expect(page.get_by_label("Key")).to_be_focused()
    sign_in(page, "wrong")
    expect(page.get_by_role("alert")).to_have_text("This key is not accepted.")
    expect(page.get_by_role("navigation")).to_have_count(0)
    sign_in(page)
    expect(page.locator("#state")).to_have_text("Ready")
    expect(page).to_have_title("GPU Service")
    page.reload()
    expect(page.locator("#state")).to_have_text("Ready")
    other = page.context.new_page()
    other.goto(locked.url)
    expect(other.get_by_label("Key")).to_be_visible()
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_label("Key")).to_be_visible()
    assert page.evaluate("sessionStorage.length + localStorage.length + document.cookie.length") == 0


def test_a_key_that_is_no_longer_accepted_is_forgotten_and_the_form_asks_for_another(
    locked: LiveService, open_page: Open
) -> None:
    page = open_page(locked.url)
    sign_in(page)
    expect(page.locator("#state")).to_have_text("Ready")
    page.route("**/status", lambda route: route.fulfill(status=401, json={"detail": "Unauthorized"}))
    expect(page.get_by_label("Key")).to_be_visible()  # while the page was open
    page.evaluate("sessionStorage.setItem('gpu-service-key', 'of yesterday')")
    page.reload()
    expect(page.get_by_role("alert")).to_have_text("This key is not accepted.")
    assert page.evaluate("sessionStorage.length") == 0


def test_the_playground_works_with_a_key_and_its_curl_line_has_a_place_for_one(
    locked: LiveService, open_page: Open
) -> None:
    page = open_page(f"{locked.url}/#embed")
    sign_in(page)
    submit(page, "embed", "Embed")
    expect(page.locator("#cosines td[data-r]")).to_have_count(36)
    line = page.locator("#embed-curl code").text_content() or ""
    assert "-H 'X-API-Key: YOUR_KEY'" in line
    assert KEY not in (page.locator("html").text_content() or "")


def test_without_a_key_there_is_nothing_to_sign_out_of(real: LiveService, open_page: Open) -> None:
    page = open_page(real.url)
    expect(page.locator("#state")).to_have_text("Ready")
    expect(page.get_by_role("button", name="Sign out")).to_be_hidden()
    assert "X-API-Key" not in (page.locator("#embed-curl code").text_content() or "")


# --- /docs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["real", "locked"])
def test_docs_lists_the_endpoints_and_tries_them_without_the_internet(
    kind: str, request: pytest.FixtureRequest, open_page: Open
) -> None:
    service: LiveService = request.getfixturevalue(kind)
    page = open_page(f"{service.url}/docs")
    if service.key:
        sign_in(page)
    operation = page.locator("#swagger-ui .opblock", has_text="/status")
    operation.get_by_role("button").first.click()
    operation.get_by_role("button", name="Try it out").click()
    operation.get_by_role("button", name="Execute").click()
    expect(operation.locator(".live-responses-table .response-col_status").last).to_contain_text("200")
    expect(page.locator("#swagger-ui .opblock")).not_to_have_count(0)


def test_a_tab_that_has_signed_in_opens_docs_without_asking_again(locked: LiveService, open_page: Open) -> None:
    page = open_page(locked.url)
    sign_in(page)
    page.get_by_role("link", name="Endpoints").click()
    expect(page.locator("#swagger-ui .opblock").first).to_be_visible()


# --- for everyone --------------------------------------------------------------------------------------


def all_shown(page: Page, url: str) -> Iterator[str]:
    """Each view with an answer in it."""
    for view in VIEWS:
        page.goto(f"{url}/#{view}")
        if view == "live":
            expect(page.locator("#recent tr").first).to_be_visible()
        else:
            submit(page, view, view.capitalize())
            expect(page.locator(f"#{view}-note")).to_contain_text("all-MiniLM-L6-v2")
        yield view


@pytest.mark.parametrize("width", [320, 390])
def test_a_phone_shows_every_view_without_scrolling_sideways(real: LiveService, open_page: Open, width: int) -> None:
    page = open_page(real.url, viewport={"width": width, "height": 844}, has_touch=True, is_mobile=True)
    for view in all_shown(page, real.url):
        assert page.evaluate("document.documentElement.scrollWidth") <= width, view


CONTRASTS = """() => {
    const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 })
        .getContext("2d", { willReadFrequently: true });
    const luminance = (color) => {
        canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
        const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((v) => v / 255)
            .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ground = (element) => {
        for (; element; element = element.parentElement) {
            const color = getComputedStyle(element).backgroundColor;
            if (color !== "rgba(0, 0, 0, 0)") return color;
        }
        return "white";
    };
    const low = [];
    for (const element of document.querySelectorAll("main *, header *, footer *")) {
        const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
        if (!own || !element.checkVisibility() || element.closest(".dim, svg")) continue;
        const [a, b] = [luminance(getComputedStyle(element).color), luminance(ground(element))];
        const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        if (contrast < 4.5) low.push(`${element.className} ${element.textContent} ${contrast.toFixed(2)}`);
    }
    return low;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_its_ground_by_day_and_by_night(
    real: LiveService, open_page: Open, scheme: str
) -> None:
    page = open_page(real.url, color_scheme=scheme)
    for view in all_shown(page, real.url):
        assert page.evaluate(CONTRASTS) == [], view
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(15, 18, 21)") is (scheme == "dark")


NEED_NAMES = {"button", "textbox", "link", "combobox", "checkbox", "radio", "gridcell", "image", "progressbar", "grid"}
NEED_NAMES |= {"navigation", "region", "group"}


def test_a_screen_reader_finds_a_name_for_everything(real: LiveService, open_page: Open) -> None:
    page = open_page(real.url)
    session = page.context.new_cdp_session(page)
    for view in all_shown(page, real.url):
        nodes = session.send("Accessibility.getFullAXTree")["nodes"]
        shown = [node for node in nodes if not node["ignored"] and node["role"]["value"] in NEED_NAMES]
        assert len(shown) > 5
        nameless = [node["role"]["value"] for node in shown if not node.get("name", {}).get("value", "").strip()]
        assert nameless == [], view


def test_everything_can_be_done_by_keyboard(real: LiveService, open_page: Open) -> None:
    page = open_page(real.url)
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("main")).to_be_focused()
    page.locator("nav a").first.focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="How close is a text to a reference?")).to_be_visible()
    expect(page.locator("nav [aria-current=page]")).to_have_text("Score")
    page.locator("#score-form [name=candidates]").focus()
    page.keyboard.press("Control+Enter")
    expect(page.locator("#score-answer tbody tr")).to_have_count(2)
    reached = []
    for _ in range(14):
        page.keyboard.press("Tab")
        script = (
            "(e => e.closest('table') ? 'heat map' : e.dataset.side || e.name || e.textContent)(document.activeElement)"
        )
        reached.append(page.evaluate(script))
    for stop in ("references", "idf", "Score", "pair", "candidate", "heat map", "Copy"):
        assert stop in reached, reached
    page.go_back()
    expect(page.locator("nav [aria-current=page]")).to_have_text("Live")

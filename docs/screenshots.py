"""The README's two pictures of the page, taken of the real service in a headless Chromium: `make screenshots`.

    python docs/screenshots.py --seconds 150     # how long the service has callers before the live view is taken

Writes page.png (the playground with an alignment) and page-live.png (the live view) beside this file.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
from playwright.sync_api import Browser, Page, sync_playwright

DOCS = Path(__file__).resolve().parent
SENTENCES = [
    "The cat sat on the mat.",
    "Revenue grew last year, mostly in the north.",
    "A storm kept the ferries in the harbour until the morning.",
    "How do I reset my password without the old one?",
    "The museum opens at ten and is closed on Mondays.",
]


@contextlib.contextmanager
def service() -> Iterator[str]:
    """The service on a free port with the embedded model, once it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    named = {
        "HOST": "127.0.0.1",
        "PORT": str(port),
        "MODEL_BERTSCORE": "all-MiniLM-L6-v2",
        "GPU_MAX_BATCH_SIZE": "1000",
    }
    named |= {"HF_HUB_OFFLINE": "1", "GPU_CACHE_MB": "0", "GPU_MAX_CONCURRENT": "4", "LOG_LEVEL": "warning"}
    process = subprocess.Popen([sys.executable, str(DOCS.parent / "gpu_service.py")], env={**os.environ, **named})
    url = f"http://127.0.0.1:{port}"
    try:
        while process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/ready").status_code == 200:
                    break
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait()


def texts(count: int, sentences: int = 1) -> list[str]:
    """Texts of so many sentences each."""
    return [" ".join(random.choices(SENTENCES, k=sentences)) for _ in range(count)]


def call(url: str, ended: threading.Event) -> None:
    """Small requests of all kinds, in waves, until the end."""
    for number in itertools.count():
        if ended.wait(random.uniform(0.1, 0.5) if number // 25 % 2 else random.uniform(0.6, 1.8)):
            return
        count = random.randint(1, 24)
        if number % 3:
            httpx.post(f"{url}/embed", json={"texts": texts(count, 2)}, timeout=60)
        else:
            pairs = {"candidates": texts(count), "references": texts(count)}
            httpx.post(f"{url}/bertscore", json=pairs, timeout=60)


def take(page: Page, name: str, height: int) -> None:
    """Writes a picture, and says how large it is."""
    file = DOCS / name
    page.screenshot(path=file, clip={"x": 0, "y": 0, "width": 1200, "height": height}, full_page=True)
    print(f"{file.relative_to(DOCS.parent)}: {file.stat().st_size / 1000:.0f} kB")


def take_playground(browser: Browser, url: str) -> None:
    """The alignment of one pair, a token shown with its partner."""
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.goto(f"{url}/#score")
    page.get_by_role("button", name="Score").click()
    page.locator(".token", has_text="sat").focus()
    page.mouse.move(0, 0)
    end = page.locator("#alignment").bounding_box()
    take(page, "page.png", round(end["y"] + end["height"] + page.evaluate("scrollY")) + 10 if end else 1200)


def take_live(browser: Browser, url: str, seconds: float) -> None:
    """The live view after so many seconds with callers, in the middle of two long jobs."""
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.goto(f"{url}/#live")
    ended = threading.Event()
    callers = [threading.Thread(target=call, args=(url, ended), daemon=True) for _ in range(2)]
    pairs = {"candidates": texts(400, 6), "references": texts(400, 6)}
    long = {"/embed": {"texts": texts(1000, 8)}, "/bertscore": pairs}
    for path, body in long.items():
        ask = {"json": body, "timeout": 600}
        callers.append(threading.Thread(target=httpx.post, args=(f"{url}{path}",), kwargs=ask, daemon=True))
    for caller in callers[:2]:
        caller.start()
    page.wait_for_timeout(1000 * seconds)
    for caller in callers[2:]:
        caller.start()
    shown = (
        "Number([...document.querySelectorAll('#jobs progress')].sort((a, b) => b.value - a.value)[0]?.value) > 0.35"
    )
    while not page.evaluate(shown):  # the page's policy leaves no way for wait_for_function
        page.wait_for_timeout(200)
    take(page, "page-live.png", 1010)
    ended.set()
    for caller in callers:
        caller.join()


def main() -> None:
    """Takes both pictures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=150)
    seconds = parser.parse_args().seconds
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        sys.exit("No Chromium is found: install the system's package chromium.")
    sandbox = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with service() as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=sandbox)
        take_playground(browser, url)
        take_live(browser, url, seconds)
        browser.close()


if __name__ == "__main__":
    main()

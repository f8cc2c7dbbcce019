"""The two real processes: the engine is killed, hangs, runs out of memory; the service is killed, or stops."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tiny_models
from conftest import retry_after, settings
from fake_hub import FakeHub, Repository, fake_hub, read_folder
from live import Program, answer, answers, post, program, serving, until

import gpu_service
from gpu_engine.link import Launch, Launched, Life, launch_at_an_address, launch_process
from gpu_engine.messages import Configure, Load
from gpu_engine.model_files import configured_model
from gpu_engine.work import LoadOptions

resource = pytest.importorskip("resource", reason="POSIX signals and limits")
pytestmark = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="children are found in /proc")
SLOW = pytest.mark.slow

SOON_S = 20.0  # the engine has no timer as short as this: what ends by then ends by itself
# 250 tokens each; no two texts are the same.
LONG = [" ".join(f"{word}{n}" for word in ("river", "stone", "market", "winter") * 30) for n in range(100)]
SHORT = ["the cat sat on the mat", "hello world"]
NO_CACHE = {"GPU_CACHE_MB": "0"}


# --- processes -----------------------------------------------------------------------------------------


def stat_of(pid: int) -> str:
    """One letter: R, S, T, Z …; nothing where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def children(pid: int) -> list[int]:
    """Of all threads of a process, zombies too."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # a thread that ended meanwhile
            found += map(int, (task / "children").read_text().split())
    return found


def engine_of(pid: int, but: int = 0) -> int:
    """The engine of a service, as soon as it has one other than `but`."""

    def found() -> int | None:
        for child in children(pid):
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{child}/cmdline").read_bytes()
                if child != but and b"gpu_engine" in command:
                    return child
        return None

    engine: int = until(found, "there is no engine")
    return engine


def gone(pid: int) -> bool:
    """An orphan's zombie is for whoever inherits it."""
    return stat_of(pid) in ("", "Z")


def soon(condition: Callable[[], Any]) -> None:
    """Waits for what needs no timer to happen."""
    deadline = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        threading.Event().wait(0.01)


def kill(pid: int, sent: signal.Signals = signal.SIGKILL) -> None:
    os.kill(pid, sent)


# --- callers -------------------------------------------------------------------------------------------


def send(service: Program, texts: list[str], path: str = "/embed", **more: Any) -> httpx.Response | None:
    """One call on a connection of its own: the answer, None where there was none. Half an answer is an error."""
    field = "input" if path.startswith("/v1") else "texts"
    url = service.client.base_url.join(path)
    try:
        return httpx.post(url, json={field: texts, **more}, timeout=120)
    except httpx.TransportError as error:
        if "complete message body" in str(error):
            raise AssertionError("half an answer") from error
        return None


@contextlib.contextmanager
def callers(service: Program, count: int = 4, path: str = "/embed") -> Iterator[list[Future[httpx.Response | None]]]:
    """So many requests of a hundred long texts each; the device is in a batch of them when the block begins."""
    with ThreadPoolExecutor(count) as pool:
        asked = [pool.submit(send, service, [f"{n} {text}" for text in LONG], path) for n in range(count)]
        until(lambda: progress_of(service.client) > 0, "no batch began")
        yield asked


def progress_of(client: httpx.Client) -> float:
    """The furthest of the active jobs."""
    return max((job["progress"] for job in client.get("/status").json()["active_jobs"]), default=0.0)


def numbers(service: Program) -> tuple[np.ndarray, np.ndarray]:
    """What both defaults answer: embeddings, F1."""
    embedded = service.client.post("/embed", json={"texts": SHORT})
    scored = service.client.post("/bertscore", json={"candidates": SHORT, "references": SHORT[::-1]})
    assert (embedded.status_code, scored.status_code) == (200, 200), (embedded.text, scored.text)
    return np.array(embedded.json()["embeddings"]), np.array(scored.json()["f1"])


def same_numbers(service: Program, before: tuple[np.ndarray, np.ndarray]) -> None:
    """The answers are those from before."""
    for now, then in zip(numbers(service), before):
        np.testing.assert_allclose(now, then, atol=1e-6)


def told(response: httpx.Response | None, code: str = "engine_died", status: int = 503) -> None:
    """Checks the answer to a caller whose engine died."""
    assert response is not None, "a connection was closed"
    assert (response.status_code, response.json()["code"]) == (status, code), response.text
    assert retry_after(response) <= 10, "the next engine is there long before"


def says_that_it_is_down(service: Program, why: str = "was killed by signal 9") -> None:
    """Waits for /health to say so; /ready agrees at that moment."""
    response = service.until_answers("/health", 503)
    assert response.json() == {"status": "error", "device": "cpu", "detail": f"the engine {why}"}
    retry_after(response)
    ready = service.client.get("/ready")
    assert ready.status_code == 503
    retry_after(ready)
    assert {shown["state"] for shown in ready.json()["models"].values()} == {"loading"}


def is_back(service: Program, restarts: int) -> None:
    """Waits for the defaults; /health agrees, the dead were reaped, and no code of ours stumbled."""
    service.until_answers("/ready", 200)
    assert service.client.get("/health").json() == {"status": "ok", "device": "cpu"}
    assert service.client.get("/info").json()["counters"]["engine_restarts"] == restarts
    assert [stat_of(child) for child in children(service.process.pid)].count("Z") == 0
    assert len(children(service.process.pid)) == 1
    assert "Traceback" not in service.log.read_text()


@contextlib.contextmanager
def held_download(folder: Path, **environment: str) -> Iterator[tuple[Program, FakeHub, threading.Event]]:
    """A service with a hub whose `tiny/held` waits half way through its weights until the event is set."""
    files, hold = read_folder(tiny_models.save_bert(folder / "tiny")), threading.Event()
    with fake_hub() as hub:
        hub.repositories["tiny/held"] = Repository(files, hold=hold)
        env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "0"}
        with program(folder, **env, **environment) as service:
            try:
                yield service, hub, hold
            finally:
                hold.set()


def until_held(hub: FakeHub, times: int = 1) -> None:
    """Waits until the weights are being downloaded."""
    until(lambda: hub.fetched.count("tiny/held/model.safetensors") >= times, "no download began")


# --- the engine is killed ------------------------------------------------------------------------------


@SLOW
def test_an_idle_engine_that_is_killed_comes_back_by_itself_three_times_in_a_row(tmp_path: Path) -> None:
    with program(tmp_path) as service:
        service.until_answers("/ready", 200)
        before = numbers(service)
        for deaths in (1, 2, 3):
            engine = engine_of(service.process.pid)
            kill(engine)
            says_that_it_is_down(service)
            is_back(service, deaths)
            assert stat_of(engine) == ""
            same_numbers(service, before)
        engine = engine_of(service.process.pid)
        service.stop()
        assert gone(engine)


@SLOW
def test_signals_to_the_whole_group_are_for_the_service_and_leave_the_engine_alone(tmp_path: Path) -> None:
    with program(tmp_path) as service:
        service.until_answers("/ready", 200)
        engine = engine_of(service.process.pid)
        for sent in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            kill(engine, sent)
        before = numbers(service)
        assert engine_of(service.process.pid) == engine
        same_numbers(service, before)


@SLOW
def test_an_engine_that_is_killed_in_a_batch_answers_every_caller_and_comes_back(tmp_path: Path) -> None:
    with program(tmp_path, **NO_CACHE, GPU_MAX_CONCURRENT="3", GPU_QUEUE_TIMEOUT="60") as service:
        service.until_answers("/ready", 200)
        before = numbers(service)
        with callers(service, 3) as asked, ThreadPoolExecutor(3) as pool:
            waiting = [pool.submit(send, service, SHORT) for _ in range(3)]
            until(lambda: service.client.get("/status").json()["queue"]["waiting_estimate"] == 3)
            kill(engine_of(service.process.pid))
            for future in (*asked, *waiting):
                told(future.result())
        is_back(service, 1)
        same_numbers(service, before)


@SLOW
def test_callers_of_openai_are_told_429_when_the_engine_dies(tmp_path: Path) -> None:
    with program(tmp_path, **NO_CACHE) as service:
        service.until_answers("/ready", 200)
        with callers(service, 1, "/v1/embeddings") as asked:
            kill(engine_of(service.process.pid))
            response = asked[0].result()
        assert response is not None
        assert response.status_code == 429
        retry_after(response)


@SLOW
def test_an_engine_that_is_killed_while_it_starts_and_while_it_loads_comes_back(tmp_path: Path) -> None:
    with program(tmp_path, GPU_QUEUE_TIMEOUT="60") as service, ThreadPoolExecutor(2) as pool:
        engine = engine_of(service.process.pid)
        service.until_answers("/health", 200)
        asking = pool.submit(send, service, SHORT)
        until(lambda: service.client.get("/status").json()["active_jobs"])
        kill(engine)  # it still imports its libraries
        told(asking.result())
        says_that_it_is_down(service)

        service.until_answers("/health", 200)
        asking = pool.submit(send, service, SHORT)
        until(lambda: service.client.get("/status").json()["active_jobs"])
        kill(engine_of(service.process.pid))  # it loads
        told(asking.result())
        says_that_it_is_down(service)

        response = send(service, SHORT)  # waits for the next one
        assert response is not None
        assert response.status_code == 200
        is_back(service, 2)


@SLOW
def test_an_engine_that_is_killed_while_it_downloads_a_model_downloads_it_when_it_is_asked_again(
    tmp_path: Path,
) -> None:
    with held_download(tmp_path, GPU_QUEUE_TIMEOUT="60") as (service, hub, hold), ThreadPoolExecutor(1) as pool:
        service.until_answers("/ready", 200)
        before = numbers(service)
        asking = pool.submit(send, service, SHORT, model="tiny/held")
        until_held(hub)
        kill(engine_of(service.process.pid))
        told(asking.result())
        is_back(service, 1)
        same_numbers(service, before)
        hold.set()
        response = send(service, SHORT, model="tiny/held")
        assert response is not None
        assert response.status_code == 200, response.text


@SLOW
@pytest.mark.parametrize("leaves", [True, False])
def test_after_several_deaths_it_leaves_with_code_70_or_keeps_trying(tmp_path: Path, leaves: bool) -> None:
    with program(tmp_path, GPU_EXIT_ON_FATAL=str(leaves)) as service:
        engine = engine_of(service.process.pid)
        service.until_answers("/health", 200)
        for _ in range(gpu_service.MOST_DEATHS):
            kill(engine)
            says_that_it_is_down(service)
            engine = engine_of(service.process.pid, but=engine)
        kill(engine)
        if leaves:
            assert service.process.wait(SOON_S) == 70
            assert f"the engine died {gpu_service.MOST_DEATHS + 1} times" in service.log.read_text()
        else:
            is_back(service, gpu_service.MOST_DEATHS + 1)
            numbers(service)


# --- the engine hangs, or has no memory ----------------------------------------------------------------


@SLOW
def test_an_engine_that_hangs_in_a_batch_is_killed_and_comes_back() -> None:
    config = settings(gpu_dtype="float32", gpu_cache_mb=0, gpu_request_timeout=0.5, gpu_max_batch_size=1)
    with serving(config, launch=launch_process, hang_s=0.0) as service, ThreadPoolExecutor(1) as pool:
        asking = pool.submit(post, service, "/v1/embeddings", {"input": LONG})  # may take 50 s, as a hundred requests
        until(lambda: service.runtime.state.batch_age_s)
        engine = engine_of(os.getpid())
        kill(engine, signal.SIGSTOP)
        response = asking.result()
        assert response.status_code == 429
        retry_after(response)
        with httpx.Client(base_url=service.url) as client:
            assert client.get("/health").json()["detail"] == "the engine did not answer and was killed"
            until(lambda: stat_of(engine) == "")  # given up at once, reaped a moment later
            until(lambda: answers(client, "/ready", 200))
        assert len(answer(service, "/v1/embeddings", {"input": SHORT[:1]})["data"]) == 1


@SLOW
@pytest.mark.parametrize("room_mb", [64, 0])
def test_an_engine_without_memory_answers_every_caller_and_serves_again(tmp_path: Path, room_mb: int) -> None:
    with program(tmp_path, **NO_CACHE, GPU_BATCH_TOKENS="32768") as service:
        service.until_answers("/ready", 200)
        before = numbers(service)
        engine = engine_of(service.process.pid)
        size = int(Path(f"/proc/{engine}/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.prlimit(engine, resource.RLIMIT_AS, (size + (room_mb << 20), resource.RLIM_INFINITY))
        with ThreadPoolExecutor(3) as pool:
            asked = [pool.submit(send, service, [f"{n} {text}" for text in LONG]) for n in range(3)]
            answers = [future.result() for future in asked]
        for response in answers:
            assert response is not None
            assert response.status_code in (200, 422, 503), response.text
            if response.status_code == 200:
                assert len(response.json()["embeddings"]) == len(LONG)
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(engine, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        service.until_answers("/ready", 200)

        def told() -> bool:
            counters = service.client.get("/info").json()["counters"]
            return bool(counters.get("out_of_memory_recoveries") or counters["engine_restarts"])

        until(told)  # the engine tells a few times a second
        same_numbers(service, before)


# --- the service is killed -----------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["starts", "loads", *(pytest.param(w, marks=SLOW) for w in ("idle", "in a batch"))])
def test_an_engine_whose_service_is_killed_ends_by_itself(tmp_path: Path, when: str) -> None:
    with program(tmp_path, **NO_CACHE) as service, contextlib.ExitStack() as stack:
        engine = engine_of(service.process.pid)
        if when == "loads":
            until(lambda: "importing libraries" in service.log.read_text())
        elif when != "starts":
            service.until_answers("/ready", 200)
        if when == "in a batch":
            stack.enter_context(callers(service))
        service.process.kill()
        service.process.wait()
        soon(lambda: gone(engine))


@SLOW
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_an_engine_that_downloads_ends_with_its_service(tmp_path: Path, sent: signal.Signals) -> None:
    with held_download(tmp_path, MODEL_BERTSCORE="tiny/held") as (service, hub, _):
        engine = engine_of(service.process.pid)
        until_held(hub)
        service.stop(sent)
        soon(lambda: gone(engine))


# --- the service stops ---------------------------------------------------------------------------------


def has_stopped(service: Program, engine: int, sent: signal.Signals = signal.SIGTERM) -> None:
    """The service ends by a signal that was sent, or with 0; no engine is left, and nothing stumbled."""
    assert service.process.wait(SOON_S) in (0, -sent)
    assert gone(engine)
    assert "Traceback" not in service.log.read_text()


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "ctrl-c"])
@pytest.mark.parametrize("when", ["starts", "loads", "down", pytest.param("in a batch", marks=SLOW)])
def test_a_service_whose_group_is_told_to_stop_leaves_no_engine_and_no_caller_without_an_answer(
    tmp_path: Path, when: str, sent: signal.Signals
) -> None:
    """A terminal sends Ctrl+C to the whole group, the engine too."""
    with program(tmp_path, preexec_fn=os.setsid, **NO_CACHE) as service, contextlib.ExitStack() as stack:
        asked: list[Future[httpx.Response | None]] = []
        engine = engine_of(service.process.pid)
        service.until_answers("/health", 200)
        if when == "loads":
            until(lambda: "importing libraries" in service.log.read_text())
        elif when == "down":
            kill(engine)
            service.until_answers("/health", 503)
        elif when == "in a batch":
            service.until_answers("/ready", 200)
            asked = stack.enter_context(callers(service))
        os.killpg(service.process.pid, sent)
        for response in (future.result() for future in asked):
            if response is not None:
                assert response.status_code in (200, 503), response.text
                assert response.status_code == 503 or len(response.json()["embeddings"]) == len(LONG)
        assert not asked or any(future.result() for future in asked), "what runs is finished"
        has_stopped(service, engine, sent)


@SLOW
def test_an_engine_that_dies_while_the_service_stops_does_not_hold_it(tmp_path: Path) -> None:
    with program(tmp_path, **NO_CACHE, GPU_REQUEST_TIMEOUT="600") as service:
        service.until_answers("/ready", 200)
        engine = engine_of(service.process.pid)
        with callers(service, 2) as asked:
            service.process.send_signal(signal.SIGTERM)
            until(lambda: "stopping" in service.log.read_text())
            kill(engine)
            for future in asked:
                told(future.result())
        has_stopped(service, engine)


@SLOW
def test_an_engine_that_stands_still_does_not_hold_a_service_that_stops(tmp_path: Path) -> None:
    with program(tmp_path) as service:
        service.until_answers("/ready", 200)
        engine = engine_of(service.process.pid)
        kill(engine, signal.SIGSTOP)
        service.process.send_signal(signal.SIGTERM)
        has_stopped(service, engine)


@SLOW
def test_an_impatient_second_ctrl_c_leaves_no_engine(tmp_path: Path) -> None:
    with program(tmp_path, **NO_CACHE) as service:
        service.until_answers("/ready", 200)
        engine = engine_of(service.process.pid)
        with callers(service, 2) as asked:
            service.process.send_signal(signal.SIGINT)
            until(lambda: "stopping" in service.log.read_text())
            service.process.send_signal(signal.SIGINT)
            for future in asked:
                response = future.result()
                assert response is None or response.status_code in (200, 503)
        assert service.process.wait(SOON_S) in (0, -signal.SIGINT)
        soon(lambda: gone(engine))


# --- how it is started ---------------------------------------------------------------------------------


@SLOW
def test_the_app_under_uvicorn_from_another_folder_serves_and_stops(tmp_path: Path) -> None:
    folder = str(Path(gpu_service.__file__).parent)
    uvicorn = (sys.executable, "-m", "uvicorn", "gpu_service:app", "--app-dir", folder, "--port", "{port}")
    with program(tmp_path, command=("env", "-C", str(tmp_path), *uvicorn)) as service:
        service.until_answers("/ready", 200)
        before, engine = numbers(service), engine_of(service.process.pid)
        kill(engine)
        says_that_it_is_down(service)
        is_back(service, 1)
        same_numbers(service, before)
        engine = engine_of(service.process.pid)
        service.stop()
        assert gone(engine)


@SLOW
def test_a_service_that_is_process_1_restarts_its_engine_and_stops(tmp_path: Path) -> None:
    alone = ("unshare", "--pid", "--fork", "--kill-child")
    if subprocess.run([*alone, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no new process namespace here")
    with program(tmp_path, command=(*alone, sys.executable, gpu_service.__file__)) as service:
        service.until_answers("/ready", 200)
        (first,) = children(service.process.pid)
        kill(engine_of(first))
        service.until_answers("/health", 503)
        service.until_answers("/ready", 200)
        assert [stat_of(child) for child in children(first)].count("Z") == 0
        engine = engine_of(first)
        kill(first, signal.SIGTERM)
        has_stopped(service, engine)


@SLOW
def test_an_engine_at_an_address_serves_dies_and_comes_back() -> None:
    with serving(settings(gpu_dtype="float32"), launch=launch_at_an_address) as service:
        before = answer(service, "/embed", {"texts": SHORT})
        dead = engine_of(os.getpid())
        kill(dead)
        with httpx.Client(base_url=service.url) as client:
            until(lambda: answers(client, "/health", 503))
            until(lambda: answers(client, "/ready", 200))
        again = answer(service, "/embed", {"texts": SHORT})
        np.testing.assert_allclose(again["embeddings"], before["embeddings"], atol=1e-6)
        engine = engine_of(os.getpid())
    assert (stat_of(dead), stat_of(engine)) == ("", "")


LAUNCHES = pytest.mark.parametrize("launch", [launch_process, launch_at_an_address])


def end_of(launch: Launch) -> str:
    """How a life that begins so ends."""

    async def live() -> str:
        loop = asyncio.get_running_loop()
        end: asyncio.Future[str] = loop.create_future()
        Life(loop, launch, lambda life, messages: None, lambda life, how: end.set_result(how))
        return await asyncio.wait_for(end, 60)

    return asyncio.run(live())


@LAUNCHES
@pytest.mark.parametrize(("interpreter", "said"), [("false", "ended with code 1"), ("missing", "could not be started")])
def test_an_engine_that_ends_at_once_is_reported(
    launch: Launch, interpreter: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "false"
    script.write_text("#!/bin/sh\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / interpreter))
    assert said in end_of(launch)


@LAUNCHES
def test_no_file_descriptor_and_no_zombie_is_left_of_ten_engines(launch: Launch) -> None:
    def killed_at_birth() -> Launched:
        before = set(children(os.getpid()))

        def strike() -> None:
            until(lambda: [kill(child) for child in children(os.getpid()) if child not in before])

        threading.Thread(target=strike).start()
        return launch()

    def one_life() -> str:
        return end_of(killed_at_birth)

    one_life()
    gc.collect()
    open_before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        assert "was killed by signal 9" in one_life()
    until(lambda: len(os.listdir("/proc/self/fd")) <= open_before, "file descriptors are left")
    assert [stat_of(child) for child in children(os.getpid())].count("Z") == 0


@LAUNCHES
def test_a_message_that_it_does_not_know_ends_the_engine_beside_a_download(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub client's threads are not daemons: an engine that ended in the ordinary way would wait for them."""
    files, hold = read_folder(tiny_models.save_bert(tmp_path / "tiny")), threading.Event()
    with fake_hub() as hub:
        hub.repositories["tiny/held"] = Repository(files, hold=hold)
        for name, value in {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}.items():
            monkeypatch.setenv(name, value)
        launched = launch()
        launched.connection.send([Configure("cpu", "float32", None, 0.0, 1, "INFO")])
        options = LoadOptions("float32", 512, None)
        launched.connection.send([Load(1, "embed", configured_model("tiny/held"), options, True, "-")])
        until_held(hub)
        launched.connection.send(["nonsense"])
        ended = threading.Thread(target=launched.wait, daemon=True)
        ended.start()
        try:
            ended.join(SOON_S)
            assert not ended.is_alive(), "it waits for the download"
        finally:
            launched.kill()
            launched.connection.close()
            hold.set()

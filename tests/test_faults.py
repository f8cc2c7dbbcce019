"""Faults of what lies around the service: the hub, the disk, a model's own numbers, and callers' sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny_models
import torch
from conftest import FakeEngine, FakeLoader, load_folder, running, settings
from fake_hub import FakeHub, Repository, fake_hub, read_folder
from live import LiveService, serving
from test_end_to_end import free_port

import gpu_service
from gpu_engine.model_files import ModelName, files_to_download, has_model_files, is_whole_pipeline
from gpu_engine.work import EmbedTask, Progress

resource = pytest.importorskip("resource", reason="POSIX resource limits stand for a full disk")

LARGEST_FILE = 3 << 20  # what the program's disk takes of one file
VECTORS_OF = ["the cat sat on the mat", "hello world"]


def until(condition: Callable[[], Any], what: str = "the condition never held") -> Any:
    """The first true value of `condition`; fails after a minute and a half."""
    deadline = time.monotonic() + 90
    while not (value := condition()):
        assert time.monotonic() < deadline, what
        threading.Event().wait(0.01)
    return value


# --- the hub -------------------------------------------------------------------------------------------


def fill_disk_early() -> None:
    """In the program's process, before it starts: no file grows beyond the limit, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))


@contextlib.contextmanager
def program(hub_url: str, home: Path, **environment: str) -> Iterator[httpx.Client]:
    """`python gpu_service.py` with this hub and hub cache, ready with the models it brings along."""
    port = free_port()
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": hub_url,
        "HF_HOME": str(home),
        "HF_HUB_DOWNLOAD_TIMEOUT": "1",
        "MODEL_BERTSCORE": "all-MiniLM-L6-v2",
        "HOST": "127.0.0.1",
        "PORT": str(port),
        "TORCH_DEVICE": "cpu",
        "GPU_DTYPE": "float32",
        "GPU_QUEUE_TIMEOUT": "60",
        "GPU_MAX_MODELS": "20",
        **environment,
    }
    with (home.parent / f"log-{port}").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, gpu_service.__file__], env=env, stdout=log, stderr=log, preexec_fn=fill_disk_early
        )
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:

                def ready() -> bool:
                    assert process.poll() is None, "the service ended"
                    with contextlib.suppress(httpx.ConnectError):
                        return client.get("/ready").status_code == 200
                    return False

                until(ready)
                yield client
                process.send_signal(signal.SIGTERM)
                assert process.wait(30) in (0, -signal.SIGTERM)
        finally:
            process.kill()
            process.wait()


def embed(client: httpx.Client, model: str) -> httpx.Response:
    return client.post("/embed", json={"texts": VECTORS_OF, "model": model})


def unavailable(response: httpx.Response, *words: str) -> None:
    """Checks that a download failed: 503, when to retry, the reason and the way out."""
    assert response.status_code == 503, response.text
    assert int(response.headers["Retry-After"]) >= 1
    explained(response, "hf download", *words)


def out_of_reach(response: httpx.Response, *words: str) -> None:
    """Checks that the hub could not be asked for a model that a request named: 404, the reason, what is here."""
    assert response.status_code == 404, response.text
    assert "Retry-After" not in response.headers, "clients would wait for what does not come"
    explained(response, "is not on this machine", "Loaded: ", "see /v1/models", *words)


def explained(response: httpx.Response, *words: str) -> None:
    body = response.json()
    assert body["code"] == "model_unavailable"
    for expected in words:
        assert expected in body["detail"]
    assert "127.0.0.1" not in body["detail"], "the hub's address is nobody's business"


@dataclass
class Hubs:
    """A hub, a program that uses it, and the folder of the program's hub cache."""

    hub: FakeHub
    client: httpx.Client
    home: Path


@pytest.fixture(scope="module")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return read_folder(tiny_models.save_bert(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="module")
def hubs(tmp_path_factory: pytest.TempPathFactory, model_files: dict[str, bytes]) -> Iterator[Hubs]:
    """One program for all faults of a hub that can be reached: each has a repository of its own."""
    home = tmp_path_factory.mktemp("hub") / "home"
    home.mkdir()
    with fake_hub() as hub:
        extras = {"modeling_evil.py": b"raise SystemExit", "pytorch_model.bin": b"pickle", "README.md": b"#"}
        extras |= {".gitattributes": b"", "onnx/model.onnx": b"", "tf_model.h5": b"", "openvino/model.xml": b""}
        hub.repositories["tiny/good"] = Repository({**model_files, **extras}, hold=threading.Event())
        hub.repositories["tiny/cut"] = Repository(model_files, cut={"model.safetensors"})
        settings_cut = {**model_files, "modules.json": b"[" + b" " * 100 + b"]"}
        hub.repositories["tiny/cut-settings"] = Repository(settings_cut, cut={"modules.json"})
        hub.repositories["tiny/huge"] = Repository({**model_files, "model.safetensors": b"\0" * (LARGEST_FILE + 1)})
        hub.failing |= {"tiny/broken": 500, "tiny/forbidden": 403}
        with program(hub.url, home) as client:
            yield Hubs(hub, client, home)


@pytest.mark.slow
def test_a_download_shows_its_progress_fetches_no_code_and_serves_the_others_meanwhile(hubs: Hubs) -> None:
    hold = hubs.hub.repositories["tiny/good"].hold
    assert hold is not None
    with ThreadPoolExecutor() as callers:
        asking = callers.submit(embed, hubs.client, "tiny/good")
        try:

            def shown() -> dict[str, Any] | None:
                loading = hubs.client.get("/status").json()["loading_models"]
                return next((entry for entry in loading if 0 < entry.get("progress", 0) < 1), None)

            entry = until(shown)
            assert (entry["model"], entry["state"], entry["phase"]) == ("tiny/good", "loading", "downloading")
            assert embed(hubs.client, "all-MiniLM-L6-v2").status_code == 200
        finally:
            hold.set()
        answer = asking.result()
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["embeddings"]) == len(VECTORS_OF)
    fetched = {name for name in hubs.hub.fetched if name.startswith("tiny/good/")}
    expected = {"config.json", "model.safetensors", "tokenizer_config.json", "vocab.txt"}
    assert fetched == {f"tiny/good/{name}" for name in expected}


@pytest.mark.slow
def test_a_downloaded_model_is_found_at_the_next_start_with_the_network_cut(hubs: Hubs) -> None:
    hold = hubs.hub.repositories["tiny/good"].hold
    assert hold is not None
    hold.set()
    answer = embed(hubs.client, "tiny/good").json()
    nobody = f"http://127.0.0.1:{free_port()}"
    with program(nobody, hubs.home, MODEL_EMBED="tiny/good") as client:  # ready: the default was loaded
        again = client.post("/embed", json={"texts": VECTORS_OF}).json()
        assert again["model"] == "tiny/good"
        for first, second in zip(answer["embeddings"], again["embeddings"]):
            assert second == pytest.approx(first, abs=1e-5)

        # A hub that can't be connected to, and half a download that isn't taken for a model.
        out_of_reach(embed(client, "tiny/absent"), "tiny/absent", "ConnectError")
        unavailable(embed(hubs.client, "tiny/cut-settings"), "RemoteProtocolError")
        out_of_reach(embed(client, "tiny/cut-settings"), "ConnectError")
        assert client.get("/health").status_code == 200


@pytest.mark.slow
def test_a_hub_that_never_answers_is_given_up_and_holds_nobody_else(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    with fake_hub() as hub, program(hub.url, home) as client:
        hub.silent.add("tiny/silent")
        with ThreadPoolExecutor() as callers:
            asking = callers.submit(embed, client, "tiny/silent")
            until(lambda: any("tiny/silent" in path for path in hub.asked))
            assert embed(client, "all-MiniLM-L6-v2").status_code == 200
            assert client.get("/ready").status_code == 200
            assert not asking.done()
            out_of_reach(asking.result(), "ReadTimeout", "tiny/silent")
        asked = len(hub.asked)
        out_of_reach(embed(client, "tiny/another"), "ReadTimeout", "tiny/another")
        assert len(hub.asked) == asked, "a hub that did not answer a moment ago is not asked again"


@pytest.mark.slow
def test_a_download_cut_off_half_way_is_503_and_not_taken_for_a_model(hubs: Hubs) -> None:
    unavailable(embed(hubs.client, "tiny/cut"), "RemoteProtocolError")
    fetched = len(hubs.hub.fetched)
    unavailable(embed(hubs.client, "tiny/cut"))
    assert len(hubs.hub.fetched) == fetched, "a failed download is remembered, not repeated at once"
    assert embed(hubs.client, "all-MiniLM-L6-v2").status_code == 200


@pytest.mark.slow
def test_a_full_disk_is_503_and_says_so(hubs: Hubs) -> None:
    unavailable(embed(hubs.client, "tiny/huge"), "the disk of the model cache is full")
    assert embed(hubs.client, "all-MiniLM-L6-v2").status_code == 200


@pytest.mark.slow
@pytest.mark.parametrize("repository", ["tiny/broken", "tiny/forbidden"])
def test_a_hub_that_refuses_is_503(hubs: Hubs, repository: str) -> None:
    unavailable(embed(hubs.client, repository), "HfHubHTTPError")


@pytest.mark.slow
def test_a_model_that_the_hub_does_not_have_is_404(hubs: Hubs) -> None:
    response = embed(hubs.client, "tiny/nobody-made-this")
    assert (response.status_code, response.json()["code"]) == (404, "model_not_found")


# --- a model's own numbers -----------------------------------------------------------------------------


def tiny_bert(folder: Path, change: Callable[[Any], None]) -> Path:
    """A small BERT with changed weights, saved."""
    from transformers import BertModel

    module = BertModel.from_pretrained(tiny_models.save_bert(folder))
    with torch.no_grad():
        change(module)
    module.save_pretrained(folder)
    return folder


def on_demand(folder: Path) -> gpu_service.Loader:
    """Fakes for the defaults, the real loading code for `tiny/model`."""

    def load(kind: str, name: ModelName, progress: Progress) -> Any:
        if name.public != "tiny/model":
            return FakeEngine(kind)
        return load_folder(kind, folder, name, dtype="auto")

    return load


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), 0.0])
def test_a_model_whose_outputs_are_all_useless_gives_no_answer(tmp_path: Path, weight: float) -> None:
    def spoil(module: Any) -> None:
        module.encoder.layer[-1].output.LayerNorm.weight.fill_(weight)
        module.encoder.layer[-1].output.LayerNorm.bias.fill_(0.0)

    scored = {"candidates": ["hello"], "references": ["hello"], "num_layers": 4}
    with serving(settings(gpu_queue_timeout=60), on_demand(tiny_bert(tmp_path / "model", spoil))) as service:
        for path, body, code in (
            ("/embed", {"texts": ["hello"]}, "model_unsupported"),  # found when it is loaded
            ("/embed", {"texts": ["hello"], "normalize": False}, "model_unsupported"),
            ("/bertscore", scored, "not_finite"),
        ):
            response = httpx.post(f"{service.url}{path}", json={**body, "model": "tiny/model"}, timeout=30)
            assert (response.status_code, response.json().get("code")) == (422, code), response.text
        assert httpx.get(f"{service.url}/health").status_code == 200
        assert httpx.post(f"{service.url}/embed", json={"texts": ["fine"]}).status_code == 200


def test_an_encoder_without_a_classifier_is_not_used_as_a_reranker_with_random_weights() -> None:
    with serving(settings()) as service:
        body = {"query": "a", "documents": ["b"], "model": "all-MiniLM-L6-v2", "method": "cross-encoder"}
        response = httpx.post(f"{service.url}/v1/rerank", json=body, timeout=60)
        assert (response.status_code, response.json()["error"]["code"]) == (400, "not_a_reranker"), response.text


def test_a_word_that_breaks_the_numbers_is_refused_and_harms_no_other_text(tmp_path: Path) -> None:
    def spoil(module: Any) -> None:
        from transformers import AutoTokenizer

        token = AutoTokenizer.from_pretrained(tmp_path / "model").convert_tokens_to_ids("moon")
        module.embeddings.word_embeddings.weight[token].fill_(float("nan"))

    with serving(settings(gpu_queue_timeout=60), on_demand(tiny_bert(tmp_path / "model", spoil))) as service:

        def ask(*texts: str) -> httpx.Response:
            body = {"texts": texts, "model": "tiny/model"}
            return httpx.post(f"{service.url}/embed", json=body, timeout=30)

        good = ["the sun", "the cat sat on the mat", "a tree"]
        alone = [ask(text).json()["embeddings"][0] for text in good]
        with ThreadPoolExecutor() as callers:
            bad, fine = callers.submit(ask, "the moon", *good), callers.submit(ask, *good)
        assert (bad.result().status_code, bad.result().json()["code"]) == (422, "not_finite")
        for first, second in zip(alone, fine.result().json()["embeddings"]):
            assert second == pytest.approx(first, abs=1e-5)
        assert ask("the moon").status_code == 422, "what is not finite is not kept"
        scored = {"candidates": ["the moon"], "references": ["the sun"], "model": "tiny/model"}
        assert httpx.post(f"{service.url}/bertscore", json=scored, timeout=30).json()["code"] == "not_finite"


# --- a device that hangs or tells nothing --------------------------------------------------------------


@pytest.mark.anyio
async def test_a_batch_that_never_ends_is_found_and_only_a_restart_is_said_to_help() -> None:
    loader = FakeLoader()
    config = settings(gpu_request_timeout=0.05, gpu_max_batch_size=1, gpu_exit_on_fatal=False)
    runtime = gpu_service.Runtime(config, loader, hang_s=0.0)
    await runtime.start()

    async def ask(items: int) -> Any:
        return await runtime.run(None, EmbedTask([f"text {number}" for number in range(items)]))

    try:
        await ask(1)
        await asyncio.sleep(5 * runtime.hang_s)
        assert gpu_service.view_health(runtime)[0] == 200, "a device that does nothing does not hang"
        engine = loader.engines["embed:all-MiniLM-L6-v2"]
        engine.hold.clear()
        with pytest.raises(gpu_service.ServiceError) as caught:
            await ask(1000)  # may take 50 s
        assert caught.value.code == "device_broken"
        status, body = gpu_service.view_health(runtime)
        assert (status, body["status"]) == (503, "error")
        assert re.fullmatch(r"a batch has run for \d+ s", body["detail"])
    finally:
        engine.hold.set()
        await runtime.stop()


def test_only_a_batch_of_minutes_is_taken_for_one_that_never_ends() -> None:
    assert gpu_service.Runtime(settings(gpu_request_timeout=1)).hang_s == 300
    assert gpu_service.Runtime(settings(gpu_request_timeout=100)).hang_s == 500


@pytest.mark.anyio
@pytest.mark.parametrize("hangs", [False, True])
async def test_info_answers_without_vram_when_the_driver_does_not(hangs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()

    def no_answer(device: torch.device) -> tuple[int, int]:
        if hangs:
            go.wait(10)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "mem_get_info", no_answer)
    async with running(settings()) as service:
        service.runtime.device = torch.device("cuda")
        began = time.monotonic()
        asking = asyncio.create_task(service.client.get("/info"))
        await asyncio.sleep(0.05)
        assert (await service.client.get("/health")).status_code == 200
        assert time.monotonic() - began < 0.9, "the event loop was held"
        response = await asking
        assert time.monotonic() - began < 5
        go.set()
        assert response.status_code == 200
        assert not [name for name in response.json() if name.startswith("vram_")]


# --- callers who hang up, on real sockets --------------------------------------------------------------


def request_bytes(path: str, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: service\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    return head.encode() + b"\r\n\r\n" + data


def caller(service: LiveService, path: str, body: dict[str, Any], receive_buffer: int | None = None) -> socket.socket:
    """A caller who has sent a request and reads nothing yet."""
    sock = socket.socket()
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.connect(("127.0.0.1", httpx.URL(service.url).port))
    sock.sendall(request_bytes(path, body))
    return sock


def idle(service: LiveService) -> bool:
    """Whether no slot, no place in the queue and no job is taken."""
    guard, jobs = service.runtime.admission, service.runtime.jobs
    return not guard.in_flight and not guard.waiting and not jobs.active


@pytest.fixture
def fakes() -> Iterator[tuple[LiveService, FakeEngine]]:
    loader = FakeLoader()
    with serving(settings(gpu_max_concurrent=1, gpu_batch_tokens=16, gpu_queue_timeout=60), loader) as service:
        engine = loader.engines["embed:all-MiniLM-L6-v2"]
        try:
            yield service, engine
        finally:
            engine.hold.set()


def test_a_caller_who_hangs_up_while_running_frees_the_slot_and_drops_the_rest(
    fakes: tuple[LiveService, FakeEngine],
) -> None:
    service, engine = fakes
    engine.hold.clear()
    leaving = caller(service, "/embed", {"texts": [f"text number {n}" for n in range(50)]})
    until(lambda: engine.begun == 1)
    leaving.close()
    until(lambda: idle(service))
    engine.hold.set()
    assert httpx.post(f"{service.url}/embed", json={"texts": ["next"]}).status_code == 200
    assert len(engine.batches) == 2


def test_a_caller_who_hangs_up_while_waiting_frees_the_place_and_is_never_computed(
    fakes: tuple[LiveService, FakeEngine],
) -> None:
    service, engine = fakes
    engine.hold.clear()
    staying = caller(service, "/embed", {"texts": ["first"]})
    until(lambda: engine.begun == 1)
    leaving = caller(service, "/embed", {"texts": ["second"]})
    until(lambda: service.runtime.admission.waiting == 1)
    leaving.close()
    until(lambda: service.runtime.admission.waiting == 0)
    engine.hold.set()
    assert b" 200 " in staying.recv(1000)
    staying.close()
    assert engine.texts_run == ["first"]
    until(lambda: idle(service))


def test_a_caller_who_hangs_up_while_the_model_loads_leaves_the_load_to_the_next() -> None:
    loader = FakeLoader()
    with serving(settings(gpu_queue_timeout=60), loader) as service:
        loader.hold.clear()
        leaving = caller(service, "/embed", {"texts": ["a"], "model": "some/model"})
        until(lambda: len(service.runtime.jobs.active) == 1)
        leaving.close()
        until(lambda: idle(service))
        loader.hold.set()
        answer = httpx.post(f"{service.url}/embed", json={"texts": ["a"], "model": "some/model"})
        assert answer.status_code == 200
        assert loader.loads.count("embed:some/model") == 1


def test_a_caller_who_hangs_up_while_reading_a_large_answer_does_no_harm(caplog: pytest.LogCaptureFixture) -> None:
    with serving(settings(gpu_max_concurrent=1, gpu_max_batch_size=2000)) as service:
        texts = [f"text {n % 50}" for n in range(2000)]  # an answer of megabytes, more than sockets buffer
        for _ in range(3):
            reader = caller(service, "/embed", {"texts": texts}, receive_buffer=4096)
            assert reader.recv(15) == b"HTTP/1.1 200 OK"
            assert idle(service), "an answer that is being read holds no slot"
            reader.close()
        assert httpx.post(f"{service.url}/embed", json={"texts": ["next"]}, timeout=30).status_code == 200
        until(lambda: idle(service))
    assert not [record for record in caplog.records if record.exc_info]


# --- what is fetched -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("there", "wanted"),
    [
        (["config.json", "model.safetensors", "pytorch_model.bin"], ["config.json", "model.safetensors"]),
        (["pytorch_model.bin", "training_args.bin", "tf_model.h5"], ["pytorch_model.bin"]),
        (["pytorch_model-00001-of-2.bin", "pytorch_model.bin.index.json"], None),
        (["model.safetensors", "2_Dense/pytorch_model.bin", "2_Dense/config.json"], None),
        (["1_Pooling/config.json", "onnx/model.onnx", "modeling_x.py"], ["1_Pooling/config.json"]),
    ],
)
def test_one_set_of_weights_for_each_part_of_a_model_is_fetched(there: list[str], wanted: list[str] | None) -> None:
    assert files_to_download(there) == (there if wanted is None else wanted)


def test_a_cached_pipeline_without_the_weights_of_its_dense_layer_is_not_whole(tmp_path: Path) -> None:
    modules = [{"path": "", "type": "m.Transformer"}, {"path": "2_Dense", "type": "m.Dense"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "2_Dense").mkdir()
    (tmp_path / "2_Dense" / "config.json").write_text("{}")
    assert not is_whole_pipeline(tmp_path)
    (tmp_path / "2_Dense" / "pytorch_model.bin").touch()
    assert is_whole_pipeline(tmp_path)


@pytest.mark.parametrize("tokenizer", ["ByT5Tokenizer", "BertTokenizer"])
def test_a_tokenizer_of_bytes_needs_no_file_of_its_own(tokenizer: str, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).touch()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": tokenizer}))
    assert has_model_files(tmp_path) is (tokenizer == "ByT5Tokenizer")

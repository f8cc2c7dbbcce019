"""Faults of the hub and of the disk, and which files of a model are fetched."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny_models
from fake_hub import FakeHub, Repository, fake_hub, read_folder
from live import free_port, program, until

from gpu_engine.model_files import files_to_download, has_model_files, is_whole_pipeline

resource = pytest.importorskip("resource", reason="POSIX resource limits stand for a full disk")

LARGEST_FILE = 3 << 20  # what the program's disk takes of one file
VECTORS_OF = ["the cat sat on the mat", "hello world"]


def fill_disk_early() -> None:
    """In the program's process, before it starts: no file grows beyond the limit, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))


@contextlib.contextmanager
def with_hub(hub_url: str, home: Path, **environment: str) -> Iterator[httpx.Client]:
    """The service with this hub and hub cache on a small disk, ready with the models it brings along."""
    env = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub_url, "HF_HOME": str(home), "HF_HUB_DOWNLOAD_TIMEOUT": "1"}
    env |= {"GPU_QUEUE_TIMEOUT": "60", "GPU_MAX_MODELS": "20", **environment}
    with program(home.parent, preexec_fn=fill_disk_early, **env) as service:
        service.until_answers("/ready", 200)
        yield service.client
        service.stop()


def embed(client: httpx.Client, model: str) -> httpx.Response:
    return client.post("/embed", json={"texts": VECTORS_OF, "model": model})


def unavailable(response: httpx.Response, *words: str) -> None:
    """Checks that a download failed: 503, when to retry, the reason and the way out."""
    assert response.status_code == 503, response.text
    assert int(response.headers["Retry-After"]) >= 1
    explained(response, "gpu-service download", *words)


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
        with with_hub(hub.url, home) as client:
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
    with with_hub(nobody, hubs.home, MODEL_EMBED="tiny/good") as client:  # ready: the default was loaded
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
    with fake_hub() as hub, with_hub(hub.url, home) as client:
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
@pytest.mark.parametrize(
    ("repository", "words"), [("tiny/broken", "HfHubHTTPError"), ("tiny/forbidden", "with 403: is HF_TOKEN right?")]
)
def test_a_hub_that_refuses_is_503(hubs: Hubs, repository: str, words: str) -> None:
    unavailable(embed(hubs.client, repository), words)


@pytest.mark.slow
def test_a_model_that_the_hub_does_not_have_is_404(hubs: Hubs) -> None:
    response = embed(hubs.client, "tiny/nobody-made-this")
    assert (response.status_code, response.json()["code"]) == (404, "model_not_found")


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

"""What each endpoint answers: fields, types, states, names of models, order."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from typing import Any

import pytest
import torch
from conftest import FakeLoader, Service, raising, running, settings, value_of

from gpu_engine.work import BertScoreTask, EmbedTask

pytestmark = pytest.mark.anyio

NAME = "all-MiniLM-L6-v2"


async def ask(service: Service, kind: str, *texts: str) -> Any:
    return await (service.embed(*texts) if kind == "embed" else service.bertscore(*texts))


# --- /health, /ready -----------------------------------------------------------------------------------


async def test_health_names_the_device() -> None:
    async with running(settings()) as service:
        response = await service.client.get("/health")
        assert (response.status_code, response.json()) == (200, {"status": "ok", "device": "cpu"})


async def test_health_is_ok_while_the_models_load() -> None:
    loader = FakeLoader()
    loader.hold.clear()
    async with running(settings(), loader, wait=False) as service:
        assert (await service.client.get("/health")).status_code == 200


async def test_health_does_not_wait_for_a_batch_on_the_device() -> None:
    async with running(settings()) as service:
        engine = service.embed_engine
        engine.hold.clear()
        asking = asyncio.create_task(service.embed("a"))
        await service.until(lambda: engine.begun == 1)
        assert (await service.client.get("/health")).status_code == 200
        assert not asking.done()
        engine.hold.set()
        assert (await asking).status_code == 200


async def test_ready_shows_a_loading_model_with_its_progress() -> None:
    loader = FakeLoader()
    loader.hold.clear()
    async with running(settings(), loader, wait=False) as service:
        await service.until(lambda: bool(loader.loads))
        response = await service.client.get("/ready")
        assert response.status_code == 503
        models = response.json()["models"]
        assert set(models) == {f"embed:{NAME}", f"bertscore:{NAME}"}
        assert models[f"embed:{NAME}"]["state"] == "loading"
        assert models[f"embed:{NAME}"]["progress"] == 0.5
        assert models[f"bertscore:{NAME}"]["state"] == "loading"
        assert [m["type"] for m in (await service.status())["loading_models"]] == ["embed", "bertscore"]
        loader.hold.set()
        await service.until(lambda: all(e.state == "ready" for e in service.runtime.models.entries()))
        assert (await service.client.get("/ready")).status_code == 200


async def test_ready_shows_a_failed_model_with_its_reason() -> None:
    loader = FakeLoader()
    loader.error = MemoryError()
    async with running(settings(), loader) as service:
        response = await service.client.get("/ready")
        assert response.status_code == 503
        for shown in response.json()["models"].values():
            assert shown["state"] == "failed"
            assert "does not fit" in shown["reason"]


async def test_ready_is_200_when_both_defaults_can_answer() -> None:
    async with running(settings()) as service:
        response = await service.client.get("/ready")
        assert response.status_code == 200
        assert response.json()["status"] == "ready"
        assert {shown["state"] for shown in response.json()["models"].values()} == {"ready"}


# --- /info ---------------------------------------------------------------------------------------------


async def test_info_has_every_field_with_its_type() -> None:
    async with running(settings(gpu_max_batch_size=7)) as service:
        info = (await service.client.get("/info")).json()
    assert info["device"] == "cpu"
    for name in ("device_name", "pytorch_version", "version"):
        assert isinstance(info[name], str), name
        assert info[name], name
    for name in ("cuda_version", "rocm_version"):
        assert info[name] is None or isinstance(info[name], str), name
    assert sorted(info["loaded_models"]) == [f"bertscore:{NAME}", f"embed:{NAME}"]
    assert info["limits"]["max_batch_size"] == 7
    for model in info["models"]:
        assert model["id"] in info["loaded_models"]
        assert model["dtype"] == "float32"
        assert model["layers"] == 1
        assert isinstance(model["idle_seconds"], float)


async def test_info_leaves_video_memory_out_on_a_cpu() -> None:
    async with running(settings()) as service:
        info = (await service.client.get("/info")).json()
    assert not [name for name in info if name.startswith("vram")]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
async def test_info_gives_video_memory_as_numbers_on_a_gpu() -> None:
    async with running(settings(torch_device="cuda")) as service:
        info = (await service.client.get("/info")).json()
    assert info["vram_total_mb"] >= info["vram_used_mb"] >= info["vram_allocated_mb"] >= 0


async def test_info_shows_every_limit_in_force() -> None:
    config = settings(
        gpu_max_concurrent=3,
        gpu_max_queue=5,
        gpu_queue_timeout=1.5,
        gpu_request_timeout=9.0,
        gpu_max_text_length=77,
        gpu_max_models=6,
        gpu_batch_tokens=99,
        bertscore_max_tokens=33,
        gpu_cache_mb=2.0,
        gpu_max_body_mb=3.0,
    )
    async with running(config) as service:
        limits = (await service.client.get("/info")).json()["limits"]
    expected = {
        "max_concurrent": 3,
        "max_queue": 5,
        "queue_timeout_seconds": 1.5,
        "request_timeout_seconds": 9.0,
        "max_text_length": 77,
        "max_models": 6,
        "batch_tokens": 99,
        "bertscore_max_tokens": 33,
        "cache_mb": 2.0,
        "max_body_mb": 3.0,
    }
    assert expected.items() <= limits.items()


# --- /status -------------------------------------------------------------------------------------------


async def test_status_of_an_idle_service_shows_free_slots_and_no_jobs() -> None:
    async with running(settings(gpu_max_concurrent=3)) as service:
        status = await service.status()
    queue = {"max_concurrent": 3, "in_flight": 0, "available_slots": 3, "waiting_estimate": 0}
    assert status["queue"] == queue
    assert status["active_jobs"] == status["recent_jobs"] == []


async def test_status_shows_running_and_waiting_jobs() -> None:
    async with running(settings(gpu_max_concurrent=1)) as service:
        service.embed_engine.hold.clear()
        first = asyncio.create_task(service.embed("a", "b"))
        await service.until(lambda: service.embed_engine.begun == 1)
        second = asyncio.create_task(service.bertscore("c"))
        await service.until(lambda: service.runtime.admission.waiting == 1)
        status = await service.status()
        queue = {"max_concurrent": 1, "in_flight": 1, "available_slots": 0, "waiting_estimate": 1}
        assert status["queue"] == queue
        shown = [(j["type"], j["state"], j["items"], j["model"]) for j in status["active_jobs"]]
        assert shown == [("embed", "running", 2, NAME), ("bertscore", "waiting", 1, NAME)]
        for job in status["active_jobs"]:
            assert datetime.fromisoformat(job["started_at"]).utcoffset() == timedelta(0)
            assert job["progress"] == 0.0
            assert job["eta_seconds"] is None
        assert len({job["id"] for job in status["active_jobs"]}) == 2
        service.embed_engine.hold.set()
        assert [(await first).status_code, (await second).status_code] == [200, 200]
        assert (await service.status())["queue"]["in_flight"] == 0


async def test_status_shows_a_job_whose_model_loads() -> None:
    async with running(settings()) as service:
        service.loader.hold.clear()
        asking = asyncio.create_task(service.embed("a", model="BAAI/bge-small-en"))
        await service.until(lambda: "embed:BAAI/bge-small-en" in service.loader.loads)
        status = await service.status()
        assert [(j["state"], j["model"]) for j in status["active_jobs"]] == [("loading", "BAAI/bge-small-en")]
        (loading,) = status["loading_models"]
        assert (loading["model"], loading["state"], loading["progress"]) == ("BAAI/bge-small-en", "loading", 0.5)
        assert status["queue"]["waiting_estimate"] == 0
        service.loader.hold.set()
        assert (await asking).status_code == 200


@pytest.mark.parametrize("kind", ["embed", "bertscore"])
async def test_progress_moves_during_a_job(kind: str) -> None:
    async with running(settings(gpu_batch_tokens=16)) as service:
        engine = service.loader.engines[f"{kind}:{NAME}"]
        engine.hold.clear()
        asking = asyncio.create_task(ask(service, kind, *(f"text number {n:04}" for n in range(4))))
        for batches in (1, 2, 3):
            engine.hold.pass_through()
            await service.until(lambda: engine.begun == batches + 1)  # noqa: B023
            (job,) = (await service.status())["active_jobs"]
            assert job["progress"] == batches / 4
            assert job["eta_seconds"] >= 0
        engine.hold.set()
        assert (await asking).status_code == 200


async def test_recent_jobs_are_the_last_fifty_with_outcome_and_duration() -> None:
    async with running(settings()) as service:
        for number in range(52):
            assert (await service.embed(*["x"] * (number % 3), model=NAME)).status_code == 200
        service.embed_engine.fail = raising(ValueError("a bug"))
        await service.embed("unseen")
        recent = (await service.status())["recent_jobs"]
    assert len(recent) == 50
    assert [job["outcome"] for job in recent] == ["internal"] + ["done"] * 49
    assert [job["items"] for job in recent[:3]] == [1, 0, 2]  # the newest first
    assert all(job["duration_seconds"] >= 0 and job["type"] == "embed" for job in recent)


# --- models --------------------------------------------------------------------------------------------


async def test_a_request_without_a_model_uses_the_environments() -> None:
    config = settings(model_embed="BAAI/bge-small-en", model_bertscore="google-bert/bert-base-uncased")
    async with running(config) as service:
        assert (await service.embed("a")).json()["model"] == "BAAI/bge-small-en"
        assert (await service.bertscore("a")).json()["model"] == "google-bert/bert-base-uncased"
        assert service.loader.loads == ["embed:BAAI/bge-small-en", "bertscore:google-bert/bert-base-uncased"]


@pytest.mark.parametrize("name", [NAME, f"sentence-transformers/{NAME}"])
async def test_the_answers_model_is_the_name_asked_for(name: str) -> None:
    async with running(settings()) as service:
        assert (await service.embed("a", model=name)).json()["model"] == name
        assert (await service.bertscore("a", model_type=name)).json()["model"] == name
        assert (await service.bertscore("a", model=name)).json()["model"] == name
        assert sorted(service.loader.loads) == [f"bertscore:{NAME}", f"embed:{NAME}"]


async def test_the_short_and_the_long_hub_name_are_one_model_in_the_cache() -> None:
    async with running(settings()) as service:
        for name in ("all-mpnet-base-v2", "sentence-transformers/all-mpnet-base-v2", "all-mpnet-base-v2"):
            assert (await service.embed("a", model=name)).json()["model"] == name
        assert sum("mpnet" in load for load in service.loader.loads) == 1


# --- /embed, /bertscore --------------------------------------------------------------------------------


async def test_no_texts_give_no_embeddings() -> None:
    async with running(settings()) as service:
        response = await service.embed()
        assert response.status_code == 200
        assert response.json() == {"embeddings": [], "model": NAME, "dimensions": 0, "truncated": []}


async def test_no_pairs_give_no_scores() -> None:
    async with running(settings()) as service:
        answer = (await service.bertscore()).json()
        assert answer["precision"] == answer["recall"] == answer["f1"] == []


async def test_embeddings_come_in_input_order() -> None:
    texts = [word * length for length, word in ((7, "a"), (1, "b"), (30, "c"), (2, "d"), (12, "e"))]
    async with running(settings(gpu_batch_tokens=16)) as service:
        answer = (await service.embed(*texts)).json()
    assert answer["embeddings"] == [[value_of(text), 1.0] for text in texts]
    assert answer["dimensions"] == 2


async def test_scores_come_in_input_order() -> None:
    texts = ["ccc" * 9, "a", "bb" * 4]
    async with running(settings(gpu_batch_tokens=16)) as service:
        answer = (await service.bertscore(*texts)).json()
    assert answer["precision"] == answer["recall"] == answer["f1"] == [value_of(text) for text in texts]
    assert answer["hash"].startswith(f"{NAME}_L1_no-idf_version=")
    assert (answer["num_layers"], answer["truncated"], answer["warnings"]) == (1, [], [])


async def test_repeated_texts_of_a_request_are_computed_once() -> None:
    async with running(settings(gpu_cache_mb=0)) as service:
        answer = (await service.embed("twice", "once", "twice")).json()
        assert sorted(service.embed_engine.texts_run) == ["once", "twice"]
    assert answer["embeddings"][0] == answer["embeddings"][2] != answer["embeddings"][1]


async def test_options_of_embed_reach_the_engine() -> None:
    async with running(settings()) as service:
        await service.embed("a", normalize=False, prompt_name="query", dimensions=2)
        await service.embed("b")
        assert service.embed_engine.jobs == [EmbedTask(["a"], False, "query", 2), EmbedTask(["b"], None, None, None)]


async def test_options_of_bertscore_reach_the_engine() -> None:
    more = {"num_layers": 3, "idf": True, "rescale_with_baseline": True, "lang": "de"}
    async with running(settings()) as service:
        await service.bertscore("a", **more, references=[["x", "y"]])
        await service.bertscore("b")
        first, second = service.bertscore_engine.jobs
    assert first == BertScoreTask(["a"], [["x", "y"]], 3, True, True, "de")
    assert second == BertScoreTask(["b"], [["b"]], None, False, False, None)


async def test_the_openapi_description_names_every_endpoint_and_error() -> None:
    async with running(settings()) as service:
        paths = (await service.client.get("/openapi.json")).json()["paths"]
    assert set(paths) >= {"/health", "/ready", "/info", "/status", "/bertscore", "/embed"}
    for path in ("/bertscore", "/embed"):
        assert {"200", "400", "403", "404", "413", "422", "503", "504"} <= set(paths[path]["post"]["responses"])

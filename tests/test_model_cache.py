"""The model cache: one load per model, room by count and idle time, local directories by name only."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FakeEngine, FakeLoader, Service, in_worker, running, settings

import gpu_service
from gpu_engine.model_files import Hub, ModelName, find_model
from gpu_engine.work import EmbedTask, UnsupportedModel
from gpu_engine.worker import DeviceWorker
from gpu_service import SettingsError

pytestmark = pytest.mark.anyio

DEFAULTS = {"embed:all-MiniLM-L6-v2", "bertscore:all-MiniLM-L6-v2"}


async def loaded(service: Service) -> set[str]:
    return set((await service.client.get("/info")).json()["loaded_models"])


async def load(service: Service, *names: str) -> None:
    for name in names:
        response = await service.embed(f"for {name}", model=name)
        assert response.status_code == 200, response.text


# --- one load ------------------------------------------------------------------------------------------


async def test_a_model_is_loaded_once_however_many_ask_while_it_loads() -> None:
    async with running(settings(gpu_max_concurrent=4)) as service:
        service.loader.hold.clear()
        names = ["all-mpnet-base-v2", "sentence-transformers/all-mpnet-base-v2"] * 10
        asking = [asyncio.create_task(service.embed(f"text {n}", model=name)) for n, name in enumerate(names)]
        await service.until(lambda: len(service.runtime.jobs.active) == 20)
        service.loader.hold.set()
        assert {response.status_code for response in await asyncio.gather(*asking)} == {200}
        assert sum("mpnet" in load for load in service.loader.loads) == 1


async def test_requests_wait_for_a_default_that_loads_and_do_not_load_it_again() -> None:
    loader = FakeLoader()
    loader.hold.clear()
    async with running(settings(), loader, wait=False) as service:
        asking = [asyncio.create_task(service.embed("a")), asyncio.create_task(service.bertscore("a"))]
        await service.until(lambda: len(service.runtime.jobs.active) == 2)
        loader.hold.set()
        assert [(await task).status_code for task in asking] == [200, 200]
        assert len(loader.loads) == 2


async def test_a_failed_load_reaches_all_who_wait_for_it() -> None:
    async with running(settings()) as service:
        service.loader.hold.clear()
        service.loader.error = RuntimeError("no")
        asking = [asyncio.create_task(service.embed("a", model="some/model")) for _ in range(10)]
        await service.until(lambda: len(service.runtime.jobs.active) == 10)
        service.loader.hold.set()
        assert {(await task).json()["code"] for task in asking} == {"model_failed"}
        assert service.loader.loads.count("embed:some/model") == 1


async def test_no_more_than_the_queue_may_wait_for_a_model() -> None:
    async with running(settings(gpu_max_queue=2, gpu_queue_timeout=3600)) as service:
        service.loader.hold.clear()
        asking = [asyncio.create_task(service.embed("a", model="some/model")) for _ in range(2)]
        await service.until(lambda: len(service.runtime.jobs.active) == 2)
        refused = await service.embed("a", model="some/model")
        assert (refused.status_code, refused.json()["code"]) == (503, "model_loading")
        assert (await service.embed("the defaults still answer")).status_code == 200
        service.loader.hold.set()
        assert [(await task).status_code for task in asking] == [200, 200]


async def test_the_same_name_for_both_kinds_is_two_models() -> None:
    async with running(settings()) as service:
        await service.embed("a", model="some/model")
        await service.bertscore("a", model="some/model")
        assert await loaded(service) == {*DEFAULTS, "embed:some/model", "bertscore:some/model"}


# --- room ----------------------------------------------------------------------------------------------


async def test_the_least_recently_used_on_demand_model_goes_first_and_the_defaults_stay() -> None:
    async with running(settings(gpu_max_models=4)) as service:
        await load(service, "on/a", "on/b", "on/a", "on/c")
        assert await loaded(service) == {*DEFAULTS, "embed:on/a", "embed:on/c"}
        await load(service, "on/b")
        assert await loaded(service) == {*DEFAULTS, "embed:on/b", "embed:on/c"}
        assert service.loader.loads.count("embed:on/b") == 2


async def test_a_model_in_use_is_never_dropped() -> None:
    async with running(settings(gpu_max_models=3, gpu_max_concurrent=4)) as service:
        await load(service, "on/a")
        engine = service.loader.engines["embed:on/a"]
        engine.hold.clear()
        using = asyncio.create_task(service.embed("long work", model="on/a"))
        await service.until(lambda: engine.begun == 2)
        refused = await service.embed("a", model="on/b")
        assert (refused.status_code, refused.json()["code"]) == (503, "too_many_models")
        assert "GPU_MAX_MODELS" in refused.json()["detail"]
        assert int(refused.headers["Retry-After"]) >= 1
        engine.hold.set()
        assert (await using).status_code == 200
        await load(service, "on/b")
        assert await loaded(service) == {*DEFAULTS, "embed:on/b"}


async def test_a_model_that_loads_takes_its_place_in_the_count() -> None:
    async with running(settings(gpu_max_models=3)) as service:
        service.loader.hold.clear()
        asking = asyncio.create_task(service.embed("a", model="on/a"))
        await service.until(lambda: "embed:on/a" in service.loader.loads)
        assert (await service.embed("a", model="on/b")).json()["code"] == "too_many_models"
        service.loader.hold.set()
        assert (await asking).status_code == 200


async def test_a_failed_load_takes_no_place() -> None:
    async with running(settings(gpu_max_models=3)) as service:
        service.loader.error = RuntimeError("no")
        for name in ("on/a", "on/b", "on/c"):
            assert (await service.embed("a", model=name)).json()["code"] == "model_failed"
        service.loader.error = None
        await load(service, "on/d")


async def test_with_room_for_the_defaults_only_nothing_else_is_loaded() -> None:
    async with running(settings(gpu_max_models=1)) as service:
        assert (await service.embed("a", model="on/a")).json()["code"] == "too_many_models"
        assert await loaded(service) == DEFAULTS
        await load(service, "all-MiniLM-L6-v2")


async def test_a_model_idle_for_longer_than_its_time_is_unloaded_and_the_defaults_stay() -> None:
    async with running(settings(gpu_model_ttl=0.05)) as service:
        await load(service, "on/a")
        await service.until(lambda: "on/a" not in {e.name.public for e in service.runtime.models.entries()})
        assert await loaded(service) == DEFAULTS
        await load(service, "on/a")
        assert service.loader.loads.count("embed:on/a") == 2


async def test_sweeping_keeps_what_is_in_use_and_what_was_used_a_moment_ago() -> None:
    async with running(settings(gpu_max_concurrent=4)) as service:
        await load(service, "on/used", "on/recent")
        engine = service.loader.engines["embed:on/used"]
        engine.hold.clear()
        using = asyncio.create_task(service.embed("long work", model="on/used"))
        await service.until(lambda: engine.begun == 2)
        service.runtime.models.drop_idle(3600)
        assert await loaded(service) == {*DEFAULTS, "embed:on/used", "embed:on/recent"}
        service.runtime.models.drop_idle(0)
        assert await loaded(service) == {*DEFAULTS, "embed:on/used"}
        engine.hold.set()
        assert (await using).status_code == 200


async def test_an_unloaded_model_leaves_nothing_in_the_cache_of_outputs() -> None:
    async with running(settings()) as service:
        await load(service, "on/a")
        engine = service.loader.engines["embed:on/a"]
        service.runtime.models.drop_idle(0)
        await load(service, "on/a")  # the fake loader gives the same engine again
        assert service.loader.engines["embed:on/a"] is engine
        assert engine.texts_run == ["for on/a", "for on/a"]


class Tied(FakeEngine):
    """An engine that only the garbage collector can free."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.itself = self


async def test_an_unloaded_model_is_freed_although_the_collector_is_told_to_spare_models() -> None:
    loader = FakeLoader()
    loader.engines["embed:org/one"] = Tied("embed")
    async with running(settings(gpu_max_models=3), loader) as service:
        assert (await service.embed("x", model="org/one")).status_code == 200
        gc.freeze()  # as after a load that makes real models
        freed = weakref.ref(loader.engines.pop("embed:org/one"))
        assert (await service.embed("x", model="org/two")).status_code == 200
        await service.until(lambda: freed() is None)


def test_an_unloaded_model_is_freed_although_its_last_request_has_only_just_ended() -> None:
    worker = DeviceWorker(torch.device("cpu"), 1024, 0, lambda detail: None, lambda: None)
    engine, other = Tied("embed"), FakeEngine("embed")
    in_worker(worker, engine, EmbedTask(["x"]))[0].cancel()
    worker.unload(engine)
    freed = weakref.ref(engine)
    del engine
    _, following = in_worker(worker, other, EmbedTask(["x"]))
    worker.start()
    following.result(30)
    worker.stop(10)
    assert freed() is None


async def test_a_failed_load_keeps_nothing_of_what_it_had_read() -> None:
    read: list[weakref.ref[FakeEngine]] = []

    def load(kind: str, name: Any, progress: Any) -> FakeEngine:
        weights = FakeEngine(kind)
        read.append(weakref.ref(weights))
        raise UnsupportedModel("no")

    async with running(settings(), load) as service:
        assert (await service.embed("x")).status_code == 422
        gc.collect()
        assert [reference() for reference in read] == [None, None]


async def test_info_shows_how_long_a_model_has_been_idle() -> None:
    async with running(settings()) as service:
        await load(service, "on/a")
        models = {m["id"]: m for m in (await service.client.get("/info")).json()["models"]}
        assert set(models) == {*DEFAULTS, "embed:on/a"}
        assert [models[name]["default"] for name in sorted(models)] == [True, True, False]
        assert all(model["idle_seconds"] >= 0 for model in models.values())


# --- local directories ---------------------------------------------------------------------------------


async def test_a_local_directory_is_known_by_its_last_name_and_by_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    async with running(settings(model_embed=str(folder))) as service:
        assert service.loader.loads[0] == "embed:my-model"
        assert (await service.embed("a")).json()["model"] == "my-model"
        assert (await service.embed("a", model="my-model")).json()["model"] == "my-model"
        assert (await service.bertscore("a", model="my-model")).json()["model"] == "my-model"
        for name in (str(folder), f"{folder}/", f"./{folder.name}", f"{tmp_path.name}/../my-model", "my-model/"):
            assert (await service.embed("a", model=name)).json()["code"] == "invalid_model_name", name
        other = await service.embed("a", model=f"{tmp_path.name[:9]}/my-model")  # a hub id, and another model
        assert other.status_code == 200
        assert len([load for load in service.loader.loads if "my-model" in load]) == 3
        for path in ("/info", "/ready", "/status"):
            assert str(tmp_path) not in (await service.client.get(path)).text


async def test_two_directories_of_the_same_last_name_serve_each_its_own_kind(tmp_path: Path) -> None:
    folders = {kind: tmp_path / kind / "same" for kind in ("embed", "bertscore")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    loads: list[tuple[str, Path | None]] = []

    def load(kind: str, name: ModelName, progress: Callable[[str, float], None]) -> FakeEngine:
        loads.append((kind, name.path))
        return FakeEngine(kind)

    config = settings(model_embed=str(folders["embed"]), model_bertscore=str(folders["bertscore"]))
    async with running(config, load) as service:
        assert (await service.embed("a", model="same")).status_code == 200
        assert (await service.bertscore("a", model="same")).status_code == 200
    assert dict(loads) == folders
    assert len(loads) == 2


async def test_an_incomplete_directory_is_503_without_its_path(tmp_path: Path) -> None:
    folder = tmp_path / "half-copied"
    folder.mkdir()
    (folder / "config.json").write_text("{}")

    def load(kind: str, name: ModelName, progress: Callable[[str, float], None]) -> FakeEngine:
        find_model(kind, name, Hub(), progress)
        return FakeEngine(kind)

    async with running(settings(model_embed=str(folder)), load) as service:
        response = await service.embed("a")
        assert (response.status_code, response.json()["code"]) == (503, "model_incomplete")
        assert "half-copied" in response.text
        assert str(tmp_path) not in response.text


def test_a_directory_that_does_not_exist_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="MODEL_EMBED="):
        gpu_service.Runtime(settings(model_embed=str(tmp_path / "missing")))

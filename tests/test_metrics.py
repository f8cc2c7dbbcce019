"""/metrics: every series from the start, bounded labels, counters that never go back, and each one documented."""

from __future__ import annotations

import ast
import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from conftest import (
    FakeLoader,
    Service,
    device_held,
    in_worker,
    load_folder,
    running,
    settings,
    speaking,
    without_options,
)
from prometheus_client.parser import text_string_to_metric_families

import gpu_service
from gpu_engine.link import launch_in_thread
from gpu_engine.messages import Facts, Loaded, State
from gpu_engine.work import BertScoreTask
from gpu_engine.worker import DeviceWorker

pytestmark = pytest.mark.anyio

ROOT = Path(gpu_service.__file__).parent
MODEL = "all-MiniLM-L6-v2"
PARTS = ("_bucket", "_sum", "_count")  # of a histogram


def samples(text: str) -> dict[str, float]:
    """The values by name and labels, as in `requests_total{path="/embed",status="200"}`."""
    lines = [line.removeprefix("gpu_service_") for line in text.splitlines() if not line.startswith("#")]
    return {series: float(value) for series, _, value in (line.rpartition(" ") for line in lines)}


async def scrape(service: Service) -> dict[str, float]:
    response = await service.client.get("/metrics")
    assert response.status_code == 200
    return samples(response.text)


async def until_shown(service: Service, series: str, value: float) -> dict[str, float]:
    """Waits until a series has a value; the engine reports a few times a second."""
    shown: dict[str, float] = {}

    def there() -> bool:
        text = gpu_service.write_metrics(service.app.state.metrics, service.runtime).decode()
        shown.update(samples(text))
        return shown.get(series) == value

    await service.until(there)
    return shown


# --- what is counted -----------------------------------------------------------------------------------


async def test_a_request_is_counted_by_its_route_its_status_and_its_phases() -> None:
    async with running(settings()) as service:
        await service.embed("one", "three")
        await service.bertscore("a candidate")
        shown = await until_shown(service, "batch_tokens_count", 2)
    assert shown['requests_total{path="/embed",status="200"}'] == 1
    assert shown['request_seconds_count{path="/embed"}'] == 1
    assert 0 < shown['request_seconds_sum{path="/embed"}'] < 30
    assert shown['request_seconds_bucket{le="+Inf",path="/embed"}'] == 1
    phases = ("queue", "tokenize", "compute", "write")
    assert {shown[f'phase_seconds_count{{phase="{phase}"}}'] for phase in phases} == {2}
    assert (shown['items_total{kind="embed"}'], shown['items_total{kind="bertscore"}']) == (2, 1)
    tokens = len("one") + len("three") + len("a candidate")
    assert shown["tokens_total"] == shown["batch_tokens_sum"] == tokens
    assert shown["batch_texts_sum"] == 3
    assert shown["device_busy_seconds_total"] > 0


async def test_batches_stand_in_the_bucket_of_their_size() -> None:
    async with running(settings()) as service:
        for number, length in enumerate((1, 2, 64, 65)):
            await service.embed("x" * length)
            shown = await until_shown(service, "batch_tokens_count", number + 1)
    bounds = ("1.0", "2.0", "32.0", "64.0", "128.0")
    assert [shown[f'batch_tokens_bucket{{le="{bound}"}}'] for bound in bounds] == [1, 2, 2, 3, 4]
    assert shown['batch_texts_bucket{le="1.0"}'] == 4


async def test_a_batch_larger_than_every_bound_is_counted_above_them() -> None:
    async with running(
        settings(), wait=False, launch=speaking([State({"tokens": 2.0**40}, {("tokens", 40): 1})])
    ) as service:
        shown = await until_shown(service, "batch_tokens_count", 1)
    assert shown['batch_tokens_bucket{le="131072.0"}'] == 0
    assert shown["batch_tokens_sum"] == 2.0**40


def test_padding_is_counted_of_what_serves_and_not_of_the_checks_at_load(tmp_path: Path) -> None:
    for folder, rows in ((tiny_models.save_bert(tmp_path / "ours"), 4), (padded(tmp_path / "theirs"), 8)):
        engine = load_folder("bertscore", folder)
        worker = DeviceWorker(torch.device("cpu"), 4096, 0.0, lambda detail: None, lambda: None)
        worker.start()
        try:
            in_worker(worker, engine, BertScoreTask(["the cat"], [["the cat"]]))[1].result(60)
        finally:
            worker.stop(10.0)
        assert (worker.counters.tokens, worker.counters.padding_tokens) == (4, rows - 4), folder


def padded(folder: Path) -> Path:
    """A model that runs through transformers, on padded batches."""
    return tiny_models.save_other(folder, "distilbert")


async def test_refusals_are_counted_by_their_code() -> None:
    async with running(settings(api_key="right")) as service:
        await service.client.get("/info")
        service.client.headers["X-API-Key"] = "right"
        await service.client.post("/embed", json={})
        await service.client.get("/nothing")
        shown = await scrape(service)
    reasons = ("unauthorized", "invalid_request", "not_found")
    assert [shown[f'refused_total{{reason="{reason}"}}'] for reason in reasons] == [1, 1, 1]
    assert sum(value for series, value in shown.items() if series.startswith("refused_total")) == 3


async def test_requests_on_the_device_and_in_line_are_shown_while_they_are_there() -> None:
    async with device_held(settings(gpu_max_concurrent=1)) as (service, engine):
        task = asyncio.create_task(service.embed("waits"))
        await service.until(lambda: service.runtime.admission.waiting == 1)
        shown = await scrape(service)
        assert (shown["in_flight"], shown["waiting"], shown["slots"]) == (1, 1, 1)
        engine.hold.set()
        await task
        shown = await scrape(service)
        assert (shown["in_flight"], shown["waiting"]) == (0, 0)


async def test_a_repeated_text_and_a_lack_of_memory_are_counted() -> None:
    async with running(settings()) as service:
        await service.embed("again")
        await service.embed("again")
        await until_shown(service, "cache_hits_total", 1)
        failures = [RuntimeError("CUDA out of memory")]

        def fail(texts: list[str]) -> None:
            if failures:
                raise failures.pop()

        service.embed_engine.fail = fail
        assert (await service.embed("two", "texts")).status_code == 200
        await until_shown(service, "out_of_memory_recoveries_total", 1)


async def test_loads_and_failed_loads_are_counted_by_kind_and_loaded_models_named_with_their_precision() -> None:
    async with running(settings()) as service:
        service.loader.errors["embed:bad/model"] = RuntimeError("weights of the wrong shape")
        await service.embed("a", model="good/model")
        await service.embed("a", model="bad/model")
        shown = await scrape(service)
        assert shown['model_load_seconds_count{kind="embed"}'] == 2
        assert shown['model_load_failures_total{kind="embed"}'] == 1
        assert shown['model_load_failures_total{kind="rerank"}'] == 0
        assert shown["ready"] == 1
        named = {series for series in shown if series.startswith("model_info")}
        assert named == {
            f'model_info{{dtype="float32",kind="{kind}",model="{model}"}}'
            for kind, model in (("embed", MODEL), ("bertscore", MODEL), ("embed", "good/model"))
        }
        service.runtime.models.drop_idle(0)
        assert not [series for series in await scrape(service) if "good/model" in series]


async def test_a_service_that_is_not_ready_says_so() -> None:
    loader = FakeLoader()
    loader.error = RuntimeError("weights of the wrong shape")
    async with running(settings(), loader) as service:
        assert (await scrape(service))["ready"] == 0


async def test_no_counter_goes_back_when_the_engine_dies_and_another_is_started() -> None:
    loader = FakeLoader()
    launch = lambda: launch_in_thread(without_options(loader))  # noqa: E731
    async with running(settings(), loader, launch=launch, pause_s=0.0) as service:
        await service.embed("first")
        await service.embed("first")
        before = await until_shown(service, "cache_hits_total", 1)
        service.runtime._life.kill()  # type: ignore[union-attr]
        await service.until(lambda: service.runtime.restarts == 1)
        await service.until(lambda: gpu_service.view_ready(service.runtime)[0] == 200)
        between = await scrape(service)
        await service.embed("third")
        after = await until_shown(service, "batch_tokens_count", 2)
    cumulative = re.compile(r"\w+_(total|count|sum|bucket)\b")
    for earlier, later in ((before, between), (between, after)):
        assert [name for name in earlier if cumulative.match(name) and later[name] < earlier[name]] == []
    assert after["batch_tokens_sum"] == len("first") + len("third")
    assert (after["worker_restarts_total"], after["cache_hits_total"]) == (1, 1)


# --- how it is shown -----------------------------------------------------------------------------------


async def test_metrics_need_the_key_and_come_as_prometheus_reads_them() -> None:
    async with running(settings(api_key="right")) as service:
        assert (await service.client.get("/metrics")).status_code == 401
        response = await service.client.get("/metrics", headers={"Authorization": "Bearer right"})
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert response.text.endswith("\n")


async def test_every_series_that_can_be_known_is_there_before_the_first_request() -> None:
    async with running(settings()) as service:
        before = gpu_service.write_metrics(service.app.state.metrics, service.runtime).decode()
        for ask in (service.embed, service.bertscore):
            assert (await ask("a")).status_code == 200
        for path in ("/status", "/web/page.js", f"/v1/models/{MODEL}", "/metrics"):
            assert (await service.client.get(path)).status_code == 200
        for path in ("/nothing", "/embed/x"):
            assert (await service.client.get(path)).status_code == 404
        after = (await service.client.get("/metrics")).text
    assert samples(after)['requests_total{path="/web/{name}",status="200"}'] == 1
    new = {series for series in samples(after) if series not in samples(before)}
    assert new == {'requests_total{path="other",status="404"}'}
    assert not [series for series, value in samples(before).items() if series.startswith("requests") and value]


async def test_what_callers_make_up_is_in_no_label() -> None:
    async with running(settings()) as service:
        before = set(await scrape(service))
        for number in range(20):
            await service.client.get(f"/made-up/{number}")
            await service.client.get(f"/v1/models/made/up-{number}")
            await service.client.get(f"/web/made-up-{number}.js")
            await service.raw("/health", method=f"MADE{number}")
            await service.embed(f"made up {number}", model=f"../made-up-{number}", made_up=number)
            await service.client.get("/health", headers={"traceparent": f"made-up-{number}", "X-Request-ID": "made-up"})
        new = set(await scrape(service)) - before
        response = await service.client.get("/metrics")
    assert new == {
        'requests_total{path="other",status="404"}',
        'requests_total{path="/v1/models/{model:path}",status="404"}',
        'requests_total{path="/health",status="405"}',
        'requests_total{path="/embed",status="400"}',
    }
    assert "made" not in response.text.lower()


async def test_a_caller_who_hangs_up_is_counted_as_499() -> None:
    async with running(settings()) as service:
        service.embed_engine.hold.clear()
        messages = [{"type": "http.disconnect"}, {"type": "http.request", "body": b'{"texts":["a"]}'}]

        async def receive() -> Any:
            return messages.pop()

        headers = [(b"content-type", b"application/json")]
        status, _, _ = await service.raw("/embed", method="POST", headers=headers, receive=receive)
        assert status == 499
        service.embed_engine.hold.set()
        assert (await scrape(service))['requests_total{path="/embed",status="499"}'] == 1


async def test_two_apps_of_one_process_count_each_its_own() -> None:
    async with running(settings()) as one, running(settings()) as other:
        await one.embed("a")
        series = 'requests_total{path="/embed",status="200"}'
        assert ((await scrape(one))[series], (await scrape(other))[series]) == (1, 0)


def test_every_code_that_the_service_names_has_a_series() -> None:
    tree = ast.parse(Path(gpu_service.__file__).read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    raised = [call.args[1:2] for call in calls if call.func.id in ("ServiceError", "invalid")]
    named = [node for arguments in raised for node in arguments]
    codes = {node.value for node in named if isinstance(node, ast.Constant)} | set(gpu_service.ENGINE_ERRORS)
    assert len(codes) >= 30
    assert codes - set(gpu_service.REASONS) == set()


# --- what is documented --------------------------------------------------------------------------------


async def test_each_metric_stands_in_the_documentation_with_its_type_and_labels_and_no_other_does() -> None:
    facts = Facts("cuda", "a GPU", 8, 8192, {})
    memory = {"vram_total_mb": 8, "vram_used_mb": 4, "vram_allocated_mb": 2}
    sent = [facts, Loaded(1, {"dtype": "float16"}), Loaded(2, {"dtype": "float16"}), State(memory=memory)]
    async with running(settings(), wait=False, launch=speaking(sent)) as service:
        shown = await until_shown(service, 'device_memory_bytes{state="total"}', 8 * 2**20)
        text = (await service.client.get("/metrics")).text
    assert shown['device_memory_bytes{state="used"}'] == 4 * 2**20
    assert shown['device_memory_bytes{state="allocated"}'] == 2 * 2**20
    seen = {}
    for family in text_string_to_metric_families(text):
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        seen[family.name + "_total" * (family.type == "counter")] = (family.type, labels)
    table = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8").partition("\n## Scraping")[0]
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.*?) ?\| .{20,} \|$", table, re.MULTILINE)
    documented = {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}
    assert documented == seen

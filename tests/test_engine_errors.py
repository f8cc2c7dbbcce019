"""What an engine can't compute is 422 in its own words; its bugs are 500 with the request's id and nothing else."""

from __future__ import annotations

import logging

import pytest
from conftest import raising, refused, running, settings

from gpu_engine.work import InvalidInput, NotFinite

pytestmark = pytest.mark.anyio


SECRET = "/root/.cache/secret-path at 0x7f00"


async def test_a_bug_in_an_engine_is_500_with_nothing_but_the_request_id(caplog: pytest.LogCaptureFixture) -> None:
    def bug(texts: list[str]) -> None:
        raise KeyError(f"secret {SECRET}")

    async with running(settings()) as service:
        service.embed_engine.fail = bug
        with caplog.at_level(logging.ERROR, "gpu_service"):
            response = await service.embed("a")
        detail = refused(response, 500, "internal")
        assert "secret" not in response.text
        assert response.headers["X-Request-ID"] in detail
        assert any(record.exc_info for record in caplog.records), "the log has the traceback"
        assert (await service.bertscore("the service goes on")).status_code == 200


async def test_a_bug_while_a_request_is_prepared_is_500_and_frees_the_slot() -> None:
    async with running(settings(gpu_max_concurrent=1)) as service:
        engine = service.embed_engine
        prepare, engine.prepare = engine.prepare, lambda request: 1 / 0  # type: ignore[method-assign]
        refused(await service.embed("a"), 500, "internal")
        engine.prepare = prepare  # type: ignore[method-assign]
        assert service.runtime.admission.in_flight == 0
        assert (await service.embed("a")).status_code == 200


async def test_what_an_engine_cannot_compute_is_422_with_its_own_words() -> None:
    async with running(settings()) as service:
        service.embed_engine.fail = raising(InvalidInput("no prompt 'x'", "invalid_request"))
        assert refused(await service.embed("a"), 422, "invalid_request") == "no prompt 'x'"


@pytest.mark.parametrize("error", [InvalidInput("no prompt 'x'", "no_prompt"), NotFinite("nan")], ids=repr)
async def test_recent_jobs_tell_what_an_engine_could_not_compute(error: Exception) -> None:
    async with running(settings()) as service:
        service.embed_engine.fail = raising(error)
        response = await service.embed("a")
        assert response.status_code == 422
        (job,) = (await service.status())["recent_jobs"]
        assert job["outcome"] == response.json()["code"] != "failed"

"""Two apps in one process: each has its own settings, models, slots and end."""

from __future__ import annotations

import contextlib

import httpx
import pytest
from conftest import FakeLoader, settings
from live import answer, post, serving


def test_two_apps_answer_each_by_its_own_settings_and_closing_one_leaves_the_other() -> None:
    loaders = FakeLoader(), FakeLoader()
    small = settings(api_key="first", gpu_max_batch_size=1, gpu_max_concurrent=1, gpu_max_queue=0)
    large = settings(api_key="second", gpu_max_batch_size=3, model_embed="some/model", gpu_max_concurrent=2)
    with serving(large, loaders[1]) as second, contextlib.ExitStack() as closing:
        first = closing.enter_context(serving(small, loaders[0]))
        for service, model, limit in ((first, "all-MiniLM-L6-v2", 1), (second, "some/model", 3)):
            assert answer(service, "/embed", {"texts": ["a"] * limit})["model"] == model
            refusal = post(service, "/embed", {"texts": ["a"] * (limit + 1)})
            assert (refusal.status_code, f"the limit is {limit}" in refusal.text) == (422, True)
            other = second if service is first else first
            assert post(service, "/embed", {"texts": ["a"]}, key=other.key).status_code == 401
        assert [loader.loads[0] for loader in loaders] == ["embed:all-MiniLM-L6-v2", "embed:some/model"]

        # A full house in one is none in the other; what one has computed, the other has not.
        assert (first.runtime.admission.max_concurrent, second.runtime.admission.max_concurrent) == (1, 2)
        assert answer(second, "/embed", {"texts": ["b"]})
        ran = [loader.engines[loader.loads[0]].texts_run for loader in loaders]
        assert ran == [["a"], ["a", "b"]]
        closing.close()

        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{first.url}/health")
        assert answer(second, "/embed", {"texts": ["a", "b", "c"]})["model"] == "some/model"
        assert httpx.get(f"{second.url}/health").status_code == 200

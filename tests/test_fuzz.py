"""Every operation of the OpenAPI description with generated requests, against real models behind a real socket.

Short by default; `FUZZ_EXAMPLES=300 pytest tests/test_fuzz.py` for the long run (over 2,000 cases).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from conftest import settings
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from live import LiveService, serving
from schemathesis.specs.openapi import checks

import gpu_service

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "15"))

CHECKS = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.unsupported_method,
    checks.allow_header_conformance,
]
# Left out: positive_data_acceptance (that two lists are equally long, that a model exists, and how many texts are
# allowed can't be said in a schema), negative_data_rejection (fields that are not known are accepted).

schema = schemathesis.openapi.from_dict(gpu_service.create_app(settings()).openapi())
schema.config.generation.update(modes=list(schemathesis.GenerationMode))


@pytest.fixture(scope="module")
def live() -> Iterator[LiveService]:
    with serving(settings(gpu_allowed_models="sentence-transformers/*,fuzz/*")) as service:
        yield service


@pytest.fixture(scope="module")
def seen() -> Iterator[Counter[int]]:
    """How many answers had which status; shown with `-s`."""
    counts: Counter[int] = Counter()
    yield counts
    print(f"\n{sum(counts.values())} cases: {dict(sorted(counts.items()))}")


@schema.parametrize()
@hypothesis_settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True
)
def test_every_answer_is_one_that_the_description_promises(
    case: schemathesis.Case, live: LiveService, seen: Counter[int]
) -> None:
    name_a_model_that_is_here(case.body)
    response = case.call(base_url=live.url)
    seen[response.status_code] += 1
    assert response.status_code < 500 or response.status_code in (503, 504), response.text
    case.validate_response(response, checks=CHECKS)
    if response.status_code in (429, 503) and "/v1/" not in case.path:
        assert int(response.headers["retry-after"][0]) >= 1
    assert response.headers["x-request-id"]


def name_a_model_that_is_here(body: Any) -> None:
    """Most generated model names are none; half of them become the one that is loaded."""
    if isinstance(body, dict):
        for key in ("model", "model_type"):
            if isinstance(body.get(key), str) and len(body[key]) % 2:
                body[key] = "all-MiniLM-L6-v2"

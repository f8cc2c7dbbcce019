"""The report that a card's owner runs: nothing that a check does keeps the others from running."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import FakeCard

from benchmarks import gpu_report
from gpu_engine.graphs import GraphedEncoder
from gpu_engine.token_model import TokenModel

SCRIPT = Path(gpu_report.__file__)


def fail(card: Any) -> dict[str, Any]:
    raise ValueError("no such thing")


def miss(card: Any) -> dict[str, Any]:
    raise gpu_report.Missed("too far off", {"deviation": 0.5})


def lack(card: Any) -> dict[str, Any]:
    raise gpu_report.NotHere("it needs a compiler")


def count(card: Any) -> dict[str, Any]:
    return {"number": 7}


def check(name: str, run: Callable[[Any], dict[str, Any]], gpu: bool = False) -> gpu_report.Check:
    return gpu_report.Check(1, name, run, gpu=gpu)


@pytest.fixture
def card(tmp_path: Path) -> gpu_report.Card:
    return gpu_report.Card("cpu", True, tmp_path)


def outcomes(checks: list[gpu_report.Check], card: gpu_report.Card) -> list[tuple[str, str]]:
    results: list[Any] = []
    gpu_report.run_checks(checks, card, results.append)
    return [(result["name"], result["outcome"]) for result in results]


def test_a_check_that_raises_is_reported_and_the_next_one_runs(card: gpu_report.Card) -> None:
    results: list[Any] = []
    gpu_report.run_checks([check("first", fail), check("next", count)], card, results.append)
    first, second = results
    assert (first["outcome"], first["detail"]) == ("failed", "ValueError: no such thing")
    assert (second["outcome"], second["numbers"]) == ("ok", {"number": 7})


def test_a_bound_that_is_missed_keeps_its_numbers(card: gpu_report.Card) -> None:
    result = gpu_report.run_check(check("a", miss), card)
    assert (result["outcome"], result["detail"], result["numbers"]) == ("missed", "too far off", {"deviation": 0.5})


def test_what_a_machine_lacks_is_no_failure(card: gpu_report.Card) -> None:
    checks = [check("kernel", lack), check("graphs", fail, gpu=True)]
    assert outcomes(checks, card) == [("kernel", "not here"), ("graphs", "needs a GPU")]


def test_nothing_runs_in_a_process_whose_device_is_broken(
    card: gpu_report.Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_report, "is_fatal", lambda error: True)
    assert outcomes([check("breaks", fail), check("after", count)], card) == [("breaks", gpu_report.BROKE)]


def test_what_finds_no_time_is_listed() -> None:
    options = argparse.Namespace(device="cpu")
    groups = {"one": [check("a", count), check("b", count, gpu=True)]}
    results = list(gpu_report.all_results(groups, options, time.monotonic() - 60, 60.0))
    assert [(r["name"], r["outcome"]) for r in results] == [("a", "not run"), ("b", "needs a GPU")]


def test_a_check_has_a_name_of_its_own() -> None:
    names = [each.name for checks in gpu_report.GROUPS.values() for each in checks]
    assert len(set(names)) == len(names)


OWN_GROUPS = """\
import os, sys, threading
sys.path.append({benchmarks!r})
import gpu_report
from gpu_report import Check

def check(name, run, seconds=60):
    return Check(1, name, run, seconds, gpu=False)

checks = [
    check("ends", lambda card: os._exit(3)),
    check("counts", lambda card: {{"number": 7}}),
    check("hangs", lambda card: threading.Event().wait(), seconds=0.2),
    check("goes on", lambda card: {{}}),
]
sys.exit(gpu_report.main({{"own": checks}}))
"""


@pytest.mark.slow
def test_a_check_that_ends_or_blocks_its_process_is_reported_and_the_rest_runs(tmp_path: Path) -> None:
    script = tmp_path / "own.py"
    script.write_text(OWN_GROUPS.format(benchmarks=str(SCRIPT.parent)))
    report, code = run_report(script, tmp_path)
    assert code == 1
    ends, counts, hangs, goes_on = report["checks"]
    assert (ends["outcome"], "its process ended with 3" in ends["detail"]) == ("failed", True)
    assert (counts["outcome"], counts["numbers"]) == ("ok", {"number": 7})
    assert (hangs["outcome"], "not done after" in hangs["detail"]) == ("failed", True)
    assert goes_on["outcome"] == "ok"


@pytest.mark.slow
def test_the_whole_report_runs_on_a_processor(tmp_path: Path) -> None:
    report, code = run_report(SCRIPT, tmp_path, "--quick", "--minutes", "4.5")
    checks = {each.name: each for checks in gpu_report.GROUPS.values() for each in checks}
    wrong = {each["name"]: each for each in report["checks"] if each["outcome"] not in ("ok", "needs a GPU")}
    assert (wrong, code) == ({}, 0)
    assert [each["name"] for each in report["checks"]] == list(checks)
    for each in report["checks"]:
        assert (each["outcome"] == "needs a GPU") == checks[each["name"]].gpu, each
        assert bool(each["numbers"]) != checks[each["name"]].gpu, each
    assert report["machine"]["pytorch_version"] == torch.__version__
    text = (tmp_path / "report.md").read_text()
    assert all(f"| {name} " in text for name in checks)


def run_report(script: Path, folder: Path, *arguments: str) -> tuple[Any, int]:
    """The JSON that a run writes, and its exit status."""
    out = folder / "report.md"
    command = [sys.executable, str(script), "--device", "cpu", "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert out.exists(), done.stderr
    return json.loads(out.with_suffix(".json").read_text()), done.returncode


def test_the_checks_of_graphs_hold_on_a_card_that_keeps_its_promises(
    card: gpu_report.Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = TokenModel._fast
    FakeCard(monkeypatch)
    monkeypatch.setattr(
        TokenModel, "_fast", lambda self, dtype: GraphedEncoder(own(self, dtype), self.pad_id, self.longest)
    )
    card.batch_tokens = 256
    assert gpu_report.gpu_checks.graph_ladder(card)["graphs"] > 20
    assert gpu_report.gpu_checks.capture_beside_load(card)["captured"] == 64
    found = gpu_report.gpu_checks.replays(card)
    assert found["deviation"] < 1e-4

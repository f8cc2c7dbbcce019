"""The module reads like a book and does nothing when it is imported."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import gpu_service

SOURCE = Path(gpu_service.__file__)
TEXT = SOURCE.read_text(encoding="utf-8")
TREE = ast.parse(TEXT)


def test_the_docstring_lists_the_chapters_that_the_banners_open() -> None:
    assert gpu_service.__doc__ is not None
    listed = re.search(r"^Chapters:\n((?:    .+\n)+)", gpu_service.__doc__ + "\n", re.MULTILINE)
    assert listed is not None
    rule = "# " + "=" * 102
    banners = re.findall(rf"^{rule}\n# (.+)\n{rule}$", TEXT, re.MULTILINE)
    assert [line.strip() for line in listed[1].splitlines()] == banners
    assert TEXT.count(rule) == 2 * len(banners)
    assert not [name for name in banners if "util" in name.lower() or "helper" in name.lower()]


def test_the_docstring_lists_the_endpoints() -> None:
    listed = re.findall(r"`((?:GET|POST) /[^`]*)`", gpu_service.__doc__ or "")
    routes = [f"{method} {route.path}" for route in gpu_service.router.routes for method in route.methods]  # type: ignore[attr-defined]
    assert sorted(listed) == sorted(routes)


def test_no_function_changes_a_module_global() -> None:
    assert not [node.lineno for node in ast.walk(TREE) if isinstance(node, ast.Global)]


def test_the_environment_is_read_in_settings_only() -> None:
    """Defaults for libraries are set at the top; nothing below the chapter Settings touches os.environ."""
    end = next(node.lineno for node in TREE.body if isinstance(node, ast.ClassDef) and node.name == "ServiceError")
    for node in ast.walk(TREE):
        if isinstance(node, ast.Attribute) and node.attr in ("getenv", "environ", "environb", "putenv"):
            assert node.attr == "environ", node.lineno
            assert node.lineno < end, node.lineno
    calls = [ast.unparse(node) for node in ast.walk(TREE) if isinstance(node, ast.Call)]
    uses = [call for call in calls if call.startswith("os.environ")]
    assert uses
    assert all(use.startswith("os.environ.setdefault(") for use in uses)


def test_importing_starts_nothing_and_reads_no_setting() -> None:
    script = """if True:
        import json, sys, threading
        import gpu_service, torch
        heavy = {"transformers", "sentence_transformers", "bert_score", "huggingface_hub"} & set(sys.modules)
        print(json.dumps([threading.active_count(), torch.cuda.is_initialized(), sorted(heavy)]))
        gpu_service.app
    """
    env = {**os.environ, "GPU_MAX_CONCURRENT": "none", "PYTHONPATH": str(SOURCE.parent)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 2, done.stderr
    assert json.loads(done.stdout) == [1, False, []]
    assert done.stderr.startswith("gpu_service: GPU_MAX_CONCURRENT='none'")


def test_every_public_function_and_class_says_what_it_is() -> None:
    missing = [
        f"{node.name} (line {node.lineno})"
        for node in TREE.body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and not ast.get_docstring(node)
    ]
    assert not missing

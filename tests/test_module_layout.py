"""The service reads like a book, the engines know nothing of it, and importing either does nothing."""

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
ENGINE = SOURCE.parent / "gpu_engine"
ROOMS = {file.name: ast.parse(file.read_text(encoding="utf-8")) for file in sorted(ENGINE.glob("*.py"))}
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
    for name, tree in {"gpu_service.py": TREE, **ROOMS}.items():
        assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Global)], name


def imported(tree: ast.Module) -> set[str]:
    """Every module that a file imports, anywhere in it, by its full name."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute here"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_no_engine_knows_the_service_or_what_it_is_built_on() -> None:
    beyond = {"fastapi", "starlette", "pydantic", "pydantic_settings", "uvicorn", "asyncio", "anyio", "gpu_service"}
    for name, tree in ROOMS.items():
        assert not {module for module in imported(tree) if module.split(".")[0] in beyond}, name


def test_the_engines_rooms_are_listed_leaves_first_and_import_only_rooms_above_them() -> None:
    """With one exception: link.py starts, for tests, the loop of process.py in a thread."""
    listed = re.findall(r"^    (\w+\.py)", ast.get_docstring(ROOMS["__init__.py"], clean=False) or "", re.MULTILINE)
    assert sorted(listed) == sorted(set(ROOMS) - {"__init__.py"})
    for place, name in enumerate(listed):
        ours = {f"{module.split('.')[1]}.py" for module in imported(ROOMS[name]) if module.startswith("gpu_engine.")}
        assert ours - ({"process.py"} if name == "link.py" else set()) <= set(listed[:place]), name


def test_the_environment_is_read_in_settings_only() -> None:
    """Nothing below the chapter Settings touches os.environ; the engines' door sets defaults for libraries."""
    end = next(node.lineno for node in TREE.body if isinstance(node, ast.ClassDef) and node.name == "ServiceError")
    for name, tree in {"gpu_service.py": TREE, **ROOMS}.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in ("getenv", "environ", "environb", "putenv"):
                allowed = name == "__init__.py" or (name == "gpu_service.py" and node.lineno < end)
                assert allowed or name == "link.py", (name, node.lineno)  # which passes it on, without the key
    calls = [ast.unparse(node) for node in ast.walk(ROOMS["__init__.py"]) if isinstance(node, ast.Call)]
    assert calls
    assert all(call.startswith("os.environ.setdefault(") for call in calls)


def test_the_service_imports_no_torch() -> None:
    script = "import gpu_service, sys; gpu_service.create_app(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=SOURCE.parent, capture_output=True, text=True)
    assert done.stdout.split() == ["False"], done.stderr


def test_what_libraries_read_at_import_is_set_before_the_engines_process_imports_torch() -> None:
    script = """if True:
        import os, sys
        class Watch:
            def find_spec(self, name, path=None, target=None):
                if name == "torch":
                    print(os.environ.get("GOMP_SPINCOUNT"))
        sys.meta_path.insert(0, Watch())
        import gpu_engine.process
    """
    env = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
    done = subprocess.run([sys.executable, "-c", script], cwd=SOURCE.parent, env=env, capture_output=True, text=True)
    assert done.stdout.split() == ["5000"], done.stderr


def test_the_program_starts_from_any_directory(tmp_path: Path) -> None:
    env = {**os.environ, "PORT": "none"}
    done = subprocess.run([sys.executable, SOURCE], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.split("=")[0]) == (2, "gpu_service: PORT"), done.stderr


def test_importing_starts_nothing_and_reads_no_setting() -> None:
    script = """if True:
        import json, sys, threading
        import gpu_service
        heavy = {"torch", "transformers", "sentence_transformers", "bert_score", "huggingface_hub"} & set(sys.modules)
        print(json.dumps([threading.active_count(), sorted(heavy)]))
        gpu_service.app
    """
    env = {**os.environ, "GPU_MAX_CONCURRENT": "none", "PYTHONPATH": str(SOURCE.parent)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 2, done.stderr
    assert json.loads(done.stdout) == [1, []]
    assert done.stderr.startswith("gpu_service: GPU_MAX_CONCURRENT='none'")


def test_every_public_function_and_class_says_what_it_is() -> None:
    missing = [
        f"{name}: {node.name} (line {node.lineno})"
        for name, tree in {"gpu_service.py": TREE, **ROOMS}.items()
        for node in [*tree.body, *(part for made in tree.body if isinstance(made, ast.ClassDef) for part in made.body)]
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert not missing

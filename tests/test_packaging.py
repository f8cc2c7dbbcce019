"""The project as a package: what a built wheel holds and asks for, and that its command starts."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import gpu_service

ROOT = Path(__file__).parent.parent
ENGINE = "gpu_engine"


def requirements() -> set[str]:
    """The requirements of the service, in one spelling, without comments."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text("utf-8").splitlines())
    return {str(Requirement(line)) for line in lines if line}


def modules(names: list[str]) -> set[str]:
    return {name for name in names if name.endswith(".py")}


def test_the_tools_are_told_the_oldest_python_that_the_project_names() -> None:
    tomllib = pytest.importorskip("tomllib", reason="came with Python 3.11")
    told = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    oldest = re.fullmatch(r">=(3\.\d+)", told["project"]["requires-python"])
    assert oldest is not None
    assert told["tool"]["mypy"]["python_version"] == oldest[1]
    assert told["tool"]["ruff"]["target-version"] == "py" + oldest[1].replace(".", "")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a source distribution of what lies in the checkout's root, so both are complete."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, source)
    for folder in (ENGINE, "web"):
        shutil.copytree(ROOT / folder, source / folder)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(built), str(source)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return next(built.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_the_service_and_its_engine_and_nothing_else(wheel: Path) -> None:
    engine = [path.relative_to(ROOT).as_posix() for path in (ROOT / ENGINE).rglob("*.py")]
    names = zipfile.ZipFile(wheel).namelist()
    assert modules(names) == {"gpu_service.py", *engine}
    page = {f"gpu_service_web/{path.name}" for path in (ROOT / "web").iterdir()}
    assert {name for name in names if name.startswith("gpu_service_web/")} == page


@pytest.mark.slow
def test_the_wheel_asks_for_what_the_requirements_ask_for(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(archive.read(name))
    assert {str(Requirement(line)) for line in metadata.get_all("Requires-Dist", [])} == requirements()
    assert metadata["Version"] == gpu_service.__version__


@pytest.mark.slow
def test_the_wheels_command_starts_outside_of_the_checkout(wheel: Path, tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path), str(wheel)]
    subprocess.run(pip, check=True)
    command = shutil.which("gpu-service", path=str(tmp_path / "bin"))
    assert command is not None
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "GPU_MAX_CONCURRENT": "none"}
    done = subprocess.run([command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("gpu_service: GPU_MAX_CONCURRENT='none'"), done.stderr

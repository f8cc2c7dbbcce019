"""The Makefile's environment: which interpreter and index it is made with, and when it is made again.

The interpreters are scripts that write down how they are called, so nothing is installed and no network is used.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CUDA_INDEX = "https://download.pytorch.org/whl/cu126"

pytestmark = pytest.mark.skipif(
    os.name == "nt" or shutil.which("make") is None, reason="needs make, and a shell for the interpreters"
)

# $0 is the interpreter, so an environment's own one is told from the one that made it.
INTERPRETER = """\
#!/bin/sh
echo "$(basename "$0") $*" >> "$CALLS"
case "$*" in
  "-c import sys; print"*) echo "%(version)s /opt/%(version)s" ;;
  "-m venv"*)
    for directory; do :; done
    case "$*" in *--clear*) rm -rf "$directory" ;; esac
    mkdir -p "$directory/bin" "$directory/lib/python%(version)s/site-packages" && touch "$directory/pyvenv.cfg"
    cp "$0" "$directory/bin/python" ;;
  "-m pip install"*)
    case "$*" in *"$REFUSED_INDEX"*) exit 1 ;; esac
    mkdir -p "$(dirname "$0")/../lib/python%(version)s/site-packages/torch" ;;
esac
"""


class Checkout:
    """A checkout with only what the Makefile's rules read, and interpreters that only write down their calls."""

    def __init__(self, root: Path) -> None:
        self.root, self.calls = root, root / "calls"
        for name in ("Makefile", "requirements.txt", "requirements-dev.txt"):
            shutil.copy(ROOT / name, root)
        (root / "tools").mkdir()
        for name, version in (("python3", "3.11"), ("python3.11", "3.11"), ("python3.12", "3.12")):
            script = root / "tools" / name
            script.write_text(INTERPRETER % {"version": version})
            script.chmod(0o755)

    def make(self, *arguments: str, refused_index: str = "none") -> tuple[list[str], str]:
        """Runs make; the calls of interpreters but for questions about them, and what make printed."""
        self.calls.write_text("")
        environment = {
            "PATH": f"{self.root / 'tools'}:{os.defpath}",
            "CALLS": str(self.calls),
            "REFUSED_INDEX": refused_index,
        }
        done = subprocess.run(["make", *arguments], cwd=self.root, env=environment, capture_output=True, text=True)
        self.failed = done.returncode != 0
        calls = self.calls.read_text().splitlines()
        return [call for call in calls if " -c " not in call and "--version" not in call], done.stdout

    def change_requirements(self) -> None:
        """Makes the stamp older than the requirements."""
        os.utime(self.root / ".venv" / ".runtime", (0, 0))

    def installs(self, *arguments: str) -> list[str]:
        return [call.partition(" install ")[2] for call in self.make("venv", *arguments)[0] if " install " in call]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_the_first_make_creates_the_environment_and_the_second_does_nothing(checkout: Checkout) -> None:
    calls, _ = checkout.make("venv")
    assert calls == ["python3 -m venv .venv", "python -m pip install -r requirements.txt --constraint constraints.txt"]
    assert checkout.make("venv")[0] == []
    assert not checkout.failed


def test_requirements_that_changed_are_installed_into_the_same_environment(checkout: Checkout) -> None:
    checkout.make("venv")
    checkout.change_requirements()
    assert checkout.make("venv")[0] == ["python -m pip install -r requirements.txt"]


def test_another_index_replaces_torch_in_an_environment_that_is_there(checkout: Checkout) -> None:
    checkout.make("venv")
    assert checkout.installs(f"TORCH_INDEX={CPU_INDEX}") == [
        f"--force-reinstall --index-url {CPU_INDEX} -r .venv/torch.txt",
        "-r requirements.txt",
    ]
    assert (checkout.root / ".venv/torch.txt").read_text().startswith("torch>=")
    assert checkout.installs(f"TORCH_INDEX={CPU_INDEX}") == []
    assert checkout.installs(f"TORCH_INDEX={CUDA_INDEX}") != []


def test_an_index_that_is_not_named_again_stays(checkout: Checkout) -> None:
    checkout.installs(f"TORCH_INDEX={CPU_INDEX}")
    assert checkout.installs() == []
    checkout.change_requirements()
    assert checkout.installs() == [f"--index-url {CPU_INDEX} -r .venv/torch.txt", "-r requirements.txt"]


def test_an_index_that_fails_is_not_remembered(checkout: Checkout) -> None:
    checkout.make("venv")
    checkout.make("venv", f"TORCH_INDEX={CPU_INDEX}", refused_index=CPU_INDEX)
    assert checkout.failed
    assert checkout.installs() == ["-r requirements.txt"]


def test_another_interpreter_makes_the_environment_again_and_keeps_the_index(checkout: Checkout) -> None:
    checkout.make("venv", f"TORCH_INDEX={CPU_INDEX}")
    calls, _ = checkout.make("venv", "PYTHON=python3.12")
    assert calls == [
        "python3.12 -m venv --clear .venv",
        f"python -m pip install --index-url {CPU_INDEX} -r .venv/torch.txt",
        "python -m pip install -r requirements.txt",
    ]
    assert checkout.make("venv", "PYTHON=python3.12")[0] == []


def test_an_interpreter_that_is_not_named_again_stays(checkout: Checkout) -> None:
    checkout.make("venv", "PYTHON=python3.12")
    assert checkout.make("venv")[0] == []
    assert checkout.make("venv", "PYTHON=python3.11")[0] != []


def test_another_name_of_the_same_interpreter_changes_nothing(checkout: Checkout) -> None:
    checkout.make("venv")
    assert checkout.make("venv", "PYTHON=python3.11")[0] == []


def test_an_interpreter_that_is_not_there_leaves_the_environment_alone(checkout: Checkout) -> None:
    checkout.make("venv")
    assert checkout.make("venv", "PYTHON=python9")[0] == []
    assert checkout.failed
    assert checkout.make("venv")[0] == []


def test_the_tests_requirements_follow_an_environment_that_was_made_again(checkout: Checkout) -> None:
    checkout.make("test")
    calls, _ = checkout.make("test", "PYTHON=python3.12")
    assert [call for call in calls if "-dev" in call] == ["python -m pip install -r requirements-dev.txt"]


@pytest.mark.skipif(sys.platform != "linux", reason="the hint is Linux's, where PyPI's torch brings CUDA")
class TestHint:
    """One line before the download, where no GPU is seen."""

    def hint(self, checkout: Checkout, *arguments: str, sign: str = "no-such-device") -> str:
        _, printed = checkout.make("venv", f"GPU_SIGNS={sign}", *arguments)
        return "".join(line for line in printed.splitlines() if line.startswith("No GPU"))

    @pytest.fixture(autouse=True)
    def no_nvidia_smi(self, checkout: Checkout) -> None:
        if shutil.which("nvidia-smi", path=os.defpath):
            pytest.skip("this machine has an NVIDIA driver on the system's path")

    def test_names_the_small_index_where_no_gpu_is_seen(self, checkout: Checkout) -> None:
        assert f"make run TORCH_INDEX={CPU_INDEX}" in self.hint(checkout)

    def test_is_left_out_once_torch_is_there(self, checkout: Checkout) -> None:
        self.hint(checkout)
        checkout.change_requirements()
        assert self.hint(checkout) == ""

    def test_is_left_out_where_an_index_is_named(self, checkout: Checkout) -> None:
        assert self.hint(checkout, f"TORCH_INDEX={CUDA_INDEX}") == ""

    def test_is_left_out_where_a_device_is_seen(self, checkout: Checkout) -> None:
        assert self.hint(checkout, sign="Makefile") == ""

    def test_is_left_out_where_nvidia_smi_is_there(self, checkout: Checkout) -> None:
        shutil.copy(checkout.root / "tools" / "python3", checkout.root / "tools" / "nvidia-smi")
        assert self.hint(checkout) == ""

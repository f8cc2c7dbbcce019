"""The command line: serve, download and check; what each prints, and the exit code."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from fake_hub import Repository, fake_hub, read_folder
from live import free_port, until

import gpu_service
from gpu_engine.check import Build, Machine, judge_build, judge_kernels, judge_memory, version_in, weights_bytes

ROOT = Path(__file__).parent.parent
MINILM = "all-MiniLM-L6-v2"
CPU, CUDA13, CUDA12 = Build("2.13.0+cpu"), Build("2.13.0", "13.0"), Build("2.13.0+cu126", "12.6")
INDEX = "https://download.pytorch.org/whl"


def command(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the program on the CPU, off the network, on a port that is free."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HOST": "127.0.0.1", "PORT": str(free_port()), "TORCH_DEVICE": "cpu"}
    env |= {"MODEL_BERTSCORE": MINILM, "GPU_DTYPE": "float32", **environment}
    run = [sys.executable, str(ROOT / "gpu_service.py"), *words]
    return subprocess.run(run, env=env, capture_output=True, text=True, timeout=120)


# --- words ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["bogus"], ["--bogus"], ["serve", "now"], ["check", MINILM], ["download", "--all"]])
def test_a_word_that_is_not_known_is_refused_in_one_line_with_code_2(words: list[str]) -> None:
    done = command(*words)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("gpu_service: ")
    assert words[-1] in line
    assert line.endswith("see gpu-service --help")


def test_help_lists_the_commands_and_version_says_which(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        gpu_service.main(["--help"])
    assert {"serve", "download", "check"} <= set(capsys.readouterr().out.split())
    with pytest.raises(SystemExit, match="0"):
        gpu_service.main(["--version"])
    assert capsys.readouterr().out == f"gpu-service {gpu_service.__version__}\n"


@pytest.mark.parametrize("words", [[], ["serve"]])
def test_without_a_word_it_serves(words: list[str]) -> None:
    parsed = gpu_service.command_line().parse_args(words)
    assert parsed.run is gpu_service.serve


@pytest.mark.parametrize("word", ["download", "check"])
def test_a_bad_setting_is_refused_by_each_command_with_code_2(word: str) -> None:
    done = command(word, GPU_MAX_CONCURRENT="none")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("gpu_service: GPU_MAX_CONCURRENT='none'")


# --- download ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_bert(tmp_path_factory.mktemp("model") / "tiny")


def test_download_fetches_what_is_named_and_says_of_each_that_is_missing_why(tiny: Path, tmp_path: Path) -> None:
    with fake_hub() as hub:
        hub.repositories["owner/there"] = Repository(read_folder(tiny))
        online = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path)}
        done = command(
            "download", "owner/there", "owner/gone", "not a name", "mine", MODEL_ALIASES="mine=owner/there", **online
        )
    assert done.returncode == 1
    (here,) = done.stdout.splitlines()
    assert here.startswith(f"owner/there: {tmp_path}")
    assert (Path(here.partition(": ")[2]) / "model.safetensors").is_file()
    gone, unnamed = done.stderr.splitlines()
    assert gone.startswith("gpu_service: owner/gone: The hub has no model owner/gone")
    assert unnamed.startswith("gpu_service: not a name: allowed: a hub id")
    offline = command("download", "owner/there", HF_HOME=str(tmp_path))
    assert (offline.returncode, offline.stdout) == (0, f"{here}\n")


def test_download_fails_where_a_model_has_no_weights_that_can_be_read(tiny: Path, tmp_path: Path) -> None:
    with fake_hub() as hub:
        files = {name: data for name, data in read_folder(tiny).items() if not name.endswith(".safetensors")}
        hub.repositories["owner/gguf"] = Repository({**files, "model.gguf": b"x"})
        hub.failing["owner/closed"] = 403
        online = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path)}
        done = command("download", "owner/gguf", "owner/closed", "", **online)
    assert (done.returncode, done.stdout) == (1, "")
    unreadable, closed, nameless = (line for line in done.stderr.splitlines() if line.startswith("gpu_service: "))
    assert "owner/gguf has no weights that PyTorch reads" in unreadable
    assert "refused it with 403: is HF_TOKEN right?" in closed
    assert "gpu-service download" not in closed, "that is what was tried"
    assert nameless.startswith("gpu_service: : no name; allowed: ")


def test_download_without_a_name_takes_the_default_models(tmp_path: Path) -> None:
    done = command("download", MODEL_BERTSCORE="owner/one", HF_HOME=str(tmp_path))
    assert done.returncode == 1
    assert done.stdout.startswith(f"{MINILM}: ")
    (line,) = done.stderr.splitlines()
    assert "owner/one is not on this machine and the hub is switched off" in line


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c_ends_a_download_at_once(tiny: Path, tmp_path: Path) -> None:
    with fake_hub() as hub:
        held = hub.repositories["owner/held"] = Repository(read_folder(tiny), hold=threading.Event())
        env = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path)}
        run = [sys.executable, str(ROOT / "gpu_service.py"), "download", "owner/held"]
        with subprocess.Popen(run, env=env, stderr=subprocess.PIPE) as process:
            until(lambda: "owner/held/model.safetensors" in hub.fetched, "the download never began")
            process.send_signal(signal.SIGINT)
            assert process.stderr is not None
            said = process.stderr.read()  # to its end; the hub would hold it for a minute
        assert held.hold is not None
        assert not held.hold.is_set()
        held.hold.set()
    assert (process.returncode, said) == (-signal.SIGINT, b"")


def test_download_imports_no_torch(tmp_path: Path) -> None:
    script = "import gpu_service, sys\ntry: gpu_service.main(['download'])\nfinally: print('torch' in sys.modules)"
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "MODEL_BERTSCORE": MINILM, "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "False"), done.stderr


# --- check, as a whole ---------------------------------------------------------------------------------


def test_check_tells_of_all_there_is_and_ends_with_0_where_all_is_well() -> None:
    done = command("check")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert all(line.startswith("ok ") for line in lines), done.stdout
    subjects = [line.split()[1] for line in lines]
    assert subjects == ["versions", "port", "torch", "device", *["embed"] * 3, *["bertscore"] * 3]
    for kind in ("embed", "bertscore"):
        assert re.search(rf"{kind} +{MINILM} is in /", done.stdout) or os.name == "nt"
        assert re.search(rf"{kind} +{MINILM} serves in float32: as GPU_DTYPE asks", done.stdout)


def test_check_names_each_fault_with_its_way_out_and_ends_with_1(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = command("check", PORT=port, MODEL_EMBED="owner/none", MODEL_BERTSCORE="owner/two", HF_HOME=str(tmp_path))
    assert done.returncode == 1
    faults = [line for line in done.stdout.splitlines() if line.startswith("FAULT")]
    assert [line.split()[1] for line in faults] == ["port", "embed", "bertscore"], done.stdout + done.stderr
    assert f"PORT={port}: address already in use" in faults[0]
    assert faults[1].endswith("-> gpu-service download owner/none")


def test_check_says_of_an_address_that_is_not_here_to_change_it() -> None:
    done = command("check", HOST="192.0.2.1", TORCH_DEVICE="cuda:7")
    assert re.search(r"FAULT +port .*192\.0\.2\.1.* -> set HOST\n", done.stdout), done.stdout


def test_check_refuses_a_device_and_a_type_that_are_not_there() -> None:
    for values, seen in [
        ({"TORCH_DEVICE": "cuda:99"}, "TORCH_DEVICE='cuda:99'"),
        ({"GPU_DTYPE": "float16"}, "float16"),
    ]:
        done = command("check", **values)
        assert done.returncode == 1
        (fault,) = [line for line in done.stdout.splitlines() if line.startswith("FAULT")]
        assert seen in fault
        assert "-> set " in fault


def test_check_says_of_a_model_that_does_not_load_that_it_does_not(tiny: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for name, data in read_folder(tiny).items():
        (broken / name).write_bytes(b"{}" if name == "model.safetensors" else data)
    done = command("check", MODEL_BERTSCORE=str(broken))
    assert done.returncode == 1
    (fault,) = [line for line in done.stdout.splitlines() if line.startswith("FAULT")]
    assert "broken could not be loaded" in fault


# --- check, on machines that are not here --------------------------------------------------------------

FAULTS = [  # (TORCH_DEVICE, torch's build, the machine, words of what was seen, words of the way out)
    (
        "auto",
        CPU,
        Machine("580.65.06"),
        "an NVIDIA card (driver 580.65.06)",
        f"torch==2.13.0 --index-url {INDEX}/cu130",
    ),
    ("auto", CPU, Machine("550.54.15"), "an NVIDIA card", f"torch==2.13.0 --index-url {INDEX}/cu126"),
    ("cuda", CPU, Machine("580.65.06"), "made for CPUs only", "TORCH_DEVICE=cpu"),
    ("auto", CPU, Machine(amd=True), "an AMD card", f"{INDEX}/rocm7.2"),
    ("auto", CUDA13, Machine(amd=True), "an AMD card", f"{INDEX}/rocm7.2"),
    ("auto", CUDA13, Machine("550.54.15"), "needs NVIDIA driver 580 or newer, and here is 550.54.15", f"{INDEX}/cu126"),
    ("auto", CUDA12, Machine("510.47.03"), "needs NVIDIA driver 525", "update the driver"),
    ("auto", CUDA13, Machine("580.65.06"), "sees no card", "--gpus all"),
]


@pytest.mark.parametrize(("wanted", "build", "machine", "seen", "way_out"), FAULTS)
def test_a_build_that_does_not_match_card_or_driver_is_a_fault_with_a_way_out(
    wanted: str, build: Build, machine: Machine, seen: str, way_out: str
) -> None:
    finding = judge_build(wanted, build, machine)
    assert seen in finding.seen
    assert way_out in finding.way_out
    assert str(finding).startswith("FAULT ")


@pytest.mark.parametrize(
    ("wanted", "build", "machine"),
    [
        ("auto", CPU, Machine()),
        ("cpu", CPU, Machine("580.65.06")),  # as asked
        ("auto", CUDA13, Machine()),  # on the CPU
        ("auto", Build("2.13.0", "13.0", devices=1), Machine("580.65.06")),
        ("auto", Build("2.13.0+cu126", "12.6", devices=2), Machine("550.54.15")),
        ("auto", Build("2.13.0+rocm7.2", None, "7.2", 1), Machine(amd=True)),
    ],
)
def test_a_build_that_matches_is_no_fault(wanted: str, build: Build, machine: Machine) -> None:
    assert not judge_build(wanted, build, machine).way_out


def raising(error: Exception) -> Callable[[], Any]:
    def probe() -> None:
        raise error

    return probe


@pytest.mark.parametrize(("capability", "index"), [((6, 1), "cu126"), ((12, 0), "cu130")])
def test_a_card_that_the_build_has_no_kernels_for_is_a_fault_with_a_way_out(
    capability: tuple[int, int], index: str
) -> None:
    error = RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore")
    finding = judge_kernels("GeForce", capability, CUDA13, ["sm_75", "sm_90"], raising(error))
    assert f"compute capability {capability[0]}.{capability[1]}" in finding.seen
    assert "only for sm_75 sm_90" in finding.seen
    assert finding.way_out.endswith(f"{INDEX}/{index}")


def test_another_error_of_the_card_is_a_fault_too_and_a_kernel_that_runs_is_none() -> None:
    finding = judge_kernels("GeForce", (7, 5), CUDA13, ["sm_75"], raising(RuntimeError("CUDA error: unknown\nmore")))
    assert (finding.seen, bool(finding.way_out)) == ("GeForce: CUDA error: unknown", True)
    assert not judge_kernels("GeForce", (7, 5), CUDA13, ["sm_75"], lambda: None).way_out


def test_a_model_that_does_not_fit_into_the_free_memory_is_a_fault(tmp_path: Path) -> None:
    assert judge_memory("embed", 2_000_000, 2_999_999).way_out
    assert not judge_memory("embed", 2_000_000, 3_000_000).way_out
    assert not judge_memory("embed", 2_000_000, None).way_out
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x" * 100)
    assert weights_bytes(tmp_path) == 100
    (tmp_path / "config.json").write_text('{"torch_dtype": "float16"}')
    assert weights_bytes(tmp_path) == 200


def test_a_drivers_version_is_read_wherever_it_stands() -> None:
    open_module = (
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\nGCC version: 12.2.0"
    )
    assert version_in(open_module) == "580.65.06"
    assert version_in("550.54\n550.54\n") == "550.54"
    assert version_in("NVIDIA-SMI has failed because it couldn't communicate with the driver") == ""

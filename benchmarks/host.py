"""Measure the host alone: the service on devices that cost nothing, against the least that such a service costs.

    python benchmarks/host.py                             all cases (about twelve minutes)
    python benchmarks/host.py --rounds 1 --seconds 1      a check of the benchmark itself
    python benchmarks/host.py --only embed-16x1           cases whose name begins so
    python benchmarks/host.py --flood                     what callers keep beside a flood of refused requests

Contenders: floor_service.py; the service on null_device.py, whose forward is skipped where it is called; and the
service as it is with a model of one layer of 32, a check from outside. Caches are off and texts are MiniLM's; wrk
drives the load, one contender runs at a time, in an order that rotates. The tables show medians over the rounds.
Processor time is that of all threads of a contender's processes, which Linux tells, by their names.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import http.client
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from bench import BENCH_DIR, HERE, base_environment, find_minilm, make_service, tell
from contenders import ContenderError, Load, Server, drive, free_port
from report import Case, Results, machine_line, median_rows, number, table
from workload import Texts

THREAD_NAMES = str(HERE / "thread_names")
CONTENDERS = ("floor", "null", "one-layer")
CASES = (
    Case("embed-1x1", "embed", 1, 1, CONTENDERS),
    Case("embed-16x1", "embed", 1, 16, CONTENDERS),
    Case("embed-4x100", "embed", 100, 4, CONTENDERS),
    Case("embed-4x100-npy", "embed", 100, 4, CONTENDERS),  # the floor knows JSON only
    Case("bertscore-16x1", "bertscore", 1, 16, CONTENDERS),
    Case("bertscore-4x100", "bertscore", 100, 4, CONTENDERS),
)
TEXTS = 20_000
WARM_UP_S = 2.0
SHOWN_US = 5.0  # threads that take less of a request are left out

HONEST_CALLERS, HONEST_TEXTS = 2, 20
FLOOD_CALLERS = 100
HONEST_KEY, FLOOD_KEY = "honest", "flood"
FLOOD_SETTINGS = ("GPU_MAX_CONCURRENT=2", "GPU_QUEUE_TIMEOUT=5", "GPU_MAX_MODELS=2")
FLOOD_SETTINGS += (f"API_KEY={HONEST_KEY},{FLOOD_KEY}",)


def parse_arguments() -> argparse.Namespace:
    """The command line, and the cases that it asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], metavar="CASE", help="cases (floods) that begin so")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8.0, help="a measurement's length, default 8")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the service")
    parser.add_argument("--flood", action="store_true", help="measure honest callers beside refused ones")
    options = parser.parse_args()
    known = FLOODS if options.flood else CASES
    options.cases = [case for case in known if not options.only or case.name.startswith(tuple(options.only))]
    if not options.cases:
        parser.error(f"--only: no such case; there are {', '.join(case.name for case in known)}")
    if not shutil.which("wrk"):
        parser.error("wrk drives the load: apt install wrk")
    return options


# --- contenders


def make_host(name: str, minilm: Path, settings: Sequence[str] = ()) -> Server:
    """The contender of this name, not started yet; its log lines are written, as in service."""
    log, port = BENCH_DIR / "logs" / f"host-{name}.log", free_port()
    if name == "floor":
        env = {**base_environment(), "PYTHONPATH": THREAD_NAMES, "MODEL_DIR": str(minilm), "PORT": str(port)}
        command = [sys.executable, str(HERE / "floor_service.py")]
        return Server(name, "float32", command, env, log, port=port, ready_path="/ready")
    given = argparse.Namespace(device="cpu", set=["LOG_LEVEL=info", f"PYTHONPATH={THREAD_NAMES}", *settings])
    if name == "null":
        given.set.insert(0, "GPU_BATCH_TOKENS=8192")  # a smaller GPU's
    model = make_one_layer(BENCH_DIR / "one-layer", minilm) if name == "one-layer" else minilm
    server = make_service("service-float32", model, given, log, port)
    server.name = name
    if name == "null":
        server.command = [sys.executable, str(HERE / "null_device.py")]
    return server


def make_one_layer(target: Path, minilm: Path) -> Path:
    """Write a model of one layer of 32 with random weights behind MiniLM's tokenizer, and return `target`.

    As a sentence-transformers folder its vectors have 384 numbers; as a BERT, for BERTScore, it is the layer alone.
    """
    if (target / "complete").exists():
        return target
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules
    from transformers import AutoTokenizer, BertConfig, BertModel

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(str(minilm))
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    bert = BertModel(BertConfig(vocab_size=len(tokenizer), **shape))
    bert.save_pretrained(target / "bert")
    tokenizer.save_pretrained(target / "bert")
    layer = modules.Transformer(str(target / "bert"), max_seq_length=256)
    dense = modules.Dense(32, 384, activation_function=torch.nn.Identity())
    SentenceTransformer(modules=[layer, modules.Pooling(32), dense, modules.Normalize()]).save(str(target))
    (target / "complete").touch()
    return target


def thread_seconds(leader: int) -> Counter[str]:
    """Processor seconds so far of each thread in a process group, by name; those of one name are added up."""
    seconds: Counter[str] = Counter()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            fields = (process / "stat").read_text().rpartition(")")[2].split()
            if int(fields[2]) != leader:
                continue
            process_name = (process / "comm").read_text().strip()
            for task in (process / "task").iterdir():
                fields = (task / "stat").read_text().rpartition(")")[2].split()
                name = re.sub(r"_\d+$", "", (task / "comm").read_text().strip())  # a pool is one row
                if task.name == process.name:
                    name = "main"
                elif name.startswith(("load-", process_name)):  # whoever used it first started its threads
                    name = "tokenizer"
                where = "service" if process.name == str(leader) else "engine"
                seconds[f"{where}: {name}"] += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        except OSError:  # it ended
            continue
    return seconds


# --- the host alone


class Run:
    """One run over all cases: what is sent, and what came of it."""

    def __init__(self, options: argparse.Namespace, minilm: Path) -> None:
        self.options, self.results = options, Results(options.cases)
        self.threads: dict[tuple[str, str], list[Counter[str]]] = {}  # us a request, by case and contender
        folder = BENCH_DIR / "host"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        texts = Texts(minilm)
        drawn = texts.draw(texts.lengths(TEXTS))
        self.pools = {kind: folder / f"{kind}.json" for kind in ("embed", "bertscore")}
        self.pools["embed"].write_text(json.dumps(drawn), encoding="utf-8")
        self.pools["bertscore"].write_text(json.dumps(texts.pairs(drawn[: TEXTS // 2])), encoding="utf-8")

    def run(self, servers: Sequence[Server]) -> None:
        """All rounds; round 0 warms up."""
        for round_number in range(self.options.rounds + 1):
            for case in self.options.cases:
                turn = round_number % len(servers)
                for server in [*servers[turn:], *servers[:turn]]:
                    self.measure(round_number, case, server)
                tell(f"round {round_number} of {self.options.rounds}: {case.name}")

    def measure(self, round_number: int, case: Case, server: Server) -> None:
        """One contender in one case."""
        seconds = self.options.seconds if round_number else min(WARM_UP_S, self.options.seconds)
        start = TEXTS // 2 // case.items * round_number // (self.options.rounds + 1)
        with server.awake():
            before = thread_seconds(server.pid)
            accept = ("Accept: application/x-npy",) if case.name.endswith("npy") else ()
            load = Load(case.kind, self.pools[case.kind], case.items, case.clients, start, seconds, accept)
            measured = server.measure(load)
            spent = thread_seconds(server.pid) - before
        if round_number:
            requests = measured.items_per_s / case.items * round(seconds)
            self.results.rounds.setdefault((case.name, server.name), []).append(measured)
            by_thread = Counter({name: 1e6 * value / requests for name, value in spent.items()})
            self.threads.setdefault((case.name, server.name), []).append(by_thread)

    def report(self) -> str:
        """The tables: rates and ratios to the floor, and processor time by thread."""
        if not self.results.rounds:
            return "Nothing was measured.\n"
        header = ("case", "contender", "items/s", "lowest to highest", "p50 ms", "p90 ms", "p99 ms", "failed")
        ratios = table(("case", "contender", "ratio to the floor", "over the rounds"), self.ratio_rows())
        by_thread = table(("contender", "processor µs a request", *self.shown()), self.thread_rows())
        return "\n\n".join([table(header, median_rows(self.results)), ratios, by_thread])

    def shown(self) -> list[str]:
        """The cases that were measured."""
        return [case.name for case in self.options.cases if self.results.shown(case)]

    def ratio_rows(self) -> list[tuple[str, ...]]:
        """Each of ours to the floor, round by round."""
        rows = []
        for case in self.options.cases:
            for name in self.results.shown(case)[1:]:
                ours, floor = (self.results.values(case, side, "items_per_s") for side in (name, "floor"))
                by_round = [a / b for a, b in zip(ours, floor)]
                ratio = statistics.median(ours) / statistics.median(floor)
                rows.append((case.name, name, f"{ratio:.2f}", f"{min(by_round):.2f} to {max(by_round):.2f}"))
        return rows

    def thread_rows(self) -> list[tuple[str, ...]]:
        """A row for each thread of each contender, after the sum of them all."""
        rows = []
        for contender in CONTENDERS:
            rounds = [self.threads.get((case, contender), []) for case in self.shown()]
            names = sorted({name for counters in rounds for counter in counters for name in counter})
            medians = {n: [statistics.median([c[n] for c in cs]) if cs else 0.0 for cs in rounds] for n in names}
            totals = [statistics.median([sum(c.values()) for c in cs]) if cs else 0.0 for cs in rounds]
            rows.append((contender, "all", *map(number, totals)))
            kept = (name for name in names if max(medians[name]) >= SHOWN_US)
            rows += [(contender, name, *(f"{value:.0f}" for value in medians[name])) for name in kept]
        return rows


# --- honest callers beside a flood


@dataclass(frozen=True)
class Flood:
    """Requests that many callers repeat as soon as they are answered."""

    name: str
    path: str
    body: str  # nothing: what the honest callers send
    key: str


FLOODS = (
    Flood("400", "/bertscore", '{"candidates": ["a"], "references": []}', FLOOD_KEY),
    Flood("401", "/embed", '{"texts": ["a"]}', "wrong"),
    Flood("503", "/embed", '{"texts": ["a"], "model": "somebody/else"}', FLOOD_KEY),  # GPU_MAX_MODELS are in use
    Flood("busy", "/embed", "", FLOOD_KEY),
)


def ask_politely(port: int, bodies: Sequence[str], seconds: float) -> tuple[float, int]:
    """A caller on a connection of its own, who waits as told where it is refused: answers a second, and refusals."""
    answered = refused = 0
    began = last = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"Content-Type": "application/json", "X-API-Key": HONEST_KEY}
    for body in itertools.cycle(bodies):
        if time.monotonic() > began + seconds:
            break
        connection.request("POST", "/embed", body, headers)
        response = connection.getresponse()
        response.read()
        if response.status == 200:
            answered, last = answered + 1, time.monotonic()
        else:
            refused += 1
            time.sleep(int(response.headers.get("Retry-After", "0")))
    connection.close()
    return (answered / (last - began) if answered else 0.0), refused


def poll_health(port: int, seconds: float) -> float:
    """The 99th percentile, in ms, of /health asked twenty times a second."""
    spent_ms = []
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    until = time.monotonic() + seconds
    while (began := time.monotonic()) < until:
        connection.request("GET", "/health")
        connection.getresponse().read()
        spent_ms.append(1e3 * (time.monotonic() - began))
        time.sleep(0.05)
    connection.close()
    return float(np.percentile(spent_ms, 99))


class FloodRun:
    """Honest callers alone and beside each flood, in turns."""

    def __init__(self, options: argparse.Namespace, server: Server, minilm: Path) -> None:
        self.options, self.server = options, server
        self.port = int(server.url.rpartition(":")[2])
        texts = Texts(minilm)
        drawn = texts.draw(texts.lengths(4_000, HONEST_TEXTS))
        calls = [drawn[n : n + HONEST_TEXTS] for n in range(0, len(drawn), HONEST_TEXTS)]
        self.bodies = [json.dumps({"texts": call}) for call in calls]
        self.rows: dict[str, list[tuple[float, ...]]] = {"alone": [], **{flood.name: [] for flood in options.cases}}

    def run(self) -> None:
        """Every round measures the honest callers alone first."""
        while not self.beside(None, 2.0)[0]:  # the model loads
            pass
        for round_number in range(self.options.rounds):
            alone = self.beside(None, self.options.seconds)
            self.rows["alone"].append((1.0, *alone))
            for flood in self.options.cases:
                measured = self.beside(flood, self.options.seconds)
                self.rows[flood.name].append((measured[0] / alone[0], *measured))
                tell(f"round {round_number + 1} of {self.options.rounds}: flood {flood.name}")

    def beside(self, flood: Flood | None, seconds: float) -> tuple[float, ...]:
        """Honest answers a second and refusals, the flood's answers and refusals a second, and /health's p99 in ms."""
        flooded_s = seconds + 2.0 if flood else 0.0  # it is there before the honest ones, and after them
        with concurrent.futures.ThreadPoolExecutor() as pool:
            flooding = pool.submit(self.flood, flood, flooded_s) if flood else None
            time.sleep(1.0 if flood else 0.0)
            shares = [self.bodies[first::HONEST_CALLERS] for first in range(HONEST_CALLERS)]
            honest = [pool.submit(ask_politely, self.port, share, seconds) for share in shares]
            health_ms = pool.submit(poll_health, self.port, seconds).result()
            rates, refusals = zip(*(caller.result() for caller in honest))
            answered, refused = flooding.result() if flooding else (0.0, 0.0)
        return sum(rates), float(sum(refusals)), answered, refused, health_ms

    def flood(self, flood: Flood, seconds: float) -> tuple[float, float]:
        """Answers and refusals a second of a flood."""
        path = BENCH_DIR / "host" / f"flood-{flood.name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join([flood.body] if flood.body else self.bodies), encoding="utf-8")
        headers = [f"X-API-Key: {flood.key}"]
        result = drive(self.server.url + flood.path, path, FLOOD_CALLERS, seconds, headers=headers)
        return result["answered"] / round(seconds), result["failed"] / round(seconds)

    def report(self) -> str:
        """A row for each flood: medians over the rounds."""
        header = (
            f"{FLOOD_CALLERS} callers beside",
            "honest answers kept",
            "lowest to highest",
            "honest answers/s",
            "honest refused",
            "flood answers/s",
            "flood refusals/s",
            "/health p99 ms",
        )
        rows = []
        for name, rounds in self.rows.items():
            if rounds:
                kept, *medians = (statistics.median(column) for column in zip(*rounds))
                spread = f"{min(row[0] for row in rounds):.2f} to {max(row[0] for row in rounds):.2f}"
                rows.append((name, f"{kept:.2f}", spread, *map(number, medians)))
        return table(header, rows)


def main() -> int:
    """Run what was asked; 1 where a contender failed, else 0."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that contenders are stopped on the way out
    options = parse_arguments()
    (BENCH_DIR / "logs").mkdir(parents=True, exist_ok=True)
    (BENCH_DIR / ".gitignore").write_text("*\n", encoding="utf-8")
    minilm, failed = find_minilm(), False
    run: Run | FloodRun
    if options.flood:
        servers = [make_host("flood", minilm, [*FLOOD_SETTINGS, *options.set])]
        servers[0].ready_path = "/health"  # /ready needs a key
        run = FloodRun(options, servers[0], minilm)
    else:
        servers = [make_host(name, minilm, options.set) for name in CONTENDERS]
        run = Run(options, minilm)
    try:
        for server in servers:
            server.start()
            if not options.flood:
                with server.awake():
                    tell(f"started {server.name}")
        run.run() if isinstance(run, FloodRun) else run.run(servers)
    except (ContenderError, OSError) as error:
        failed = True
        tell(f"cut short: {error}")
    finally:
        for server in servers:
            server.stop()
        command = shlex.join(["python", "benchmarks/host.py", *sys.argv[1:]])
        print(f"{machine_line(False)} {options.rounds} round(s) of {options.seconds:g} s. `{command}`\n")
        print(run.report())
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

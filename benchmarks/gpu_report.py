"""The first minutes on a card: does everything that needs a GPU work there, and how fast? One command, offline.

    make gpu-report                                         eight minutes on the CUDA or ROCm device
    python benchmarks/gpu_report.py --minutes 15            with more time
    python benchmarks/gpu_report.py --only xlarge           groups whose name begins so
    python benchmarks/gpu_report.py --device cpu --quick    a check of the report itself, on any machine

Whoever has a card can run it and send in the two files that it writes, `benchmarks/results/gpu-<card>-<date>.md`
and `.json`: open an issue or a pull request with them, whatever the outcome says. Nothing is downloaded and nothing
is sent. Models other than the embedded MiniLM have random weights, so every number but speed is about our forward
against transformers', not about language. About 16 GB of memory on the host are enough, and 12 GB on the card;
nothing else should run on it meanwhile.

The checks stand in gpu_checks.py and gpu_speed.py, in the order of GROUPS below; what they share in gpu_card.py.
Each group runs in a process of its own, each check in its own `try` and within its own time. A check that hangs,
kills its process or breaks the device's context is reported, and those after it run in another process. What finds
no time is listed as not run; some is kept for the service over HTTP. The exit status is 1 where a check failed or
missed its bound.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))
sys.path.append(str(Path(__file__).resolve().parent.parent))
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))  # tiny_models makes the small models
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports the hub client

import gpu_checks
import gpu_speed
from gpu_card import Card, Check, Missed, NotHere
from report import table

from gpu_engine.device import detect_device, is_fatal

HERE = Path(__file__).resolve().parent
GROUPS: dict[str, Sequence[Check]] = {
    "card": gpu_checks.CARD,
    "forward": gpu_checks.FORWARD,
    "xlarge": gpu_checks.XLARGE,
    "memory": gpu_checks.MEMORY,
    "bertscore": gpu_speed.BERTSCORE,
    "embed": gpu_speed.EMBED,
    "http": gpu_speed.HTTP,
    "assert": gpu_checks.ASSERT,  # it breaks the device's context
}
START_S = 60.0  # for a process to import its libraries
LEAST_S = 2.0  # with less left, nothing is begun
END_S = 5.0  # for a process to end what it has started
KEPT = {"http": 0.15, "assert": 0.03}  # shares of the time that the groups before leave for these
BROKE = "broke the device"  # an outcome

Result = dict[str, Any]  # of a check: name, outcome, seconds, detail, numbers
Groups = dict[str, Sequence[Check]]


# --- a process of a group ------------------------------------------------------------------------------


def run_checks(checks: Sequence[Check], card: Card, emit: Callable[[Result], None]) -> None:
    """Runs checks one after the other, and ends with the one that breaks the device's context."""
    for check in checks:
        result = run_check(check, card)
        emit(result)
        if result["outcome"] == BROKE:
            return


def run_check(check: Check, card: Card) -> Result:
    """A check's result, whatever it does."""
    if check.gpu and not card.on_gpu:
        return told(check, "needs a GPU")
    outcome, detail, numbers = "ok", "", {}
    began = time.perf_counter()
    try:
        numbers = check.run(card)
    except NotHere as reason:
        outcome, detail = "not here", str(reason)
    except Missed as missed:
        outcome, detail, numbers = "missed", str(missed), missed.numbers
    except Exception as error:
        outcome, detail = BROKE if is_fatal(error) else "failed", f"{type(error).__name__}: {error}"[:400]
    seconds = time.perf_counter() - began
    if outcome != BROKE:
        with contextlib.suppress(RuntimeError):
            gc.collect()
            card.empty_cache()
    return told(check, outcome, detail, seconds, numbers)


def told(check: Check, outcome: str, detail: str = "", seconds: float = 0.0, numbers: Any = None) -> Result:
    """A check's result as it is sent, printed and written."""
    return {
        "section": check.section,
        "name": check.name,
        "outcome": outcome,
        "seconds": round(seconds, 2),
        "detail": " ".join(detail.split()),
        "numbers": numbers or {},
    }


def child(options: argparse.Namespace, groups: Groups) -> None:
    """Runs the checks of one group, from the one that `--child` names, and writes a line of JSON for each."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints must not get between the replies
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a service is stopped on the way out
    group, _, first = options.child.partition(":")
    card = Card(options.device, options.quick, options.folder)
    run_checks(groups[group][int(first) :], card, lambda result: print(json.dumps(result, default=float), file=replies))
    replies.flush()
    os._exit(0)  # a broken context may not end by itself


# --- the process that reports --------------------------------------------------------------------------


def all_results(groups: Groups, options: argparse.Namespace, began: float, whole_s: float) -> Iterator[Result]:
    """Results as they come, of all groups in their order. began: monotonic."""
    on_gpu, names = detect_device(options.device).type == "cuda", list(groups)
    for number, name in enumerate(names):
        kept = sum(KEPT.get(later, 0.0) for later in names[number + 1 :])
        deadline, done = began + whole_s * (1 - kept), 0
        while done < len(groups[name]):
            check = groups[name][done]
            if check.gpu and not on_gpu:
                results = iter([told(check, "needs a GPU")])
            elif deadline - time.monotonic() < LEAST_S:
                results = iter([told(check, "not run", "the time is up")])
            else:
                results = group_results(name, groups[name], done, options, deadline)
            for result in results:
                done += 1
                yield result


def group_results(
    group: str, checks: Sequence[Check], first: int, options: argparse.Namespace, deadline: float
) -> Iterator[Result]:
    """Results of a group's checks from the first on: until all are done, or their process ended or was ended."""
    log = options.folder / f"{group}.log"
    command = [sys.executable, str(options.script), "--child", f"{group}:{first}", "--device", options.device]
    command += ["--folder", str(options.folder), *(["--quick"] if options.quick else [])]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    with log.open("wb") as errors:
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": errors}
        process = subprocess.Popen(command, **streams, text=True, env=env, start_new_session=True)
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=read_lines, args=(process.stdout, lines), daemon=True).start()
    limit_s = START_S
    try:
        for check in checks[first:]:
            limit_s = min(limit_s + check.seconds, max(LEAST_S, deadline - time.monotonic()))
            try:
                line = lines.get(timeout=limit_s)
            except queue.Empty:
                yield told(check, "failed", f"not done after {limit_s:.0f} s; its process was ended", limit_s)
                return
            if not line:
                yield told(check, "failed", f"its process ended with {process.wait()}: {last_words(log)}")
                return
            result: Result = json.loads(line)
            yield result
            if result["outcome"] == BROKE:
                return
            limit_s = 0.0
    finally:
        end(process)


def read_lines(stream: Any, lines: queue.Queue[str]) -> None:
    """Hands over each line, then an empty one."""
    for line in stream:
        lines.put(line)
    lines.put("")


def last_words(log: Path) -> str:
    """The end of what a process wrote to standard error."""
    return log.read_text(encoding="utf-8", errors="replace").strip()[-300:]


def end(process: subprocess.Popen[str]) -> None:
    """Ends a process: politely, for it may have started a service, then with all that is left of it."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_S)  # one that hangs in a driver may not end at all


# --- what is written -----------------------------------------------------------------------------------


def shown(value: Any) -> str:
    """A number, a text or several of them, for a table's cell."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {shown(each)}" for name, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(shown, value))
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value).replace("|", "\\|")


def row(result: Result) -> tuple[str, ...]:
    """A check's row."""
    numbers = (f"{name}: {shown(value)}" for name, value in result["numbers"].items())
    last = "; ".join(filter(None, [shown(result["detail"]), *numbers]))
    return str(result["section"]), result["name"], result["outcome"], f"{result['seconds']:.1f}", last


def markdown(machine: dict[str, Any], results: Sequence[Result], command: str) -> str:
    """The report: the machine, how many checks ended how, and a row for each."""
    outcomes = [result["outcome"] for result in results]
    counts = ", ".join(f"{outcomes.count(each)} {each}" for each in dict.fromkeys(outcomes))
    rows = [row(result) for result in results]
    head = "\n".join(f"- {name}: {shown(value)}" for name, value in machine.items())
    columns = ("", "check", "outcome", "s", "numbers")
    return f"# {machine.get('card', 'unknown card')}\n\n{head}\n\n`{command}`: {counts}.\n\n{table(columns, rows)}\n"


def write(options: argparse.Namespace, results: Sequence[Result], seconds: float) -> Path:
    """Writes both files and returns the path of the Markdown."""
    machine = next((each["numbers"] for each in results if each["name"] == "versions"), {})
    now = datetime.now(timezone.utc)
    name = re.sub(r"[^a-z0-9]+", "-", str(machine.get("card", "unknown")).lower()).strip("-")
    path = options.out or HERE / "results" / f"gpu-{name}-{now:%Y-%m-%d}.md"
    command = " ".join(["gpu_report.py", *sys.argv[1:]])
    told_when = {**machine, "date": f"{now:%Y-%m-%d %H:%M} UTC", "seconds": round(seconds, 1)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(markdown(told_when, results, command), encoding="utf-8")
    report = {"machine": told_when, "command": command, "checks": results}
    path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return path


def parse_arguments() -> argparse.Namespace:
    """The command line; `--child` and `--folder` are for the processes that this one starts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="cuda, cuda:1, cpu; default: the GPU where there is one")
    parser.add_argument("--quick", action="store_true", help="tiny models and loads: only whether the checks run")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything, default 8")
    parser.add_argument("--only", action="append", default=[], metavar="GROUP", help=f"of {', '.join(GROUPS)}")
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="beside it a .json is written")
    parser.add_argument("--child", metavar="GROUP:FIRST", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "auto" and detect_device("auto").type == "cpu":
        parser.error("torch sees no GPU here; --device cpu --quick tries the report itself")
    options.script = Path(sys.argv[0]).resolve()
    return options


def main(groups: Groups = GROUPS) -> int:
    """Runs everything, prints results as they come, and writes them down; what is there, when it is interrupted."""
    options = parse_arguments()
    if options.child:
        child(options, groups)
    chosen = {name: groups[name] for name in groups if not options.only or name.startswith(("card", *options.only))}
    results: list[Result] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu-report-") as folder:
        options.folder = Path(folder)
        try:
            for result in all_results(chosen, options, began, 60 * options.minutes):
                results.append(result)
                section, name, outcome, seconds, last = row(result)
                print(f"{section} {name:<34} {outcome:<11} {seconds:>6} s  {last}", flush=True)
        finally:
            path = write(options, results, time.monotonic() - began)
    print(f"\nwritten: {path} and {path.with_suffix('.json').name}; please send both in, whatever they say")
    return int(any(result["outcome"] in ("failed", "missed", BROKE) for result in results))


if __name__ == "__main__":
    sys.exit(main())

"""What a service behind a proxy does: answers a second, and the processor time of each process a request.

    python benchmarks/scale.py http://127.0.0.1:8765 http://127.0.0.1:8766 --key change-me

The addresses take turns, so that what else the machine does falls on all of them. Only on Linux, and on the machine
of all the processes, which are known by the key in their environment or their parent's. wrk drives the load.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

from bench import find_minilm
from contenders import drive
from workload import Texts

CASES = {"1 x 1": (1, 1), "16 x 1": (16, 1), "4 x 20": (4, 20)}  # clients x texts a request
PROCESSES = (
    "gpu_service.py",
    "null_device.py",
    "gpu_engine",
    "ServeReplica",
    "ProxyActor",
    "haproxy",
    "ServeController",
    "raylet",
)


def main() -> None:
    """Prints a row for each case and address, the median of the rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("urls", nargs="+")
    parser.add_argument("--key", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0)
    options = parser.parse_args()
    print("| case | address | answers/s | failed | µs of processor a request |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for case, (clients, items) in CASES.items():
            bodies, rows = write_bodies(Path(folder, "bodies"), items), defaultdict(list)
            for number, url in itertools.product(range(options.rounds), options.urls):
                before = processor_us(options.key)
                result = drive(
                    f"{url}/embed",
                    bodies,
                    clients,
                    options.seconds,
                    start=number,
                    headers=[f"X-API-Key: {options.key}"],
                )
                spent = processor_us(options.key) - before
                rows[url].append((result, spent))
            for url, measured in rows.items():
                print(f"| {case} | {url} | {row(measured)} |", flush=True)


def write_bodies(file: Path, items: int) -> Path:
    """Bodies with MiniLM's texts, one a line."""
    texts = Texts(find_minilm())
    drawn = texts.draw(texts.lengths(2_000))
    calls = [drawn[first : first + items] for first in range(0, len(drawn) - items + 1, items)]
    file.write_text("".join(json.dumps({"texts": call}) + "\n" for call in calls))
    return file


def processor_us(key: str) -> Counter[str]:
    """Processor time so far of the processes of PROCESSES that have this key, in microseconds."""
    spent: Counter[str] = Counter()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            fields = (process / "stat").read_text().rpartition(") ")[2].split()
            name = next((name for name in PROCESSES if name in command), None)
            if name and any(
                key.encode() in Path(f"/proc/{pid}/environ").read_bytes() for pid in (process.name, fields[1])
            ):
                spent[name] += 1_000_000 * (int(fields[11]) + int(fields[12])) // os.sysconf("SC_CLK_TCK")
    return spent


def row(measured: list[tuple[dict[str, float], Counter[str]]]) -> str:
    """Medians: answers a second, failures in all, and the time of each process that took any."""
    rates = [result["answered"] / result["seconds"] for result, _ in measured]
    parts = []
    for name in PROCESSES:
        spent = statistics.median(spent[name] / max(1, result["answered"]) for result, spent in measured)
        if spent >= 5:
            parts.append(f"{name} {spent:,.0f}")
    failed = sum(result["failed"] for result, _ in measured)
    return f"{statistics.median(rates):,.0f} | {failed:.0f} | {', '.join(parts)}"


if __name__ == "__main__":
    main()

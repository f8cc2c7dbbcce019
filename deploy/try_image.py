"""Builds an image and tries it for real, without a daemon: `make try-image`, as root, with Debian's buildah.

    python3 deploy/try_image.py [--file Dockerfile] [-- more arguments of `buildah build`]

The base comes from its registry or, where none can be reached, is a Debian with Python in it that debootstrap makes,
tagged as the base. Then, in a container without a namespace of its own for the network: the user, what README.md's
curl lines answer, the health check's command, an engine that is killed and comes back, and the stop by SIGTERM.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
IMAGE = "localhost/gpu-service:try"
DEBIAN, MIRROR = "bookworm", "http://deb.debian.org/debian"
PACKAGES = "python3,python3-pip,python3-venv,python-is-python3,ca-certificates"
STOP_S = 80


class Buildah:
    """buildah on a storage of its own. It needs neither a daemon nor an overlay."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        places = ["--root", str(folder / "storage"), "--runroot", str(folder / "run"), "--storage-driver", "vfs"]
        self.command = ["buildah", *places]

    def __call__(self, *words: str, **more: Any) -> str:
        """Runs a command; what it printed on standard output."""
        return subprocess.check_output([*self.command, *words], text=True, **more).strip()

    def status(self, *words: str) -> int:
        """Runs a command; its exit code."""
        return subprocess.run([*self.command, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode


def say(text: str) -> None:
    """A line that tells how far it is."""
    print(f"--- {text}", flush=True)


def make_base(buildah: Buildah, base: str) -> None:
    """The base that a Dockerfile names: pulled, or made by debootstrap where that fails."""
    pull = ["timeout", "120", *buildah.command, "pull", f"docker.io/library/{base}"]
    if subprocess.run(pull, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0:
        say(f"{base} was pulled")
        return
    say(f"{base} can't be pulled: a Debian {DEBIAN} with its own Python takes its place")
    tree = buildah.folder / "debian"
    command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", DEBIAN, str(tree), MIRROR]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    for mark in tree.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):  # Debian's pip would refuse; the real base's does not
        mark.unlink()
    container = buildah("from", "scratch")
    buildah("add", "--quiet", container, str(tree), "/")
    buildah("config", "--env", "PATH=/usr/local/bin:/usr/local/sbin:/usr/bin:/usr/sbin:/bin:/sbin", container)
    buildah("commit", "--quiet", "--rm", container, f"docker.io/library/{base}")
    shutil.rmtree(tree)


def build(buildah: Buildah, dockerfile: Path, more: list[str]) -> dict[str, Any]:
    """Builds the image; its configuration."""
    found = re.search(r"^FROM (\S+)", dockerfile.read_text("utf-8"), re.MULTILINE)
    assert found is not None
    make_base(buildah, found[1])
    say(f"building {dockerfile.name}")
    options = ["--isolation", "chroot", "--format", "docker", "--pull-never", "--tag", IMAGE, "--file", str(dockerfile)]
    options += ["--from", f"docker.io/library/{found[1]}", *more]
    subprocess.run([*buildah.command, "build", *options, str(ROOT)], check=True)
    config: dict[str, Any] = json.loads(buildah("inspect", "--type", "image", IMAGE))["Docker"]["config"]
    assert config["User"] == "10001:10001", config["User"]
    assert list(config["Volumes"]) == ["/models"]
    every_s = config["Healthcheck"]["Interval"] / 1e9
    say(f"user {config['User']}, command {config['Cmd']}, health check every {every_s:g} s")
    return config


class Running:
    """A container in which the image's command runs as it would under a daemon, on a port that is free."""

    def __init__(self, buildah: Buildah, config: dict[str, Any]) -> None:
        self.buildah, self.config = buildah, config
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.container = buildah("from", "--pull-never", IMAGE)
        self.root = Path(buildah("mount", self.container))
        command = shlex.join(config["Cmd"])  # buildah tells no signal from a failure, so the shell writes how it ended
        self.started = self.run(f"{command} & echo $! > /tmp/pid; wait $!; echo $? > /tmp/code")
        until(lambda: (self.root / "tmp/pid").read_text().strip(), "it never started")
        self.pid = int((self.root / "tmp/pid").read_text())

    def run(self, script: str) -> subprocess.Popen[bytes]:
        """Starts a line of shell in the container, with its environment and user."""
        settings = {"PORT": str(self.port), "MODEL_BERTSCORE": "all-MiniLM-L6-v2", "GPU_DTYPE": "float32"}
        env = [part for name, value in settings.items() for part in ("--env", f"{name}={value}")]
        run = ["run", "--isolation", "chroot", "--user", self.config["User"], *env, self.container]
        return subprocess.Popen([*self.buildah.command, *run, "--", "/bin/sh", "-c", script])

    def get(self, path: str, **body: Any) -> tuple[int, Any]:
        """The status and the JSON of an answer; status 0 where there is none."""
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, None
        except OSError:
            return 0, None

    def children(self) -> list[int]:
        """The processes that the service started, each from a thread of its own."""
        files = Path(f"/proc/{self.pid}/task").glob("*/children")
        return [int(pid) for file in files for pid in file.read_text().split()]

    def healthy(self) -> bool:
        """What the health check's own command says."""
        return self.run(shlex.join(self.config["Healthcheck"]["Test"][1:]) + " 2>/dev/null").wait() == 0


def until(condition: Any, what: str, timeout_s: float = 180.0) -> Any:
    """The first true value of `condition`, which may raise OSError or ValueError meanwhile."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError):
            if value := condition():
                return value
        time.sleep(0.1)
    sys.exit(f"try_image: {what}")


def same(shown: Any, seen: Any) -> bool:
    """Whether an answer is the README's, to the digits that may differ, the versions in `hash` aside."""
    if isinstance(shown, dict):
        return shown.keys() == seen.keys() and all(name == "hash" or same(shown[name], seen[name]) for name in shown)
    if isinstance(shown, list):
        return len(shown) == len(seen) and all(map(same, shown, seen))
    return math.isclose(shown, seen, abs_tol=1e-4) if isinstance(shown, float) else bool(shown == seen)


def curl_lines() -> Iterator[tuple[str, Any]]:
    """README.md's curl lines, and the answer that stands below each."""
    text = (ROOT / "README.md").read_text("utf-8")
    for command, answer in re.findall(r"```bash\n(curl [^`]+?)```\s+```json\n([^`]+?)```", text):
        if "localhost:8765" in command:
            yield command, json.loads(answer)


def try_it(running: Running) -> None:
    """Goes through what the image promises; ends the program at the first that does not hold."""
    until(lambda: running.get("/ready")[0] == 200, "it never became ready")
    status = Path(f"/proc/{running.pid}/status").read_text()
    assert re.search(r"^Uid:\t10001\t10001", status, re.MULTILINE), status
    assert running.run("touch /models/mine && ! touch /app/mine 2>/dev/null").wait() == 0
    say("runs as 10001, which may write models and not the code")
    for command, shown in curl_lines():
        done = subprocess.run(
            ["bash", "-c", command.replace("8765", str(running.port))], capture_output=True, check=True
        )
        assert same(shown, json.loads(done.stdout)), f"{command}\n{done.stdout!r}"
        say(f"README: {command.splitlines()[0]}")
    assert running.healthy()
    say("the health check's command succeeds")
    (engine,) = running.children()
    os.kill(engine, signal.SIGKILL)
    until(lambda: running.children() and running.children() != [engine], "the engine did not come back")
    until(lambda: running.get("/embed", texts=["a"])[0] == 200, "it does not embed after its engine was killed")
    say("the engine was killed, came back and computes")
    began = time.monotonic()
    os.kill(running.pid, signal.SIGTERM)
    running.started.wait(STOP_S)
    code = int((running.root / "tmp/code").read_text())
    assert code in (0, 128 + signal.SIGTERM), code
    assert running.get("/health")[0] == 0
    assert not running.healthy()
    say(f"stopped by SIGTERM within {time.monotonic() - began:.1f} s, exit code {code}; the health check fails now")


def main() -> int:
    """Builds and tries one image."""
    parser = argparse.ArgumentParser(description="build an image and try it, without a daemon")
    parser.add_argument("--file", default="Dockerfile", help="which Dockerfile (default: %(default)s)")
    parser.add_argument("more", nargs="*", help="after --: more arguments of `buildah build`")
    arguments = parser.parse_args()
    missing = [name for name in ("buildah", "debootstrap") if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        sys.exit(f"try_image: needs root, and on Debian: apt install {' '.join(missing or ['buildah', 'debootstrap'])}")
    with tempfile.TemporaryDirectory(prefix="try-image-") as folder:
        buildah = Buildah(Path(folder))
        try:
            config = build(buildah, ROOT / arguments.file, arguments.more)
            running = Running(buildah, config)
            try:
                try_it(running)
            finally:
                running.started.kill()
                with contextlib.suppress(ProcessLookupError):
                    os.kill(running.pid, signal.SIGKILL)
        finally:
            buildah.status("rm", "--all")  # nothing stays mounted in the folder that goes now
    say("all is well")
    return 0


if __name__ == "__main__":
    sys.exit(main())

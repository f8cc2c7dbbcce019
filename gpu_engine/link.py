"""The service's side of the boundary: starts the engine, sends, receives, notices its death. Imports no torch.

One life of an engine is one `Life`; whoever is told of its death begins the next.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

from gpu_engine.messages import Channel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Launched:
    """A started engine: its connection, how to kill it, and how to wait for its end, which says how it ended."""

    connection: Any
    kill: Callable[[], None]
    wait: Callable[[], str]


Launch = Callable[[], Launched]


def launch_process() -> Launched:
    """Starts an engine in a process of its own, which a framework's worker process may do as well as any other."""
    if os.name == "nt":
        return launch_at_an_address()
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setblocking(True)  # whatever a library has made the default
    with ours, theirs:
        process = start_python(str(theirs.fileno()), stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        return Launched(Connection(ours.detach()), process.kill, lambda: how_it_ended(process.wait()))


def launch_at_an_address() -> Launched:
    """The same over a named pipe or a socket with a key, for systems where a process inherits no socket."""
    key = secrets.token_bytes(32)
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        address = None if os.name == "nt" else os.path.join(folder, "engine")
        with Listener(address, authkey=key) as listener:
            process = start_python(str(listener.address), stdin=subprocess.PIPE)
            threading.Thread(target=wake_listener, args=(process, listener.address), daemon=True).start()
            try:
                assert process.stdin is not None
                with process.stdin:
                    process.stdin.write(key)
                connection = listener.accept()
            except Exception as error:  # it died before it took its key, or, from `wake_listener`, before it came
                process.kill()
                raise OSError(how_it_ended(process.wait())) from error
    return Launched(connection, process.kill, lambda: how_it_ended(process.wait()))


def wake_listener(process: subprocess.Popen[bytes], address: Any) -> None:
    """Ends a wait for a process that is gone; nothing happens where it came before."""
    process.wait()
    with contextlib.suppress(Exception):
        Client(address).close()


def start_python(argument: str, **options: Any) -> subprocess.Popen[bytes]:
    """The interpreter of this process, on this folder. What it logs comes as messages; Ctrl+C does not reach it."""
    command = [sys.executable, str(Path(__file__).resolve().parent), argument]
    environment = {name: value for name, value in os.environ.items() if name.upper() != "API_KEY"}  # it needs none
    return subprocess.Popen(command, start_new_session=True, env=environment, **options)


def how_it_ended(code: int) -> str:
    """The words for an exit code; signal 9 is often the system, short of memory."""
    if code == 70:
        return "ended, because its device is not usable any more"
    return f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"


def launch_in_thread(load: Callable[..., Any]) -> Launched:
    """The same loop in a thread of this process, on what `load(kind, name, options, progress)` makes. Imports torch."""
    from gpu_engine.process import serve

    ours, theirs = socket.socketpair()
    ends: list[int] = []

    def hang_up() -> None:
        with contextlib.suppress(OSError):
            ours.shutdown(socket.SHUT_RDWR)

    def leave(code: int) -> None:
        ends.append(code)
        hang_up()

    def run() -> None:
        try:
            with Connection(theirs.detach()) as connection:
                serve(connection, leave, load)
        finally:
            hang_up()

    thread = threading.Thread(target=run, name="engine", daemon=True)
    thread.start()

    def wait() -> str:
        thread.join(10.0)
        ours.close()
        return how_it_ended(ends[0] if ends else 0)

    return Launched(Connection(os.dup(ours.fileno())), hang_up, wait)


class Life:
    """One life of an engine: what is sent to it waits until it is up, and its death is told once.

    on_messages, on_end: called on this life's thread, with all messages that arrived, and with how it ended.
    delay_s: to wait before it is started.
    """

    def __init__(
        self,
        launch: Launch,
        on_messages: Callable[[Life, list[Any]], None],
        on_end: Callable[[Life, str], None],
        delay_s: float = 0.0,
    ) -> None:
        self._launch, self._on_messages, self._on_end, self._delay_s = launch, on_messages, on_end, delay_s
        self._early: list[Any] = []  # messages that wait for it to be up
        self._lock = threading.Lock()
        self._channel: Channel | None = None
        self._over = threading.Event()
        self._launched: Launched | None = None
        self._thread = threading.Thread(target=self._run, name="engine-link", daemon=True)
        self._thread.start()

    def send(self, message: Any) -> None:
        """Sends a message as soon as the engine can take it; does not wait."""
        with self._lock:
            if self._channel is None:
                self._early.append(message)
                return
        self._channel.send(message)

    def kill(self) -> None:
        """Ends the engine at once; it is told as any death."""
        self._over.set()
        if self._launched is not None:
            self._launched.kill()

    def end(self, last: Any, timeout_s: float) -> None:
        """Sends a last message and waits for the end that it brings; kills what is not over by then."""
        self.send(last)
        if self._launched is None:
            self._over.set()
        self._thread.join(timeout_s)
        self.kill()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        if self._over.wait(self._delay_s):
            return
        try:
            launched = self._launched = self._launch()
        except Exception as error:  # whatever it is, its death has to be told
            self._on_end(self, f"could not be started: {error}")
            return
        if self._over.is_set():  # it was killed on the way
            launched.kill()
        channel = Channel(launched.connection)
        with self._lock:
            self._channel = channel
            for message in self._early:
                channel.send(message)
        try:
            while True:
                self._on_messages(self, channel.receive())
        except (EOFError, OSError):
            pass  # it is gone
        except Exception:
            log.exception("a message of the engine could not be read")
        launched.kill()  # what may be left of it
        channel.finish()
        self._on_end(self, launched.wait())

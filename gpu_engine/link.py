"""The service's side of the boundary: starts the engine, sends, receives, notices its death. Imports no torch.

One life of an engine is one `Life`; whoever is told of its death begins the next.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import pickle
import secrets
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
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


def start_python(*arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    """The interpreter of this process, on this folder. What it logs comes as messages; Ctrl+C does not reach it."""
    command = [sys.executable, str(Path(__file__).resolve().parent), *arguments]
    environment = {name: value for name, value in os.environ.items() if name.upper() != "API_KEY"}  # it needs none
    return subprocess.Popen(command, env=environment, **{"start_new_session": True, **options})


def run_check(request: dict[str, Any]) -> int:
    """Runs `gpu_engine/check.py` on this terminal; its exit code. request: what its `main` takes."""
    with start_python("check", json.dumps(request), start_new_session=False) as process:
        return process.wait()


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


AT_ONCE = 4  # messages after which a turn of the loop sends: the engine begins while the others are still being read


class LoopChannel:
    """The service's side as part of its event loop: no thread stands between, and nothing waits. Event loop only.

    Frames are those of multiprocessing's `Connection`: four bytes of length, big-endian, and a pickle. on_messages:
    called with all that arrived at once. on_end: called when the other side is gone, or says what can't be read.
    """

    def __init__(
        self,
        loop: Any,
        connection: Any,
        on_messages: Callable[[list[Any]], None],
        on_end: Callable[[], None],
    ) -> None:
        """Raises NotImplementedError where this loop can't watch this connection, as on Windows."""
        self._loop, self._on_messages, self._on_end = loop, on_messages, on_end
        self._connection = connection
        self._incoming, self._unsent = bytearray(), bytearray()
        self._outgoing: list[Any] = []
        loop.add_reader(connection.fileno(), self._read)
        self._socket = socket.socket(fileno=os.dup(connection.fileno()))
        self._socket.setblocking(False)

    def send(self, message: Any) -> None:
        """Sends a message with others of this turn of the loop."""
        self._outgoing.append(message)
        if len(self._outgoing) == 1:
            self._loop.call_soon(self._flush)
        elif len(self._outgoing) >= AT_ONCE:
            self._flush()

    def close(self) -> None:
        """Forgets the other side."""
        self._loop.remove_reader(self._connection.fileno())
        self._loop.remove_writer(self._connection.fileno())
        self._socket.close()
        self._connection.close()

    def _flush(self) -> None:
        messages, self._outgoing = self._outgoing, []
        if not messages or self._connection.closed:  # a fourth message has sent them
            return
        payload = pickle.dumps(messages, pickle.HIGHEST_PROTOCOL)
        waits = bool(self._unsent)
        long = len(payload) > 0x7FFFFFFF
        self._unsent += struct.pack("!iQ", -1, len(payload)) if long else struct.pack("!i", len(payload))
        self._unsent += payload
        if not waits:
            self._write()

    def _write(self) -> None:
        try:
            del self._unsent[: self._socket.send(self._unsent)]
        except BlockingIOError:
            pass
        except OSError:  # it is gone: `_read` hears of it
            self._unsent.clear()
        if self._unsent:
            self._loop.add_writer(self._connection.fileno(), self._write)
        else:
            self._loop.remove_writer(self._connection.fileno())

    def _read(self) -> None:
        try:
            data = self._socket.recv(1 << 18)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self._incoming += data
        try:
            messages = [message for frame in self._frames() for message in frame] if data else []
        except Exception:
            log.exception("a message of the engine could not be read")
            data = messages = []  # type: ignore[assignment]
        if messages:
            self._on_messages(messages)
        if not data:
            self._loop.remove_reader(self._connection.fileno())
            self._on_end()

    def _frames(self) -> Iterator[list[Any]]:
        """Lists of messages, as far as they are complete."""
        while len(self._incoming) >= 4:
            first, (size,) = 4, struct.unpack_from("!i", self._incoming)
            if size < 0:
                if len(self._incoming) < 12:
                    return
                first, (size,) = 12, struct.unpack_from("!Q", self._incoming, 4)
            if len(self._incoming) < first + size:
                return
            with memoryview(self._incoming) as whole, whole[first : first + size] as frame:
                messages = pickle.loads(frame)
            del self._incoming[: first + size]
            yield messages


class Life:
    """One life of an engine: what is sent to it waits until it is up, and its death is told once. Event loop only.

    loop: asyncio's, on which on_messages and on_end are called, with all messages that arrived, and with how it ended.
    delay_s: to wait before it is started.
    """

    def __init__(
        self,
        loop: Any,
        launch: Launch,
        on_messages: Callable[[Life, list[Any]], None],
        on_end: Callable[[Life, str], None],
        delay_s: float = 0.0,
    ) -> None:
        self._loop, self._launch, self._delay_s = loop, launch, delay_s
        self._on_messages, self._on_end = on_messages, on_end
        self._early: list[Any] = []  # messages that wait for it to be up
        self._channel: Channel | LoopChannel | None = None
        self._over, self._gone = threading.Event(), threading.Event()
        self._launched: Launched | None = None
        self._thread = threading.Thread(target=self._run, name="engine-link", daemon=True)
        self._thread.start()

    def send(self, message: Any) -> None:
        """Sends a message as soon as the engine can take it; does not wait."""
        if self._channel is None:
            self._early.append(message)
        else:
            self._channel.send(message)

    def kill(self) -> None:
        """Ends the engine at once; it is told as any death."""
        self._over.set()
        self._gone.set()
        if self._launched is not None:
            self._launched.kill()

    def end(self, timeout_s: float) -> None:
        """Waits, on a thread of the caller's, for the end that a last message brings; kills it where none comes."""
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
            call_in(self._loop, self._on_end, self, f"could not be started: {error}")
            return
        if self._over.is_set():  # it was killed on the way
            launched.kill()
        call_in(self._loop, self._attach, launched.connection)
        self._gone.wait()
        launched.kill()  # what may be left of it
        call_in(self._loop, self._detach)
        call_in(self._loop, self._on_end, self, launched.wait())

    def _attach(self, connection: Any) -> None:
        on_messages = functools.partial(self._on_messages, self)
        try:
            self._channel = LoopChannel(self._loop, connection, on_messages, self._gone.set)
        except OSError as error:  # no file descriptor is left: as if it had died
            log.error("the engine can't be heard: %s", error)
            self._loop.remove_reader(connection.fileno())
            self._gone.set()
            return
        except NotImplementedError:
            self._channel = Channel(connection)
            threading.Thread(target=self._receive, args=(self._channel, on_messages), daemon=True).start()
        early, self._early = self._early, []
        for message in early:
            self._channel.send(message)

    def _detach(self) -> None:
        if isinstance(self._channel, LoopChannel):
            self._channel.close()
        elif self._channel is not None:
            self._channel.finish(0.0)

    def _receive(self, channel: Channel, on_messages: Callable[[list[Any]], None]) -> None:
        """Receives on a thread, where the loop can't."""
        try:
            while True:
                call_in(self._loop, on_messages, channel.receive())
        except (EOFError, OSError):
            pass  # it is gone
        except Exception:
            log.exception("a message of the engine could not be read")
        self._gone.set()


def call_in(loop: Any, function: Callable[..., Any], *args: Any) -> None:
    """Calls `function` on a loop from another thread; nothing happens where the loop is closed."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(function, *args)

"""Gives the system's threads the names of Python's, so that /proc tells what each one's processor time is for.

Python imports a module of this name at its start; host.py puts this folder into PYTHONPATH, which the engine's process
inherits. Linux keeps fifteen characters. A thread that a library starts has the name of the thread that started it.
"""

import contextlib
import threading
from pathlib import Path

run = threading.Thread.run


def run_named(thread: threading.Thread) -> None:
    with contextlib.suppress(OSError):
        Path(f"/proc/self/task/{thread.native_id}/comm").write_text(thread.name[:15])
    run(thread)


threading.Thread.run = run_named  # type: ignore[method-assign]

"""Starts the engine's process: `python gpu_engine`, by the service; its folder need not be on Python's path."""

import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # they are sent to all of a group; the service says when to stop
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from gpu_engine.process import main

    main(sys.argv[1:])

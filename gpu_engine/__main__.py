"""Starts the engine's process, or `check`: `python gpu_engine`, by the service, from wherever its folder lies."""

import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    if sys.argv[1:2] == ["check"]:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        try:
            from gpu_engine.check import main
        except (ImportError, OSError) as error:  # a library of the system that a wheel needs may be missing, too
            sys.exit(f"FAULT  torch      can't be imported: {error} -> python -m pip install -r requirements.txt")
        main(sys.argv[2:])
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # they are sent to all of a group; the service says when to stop
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    from gpu_engine.process import main

    main(sys.argv[1:])

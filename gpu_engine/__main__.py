"""Starts the engine's process: `python gpu_engine`, by the service; its folder need not be on Python's path."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from gpu_engine.process import main

    main(sys.argv[1:])

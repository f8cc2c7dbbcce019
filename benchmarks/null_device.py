"""The service on a device that costs nothing: what is left is what the host costs.

The engine is the real one up to where the forward is called, on the padded path that a GPU takes; there it gets
hidden states that were ready before. What follows a forward (pooling, matching) is computed.

    PORT=8766 python benchmarks/null_device.py      settings as gpu_service.py's; models of hidden size 384
    python benchmarks/null_device.py FD             its engine, which it starts itself
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpu_engine.link import Launched

sys.path.append(str(Path(__file__).resolve().parent.parent))

HIDDEN = 384
MOST_ROWS = 1 << 15  # padded tokens of the largest batch


def serve() -> None:
    """The service's process: gpu_service.serve with another engine."""
    import gpu_service

    settings = gpu_service.read_settings()
    app = gpu_service.create_app(settings)
    app.state.runtime = gpu_service.Runtime(settings, launch=launch)
    gpu_service.configure_logging(settings)
    listeners = gpu_service.bind(settings.host, settings.port)
    gpu_service.Server(gpu_service.uvicorn_config(app, settings)).run(listeners)


def launch() -> Launched:
    """Starts this file as the engine's process."""
    from gpu_engine.link import Launched, how_it_ended

    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, __file__, str(theirs.fileno())]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
    return Launched(Connection(ours.detach()), process.kill, lambda: how_it_ended(process.wait()))


def compute(descriptor: int) -> None:
    """The engine's process: gpu_engine.process.main with models that have no forward."""
    import torch

    from gpu_engine import process, worker
    from gpu_engine.loading import EngineLoader
    from gpu_engine.model_files import Hub

    class NullEncoder:
        dtype = torch.float32
        rows = torch.randn(MOST_ROWS, HIDDEN)

        def __call__(self, batch: Any, num_layers: int) -> torch.Tensor:
            return self.rows[: len(batch.ids)]

    worker.available_cores = lambda: 1  # the thread that drives a GPU has no others to share an operator with
    loader, null = EngineLoader(torch.device("cpu"), Hub()), NullEncoder()

    def load(*arguments: Any) -> Any:
        engine = loader.load(*arguments)
        engine.tokens.encoder = lambda dtype: null
        engine.tokens.lanes = None  # a GPU has none
        return engine

    process.serve(Connection(descriptor), os._exit, load, process.log_to_service)
    os._exit(0)


if __name__ == "__main__":
    compute(int(sys.argv[1])) if sys.argv[1:] else serve()

"""The service on Ray Serve: one process of it a replica, with an engine of its own. README.md beside this says how.

Serve decides how many replicas there are, which one a request goes to, and when one is replaced. What happens inside
of one is the service's own business, as without Ray: its queue, its refusals, its key, its settings.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable
from typing import Any

from fastapi import FastAPI
from prometheus_client import Metric
from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from ray.serve.metrics import Gauge
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import gpu_service

# Refusals that a replica may hold back (`gpu_service.Pacing`) while others are served: one caller's, for five seconds.
HELD_BACK = 1500
QUEUED_AT_A_PROXY = 256  # on their way to a replica, or waiting for the first one; bodies of 32 MiB each at most
RETRY_S = 3  # after which another replica, or the same one started again, has had time


class ReplicaName:
    """Says in each answer which replica it came from: jobs, /status and the caches are one replica's own."""

    def __init__(self, app: ASGIApp, name: str) -> None:
        self.app, self.name = app, name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Replica"] = self.name
            await send(message)

        await self.app(scope, receive, send_named)


def build_app() -> FastAPI:
    """The service's app, made in the replica that serves it, from that replica's environment."""
    settings = gpu_service.read_settings()
    gpu_service.configure_logging(settings)
    gpu_service.warn_at_start(settings)
    app = gpu_service.create_app(settings)
    app.add_middleware(ReplicaName, name=serve.get_replica_context().replica_id.unique_id)
    return app


@serve.deployment(name="GpuService")
@serve.ingress(build_app)
class Replica:
    """One process of the service. Serve calls it; `app`, which build_app made, is what answers."""

    app: Any

    def __init__(self) -> None:
        self.loaded, self.metrics = False, RayMetrics()

    async def check_health(self) -> None:
        """Asked once before the first request, and then every few seconds. Raises RuntimeError with the reason.

        The first time it waits for the default models: a replica that could not answer yet gets no requests, and an
        update that can't load them stops at the first replica. Ray gets the service's numbers with each answer.
        """
        runtime = self.app.state.runtime
        if not self.loaded:
            await default_models(runtime)
            self.loaded = True
        self.metrics.show(gpu_service.Collector(self.app.state.metrics, runtime).collect())
        status, body = gpu_service.view_health(runtime)
        if status != 200:
            raise RuntimeError(body["detail"])


async def default_models(runtime: gpu_service.Runtime) -> None:
    """Waits until the default models can answer. Raises RuntimeError where one can't be had."""
    while gpu_service.view_ready(runtime)[0] != 200:
        for entry in runtime.models.entries():
            if entry.default and entry.error is not None:
                raise RuntimeError(f"{entry.name.public}: {entry.error.detail}")
        await asyncio.sleep(0.1)


class RayMetrics:
    """The numbers of one replica's /metrics among Ray's own, which name the replica: `ray_gpu_service_...`.

    All are gauges there, counters and the buckets of histograms too: `rate` and `histogram_quantile` read them so.
    """

    def __init__(self) -> None:
        self._gauges: dict[str, Gauge] = {}
        self._shown: set[tuple[str, frozenset[tuple[str, str]]]] = set()

    def show(self, families: Iterable[Metric]) -> None:
        """Takes the numbers over. What is not among them any more, such as a model that was unloaded, becomes 0."""
        samples = (sample for family in families for sample in family.samples)
        values = {(sample.name, frozenset(sample.labels.items())): sample.value for sample in samples}
        for name, labels in self._shown - values.keys():
            values[name, labels] = 0.0
        for (name, labels), value in values.items():
            if name not in self._gauges:
                self._gauges[name] = Gauge(name, tag_keys=tuple(sorted(key for key, _ in labels)))
            self._gauges[name].set(value, dict(labels))
        self._shown |= values.keys()


def build(args: dict[str, str]) -> Any:
    """The application that serve.yaml names; what it does not say follows from the service's settings.

    Raises:
        SettingsError: a setting that can't be used; `serve status` shows it.
    """
    settings = gpu_service.read_settings()
    return Replica.options(  # type: ignore[attr-defined]
        # So many that a full replica still takes requests, to refuse them itself, with the time that it computes.
        max_ongoing_requests=settings.gpu_max_concurrent + settings.gpu_max_queue + HELD_BACK,
        # The second line, at each proxy: while there is no replica, or all are over that.
        max_queued_requests=QUEUED_AT_A_PROXY,
        backpressure_config=BackpressureConfig(status_code=503, retry_after_s=RETRY_S),
        # As many as have a slot: with more, somebody waits.
        autoscaling_config=AutoscalingConfig(target_ongoing_requests=settings.gpu_max_concurrent),
        # What runs may end, as after SIGTERM without Ray.
        graceful_shutdown_timeout_s=math.ceil(settings.gpu_request_timeout) + 15,
        graceful_shutdown_wait_loop_s=1,
    ).bind()


# --- in the proxies ------------------------------------------------------------------------------------


class ProxyErrors:
    """Gives what Serve itself refuses the form and the status of the service's own errors.

    Those are: 503 in plain text, where no replica is up or all are full, and no answer at all, where a replica died
    with the request, of which the server below would make a 500. Each may be sent again.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, refused = False, False

        async def send_ours(message: Message) -> None:
            nonlocal began, refused
            if message["type"] == "http.response.start":
                began, headers = True, MutableHeaders(scope=message)
                refused = message["status"] == 503 and "x-replica" not in headers
                headers["X-Request-ID"] = headers["X-Request-ID"]  # once: Serve adds it to what the service has sent
            if not refused:
                await send(message)

        await self.app(scope, receive, send_ours)
        if refused or not began:
            answer = gpu_service.error_response(scope, full() if refused else died())
            answer.headers["X-Request-ID"] = Headers(scope=scope).get("x-request-id", "")
            await answer(scope, receive, send)


def full() -> gpu_service.ServiceError:
    """No replica is up, or all are full."""
    return gpu_service.busy(gpu_service.spread(RETRY_S))


def died() -> gpu_service.ServiceError:
    """A replica died with a request that it had not begun to answer."""
    detail = "The replica that had this request died, and another takes over - retry later"
    return gpu_service.ServiceError(503, "engine_died", detail, gpu_service.spread(RETRY_S))


def proxy_middlewares() -> list[Middleware]:
    """What the proxies run: RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names this function."""
    return [Middleware(ProxyErrors)]

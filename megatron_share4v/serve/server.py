"""Assemble the ASGI application and run it until a signal or an engine failure."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from megatron_share4v.config.serve import ServeConfig
from megatron_share4v.errors import ConfigError
from megatron_share4v.logging import get_logger
from megatron_share4v.serve import page
from megatron_share4v.serve.access import access_middleware
from megatron_share4v.serve.api_error import ApiError
from megatron_share4v.serve.api_megatron import MegatronRoutes
from megatron_share4v.serve.api_openai import OpenAIRoutes
from megatron_share4v.serve.connection import BACKLOG, connection_class, fit_connections, report_loop_error
from megatron_share4v.serve.engine_thread import EngineThread, ServedModel
from megatron_share4v.serve.http import AuthMiddleware, BodyReader, JsonResponse, handle_exception
from megatron_share4v.serve.images.fetch import ImageFetcher
from megatron_share4v.serve.metrics import CONTENT_TYPE, EngineCollector, Metrics
from megatron_share4v.serve.prompt_builder import PromptBuilder
from megatron_share4v.serve.request_log import RequestLog, limit_log

if TYPE_CHECKING:
    from megatron_share4v.infer.engine import EngineStats


def build_app(
    config: ServeConfig,
    load: Callable[[], ServedModel],
    *,
    fetcher: ImageFetcher | None = None,
    on_ready: Callable[[], None] = lambda: None,
    on_failure: Callable[[EngineThread], None] = lambda worker: None,
) -> Starlette:
    """The ASGI application. Its lifespan owns the engine thread, which runs `load`.

    `app.state.worker`, `.metrics`, `.bodies` and `.prompt_builder` are for tests.
    """
    metrics = Metrics(config.model_name)
    bodies, prompt_builder = BodyReader(config), PromptBuilder(config, fetcher=fetcher)

    def load_all() -> ServedModel:
        served = load()
        prompt_builder.images.wait_started()
        return served

    worker = EngineThread(
        load_all,
        max_waiting=config.max_waiting,
        metrics=metrics,
        on_ready=on_ready,
        on_failure=lambda: on_failure(worker),
    )

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        asyncio.get_running_loop().set_exception_handler(report_loop_error)
        prompt_builder.images.start()
        worker.start()
        try:
            yield
        finally:
            bodies.close()
            prompt_builder.close()
            await worker.stop()

    openai = OpenAIRoutes(config, worker, bodies, prompt_builder, metrics, started=int(time.time()))
    megatron = MegatronRoutes(worker, bodies, prompt_builder, metrics, max_images=config.max_images)
    app = Starlette(
        routes=[
            *_monitoring_routes(config, worker, metrics),
            *openai.routes(),
            *megatron.routes(),
            *page.routes(),
        ],
        middleware=_middleware(config, metrics),
        exception_handlers={ApiError: handle_exception, HTTPException: handle_exception},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.worker, app.state.metrics, app.state.bodies = worker, metrics, bodies
    app.state.prompt_builder = prompt_builder
    return app


def _middleware(config: ServeConfig, metrics: Metrics) -> list[Middleware]:
    """The middleware, outermost first."""
    key = Middleware(AuthMiddleware, config=config, metrics=metrics)
    return [Middleware(RequestLog), *access_middleware(config), key]


def _monitoring_routes(config: ServeConfig, worker: EngineThread, metrics: Metrics) -> list[Route]:
    """Routes for health checks, load and Prometheus; registers the engine's statistics."""

    def engine_state() -> tuple[int, EngineStats | None]:
        return worker.waiting, worker.served.engine.stats if worker.served else None

    metrics.registry.register(EngineCollector(config.model_name, engine_state))

    async def health(request: Request) -> Response:
        try:
            worker.require()
        except ApiError as error:
            return JsonResponse({"status": "failed" if worker.failure else "loading"}, 503, error.headers)
        return JsonResponse({"status": "ok"})

    async def load(request: Request) -> Response:
        waiting, stats = engine_state()
        return JsonResponse({"server_load": waiting + (stats.waiting + stats.running if stats else 0)})

    async def show_metrics(request: Request) -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    return [
        Route("/health", health, methods=["GET"]),
        Route("/ping", health, methods=["GET", "POST"]),
        Route("/load", load, methods=["GET"]),
        Route("/metrics", show_metrics, methods=["GET"]),
    ]


class HttpServer(uvicorn.Server):
    """uvicorn server that returns after a graceful shutdown instead of re-raising the signal.

    A second signal forces exit.
    """

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Install handlers for SIGINT and SIGTERM."""
        # Signals are delivered to the main thread only; elsewhere set should_exit instead.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, self.handle_exit, number, None)
        yield


def http_server(app: Starlette, config: ServeConfig) -> HttpServer:
    """Configure a uvicorn server for the application."""
    settings = uvicorn.Config(
        app,
        http=connection_class(config),
        backlog=BACKLOG,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=config.drain_s,
        timeout_keep_alive=config.idle_timeout_s,
    )
    return HttpServer(settings)


def listen(config: ServeConfig) -> socket.socket:
    """Bind the port before anything is loaded. Raises ConfigError when that fails."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address[:2], family=family, backlog=512)
    except OSError as error:
        raise ConfigError(
            f"host {config.host}, port {config.port}: cannot listen there ({error.strerror or error}); choose "
            "another --host or --port"
        ) from error


def serve(config: ServeConfig, load: Callable[[], ServedModel]) -> None:
    """Listen, load and serve; returns after SIGINT or SIGTERM and running answers (`config.drain_s` at most).

    Raises ConfigError when it cannot listen, and what `load` or the engine raised.
    """
    log = get_logger()
    limit_log()
    config = replace(config, max_connections=fit_connections(config.max_connections))
    listening = listen(config)
    failed: list[BaseException] = []

    def end(worker: EngineThread) -> None:
        if worker.failure is not None:
            failed.append(worker.failure)
        server.should_exit = True

    host = f"[{config.host}]" if ":" in config.host else config.host
    url = f"http://{host}:{listening.getsockname()[1]}/"
    app = build_app(config, load, on_ready=lambda: log.info("ready at %s", url), on_failure=end)
    server = http_server(app, config)
    if config.is_open:
        log.warning(
            "WARNING: listening on %s without a key: anyone who can reach this port can use the model. Set "
            "--api-key-file, or --host 127.0.0.1.",
            config.host,
        )
    log.info("listening on %s, loading the model (/health reports when it is ready)", url)
    server.run(sockets=[listening])
    if failed:
        raise failed[0]
    log.info("stopped")

"""The thread that owns the engine, and its interface to the event loop.

The event loop submits requests and receives their events; the thread keeps the waiting queue, feeds the engine and
steps it.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron_share4v.data.loading.encode import Encoder
from megatron_share4v.errors import DataError
from megatron_share4v.infer.request import GenerationRequest, TokenEvent
from megatron_share4v.logging import get_logger
from megatron_share4v.serve.api_error import ApiError, unavailable_error
from megatron_share4v.serve.metrics import Metrics


class EngineLimits(Protocol):
    """Limits of the engine used by the server."""

    @property
    def max_requests(self) -> int:
        """Requests in the engine at once."""
        ...

    @property
    def max_positions(self) -> int:
        """Positions of one request, prompt and answer."""
        ...


class Engine(Protocol):
    """Interface of infer.engine.Engine used by the server."""

    @property
    def limits(self) -> EngineLimits:
        """Limits of the engine."""
        ...

    @property
    def stats(self) -> Any:
        """Current statistics."""
        ...

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        ...

    def add(self, request: GenerationRequest) -> None:
        """Append to the waiting queue."""
        ...

    def cancel(self, request_id: str) -> None:
        """Cancel a request."""
        ...

    def step(self) -> list[TokenEvent]:
        """Run one forward pass."""
        ...


@dataclass(frozen=True)
class ServedModel:
    """A loaded engine with its prompt encoder.

    tokens_per_image: image slots per image. close: called in the engine's thread at the end.
    """

    engine: Engine
    encoder: Encoder
    tokens_per_image: int
    close: Callable[[], None] = lambda: None


@dataclass
class RequestGroup:
    """Requests submitted together, as seen from the event loop."""

    worker: EngineThread
    open: set[str]
    submitted: float
    outputs: asyncio.Queue[tuple[TokenEvent, float] | ApiError] = field(default_factory=asyncio.Queue)

    async def events(self) -> AsyncIterator[tuple[TokenEvent, float]]:
        """Yield events with the time.monotonic of their step, until all requests have ended.

        Raises ApiError when one cannot be answered.
        """
        while self.open:
            output = await self.outputs.get()
            if isinstance(output, ApiError):
                raise output
            event, _ = output
            if event.request_id in self.open:
                if event.finish_reason is not None:
                    self.open.discard(event.request_id)
                yield output

    def cancel(self, request_id: str) -> None:
        """Cancel one request."""
        if request_id in self.open:
            self.open.discard(request_id)
            self.worker.drop(request_id)

    def close(self) -> None:
        """Cancel all open requests. The submitter must call this."""
        for request_id in tuple(self.open):
            self.cancel(request_id)


class EngineThread:
    """Engine thread in state loading, ready (`served` is set) or failed (`failure` is set).

    load: builds the engine, in the thread. on_ready, on_failure: called once on the event loop when it is loaded, and
    when loading or a step raised.
    """

    def __init__(
        self,
        load: Callable[[], ServedModel],
        *,
        max_waiting: int,
        metrics: Metrics,
        on_ready: Callable[[], None] = lambda: None,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        self._load, self._max_waiting, self._metrics = load, max_waiting, metrics
        self._on_ready, self._on_failure = on_ready, on_failure
        self._inbox: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._groups: dict[str, RequestGroup] = {}
        self._waiting: set[str] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.served: ServedModel | None = None
        self.failure: BaseException | None = None

    # Called on the event loop.

    def start(self) -> None:
        """Start the thread and the loading; call on the event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """Stop after the current step, cancelling running requests; returns when the engine is closed."""
        self._inbox.put(("stop", None))
        while self._thread.is_alive():
            await asyncio.sleep(0.01)

    @property
    def waiting(self) -> int:
        """Number of requests not yet in the engine."""
        return len(self._waiting)

    def require(self) -> ServedModel:
        """The served model. Raises ApiError (503) while loading and after a failure."""
        if self.failure is not None:
            raise unavailable_error("the engine has failed and the server is stopping; see its log")
        if self.served is None:
            raise unavailable_error("the model is still loading; try again in a moment")
        return self.served

    def submit(self, requests: Sequence[GenerationRequest]) -> RequestGroup:
        """Queue requests.

        Raises ApiError: 503 when not ready, 429 when the queue is full, 400 when the queue could never hold them.
        """
        limits = self.require().engine.limits
        if len(requests) > self._max_waiting + limits.max_requests:
            raise ApiError(
                f"{len(requests)} answers in one request; this server can take "
                f"{self._max_waiting + limits.max_requests} at once"
            )
        free = max(0, limits.max_requests - (len(self._groups) - len(self._waiting)))
        if len(self._waiting) + len(requests) > self._max_waiting + free:
            mean = self._metrics.mean_latency_s()
            seconds = min(60, max(1, round(mean * (1 + len(self._waiting) / limits.max_requests))))
            raise ApiError(
                f"{len(self._waiting)} requests are waiting and {self._max_waiting} may; try again later",
                status=429,
                headers={"Retry-After": str(seconds)},
            )
        group = RequestGroup(worker=self, open={request.id for request in requests}, submitted=time.monotonic())
        for request in requests:
            self._groups[request.id] = group
            self._waiting.add(request.id)
            self._inbox.put(("add", request))
        return group

    def drop(self, request_id: str) -> None:
        """Cancel a request whose client no longer needs it."""
        if self._groups.pop(request_id, None) is not None:
            self._waiting.discard(request_id)
            self._inbox.put(("cancel", request_id))

    def _deliver(
        self,
        admitted: list[tuple[str, float]],
        errors: list[tuple[str, ApiError]],
        events: list[TokenEvent],
        time_s: float,
    ) -> None:
        for request_id, at in admitted:
            if request_id in self._waiting:
                self._waiting.discard(request_id)
                self._metrics.queue_time.observe(at - self._groups[request_id].submitted)
        for request_id, error in errors:
            self._waiting.discard(request_id)
            if (group := self._groups.pop(request_id, None)) is not None:
                group.outputs.put_nowait(error)
        for event in events:
            group = self._groups.get(event.request_id)
            if event.finish_reason is not None:
                self._groups.pop(event.request_id, None)
                self._waiting.discard(event.request_id)
            if group is not None:
                group.outputs.put_nowait((event, time_s))

    def _become_ready(self, served: ServedModel) -> None:
        self.served = served
        self._on_ready()

    def _fail(self, error: BaseException) -> None:
        self.failure = error
        for group in self._groups.values():
            group.outputs.put_nowait(unavailable_error("the engine has failed and the server is stopping; see its log"))
        self._groups.clear()
        self._waiting.clear()
        self._on_failure()

    # Called in the engine's thread.

    def _run(self) -> None:
        loop = self._loop
        assert loop is not None, "start() sets the loop before the thread runs"
        try:
            served = self._load()
            loop.call_soon_threadsafe(self._become_ready, served)
            try:
                self._serve(served.engine, loop)
            finally:
                served.close()
        except BaseException as error:
            get_logger().debug("the engine's thread ended", exc_info=True)
            loop.call_soon_threadsafe(self._fail, error)

    def _serve(self, engine: Engine, loop: asyncio.AbstractEventLoop) -> None:
        queued: deque[GenerationRequest] = deque()
        inside: set[str] = set()
        while self._process_inbox(engine, queued, inside):
            admitted: list[tuple[str, float]] = []
            errors: list[tuple[str, ApiError]] = []
            while queued and len(inside) < engine.limits.max_requests:
                request = queued.popleft()
                admitted.append((request.id, time.monotonic()))
                try:
                    engine.add(request)
                    inside.add(request.id)
                except DataError as error:
                    errors.append((request.id, ApiError(str(error))))
            events = engine.step() if engine.has_work else []
            now = time.monotonic()
            inside.difference_update(event.request_id for event in events if event.finish_reason is not None)
            if admitted or errors or events:
                loop.call_soon_threadsafe(self._deliver, admitted, errors, events, now)

    def _process_inbox(self, engine: Engine, queued: deque[GenerationRequest], inside: set[str]) -> bool:
        """Process submissions and cancellations, blocking while there is no work; False to stop."""
        idle = not engine.has_work and not queued
        while idle or not self._inbox.empty():
            order, subject = self._inbox.get()
            idle = False
            if order == "stop":
                return False
            if order == "add":
                queued.append(subject)
            elif subject in inside:
                inside.discard(subject)
                engine.cancel(subject)
            else:
                kept = [request for request in queued if request.id != subject]
                queued.clear()
                queued.extend(kept)
        return True

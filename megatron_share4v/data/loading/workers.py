"""Ordered map over worker processes with bounded look-ahead; the only place where the data path starts processes.

A worker that dies or hangs is reported, restarted and given the same work; results and their order do not change.
"""

from __future__ import annotations

import io
import itertools
import multiprocessing
import multiprocessing.connection
import pickle
import queue
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from typing import Any, Generic, TypeVar

import torch

from megatron_share4v.errors import DataError, Share4VError
from megatron_share4v.logging import get_logger

Request = TypeVar("Request")
Result = TypeVar("Result")

MAX_ATTEMPTS = 2
_END = object()
_READY = b"ready"  # no pickle starts with these bytes


def ordered_map(
    function: Callable[[Request], Result],
    requests: Iterable[Request],
    *,
    num_workers: int,
    prefetch: int,
    timeout_s: float | None = None,
    on_crash: Callable[[Request, str], Result] | None = None,
) -> Generator[Result, None, None]:
    """Apply `function` to each request, yielding results in request order; num_workers 0 runs in this process.

    Each worker runs at most `prefetch` requests ahead. `function`, requests and results are pickled. A Share4VError
    raised by `function` is raised here, unchanged, at its position in the order. Closing the iterator, or leaving the
    program, ends the workers.

    A worker that dies, or returns nothing for `timeout_s` seconds while its result is awaited, is restarted at the same
    request. A request that ended its worker twice yields `on_crash(request, reason)`, or raises DataError without
    `on_crash`.
    """
    if num_workers == 0:
        yield from map(function, requests)
        return
    remaining = iter(requests)
    workers: list[_Worker[Request, Result]] = [
        _Worker(number, function, timeout_s=timeout_s, on_crash=on_crash) for number in range(num_workers)
    ]
    try:
        # Round robin: result k is the next one of worker k mod num_workers.
        pending: deque[_Worker[Request, Result]] = deque()
        for request, worker in zip(itertools.islice(remaining, num_workers * prefetch), itertools.cycle(workers)):
            worker.submit(request)
            pending.append(worker)
        while pending:
            worker = pending.popleft()
            result = worker.result()
            for request in itertools.islice(remaining, 1):
                worker.submit(request)
                pending.append(worker)
            yield result
    finally:
        for worker in workers:
            worker.close()


class _Worker(Generic[Request, Result]):
    """One worker process and its outstanding requests."""

    def __init__(
        self,
        number: int,
        function: Callable[[Request], Result],
        *,
        timeout_s: float | None,
        on_crash: Callable[[Request, str], Result] | None,
    ) -> None:
        self._number, self._function, self._timeout_s, self._on_crash = number, function, timeout_s, on_crash
        self._outstanding: deque[Request] = deque()
        self._failures = 0  # of the oldest outstanding request
        self._start()

    def submit(self, request: Request) -> None:
        """Queue one more request."""
        self._outstanding.append(request)
        if not self._failures:
            self._send(request)

    def result(self) -> Result:
        """Wait for the oldest outstanding result; restart the worker when it died or hangs."""
        while True:
            message = self._receive()
            if message == _READY:
                self._is_ready = True
                continue
            if message is not None:
                self._outstanding.popleft()
                self._resend()
                return _unpickle_result(message)
            reason = self._failure_reason()
            if not self._is_ready and self._failures:
                raise DataError(
                    f"{reason} during start-up, also after a restart: no samples can be read. "
                    "See its output in stderr above"
                )
            self._failures += 1
            exhausted = self._failures == MAX_ATTEMPTS and self._is_ready
            get_logger().warning(
                "%s; %s", reason, "dropping its request" if exhausted else "restarted at the same request"
            )
            self.close()
            self._start()
            if exhausted:
                request = self._outstanding.popleft()
                self._resend()
                return self._give_up(request, reason)
            # Send this request alone: if the worker fails again, no other request can be the cause.
            self._send(self._outstanding[0])

    def _resend(self) -> None:
        """Send what was held back while a failure was looked into."""
        for request in self._outstanding if self._failures else ():
            self._send(request)
        self._failures = 0

    def close(self) -> None:
        """Kill the process and close its pipe."""
        self._pipe.close()
        self._process.kill()
        # Bounded: a process blocked on a lost file system cannot be killed.
        self._process.join(timeout=5.0)

    def _start(self) -> None:
        self._is_ready = False
        context = _context()
        self._pipe, worker_end = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(self._function, worker_end), name=f"reader-{self._number}", daemon=True
        )
        self._process.start()
        worker_end.close()

    def _send(self, request: Request) -> None:
        try:
            self._pipe.send(request)
        except OSError as error:
            # The process is dead: `result` notices, restarts it and sends all outstanding requests.
            get_logger().debug("reader process %d: cannot send (%s)", self._number, error)

    def _receive(self) -> bytes | None:
        """Next message of the worker; None when it is dead or hangs."""
        ready = multiprocessing.connection.wait([self._pipe, self._process.sentinel], timeout=self._timeout_s)
        if not ready:
            return None
        try:
            # A result that the worker wrote before it died is still in the pipe.
            return self._pipe.recv_bytes() if self._pipe.poll() else None
        except (EOFError, OSError) as error:
            get_logger().debug("reader process %d closed its pipe (%r)", self._number, error)
            return None

    def _failure_reason(self) -> str:
        """Describe how the process ended or hangs, for messages."""
        who = f"reader process {self._number} (pid {self._process.pid})"
        # The pipe closes shortly before the process has ended.
        self._process.join(timeout=1.0)
        code = self._process.exitcode
        if code is None:
            return f"{who} hangs: no result for {self._timeout_s:g} s" if self._timeout_s else f"{who} closed its pipe"
        return f"{who} was killed by {signal.Signals(-code).name}" if code < 0 else f"{who} ended with exit code {code}"

    def _give_up(self, request: Request, reason: str) -> Result:
        """Result of a request that ended its worker MAX_ATTEMPTS times."""
        if self._on_crash is None:
            raise DataError(
                f"{reason}, {MAX_ATTEMPTS} times on the same request: {str(request)[:500]}. "
                "Leave that record out, or give workers more memory"
            )
        return self._on_crash(request, reason)


class _WorkerException:
    """Traceback of an unexpected exception in a worker."""

    def __init__(self, text: str) -> None:
        self.text = text


def _unpickle_result(message: bytes) -> Any:
    """Unpickle a result; raise the exception that it holds, if any."""
    result = pickle.loads(message)
    if isinstance(result, Share4VError):
        raise result
    if isinstance(result, _WorkerException):
        raise RuntimeError(f"in a reader process:\n{result.text}")
    return result


def _serve(function: Callable[[Any], object], pipe: Connection) -> None:
    """Main loop of a worker process; threads receive and send, so that neither side blocks on a full pipe."""
    # Some schedulers signal every process of a job; only the rank may react. multiprocessing itself uses SIGTERM.
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    pipe.send_bytes(_READY)
    requests: queue.SimpleQueue = queue.SimpleQueue()
    results: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=_receive_all, args=(pipe, requests), daemon=True).start()
    threading.Thread(target=_send_all, args=(pipe, results, requests), daemon=True).start()
    while (request := requests.get()) is not _END:
        try:
            result = function(request)
        except Share4VError as error:
            result = error
        except Exception:
            result = _WorkerException(traceback.format_exc())
        results.put(_pickle_result(result))


def _receive_all(pipe: Connection, requests: queue.SimpleQueue) -> None:
    """Queue requests until the pipe closes."""
    while True:
        try:
            requests.put(pipe.recv())
        except (EOFError, OSError):
            requests.put(_END)
            return


def _send_all(pipe: Connection, results: queue.SimpleQueue, requests: queue.SimpleQueue) -> None:
    """Send pickled results until the pipe closes."""
    while True:
        try:
            # A pipe, because containers limit shared memory to 64 MB.
            pipe.send_bytes(results.get())
        except OSError:
            requests.put(_END)
            return


class _Pickler(pickle.Pickler):
    """Pickler that sends CPU tensors as arrays: torch would write each one to a shared-memory file."""

    def reducer_override(self, item: object) -> Any:
        if type(item) is torch.Tensor and item.device.type == "cpu" and item.dtype != torch.bfloat16:
            return torch.from_numpy, (item.detach().numpy(),)
        return NotImplemented


def _pickle_result(result: object) -> bytes:
    """Pickle a result with tensors as arrays."""
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(result)
    return buffer.getvalue()


def _context() -> ForkServerContext:
    """Multiprocessing context that forks workers from a clean server process, never from a rank.

    A rank has threads (gloo, NCCL, OpenMP) whose locks a fork copies in any state, and sockets that a forked worker
    would keep open after the rank died, which hides its death from its peers. The server loads torch once (about 2 s);
    each worker then starts in milliseconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megatron_share4v.data.loading.loader"])
    return context

"""An ordered map over worker processes with bounded look-ahead: the one place where the data path starts processes.

A worker that dies or hangs is named, started again, and given the same work; its results do not change, nor does their order.
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
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from typing import TypeVar

import torch

from megatron_share4v.errors import DataError, Share4VError
from megatron_share4v.logging import get_logger

Request = TypeVar("Request")
Result = TypeVar("Result")

MAX_ATTEMPTS = 2
_END = object()
_READY = b"ready"  # no pickle begins like this


def ordered_map(
    function: Callable[[Request], Result],
    requests: Iterable[Request],
    *,
    num_workers: int,
    prefetch: int,
    timeout_s: float | None = None,
    lost: Callable[[Request, str], Result] | None = None,
) -> Iterator[Result]:
    """`function` of each request, in the order of the requests, whatever the number of workers; 0: in this process.

    Each worker works at most `prefetch` requests ahead. `function`, requests and results are pickled. A Share4VError raised by `function`
    is raised here, unchanged, at its place in the order. Closing the iterator, or leaving the program, ends the workers.
    A worker that dies, or gives nothing for `timeout_s` seconds while its result is waited for, is started again where it was. The request that
    ended it twice gets `lost(request, reason)` for its result; without `lost` a DataError is raised.
    """
    if num_workers == 0:
        yield from map(function, requests)
        return
    remaining = iter(requests)
    workers = [_Worker(number, function, timeout_s=timeout_s, lost=lost) for number in range(num_workers)]
    try:
        # Turn by turn: result k is the next one of worker k mod num_workers.
        asked: deque[_Worker] = deque()
        for request, worker in zip(itertools.islice(remaining, num_workers * prefetch), itertools.cycle(workers)):
            worker.submit(request)
            asked.append(worker)
        while asked:
            worker = asked.popleft()
            result = worker.result()
            for request in itertools.islice(remaining, 1):
                worker.submit(request)
                asked.append(worker)
            yield result
    finally:
        for worker in workers:
            worker.close()


class _Worker:
    """One process and what it has been asked for but has not answered."""

    def __init__(
        self, number: int, function: Callable, *, timeout_s: float | None, lost: Callable[[object, str], object] | None
    ) -> None:
        self._number, self._function, self._timeout_s, self._lost = number, function, timeout_s, lost
        self._asked: deque[object] = deque()
        self._failures = 0  # of the request that is first in line
        self._start()

    def submit(self, request: object) -> None:
        """Ask for one more result."""
        self._asked.append(request)
        if not self._failures:
            self._send(request)

    def result(self) -> object:
        """The oldest result that was asked for; waits for it."""
        while True:
            message = self._receive()
            if message == _READY:
                self._is_ready = True
                continue
            if message is not None:
                self._asked.popleft()
                self._proceed()
                return _opened(message)
            reason = self._reason()
            if not self._is_ready and self._failures:
                raise DataError(
                    f"{reason} before it began, also when it was started again: no samples can be read. What it said is in stderr above"
                )
            self._failures += 1
            spent = self._failures == MAX_ATTEMPTS and self._is_ready
            get_logger().warning(
                "%s; %s", reason, "giving up on what it was doing" if spent else "started again at the same place"
            )
            self.close()
            self._start()
            if spent:
                request = self._asked.popleft()
                self._proceed()
                return self._give_up(request, reason)
            # Alone: if it fails again, no other can be the cause.
            self._send(self._asked[0])

    def _proceed(self) -> None:
        """Send what was held back while a failure was looked into."""
        for request in self._asked if self._failures else ():
            self._send(request)
        self._failures = 0

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._pipe.close()
        self._process.kill()
        # Not for ever: a process that waits for a lost file system cannot even be killed.
        self._process.join(timeout=5.0)

    def _start(self) -> None:
        self._is_ready = False
        context = _context()
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(self._function, theirs), name=f"reader-{self._number}", daemon=True
        )
        self._process.start()
        theirs.close()

    def _send(self, request: object) -> None:
        try:
            self._pipe.send(request)
        except OSError as error:
            # It is dead; `result` finds out, starts it again and sends all that is due.
            get_logger().debug("reader process %d does not listen (%s)", self._number, error)

    def _receive(self) -> bytes | None:
        """None when the worker is dead or hangs."""
        ready = multiprocessing.connection.wait([self._pipe, self._process.sentinel], timeout=self._timeout_s)
        if not ready:
            return None
        try:
            # What a worker wrote before it died is still in the pipe.
            return self._pipe.recv_bytes() if self._pipe.poll() else None
        except (EOFError, OSError) as error:
            get_logger().debug("reader process %d closed its pipe (%r)", self._number, error)
            return None

    def _reason(self) -> str:
        who = f"reader process {self._number} (pid {self._process.pid})"
        # The pipe closes a moment before the process has gone.
        self._process.join(timeout=1.0)
        code = self._process.exitcode
        if code is None:
            return f"{who} hangs: no result for {self._timeout_s:g} s" if self._timeout_s else f"{who} closed its pipe"
        return f"{who} was killed by {signal.Signals(-code).name}" if code < 0 else f"{who} ended with exit code {code}"

    def _give_up(self, request: object, reason: str) -> object:
        if self._lost is None:
            raise DataError(
                f"{reason}, {MAX_ATTEMPTS} times at the same place: {str(request)[:500]}. Leave that record out, or give workers more memory"
            )
        return self._lost(request, reason)


class _Failed:
    """A worker's own failure, which is a bug: its traceback."""

    def __init__(self, text: str) -> None:
        self.text = text


def _opened(message: bytes) -> object:
    result = pickle.loads(message)
    if isinstance(result, Share4VError):
        raise result
    if isinstance(result, _Failed):
        raise RuntimeError(f"in a reader process:\n{result.text}")
    return result


def _serve(function: Callable[[object], object], pipe: Connection) -> None:
    """The worker. Threads of their own receive and send, so that neither side ever waits for the other's buffer."""
    # Some schedulers signal every process of a job, and the rank decides what follows. SIGTERM is what multiprocessing itself ends workers with.
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    pipe.send_bytes(_READY)
    requests: queue.SimpleQueue = queue.SimpleQueue()
    answers: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=_receive_all, args=(pipe, requests), daemon=True).start()
    threading.Thread(target=_send_all, args=(pipe, answers, requests), daemon=True).start()
    while (request := requests.get()) is not _END:
        try:
            result = function(request)
        except Share4VError as error:
            result = error
        except Exception:
            result = _Failed(traceback.format_exc())
        answers.put(_pickled(result))


def _receive_all(pipe: Connection, requests: queue.SimpleQueue) -> None:
    while True:
        try:
            requests.put(pipe.recv())
        except (EOFError, OSError):
            requests.put(_END)
            return


def _send_all(pipe: Connection, answers: queue.SimpleQueue, requests: queue.SimpleQueue) -> None:
    while True:
        try:
            # Through a pipe, not shared memory, which containers limit to 64 MB.
            pipe.send_bytes(answers.get())
        except OSError:
            requests.put(_END)
            return


class _Pickler(pickle.Pickler):
    """Tensors travel as arrays: torch's own way writes each of them as a small file."""

    def reducer_override(self, item: object) -> object:
        if type(item) is torch.Tensor and item.device.type == "cpu" and item.dtype != torch.bfloat16:
            return torch.from_numpy, (item.detach().numpy(),)
        return NotImplemented


def _pickled(result: object) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(result)
    return buffer.getvalue()


def _context() -> BaseContext:
    """Workers are forked from a clean server process, never from a rank.

    A rank has threads (gloo, NCCL, OpenMP) whose locks a fork copies in any state, and sockets that a forked worker would keep open after
    the rank died, so that its peers would not notice. The server loads torch once (about 2 s); each worker then starts in milliseconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megatron_share4v.data.loading.loader"])
    return context

"""Image decoding in a fixed number of processes with a deadline: a slow or hostile file costs one process, for a while.

A thread would not do: parts of Pillow hold the interpreter's lock, and a thread cannot be stopped. The processes import
neither torch nor the program that started them.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np

from megatron_share4v.data.images.pil_decoder import decode, encode_png, open_header
from megatron_share4v.data.images.policy import MAX_PIXELS, ImagePolicy, OversizedImage
from megatron_share4v.errors import DataError
from megatron_share4v.logging import get_logger

MAX_ATTEMPTS = 2
_PROGRAM = "from megatron_share4v.data.images.decode_pool import serve_requests; serve_requests()"


@dataclass(frozen=True)
class DecodeRequest:
    """One encoded image, how to decode it, and the largest number of pixels accepted."""

    data: bytes
    policy: ImagePolicy
    max_pixels: int = MAX_PIXELS


DecodeFunction = Callable[[DecodeRequest], np.ndarray]


def decode_request(request: DecodeRequest) -> np.ndarray:
    """Decode one image to [S, S, 3] uint8. Raises DataError."""
    open_header(request.data, max_pixels=request.max_pixels)
    return decode(request.data, request.policy)


class DecodePool:
    """Processes that decode images for threads of this process; each is started, and restarted, when it is needed.

    timeout_s: time to decode one image. function: replaceable for tests.
    """

    def __init__(self, *, processes: int, timeout_s: float, function: DecodeFunction = decode_request) -> None:
        self._processes = [_DecodeProcess(function, timeout_s=timeout_s) for _ in range(processes)]
        self._free: queue.SimpleQueue[_DecodeProcess] = queue.SimpleQueue()
        for process in self._processes:
            self._free.put(process)

    def decode(self, request: DecodeRequest) -> np.ndarray:
        """Decode one image to [S, S, 3] uint8, waiting for a free process first; safe to call from several threads.

        Raises DataError: undecodable, too large, not decoded within the timeout, or its process died twice.
        """
        process = self._free.get()
        try:
            return process.decode(request)
        finally:
            self._free.put(process)

    def start(self) -> None:
        """Start one more process and wait until it decodes. Raises DataError."""
        self.decode(DecodeRequest(encode_png(np.zeros((1, 1, 3), dtype=np.uint8)), ImagePolicy(1)))

    def close(self) -> None:
        """Kill all processes; a thread that waits for an image gets a DataError."""
        for process in self._processes:
            process.close()


class _DecodeProcess:
    """One process, started at its first image."""

    def __init__(self, function: DecodeFunction, *, timeout_s: float) -> None:
        self._function, self._timeout_s = function, timeout_s
        self._process: subprocess.Popen | None = None
        self._connection: Connection | None = None
        self._closed = False

    def decode(self, request: DecodeRequest) -> np.ndarray:
        for _ in range(MAX_ATTEMPTS):
            try:
                connection = self._connection or self._start()
                connection.send(request)
                answered = connection.poll(self._timeout_s)
                result: np.ndarray | DataError | None = connection.recv() if answered else None
            except (EOFError, OSError) as error:
                get_logger().debug("a process that decodes images has ended (%r)", error)
                self._stop()
                continue
            if result is None:
                self._stop()
                get_logger().warning(
                    "an image of %d bytes was not decoded within %g s", len(request.data), self._timeout_s
                )
                raise OversizedImage(f"image could not be decoded within {self._timeout_s:g} s; save it smaller")
            if isinstance(result, DataError):
                raise result
            return result
        get_logger().warning("an image of %d bytes ended the process that decoded it, twice", len(request.data))
        raise DataError(f"image of {len(request.data)} bytes ended the process that decoded it, twice; save it anew")

    def close(self) -> None:
        """Kill the process for good."""
        self._closed = True
        process = self._process
        if process is not None:
            process.kill()
            process.wait()

    def _start(self) -> Connection:
        parent_end, child_end = socket.socketpair()
        with child_end:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, str(child_end.fileno())],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[child_end.fileno()],
            )
        self._connection = connection = Connection(parent_end.detach())
        if self._closed:
            self._process.kill()
        connection.send(self._function)
        connection.recv()  # the process has imported what it needs, which is no part of the first image's time
        return connection

    def _stop(self) -> None:
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = self._connection = None
        if self._closed:
            raise DataError("the processes that decode images have been closed")


def serve_requests() -> None:
    """Main loop of a process: receive a function, then apply it to requests until the connection closes.

    The file descriptor of the connection is the first argument on the command line.
    """
    warnings.simplefilter("ignore")  # Pillow's, on harmless oddities of a file: clients choose those
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends this process
    connection = Connection(int(sys.argv[1]))
    function: DecodeFunction = connection.recv()
    connection.send(None)
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        result: np.ndarray | DataError
        try:
            result = function(request)
        except DataError as error:
            result = error
        connection.send(result)

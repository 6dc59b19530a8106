"""An ordered map over worker processes with bounded look-ahead: the one place where the data path starts processes."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.context import BaseContext
from typing import TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from megatron_share4v.errors import Share4VError

Request = TypeVar("Request")
Result = TypeVar("Result")


def ordered_map(
    function: Callable[[Request], Result], requests: Iterable[Request], *, num_workers: int, prefetch: int
) -> Iterator[Result]:
    """`function` of each request, in the order of the requests, whatever the number of workers; 0: in this process.

    Each worker works at most `prefetch` requests ahead. `function` and requests are pickled. A Share4VError raised by `function` is raised
    here, unchanged, at its place in the order. Closing the iterator, or leaving the program, ends the workers.
    """
    if num_workers == 0:
        yield from map(function, requests)
        return
    loader = DataLoader(
        _Remote(function),
        batch_size=None,
        sampler=requests,
        num_workers=num_workers,
        prefetch_factor=prefetch,
        collate_fn=_unchanged,
        multiprocessing_context=_context(),
        # Without one of its own, DataLoader draws from the global generator, which must stay equal on ranks that read and ranks that do not.
        generator=torch.Generator(),
    )
    for message in loader:
        result = pickle.loads(message)
        if isinstance(result, Share4VError):
            raise result
        yield result


class _Remote(Dataset):
    """Runs in the worker. What it returns travels as bytes through a pipe: no shared memory, which containers limit to 64 MB."""

    def __init__(self, function: Callable[[object], object]) -> None:
        self._function = function

    def __getitem__(self, request: object) -> bytes:
        try:
            result = self._function(request)
        except Share4VError as error:
            # Returned and raised again by the parent: DataLoader would wrap the message into a traceback.
            result = error
        return pickle.dumps(result, protocol=pickle.HIGHEST_PROTOCOL)


def _unchanged(item: object) -> object:
    return item


def _context() -> BaseContext:
    """Workers are forked from a clean server process, never from a rank.

    A rank has threads (gloo, NCCL, OpenMP) whose locks a fork copies in any state, and sockets that a forked worker would keep open after
    the rank died, so that its peers would not notice. The server loads torch once (about 2 s); each worker then starts in milliseconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.utils.data", "megatron_share4v.data.loader"])
    return context

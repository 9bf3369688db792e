"""Calls of several shards on the same threads: those of the shard that began first go first."""

import heapq
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

_T = TypeVar("_T")


class OldestFirst:
    """A pool of threads whose next call is the one with the smallest `turn`; of one turn, the one that came first.

    With two shards at an autoencoder that takes calls as they come, both would be opened and committed at the same
    moments, when nothing is left for it to do, and a kill would cost two shards that were nearly done.
    """

    def __init__(self, num_threads: int, name: str, initializer: Callable[[], object]) -> None:
        self._threads = ThreadPoolExecutor(num_threads, name, initializer)
        self._waiting: list[tuple[int, int, Future[Any], Callable[[], Any]]] = []
        self._count = itertools.count()
        self._lock = threading.Lock()

    def submit(self, turn: int, call: Callable[[], _T]) -> Future[_T]:
        future: Future[_T] = Future()
        with self._lock:
            heapq.heappush(self._waiting, (turn, next(self._count), future, call))
        self._threads.submit(self._run_next)
        return future

    def shutdown(self) -> None:
        """Waits for all calls."""
        self._threads.shutdown()

    def _run_next(self) -> None:
        with self._lock:
            _, _, future, call = heapq.heappop(self._waiting)
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

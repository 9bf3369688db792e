"""Work beside a loop: what one batch still needs is done while the next one is made."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
_THREADS = 8
"""More than cores: most of the time they wait, for a disk or an object store."""


def ahead(work: Callable[[T], R], batches: Iterable[Iterable[T]]) -> Iterator[R]:
    """work(item) of each item, in order, in threads: of one batch while the next is made. Raises what work raises.

    Two batches are held at a time.
    """
    before: list[Future[R]] = []
    with ThreadPoolExecutor(_THREADS) as pool:
        for batch in batches:
            started = [pool.submit(work, item) for item in batch]
            for future in before:
                yield future.result()
            before = started
        for future in before:
            yield future.result()

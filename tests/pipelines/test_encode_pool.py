"""Who works on what: which shard an encoder is handed, and whose batches come first in one."""

import threading
from pathlib import Path
from typing import Any

import pytest

from ldm.sources import InputShard
from pipelines.encode.plan import Task
from pipelines.encode.pool import EncoderPool
from pipelines.encode.turns import OldestFirst
from tests.pipelines.encoding import config


def test_the_oldest_shard_comes_first() -> None:
    """Calls of a later shard wait, also those that came before; one that fails ends no other."""
    order: list[str] = []
    begun, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        begun.set()
        assert go_on.wait(60)

    threads = OldestFirst(1, "test", lambda: None)
    threads.submit(0, hold)
    assert begun.wait(60)
    names = [(2, "c"), (1, "a"), (2, "d"), (1, "b")]
    futures = [threads.submit(turn, lambda name=name: order.append(name)) for turn, name in names]  # type: ignore[misc]
    failing = threads.submit(1, lambda: 1 // 0)
    go_on.set()
    threads.shutdown()
    assert order == ["a", "b", "c", "d"] and all(future.done() for future in futures)
    with pytest.raises(ZeroDivisionError):
        failing.result()


class Encoder:
    """A handle of an actor: keeps what it is handed."""

    def __init__(self) -> None:
        self.shards: list[str] = []
        self.encode_shard = self

    def remote(self, task: Task) -> object:
        self.shards.append(task.shard.name)
        return object()


@pytest.mark.parametrize(
    ("shards", "at_work", "starting", "handed"),
    [
        (4, 1, 3, [["0"]]),  # the other three are for those that start
        (4, 4, 0, [["0"], ["1"], ["2"], ["3"]]),
        (6, 2, 0, [["0", "2"], ["1", "3"]]),
        (5, 2, 0, [["0", "2"], ["1"]]),  # the last two wait for who is idle first
        (1, 2, 0, [["0"], []]),
    ],
)
def test_the_last_shards_wait_for_who_is_idle_first(
    tmp_path: Path, shards: int, at_work: int, starting: int, handed: list[list[str]]
) -> None:
    tasks = tuple(Task(InputShard(str(n), f"{n}.tar", 1, "")) for n in range(shards))
    pool = EncoderPool(config("", tmp_path, "vae"), "", tasks)
    pool._queue.extend(tasks)
    encoders: list[Any] = [Encoder() for _ in range(at_work)]
    pool._load.update(dict.fromkeys(encoders, 0))
    pool._starting.update({object(): Encoder() for _ in range(starting)})
    pool._hand_out()
    assert [encoder.shards for encoder in encoders] == handed

"""Hands shards to encoder actors, and takes them back from those that die.

Ray core rather than Ray Data: one actor reads, decodes, encodes and commits a whole shard, so that a kill at any moment
loses the shards in flight and nothing else, and names, order and accounting never depend on the schedule. In Ray Data
a dead actor keeps its place in the pool, sinks have random names, and a resume reads all input again.
"""

import tarfile
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ldm.latents.receipt import receipt_name
from ldm.shards import clean
from pipelines import cluster
from pipelines.encode.config import EncodeConfig
from pipelines.encode.plan import Task, encoder_size
from pipelines.encode.worker import ShardEncoder, ShardResult, shards_at_once
from pipelines.progress import say

_LOOK_EVERY_S = 5.0  # at the cluster, which may have grown


@dataclass(frozen=True)
class SetAside:
    """A shard that failed to the end."""

    task: Task
    reason: str


@dataclass
class EncoderPool:
    """Yields what becomes of each task, in the order in which they end.

    started: when the first actor was ready. nodes: the ids of those that actors were on.
    """

    config: EncodeConfig
    fingerprint: str
    tasks: tuple[Task, ...]
    started: float | None = None
    nodes: set[str] = field(default_factory=set)
    _queue: deque[Task] = field(default_factory=deque)
    _tries: Counter[str] = field(default_factory=Counter)
    _load: dict[Any, int] = field(default_factory=dict)  # actors that are ready => shards that each works on
    _starting: dict[Any, Any] = field(default_factory=dict)  # future of ready() => actor
    _running: dict[Any, tuple[Task, Any, int]] = field(default_factory=dict)  # future => (task, actor, places)
    _retiring: set[Any] = field(default_factory=set)  # actors that end with the shards that they have
    _failed_starts: int = 0
    _waits: bool = False

    def __iter__(self) -> Iterator[ShardResult | SetAside | None]:
        """None: nothing happened for a second, which is a moment to show progress."""
        import ray

        self._queue.extend(self.tasks)
        self._size_actors()
        looked = float("-inf")
        try:
            while self._queue or self._running:
                if time.monotonic() - looked > _LOOK_EVERY_S:
                    looked = time.monotonic()
                    self._start_actors()
                self._hand_out()
                ready = self._wait()
                if not ready:
                    yield None
                for future in ready:
                    if future in self._starting:
                        self._welcome(future)
                    elif (end := self._take_back(future)) is not None:
                        yield end
        finally:
            for actor in [*self._load, *self._starting.values(), *self._retiring]:
                ray.kill(actor)

    def _wait(self) -> list[Any]:
        """What has ended, after a second at most."""
        import ray

        if futures := [*self._running, *self._starting]:
            ended: list[Any] = ray.wait(futures, timeout=1.0)[0]
            return ended
        time.sleep(1.0)  # all encoders are dead; those that follow are started at the next look
        if not self._waits and not cluster.places(self.resources):
            self._waits = True
            say("encode: no node is left that an encoder fits on; waits for one")
        return []

    def _size_actors(self) -> None:
        """How large one actor is: it stays so while the cluster grows."""
        self.device, self.resources, self.threads = encoder_size(self.config, list(cluster.live_nodes().values()))

    def _start_actors(self) -> None:
        """As many as were asked for or the cluster has room for, and not more than there are shards for."""
        wanted = min(self.config.num_workers or cluster.places(self.resources), len(self._queue) + len(self._running))
        for _ in range(wanted - len(self._load) - len(self._starting)):
            actor = self._new_actor()
            self._starting[actor.ready.remote()] = actor

    def _new_actor(self) -> Any:
        import ray

        options = {"num_cpus": self.resources["CPU"], "num_gpus": self.resources.get("GPU", 0)}
        actor_class = ray.remote(ShardEncoder).options(**options, max_concurrency=shards_at_once(self.config))
        return actor_class.remote(self.config, self.fingerprint, self.device, self.threads)

    def _hand_out(self) -> None:
        """The next shard to the actor that has least to do; a second one only while there is one for every actor.

        So the last ones wait for whoever is idle first, be it an actor that is still starting. One that failed before
        works alone: should it take its actor along again, it takes no other shard with it.
        """
        most = shards_at_once(self.config)
        while self._queue and self._load:
            actor = min(self._load, key=self._load.__getitem__)
            places = most if self._tries[_name(self._queue[0])] else 1
            if self._load[actor] + places > most:
                return
            if self._load[actor] and len(self._queue) <= len(self._load) + len(self._starting):
                return
            task = self._queue.popleft()
            self._load[actor] += places
            self._running[actor.encode_shard.remote(task)] = (task, actor, places)

    def _welcome(self, future: Any) -> None:
        """Takes in an actor that is ready. Raises RuntimeError where none can be started."""
        import ray

        actor = self._starting.pop(future)
        try:
            self.nodes.add(ray.get(future))
        except ray.exceptions.RayError as error:
            self._failed_starts += 1
            if self._failed_starts > self.config.max_tries and not self._load:
                raise RuntimeError(f"no encoder can be started: {brief(error)}") from error
            say(f"encode: an encoder could not be started ({brief(error)})")
            return
        self._load[actor] = 0
        self.started = self.started or time.monotonic()

    def _take_back(self, future: Any) -> ShardResult | SetAside | None:
        """The end of a shard; None where it goes back to the queue."""
        import ray

        task, actor, places = self._running.pop(future)
        if actor in self._load:
            self._load[actor] -= places
        try:
            result: ShardResult = ray.get(future)
            return result
        except ray.exceptions.RayError as error:
            if not isinstance(error, ray.exceptions.RayTaskError):  # the actor is dead, or its node
                self._load.pop(actor, None)
            elif not isinstance(error, tarfile.TarError | FileNotFoundError):
                # Perhaps it is the actor: a full disk on its node, a GPU in an error that stays.
                self._retire(actor)
            name = _name(task)
            self._tries[name] += 1
            if self._tries[name] < self.config.max_tries and not isinstance(error, tarfile.TarError):
                self._queue.append(task)
                say(f"encode: {name} failed, try {self._tries[name] + 1} follows ({brief(error)})")
                return None
            return SetAside(task, brief(error))
        finally:
            if actor in self._retiring and not any(other == actor for _, other, _ in self._running.values()):
                self._retiring.remove(actor)
                ray.kill(actor)

    def _retire(self, actor: Any) -> None:
        if self._load.pop(actor, None) is not None:
            self._retiring.add(actor)


def _name(task: Task) -> str:
    return receipt_name(task.shard.name, task.attempt)


def brief(error: BaseException) -> str:
    """The last line of an error, which is where Ray puts the cause."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()[:300]
    return clean(line)  # it goes into the manifest

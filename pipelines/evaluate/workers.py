"""Drawing on Ray: actors that take a shard at a time, and write it."""

from collections.abc import Callable

from ldm.sample_config import SampleConfig
from ldm.sample_shards import SampleShards
from ldm.sampling import RequestSampler, plan
from pipelines import cluster

_TRIES = 3
"""Of a shard whose worker dies, more."""


class ShardDrawer:
    """A worker. On the CPU it has one thread: with more the last bits would depend on how many cores it has."""

    def __init__(self, request: SampleConfig, shards: SampleShards) -> None:
        if request.device == "cpu":
            cluster.use_threads(1)
        self.request, self.shards = request, shards
        self.sampler: RequestSampler | None = None

    def draw(self, part: range) -> int:
        """Draws and commits one shard; returns how many pictures it has."""
        if self.sampler is None:  # not when it is made: an error there would come as that of a dead actor
            self.sampler = RequestSampler(self.request, plan(self.request))
        self.shards.write(part, self.sampler.draw(part))
        return len(part)


def draw_on_workers(
    request: SampleConfig,
    shards: SampleShards,
    missing: list[range],
    num_workers: int | None,
    advance: Callable[[int], None],
) -> None:
    """Draws the missing shards. A worker that dies is started again by Ray, and its shard drawn again.

    advance: is told how many more pictures are done. Raises RequestError; RuntimeError where workers keep dying.
    """
    import ray
    from ray.util import ActorPool

    one = {"CPU": 1.0} if request.device == "cpu" else {"CPU": 1.0, "GPU": 1.0}
    wanted = min(num_workers or max(1, cluster.places(one)), len(missing))
    resources, _ = cluster.resources_per_worker(wanted, request.device)
    actor_class = ray.remote(ShardDrawer).options(
        num_cpus=min(1.0, resources["CPU"]),
        num_gpus=resources.get("GPU", 0),
        max_restarts=-1,
        max_task_retries=_TRIES,
    )
    actors = [actor_class.remote(request, shards) for _ in range(wanted)]
    try:
        for count in ActorPool(actors).map_unordered(lambda actor, part: actor.draw.remote(part), missing):
            advance(count)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        text = " ".join(str(error).split())[:300]
        raise RuntimeError(f"evaluate: a worker died {_TRIES + 1} times at the same shard: {text}") from error
    finally:
        for actor in actors:
            ray.kill(actor)

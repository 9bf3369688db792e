"""The two applications of Ray Serve: the frontend, which owns the requests, and the samplers, which draw."""

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

from ldm import storage
from pipelines import cluster
from pipelines.progress import say
from pipelines.serve.app import create_app
from pipelines.serve.catalog import MLFLOW
from pipelines.serve.config import ServeConfig
from pipelines.serve.refusals import Refusals
from pipelines.serve.replica import Replica, Task
from pipelines.serve.table import Unserved

if TYPE_CHECKING:
    from fastapi import FastAPI

_LATENCY = {  # a picture's way through Ray Serve takes some ms less with these
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",  # the replica's own loop is never blocked: see Replica.draw
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}
for _name, _value in _LATENCY.items():  # read when Ray Serve is imported, here and in its own processes
    os.environ.setdefault(_name, _value)
FRONTEND, SAMPLERS = "ldm", "ldm-samplers"
"""Two applications: the frontend calls the samplers by the name of theirs."""
_SWITCH_S = 0.0005
_ROOM_FOR_PROBES = 32
_REQUESTS_PER_REPLICA = 8.0
"""Above this many at each, more replicas are started."""


class Sampler:
    """A `Replica` as Ray Serve holds it."""

    def __init__(self, config: ServeConfig, device: str, threads: int | None) -> None:
        from pipelines.serve.metrics import observer

        cluster.use_threads(threads or cluster.worker_threads(1))
        # The thread that draws takes Python's lock back at once after each operation: whoever answers a request
        # meanwhile waits this long for it, several times.
        sys.setswitchinterval(_SWITCH_S)
        self._replica = Replica(config, device, observer())

    async def draw(self, task: Task) -> AsyncIterator[list[dict[str, Any]]]:
        async with contextlib.aclosing(self._replica.draw(task)) as events:  # type: ignore[type-var]
            async for some in events:
                yield some

    async def draw_whole(self, task: Task) -> list[dict[str, Any]]:
        """All events at once: one message in place of several, where nobody follows."""
        return [event async for some in self.draw(task) for event in some]

    async def describe(self) -> dict[str, Any]:
        return await asyncio.to_thread(self._replica.describe)

    def check_health(self) -> None:
        self._replica.check()


class RayBackend:
    """A `Backend` of all replicas: each request goes to one with few."""

    def __init__(self) -> None:
        from ray import serve

        from pipelines.serve.metrics import observer

        self._handle = serve.get_app_handle(SAMPLERS)
        self._stream = self._handle.options(method_name="draw", stream=True)
        self._refusals, self._observe = Refusals(), observer()

    async def draw(self, task: Task) -> AsyncIterator[list[dict[str, Any]]]:
        from ray.serve.exceptions import BackPressureError

        if (refusal := self._refusals.find(task)) is not None:
            self._observe("refused", 1)
            yield [refusal]
            return
        response = self._stream.remote(task) if task.events else self._handle.draw_whole.remote(task)
        try:
            if task.events:
                async for events in response:
                    self._refusals.note(task, events)
                    yield events
            else:
                events = await response
                self._refusals.note(task, events)
                yield events
        except BackPressureError:
            raise Unserved(429, "as many requests wait as may wait; try again in a moment", 1.0) from None
        finally:
            response.cancel()

    async def describe(self) -> dict[str, Any]:
        return dict(await self._handle.describe.remote())


def samplers_of_this_cluster(config: ServeConfig) -> Any:
    """The application of the replicas, which share this cluster."""
    device = cluster.resolve_device(config.device)
    resources, threads = cluster.resources_per_worker(
        config.most_replicas, device, config.gpus_per_replica, "num_replicas"
    )
    if not config.snapshot.startswith(MLFLOW):
        config = config.model_copy(update={"snapshot": storage.absolute(config.snapshot)})
    share = f"{resources['CPU']:g} CPU, {resources.get('GPU', 0):g} GPU each"
    say(f"serve: starts {config.num_replicas} x {config.snapshot} on {device} ({share})")
    return samplers_application(config, device, resources, threads)


def samplers_application(config: ServeConfig, device: str, resources: Mapping[str, float], threads: int | None) -> Any:
    """The application of the replicas, with these resources each. The model is loaded where a replica starts.

    threads: torch's in a replica; None for what its resources give.
    """
    from ray import serve

    if isinstance(config.num_replicas, int):
        number: dict[str, Any] = {"num_replicas": config.num_replicas}
    else:
        least, most = config.num_replicas
        number = {
            "autoscaling_config": {
                "min_replicas": least,
                "max_replicas": most,
                "target_ongoing_requests": _REQUESTS_PER_REPLICA,
                "upscale_delay_s": 5.0,  # loading a model takes longer than that: no use in waiting
                "downscale_delay_s": 120.0,
            }
        }
    sampler = serve.deployment(
        name="Sampler",
        ray_actor_options={
            "num_cpus": resources["CPU"],
            "num_gpus": resources.get("GPU", 0),
            "runtime_env": {"env_vars": _LATENCY},
        },
        # The engine bounds its queue itself; beyond it is room for probes, answered under any load.
        max_ongoing_requests=config.max_waiting + _ROOM_FOR_PROBES,
        max_queued_requests=config.max_waiting,
        **number,
    )(Sampler)
    return sampler.bind(config, device, threads)


def frontend_application(config: ServeConfig, token_sha256: str | None) -> Any:
    """The application that answers HTTP: one replica of it, for it owns the requests' ids."""
    from ray import serve

    in_flight = 2 * config.most_replicas + 1

    def build() -> "FastAPI":
        return create_app(RayBackend(), token_sha256=token_sha256, in_flight=in_flight)

    frontend = serve.deployment(
        name="Frontend",
        num_replicas=1,
        ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": _LATENCY}},
        max_ongoing_requests=10_000,
    )
    return frontend(serve.ingress(build)()).bind()

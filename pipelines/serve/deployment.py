"""Ray Serve around the application: a frontend, which owns the requests, and replicas that each hold the model."""

import asyncio
import contextlib
import errno
import hashlib
import logging
import os
import signal
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

from ldm import storage
from ldm.config import RequestError
from ldm.snapshot import Snapshot
from pipelines import cluster
from pipelines.progress import say
from pipelines.serve.app import create_app
from pipelines.serve.catalog import MLFLOW, Catalog
from pipelines.serve.config import ServeConfig, read_token
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
_READY_WITHIN_S = 60.0


@dataclass(frozen=True)
class ServePlan:
    """What will be served, and where. token_sha256: None for no token."""

    snapshot: Snapshot
    port: int
    url: str
    token_sha256: str | None


def plan(config: ServeConfig) -> ServePlan:
    """Checks the request without Ray and without weights. Raises RequestError."""
    snapshot = Catalog(config.snapshot).default().snapshot
    port = _free_port(config.host, config.port)
    token = read_token(config)
    host = "127.0.0.1" if config.host == "0.0.0.0" else config.host
    digest = None if token is None else hashlib.sha256(token.encode()).hexdigest()
    return ServePlan(snapshot, port, f"http://{host}:{port}", digest)


@contextlib.contextmanager
def deployment(config: ServeConfig) -> Iterator[str]:
    """Serves for the duration of the block, in the Ray session that runs or in its own; yields the URL.

    Raises RequestError; RuntimeError where the replicas do not start.
    """
    todo = plan(config)
    with cluster.ray_session():
        from ray import serve

        _refuse_second_serve()
        samplers, frontend = _samplers(config), _frontend(config, todo.token_sha256)
        try:
            _start_http(config.host, todo.port)
            _start(samplers, SAMPLERS, None)
            _start(frontend, FRONTEND, "/")
            _wait_until_ready(todo.url)
            yield todo.url
        finally:
            serve.shutdown()


def serve_forever(config: ServeConfig) -> None:
    """Serves until Ctrl-C or SIGTERM; no Ray process that it started is left. For the main thread only.

    Raises RequestError; RuntimeError where the replicas do not start.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        with deployment(config) as url:
            say(_welcome(config, url))
            with contextlib.suppress(KeyboardInterrupt):
                threading.Event().wait()
            say("serve: stops")
    finally:
        signal.signal(signal.SIGTERM, previous)


class Sampler:
    """A `Replica` as Ray Serve holds it."""

    def __init__(self, config: ServeConfig, device: str, threads: int) -> None:
        from pipelines.serve.metrics import observer

        cluster.use_threads(threads)
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


def _samplers(config: ServeConfig) -> Any:
    """The application of the replicas. The model is loaded where a replica starts."""
    from ray import serve

    device = cluster.resolve_device(config.device)
    resources, threads = cluster.resources_per_worker(
        config.most_replicas, device, config.gpus_per_replica, "num_replicas"
    )
    num_gpus = resources.get("GPU", 0)
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
    if not config.snapshot.startswith(MLFLOW):
        config = config.model_copy(update={"snapshot": storage.absolute(config.snapshot)})
    share = f"{resources['CPU']:g} CPU, {num_gpus:g} GPU each"
    say(f"serve: starts {config.num_replicas} x {config.snapshot} on {device} ({share})")
    sampler = serve.deployment(
        name="Sampler",
        ray_actor_options={
            "num_cpus": resources["CPU"],
            "num_gpus": num_gpus,
            "runtime_env": {"env_vars": _LATENCY},
        },
        # The engine bounds its queue itself; beyond it is room for probes, answered under any load.
        max_ongoing_requests=config.max_waiting + _ROOM_FOR_PROBES,
        max_queued_requests=config.max_waiting,
        **number,
    )(Sampler)
    return sampler.bind(config, device, threads)


def _frontend(config: ServeConfig, token_sha256: str | None) -> Any:
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


def _start_http(host: str, port: int) -> None:
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.CRITICAL)  # the error of _start says what it would
    serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port}, logging_config=_quiet())


def _start(application: Any, name: str, route: str | None) -> None:
    """Starts an application. Raises the RequestError that a replica raised, else RuntimeError."""
    from ray import serve

    try:
        serve.run(application, name=name, route_prefix=route, logging_config=_quiet())
    except RuntimeError as error:
        replicas = serve.status().applications[name].deployments.values()
        cause = next((r.message for r in replicas if r.message), str(error))
        line = cause.strip().splitlines()[-1].strip()  # of a traceback: the exception
        if "RequestError: " in line:
            raise RequestError(line.split("RequestError: ", 1)[1]) from None
        raise RuntimeError(f"the replicas do not start: {line}") from error


def _quiet() -> dict[str, Any]:
    return {"log_level": "WARNING", "enable_access_log": False}


def _refuse_second_serve() -> None:
    """A Ray cluster has one Serve, with one address: stopping ours would stop another's."""
    import ray

    names = {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}
    if "SERVE_CONTROLLER_ACTOR" in names:
        raise RequestError("RAY_ADDRESS: a Ray Serve runs on this cluster already; end it, or give another cluster")


def _wait_until_ready(url: str) -> None:
    """The proxy learns of the application a moment after it runs."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never by way of an HTTP proxy
    limit = time.monotonic() + _READY_WITHIN_S
    while True:
        try:
            with opener.open(f"{url}/readyz", timeout=10):
                return
        except OSError as error:
            if time.monotonic() > limit:
                seconds = f"{_READY_WITHIN_S:.0f} s"
                raise RuntimeError(f"{url}/readyz gives no answer in {seconds} ({error})") from error
            time.sleep(0.1)


def _free_port(host: str, port: int) -> int:
    """`port`, or any free one for 0. Raises RequestError where nothing can listen there."""
    try:
        with socket.create_server((host, port)) as probe:
            return int(probe.getsockname()[1])
    except OSError as error:
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            message = f"host={host}: is no address of this machine; give 127.0.0.1 or 0.0.0.0"
            raise RequestError(message) from None
        if error.errno == errno.EADDRINUSE:
            raise RequestError(f"port={port}: is in use; give another, or stop what listens there") from None
        raise RequestError(f"port={port}: cannot be listened on ({error.strerror}); give another") from None


def _welcome(config: ServeConfig, url: str) -> str:
    if config.token_file is not None:
        reach, token = f"for the token in {config.token_file}", ' -H "Authorization: Bearer $(cat TOKEN_FILE)"'
    else:
        reach, token = "only this machine reaches it: there is no token", ""
    return (
        f"serve: {url} ({reach}); Ctrl-C stops it\n"
        f"  look  {url}/\n"
        f"  try   curl -sS {url}/v1/samples{token} -H 'content-type: application/json' "
        """-d '{"seed": 0, "response_format": "png"}' -o picture.png\n"""
        f"  more  {url}/docs"
    )

"""Ray Serve around the application: one proxy at the head, replicas that each hold the model."""

import contextlib
import errno
import logging
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ldm import storage
from ldm.config import Config, Location, RequestError
from ldm.drawing import load_sampler
from ldm.snapshot import Snapshot, read_snapshot
from pipelines import cluster
from pipelines.progress import say
from pipelines.serve.app import Engine, create_app

if TYPE_CHECKING:
    from fastapi import FastAPI

APPLICATION = "ldm"
_LOOPBACK = ("127.0.0.1", "localhost")
_ROOM_FOR_PROBES = 32
_READY_WITHIN_S = 60.0


class ServeConfig(Config):
    """Serves a snapshot over HTTP with Ray Serve."""

    snapshot: Location = Field(description="what `ldm train` wrote: a snapshot directory or URL")
    host: str = Field("127.0.0.1", description="IPv4 address to listen on; 0.0.0.0: all of this machine")
    port: int = Field(8000, ge=0, le=65535, description="TCP port; 0: any free one")
    batch_size: int = Field(32, gt=0, description="pictures in one call; a part of what a picture depends on")
    max_images: int = Field(1024, gt=0, description="most pictures in one request")
    max_waiting: int = Field(64, gt=0, description="most requests at a replica at a time; others get a 429")
    num_replicas: int = Field(1, gt=0, description="replicas, each with the whole model")
    gpus_per_replica: float = Field(1.0, gt=0, le=1, description="share of a GPU that a replica takes")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the replicas run")
    denoiser_type: str | None = Field(None, description="package:Class, for a snapshot of your own denoiser class")


@dataclass(frozen=True)
class ServePlan:
    """What will be served, and where."""

    snapshot: Snapshot
    port: int
    url: str


def plan(config: ServeConfig) -> ServePlan:
    """Checks the request without Ray and without weights. Raises RequestError."""
    snapshot = read_snapshot(config.snapshot)
    port = _free_port(config.host, config.port)
    host = "127.0.0.1" if config.host == "0.0.0.0" else config.host
    return ServePlan(snapshot, port, f"http://{host}:{port}")


@contextlib.contextmanager
def deployment(config: ServeConfig) -> Iterator[str]:
    """Serves for the duration of the block, in the Ray session that runs or in its own; yields the URL.

    Raises RequestError; RuntimeError where the replicas do not start.
    """
    todo = plan(config)
    with cluster.ray_session():
        from ray import serve

        _refuse_second_serve()
        application = _application(config)
        try:
            _start(application, config.host, todo.port)
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


def _application(config: ServeConfig) -> Any:
    """The Ray Serve application. The model is loaded where a replica starts."""
    from ray import serve

    device = cluster.resolve_device(config.device)
    resources, threads = cluster.resources_per_worker(config.num_replicas, device)
    num_gpus = config.gpus_per_replica if device == "cuda" else 0
    url = storage.absolute(config.snapshot)

    def build() -> "FastAPI":
        cluster.use_threads(threads)
        sampler = load_sampler(url, config.batch_size, device, config.denoiser_type)
        return create_app(Engine(sampler, config.max_waiting), read_snapshot(url), config.max_images)

    share = f"{resources['CPU']:g} CPU, {num_gpus:g} GPU each"
    say(f"serve: starts {config.num_replicas} x {config.snapshot} on {device} ({share})")
    replica = serve.deployment(
        name="Sampler",
        num_replicas=config.num_replicas,
        ray_actor_options={"num_cpus": resources["CPU"], "num_gpus": num_gpus},
        # The engine bounds its queue itself; beyond it is room for probes, answered under any load.
        max_ongoing_requests=config.max_waiting + _ROOM_FOR_PROBES,
    )
    return replica(serve.ingress(build)()).bind()


def _start(application: Any, host: str, port: int) -> None:
    """Starts Serve and the replicas. Raises the RequestError that a replica raised, else RuntimeError."""
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.CRITICAL)  # the error below says what it would
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port}, logging_config=quiet)
    try:
        serve.run(application, name=APPLICATION, route_prefix="/", logging_config=quiet)
    except RuntimeError as error:
        replicas = serve.status().applications[APPLICATION].deployments.values()
        cause = next((r.message for r in replicas if r.message), str(error))
        line = cause.strip().splitlines()[-1].strip()  # of a traceback: the exception
        if "RequestError: " in line:
            raise RequestError(line.split("RequestError: ", 1)[1]) from None
        raise RuntimeError(f"the replicas do not start: {line}") from error


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
    if config.host in _LOOPBACK:
        reach = "only this machine reaches it"
    else:
        reach = "whoever reaches this machine can use it: there is no password"
    return (
        f"serve: {url} ({reach}); Ctrl-C stops it\n"
        f"  try   curl -sS {url}/v1/samples -H 'content-type: application/json' "
        """-d '{"seed": 0, "response_format": "png"}' -o picture.png\n"""
        f"  more  {url}/docs"
    )

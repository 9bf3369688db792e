"""Ray Serve around the applications: started, awaited, and ended with all that was started."""

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
from typing import Any

from ldm.config import RequestError
from ldm.snapshot import Snapshot
from pipelines import cluster
from pipelines.progress import say
from pipelines.serve.applications import FRONTEND, SAMPLERS, frontend_application, samplers_of_this_cluster
from pipelines.serve.catalog import Catalog
from pipelines.serve.config import ServeConfig, read_token, token_sha256

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
    return ServePlan(snapshot, port, f"http://{host}:{port}", token_sha256(token))


@contextlib.contextmanager
def deployment(config: ServeConfig) -> Iterator[str]:
    """Serves for the duration of the block, in the Ray session that runs or in its own; yields the URL.

    Raises RequestError; RuntimeError where the replicas do not start.
    """
    todo = plan(config)
    with cluster.ray_session():
        from ray import serve

        _refuse_second_serve()
        samplers, frontend = samplers_of_this_cluster(config), frontend_application(config, todo.token_sha256)
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

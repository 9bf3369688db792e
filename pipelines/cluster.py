"""Ray, started here when nothing says where, and stopped again with every process that was started."""

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import psutil

from ldm.config import RequestError

# What Ray prints on the driver's stdout beside our own line for the same event; read when ray is imported.
os.environ.setdefault(
    "RAY_DEDUP_LOGS_SKIP_REGEX",
    r"ServeController\.graceful_shutdown failed|A worker died or was killed while executing a task",
)


@contextlib.contextmanager
def ray_session() -> Iterator[None]:
    """Ray for the duration of a stage.

    A session that already runs in this process is used; else `RAY_ADDRESS` or, inside a submitted job, the job's own
    cluster; else a local Ray is started, and no process of it is left at the end, Ctrl-C included.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = {"log_to_driver": _workers_speak(), "logging_level": logging.ERROR}
    if os.environ.get("RAY_ADDRESS"):
        try:
            ray.init(address="auto", **quiet)
        except ConnectionError as error:
            text = " ".join(str(error).split())[:160]
            raise RequestError(f"RAY_ADDRESS={os.environ['RAY_ADDRESS']}: no Ray answers there ({text})") from None
        try:
            yield
        finally:
            ray.shutdown()
        return
    ours = {process.pid for process in psutil.Process().children(recursive=True)}
    try:
        with _interrupts_wait():  # half a start cannot be stopped
            ray.init(address="local", include_dashboard=False, **quiet)
        yield
    finally:
        with _interrupts_wait():
            started = [p for p in psutil.Process().children(recursive=True) if p.pid not in ours]
            ray.shutdown()
            _end(started)


def resources_per_worker(num_workers: int, device: str) -> tuple[dict[str, float], int]:
    """(Ray resources of one worker, its CPU threads): a whole GPU each, or an equal share of the CPU cores."""
    import ray

    nodes = [node["Resources"].get("CPU", 1.0) for node in ray.nodes() if node["Alive"]]
    equal = sum(nodes) / num_workers
    # A worker must fit on one node. Workers may outnumber the cores (tests, trials): they then share them.
    share = min(float(max(1, int(equal))), equal, max(nodes))
    if device == "cuda":
        return {"CPU": min(1.0, share), "GPU": 1.0}, max(1, int(share))
    return {"CPU": share}, max(1, int(share))


def resolve_device(device: str) -> str:
    """`auto` => "cuda" where the cluster has a GPU, else "cpu". Raises RequestError for a GPU that is not there."""
    import ray

    has_gpu = ray.cluster_resources().get("GPU", 0) > 0
    if device == "cuda" and not has_gpu:
        raise RequestError("device=cuda: the cluster has no GPU; give device=cpu or device=auto")
    return "cuda" if device != "cpu" and has_gpu else "cpu"


def _workers_speak() -> bool:
    """What workers print is for the one who looks for a fault."""
    return os.environ.get("LDM_WORKER_LOGS", "") not in ("", "0")


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Ctrl-C and SIGTERM take effect at the end of the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        caught.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if caught and sys.exc_info()[0] is None:
            raise KeyboardInterrupt


def _end(processes: list[psutil.Process]) -> None:
    """Waits for processes to end; those that do not are killed, by their id."""
    _, alive = psutil.wait_procs(processes, timeout=5)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=5)

"""Ray, started here when nothing says where, and stopped again with every process that was started."""

import contextlib
import logging
import math
import os
import platform
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from ldm.config import RequestError
from pipelines.progress import counted, say

# What Ray prints on the driver's stdout beside our own line for the same event; read when ray is imported.
os.environ.setdefault(
    "RAY_DEDUP_LOGS_SKIP_REGEX",
    r"ServeController\.graceful_shutdown failed|A worker died or was killed while executing a task",
)
_HEAD_WAIT_S = 20.0  # a head that is started anew takes connections again within it
HEAD_BEGAN_ANEW = (
    "the head of the Ray cluster has begun anew and knows nothing of this run; what was committed stays, and the same "
    "command goes on"
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
    if address := os.environ.get("RAY_ADDRESS"):
        if address.startswith(("http://", "https://")):
            raise RequestError(f"RAY_ADDRESS={address}: is a dashboard; give HEAD:6379, or use `ldm submit`")
        _wait_for_head(address)
        try:
            with _interrupts_wait():  # and Ray has put in a handler that aborts at SIGTERM: ours come back after it
                ray.init(address="auto", **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            text = " ".join(str(error).split())[:160]
            raise RequestError(f"RAY_ADDRESS={address}: no Ray takes us there ({text})") from None
        try:
            yield
        except ray.exceptions.RayError as error:
            if "WrongClusterID" not in str(error):  # which Ray takes for a question of tokens
                raise
            raise RuntimeError(HEAD_BEGAN_ANEW) from None
        finally:
            ray.shutdown()
        return
    ours = {process.pid for process in psutil.Process().children(recursive=True)}
    try:
        _start_ray(ours, quiet)
        yield
    finally:
        with _interrupts_wait():
            _stop_ray(ours)


def _wait_for_head(address: str) -> None:
    """Raises RequestError where nobody takes a connection at HOST:PORT for 20 s; Ray itself tries for many minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return  # Ray says what is wrong with it
    limit = time.monotonic() + _HEAD_WAIT_S
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except (OSError, OverflowError) as error:
            if time.monotonic() > limit:
                wanted = f"nobody answers there ({error}); give HEAD:6379 of a cluster that runs"
                raise RequestError(f"RAY_ADDRESS={address}: {wanted}") from None
        time.sleep(0.5)


def _start_ray(ours: set[int], quiet: Mapping[str, Any]) -> None:
    """Ray on this machine. Of its 30 s for that a busy machine may need more only to read it: then it starts again."""
    import ray

    for again in (True, False):
        with _interrupts_wait():  # half a start cannot be stopped
            try:
                ray.init(address="local", include_dashboard=False, **quiet)
                return
            except Exception as error:  # Ray has no class for it
                if "timed out during startup" not in str(error):
                    raise
            _stop_ray(ours)
        if again:
            say("Ray: is not there after 30 s on this machine; it is started once more")
    raise RuntimeError("Ray was started twice and not there after 30 s each time; has this machine memory to spare?")


def _stop_ray(ours: set[int]) -> None:
    """Ends all processes below this one that are not `ours`."""
    import ray

    started = [process for process in psutil.Process().children(recursive=True) if process.pid not in ours]
    ray.shutdown()
    _end(started)


def resources_per_worker(
    num_workers: int,
    device: str,
    num_gpus: float = 1.0,
    key: str = "num_workers",
    nodes: Sequence[Mapping[str, float]] | None = None,
) -> tuple[dict[str, float], int]:
    """(Ray resources of one worker, its CPU threads): `num_gpus` each, or an equal share of the CPU cores.

    nodes: their resources; None: those of the cluster. Raises RequestError, which names `key`, where they have not so
    many GPUs, or no CPU.
    """
    nodes = list(live_nodes().values()) if nodes is None else nodes
    cpus = [int(node.get("CPU", 0)) for node in nodes]  # a head without work has none
    check_room(num_workers, device, nodes, num_gpus, key)
    share = cpu_share(cpus, num_workers)
    threads = max(1, int(share))
    if device == "cuda":
        return {"CPU": min(1.0, share), "GPU": num_gpus}, threads
    return {"CPU": share}, threads


def check_room(
    num_workers: int,
    device: str,
    nodes: Sequence[Mapping[str, float]],
    num_gpus: float = 1.0,
    key: str = "num_workers",
) -> None:
    """Raises RequestError where nodes with these resources have no room for workers of `num_gpus` each, or no CPU."""
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    most = places({"GPU": num_gpus}, nodes)
    if device == "cuda" and most < num_workers:
        has = f"{key}={num_workers}: the cluster has {counted(gpus, 'GPU')}"
        raise RequestError(f"{has}; give {'at most ' if most > 1 else ''}{most}, or device=cpu")
    if not any(int(node.get("CPU", 0)) for node in nodes):
        raise RequestError(f"{key}={num_workers}: the cluster has no CPU for a worker; add a node")


def place_workers(
    worlds: Sequence[int], device: str, nodes: Sequence[Mapping[str, float]]
) -> tuple[int, dict[str, float]] | None:
    """(the largest of `worlds` that nodes with these resources hold, Ray resources of one of its workers).

    A worker has a whole GPU, or an equal share of the CPU cores: a whole one at least, but where not even the smallest
    world has that (tests, trials). None where there is no room.
    """
    cpus = [int(node.get("CPU", 0)) for node in nodes]  # a head without work has none
    if not any(cpus):
        return None
    on_gpu = device == "cuda"
    room = sum(int(node.get("GPU", 0)) for node in nodes) if on_gpu else sum(cpus)
    world = max((world for world in worlds if world <= room), default=None if on_gpu else min(worlds))
    if world is None:
        return None
    share = cpu_share(cpus, world)
    return world, {"CPU": min(1.0, share), "GPU": 1.0} if on_gpu else {"CPU": share}


def known_nodes() -> list[dict[str, float]] | None:
    """The resources of the nodes that a stage will run on, as far as that is known without a session: those of the Ray
    that runs in this process, or of this machine where one would be started here; None for another cluster."""
    ray = sys.modules.get("ray")  # it takes a second to import, and where nobody has it does not run
    if ray is not None and ray.is_initialized():
        return list(live_nodes().values())
    if os.environ.get("RAY_ADDRESS"):
        return None
    import torch

    return [{"CPU": float(len(os.sched_getaffinity(0))), "GPU": float(torch.cuda.device_count())}]


def live_nodes() -> dict[str, dict[str, float]]:
    """The resources of each node by its id; without those that are about to be taken away."""
    import ray

    leaving = draining_nodes()
    alive = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]
    return {node["NodeID"]: node["Resources"] for node in alive}


def free_resources() -> dict[str, dict[str, float]]:
    """What of each live node nobody uses now; it may be a second old."""
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node()
    return {node: free.get(node, {}) for node in live_nodes()}


def draining_nodes() -> dict[str, int]:
    """The ids of the nodes that are about to be taken away, with the time of it, ms since 1970; 0: not known."""
    from ray._private.state import state

    return dict(state.get_draining_nodes())


def places(resources: Mapping[str, float], nodes: Iterable[Mapping[str, float]] | None = None) -> int:
    """How many workers with these resources the nodes have room for: those that are there now, were they empty."""
    rooms = live_nodes().values() if nodes is None else nodes
    room = [min(node.get(name, 0.0) / amount for name, amount in resources.items()) for node in rooms]
    return sum(int(share + 1e-9) for share in room)


def cpu_share(nodes: list[int], num_workers: int) -> float:
    """CPUs of each of `num_workers`, all of which fit on nodes of so many CPUs.

    The largest whole number; where there are more workers than cores (tests, trials), an equal part of one.
    """
    whole = [s for s in range(1, max(nodes) + 1) if sum(cpus // s for cpus in nodes) >= num_workers]
    if whole:
        return float(max(whole))
    used = [cpus for cpus in nodes if cpus]
    workers_on_each = -(-num_workers // len(used))
    return math.floor(min(used) / workers_on_each * 1e4) / 1e4  # Ray counts in steps of 1/10,000


def worker_threads(on_this_node: int) -> int:
    """torch's threads of one of so many workers on a node: its share of the CPUs that it was given or may use."""
    import ray

    given = ray.get_runtime_context().get_assigned_resources()
    cores = len(os.sched_getaffinity(0)) // on_this_node if "GPU" in given else given.get("CPU", 1.0)
    return max(1, int(cores))


def use_threads(threads: int) -> None:
    """Sets torch's threads in this worker: not more than it has cores, for Ray's CPUs are what somebody said."""
    import torch

    torch.set_num_threads(min(threads, len(os.sched_getaffinity(0))))


def node_memory() -> int:
    """Bytes that this node's processes may use from now on: what is available, and at most the cgroup's limit."""
    return min([psutil.virtual_memory().available, *_cgroup_limits()])


def describe() -> dict[str, str]:
    """Tags that say where a run ran: host, nodes, and what they have."""
    import ray

    total = ray.cluster_resources()
    nodes = [node for node in ray.nodes() if node["Alive"]]
    device = f"{total.get('CPU', 0):g} CPU, {total.get('GPU', 0):g} GPU on {len(nodes)} nodes"
    return {"host": platform.node(), "device": device}


def has_dashboard() -> bool:
    """Whether the Ray that we are connected to has a dashboard; one that was started here has none."""
    from ray._private.worker import get_dashboard_url

    return bool(get_dashboard_url())


def resolve_device(device: str) -> str:
    """`auto` => "cuda" where the cluster has a GPU, else "cpu". Raises RequestError for a GPU that is not there."""
    import ray

    return choose_device(device, [ray.cluster_resources()])


def choose_device(device: str, nodes: Iterable[Mapping[str, float]]) -> str:
    """`resolve_device` for nodes with these resources."""
    has_gpu = any(node.get("GPU", 0) > 0 for node in nodes)
    if device == "cuda" and not has_gpu:
        raise RequestError("device=cuda: the cluster has no GPU; give device=cpu or device=auto")
    return "cuda" if device != "cpu" and has_gpu else "cpu"


def _cgroup_limits() -> list[int]:
    """Of this process's cgroup and those above it, versions 1 and 2."""
    limits = []
    for line in Path("/proc/self/cgroup").read_text().splitlines() if Path("/proc/self/cgroup").exists() else []:
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            root, name = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
        elif not controllers:
            root, name = Path("/sys/fs/cgroup"), "memory.max"
        else:
            continue
        # Inside a container the path may be that of the host: then the root of the mount is the container's own.
        inside = root / path.strip("/")
        for folder in (inside, *(parent for parent in inside.parents if parent.is_relative_to(root))):
            if (folder / name).is_file() and (text := (folder / name).read_text().strip()) != "max":
                limits.append(int(text))
    return limits


def _workers_speak() -> bool:
    """What workers print is for the one who looks for a fault."""
    return os.environ.get("LDM_WORKER_LOGS", "") not in ("", "0")


@contextlib.contextmanager
def interrupts_noted() -> Iterator[list[int]]:
    """The first Ctrl-C or SIGTERM within the block is put into the list; the next one takes effect at once."""
    caught: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if caught:
            raise KeyboardInterrupt(number)
        caught.append(number)

    with _handled_by(note):
        yield caught


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Ctrl-C and SIGTERM take effect at the end of the block."""
    caught: list[int] = []
    with _handled_by(lambda number, frame: caught.append(number)):
        yield
    if caught and sys.exc_info()[0] is None:
        raise KeyboardInterrupt(caught[0])


@contextlib.contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Ctrl-C and SIGTERM call `handler` within the block; only the main thread is ever told of them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


def _end(processes: list[psutil.Process]) -> None:
    """Waits for processes to end; those that do not are killed, by their id."""
    _, alive = psutil.wait_procs(processes, timeout=5)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=5)

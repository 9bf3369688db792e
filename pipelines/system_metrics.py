"""How busy the nodes of a run are: CPU, memory, network, disk and GPUs of each, in the run's `system/NODE/…` metrics.

The names and units are those of MLflow's own system metrics, so that its page shows them as such. MLflow's monitor
writes from each node by itself, and what it writes while the server is down is lost; here the driver, which is the
run's one writer, asks a small Ray actor on each node.
"""

import contextlib
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import psutil

from pipelines.tracking import Tracker

_MB = 1e6


class NodeProbe:
    """A Ray actor on a node. Counters begin with it."""

    def __init__(self) -> None:
        psutil.cpu_percent()  # which measures from one call to the next
        self._began = _network()
        self._gpus = _gpus()

    def sample(self) -> dict[str, float]:
        """Percent, megabytes (10^6 bytes) and watts by name; the CPU's load since the sample before."""
        memory, disk, network = psutil.virtual_memory(), psutil.disk_usage("/"), _network()
        return {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / _MB,
            "system_memory_usage_percentage": memory.used / memory.total * 100,
            "disk_usage_percentage": disk.percent,
            "disk_available_megabytes": disk.free / _MB,
            "network_receive_megabytes": (network[0] - self._began[0]) / _MB,
            "network_transmit_megabytes": (network[1] - self._began[1]) / _MB,
            **{name: value for gpu, handle in enumerate(self._gpus) for name, value in _gpu_sample(gpu, handle)},
        }


class SystemMetrics:
    """A context manager: a thread samples the nodes of a stage each `tracking.system_metrics_s` seconds.

    A stage that is shorter starts no actor. A node that does not answer is left out, and asked again the next time.

    Args:
        nodes: the ids of the nodes in use now.
    """

    def __init__(self, tracker: Tracker, nodes: Callable[[], set[str]]) -> None:
        self._tracker, self._nodes = tracker, nodes
        self._every = tracker.config.system_metrics_s if tracker.config.enabled else None
        self._probes: dict[str, Any] = {}
        self._names: dict[str, str] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="system-metrics", daemon=True)

    def __enter__(self) -> "SystemMetrics":
        if self._every is not None:
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        import ray

        self._over.set()
        if self._every is None:
            return
        self._thread.join()
        for probe in self._probes.values():
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(probe)

    def _run(self) -> None:
        import ray

        while not self._over.wait(self._every):
            try:
                self._sample()
            except ray.exceptions.RayError:  # of the session that ends, or of an actor that is asked for the nodes
                continue

    def _sample(self) -> None:
        """Asks all nodes at once, and logs what they answer in time."""
        import ray

        nodes = self._nodes()
        for node in nodes - self._probes.keys():
            self._probes[node] = _start_probe(node)
        asked = {self._probes[node].sample.remote(): node for node in nodes}
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=self._every) if asked else ([], [])
        for future in answered:
            node = asked[future]
            try:
                values = ray.get(future)
            except ray.exceptions.RayError:  # the node is lost, or its actor: a new one, should it be used again
                del self._probes[node]
                continue
            self._tracker.system({f"system/{self._name(node)}/{key}": value for key, value in values.items()})

    def _name(self, node: str) -> str:
        """Of the host, so that a run that goes on there has the same one; further nodes on one host are numbered."""
        import ray

        if node not in self._names:
            hosts = {entry["NodeID"]: str(entry["NodeManagerHostname"]) for entry in ray.nodes()}
            host = hosts.get(node, node[:8])
            others = [name for name in self._names.values() if name == host or name.startswith(f"{host}-node")]
            self._names[node] = f"{host}-node{len(others) + 1}" if others else host
        return self._names[node]


def _start_probe(node: str) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    place = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(NodeProbe).options(num_cpus=0, scheduling_strategy=place).remote()


def _network() -> tuple[int, int]:
    """Bytes (received, sent) so far by all interfaces."""
    counters = psutil.net_io_counters()
    return (0, 0) if counters is None else (counters.bytes_recv, counters.bytes_sent)


def _gpus() -> list[Any]:
    """NVML's handles, where there is a GPU and the package nvidia-ml-py."""
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []


def _gpu_sample(number: int, handle: Any) -> list[tuple[str, float]]:
    import pynvml

    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return [
        (f"gpu_{number}_utilization_percentage", pynvml.nvmlDeviceGetUtilizationRates(handle).gpu),
        (f"gpu_{number}_memory_usage_megabytes", memory.used / _MB),
        (f"gpu_{number}_memory_usage_percentage", memory.used / memory.total * 100),
        (f"gpu_{number}_power_usage_watts", pynvml.nvmlDeviceGetPowerUsage(handle) / 1000),
    ]

"""How workers are sized, and which addresses are refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ldm.config import RequestError
from pipelines.cluster import check_room, cpu_share, node_memory
from pipelines.progress import counted

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("nodes", "num_workers", "share"),
    [
        ([2], 2, 1.0),
        ([4], 1, 4.0),
        ([16], 3, 5.0),
        ([5, 5], 3, 2.0),  # 3 each would leave the third worker without a place
        ([0, 8], 3, 2.0),  # a head without work
        ([2], 3, 0.6666),
        ([1, 1], 3, 0.5),
    ],
)
def test_every_worker_has_a_place(nodes: list[int], num_workers: int, share: float) -> None:
    assert cpu_share(nodes, num_workers) == share
    places = sum(int(cpus / share + 1e-9) for cpus in nodes)
    assert places >= num_workers


@pytest.mark.parametrize(
    ("num_workers", "device", "nodes", "message"),
    [
        (2, "cuda", [{"CPU": 8, "GPU": 1}], "num_workers=2: the cluster has 1 GPU; give 1, or device=cpu"),
        (9, "cuda", [{"CPU": 8, "GPU": 4}] * 2, "num_workers=9: the cluster has 8 GPUs; give at most 8, or device=cpu"),
        (1, "cpu", [{"CPU": 0}, {}], "num_workers=1: the cluster has no CPU for a worker; add a node"),
    ],
)
def test_what_a_cluster_cannot_hold_is_refused(
    num_workers: int, device: str, nodes: list[dict[str, float]], message: str
) -> None:
    with pytest.raises(RequestError) as caught:
        check_room(num_workers, device, nodes)
    assert str(caught.value) == message
    check_room(max(1, num_workers - 1), device, [*nodes, {"CPU": 1}])


def test_workers_may_share_gpus() -> None:
    check_room(4, "cuda", [{"CPU": 8, "GPU": 2}], 0.5, "num_replicas")
    with pytest.raises(RequestError, match=r"^num_replicas=5: the cluster has 2 GPUs; give at most 4, or device=cpu$"):
        check_room(5, "cuda", [{"CPU": 8, "GPU": 2}], 0.5, "num_replicas")


def test_the_memory_of_this_node_is_known() -> None:
    assert 10**8 < node_memory() < 10**14


def test_one_worker_is_no_workers() -> None:
    assert [counted(number, "worker") for number in (0, 1, 2000)] == ["0 workers", "1 worker", "2,000 workers"]


def test_the_address_of_a_dashboard_is_not_that_of_a_cluster() -> None:
    """In a process of its own, where no Ray runs yet."""
    program = "from pipelines.cluster import ray_session\nwith ray_session(): pass"
    environment = {**os.environ, "RAY_ADDRESS": "http://127.0.0.1:8265", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=60)
    assert "RequestError: RAY_ADDRESS=http://127.0.0.1:8265: is a dashboard; give HEAD:6379" in done.stderr


def test_an_address_where_nobody_listens_is_told_soon() -> None:
    program = "from pipelines import cluster\ncluster._HEAD_WAIT_S = 1\nwith cluster.ray_session(): pass"
    environment = {**os.environ, "RAY_ADDRESS": "127.0.0.1:9", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=60)
    assert "RequestError: RAY_ADDRESS=127.0.0.1:9: nobody answers there (" in done.stderr


SLOW_START = """
import sys, time
from types import SimpleNamespace
import psutil
import ray
from ray._private import node, services
from pipelines.cluster import ray_session

real, starts = services.get_node, []

def get_node(*arguments):  # a raylet that is not there yet, at which Ray's clock finds its 30 s over
    if len(starts) == int(sys.argv[1]):
        return real(*arguments)
    starts.append(psutil.Process().children(recursive=True))
    node.time = SimpleNamespace(sleep=time.sleep, time=time.time, monotonic=over)
    raise RuntimeError("not yet")

def over():
    node.time = time
    return time.monotonic() + 31

services.get_node = get_node
try:
    with ray_session():
        print(ray.get(ray.remote(lambda: "works").remote()))
except RuntimeError as error:
    print(error)
left = [process for start in starts for process in start if process.is_running()]
print(len(starts), min(len(start) for start in starts) > 1, left, psutil.Process().children(recursive=True))
"""


@pytest.mark.ray
@pytest.mark.parametrize(
    ("slow_starts", "said"), [(1, "works"), (2, "Ray was started twice and not there after 30 s each time; ")]
)
def test_a_ray_that_does_not_start_in_time_is_started_again(tmp_path: Path, slow_starts: int, said: str) -> None:
    """And nothing is left of the start before."""
    (tmp_path / "slow.py").write_text(SLOW_START)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "slow.py"), str(slow_starts)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("Ray: is not there after 30 s on this machine; it is started once more\n") == 1
    answer, rest = done.stdout.splitlines()
    assert answer.startswith(said) and rest == f"{slow_starts} True [] []"

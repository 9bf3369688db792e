"""How busy each node of a run is: what is sampled, under which names, also where a node is lost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from pipelines.system_metrics import NodeProbe
from tests.pipelines.mlflow_server import history
from tests.pipelines.training import Run

ROOT = Path(__file__).parents[2]


def test_what_is_sampled() -> None:
    probe = NodeProbe()
    found = probe.sample()
    assert {name for name in found if not name.startswith("gpu_")} == {
        "cpu_utilization_percentage",
        "system_memory_usage_megabytes",
        "system_memory_usage_percentage",
        "disk_usage_percentage",
        "disk_available_megabytes",
        "network_receive_megabytes",
        "network_transmit_megabytes",
    }
    assert all(0 <= value <= 100 for name, value in found.items() if name.endswith("_percentage"))
    assert found["system_memory_usage_megabytes"] < psutil.virtual_memory().total / 1e6
    before = found["network_transmit_megabytes"]
    assert 0 <= before <= probe.sample()["network_transmit_megabytes"]


NODES = """
import json, time
import ray
from ray.cluster_utils import Cluster
from pipelines import cluster
from pipelines.system_metrics import SystemMetrics
from pipelines.tracking import Tracker, TrackingConfig

class Notebook(Tracker):
    def system(self, metrics):
        found.append(set(metrics))

def wait_for(condition):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not condition():
        time.sleep(0.05)
    return condition()

if __name__ == "__main__":
    found = []
    simulated = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    ray.init(address=simulated.address, logging_level="ERROR", log_to_driver=False)
    second = simulated.add_node(num_cpus=1)
    everywhere = lambda: {node["NodeID"] for node in ray.nodes()}  # the lost one too
    with SystemMetrics(Notebook(TrackingConfig(system_metrics_s=0.2), "train/x"), everywhere):
        both = wait_for(lambda: len({next(iter(keys)).split("/")[1] for keys in found}) == 2)
        simulated.remove_node(second, allow_graceful=False)
        seen = len(found)
        goes_on = wait_for(lambda: len(found) > seen + 5)
    names = sorted({key for keys in found for key in keys if "/cpu_" in key})
    print(json.dumps({"both": both, "goes_on": goes_on, "names": names}), flush=True)
    ray.shutdown()
    simulated.shutdown()
"""


@pytest.mark.ray
def test_two_nodes_of_which_one_dies(tmp_path: Path) -> None:
    """Each has metrics of its own; the loss of one leaves those of the other."""
    script = tmp_path / "nodes.py"
    script.write_text(NODES)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    host = os.uname().nodename
    assert found == {
        "both": True,
        "goes_on": True,
        "names": [f"system/{name}/cpu_utilization_percentage" for name in (f"{host}-node2", host)],
    }


@pytest.mark.ray
def test_a_training_run_has_them_over_its_seconds(uninterrupted: Run) -> None:
    client = MlflowClient(uninterrupted.uri)
    key = f"system/{os.uname().nodename}/system_memory_usage_percentage"
    points = history(client, uninterrupted.report.run_id, key)
    assert points and all(0 < value < 100 for _, value in points)
    assert 0 <= points[0][0] <= points[-1][0] < 300  # seconds since the run began

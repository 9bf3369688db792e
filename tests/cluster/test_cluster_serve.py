"""Serving while a node of the replicas dies."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from ldm import storage
from tests.cluster import processes
from tests.cluster.bed import Bed
from tests.cluster.test_cluster_encode import workers
from tests.cluster.test_cluster_path import serving
from tests.pipelines.tiny_snapshot import write_tiny_snapshot

pytestmark = [pytest.mark.cluster, pytest.mark.faults, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def snapshot(s3: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    here = write_tiny_snapshot(tmp_path_factory.mktemp("serve") / "snapshot")
    for name in storage.list_tree(here):
        storage.write_bytes(f"{s3}/serve/snapshot/{name}", (Path(here) / name).read_bytes())
    return f"{s3}/serve/snapshot"


def test_a_node_of_a_replica_dies(bed: Bed, snapshot: str) -> None:
    """What it drew is drawn again by the other: each request is answered, with the same bytes."""

    def draw(seed: int) -> bytes:
        body = {"num_inference_steps": 400, "seed": seed, "exact": True, "response_format": "png"}
        answer: httpx.Response = client.post("/v1/samples", json=body)
        return answer.raise_for_status().content

    with serving(bed, f"snapshot={snapshot}", "num_replicas=2", "deadline_s=1e5") as client:
        expected = [draw(seed) for seed in range(4)]
        replicas = [node for node in bed.nodes if workers(node, "ray::ServeReplica:ldm-samplers")]
        assert len(replicas) == 2, "each on a node of its own"
        victim = next(node for node in replicas if not workers(node, "ray::ServeReplica:ldm:"))
        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(draw, seed % 4) for seed in range(32)]
            processes.until(lambda: any(one.done() for one in asked), "the first answer")
            bed.kill_node(victim)
            assert [one.result() for one in asked] == expected * 8
        processes.until(
            lambda: sum(len(workers(node, "ray::ServeReplica:ldm-samplers")) for node in bed.nodes) == 2,
            "a replica in the place of the lost one",
        )
        assert draw(0) == expected[0]

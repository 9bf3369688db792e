"""Encode on many nodes: `python tests/bench/bench_cluster.py PART …` (nodes, half_lost; some minutes each).

Each node is a raylet of its own on this machine, with one CPU and one encoder. An encoder here takes a fixed time for
each picture (`COST_S`, in place of the autoencoder), so that the cores of this machine do not limit; all else is the
real stage.

nodes: images/s on 1, 2 and 4 nodes, from when the first encoder is ready until the last receipt, over as many times
those of one node; as many shards for each node.
half_lost: two of four nodes are killed in the middle, and the run goes on; then the driver is killed too, and the same
command goes on. Counts the pictures that were encoded, and those in receipts.
"""

import contextlib
import json
import multiprocessing
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
from ray.cluster_utils import Cluster

from ldm.latents.receipt import names_in
from pipelines.encode import EncodeConfig, EncodeReport, encode, pool
from pipelines.encode.plan import Task
from pipelines.encode.worker import ShardEncoder, ShardResult
from tests.pictures import image_shard, samples, tiny_model
from tests.pipelines.encoding import SIZE, config

COST_S = 0.04
PICTURES, BATCH = 96, 8
SHARDS_FOR_A_NODE = 20


class FixedCost(ShardEncoder):
    """Writes what it begins, and how many pictures it encodes, beside the destination."""

    def encode_shard(self, task: Task) -> ShardResult:
        self._note(task.shard.name)
        return super().encode_shard(task)

    def encode(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float16]:
        time.sleep(COST_S * len(pixels))
        self._note(f"+{len(pixels)}")
        return np.zeros((len(pixels), 4, SIZE // 4, SIZE // 4), np.float16)

    def _note(self, line: str) -> None:
        with open(f"{self.config.destination}.log", "a") as log:
            log.write(f"{line}\n")


@contextlib.contextmanager
def cluster_of(nodes: int) -> Iterator[tuple[Cluster, list[Any]]]:
    """A head without work and so many nodes of one CPU."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    workers = [cluster.add_node(num_cpus=1) for _ in range(nodes)]
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    try:
        yield cluster, workers
    finally:
        ray.shutdown()
        cluster.shutdown()


@contextlib.contextmanager
def inputs(shards: int) -> Iterator[Path]:
    """A folder with shards `in/s-000.tar` and an autoencoder `vae`."""
    with tempfile.TemporaryDirectory() as name:
        folder, content = Path(name), samples(PICTURES)
        for number in range(shards):
            image_shard(folder / "in" / f"s-{number:03d}.tar", content)
        tiny_model().save_pretrained(f"{folder}/vae")
        yield folder


def settings(folder: Path, name: str, **changes: Any) -> EncodeConfig:
    return config(f"{folder}/in", folder / name, f"{folder}/vae", batch_size=BATCH, **changes)


def encode_at_fixed_cost(asked: EncodeConfig) -> EncodeReport:
    pool.ShardEncoder = FixedCost  # type: ignore[misc]
    return encode(asked)


def nodes() -> dict[str, Any]:
    rates: dict[int, float] = {}
    with inputs(4 * SHARDS_FOR_A_NODE) as folder:
        for number in (1, 2, 4):
            shards = number * SHARDS_FOR_A_NODE
            with cluster_of(number):
                report = encode_at_fixed_cost(settings(folder, f"latents-{number}", max_shards=shards))
            assert report.encoded == shards * PICTURES
            rates[number] = report.images_per_second
            print(number, rates[number], file=sys.stderr, flush=True)
    return {
        "images/s that the cost allows a node": 1 / COST_S,
        "images/s": rates,
        "of linear": {number: round(rate / number / rates[1], 3) for number, rate in rates.items()},
    }


def half_lost() -> dict[str, Any]:
    shards, found = 2 * SHARDS_FOR_A_NODE, {}
    with inputs(shards) as folder:
        with cluster_of(4) as (cluster, workers):
            asked = settings(folder, "goes-on")
            committed: set[str] = set()
            watcher = threading.Thread(target=lose_half, args=(cluster, workers, asked.destination, committed))
            watcher.start()
            encode_at_fixed_cost(asked)
            watcher.join()
        found["two of four nodes killed"] = account(asked, committed, dead=2)
        print(found, file=sys.stderr, flush=True)
        with cluster_of(4) as (cluster, workers):
            asked = settings(folder, "again")
            spawn = multiprocessing.get_context("spawn")
            driver = spawn.Process(target=drive, args=(asked, cluster.address))
            driver.start()
            wait_for_shards(asked.destination, shards // 3)
            for node in workers[:2]:
                cluster.remove_node(node, allow_graceful=False)
            driver.kill()
            driver.join()
            time.sleep(10)  # until the encoders of the killed driver are gone: what they commit counts as committed
            committed = names_in(asked.destination)
            report = encode_at_fixed_cost(asked)
            assert report.skipped_shards == len(committed)
        found["and the driver, then the same command"] = account(asked, committed, dead=4)
    return found


def drive(asked: EncodeConfig, address: str) -> None:
    from tests.bench import bench_cluster  # encoders find the class there, and not in this process's main module

    ray.init(address=address, logging_level="ERROR", log_to_driver=False)
    bench_cluster.encode_at_fixed_cost(asked)


def lose_half(cluster: Cluster, workers: list[Any], destination: str, committed: set[str]) -> None:
    wait_for_shards(destination, SHARDS_FOR_A_NODE * 2 // 3)
    for node in workers[:2]:
        cluster.remove_node(node, allow_graceful=False)
    committed.update(names_in(destination))


def wait_for_shards(destination: str, count: int) -> None:
    deadline = time.monotonic() + 300
    while len(names_in(destination)) < count and time.monotonic() < deadline:
        time.sleep(0.05)


def account(asked: EncodeConfig, committed: set[str], dead: int) -> dict[str, Any]:
    """What was done for nothing; `committed` are the shards that had their receipts when the nodes were lost."""
    lines = Path(f"{asked.destination}.log").read_text().split()
    begun = Counter(line for line in lines if not line.startswith("+"))
    encoded = sum(int(line) for line in lines if line.startswith("+"))
    needed = len(names_in(asked.destination)) * PICTURES
    return {
        "shards committed before": len(committed),
        "of them begun again": sum(begun[name] > 1 for name in committed),
        "shards begun again": sum(count > 1 for count in begun.values()),
        "pictures encoded for nothing": encoded - needed,
        "shards' worth for each dead encoder": round((encoded - needed) / PICTURES / dead, 2),
    }


PARTS = {"nodes": nodes, "half_lost": half_lost}

if __name__ == "__main__":
    for part in sys.argv[1:]:
        print(json.dumps({part: PARTS[part]()}), flush=True)

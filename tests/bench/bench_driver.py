"""Encode's driver at 100,000 shards and 1,000 encoders: `python tests/bench/bench_driver.py [SHARDS]`; ten minutes.

The stage is the real one, from its plan to its commit, with MLflow in SQLite, and every answer comes through Ray. But
the encoders are handles of a few actors that do nothing: an answer comes after a random time (exponential, so that the
flow is steady from the start), and its receipt is written first. For `REAL_S` seconds they answer as 1,000 GPUs would
that take a minute for a shard of 10,000 pictures, 16.7 shards/s in all; then `FASTER` times as fast, to see the end.

Prints CPU seconds of the driver's process, its Ray threads included, over those of the run at the real pace.
"""

import asyncio
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import ray

from ldm import storage
from ldm.latents.receipt import Accounting, Moments, OutputShard, ShardReceipt, receipt_url
from pipelines.encode import EncodeConfig, encode, run
from pipelines.encode.plan import Task
from pipelines.encode.pool import EncoderPool
from pipelines.encode.worker import ShardResult
from pipelines.tracking import TrackingConfig
from tests.pictures import tiny_model
from tests.pipelines.encoding import config

ENCODERS, PICTURES, SHARD_S = 1000, 10_000, 60.0
REAL_S, FASTER = 90.0, 40.0
HOSTS = 4


class Host:
    """Answers for many encoders."""

    def __init__(self, destination: str) -> None:
        self.destination, self.faster = destination, asyncio.Event()

    async def ready(self) -> str:
        asyncio.get_running_loop().call_later(REAL_S, self.faster.set)
        return str(ray.get_runtime_context().get_node_id())

    async def encode_shard(self, task: Task) -> ShardResult:
        mean = 2 * SHARD_S  # an encoder works on two shards at once
        try:
            await asyncio.wait_for(self.faster.wait(), random.expovariate(1 / mean))
            await asyncio.sleep(random.expovariate(FASTER / mean))
        except TimeoutError:
            pass
        receipt = receipt_of(task)
        Path(receipt_url(self.destination, receipt.name)).write_bytes(storage.to_json(asdict(receipt)))
        return ShardResult(receipt, dict.fromkeys(("read", "decode", "vae", "write"), 1.0))


def receipt_of(task: Task) -> ShardReceipt:
    draw = random.Random(task.shard.name)
    digest = lambda: f"{draw.getrandbits(256):064x}"  # noqa: E731
    moments = Moments(PICTURES * 1024, *(tuple(draw.random() for _ in range(4)) for _ in range(3)))
    name, size = task.shard.name, PICTURES * 17 * 1024
    files = (name, (8, 32, 32), PICTURES, size, digest(), 300_000, digest(), name, 400_000, digest(), 999)
    return ShardReceipt(
        name=name,
        source=name,
        input_url=task.shard.url,
        attempt=0,
        input_bytes=task.shard.bytes,
        input_etag=digest()[:32],
        input_sha256=digest(),
        fingerprint=digest()[:16],
        batch_size=32,
        accounting=Accounting(PICTURES, PICTURES),
        quarantine_sha256="",
        outputs=(OutputShard(*files, moments),),
    )


class Handle:
    """One encoder, as the pool sees it."""

    def __init__(self, host: Any) -> None:
        self.ready, self.encode_shard = host.ready, host.encode_shard


class SimulatedPool(EncoderPool):
    def _size_actors(self) -> None:
        super()._size_actors()
        actor_class = ray.remote(Host).options(num_cpus=0, max_concurrency=2 * ENCODERS)
        self.hosts = [actor_class.remote(self.config.destination) for _ in range(HOSTS)]

    def _new_actor(self) -> Handle:
        return Handle(self.hosts[len(self._starting) % HOSTS])


class Watch:
    """CPU seconds of this process at each second, and how many shards had ended."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, float, int]] = []  # seconds, CPU seconds, shards
        self.done, self.began = 0, time.monotonic()
        threading.Thread(target=self._watch, daemon=True).start()

    def take(self, take: Any) -> Any:
        def counted(work: Any, result: ShardResult) -> None:
            self.done += 1
            take(work, result)

        return counted

    def _watch(self) -> None:
        while True:
            self.samples.append((time.monotonic() - self.began, cpu_seconds(), self.done))
            time.sleep(1.0)


def cpu_seconds() -> float:
    times = psutil.Process().cpu_times()
    return float(times.user + times.system)


def settings(folder: Path) -> EncodeConfig:
    tracking = TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db")
    return config(f"{folder}/in", folder / "latents", f"{folder}/vae", num_workers=ENCODERS, tracking=tracking)


def drive(folder: Path) -> None:
    os.makedirs(folder / "latents" / "receipts")
    watch, before = Watch(), cpu_seconds()
    ray.init(address="local", num_cpus=8, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    take = watch.take(run._Work._take)
    simulated = mock.patch.multiple(run, EncoderPool=SimulatedPool), mock.patch.object(run._Work, "_take", take)
    with simulated[0], simulated[1], mock.patch("ray.kill"):  # which a handle is not for
        report = encode(settings(folder))
    assert report.encoded == watch.done * PICTURES, report
    print(json.dumps(figures(watch, cpu_seconds() - before)), flush=True)


def figures(watch: Watch, cpu: float) -> dict[str, Any]:
    first = next(at for at, _, done in watch.samples if done)
    last = next(at for at, _, done in watch.samples if done == watch.done)
    real = [sample for sample in watch.samples if first + 10 < sample[0] < first + REAL_S - 10]
    busy = [sample for sample in watch.samples if first <= sample[0] <= last]
    in_all = watch.done * SHARD_S / ENCODERS
    return {
        "shards": watch.done,
        "seconds at the real pace": round(in_all),
        "shards/s while measured at it": round((real[-1][2] - real[0][2]) / (real[-1][0] - real[0][0]), 1),
        "share of a core there": round((real[-1][1] - real[0][1]) / (real[-1][0] - real[0][0]), 3),
        "CPU s before the first shard": round(busy[0][1], 1),
        "of handing out and taking back": round(busy[-1][1] - busy[0][1], 1),
        "of the commit": round(watch.samples[-1][1] - busy[-1][1], 1),
        "seconds of the commit": round(watch.samples[-1][0] - last, 1),
        "all over the real pace": round(cpu / in_all, 3),
        "peak MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000,
    }


if __name__ == "__main__":
    shards = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        (place / "in").mkdir()
        for number in range(shards):
            (place / "in" / f"s-{number:06d}.tar").write_bytes(b"x" * 1024)
        tiny_model().save_pretrained(f"{place}/vae")
        # Actors find the class `Host` by the module's name, which this process does not have.
        program = "import pathlib, sys; from tests.bench import bench_driver as b; b.drive(pathlib.Path(sys.argv[1]))"
        sys.exit(subprocess.run([sys.executable, "-c", program, name]).returncode)

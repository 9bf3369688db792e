"""Reading latents: `python tests/bench/bench_read.py PART …`.

PARTS: memory, draw, resume, shuffle, large, s3, nodes; all of them by default. Sides take turns in one run, and medians
are printed as JSON.
"""

import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import s3fs
import torch
import webdataset
from bench_cache import s3_server
from botocore.config import Config as BotoConfig

from ldm.latents.batch import draw_latents
from ldm.latents.cache import Cache
from ldm.latents.dataset import LatentDataset
from ldm.latents.manifest import commit_generation, fingerprint_hash
from ldm.latents.order import FullOrder, LaneOrder
from ldm.latents.receipt import Accounting, Moments, OutputShard, ShardReceipt
from ldm.latents.writer import ShardWriter
from tests.chaos_s3 import ChaosProxy

BATCH = 256
RECORD = (8, 32, 32)  # fp16: 16 KiB
FINGERPRINT = {"format": 2, "store": "moments", "dtype": "float16"}


def write_dataset(url: str, shards: int, samples: int, counts: list[int] | None = None) -> None:
    """A latent dataset of random moments: `shards` of `samples` each, or of `counts`; shard n holds class n % 10."""
    receipts = []
    for shard, count in enumerate(counts or [samples] * shards):
        values = np.random.default_rng(shard).normal(size=(count, *RECORD)).astype(np.float16)
        with ShardWriter(url, f"shard-{shard:05d}", fingerprint_hash(FINGERPRINT), RECORD[0] // 2) as writer:
            for number, record in enumerate(values):
                writer.add(f"{number:06d}", record, label=shard % 10)
            receipts.append(writer.commit(count, 1, "0" * 64))
    commit_generation(url, receipts, FINGERPRINT, RECORD[0] // 2, 8)


def rates(sides: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Samples/s of each side, which take turns."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            found[name].append(side())
    return found


def memory(folder: Path) -> dict[str, Any]:
    """Batches of 256 as torch tensors in shuffled order, warm, one process, beside webdataset on the same tars."""
    url = str(folder / "latents")
    write_dataset(url, 32, 1000)
    tars = sorted(str(path) for path in Path(url, "latents").glob("*.tar"))
    ours = {shuffle: LatentDataset(url, global_batch_size=BATCH, shuffle=shuffle) for shuffle in ("lanes", "full")}
    first = time.perf_counter()
    for data in ours.values():
        for step in range(2 * 32_000 // BATCH):  # maps every shard and looks at every record's crc32
            data.batch(step)
    touched = 4 * 32_000 / (time.perf_counter() - first)

    def read(data: LatentDataset, workers: int) -> float:
        steps, started = 1000, time.perf_counter()
        for step, batch in enumerate(data.batches(1000, workers=workers)):
            assert batch.moments.shape == (BATCH, *RECORD)
            if step == steps:
                return steps * BATCH / (time.perf_counter() - started)
        raise AssertionError

    def plain() -> float:
        loader = webdataset.WebDataset(tars, shardshuffle=100).shuffle(1000).decode().to_tuple("latents.npy")
        started, count = time.perf_counter(), 0
        for (moments,) in loader.batched(BATCH, collation_fn=stack):
            count += len(moments)
        return count / (time.perf_counter() - started)

    found = rates(
        {
            "lanes": lambda: read(ours["lanes"], 0),
            "lanes, 1 worker": lambda: read(ours["lanes"], 1),
            "full": lambda: read(ours["full"], 0),
            "webdataset": plain,
        },
        rounds=5,
    )
    ratios = [a / b for a, b in zip(found["lanes"], found["webdataset"], strict=True)]
    return {"samples/s": median_of(found), "times webdataset": statistics.median(ratios), "first two epochs": touched}


def stack(samples: list[tuple[np.ndarray]]) -> tuple[torch.Tensor]:
    return (torch.from_numpy(np.stack([moments for (moments,) in samples])),)


def draw(folder: Path) -> dict[str, Any]:
    """End to end on one core: read, collate, posterior sample, normalise."""
    url = str(folder / "latents")
    write_dataset(url, 8, 1000)
    torch.set_num_threads(1)
    data = LatentDataset(url, global_batch_size=BATCH)
    found = []
    for _ in range(5):
        batches, count, started = data.batches(100, workers=0), 0, time.perf_counter()
        while time.perf_counter() - started < 4:
            count += len(draw_latents(next(batches), data.statistics, seed=0))
        found.append(count / (time.perf_counter() - started))
    return {"samples/s": statistics.median(found), "rounds": found}


def resume_(folder: Path) -> dict[str, Any]:
    """The first batch of a fresh reader after step 10 and after step 1,000,000, taken in turn; what must be kept."""
    url = str(folder / "latents")
    write_dataset(url, 64, 200)
    found: dict[int, list[float]] = {10: [], 1_000_000: []}
    for number in range(16):
        for step, seconds in sorted(found.items(), reverse=bool(number % 2)):  # neither is always the first
            started = time.perf_counter()
            LatentDataset(url, global_batch_size=BATCH).batch(step)
            seconds.append(time.perf_counter() - started)
    medians = {f"after step {step:,}, ms": 1e3 * statistics.median(seconds) for step, seconds in found.items()}
    first, last = medians.values()
    return {**medians, "ratio": last / first, "state": "the step: 8 bytes"}


def shuffle(_: Path) -> dict[str, Any]:
    """Lanes beside a full permutation, in data sets sorted by class: how far the classes of a window of the stream are
    from their shares (mean total variation distance), and how far neighbours in the stream are apart in the data set
    (mean, in shares of it)."""
    found: dict[str, Any] = {}
    for shards, classes in ((1000, 10), (1000, 1000), (10_000, 10), (10_000, 100), (10_000, 1000), (100_000, 1000)):
        counts = np.full(shards, 1000)
        orders = {"lanes": LaneOrder(counts, 0, 64), "full": FullOrder(counts, 0)}
        for window in (256, 1024, 8192):
            distances = {name: class_distance(order, classes, window) for name, order in orders.items()}
            found[f"{shards} shards, {classes} classes, window {window}"] = {
                **{name: round(value, 4) for name, value in distances.items()},
                "ratio": round(distances["lanes"] / distances["full"], 3),
            }
        streams = {name: numbers(order, 10**5, 0) for name, order in orders.items()}
        apart = {name: np.abs(np.diff(stream)).mean() / (1000 * shards) for name, stream in streams.items()}
        found[f"{shards} shards, neighbours apart"] = {name: round(float(value), 4) for name, value in apart.items()}
    return found


def numbers(order: LaneOrder | FullOrder, count: int, position: int) -> np.ndarray:
    """Places in the data set, in its own order, of `count` samples of the stream."""
    shards, indices, _ = order.locate(np.arange(position, position + count))
    return (np.cumsum(order.counts) - order.counts)[shards] + indices


def class_distance(order: LaneOrder | FullOrder, classes: int, window: int) -> float:
    """The mean over 200 windows at each of three places of the first two epochs."""
    distances = []
    for position in (0, order.num_samples // 3, order.num_samples * 5 // 4 + 77):
        labels = numbers(order, 200 * window, position).reshape(-1, window) * classes // order.num_samples
        shares = np.stack([np.bincount(row, minlength=classes) / window for row in labels])
        distances.append(np.abs(shares - 1 / classes).sum(1).mean() / 2)
    return float(np.mean(distances))


def large(folder: Path) -> dict[str, Any]:
    """100,000 shards and 1e9 samples, of which only the manifest exists: opening in a fresh process, then places."""
    url = str(folder / "latents")
    write_manifest(url, 100_000, 10_000)
    code = f"import sys; sys.path[:0] = {sys.path[:1]!r}; import bench_read; bench_read.open_large({url!r})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def open_large(url: str) -> None:
    before = peak()
    started = time.perf_counter()
    data = LatentDataset(url, global_batch_size=BATCH)
    opened = time.perf_counter() - started
    started = time.perf_counter()
    data.locate(10**6)
    first = time.perf_counter() - started
    order = data._mixtures[0].streams[0]._segments[0].order
    timed = {}
    for count in (1, BATCH, 4096):
        positions = np.arange(10**8, 10**8 + count)
        started = time.perf_counter()
        for _ in range(100):
            order.locate(positions)
        timed[f"us for each of {count} positions"] = (time.perf_counter() - started) / 100 / count * 1e6
    memory = {"peak, MiB": peak(), "of which imports, MiB": before}
    print(json.dumps({"open, s": opened, "first place, s": first, **memory, **timed}))


def peak() -> float:
    """MiB, of this program since it began."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def write_manifest(url: str, shards: int, samples: int) -> None:
    """A manifest of shards that are not there."""
    moments = Moments(samples, (0.0,) * 4, (1.0,) * 4, (0.1,) * 4)
    digest = hashlib.sha256().hexdigest()
    accounting = Accounting(samples, samples)
    receipts = []
    for number in range(shards):
        name = f"shard-{number:06d}"
        tar = (name, RECORD, samples, samples * 17920, digest)
        output = OutputShard(*tar, 1, digest, name, 1, digest, 9, moments)
        receipts.append(ShardReceipt(name, name, "", 0, 1, "", digest, "f", 1, accounting, "", (output,)))
    commit_generation(url, receipts, FINGERPRINT, 4, 8)


def median_of(found: dict[str, list[float]]) -> dict[str, int]:
    return {name: round(statistics.median(values)) for name, values in found.items()}


def s3(folder: Path) -> dict[str, Any]:
    """An epoch from S3 with an empty cache, beside plain range GETs of the same bytes, eight at a time, into files."""
    write_dataset(str(folder / "latents"), 64, 500)
    with s3_server(0):
        sizes = upload(folder / "latents")
        keys = [key for key in sizes if key.startswith(("latents/", "columns/"))]
        steps = 64 * 500 // BATCH

        def ours() -> float:
            with tempfile.TemporaryDirectory() as cache:
                started = time.perf_counter()
                data = LatentDataset("s3://bucket", global_batch_size=BATCH, cache=Cache(folder=Path(cache)))
                for step, _ in enumerate(data.batches(workers=1), start=1):
                    if step == steps:
                        break
                return sum(sizes[key] for key in keys) / (time.perf_counter() - started) / 2**20

        def plain() -> float:
            client = boto3.client("s3", config=BotoConfig(max_pool_connections=8))

            def get(key: str) -> None:
                answer = client.get_object(Bucket="bucket", Key=key, Range=f"bytes=0-{sizes[key] - 1}")
                Path(target, key.replace("/", "-")).write_bytes(answer["Body"].read())

            with tempfile.TemporaryDirectory() as target, ThreadPoolExecutor(8) as pool:
                started = time.perf_counter()
                list(pool.map(get, keys))
                return sum(sizes[key] for key in keys) / (time.perf_counter() - started) / 2**20

        found = rates({"epoch": ours, "plain GETs": plain}, rounds=5)
    ratios = [a / b for a, b in zip(found["epoch"], found["plain GETs"], strict=True)]
    return {"MiB/s": median_of(found), "ratio": statistics.median(ratios), "ratios": ratios}


def nodes(folder: Path) -> dict[str, Any]:
    """Bytes that 1, 2 and 4 nodes together fetch in each of three epochs, counted at the server, over those of the
    data set (tars, indexes and columns). Shards of many sizes; a cache of its own for each node."""
    counts = np.random.default_rng(0).integers(20, 60, 200)
    write_dataset(str(folder / "latents"), 0, 0, counts.tolist())
    found: dict[str, Any] = {"shards": len(counts), "samples": int(counts.sum())}
    with s3_server(0):
        sizes = upload(folder / "latents")
        whole = sum(size for key, size in sizes.items() if key.startswith(("latents/", "columns/")))
        proxy = ChaosProxy(os.environ["AWS_ENDPOINT_URL"])
        os.environ["AWS_ENDPOINT_URL"] = proxy.endpoint
        for world in (1, 2, 4):
            with tempfile.TemporaryDirectory() as caches:
                each = [
                    LatentDataset("s3://bucket", global_batch_size=64, cache=Cache(folder=Path(caches, str(rank))))
                    for rank in range(world)
                ]
                shares, step = [], 0
                for epoch in range(1, 4):
                    before = proxy.counts["bytes_out"]
                    while step * 64 < epoch * counts.sum():
                        for rank, data in enumerate(each):
                            data.batch(step, rank, world)
                        step += 1
                    shares.append(round((proxy.counts["bytes_out"] - before) / whole, 4))
                found[f"{world} nodes"] = shares
        proxy.stop()
    return found


def upload(folder: Path) -> dict[str, int]:
    """Copies the files to an empty bucket. Returns their sizes by key."""
    s3fs.S3FileSystem.clear_instance_cache()  # which know the server of an earlier part
    client, sizes = boto3.client("s3"), {}
    client.create_bucket(Bucket="bucket")
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        key = str(path.relative_to(folder))
        client.upload_file(str(path), "bucket", key)
        sizes[key] = path.stat().st_size
    return sizes


PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "memory": memory,
    "draw": draw,
    "resume": resume_,
    "shuffle": shuffle,
    "large": large,
    "s3": s3,
    "nodes": nodes,
}


def main() -> None:
    for name in sys.argv[1:] or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps({name: PARTS[name](Path(folder))}), flush=True)


if __name__ == "__main__":
    main()

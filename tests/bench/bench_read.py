"""Reading latents: `python tests/bench/bench_read.py PART …`.

PARTS: memory, draw, resume, shuffle, large, s3, nodes; all of them by default. Sides take turns in one run, and medians
are printed as JSON.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset

from ldm.latents.dataset import LatentDataset, draw_latents
from ldm.latents.manifest import commit_generation, fingerprint_hash
from ldm.latents.writer import ShardWriter

BATCH = 256
RECORD = (8, 32, 32)  # fp16: 16 KiB
FINGERPRINT = {"format": 2, "store": "moments", "dtype": "float16"}


def write_dataset(url: str, shards: int, samples: int) -> None:
    """A latent dataset of random moments, sorted by class: shard n holds class n % 10."""
    receipts = []
    for shard in range(shards):
        values = np.random.default_rng(shard).normal(size=(samples, *RECORD)).astype(np.float16)
        with ShardWriter(url, f"shard-{shard:05d}", fingerprint_hash(FINGERPRINT), RECORD[0] // 2) as writer:
            for number, record in enumerate(values):
                writer.add(f"{number:06d}", record, label=shard % 10)
            receipts.append(writer.commit(samples, 1, "0" * 64))
    commit_generation(url, receipts, FINGERPRINT, RECORD[0] // 2, 8)


def rates(sides: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Samples/s of each side, which take turns."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            found[name].append(side())
    return found


def memory(folder: Path) -> dict[str, Any]:
    """Batches of 256 as torch tensors in shuffled order, warm, one process, beside plain webdataset on the same tars."""
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


def median_of(found: dict[str, list[float]]) -> dict[str, int]:
    return {name: round(statistics.median(values)) for name, values in found.items()}


PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {"memory": memory, "draw": draw}


def main() -> None:
    for name in sys.argv[1:] or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps({name: PARTS[name](Path(folder))}), flush=True)


if __name__ == "__main__":
    main()

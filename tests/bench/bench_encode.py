"""Encode against its ceiling, against the common way, and against itself: `python tests/bench/bench_encode.py PART …`.

PARTS: ceiling-64, ceiling-128, common, actors, memory, rerun, plan, which are the default; kill-drivers, kill-actors.
Sides take turns in one run, and the median of their ratios is printed as JSON with all rounds. Real photos and taesd
from $LDM_SHARED, else ../shared.

Steady state means: from when the first actor is ready, for the start of Ray is paid once however large the data set.
"""

import contextlib
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
import torch

from ldm.autoencoder import load_autoencoder
from ldm.images import PictureRules, views
from ldm.shards import ShardReader, write_shard
from pipelines.encode import EncodeConfig, encode
from pipelines.tracking import TrackingConfig

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("LDM_SHARED") or ROOT.parent / "shared")
PHOTOS = [str(SHARED / "data" / "grocery" / f"train-{n:05d}.tar") for n in range(5)]
TAESD = str(SHARED / "models" / "taesd")
BATCH = 32


@contextlib.contextmanager
def ray_with(num_cpus: int) -> Iterator[None]:
    ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


def config(destination: object, **changes: Any) -> EncodeConfig:
    values = {"source": tuple(PHOTOS), "destination": str(destination), "autoencoder": TAESD, "batch_size": BATCH}
    return EncodeConfig(**{**values, "tracking": TrackingConfig(enabled=False), **changes})


def pipeline(size: int, **changes: Any) -> float:
    """Images/s of the stage, from when its first actor is ready until the last receipt."""
    with tempfile.TemporaryDirectory() as folder:
        return encode(config(Path(folder) / "latents", image_size=size, **changes)).images_per_second


def plain_loop(size: int, threads: int, shards: list[str]) -> float:
    """Images/s of the same decode and the same autoencoder in one loop, without Ray and without writing."""
    torch.set_num_threads(threads)
    autoencoder, rules = load_autoencoder(TAESD), PictureRules((size,))
    autoencoder.encode(torch.zeros(BATCH, 3, size, size, dtype=torch.uint8))  # the first call is not the steady state
    count, started = 0, time.perf_counter()
    for url in shards:
        pixels: list[np.ndarray] = []
        for sample in ShardReader(url):
            pixels.append(views(sample.picture or b"", rules)[0][0].pixels)
            if len(pixels) == BATCH:
                autoencoder.encode(torch.from_numpy(np.stack(pixels))).half().numpy()
                count, pixels = count + BATCH, []
    return count / (time.perf_counter() - started)


def common_way(size: int, shard: str, limit: int) -> float:
    """Images/s of one picture at a time through diffusers in fp32, one .npy each."""
    import diffusers

    torch.set_num_threads(os.cpu_count() or 1)
    model = diffusers.AutoencoderTiny.from_pretrained(TAESD).eval()
    rules, count = PictureRules((size,)), 0
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        started = time.perf_counter()
        for sample in ShardReader(shard):
            pixels = torch.from_numpy(views(sample.picture or b"", rules)[0][0].pixels)
            latents = model.encode(pixels.float().div(127.5).sub(1)[None]).latents
            np.save(f"{folder}/{sample.key.replace('/', '_')}.npy", latents[0].numpy())
            count += 1
            if count == limit:
                break
        return count / (time.perf_counter() - started)


def ratio(ours: Callable[[], float], other: Callable[[], float], rounds: int = 3) -> dict[str, Any]:
    pairs = []
    for _ in range(rounds):
        pairs.append((ours(), other()))
        print(pairs[-1], file=sys.stderr, flush=True)
    return {
        "ratio": round(statistics.median(a / b for a, b in pairs), 3),
        "rounds": [[round(v, 1) for v in p] for p in pairs],
    }


def ceiling_64() -> dict[str, Any]:
    """One actor on both cores against the plain loop on both cores."""
    with ray_with(2):
        return ratio(lambda: pipeline(64), lambda: plain_loop(64, 2, PHOTOS))


def ceiling_128() -> dict[str, Any]:
    with ray_with(2):
        return ratio(lambda: pipeline(128, max_shards=2), lambda: plain_loop(128, 2, PHOTOS[:2]))


def common() -> dict[str, Any]:
    """In fp32, and in bf16, against fp32 one by one."""
    with ray_with(2):
        return {
            precision: ratio(lambda: pipeline(64, precision=precision), lambda: common_way(64, PHOTOS[0], 256))  # noqa: B023
            for precision in ("float32", "bfloat16")
        }


def actors() -> dict[str, Any]:
    """Two actors on two cores against one actor that may use one core; four shards, two for each."""

    def on(cores: int) -> float:
        everything = os.sched_getaffinity(0)
        os.sched_setaffinity(0, sorted(everything)[:cores])  # which Ray and all of its workers inherit
        try:
            with ray_with(cores):
                return pipeline(64, num_workers=cores, max_shards=4)
        finally:
            os.sched_setaffinity(0, everything)

    return ratio(lambda: on(2), lambda: on(1))


def memory() -> dict[str, Any]:
    """Bytes (PSS) of an actor and its decoders: over 20 shards, and over the same pictures in one shard."""
    with tempfile.TemporaryDirectory() as folder:
        for number in range(20):
            Path(folder, "in").mkdir(exist_ok=True)
            shutil.copy(PHOTOS[number % 5], f"{folder}/in/s-{number:02d}.tar")
        content = [sample for url in PHOTOS for sample in ShardReader(url)]
        for number in range(4):
            for sample in content:
                sample.key = f"{number}-{sample.key}"
            write_shard(f"{folder}/part-{number}.tar", content)
        with open(f"{folder}/one.tar", "wb") as one:  # tars one behind another are a tar
            for number in range(4):
                one.write(Path(f"{folder}/part-{number}.tar").read_bytes())
        many = watched(f"{folder}/many", f"{folder}/in/*.tar")
        large = watched(f"{folder}/large", f"{folder}/one.tar")
    fifth = len(many) // 5
    first, last = statistics.median(many[fifth : 2 * fifth]), statistics.median(many[-fifth:])
    return {
        "MiB in the second fifth": round(first),
        "MiB in the last fifth": round(last),
        "growth": round(last / first - 1, 3),
        "peak MiB, 20 shards": round(max(many)),
        "peak MiB, all in one shard": round(max(large)),
    }


def watched(destination: str, source: str) -> list[float]:
    """MiB of the actor and its decoders each half second, from when it has encoded something."""
    sizes: list[float] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.5):
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if process.name().startswith("ray::ShardEnc") and list(Path(destination).glob(".attempt-*/*.tar")):
                        family = [process, *process.children()]
                        sizes.append(sum(p.memory_full_info().pss for p in family) / 2**20)

    with ray_with(2):
        thread = threading.Thread(target=watch)
        thread.start()
        encode(config(destination, source=source, image_size=64, num_workers=1))
        stop.set()
        thread.join()
    return sizes


def rerun() -> dict[str, Any]:
    """The whole command again over 1,000 finished shards of one small picture."""
    from tests.pictures import image_shard, samples, tiny_model

    with tempfile.TemporaryDirectory() as folder:
        content = samples(1)
        for number in range(1000):
            image_shard(f"{folder}/in/s-{number:04d}.tar", content)
        tiny_model().save_pretrained(f"{folder}/vae")
        settings = {"source": f"{folder}/in/*.tar", "autoencoder": f"{folder}/vae", "image_size": 16}
        with ray_with(2):
            began = time.monotonic()
            encode(config(f"{folder}/latents", **settings))
            first = time.monotonic() - began
        pairs = [
            f"{k}={v}" for k, v in {**settings, "destination": f"{folder}/latents", "tracking.enabled": "false"}.items()
        ]
        began = time.monotonic()
        command = [sys.executable, "-m", "jobs.cli", "encode", *pairs, "--json"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        seconds = time.monotonic() - began
        assert json.loads(done.stdout)["skipped_shards"] == 1000
    return {"first run s": round(first, 1), "rerun s, the process and its imports included": round(seconds, 1)}


def planning() -> dict[str, Any]:
    """A plan over 100,000 shards of an fsspec file system in memory, in a process of its own."""
    program = (
        "import fsspec, json, resource, sys, time\n"
        "from pipelines.encode import plan\n"
        "from tests.bench.bench_encode import config\n"
        "fs = fsspec.filesystem('memory')\n"
        "for n in range(100_000):\n"
        "    fs.pipe_file(f'/in/s-{n:06d}.tar', b'x' * 1024)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "began = time.monotonic()\n"
        "todo = plan(config('/tmp/never-made', source='memory://in/s-{000000..099999}.tar'))\n"
        "seconds = time.monotonic() - began\n"
        "after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "figures = {'shards': len(todo.tasks), 'seconds': round(seconds, 1)}\n"
        "print(json.dumps({**figures, 'peak MB': after // 1000, 'of it before': before // 1000}))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def kills(kind: str, rounds: int = 50) -> dict[str, Any]:
    """SIGKILL to the driver, or to an actor, at random moments, then run again: are the bytes those of a quiet run?"""
    from tests.pictures import image_shard, kl_model, samples
    from tests.pipelines import test_encode_faults as test

    with tempfile.TemporaryDirectory() as folder:
        for number in range(test.SHARDS):
            image_shard(f"{folder}/in/s-{number}.tar", samples(40, start=40 * number))
        kl_model().save_pretrained(f"{folder}/vae")
        images, vae = Path(folder, "in"), f"{folder}/vae"
        whole = Path(folder, "whole")
        subprocess.run(test.command(images, whole, vae), env=test.environment(), check=True, capture_output=True)
        kill = {"driver": kill_drivers, "actor": kill_actors}[kind]
        return kill(images, vae, test.contents(whole), rounds)


def kill_drivers(images: Path, vae: str, whole: dict[str, bytes], rounds: int) -> dict[str, int]:
    from tests.pipelines import test_encode_faults as test

    moments, killed, equal = random.Random(0), 0, 0
    for number in range(rounds):
        place = images.with_name(f"driver-{number}")
        killed += test.kill_driver(images, place, vae, moments.uniform(0, 1.0))
        for _ in range(2):  # at once, and again when all writers are gone
            subprocess.run(test.command(images, place, vae), env=test.environment(), check=True, capture_output=True)
        equal += test.contents(place) == whole
        print(f"{number + 1} drivers: {killed} killed at work, {equal} equal", file=sys.stderr, flush=True)
    return {"rounds": rounds, "killed at work": killed, "byte-identical": equal}


def kill_actors(images: Path, vae: str, whole: dict[str, bytes], rounds: int) -> dict[str, int]:
    from tests.pipelines import encoding
    from tests.pipelines import test_encode_faults as test

    moments, killed, equal = random.Random(0), 0, 0
    with ray_with(2):
        for number in range(rounds):
            place, moment = images.with_name(f"actor-{number}"), moments.uniform(0, 0.4)
            ended = threading.Event()

            def kill(place: Path = place, moment: float = moment, ended: threading.Event = ended) -> None:
                while not list(place.glob(".attempt-*")) and not ended.wait(0.002):
                    pass
                victims = [] if ended.wait(moment) else test.named("ray::ShardEncoder")
                if victims:
                    nonlocal killed
                    killed += 1
                    victims[-1].kill()

            thread = threading.Thread(target=kill)
            thread.start()
            encode(encoding.config(str(images), place, vae, image_size=64, num_workers=2))
            ended.set()
            thread.join()
            encode(encoding.config(str(images), place, vae, image_size=64))  # which clears away what the dead one left
            equal += test.contents(place) == whole
        print(f"{rounds} actors: {killed} killed at work, {equal} equal", file=sys.stderr, flush=True)
    return {"rounds": rounds, "killed at work": killed, "byte-identical": equal}


PARTS = {
    "ceiling-64": ceiling_64,
    "ceiling-128": ceiling_128,
    "common": common,
    "actors": actors,
    "memory": memory,
    "rerun": rerun,
    "plan": planning,
}

KILLS = {"kill-drivers": lambda: kills("driver"), "kill-actors": lambda: kills("actor")}

if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    for part in sys.argv[1:] or PARTS:
        print(json.dumps({part: {**PARTS, **KILLS}[part]()}), flush=True)

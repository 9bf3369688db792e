"""Checkpoints beside the training: `python tests/bench/bench_checkpoint.py PART …`. PARTS: stall, kills_while_saving.

stall: what a save costs the steps around it, until it is committed. kills_while_saving: SIGKILL at 50 moments of an
upload to S3; what is resumed is whole, and ends with the bits of a run that nothing disturbed.
"""

import contextlib
import importlib
import json
import logging
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from ldm import storage
from ldm.denoiser import DenoiserConfig, build_denoiser
from pipelines.train import zero
from pipelines.train.checkpoint import Part, read_full, save_checkpoint
from pipelines.train.ema import Ema, EmaProfile
from pipelines.train.saver import Saver
from tests.chaos_s3 import chaos_in_front_of
from tests.pipelines import gloo
from tests.pipelines.saving import Killer, assert_whole, killed_run, upload

BATCHES = (4, 16)
ROUNDS, PLAIN = 3, 3
KILLS, LAST = 50, 4

if __name__ == "tests.bench.bench_checkpoint":  # once, in the server that the ranks of 80 runs are forked from
    zero.import_deepspeed()
    for name in ("torch._dynamo", "s3fs", "aiobotocore.session"):
        importlib.import_module(name)


def stall() -> list[dict[str, Any]]:
    """DiT-S/2 on 4x32x32 latents, two gloo ranks of one thread, ZeRO-1, bf16, a local disk; by global batch."""
    with tempfile.TemporaryDirectory() as output:
        return gloo.run(time_all, 2, output, timeout=3000)[0]


def time_all(rank: int, world: int, output: str) -> list[dict[str, Any]]:
    return [time_saves(rank, world, f"{output}/{batch}", batch) for batch in BATCHES]


def time_saves(rank: int, world: int, output: str, batch: int) -> dict[str, Any]:
    """`extra_steps` is by the clock, `extra_cpu_steps` by this process's CPU time, which others' load changes less."""
    denoiser = build_denoiser(DenoiserConfig(), in_channels=4, sample_size=(32, 32), num_classes=10)
    parameters = sum(p.numel() for p in denoiser.parameters())
    config = zero.deepspeed_config(
        stage=1, precision="bf16", global_batch_size=batch, micro_batch_size=batch // world, world=world
    )
    engine = zero.initialize(denoiser, config)
    ema = Ema(engine.state, [EmaProfile("main", 0.9999)])

    def write_average(url: str, progress: dict[str, Any]) -> None:
        weights = read_full(url, "ema.main") | read_full(url, "buffer")
        with tempfile.TemporaryDirectory(dir=output) as folder:
            safetensors.torch.save_file(weights, Path(folder, "x"))
            storage.commit_file(Path(folder, "x"), f"{output}/denoiser-{progress['step']}.safetensors")

    saver = Saver(output, engine.state, ema, before_commit=lambda: None, after_commit=write_average, keep_last=1)
    x, labels = torch.randn(batch // world, 4, 32, 32), torch.zeros(batch // world, dtype=torch.long)

    def step() -> tuple[float, float]:
        began, cpu = time.perf_counter(), time.process_time()
        engine.backward(engine(x, torch.full((batch // world,), 0.5), labels).square().mean())
        engine.step(1e-4)
        ema.update()
        return time.perf_counter() - began, time.process_time() - cpu

    step(), step()
    rounds = []
    for number in range(ROUNDS + 1):
        plain = [step() for _ in range(PLAIN)]
        began, busy, cpu = time.perf_counter(), 0, time.process_time()
        saver.save({"step": number})
        while any(zero.all_gather(saver._running.is_alive())):
            step()
            busy += 1
        took, cpu = time.perf_counter() - began, time.process_time() - cpu
        plain += [step() for _ in range(PLAIN)]
        middle, middle_cpu = (statistics.median(column) for column in zip(*plain, strict=True))
        now = time.perf_counter()
        save_checkpoint(f"{output}/now", Part.of(engine.state, ema), {"step": number}, zero.all_gather)
        rounds.append(
            {
                "step_s": middle,
                "step_cpu_s": middle_cpu,
                "steps_until_committed": busy,
                "extra_steps": took / middle - busy,
                "extra_cpu_steps": cpu / middle_cpu - busy,
                "stall_s": saver.metrics["perf/checkpoint_stall_seconds"],
                "synchronous_save_steps": (time.perf_counter() - now) / middle,
            }
        )
        if rank == 0:
            storage.remove(f"{output}/now")
            print(json.dumps({key: round(value, 3) for key, value in rounds[-1].items()}), file=sys.stderr)
    saver.close()
    engine.close()
    medians = {key: round(statistics.median(one[key] for one in rounds[1:]), 3) for key in rounds[0]}
    return {"parameters_millions": round(parameters / 1e6, 1), "batch": batch, "rounds": ROUNDS, **medians}


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """The URL of a moto server with an empty bucket, whose keys are in the environment."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="bucket")
    yield endpoint
    server.stop()


def kills_while_saving() -> dict[str, Any]:
    """Each kill is at another upload; a run is killed until it has come to its end, then another begins."""
    draw, reached, kills, finished = random.Random(0), Counter[int](), 0, 0
    with tempfile.TemporaryDirectory() as folder, s3_server() as endpoint, chaos_in_front_of(endpoint) as chaos:
        os.environ["AWS_ENDPOINT_URL"] = chaos.endpoint
        reference, killer = f"{folder}/reference", Killer(chaos, folder)
        assert killed_run(reference, LAST, folder, "forkserver") == ""
        while kills < KILLS:
            output = f"s3://bucket/run-{finished}"
            for _ in range(3):
                killer.arm(upload("/step-", draw.randint(1, 15)), draw.randrange(2), draw.random() < 0.5)
                if not (said := killed_run(output, LAST, folder, "forkserver")):
                    break
                assert killer.killed, said
                kills += 1
                reached[assert_whole(output, reference)] += 1
            killer.arm(lambda method, path: False, 0, False)
            assert killed_run(output, LAST, folder, "forkserver") == "" and assert_whole(output, reference) == LAST
            finished += 1
            print(f"{kills} kills, {finished} runs", file=sys.stderr, flush=True)
    return {"kills": kills, "newest_whole_after_kill": dict(sorted(reached.items())), "runs_finished_alike": finished}


if __name__ == "__main__":
    import multiprocessing

    multiprocessing.set_forkserver_preload(["tests.bench.bench_checkpoint"])
    for part in sys.argv[1:] or ["stall", "kills_while_saving"]:
        began = time.monotonic()
        result = {"stall": stall, "kills_while_saving": kills_while_saving}[part]()
        print(json.dumps({part: result, "seconds": round(time.monotonic() - began)}), flush=True)

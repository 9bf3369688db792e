"""What the engine costs: `python tests/bench/bench_engine.py overhead|ema [WORLD [STAGE [PRECISION]]]`.

A DiT-S/2 on 4x32x32 latents, 16 images in a step over WORLD gloo ranks that share the cores; bf16 and ZeRO-1 unless
given. Ways take turns, step by step, and medians are printed as one line of JSON.

overhead: `ours` is the trainer's worker as it is: batches, posterior, timesteps, noise, dropped labels, guard, engine,
two averages, meter, and points of the log that nobody reads; `bare` is DeepSpeed's loop of the same model, config and
optimizer on one fixed batch; `plain` is PyTorch without DeepSpeed, in DDP where there are several ranks.
ema: the share of the two averages in a step of `ours`.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ldm.autoencoder import Autoencoder
from ldm.config import parse
from ldm.denoiser import DenoiserConfig, build_denoiser
from ldm.latents.manifest import fingerprint_hash
from pipelines.train import TrainConfig, zero
from tests.pictures import commit_generation, kl_model, records, some_fingerprint, write_latent_shard
from tests.pipelines import gloo
from tests.pipelines.workers import Notebook, worker

BATCH, CLASSES, ROUNDS, WARM_UP = 16, 3, 40, 2
LEARNING_RATE, CLIP = 1e-4, 1.0
Way = Callable[[], None]


def write_latents(url: str) -> None:
    """256 random moments (8, 32, 32) of 3 classes."""
    autoencoder = Autoencoder(kl_model())
    fingerprint = some_fingerprint(autoencoder, 256)
    moments = records(256, shape=(8, 32, 32))
    receipt = write_latent_shard(url, "shard", moments, fingerprint=fingerprint_hash(fingerprint), classes=CLASSES)
    commit_generation(url, [receipt], fingerprint, autoencoder.latent_channels, autoencoder.factor)


def dit() -> nn.Module:
    return build_denoiser(DenoiserConfig(), in_channels=4, sample_size=(32, 32), num_classes=CLASSES)


def settings(world: int, stage: int, precision: str) -> dict[str, Any]:
    return zero.deepspeed_config(
        stage=stage,
        precision=precision,
        global_batch_size=BATCH,
        micro_batch_size=BATCH // world,
        world=world,
        gradient_clipping=CLIP,
    )


class Ours:
    """A step as the trainer's own worker takes it. averaging: seconds of each update of the averages."""

    def __init__(self, url: str, rank: int, world: int, stage: int, precision: str) -> None:
        values = {
            "latents": url,
            "output": f"{url}-run",
            "tracking": {"enabled": False},
            "max_steps": 1_000_000,
            "checkpoint_every": 1_000_000,
            "validation": {"images": 0, "grid": 0},
            "global_batch_size": BATCH,
            "micro_batch_size": BATCH // world,
            "num_workers": world,
            "learning_rate": LEARNING_RATE,
            "gradient_clip": CLIP,
            "zero_stage": stage,
            "precision": precision,
            "device": "cpu",
        }
        config = parse(TrainConfig, [("bench", values)])
        self.worker = worker(config, Notebook(config))
        self.batches = self.worker.dataset.batches(0, rank=rank, world=world, workers=1)
        self.averaging: list[float] = []
        self.update, self.worker.ema.update = self.worker.ema.update, self.timed_update  # type: ignore[method-assign]

    def __call__(self) -> None:
        applied, save, stop = self.worker._train_step(self.worker._next(self.batches))
        assert applied
        self.worker._after_step(applied, save, stop)

    def timed_update(self) -> None:
        began = time.perf_counter()
        self.update()
        self.averaging.append(time.perf_counter() - began)


def fixed_batch(world: int) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(BATCH // world, 4, 32, 32)
    return x, torch.randint(0, 1000, (len(x),)), torch.randint(0, CLASSES, (len(x),))


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)


def bare(world: int, stage: int, precision: str) -> Way:
    deepspeed = zero.import_deepspeed()
    engine, *_ = deepspeed.initialize(model=dit(), optimizer=adamw, config=settings(world, stage, precision))
    x, t, labels = fixed_batch(world)

    def step() -> None:
        loss = (engine(x, t, labels).float() - x).square().mean()
        engine.backward(loss)
        engine.step()

    return step


def plain(world: int, precision: str) -> Way:
    model: nn.Module = dit()
    model = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    optimizer = adamw(model.parameters())
    x, t, labels = fixed_batch(world)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            output = model(x, t, labels)
        (output.float() - x).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return step


def interleaved(ways: dict[str, Way], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Seconds of each way's steps; another one begins each round."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for number in range(-WARM_UP, rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            torch.distributed.barrier()
            began = time.perf_counter()
            ways[name]()
            if number >= 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def of_rank(rank: int, world: int, what: str, url: str, stage: int, precision: str) -> dict[str, Any]:
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world))
    ours = Ours(url, rank, world, stage, precision)
    ways: dict[str, Way] = {"ours": ours}
    if what == "overhead":
        ways |= {"bare": bare(world, stage, precision), "plain": plain(world, precision)}
    seconds = interleaved(ways)
    found = {f"{name} ms": round(1e3 * statistics.median(each), 1) for name, each in seconds.items()}
    for one, other in (("ours", "bare"), ("bare", "plain")) if what == "overhead" else ():
        ratios = [a / b for a, b in zip(seconds[one], seconds[other], strict=True)]
        found[f"{one} / {other}"] = round(statistics.median(ratios), 3)
    shares = [a / b for a, b in zip(ours.averaging[WARM_UP:], seconds["ours"], strict=True)]
    return found | {"ema share of ours": round(statistics.median(shares), 4)}


if __name__ == "__main__":
    what, world, stage, precision = (sys.argv[1:] + ["overhead", "1", "1", "bf16"][len(sys.argv) - 1 :])[:4]
    if what not in ("overhead", "ema"):
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        write_latents(folder)
        found = gloo.run(of_rank, int(world), what, folder, int(stage), precision, timeout=1800)[0]
    print(json.dumps({"world": int(world), "stage": int(stage), "precision": precision, **found}), flush=True)

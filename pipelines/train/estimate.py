"""What a training run will take, before it begins: memory by ZeRO stage, steps, bytes, hours and money.

The rules of memory are what DeepSpeed 0.19.8 was seen to hold on two gloo ranks (tests/pipelines/test_estimate.py
holds them to it). They leave out what CUDA, NCCL and the allocator's fragments take.
"""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ldm import storage
from ldm.activations import checkpoint_activations
from ldm.cost import Cost, UntraceableError, cost, forward_flops
from ldm.denoiser import build_denoiser
from ldm.latents.dataset import LatentDataset
from pipelines import cluster
from pipelines.train import zero
from pipelines.train.config import TrainConfig
from pipelines.train.workers import possible_worlds

ASSUMED_MFU = 0.4
"""Share of the matmul rate that an estimate of the hours takes for granted."""
_LIVE_PARAMETERS = 1_000_000_000  # DeepSpeed's default of stage3_max_live_parameters


@dataclass(frozen=True)
class Memory:
    """Bytes that one worker holds at the peak of a step, on its GPU, or in the memory of a CPU worker."""

    stage: int
    weights: int
    optimizer: int
    """fp32 masters, where they are not the weights themselves, and two moments."""
    averages: int
    """EMA."""
    gradients: int
    activations: int
    communication: int
    """DeepSpeed's buckets; in ZeRO-3 the gathered weights too."""
    step: int
    """Gradients and temporaries of the optimizer's step, when activations and buckets are gone."""
    host: int
    """Not in the total: the host's copy of the state while a checkpoint is written."""

    @property
    def total(self) -> int:
        state = self.weights + self.optimizer + self.averages
        return state + max(self.gradients + self.activations + self.communication, self.step)


@dataclass(frozen=True)
class Rate:
    """What one worker multiplies: FLOP/s of a matmul in the run's precision, measured on `device`."""

    flops_per_second: float
    device: str


def memory(costs: Cost, *, stage: int, world: int, micro_batch: int, accumulates: bool, averages: int) -> Memory:
    """Memory of one worker under ZeRO `stage`; averages: how many EMA profiles, accumulates: over micro-batches."""
    settings = zero.deepspeed_config(
        stage=stage, precision="fp32", global_batch_size=world, micro_batch_size=1, world=world
    )
    whole = 4 * costs.trainable_parameters
    share = -(-whole // world)
    bucket = min(4 * settings["zero_optimization"]["reduce_bucket_size"], whole)
    frozen = 4 * (costs.parameters - costs.trainable_parameters) + costs.buffer_bytes
    # Stage 0 reduces a flat copy of all. Stage 1 keeps whole gradients while it accumulates; stage 2 has those reduced
    # before beside those reduced now. Their bucket is copied once to be reduced. In stage 3 gathered weights stay until
    # a billion of them are there.
    gradients = (whole, whole if accumulates else share, 2 * share if accumulates else share, share)[stage]
    gathered = min(4 * _LIVE_PARAMETERS, whole)
    communication = (min(4 * 500_000_000, whole), 2 * bucket, 2 * bucket, 2 * bucket + gathered)[stage]
    return Memory(
        stage=stage,
        weights=frozen + (share if stage == 3 else whole),
        optimizer=2 * whole if stage == 0 else 3 * share,
        averages=averages * share,
        gradients=gradients,
        activations=costs.peak_bytes(micro_batch),
        communication=communication,
        step=2 * whole if stage == 0 else 3 * share,  # gradients, their flat copy, a temporary of AdamW
        host=(3 + averages) * share,
    )


def meta_denoiser(config: TrainConfig, dataset: LatentDataset) -> nn.Module:
    """The denoiser without its weights. Raises RequestError where it does not fit the latents."""
    with torch.device("meta"):
        denoiser = build_denoiser(
            config.denoiser,
            in_channels=dataset.latent_shape[0],
            sample_size=dataset.latent_shape[1:],
            num_classes=dataset.num_classes or None,
        )
    if config.activation_checkpointing:
        checkpoint_activations(denoiser)
    return denoiser


def denoiser_cost(config: TrainConfig, dataset: LatentDataset, *, on_gpu: bool) -> Cost:
    """Raises UntraceableError."""
    denoiser, inputs = meta_denoiser(config, dataset), _inputs(config, dataset)
    return cost(denoiser, dataset.latent_shape, config.precision, **inputs, on_gpu=on_gpu)


def training_flops(config: TrainConfig, dataset: LatentDataset) -> int:
    """Of one image, as `Cost.training_flops`. Raises UntraceableError."""
    return 3 * forward_flops(meta_denoiser(config, dataset), dataset.latent_shape, **_inputs(config, dataset))


def _inputs(config: TrainConfig, dataset: LatentDataset) -> dict[str, Any]:
    dtype = torch.float32 if config.diffusion.is_flow else torch.int64
    return {"has_labels": bool(dataset.num_classes), "timestep_dtype": dtype}


def memory_of_run(config: TrainConfig, costs: Cost, *, world: int, micro_batch: int, stage: int) -> Memory:
    """Memory of one of `world` workers of this run, under a ZeRO stage."""
    return memory(
        costs,
        stage=stage,
        world=world,
        micro_batch=micro_batch,
        accumulates=micro_batch * world < config.global_batch_size,
        averages=config.ema.num_profiles,
    )


def matmul_rate(precision: str, device: str, threads: int) -> Rate:
    """FLOP/s of F.linear on this machine, by the median of about half a second; threads: of a CPU worker."""
    # The MLP of DiT-S on a CPU; a GPU is full only with more.
    rows, inner, outer = (4096, 384, 1536) if device == "cpu" else (8192, 4096, 4096)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    x, weight = (torch.ones(n, inner, dtype=dtype, device=device) for n in (rows, outer))
    before = torch.get_num_threads()
    seconds: list[float] = []
    torch.set_num_threads(threads if device == "cpu" else before)
    try:
        end = time.monotonic() + 0.5
        while len(seconds) < 5 or time.monotonic() < end:
            started = time.perf_counter()
            F.linear(x, weight)
            if device != "cpu":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
    finally:
        torch.set_num_threads(before)
    flops = 2 * rows * inner * outer
    name = torch.cuda.get_device_name() if device != "cpu" else f"{threads} CPU threads"
    return Rate(flops / statistics.median(seconds[1:]), name)


def worker_rate(config: TrainConfig, world: int) -> Rate:
    """The rate of a worker, were it on this machine: a GPU where there is one, else its share of the cores."""
    if config.device != "cpu" and torch.cuda.is_available():
        return matmul_rate(config.precision, "cuda", 1)
    threads = max(1, int(cluster.cpu_share([len(os.sched_getaffinity(0))], world)))
    return matmul_rate(config.precision, "cpu", threads)


_COLUMNS = ("weights", "optimizer", "averages", "gradients", "activations", "communication", "total", "host")


@dataclass(frozen=True)
class Estimate:
    """What `ldm train --dry-run` says; str() is the text for a person. FLOPs: 2 for a multiply-add."""

    what: str
    parameters: int
    forward_flops: int | None  # of one image; None where the denoiser runs only on real data
    training_flops: int | None  # of one image, 3 x forward
    total_flops: int | None  # that are computed until max_steps
    micro_batch_size: int
    memory: list[dict[str, int]]  # of one worker, bytes, by ZeRO stage
    zero_stage: int
    steps_per_epoch: float
    epochs: float
    output_bytes: int
    worker_flops_per_second: float | None  # of matmuls, measured on this machine
    assumed_mfu: float
    hours: float | None
    price: float | None  # in the currency of price_per_hour
    notes: list[str]

    def __str__(self) -> str:
        return "\n".join([self.what, *_facts(self), *self.notes])


def estimate(config: TrainConfig, dataset: LatentDataset, what: str, output_bytes: int, begun: int) -> Estimate:
    """begun: optimizer steps that are done already. Measures for half a second on this machine.

    Of a range of workers, with the most.
    """
    world = possible_worlds(config)[-1]
    share = config.global_batch_size // world
    micro_batch = share if config.micro_batch_size == "auto" else config.micro_batch_size
    steps_per_epoch = dataset.num_samples / config.global_batch_size
    notes = []
    if config.micro_batch_size == "auto":
        notes.append(f"micro_batch_size=auto: the memory is for a worker's whole share of {share}; less if that is all")
    try:
        costs = denoiser_cost(config, dataset, on_gpu=config.device != "cpu")
    except UntraceableError as error:
        costs = None
        notes.append(f"FLOPs, memory, hours: not known; {error}")
    rate, total, hours = None, None, None

    def of_stage(stage: int) -> Memory:
        assert costs is not None
        return memory_of_run(config, costs, world=world, micro_batch=micro_batch, stage=stage)

    if costs is not None:
        todo = max(0, config.max_steps - begun) * config.global_batch_size
        total = todo * costs.hardware_flops(config.activation_checkpointing)
        rate = worker_rate(config, world)
        hours = total / (ASSUMED_MFU * rate.flops_per_second * world) / 3600
        notes.append(
            f"hours: assumed, not measured: {ASSUMED_MFU:.0%} of the matmul rate of {rate.device} of this machine "
            f"(measured now: {rate.flops_per_second / 1e12:.3g} TFLOP/s in {config.precision}) for each worker"
        )
    return Estimate(
        what=what,
        parameters=sum(p.numel() for p in meta_denoiser(config, dataset).parameters()),
        forward_flops=costs.forward_flops if costs else None,
        training_flops=costs.training_flops if costs else None,
        total_flops=total,
        micro_batch_size=micro_batch,
        memory=[_row(of_stage(stage)) for stage in zero.STAGES] if costs else [],
        zero_stage=config.zero_stage,
        steps_per_epoch=round(steps_per_epoch, 2),
        epochs=round(config.max_steps / steps_per_epoch, 2),
        output_bytes=output_bytes,
        worker_flops_per_second=rate.flops_per_second if rate else None,
        assumed_mfu=ASSUMED_MFU,
        hours=hours,
        price=None if hours is None or not config.price_per_hour else hours * world * config.price_per_hour,
        notes=notes,
    )


def _row(of_stage: Memory) -> dict[str, int]:
    return {**asdict(of_stage), "total": of_stage.total}


def _facts(found: Estimate) -> list[str]:
    """The lines for a person."""
    rows = [("parameters", f"{found.parameters / 1e6:,.1f} M")]
    if found.forward_flops is not None:
        assert found.training_flops is not None and found.total_flops is not None and found.hours is not None
        rows += [
            ("FLOPs an image", f"{_si(found.forward_flops)}FLOP forward, {_si(found.training_flops)}FLOP to train"),
            ("FLOPs to do", f"{_si(found.total_flops)}FLOP"),
        ]
    rows += [
        ("steps an epoch", f"{found.steps_per_epoch:,.1f}; {found.epochs:,.1f} epochs in all"),
        ("written", f"up to {storage.readable(found.output_bytes)}"),
    ]
    if found.hours is not None:
        rows.append(("hours", f"about {found.hours:,.3g}, under the assumption below"))
        if found.price is not None:
            rows.append(("price", f"about {found.price:,.3g}, at price_per_hour for each worker"))
    lines = [f"{name:<15} {text}" for name, text in rows]
    return lines + _memory_table(found) if found.memory else lines


def _memory_table(found: Estimate) -> list[str]:
    """The run's stage is marked with *."""
    lines = [f"memory of one worker, GB (10^9 bytes), estimate, micro-batch {found.micro_batch_size}:"]
    lines.append("  ZeRO  " + " ".join(f"{name:>13}" for name in _COLUMNS))
    for row in found.memory:
        mark = "*" if row["stage"] == found.zero_stage else " "
        lines.append(f"  {row['stage']} {mark}   " + " ".join(f"{row[name] / 1e9:13.2f}" for name in _COLUMNS))
    lines.append(
        "  host: a copy on the host's side while a checkpoint is written, not in the total; CUDA and NCCL come on top"
    )
    return lines


def _si(count: float) -> str:
    """12108201984 => `12.1 G`."""
    for power, letter in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M")):
        if count >= 10**power:
            return f"{count / 10**power:,.3g} {letter}"
    return f"{count:,.0f} "

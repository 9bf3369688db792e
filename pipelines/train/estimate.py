"""What a training run will take, before it begins: memory by ZeRO stage, steps, bytes, hours and money."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ldm import storage
from ldm.cost import UntraceableError
from ldm.latents.dataset import LatentDataset
from pipelines import cluster
from pipelines.train import zero
from pipelines.train.config import TrainConfig
from pipelines.train.memory import Memory, denoiser_cost, memory_of_run, meta_denoiser
from pipelines.train.rate import worker_rate
from pipelines.train.workers import possible_worlds

ASSUMED_MFU = 0.4
"""Share of the matmul rate that an estimate of the hours takes for granted."""
_COLUMNS = ("weights", "optimizer", "averages", "gradients", "activations", "communication", "step", "total", "host")


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
    on_gpu = _on_gpu(config)
    steps_per_epoch = dataset.num_samples / config.global_batch_size
    notes = []
    if config.micro_batch_size == "auto":
        notes.append(f"micro_batch_size=auto: the memory is for a worker's whole share of {share}; less if that is all")
    try:
        costs = denoiser_cost(config, dataset, on_gpu=on_gpu)
    except UntraceableError as error:
        costs = None
        notes.append(f"FLOPs, memory, hours: not known; {error}")
    rate, total, hours = None, None, None

    def of_stage(stage: int) -> Memory:
        assert costs is not None
        return memory_of_run(config, costs, world=world, micro_batch=micro_batch, stage=stage, on_gpu=on_gpu)

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


def _on_gpu(config: TrainConfig) -> bool:
    """Whether the workers will have GPUs; of a cluster that is not known, whether they may."""
    nodes = cluster.known_nodes()
    return config.device != "cpu" if nodes is None else cluster.choose_device(config.device, nodes) == "cuda"


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
    return [
        *lines,
        "  total: weights, optimizer, averages, and the larger of step and the three before it, which do not meet",
        "  host: a copy on the host's side while a checkpoint is written, and what a GPU offloads; not in the total",
        "  CUDA and NCCL come on top",
    ]


def _si(count: float) -> str:
    """12108201984 => `12.1 G`."""
    for power, letter in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M")):
        if count >= 10**power:
            return f"{count / 10**power:,.3g} {letter}"
    return f"{count:,.0f} "

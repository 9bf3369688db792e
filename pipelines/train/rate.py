"""What a worker multiplies in a second: the measure that MFU is a share of."""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from pipelines import cluster
from pipelines.train.config import TrainConfig


@dataclass(frozen=True)
class Rate:
    """What one worker multiplies: FLOP/s of a matmul in the run's precision, measured on `device`."""

    flops_per_second: float
    device: str


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

"""The same bits again on the same GPUs, at a price in speed, which is measured."""

from __future__ import annotations

import copy
import functools
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ldm.latents.dataset import LatentDataset
from pipelines.train import zero
from pipelines.train.config import TrainConfig
from pipelines.train.microbatch import kind_of_pass, one_pass

_LEAST_PAIRS, _MOST_PAIRS, _ENOUGH_S = 2, 5, 5.0


@dataclass(frozen=True)
class Slowdown:
    """Median seconds of a forward and backward pass of one micro-batch."""

    with_it: float
    without: float

    @property
    def share(self) -> float:
        """What `deterministic=true` adds: 0.1 is a tenth."""
        return self.with_it / self.without - 1

    def __str__(self) -> str:
        """For a person."""
        return (
            f"{self.share:+.1%} time of forward and backward passes "
            f"(measured: {1e3 * self.with_it:.1f} ms for {1e3 * self.without:.1f} ms a micro-batch)"
        )


def use_deterministic(device: str) -> None:
    """Has this process use kernels that give the same bits on the same model of GPU and number of workers.

    Call it before the first work on the GPU: cuBLAS and NCCL read their variables then. An operation that has no such
    kernel raises RuntimeError. On the CPU there is nothing to do: with as many threads and workers, and gloo, it is
    exact already.
    """
    if device == "cpu":
        return
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    os.environ["NCCL_ALGO"] = "^NVLS"  # sums inside the switch come in no fixed order
    torch.backends.cudnn.benchmark = False  # it would choose by timing
    choose_kernels(device, deterministic=True)


def choose_kernels(device: str, *, deterministic: bool) -> None:
    """Only those that give the same bits again, or torch's own choice. On the CPU they are the same."""
    if device == "cpu":
        return
    torch.use_deterministic_algorithms(deterministic)
    # Filling costs a pass over the memory, and would make NaN of the padding that DeepSpeed leaves as it is.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = deterministic
    # Flash attention has a deterministic backward pass, the other fused kernels have none; fp32 takes the plain one.
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.cuda.enable_math_sdp(True)
    torch.backends.cuda.enable_mem_efficient_sdp(not deterministic)
    torch.backends.cuda.enable_cudnn_sdp(not deterministic)


def measure_slowdown(
    config: TrainConfig, denoiser: nn.Module, dataset: LatentDataset, device: torch.device, micro_batch: int
) -> Slowdown:
    """What the kernels cost on this device, of the slowest rank. Collective, after `use_deterministic` and before
    `zero.initialize`.

    Without the cost of NCCL's and cuBLAS's settings, which hold for a whole process, and without torch.compile.
    A copy does the work, so that the denoiser's weights, gradients and buffers are left alone, as are random numbers.
    """
    model = copy.deepcopy(denoiser).to(device)
    trial = functools.partial(one_pass, model, micro_batch, **kind_of_pass(config, dataset))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        own = median_seconds(trial, device.type)
    del model, trial
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return max(zero.all_gather(own), key=lambda slowdown: slowdown.with_it)


def median_seconds(run: Callable[[], None], device: str) -> Slowdown:
    """Of `run`, which waits for the device: without and with deterministic kernels in turn, after one of each that does
    not count."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    end = time.monotonic() + _ENOUGH_S
    try:
        for pair in range(1 + _MOST_PAIRS):
            if pair > _LEAST_PAIRS and time.monotonic() > end:
                break
            for deterministic, taken in seconds.items():
                choose_kernels(device, deterministic=deterministic)
                began = time.perf_counter()
                run()
                taken.append(time.perf_counter() - began)
    finally:
        choose_kernels(device, deterministic=True)
    without, with_it = (statistics.median(taken[1:]) for taken in seconds.values())
    return Slowdown(with_it, without)

"""`micro_batch_size=auto`: the largest divisor of a worker's share that fits; the rest is accumulated.

The samples, noise and gradients of a step are those of the global batch whatever is chosen. The last bits depend on it,
so a run that goes on in the same world takes what it had.
"""

from __future__ import annotations

import copy
import functools
import gc
import os
import platform
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ldm import storage
from ldm.config import RequestError
from ldm.cost import Cost, UntraceableError
from ldm.latents.dataset import LatentDataset
from pipelines import cluster
from pipelines.train import zero
from pipelines.train.checkpoint_files import read_marker
from pipelines.train.config import TrainConfig
from pipelines.train.memory import Memory, denoiser_cost, memory_of_run
from pipelines.train.tell import tell

_SHARE_OF_MEMORY = 0.8
"""Of a node's limit, that its CPU workers may take together."""


def micro_batch_size(
    config: TrainConfig,
    denoiser: nn.Module,
    dataset: LatentDataset,
    device: torch.device,
    checkpoint: str | None,
    *,
    by_trial: bool,
) -> int:
    """Samples in one forward pass of this worker: the same on every rank. Collective, before `zero.initialize`.

    by_trial: really runs on `device`, which refuses what does not fit, as a GPU does; else by an estimate. `denoiser`
    is left as it is. checkpoint: that the run goes on from. Raises RequestError where not even one sample fits.
    """
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    share = config.global_batch_size // world
    if config.micro_batch_size != "auto":
        return config.micro_batch_size
    saved = zero.all_gather(_saved(checkpoint, world))[0]
    if saved is not None and share % saved == 0:
        return int(saved)
    if by_trial:
        found, why = _by_trial(config, denoiser, dataset, device), "by trial"
    else:
        found, why = _by_estimate(config, dataset)
    found = min(zero.all_gather(found))
    if rank == 0:
        times = share // found
        tell(f"micro_batch_size=auto: {found} ({why}){f', accumulated {times} times' if times > 1 else ''}")
    return found


def worker_device() -> torch.device:
    """What this worker will train on."""
    return torch.device(os.environ["DS_ACCELERATOR"], int(os.environ["LOCAL_RANK"]))


def halvings(share: int) -> list[int]:
    """Divisors of a worker's share, each at most half of the one before: 12 => [12, 6, 3, 1]."""
    found = [share]
    while found[-1] > 1:
        found.append(max(d for d in range(1, found[-1] // 2 + 1) if share % d == 0))
    return found


def largest_that_fits(share: int, trial: Callable[[int], None]) -> int | None:
    """The first of `halvings` for which `trial` does not raise torch.OutOfMemoryError; None where all do."""
    for size in halvings(share):
        try:
            trial(size)
        except torch.OutOfMemoryError:
            continue
        return size
    return None


def trial_pass(
    denoiser: nn.Module,
    size: int,
    latent_shape: tuple[int, int, int],
    *,
    labels: bool,
    precision: str,
    reserved: int,
    timestep_dtype: torch.dtype = torch.int64,
) -> None:
    """`one_pass` beside `reserved` bytes, and nothing is left of it.

    Raises torch.OutOfMemoryError. The denoiser's gradients are dropped.
    """
    device = next(denoiser.parameters()).device
    beside = torch.empty(reserved, dtype=torch.uint8, device=device)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            one_pass(denoiser, size, latent_shape, labels=labels, precision=precision, timestep_dtype=timestep_dtype)
    finally:
        del beside
        denoiser.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def one_pass(
    denoiser: nn.Module,
    size: int,
    latent_shape: tuple[int, int, int],
    *,
    labels: bool,
    precision: str,
    timestep_dtype: torch.dtype = torch.int64,
) -> None:
    """Forward and backward of `size` samples, all of them 0, until the device is done. Adds to the gradients."""
    device = next(denoiser.parameters()).device
    x = torch.zeros(size, *latent_shape, device=device)
    t = torch.zeros(size, dtype=timestep_dtype, device=device)
    label = torch.zeros(size, dtype=torch.int64, device=device)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        output = denoiser(x, t, label if labels else None)
    output.float().square().mean().backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def kind_of_pass(config: TrainConfig, dataset: LatentDataset) -> dict[str, Any]:
    """What `one_pass` takes beside a denoiser and a size."""
    return {
        "latent_shape": dataset.latent_shape,
        "labels": bool(dataset.num_classes),
        "precision": config.precision,
        "timestep_dtype": torch.float32 if config.diffusion.is_flow else torch.int64,
    }


def _saved(checkpoint: str | None, world: int) -> int | None:
    """What a run in a world of this size took before."""
    if checkpoint is None:
        return None
    marker = read_marker(checkpoint)
    return marker["progress"].get("micro_batch_size") if marker["world"] == world else None


def _by_trial(config: TrainConfig, denoiser: nn.Module, dataset: LatentDataset, device: torch.device) -> int:
    share = config.global_batch_size // torch.distributed.get_world_size()
    state = _memory(config, _without_activations(denoiser), share)
    found = _tried(config, copy.deepcopy(denoiser).to(device), dataset, share, state.total)
    gc.collect()  # checkpointed blocks refer to themselves
    torch.cuda.empty_cache()
    # A rank that raised alone would leave the others waiting.
    if None in zero.all_gather(found):
        raise _nothing_fits(state.total)
    assert found is not None
    return found


def _tried(config: TrainConfig, model: nn.Module, dataset: LatentDataset, share: int, state: int) -> int | None:
    # The trial itself holds the weights, and their gradients.
    trial = functools.partial(
        trial_pass,
        model,
        reserved=max(0, state - 2 * sum(p.nbytes for p in model.parameters())),
        **kind_of_pass(config, dataset),
    )
    return largest_that_fits(share, trial)


def _by_estimate(config: TrainConfig, dataset: LatentDataset) -> tuple[int, str]:
    """On the CPU, where what does not fit is not refused but killed. (size, why)"""
    hosts = zero.all_gather(platform.node())
    budget = int(_SHARE_OF_MEMORY * cluster.node_memory()) // hosts.count(platform.node())
    share = config.global_batch_size // len(hosts)
    costs = zero.all_gather(_costs(config, dataset) if torch.distributed.get_rank() == 0 else None)[0]
    if isinstance(costs, str):
        return share, f"all; its memory is not known: {costs}"
    fits = [size for size in halvings(share) if _memory(config, costs, size).total <= budget]
    if None in zero.all_gather(fits[0] if fits else None):
        raise _nothing_fits(_memory(config, costs, 1).total)
    total = storage.readable(_memory(config, costs, fits[0]).total)
    return fits[0], f"estimate: {total} of the {storage.readable(budget)} that this worker may use"


def _costs(config: TrainConfig, dataset: LatentDataset) -> Cost | str:
    """Seconds of one core; or why they are not known."""
    try:
        return denoiser_cost(config, dataset, on_gpu=False)
    except UntraceableError as error:
        return str(error)


def _memory(config: TrainConfig, costs: Cost, size: int) -> Memory:
    world = torch.distributed.get_world_size()
    on_gpu = worker_device().type == "cuda"
    return memory_of_run(config, costs, world=world, micro_batch=size, stage=config.zero_stage, on_gpu=on_gpu)


def _without_activations(denoiser: nn.Module) -> Cost:
    return Cost(
        parameters=sum(p.numel() for p in denoiser.parameters()),
        trainable_parameters=sum(p.numel() for p in denoiser.parameters() if p.requires_grad),
        buffer_bytes=sum(b.nbytes for b in denoiser.buffers()),
        forward_flops=0,
        activation_bytes=0,
        fixed_bytes=0,
    )


def _nothing_fits(needed: int) -> RequestError:
    return RequestError(
        f"micro_batch_size=auto: not even one sample fits beside weights, gradients and optimizer "
        f"({storage.readable(needed)}); give activation_checkpointing=true, more workers or a higher zero_stage"
    )

"""What the denoiser of a run costs: FLOPs, and the memory of one worker by ZeRO stage.

The rules of memory are what DeepSpeed 0.19.8 was seen to hold on two gloo ranks (tests/pipelines/test_estimate.py
holds them to it). They leave out what CUDA, NCCL and the allocator's fragments take.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ldm.activations import checkpoint_activations
from ldm.cost import Cost, cost, forward_flops
from ldm.denoiser import build_denoiser
from ldm.latents.dataset import LatentDataset
from pipelines.train.build import engine_settings
from pipelines.train.config import TrainConfig

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
    """Not in the total: the host's copy of the state while a checkpoint is written, and what a GPU worker offloads."""

    @property
    def total(self) -> int:
        state = self.weights + self.optimizer + self.averages
        return state + max(self.gradients + self.activations + self.communication, self.step)


def memory(
    costs: Cost,
    *,
    stage: int,
    world: int,
    micro_batch: int,
    accumulates: bool,
    averages: int,
    options: Mapping[str, Any],
    on_gpu: bool,
) -> Memory:
    """Memory of one worker under ZeRO `stage`; averages: how many EMA profiles, accumulates: over micro-batches.

    options: DeepSpeed's section `zero_optimization`, of which what another stage has is left out.
    """
    whole = 4 * costs.trainable_parameters
    share = -(-whole // world)
    bucket = int(min(4 * options["reduce_bucket_size"], whole))
    frozen = 4 * (costs.parameters - costs.trainable_parameters) + costs.buffer_bytes
    # Stage 0 reduces a flat copy of all. Stage 1 keeps whole gradients while it accumulates; stage 2 has those reduced
    # before beside those reduced now. Their bucket is copied once to be reduced. In stage 3 gathered weights stay until
    # a billion of them are there.
    gradients = (whole, whole if accumulates else share, 2 * share if accumulates else share, share)[stage]
    gathered = int(min(4 * options.get("stage3_max_live_parameters", _LIVE_PARAMETERS), whole))
    communication = (min(4 * 500_000_000, whole), 2 * bucket, 2 * bucket, 2 * bucket + gathered)[stage]
    found = Memory(
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
    moved = _offloaded(found, options, share, accumulates)
    if not on_gpu:  # it lies in the same memory
        moved = replace(moved, optimizer=moved.optimizer + moved.host - found.host, host=found.host)
    return moved


def _offloaded(held: Memory, options: Mapping[str, Any], share: int, accumulates: bool) -> Memory:
    """What `offload_optimizer` and `offload_param` move from the GPU to the host."""
    if held.stage > 0 and _on_cpu(options, "offload_optimizer"):
        # Masters, moments, averages and the step, whose buffers stay; stages 1 and 2 add gradients up in one more.
        moved = held.optimizer + held.averages + held.step + (share if accumulates and held.stage < 3 else 0)
        held = replace(held, optimizer=0, averages=0, step=0, gradients=0, host=held.host + moved)
    if held.stage == 3 and _on_cpu(options, "offload_param"):
        held = replace(held, weights=held.weights - share, host=held.host + share)
    return held


def _on_cpu(options: Mapping[str, Any], what: str) -> bool:
    return (options.get(what) or {}).get("device") == "cpu"


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


def memory_of_run(
    config: TrainConfig, costs: Cost, *, world: int, micro_batch: int, stage: int, on_gpu: bool
) -> Memory:
    """Memory of one of `world` workers of this run, under a ZeRO stage. Raises RequestError for what it may not set."""
    return memory(
        costs,
        stage=stage,
        world=world,
        micro_batch=micro_batch,
        accumulates=micro_batch * world < config.global_batch_size,
        averages=config.ema.num_profiles,
        options=engine_settings(config, 1, world)["zero_optimization"],
        on_gpu=on_gpu,
    )

"""What a worker trains with, as the configuration says: the latents, the engine, the averages."""

import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ldm import denoiser as denoiser_module
from ldm.activations import checkpoint_activations
from ldm.config import RequestError
from ldm.denoiser import compile_denoiser
from ldm.latents.cache import Cache
from ldm.latents.choice import Split
from ldm.latents.dataset import LatentDataset
from ldm.snapshot import read_snapshot
from ldm.transfer import initial_weights
from pipelines.train import zero
from pipelines.train.checkpoint import newest_checkpoint
from pipelines.train.config import TrainConfig
from pipelines.train.ema import EmaProfile


def open_latents(
    config: TrainConfig,
    generations: Sequence[str] | None,
    exclusions: Mapping[int, str | Collection[int]],
    split: Split = "train",
) -> LatentDataset:
    """The samples that a run trains on, or is validated on.

    exclusions: ids, or URLs of lists, by the number of batches read before they are left out.
    """
    return LatentDataset(
        config.latents_urls,
        global_batch_size=config.global_batch_size,
        seed=config.seed,
        weights=config.weights,
        where=config.where,
        exclude=exclusions,
        holdout=config.holdout,
        split=split,
        shuffle=config.shuffle,
        generation=generations,
        cache=Cache(None if config.cache_gb is None else int(config.cache_gb * 1e9)),
    )


def open_holdout(
    config: TrainConfig, generations: Sequence[str] | None, exclusions: Mapping[int, str | Collection[int]]
) -> LatentDataset:
    """The samples that a run is validated on, without any that is left out by now: lists only grow."""
    now = {0: exclusions[max(exclusions)]} if exclusions else {}
    return open_latents(config, generations, now, split="holdout")


def build_denoiser(config: TrainConfig, dataset: LatentDataset) -> nn.Module:
    """With fresh weights, or those of `init_from`."""
    denoiser = denoiser_module.build_denoiser(
        config.denoiser,
        in_channels=dataset.latent_shape[0],
        sample_size=dataset.latent_shape[1:],
        num_classes=dataset.num_classes or None,
        seed=config.seed,
    )
    if config.init_from and newest_checkpoint(config.output) is None:
        snapshot = read_snapshot(config.init_from, "init_from")
        denoiser.load_state_dict(initial_weights(snapshot, config.denoiser, denoiser))
    if config.activation_checkpointing:
        checkpoint_activations(denoiser)
    return denoiser


def build_engine(config: TrainConfig, denoiser: nn.Module, micro_batch: int) -> zero.Engine:
    """The denoiser under DeepSpeed. Collective."""
    if config.compile:
        check_compiler(config, os.environ["DS_ACCELERATOR"])
        compile_denoiser(denoiser)
    settings = engine_settings(config, micro_batch, torch.distributed.get_world_size())
    return zero.initialize(
        denoiser,
        settings,
        betas=config.adam_betas,
        weight_decay=config.weight_decay,
        decoupled_decay=config.optimizer == "adamw",
    )


def engine_settings(config: TrainConfig, micro_batch: int, world: int) -> dict[str, Any]:
    """DeepSpeed's own configuration. Raises RequestError."""
    if config.compile and config.zero_stage == 3:
        raise RequestError("compile=true: does not work with zero_stage=3; give zero_stage=2, or leave it out")
    return zero.deepspeed_config(
        stage=config.zero_stage,
        precision=config.precision,
        global_batch_size=config.global_batch_size,
        micro_batch_size=micro_batch,
        world=world,
        gradient_clipping=config.gradient_clip,
        options=config.deepspeed,
    )


def check_compiler(config: TrainConfig, device: str) -> None:
    """Raises RequestError where `compile` lacks the C++ compiler that torch calls for code of a CPU."""
    compiler = os.environ.get("CXX", "g++")
    if config.compile and device == "cpu" and shutil.which(compiler) is None:
        raise RequestError(
            f"compile=true: needs a C++ compiler on a CPU, and there is no {compiler}; install it, "
            "name another in CXX, or give compile=false"
        )


def ema_profiles(config: TrainConfig) -> list[EmaProfile]:
    short = config.ema.short_decay
    return [EmaProfile("main", config.ema.decay)] + ([EmaProfile("short", short)] if short is not None else [])

"""Activation checkpointing: a block keeps its input only, and computes the rest again in the backward pass."""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from ldm.config import RequestError


def checkpoint_activations(denoiser: nn.Module) -> None:
    """Changes the `blocks` of a denoiser in place: its modules and the names of its weights stay as they are.

    `blocks` is a list of modules that hold most of the activations. Random numbers that a block draws are drawn alike
    the second time. Raises RequestError where the denoiser has no such list.
    """
    blocks = list(getattr(denoiser, "blocks", ()))
    if not blocks or not all(isinstance(block, nn.Module) for block in blocks):
        raise RequestError(
            f"activation_checkpointing=true: {type(denoiser).__name__} has no list `blocks` of the modules that would "
            "compute their activations again; give it one, or leave it out"
        )
    for block in blocks:
        # Inside __call__, so that ZeRO-3's hooks on what is in the block gather weights the second time too.
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)

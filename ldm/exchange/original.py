"""Checkpoints of facebookresearch/DiT: the published `DiT-XL-2-256x256.pt`, or what its train.py writes."""

import argparse
import math
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm import storage
from ldm.config import RequestError, validate
from ldm.denoiser import DenoiserConfig
from ldm.diffusion import DiffusionConfig
from ldm.exchange.foreign import ForeignModel
from ldm.exchange.layouts import CLASSES, drop_positions, original_layout, to_ours
from ldm.latents.manifest import Conditioning

PUBLISHED_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
"""hidden_size => num_heads of DiT-S, B, L and XL; the weights have one shape for any number of heads."""


def read_original(url: str, num_heads: int | None, temporary: Path) -> ForeignModel:
    """The EMA weights of a checkpoint, or its only ones. Raises RequestError where it is damaged or no DiT."""
    weights, notes = _weights(_load(url, temporary))
    patch, table = (
        _tensor(weights, "x_embedder.proj.weight", 4),
        _tensor(weights, "y_embedder.embedding_table.weight", 2),
    )
    hidden_size, channels, patch_size, _ = patch.shape
    rows = drop_positions(weights, "pos_embed", hidden_size)
    width = len(_tensor(weights, "blocks.0.mlp.fc1.weight", 2))
    outputs = len(_tensor(weights, "final_layer.linear.weight", 2))
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    denoiser = {
        "hidden_size": hidden_size,
        "depth": depth,
        "num_heads": num_heads or _published_heads(hidden_size),
        "patch_size": patch_size,
        "mlp_ratio": _ratio(width, hidden_size),
        "learned_sigma": outputs == 2 * channels * patch_size**2,
    }
    num_classes = len(table) - 1
    model = ForeignModel(
        to_ours(weights, original_layout(depth)),
        validate(DenoiserConfig, denoiser),
        DiffusionConfig(),  # the same for all of them: linear betas, 1,000 timesteps, epsilon
        Conditioning("class", num_classes),
        (channels, rows * patch_size, rows * patch_size),
        notes,
    )
    notes.append(f"{len(table)} rows of classes are {num_classes} and the null class; it is read as trained on epsilon")
    assert f"{CLASSES}.weight" in model.weights
    return model


def _load(url: str, temporary: Path) -> Any:
    if not storage.exists(url):
        raise RequestError("is not there; give a .pt file, or a folder of DiTPipeline")
    path = storage.local_path(url) if storage.is_local(url) else temporary / "checkpoint.pt"
    if not storage.is_local(url):
        storage.fetch(url, path)
    return load_weights_only(path)


def load_weights_only(path: Path) -> Any:
    """What torch.save wrote, if that is tensors and plain values. Raises RequestError; nothing in it is ever run."""
    try:
        # train.py keeps its arguments beside the weights: a plain namespace of text and numbers.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise RequestError("holds objects that are no weights, and running what a file says is refused") from None
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, AttributeError) as error:
        raise RequestError(f"cannot be read as a .pt file ({' '.join(str(error).split())[:120]})") from None


def _weights(checkpoint: Any) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict, and what is said of it."""
    notes = []
    if isinstance(checkpoint, dict) and isinstance(checkpoint.get("ema"), dict):
        checkpoint = checkpoint["ema"]
        notes.append("the checkpoint's EMA weights are taken")
    return state_dict(checkpoint), notes


def state_dict(values: Any) -> dict[str, Tensor]:
    """Raises RequestError where these are no weights by name."""
    if not isinstance(values, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in values.items()
    ):
        raise RequestError("holds no table of weights by name")
    return dict(values)


def _tensor(weights: dict[str, Tensor], name: str, ndim: int) -> Tensor:
    if name not in weights or weights[name].ndim != ndim:
        raise RequestError(f"holds no {name} of {ndim} dimensions; it is no DiT checkpoint")
    return weights[name]


def _ratio(width: int, hidden_size: int) -> float:
    """The mlp_ratio of which our DiT makes this very width, which it rounds down."""
    ratio = width / hidden_size
    return ratio if int(hidden_size * ratio) == width else math.nextafter(ratio, math.inf)


def _published_heads(hidden_size: int) -> int:
    if hidden_size not in PUBLISHED_HEADS:
        raise RequestError(
            f"num_heads: missing; a DiT of width {hidden_size} is none of the published ones "
            f"({', '.join(map(str, PUBLISHED_HEADS))}), and the file does not say"
        )
    return PUBLISHED_HEADS[hidden_size]

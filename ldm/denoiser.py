"""The denoiser: DiT, the U-Net of latent diffusion, or a class of the user's own, behind one protocol.

Any denoiser is a module `forward(x, t, labels)`: x (N, C, H, W), t and labels (N,) => (N, C, H, W). Classes are
0 .. num_classes-1, and index num_classes is the null class of classifier-free guidance; the trainer decides which
labels become null.
"""

import importlib
import inspect
import json
import re
from typing import Any

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import nn

from ldm.config import RequestError
from ldm.dit import DiT, DiTConfig
from ldm.unet import UNet, UNetConfig

BUILT_IN = ("dit", "unet")


class DenoiserConfig(DiTConfig):
    """Which denoiser, and how large. The defaults are DiT-S/2."""

    type: str = Field("dit", description="dit, unet, or your own class as package.module:Class")
    unet: UNetConfig = UNetConfig()
    label_dropout: float = Field(
        0.1, ge=0, lt=1, description="share of training labels replaced by the null class, for guidance"
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="keyword arguments of your own class; values are read as JSON"
    )

    @field_validator("type")
    @classmethod
    def _known_type(cls, value: str) -> str:
        if value not in BUILT_IN and not re.fullmatch(r"[\w.]+:\w+", value):
            raise ValueError("is no denoiser; use dit, unet, or your own class as package.module:Class")
        return value

    @field_validator("options", mode="before")
    @classmethod
    def _read_options(cls, value: Any, info: ValidationInfo) -> Any:
        if value and info.data.get("type") in BUILT_IN:
            raise ValueError(f"type={info.data['type']} has no options; they are for your own class")
        return {k: _read_json(v) for k, v in value.items()} if isinstance(value, dict) else value


def build_denoiser(
    config: DenoiserConfig,
    *,
    in_channels: int,
    sample_size: tuple[int, int],
    num_classes: int | None,
    seed: int = 0,
) -> nn.Module:
    """A fresh denoiser for latents (in_channels, *sample_size); num_classes None is unconditional.

    Initial weights depend on `seed` alone, so that every rank begins with the same; the global generator is
    left as it was. Under `torch.device("meta")` it has shapes and no weights.
    Raises RequestError where the config does not fit the latents, or the class cannot be imported.
    """
    denoiser_class, arguments = _denoiser_class(config)
    arguments = {
        "in_channels": in_channels,
        "sample_size": sample_size,
        "num_classes": num_classes or None,
        **arguments,
    }
    if config.type not in BUILT_IN:
        _check_options(config, denoiser_class, arguments)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return denoiser_class(**arguments)


def compile_denoiser(denoiser: nn.Module) -> None:
    """Compiles in place, at the first call: the same function, of which the last bits may differ.

    A DiT block by block, for its blocks are one function of other weights and so are compiled once. Names of weights
    stay. Each shape of input has code of its own, whatever came before it, so that a resumed run does the same sums.
    On a CPU it needs a C++ compiler (g++).
    """
    if not isinstance(denoiser, DiT):
        denoiser.compile(dynamic=False)
        return
    for module in (*denoiser.blocks, denoiser.final):
        # GELU's tanh through exp takes half the time; 1 + tanh, which is all that GELU uses, is as exact.
        module.compile(dynamic=False, options={"cpp.use_decompose_tanh": True})


def _denoiser_class(config: DenoiserConfig) -> tuple[type[nn.Module], dict[str, Any]]:
    """The class, and what it is built with beside the shape of the latents."""
    if config.type == "dit":
        return DiT, {"config": config}
    if config.type == "unet":
        return UNet, {"config": config.unet}
    return _import_class(config.type), config.options


def _import_class(name: str) -> type[nn.Module]:
    module_name, _, class_name = name.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), class_name, None)
    except ImportError as error:
        raise RequestError(
            f"denoiser.type={name}: cannot import {module_name} ({error}); its folder must be on PYTHONPATH"
        ) from error
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise RequestError(f"denoiser.type={name}: {module_name} has no torch.nn.Module class {class_name}")
    return found


def _check_options(config: DenoiserConfig, denoiser_class: type[nn.Module], arguments: dict[str, Any]) -> None:
    try:
        inspect.signature(denoiser_class).bind(**arguments)
    except TypeError as error:
        raise RequestError(
            f"denoiser.options={json.dumps(config.options)}: {config.type} cannot be built with it ({error})"
        ) from None


def _read_json(value: Any) -> Any:
    """Command-line values arrive as text: "8" => 8, "true" => True; other text stays text."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value

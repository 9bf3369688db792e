"""The denoiser: DiT (Peebles & Xie 2022, arXiv 2212.09748), or a class of the user's own.

Shapes: x (N, C, H, W); t, labels (N,); T = H/patch * W/patch tokens of D = hidden_size.
Any denoiser is a module `forward(x, t, labels)` => (N, C, H, W). Classes are 0 .. num_classes-1, and index
num_classes is the null class of classifier-free guidance; the trainer decides which labels become null.
"""

import importlib
import inspect
import json
import math
import re
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn

from ldm.config import Config, RequestError


class DenoiserConfig(Config):
    """Which denoiser, and how large. The defaults are DiT-S/2."""

    type: str = Field("dit", description="dit, or your own class as package.module:Class")
    hidden_size: int = Field(384, ge=4, description="width of a token (dit)")
    depth: int = Field(12, ge=1, description="number of transformer blocks (dit)")
    num_heads: int = Field(6, ge=1, description="attention heads; divides hidden_size (dit)", validate_default=True)
    patch_size: int = Field(2, ge=1, description="latent pixels along a token's side; divides the latent (dit)")
    mlp_ratio: float = Field(4.0, gt=0, description="width of the MLP over hidden_size (dit)")
    label_dropout: float = Field(
        0.1, ge=0, lt=1, description="share of training labels replaced by the null class, for guidance"
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="keyword arguments of your own class; values are read as JSON"
    )

    @field_validator("type")
    @classmethod
    def _known_type(cls, value: str) -> str:
        if value != "dit" and not re.fullmatch(r"[\w.]+:\w+", value):
            raise ValueError("is no denoiser; use dit, or your own class as package.module:Class")
        return value

    @field_validator("hidden_size")
    @classmethod
    def _fits_position_embedding(cls, value: int) -> int:
        if value % 4:  # sine and cosine of two axes
            raise ValueError(f"must be a multiple of 4; the nearest is {max(round(value / 4), 1) * 4}")
        return value

    @field_validator("num_heads")
    @classmethod
    def _divides_hidden_size(cls, value: int, info: ValidationInfo) -> int:
        hidden_size = info.data.get("hidden_size", value)
        if hidden_size % value:
            nearest = _nearest_divisor(hidden_size, value)
            raise ValueError(f"does not divide hidden_size={hidden_size}; the nearest that does is {nearest}")
        return value

    @field_validator("options", mode="before")
    @classmethod
    def _read_options(cls, value: Any, info: ValidationInfo) -> Any:
        if value and info.data.get("type") == "dit":
            raise ValueError("type=dit has no options; they are for your own class")
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
    latents = {"in_channels": in_channels, "sample_size": sample_size, "num_classes": num_classes or None}
    if config.type == "dit":
        _check_patch_size(config.patch_size, sample_size)
        denoiser_class: type[nn.Module] = DiT
        sizes = {"hidden_size", "depth", "num_heads", "patch_size", "mlp_ratio"}
        arguments = {**latents, **config.model_dump(include=sizes)}
    else:
        denoiser_class = _import_class(config.type)
        arguments = {**latents, **config.options}
        _check_options(config, denoiser_class, arguments)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return denoiser_class(**arguments)


class DiT(nn.Module):
    """Transformer over latent patches, conditioned by adaLN-zero: a fresh one answers exactly 0."""

    def __init__(
        self,
        *,
        in_channels: int,
        sample_size: tuple[int, int],
        num_classes: int | None,
        hidden_size: int,
        depth: int,
        num_heads: int,
        patch_size: int,
        mlp_ratio: float,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.sample_size = sample_size
        patch_dim = in_channels * patch_size**2
        self.patch_embedding = nn.Linear(patch_dim, hidden_size)
        self.timestep_embedding = TimestepEmbedding(hidden_size)
        self.label_embedding = None if num_classes is None else nn.Embedding(num_classes + 1, hidden_size)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final = FinalLayer(hidden_size, patch_dim)
        grid = (sample_size[0] // patch_size, sample_size[1] // patch_size)
        # Computed, so not part of the weights.
        self.register_buffer("positions", position_embedding(hidden_size, grid), persistent=False)
        self._initialize()

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """x (N, C, H, W), t (N,), labels (N,) int64 or, where unconditional, None => (N, C, H, W) as x."""
        height, width = self.sample_size
        assert x.shape[-2:] == (height, width), f"latents {tuple(x.shape)}, built for {self.sample_size}"
        condition = self.timestep_embedding(t)  # (N, D) fp32
        if self.label_embedding is not None:
            assert labels is not None, "a class-conditional denoiser needs labels; num_classes is the null"
            condition = condition + self.label_embedding(labels)
        else:
            assert labels is None, "an unconditional denoiser takes labels=None"
        condition = F.silu(condition)
        tokens = self.patch_embedding(patchify(x, self.patch_size)) + self.positions  # (N, T, D)
        for block in self.blocks:
            tokens = block(tokens, condition)
        patches = self.final(tokens, condition).to(x.dtype)  # (N, T, p * p * C)
        return unpatchify(patches, self.patch_size, self.sample_size)

    def _initialize(self) -> None:
        """As the DiT paper's code: Xavier, small embeddings, and zeros wherever a block or the model ends."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for embedding in (self.timestep_embedding.hidden, self.timestep_embedding.out, self.label_embedding):
            if embedding is not None:
                nn.init.normal_(embedding.weight, std=0.02)
        nn.init.zeros_(self.final.linear.weight)
        for module in self.modules():
            if isinstance(module, Block | FinalLayer):
                nn.init.zeros_(module.modulation.weight)


class Block(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition: adaLN-zero, figure 3 there."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.attention_out = nn.Linear(hidden_size, hidden_size)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, int(hidden_size * mlp_ratio)),
            nn.GELU(approximate="tanh"),
            nn.Linear(int(hidden_size * mlp_ratio), hidden_size),
        )
        self.modulation = nn.Linear(hidden_size, 6 * hidden_size)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x (N, T, D), condition (N, D) => (N, T, D)."""
        modulation = self.modulation(condition)[:, None].chunk(6, dim=-1)  # each (N, 1, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        x = x + gate1 * self.attend(modulate(self.norm1(x), shift1, scale1))
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))

    def attend(self, x: Tensor) -> Tensor:
        # (N, T, 3 * D) => three of (N, heads, T, D / heads)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        # On the CPU too: with batched matmuls instead, forward and backward of the whole model took 0.96 to
        # 1.02 of this one's time (fp32, 16 to 256 tokens, one thread, no AMX).
        return self.attention_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FinalLayer(nn.Module):
    """Tokens (N, T, D) => patches (N, T, p * p * C)."""

    def __init__(self, hidden_size: int, patch_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_dim)
        self.modulation = nn.Linear(hidden_size, 2 * hidden_size)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(self.norm(x), shift, scale))


class TimestepEmbedding(nn.Module):
    """t (N,) => (N, D) in fp32, also under autocast: in bf16 neighbouring timesteps would be one."""

    def __init__(self, hidden_size: int, num_frequencies: int = 128) -> None:
        super().__init__()
        self.num_frequencies = num_frequencies
        self.hidden = nn.Linear(2 * num_frequencies, hidden_size)
        self.out = nn.Linear(hidden_size, hidden_size)

    def forward(self, t: Tensor) -> Tensor:
        with torch.autocast("cuda" if t.is_cuda else "cpu", enabled=False):
            exponents = torch.arange(self.num_frequencies, device=t.device) / self.num_frequencies
            angles = t.float()[:, None] * torch.exp(-math.log(10_000) * exponents)  # (N, frequencies)
            waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
            return self.out(F.silu(self.hidden(waves.to(self.hidden.weight.dtype))))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


def patchify(x: Tensor, patch_size: int) -> Tensor:
    """Latents (N, C, H, W) => patches (N, T, p * p * C), row by row."""
    x = x.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))  # (N, C, H/p, p, W/p, p)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, patch_size: int, sample_size: tuple[int, int]) -> Tensor:
    """The inverse of `patchify`: (N, T, p * p * C) => (N, C, H, W)."""
    rows, columns = sample_size[0] // patch_size, sample_size[1] // patch_size
    x = patches.reshape(len(patches), rows, columns, patch_size, patch_size, -1)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def position_embedding(hidden_size: int, grid: tuple[int, int]) -> Tensor:
    """Fixed sine-cosine embedding of a (rows, columns) grid, the column first as in DiT: float32 (T, D)."""
    frequencies = 10_000 ** -(torch.arange(hidden_size // 4, dtype=torch.float64) / (hidden_size // 4))
    row, column = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [axis.flatten()[:, None] * frequencies for axis in (column, row)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=-1).float()


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


def _check_patch_size(patch_size: int, sample_size: tuple[int, int]) -> None:
    height, width = sample_size
    common = math.gcd(height, width)
    if common % patch_size:
        raise RequestError(
            f"denoiser.patch_size={patch_size}: does not divide the latent size {height}x{width}; "
            f"the nearest that does is {_nearest_divisor(common, patch_size)}"
        )


def _check_options(config: DenoiserConfig, denoiser_class: type[nn.Module], arguments: dict[str, Any]) -> None:
    try:
        inspect.signature(denoiser_class).bind(**arguments)
    except TypeError as error:
        raise RequestError(
            f"denoiser.options={json.dumps(config.options)}: {config.type} cannot be built with it ({error})"
        ) from None


def _nearest_divisor(number: int, wanted: int) -> int:
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: abs(d - wanted))


def _read_json(value: Any) -> Any:
    """Command-line values arrive as text: "8" => 8, "true" => True; other text stays text."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value

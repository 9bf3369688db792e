"""DiT (Peebles & Xie 2022, arXiv 2212.09748): a transformer over latent patches, and what later work added to it.

Shapes: x (N, C, H, W); t, labels (N,); T = H/patch * W/patch tokens of D = hidden_size, heads of d = D / num_heads.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn

from ldm.config import Config, RequestError

Frequencies = Literal["paper", "diffusers"]


class DiTConfig(Config):
    """How large a DiT, and of which kind. The defaults are the paper's DiT-S/2."""

    hidden_size: int = Field(384, ge=4, description="width of a token (dit)")
    depth: int = Field(12, ge=1, description="number of transformer blocks (dit)")
    num_heads: int = Field(6, ge=1, description="attention heads; divides hidden_size (dit)", validate_default=True)
    patch_size: int = Field(2, ge=1, description="latent pixels along a token's side; divides the latent (dit)")
    mlp_ratio: float = Field(4.0, gt=0, description="width of the MLP over hidden_size (dit)")
    mlp: Literal["gelu", "swiglu"] = Field(
        "gelu", description="swiglu: gated (Shazeer 2020), two thirds as wide, so about as many weights (dit)"
    )
    norm: Literal["layernorm", "rmsnorm"] = Field("layernorm", description="of the tokens, without weights (dit)")
    qk_norm: bool = Field(False, description="RMSNorm of queries and keys, which keeps attention tame (dit)")
    positions: Literal["sincos", "rotary"] = Field(
        "sincos",
        description="added to the tokens, or turning queries and keys by row and column (Su et al. 2021) (dit)",
        validate_default=True,
    )
    learned_sigma: bool = Field(
        False,
        description="a head of 2C channels, as in published checkpoints; the second C are not used or trained (dit)",
    )
    timestep_frequencies: Frequencies = Field(
        "paper", description="10000^(-i/128), or diffusers' 10000^(-i/127): which ones weights were trained with (dit)"
    )
    mlp_norm_eps: float = Field(
        1e-6, gt=0, description="epsilon of the norm before the MLP; diffusers' published DiT has 1e-5 (dit)"
    )

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
            nearest = nearest_divisor(hidden_size, value)
            raise ValueError(f"does not divide hidden_size={hidden_size}; the nearest that does is {nearest}")
        return value

    @field_validator("positions")
    @classmethod
    def _turns_whole_pairs(cls, value: str, info: ValidationInfo) -> str:
        hidden_size, num_heads = info.data.get("hidden_size"), info.data.get("num_heads")
        if value == "rotary" and hidden_size and num_heads and hidden_size // num_heads % 4:
            raise ValueError(
                f"turns pairs along two axes, so hidden_size / num_heads = {hidden_size // num_heads} "
                "must be a multiple of 4; change one of them"
            )
        return value


class DiT(nn.Module):
    """A denoiser conditioned by adaLN-zero: a fresh one answers exactly 0.

    Raises RequestError where patch_size does not divide the latents.
    """

    def __init__(
        self, config: DiTConfig, *, in_channels: int, sample_size: tuple[int, int], num_classes: int | None
    ) -> None:
        super().__init__()
        _check_patch_size(config.patch_size, sample_size)
        self.in_channels, self.sample_size, self.patch_size = in_channels, sample_size, config.patch_size
        hidden_size, pixels = config.hidden_size, config.patch_size**2
        self.patch_embedding = nn.Linear(in_channels * pixels, hidden_size)
        self.timestep_embedding = TimestepEmbedding(hidden_size, frequencies=config.timestep_frequencies)
        self.label_embedding = None if num_classes is None else nn.Embedding(num_classes + 1, hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final = FinalLayer(config, (2 if config.learned_sigma else 1) * in_channels * pixels)
        grid = (sample_size[0] // config.patch_size, sample_size[1] // config.patch_size)
        # Computed, so not part of the weights.
        rotary = config.positions == "rotary"
        positions = None if rotary else position_embedding(hidden_size, grid)
        rotations = rotary_embedding(hidden_size // config.num_heads, grid) if rotary else None
        self.register_buffer("positions", positions, persistent=False)
        self.register_buffer("rotations", rotations, persistent=False)
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
        tokens = self.patch_embedding(patchify(x, self.patch_size))  # (N, T, D)
        if self.positions is not None:
            tokens = tokens + self.positions
        for block in self.blocks:
            tokens = block(tokens, condition, self.rotations)
        patches = self.final(tokens, condition).to(x.dtype)  # (N, T, p * p * C), or 2C with a learned sigma
        return unpatchify(patches, self.patch_size, self.sample_size)[:, : self.in_channels]

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

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        hidden_size, self.num_heads = config.hidden_size, config.num_heads
        self.norm1 = _norm(config, eps=1e-6)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.attention_out = nn.Linear(hidden_size, hidden_size)
        self.norm2 = _norm(config, eps=config.mlp_norm_eps)
        self.mlp = _mlp(config)
        self.modulation = nn.Linear(hidden_size, 6 * hidden_size)
        self.q_norm, self.k_norm = (
            nn.RMSNorm(hidden_size // config.num_heads, eps=1e-6) if config.qk_norm else None for _ in "qk"
        )

    def forward(self, x: Tensor, condition: Tensor, rotations: Tensor | None = None) -> Tensor:
        """x (N, T, D), condition (N, D), rotations (2, T, d / 2) => (N, T, D)."""
        modulation = self.modulation(condition)[:, None].chunk(6, dim=-1)  # each (N, 1, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        x = x + gate1 * self.attend(modulate(self.norm1(x), shift1, scale1), rotations)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))

    def attend(self, x: Tensor, rotations: Tensor | None) -> Tensor:
        # (N, T, 3 * D) => three of (N, heads, T, d)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if self.q_norm is not None and self.k_norm is not None:  # in fp32, also under autocast
            q, k = self.q_norm(q.float()), self.k_norm(k.float())
        if rotations is not None:
            q, k = rotate(q, rotations), rotate(k, rotations)
        attended = attention(q.to(v.dtype), k.to(v.dtype), v)
        return self.attention_out(attended.transpose(1, 2).flatten(2))


class FinalLayer(nn.Module):
    """Tokens (N, T, D) => patches (N, T, patch_dim)."""

    def __init__(self, config: DiTConfig, patch_dim: int) -> None:
        super().__init__()
        self.norm = _norm(config, eps=1e-6)
        self.linear = nn.Linear(config.hidden_size, patch_dim)
        self.modulation = nn.Linear(config.hidden_size, 2 * config.hidden_size)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(self.norm(x), shift, scale))


class SwiGLU(nn.Module):
    """(N, T, D) => (N, T, D): silu(x V) * (x W), then out (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(hidden_size, 2 * width)
        self.out = nn.Linear(width, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.hidden(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * value)


class TimestepEmbedding(nn.Module):
    """t (N,) => (N, D) in fp32, also under autocast: in bf16 neighbouring timesteps would be one."""

    def __init__(self, hidden_size: int, num_frequencies: int = 128, frequencies: Frequencies = "paper") -> None:
        super().__init__()
        self.num_frequencies = num_frequencies
        self.spacing = num_frequencies - 1 if frequencies == "diffusers" else num_frequencies
        self.hidden = nn.Linear(2 * num_frequencies, hidden_size)
        self.out = nn.Linear(hidden_size, hidden_size)

    def forward(self, t: Tensor) -> Tensor:
        with torch.autocast("cuda" if t.is_cuda else "cpu", enabled=False):
            exponents = -math.log(10_000) * torch.arange(self.num_frequencies, device=t.device) / self.spacing
            angles = t.float()[:, None] * torch.exp(exponents)  # (N, frequencies)
            waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
            return self.out(F.silu(self.hidden(waves.to(self.hidden.weight.dtype))))


_fused_on_cpu = False


@contextlib.contextmanager
def fused_attention() -> Iterator[None]:
    """Attention on a CPU as on a GPU: for those who count what a GPU would hold."""
    global _fused_on_cpu
    _fused_on_cpu = True
    try:
        yield
    finally:
        _fused_on_cpu = False


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of three (N, heads, T, d) => (N, heads, T, d).

    On a CPU by batched matmuls: torch's fused kernel there does bf16 products at a sixth of the matmul's rate. The
    queries are scaled, not the products: the compiled softmax of scaled products takes twice the time.
    """
    if q.is_cpu and not _fused_on_cpu:
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


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
    angles = _axis_angles(hidden_size // 4, grid)
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=-1).float()


def rotary_embedding(head_size: int, grid: tuple[int, int]) -> Tensor:
    """Cosine and sine by which `rotate` turns each pair, half by the column, half by the row: float32 (2, T, d / 2)."""
    angles = torch.cat(_axis_angles(head_size // 4, grid), dim=-1)
    return torch.stack([angles.cos(), angles.sin()]).float()


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Turns the pairs (i, i + d / 2) of x (N, heads, T, d): products of two depend on their distance alone."""
    cosine, sine = rotations
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)


def nearest_divisor(number: int, wanted: int) -> int:
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: abs(d - wanted))


def _axis_angles(count: int, grid: tuple[int, int]) -> list[Tensor]:
    """[column, row] times each of `count` frequencies, float64 (T, count)."""
    frequencies = 10_000 ** -(torch.arange(count, dtype=torch.float64) / count)
    row, column = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    return [axis.flatten()[:, None] * frequencies for axis in (column, row)]


def _norm(config: DiTConfig, eps: float) -> nn.Module:
    norm = nn.RMSNorm if config.norm == "rmsnorm" else nn.LayerNorm
    return norm(config.hidden_size, elementwise_affine=False, eps=eps)


def _mlp(config: DiTConfig) -> nn.Module:
    hidden_size, width = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
    if config.mlp == "swiglu":
        return SwiGLU(hidden_size, max(1, 2 * width // 3))
    return nn.Sequential(nn.Linear(hidden_size, width), nn.GELU(approximate="tanh"), nn.Linear(width, hidden_size))


def _check_patch_size(patch_size: int, sample_size: tuple[int, int]) -> None:
    height, width = sample_size
    common = math.gcd(height, width)
    if common % patch_size:
        raise RequestError(
            f"denoiser.patch_size={patch_size}: does not divide the latent size {height}x{width}; "
            f"the nearest that does is {nearest_divisor(common, patch_size)}"
        )

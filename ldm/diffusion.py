"""The Gaussian diffusion: schedules, what the denoiser predicts, and the training loss.

    x_t = sqrt(alphas_cumprod[t]) x_0 + sqrt(1 - alphas_cumprod[t]) noise,   t in 0 .. T-1

Shapes: x0, noise, x_t, model_output (N, C, H, W); t (N,) int64; alphas_cumprod (T,) float64.
The schedule is kept in float64; its coefficients are rounded once, to the dtype of what they multiply.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from ldm.config import Config

Denoiser = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(x_t (N, C, H, W), t (N,), labels (N,) or None) => model output (N, C, H, W)."""

PredictionType = Literal["epsilon", "v_prediction"]

CONVENTIONAL_BETAS = {
    "linear": (1e-4, 0.02),  # Ho et al. 2020; DiT
    "scaled_linear": (0.00085, 0.012),  # Rombach et al. 2022 (LDM)
}
MAX_TERMINAL_ALPHA = 0.1  # LDM's own schedule ends at 0.0047


class DiffusionConfig(Config):
    """What the denoiser is trained on. Sampling must use the same, so it travels with the weights."""

    schedule: Literal["linear", "scaled_linear", "cosine"] = Field(
        "linear", description="betas linear in t (DDPM, DiT), linear in their square root (LDM), or cosine"
    )
    num_train_timesteps: int = Field(1000, ge=2, description="T, the number of noise levels")
    beta_start: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="first beta; null: the schedule's convention (linear 0.0001, scaled_linear 0.00085)",
        validate_default=True,
    )
    beta_end: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="last beta; null: the schedule's convention (linear 0.02, scaled_linear 0.012)",
        validate_default=True,
    )
    prediction_type: PredictionType = Field(
        "epsilon", description="what the denoiser predicts: the noise, or v (Salimans & Ho 2022)"
    )

    @field_validator("beta_start", "beta_end")
    @classmethod
    def _cosine_has_no_betas(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and info.data.get("schedule") == "cosine":
            raise ValueError("schedule=cosine computes its own betas; leave it out")
        return value

    @field_validator("beta_end")
    @classmethod
    def _reaches_noise(cls, value: float | None, info: ValidationInfo) -> float | None:
        """Refuses betas that do not rise, or leave a picture at t = T-1, where sampling starts from noise."""
        schedule, steps = info.data.get("schedule"), info.data.get("num_train_timesteps")
        if schedule not in CONVENTIONAL_BETAS or steps is None or "beta_start" not in info.data:
            return value  # cosine reaches noise for every T; other errors are already reported
        start, end = _resolve_betas(schedule, info.data["beta_start"], value)
        if start >= end:
            raise ValueError(f"must be above beta_start: {end} is not above {start}")
        remaining = (1 - _interpolated_betas(schedule, start, end, steps)).prod().item()
        if remaining > MAX_TERMINAL_ALPHA:
            raise ValueError(
                f"{end} leaves alphas_cumprod at {remaining:.2g} after num_train_timesteps={steps}, but "
                f"sampling starts from noise; raise one until it is at most {MAX_TERMINAL_ALPHA}, or use "
                "schedule=cosine"
            )
        return value


class Diffusion:
    """A `DiffusionConfig` made into numbers on a device."""

    def __init__(self, config: DiffusionConfig, device: torch.device | str = "cpu") -> None:
        self.config = config
        self.alphas_cumprod = alphas_cumprod(config).to(device)  # (T,) float64

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x0, noise (N, C, H, W), t (N,) => x_t (N, C, H, W)."""
        signal, sigma = signal_and_noise(self.alphas_cumprod[t], x0)
        return signal * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the denoiser should answer: the noise, or v = sqrt(a) noise - sqrt(1 - a) x0."""
        if self.config.prediction_type == "epsilon":
            return noise
        signal, sigma = signal_and_noise(self.alphas_cumprod[t], x0)
        return signal * noise - sigma * x0

    def to_x0_and_epsilon(self, model_output: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The denoiser's answer at t (N,) => (x0, epsilon), each (N, C, H, W)."""
        return to_x0_and_epsilon(model_output, x_t, self.alphas_cumprod[t], self.config.prediction_type)

    def loss(self, denoiser: Denoiser, x0: Tensor, noise: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """Mean squared error of each sample, (N,) in the dtype of x0, whatever the denoiser computes in."""
        model_output = denoiser(self.add_noise(x0, noise, t), t, labels)
        error = model_output.to(x0.dtype) - self.target(x0, noise, t)
        return error.square().flatten(1).mean(dim=1)


def alphas_cumprod(config: DiffusionConfig) -> Tensor:
    """The share of signal variance left at each t: (T,) float64, falling."""
    steps = config.num_train_timesteps
    if config.schedule == "cosine":
        betas = _cosine_betas(steps)
    else:
        start, end = _resolve_betas(config.schedule, config.beta_start, config.beta_end)
        betas = _interpolated_betas(config.schedule, start, end, steps)
    return (1 - betas).cumprod(dim=0)


def to_x0_and_epsilon(
    model_output: Tensor, x_t: Tensor, alphas_cumprod: Tensor, prediction_type: PredictionType
) -> tuple[Tensor, Tensor]:
    """The denoiser's answer => (x0, epsilon). alphas_cumprod: (N,), or a scalar for all rows."""
    signal, sigma = signal_and_noise(alphas_cumprod, x_t)
    if prediction_type == "epsilon":
        return (x_t - sigma * model_output) / signal, model_output
    # Salimans & Ho 2022, appendix D
    return signal * x_t - sigma * model_output, sigma * x_t + signal * model_output


def signal_and_noise(alphas_cumprod: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(a) and sqrt(1 - a) in the dtype of `like`; (N,) becomes (N, 1, 1, 1), a scalar stays one."""
    if alphas_cumprod.ndim:
        alphas_cumprod = alphas_cumprod.reshape(-1, *[1] * (like.ndim - 1))
    return alphas_cumprod.sqrt().to(like.dtype), (1 - alphas_cumprod).sqrt().to(like.dtype)


def _resolve_betas(schedule: str, start: float | None, end: float | None) -> tuple[float, float]:
    usual_start, usual_end = CONVENTIONAL_BETAS[schedule]
    return usual_start if start is None else start, usual_end if end is None else end


def _interpolated_betas(schedule: str, start: float, end: float, steps: int) -> Tensor:
    if schedule == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float64)
    return torch.linspace(math.sqrt(start), math.sqrt(end), steps, dtype=torch.float64).square()


def _cosine_betas(steps: int) -> Tensor:
    """Nichol & Dhariwal 2021, equation 17: s = 0.008, betas clipped at 0.999 against the singularity at T."""
    progress = torch.arange(steps + 1, dtype=torch.float64) / steps
    remaining = ((progress + 0.008) / 1.008 * (math.pi / 2)).cos().square()
    return (1 - remaining[1:] / remaining[:-1]).clamp(max=0.999)

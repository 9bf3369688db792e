"""The noising process: schedules, what the denoiser predicts, and the training loss.

    x_t = signal_t x_0 + noise_t epsilon

Diffusion: t in 0 .. T-1, signal = sqrt(alphas_cumprod[t]), noise = sqrt(1 - alphas_cumprod[t]).
Flow matching (Lipman et al. 2022; SiT, arXiv 2401.08740): t in [0, T], signal = 1 - t/T, noise = t/T.

Shapes: x0, noise, x_t, model_output (N, C, H, W); t (N,), int64, for a flow floating; alphas_cumprod (T,) float64.
The schedule is kept in float64; its coefficients are rounded once, to the dtype of what they multiply.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator, model_validator
from torch import Tensor

from ldm import random
from ldm.config import Config

Denoiser = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(x_t (N, C, H, W), t (N,), labels (N,) or None) => model output (N, C, H, W)."""

PredictionType = Literal["epsilon", "v_prediction", "sample", "velocity"]

CONVENTIONAL_BETAS = {
    "linear": (1e-4, 0.02),  # Ho et al. 2020; DiT
    "scaled_linear": (0.00085, 0.012),  # Rombach et al. 2022 (LDM)
}
MAX_TERMINAL_ALPHA = 0.1  # LDM's own schedule ends at 0.0047


class DiffusionConfig(Config):
    """What the denoiser is trained on. Sampling must use the same, so it travels with the weights."""

    schedule: Literal["linear", "scaled_linear", "cosine", "flow"] = Field(
        "linear",
        description="betas linear in t (DDPM, DiT), linear in their square root (LDM), or cosine; "
        "flow: flow matching, (1 - t/T) x0 + t/T noise (SiT, SD3)",
    )
    num_train_timesteps: int = Field(1000, ge=2, description="T, the number of noise levels; the t of pure noise")
    zero_terminal_snr: bool = Field(
        False, description="rescale the betas so that T-1 is pure noise (Lin et al. 2023); not with epsilon"
    )
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
        "epsilon",
        description="what the denoiser predicts: the noise, v (Salimans & Ho 2022), the clean sample, "
        "or a flow's velocity, noise - x0, which schedule=flow means by itself",
        validate_default=True,
    )
    loss_weighting: Literal["none", "min_snr"] = Field(
        "none", description="weight of a sample's loss by its t: 1, or min-SNR (Hang et al. 2023)"
    )
    min_snr_gamma: float = Field(5.0, gt=0, description="largest signal-to-noise ratio that min_snr counts")
    timestep_sampling: Literal["uniform", "logit_normal"] = Field(
        "uniform", description="distribution of a flow's t in training; logit_normal: SD3 (Esser et al. 2024)"
    )
    logit_mean: float = Field(0.0, description="mean of the normal of logit_normal; above 0: more noise")
    logit_std: float = Field(1.0, gt=0, description="standard deviation of the normal of logit_normal")
    shift: float = Field(
        1.0, ge=1e-3, description="of a flow's t, in training and sampling; above 1: more time at high noise (SD3: 3)"
    )

    @model_validator(mode="before")
    @classmethod
    def _flow_predicts_velocity(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("schedule") == "flow":
            return {"prediction_type": "velocity", **values}
        return values

    @field_validator("zero_terminal_snr")
    @classmethod
    def _flow_ends_in_noise(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("schedule") == "flow":
            raise ValueError("schedule=flow ends in pure noise by itself; leave it out")
        return value

    @field_validator("beta_start", "beta_end")
    @classmethod
    def _has_betas(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and info.data.get("schedule") == "cosine":
            raise ValueError("schedule=cosine computes its own betas; leave it out")
        if value is not None and info.data.get("schedule") == "flow":
            raise ValueError("schedule=flow has no betas; leave it out")
        return value

    @field_validator("beta_end")
    @classmethod
    def _reaches_noise(cls, value: float | None, info: ValidationInfo) -> float | None:
        """Refuses betas that do not rise, or leave a picture at t = T-1, where sampling starts from noise."""
        schedule, steps = info.data.get("schedule"), info.data.get("num_train_timesteps")
        if schedule not in CONVENTIONAL_BETAS or steps is None or "beta_start" not in info.data:
            return value  # cosine and flow reach noise for every T; other errors are already reported
        start, end = _resolve_betas(schedule, info.data["beta_start"], value)
        if start >= end:
            raise ValueError(f"must be above beta_start: {end} is not above {start}")
        remaining = (1 - _interpolated_betas(schedule, start, end, steps, torch.float64)).prod().item()
        if remaining > MAX_TERMINAL_ALPHA and not info.data.get("zero_terminal_snr"):
            raise ValueError(
                f"{end} leaves alphas_cumprod at {remaining:.2g} after num_train_timesteps={steps}, but "
                f"sampling starts from noise; raise one until it is at most {MAX_TERMINAL_ALPHA}, or use "
                "schedule=cosine"
            )
        return value

    @field_validator("prediction_type")
    @classmethod
    def _fits_the_process(cls, value: str, info: ValidationInfo) -> str:
        if (value == "velocity") != (info.data.get("schedule") == "flow"):
            right = "epsilon, v_prediction or sample" if value == "velocity" else "velocity"
            raise ValueError(f"does not go with schedule={info.data.get('schedule')}; use {right}")
        if value == "epsilon" and info.data.get("zero_terminal_snr"):
            raise ValueError(
                "at zero_terminal_snr=true the noise says nothing of x0 at T-1; use v_prediction or sample"
            )
        return value

    @field_validator("timestep_sampling", "shift")
    @classmethod
    def _is_of_a_flow(cls, value: Any, info: ValidationInfo) -> Any:
        usual = cls.model_fields[str(info.field_name)].default
        if value != usual and info.data.get("schedule") != "flow":
            raise ValueError(f"is for schedule=flow; with schedule={info.data.get('schedule')} it must be {usual}")
        return value

    @property
    def is_flow(self) -> bool:
        return self.schedule == "flow"


class Diffusion:
    """A `DiffusionConfig` made into numbers on a device."""

    def __init__(self, config: DiffusionConfig, device: torch.device | str = "cpu") -> None:
        self.config = config
        self.alphas_cumprod = None if config.is_flow else alphas_cumprod(config).to(device)  # (T,) float64

    def draw_timesteps(self, seed: int, ids: Tensor, counter: int | Tensor) -> Tensor:
        """Training's t of each sample: a function of (seed, counter, id). ids (N,) int64 => t (N,)."""
        config = self.config
        if not config.is_flow:
            return random.uniform_integers(seed, "timestep", ids, counter, config.num_train_timesteps)
        if config.timestep_sampling == "uniform":
            share = random.uniform(seed, "timestep", ids, counter)
        else:  # equation 19 of arXiv 2403.03206
            drawn = random.normal(seed, "timestep", ids, counter, (1,))[:, 0].double()
            share = torch.sigmoid(config.logit_mean + config.logit_std * drawn)
        # Rounded to float32, which hides the last bits of the library's exponential, that vary with the place in a row.
        return (config.num_train_timesteps * shifted(share, config.shift)).float()

    def levels(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise at t (N,): each (N, 1, 1, 1) in the dtype of `like`."""
        if self.alphas_cumprod is None:
            share = (t.double() / self.config.num_train_timesteps).reshape(-1, *[1] * (like.ndim - 1))
            return (1 - share).to(like.dtype), share.to(like.dtype)
        alphas = self.alphas_cumprod[t].reshape(-1, *[1] * (like.ndim - 1))
        return alphas.sqrt().to(like.dtype), (1 - alphas).sqrt().to(like.dtype)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x0, noise (N, C, H, W), t (N,) => x_t (N, C, H, W)."""
        signal, sigma = self.levels(t, x0)
        return signal * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the denoiser should answer: (N, C, H, W)."""
        match self.config.prediction_type:
            case "epsilon":
                return noise
            case "sample":
                return x0
            case "velocity":
                return noise - x0
        signal, sigma = self.levels(t, x0)
        return signal * noise - sigma * x0

    def to_x0_and_epsilon(self, model_output: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The denoiser's answer at t (N,) => (x0, epsilon), each (N, C, H, W)."""
        return to_x0_and_epsilon(model_output, x_t, *self.levels(t, x_t), self.config.prediction_type)

    def loss(self, denoiser: Denoiser, x0: Tensor, noise: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """Weighted mean squared error of each sample, (N,) in the dtype of x0, whatever the denoiser computes in."""
        model_output = denoiser(self.add_noise(x0, noise, t), t, labels)
        error = model_output.to(x0.dtype) - self.target(x0, noise, t)
        squared = error.square().flatten(1).mean(dim=1)
        return squared if self.config.loss_weighting == "none" else squared * self.loss_weights(t).to(x0.dtype)

    def loss_weights(self, t: Tensor) -> Tensor:
        """Min-SNR, section 3.4 of arXiv 2303.09556: (N,) float64.

        It weighs the error of x0 by min(SNR, gamma); an error of the prediction is that of x0 over dx0.
        """
        signal, sigma = (level.flatten() for level in self.levels(t, t.double()))
        if self.config.prediction_type == "epsilon":  # dx0 = sigma / signal, which is 1 / sqrt(SNR)
            return (self.config.min_snr_gamma * (sigma / signal).square()).clamp(max=1)
        capped = (signal / sigma).square().clamp(max=self.config.min_snr_gamma)  # at t = 0 of a flow SNR is infinite
        return capped if self.config.prediction_type == "sample" else capped * sigma.square()


def alphas_cumprod(config: DiffusionConfig, dtype: torch.dtype = torch.float64) -> Tensor:
    """The share of signal variance left at each t: (T,) float64, falling. dtype: what is computed in."""
    steps = config.num_train_timesteps
    assert not config.is_flow, "a flow has no betas"
    if config.schedule == "cosine":
        betas = _cosine_betas(steps).to(dtype)
    else:
        start, end = _resolve_betas(config.schedule, config.beta_start, config.beta_end)
        betas = _interpolated_betas(config.schedule, start, end, steps, dtype)
    if config.zero_terminal_snr:
        betas = _zero_terminal_snr(betas)
    return (1 - betas).cumprod(dim=0).double()


def to_x0_and_epsilon(
    model_output: Tensor, x_t: Tensor, signal: Tensor, sigma: Tensor, prediction_type: PredictionType
) -> tuple[Tensor, Tensor]:
    """The denoiser's answer at x_t = signal x0 + sigma epsilon => (x0, epsilon), each (N, C, H, W).

    signal, sigma: what broadcasts with x_t, in its dtype.
    """
    match prediction_type:
        case "epsilon":
            return (x_t - sigma * model_output) / signal, model_output
        case "v_prediction":  # Salimans & Ho 2022, appendix D
            return signal * x_t - sigma * model_output, signal * model_output + sigma * x_t
        case "sample":
            return model_output, (x_t - signal * model_output) / sigma
        case "velocity":
            return x_t - sigma * model_output, x_t + signal * model_output


def shifted(share: Any, shift: float) -> Any:
    """t/T in [0, 1] => t/T moved towards noise: equation 23 of arXiv 2403.03206. A float or a tensor."""
    return shift * share / (1 + (shift - 1) * share)


def _resolve_betas(schedule: str, start: float | None, end: float | None) -> tuple[float, float]:
    usual_start, usual_end = CONVENTIONAL_BETAS[schedule]
    return usual_start if start is None else start, usual_end if end is None else end


def _interpolated_betas(schedule: str, start: float, end: float, steps: int, dtype: torch.dtype) -> Tensor:
    if schedule == "linear":
        return torch.linspace(start, end, steps, dtype=dtype)
    return torch.linspace(math.sqrt(start), math.sqrt(end), steps, dtype=dtype).square()


def _cosine_betas(steps: int) -> Tensor:
    """Nichol & Dhariwal 2021, equation 17: s = 0.008, betas clipped at 0.999 against the singularity at T."""
    progress = torch.arange(steps + 1, dtype=torch.float64) / steps
    remaining = ((progress + 0.008) / 1.008 * (math.pi / 2)).cos().square()
    return (1 - remaining[1:] / remaining[:-1]).clamp(max=0.999)


def _zero_terminal_snr(betas: Tensor) -> Tensor:
    """Algorithm 1 of arXiv 2305.08891: sqrt(alphas_cumprod) is shifted to 0 at T-1, and keeps its first value."""
    signal = (1 - betas).cumprod(dim=0).sqrt()
    first, last = signal[0].clone(), signal[-1].clone()
    remaining = ((signal - last) * (first / (first - last))).square()
    return 1 - torch.cat([remaining[:1], remaining[1:] / remaining[:-1]])

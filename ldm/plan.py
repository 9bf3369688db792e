"""The plan of a sampling run: all of its numbers, before it starts.

docs/samplers.md says which settings reproduce the DDIM paper, CompVis LDM and diffusers, and where those differ.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import Field, ValidationInfo, field_validator

from ldm.config import Config, RequestError
from ldm.diffusion import DiffusionConfig, PredictionType, alphas_cumprod, shifted
from ldm.steps import Eta, Step, ddim_step, ddpm_step, flow_steps, multistep

Sampler = Literal["ddim", "ddpm", "dpmpp_2m", "euler", "heun"]
Spacing = Literal["trailing", "leading", "linspace", "quadratic"]

# Below this, an error in epsilon is multiplied by 1,000 and more in x0 = (x - sqrt(1 - a) epsilon) / sqrt(a).
MIN_EPSILON_ALPHA = 1e-6
FLOW_SAMPLERS = ("euler", "heun")


class SamplerConfig(Config):
    """How pictures are sampled."""

    sampler: Sampler | None = Field(
        None,
        description="ddim, ddpm (ancestral) or dpmpp_2m (DPM-Solver++); of a flow euler or heun. null: ddim, or euler",
    )
    num_inference_steps: int = Field(50, gt=0, description="sampling steps S; heun calls the denoiser 2 S - 1 times")
    eta: Eta = Field(
        0.0,
        description="of ddim, 0 to 1. 0: deterministic; 1: as much noise as DDPM; sigma_hat: DDPM's larger variance",
    )
    spacing: Spacing | None = Field(
        None,
        description="of the timesteps; null: trailing, but leading for epsilon on a schedule that ends in noise, and "
        "with profile=diffusers",
    )
    steps_offset: int = Field(0, ge=0, description="added to each timestep; 1 with leading: CompVis LDM")
    final_alpha_cumprod: Literal["one", "first"] = Field(
        "one", description="where the last step ends: at the clean picture (1), or at the first noise level (LDM)"
    )
    clip_x0: float | None = Field(
        None, gt=0, description="bound of each predicted x0, in units of the normalised latents; null: none"
    )
    profile: Literal["exact", "diffusers"] = Field(
        "exact", description="diffusers: its DDIMScheduler bit for bit in float32, quirks included"
    )
    guidance_scale: float = Field(1.0, ge=0, description="classifier-free guidance; 1: none")
    guidance_interval: tuple[float, float] = Field(
        (0.0, 1.0), description="shares of t/T between which guidance applies (Kynkäänniemi et al. 2024)"
    )
    guidance_rescale: float = Field(
        0.0, ge=0, le=1, description="how far guidance keeps the deviation of the unguided answer (Lin et al. 2023)"
    )

    @field_validator("eta", mode="before")
    @classmethod
    def _eta_in_range(cls, value: object) -> object:
        try:
            if value == "sigma_hat" or 0 <= float(str(value)) <= 1:
                return value if value == "sigma_hat" else float(str(value))
        except ValueError:
            pass
        raise ValueError("must be from 0 (deterministic) to 1 (ancestral), or sigma_hat")

    @field_validator("guidance_interval")
    @classmethod
    def _interval_in_order(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= value[0] < value[1] <= 1:
            raise ValueError("must be two rising shares between 0 and 1, such as [0.2, 0.8]")
        return value

    @field_validator("guidance_interval", "guidance_rescale")
    @classmethod
    def _is_of_guidance(cls, value: object, info: ValidationInfo) -> object:
        if value != cls.model_fields[str(info.field_name)].default and info.data.get("guidance_scale") == 1:
            raise ValueError("at guidance_scale=1 nothing is guided; give guidance_scale, or leave it out")
        return value

    @field_validator("eta")
    @classmethod
    def _sampler_has_noise(cls, value: Eta, info: ValidationInfo) -> Eta:
        sampler = info.data.get("sampler")
        if sampler in ("dpmpp_2m", *FLOW_SAMPLERS) and value != 0:
            raise ValueError(f"sampler={sampler} is deterministic; leave it out")
        if sampler == "ddpm" and value not in (0, 1, "sigma_hat"):
            raise ValueError("sampler=ddpm has eta 1 by itself; leave it out, give sigma_hat, or use sampler=ddim")
        return value

    @field_validator("profile")
    @classmethod
    def _diffusers_has_it(cls, value: str, info: ValidationInfo) -> str:
        if value == "diffusers":
            for key, has in (("sampler", (None, "ddim")), ("spacing", (None, "leading", "trailing", "linspace"))):
                if info.data.get(key) not in has:
                    raise ValueError(f"its DDIMScheduler has no {key}={info.data.get(key)}; use profile=exact")
            if info.data.get("eta") == "sigma_hat":
                raise ValueError("its DDIMScheduler has no eta=sigma_hat; use profile=exact")
        return value


@dataclass(frozen=True)
class SamplingPlan:
    """The steps of one run, first step first."""

    steps: tuple[Step, ...]
    prediction_type: PredictionType
    num_inference_steps: int

    @property
    def timesteps(self) -> tuple[float, ...]:
        return tuple(step.t for step in self.steps)

    @property
    def timesteps_prev(self) -> tuple[float, ...]:
        return tuple(step.t_prev for step in self.steps)

    @property
    def alphas_cumprod(self) -> tuple[float, ...]:
        return tuple(step.alpha_cumprod for step in self.steps)

    @property
    def alphas_cumprod_prev(self) -> tuple[float, ...]:
        return tuple(step.alpha_cumprod_prev for step in self.steps)

    @property
    def sigmas(self) -> tuple[float, ...]:
        return tuple(step.sigma for step in self.steps)


def make_plan(diffusion: DiffusionConfig, settings: SamplerConfig, strength: float = 1.0) -> SamplingPlan:
    """A plan of exactly `num_inference_steps` steps, or of their last share `strength`, at least one.

    Raises RequestError for settings that cannot work with this model.
    """
    _check(diffusion, settings)
    count = max(1, round(settings.num_inference_steps * strength))
    if diffusion.is_flow:
        number = settings.num_inference_steps
        shares = [shifted(i / number, diffusion.shift) for i in range(count, -1, -1)]
        steps = flow_steps(shares, diffusion.num_train_timesteps, heun=settings.sampler == "heun")
    elif settings.profile == "diffusers":
        steps = _diffusers_steps(diffusion, settings)[-count:]
    else:
        steps = _exact_steps(diffusion, settings, count)
    if settings.clip_x0 is not None:
        exact = settings.profile == "exact"
        steps = [step._replace(clip_x0=settings.clip_x0, clip_epsilon=exact) for step in steps]
    return SamplingPlan(tuple(steps), diffusion.prediction_type, count)


def _check(diffusion: DiffusionConfig, settings: SamplerConfig) -> None:
    """Raises RequestError where model and settings do not go together."""
    sampler, total = settings.sampler, diffusion.num_train_timesteps
    if settings.num_inference_steps > total:
        raise RequestError(
            f"num_inference_steps={settings.num_inference_steps}: must be 1 to {total}, the num_train_timesteps here"
        )
    if diffusion.is_flow:
        if sampler not in (None, *FLOW_SAMPLERS):
            raise RequestError(
                f"sampler={sampler}: is for a diffusion with alphas_cumprod; this model is a flow: use euler or heun"
            )
        for key in ("eta", "spacing", "steps_offset", "final_alpha_cumprod", "profile"):
            value = getattr(settings, key)
            if value != SamplerConfig.model_fields[key].default:
                raise RequestError(f"{key}={value}: is for a diffusion model; this model is a flow: leave it out")
        return
    if sampler in FLOW_SAMPLERS:
        raise RequestError(f"sampler={sampler}: is for a flow; this model is a diffusion: use ddim, ddpm or dpmpp_2m")


def _exact_steps(diffusion: DiffusionConfig, settings: SamplerConfig, count: int) -> list[Step]:
    levels = alphas_cumprod(diffusion).tolist()
    timesteps = _exact_timesteps(diffusion, settings, levels)[-count:]
    final = 1.0 if settings.final_alpha_cumprod == "one" else levels[0]
    steps = []
    for i, t in enumerate(timesteps):
        last = i + 1 == len(timesteps)
        ends = (t, -1, levels[t], final) if last else (t, timesteps[i + 1], levels[t], levels[timesteps[i + 1]])
        if settings.sampler == "ddpm":
            steps.append(ddpm_step(*ends, large=settings.eta == "sigma_hat"))
        else:
            steps.append(ddim_step(*ends, eta=settings.eta))
    return multistep(steps) if settings.sampler == "dpmpp_2m" else steps


def _exact_timesteps(diffusion: DiffusionConfig, settings: SamplerConfig, levels: list[float]) -> list[int]:
    """Exactly S timesteps, falling. Raises RequestError where the first step cannot be taken."""
    total, needs_signal = diffusion.num_train_timesteps, diffusion.prediction_type == "epsilon"
    spacing = settings.spacing
    if spacing is None:
        spacing = "leading" if needs_signal and levels[-1] < MIN_EPSILON_ALPHA else "trailing"
    timesteps = [t + settings.steps_offset for t in spaced_timesteps(total, settings.num_inference_steps, spacing)]
    _check_first(timesteps[0], spacing, settings, total)
    if needs_signal and levels[timesteps[0]] < MIN_EPSILON_ALPHA:
        raise RequestError(
            f"spacing={spacing}: starts at t={timesteps[0]}, where alphas_cumprod={levels[timesteps[0]]:.1e} and "
            f"epsilon says nothing of x0; use leading with num_inference_steps of at most {total // 2}, or "
            "train with prediction_type=v_prediction"
        )
    return timesteps


def _check_first(t: int, spacing: str, settings: SamplerConfig, total: int) -> None:
    if t >= total:
        raise RequestError(
            f"steps_offset={settings.steps_offset}: spacing={spacing} would start at t={t}, past the last, "
            f"{total - 1}; leave it out, or use leading with fewer steps"
        )


def spaced_timesteps(total: int, count: int, spacing: Spacing) -> list[int]:
    """Exactly `count` timesteps of 0 .. total-1, falling; count <= total.

    Only quadratic repeats small ones, above about sqrt(0.8 total) steps, as the DDIM authors' code does; a repeated
    step changes nothing.
    """
    if spacing == "leading":
        return [total * i // count for i in reversed(range(count))]
    if spacing == "trailing":
        return [round(total * i / count) - 1 for i in range(count, 0, -1)]
    if count == 1:  # of the two ends of the other two, the one where sampling starts
        return [total - 1 if spacing == "linspace" else int(0.8 * total)]
    if spacing == "linspace":
        return [round((total - 1) * i / (count - 1)) for i in reversed(range(count))]
    # appendix D.2 of arXiv 2010.02502, with the end at 0.8 T of its code
    return [int(root**2) for root in np.linspace(0, math.sqrt(0.8 * total), count)[::-1]]


def _diffusers_steps(diffusion: DiffusionConfig, settings: SamplerConfig) -> list[Step]:
    """As diffusers' DDIMScheduler behaves: float32, and a stride of T // S from each t whatever the spacing."""
    total, count = diffusion.num_train_timesteps, settings.num_inference_steps
    spacing = settings.spacing or "leading"
    if spacing == "linspace":
        timesteps = [int(t) for t in np.linspace(0, total - 1, count).round()[::-1]]
    elif spacing == "leading":
        timesteps = [i * (total // count) + settings.steps_offset for i in reversed(range(count))]
    else:
        timesteps = [int(t) - 1 for t in np.arange(total, 0, -total / count).round()]
    if len(timesteps) != count:
        raise RequestError(
            f"num_inference_steps={count}: diffusers takes {len(timesteps)} steps here, the last to pure noise; "
            f"give {count - 1}, or profile=exact"
        )
    _check_first(timesteps[0], spacing, settings, total)
    levels = alphas_cumprod(diffusion, torch.float32).float()
    final = levels.new_ones(()) if settings.final_alpha_cumprod == "one" else levels[0]
    t = torch.tensor(timesteps)
    t_prev = (t - total // count).clamp(min=-1)
    alpha, alpha_prev = levels[t], torch.where(t_prev >= 0, levels[t_prev], final)
    assert settings.eta != "sigma_hat"
    sigma = settings.eta * ((1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)) ** 0.5
    direction = (1 - alpha_prev - sigma**2) ** 0.5
    # At zero SNR and eta 1 what stands below the root is 0 and a rounding, whose sign depends on the processor.
    if direction.isnan().any() or (settings.eta == 1 and alpha.eq(0).any()):
        raise RequestError(
            f"eta={settings.eta}: diffusers takes the root of a rounding about 0 here, NaN on some processors; give "
            "eta=0, or profile=exact"
        )
    roots = (alpha**0.5, (1 - alpha) ** 0.5, alpha_prev**0.5, (1 - alpha_prev) ** 0.5)
    rows = torch.stack((alpha, alpha_prev, sigma, *roots, alpha_prev**0.5, direction), dim=1).tolist()
    return [Step(*ends, *row) for *ends, row in zip(timesteps, t_prev.tolist(), rows, strict=True)]

"""DDIM sampling (Song et al., arXiv 2010.02502) as a pure function of (denoiser, noise, plan).

The plan says all about a run before it starts: which timesteps, which noise levels, how much fresh noise.
Shapes: x, noise (N, C, H, W); t (N,) int64; labels (N,) int64; seeds (N,) int64.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ldm.config import RequestError
from ldm.diffusion import Denoiser, DiffusionConfig, PredictionType, alphas_cumprod, to_x0_and_epsilon
from ldm.random import normal

Spacing = Literal["trailing", "leading", "linspace"]
DenoiserFn = Callable[[Tensor, Tensor], Tensor]
"""(x_t (N, C, H, W), t (N,)) => model output (N, C, H, W): a denoiser with its labels and guidance bound."""

# Below this, an error in epsilon is multiplied by 1,000 and more in x0 = (x - sqrt(1 - a) epsilon) / sqrt(a).
MIN_EPSILON_ALPHA = 1e-6


@dataclass(frozen=True)
class SamplingPlan:
    """The S steps of one run, first step first. Step i goes from timesteps[i] to timesteps_prev[i]."""

    timesteps: tuple[int, ...]
    timesteps_prev: tuple[int, ...]
    """The next step's timestep; -1 after the last, which is the clean picture."""
    alphas_cumprod: tuple[float, ...]
    alphas_cumprod_prev: tuple[float, ...]
    """At timesteps_prev; 1 after the last."""
    sigmas: tuple[float, ...]
    """Standard deviation of the fresh noise that each step adds; all 0 for eta = 0."""
    prediction_type: PredictionType

    @property
    def num_inference_steps(self) -> int:
        return len(self.timesteps)


def make_plan(
    config: DiffusionConfig, num_inference_steps: int, eta: float = 0.0, spacing: Spacing | None = None
) -> SamplingPlan:
    """A plan of exactly `num_inference_steps` steps.

    eta: 0 deterministic (DDIM), 1 ancestral (DDPM).
    spacing: None is trailing, which starts at t = T-1, pure noise; but leading where the denoiser predicts
    epsilon and the schedule leaves no signal at T-1 (cosine), for epsilon says nothing of x0 there.
    Raises RequestError where S exceeds T, eta is outside [0, 1], or the first step cannot be taken.
    """
    total = config.num_train_timesteps
    if not 1 <= num_inference_steps <= total:
        raise RequestError(
            f"num_inference_steps={num_inference_steps}: must be 1 to {total}, the num_train_timesteps here"
        )
    if not 0 <= eta <= 1:
        raise RequestError(f"eta={eta}: must be from 0 (deterministic) to 1 (ancestral)")
    levels = alphas_cumprod(config).tolist()
    needs_signal = config.prediction_type == "epsilon"
    if spacing is None:
        spacing = "leading" if needs_signal and levels[-1] < MIN_EPSILON_ALPHA else "trailing"
    timesteps = _spaced_timesteps(total, num_inference_steps, spacing)
    alphas = tuple(levels[t] for t in timesteps)
    if needs_signal and alphas[0] < MIN_EPSILON_ALPHA:
        raise RequestError(
            f"spacing={spacing}: starts at t={timesteps[0]}, where alphas_cumprod={alphas[0]:.1e} and "
            f"epsilon says nothing of x0; use leading with num_inference_steps of at most {total // 2}, or "
            "train with prediction_type=v_prediction"
        )
    alphas_prev = (*alphas[1:], 1.0)
    return SamplingPlan(
        timesteps=timesteps,
        timesteps_prev=(*timesteps[1:], -1),
        alphas_cumprod=alphas,
        alphas_cumprod_prev=alphas_prev,
        sigmas=tuple(eta * _ancestral_sigma(a, prev) for a, prev in zip(alphas, alphas_prev, strict=True)),
        prediction_type=config.prediction_type,
    )


@torch.no_grad()
def ddim(
    denoiser_fn: DenoiserFn,
    noise: Tensor,
    plan: SamplingPlan,
    *,
    noise_fn: Callable[[int], Tensor] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Initial noise => x0, both (N, C, H, W), computed in the dtype of `noise`.

    noise_fn: step index => fresh noise (N, C, H, W), needed for eta > 0 (`step_noise` makes one).
    progress: called after each step with the number of steps done.
    """
    if noise_fn is None and any(plan.sigmas):
        raise ValueError("a plan with eta > 0 needs noise_fn; step_noise(seeds, shape) makes one")
    x = noise
    for step, t in enumerate(plan.timesteps):
        model_output = denoiser_fn(x, torch.full((len(x),), t, device=x.device))
        fresh = noise_fn(step) if noise_fn is not None and plan.sigmas[step] > 0 else None
        x = ddim_step(model_output.to(x.dtype), x, plan, step, fresh)
        if progress is not None:
            progress(step + 1)
    return x


def ddim_step(model_output: Tensor, x: Tensor, plan: SamplingPlan, step: int, noise: Tensor | None) -> Tensor:
    """Equation 12 of arXiv 2010.02502: x at timesteps[step] => x at timesteps_prev[step]."""
    alpha = torch.tensor(plan.alphas_cumprod[step], dtype=torch.float64)
    alpha_prev, sigma = plan.alphas_cumprod_prev[step], plan.sigmas[step]
    x0, epsilon = to_x0_and_epsilon(model_output, x, alpha, plan.prediction_type)
    x = math.sqrt(alpha_prev) * x0 + math.sqrt(1 - alpha_prev - sigma**2) * epsilon
    return x if noise is None else x + sigma * noise


def guided(denoiser: Denoiser, labels: Tensor | None, guidance_scale: float, null_label: int | None) -> DenoiserFn:
    """Classifier-free guidance (Ho & Salimans 2022): null + scale (conditional - null).

    Scale 1 is the conditional model in one call of N rows; any other is one call of 2N rows. An unconditional
    denoiser has labels and null_label None. Raises RequestError where such a one is to be guided.
    """
    if guidance_scale == 1:
        return lambda x, t: denoiser(x, t, labels)
    if labels is None or null_label is None:
        raise RequestError(f"guidance_scale={guidance_scale}: the model is unconditional; must be 1")
    both_labels = torch.cat([labels, torch.full_like(labels, null_label)])

    def denoiser_fn(x: Tensor, t: Tensor) -> Tensor:
        conditional, null = denoiser(torch.cat([x, x]), torch.cat([t, t]), both_labels).to(x.dtype).chunk(2)
        return null + guidance_scale * (conditional - null)

    return denoiser_fn


def initial_noise(seeds: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Where each picture starts: depends on its own seed alone. seeds (N,) => float32 (N, *shape)."""
    return normal(0, "sample-initial", seeds, 0, shape)


def step_noise(seeds: Tensor, shape: tuple[int, ...]) -> Callable[[int], Tensor]:
    """The fresh noise of each step, from (the picture's seed, the step): a `noise_fn` for `ddim`."""
    return lambda step: normal(0, "sample-step", seeds, step, shape)


def _spaced_timesteps(total: int, count: int, spacing: Spacing) -> tuple[int, ...]:
    """Exactly `count` distinct timesteps, falling. count <= total keeps the strides at 1 or more."""
    if spacing == "leading":
        return tuple(total * i // count for i in reversed(range(count)))
    if spacing == "trailing":
        return tuple(round(total * i / count) - 1 for i in range(count, 0, -1))
    if spacing == "linspace":
        if count == 1:
            return (total - 1,)  # of the two ends, the one where sampling starts
        return tuple(round((total - 1) * i / (count - 1)) for i in reversed(range(count)))
    raise RequestError(f"spacing={spacing}: unknown; use trailing, leading or linspace")


def _ancestral_sigma(alpha: float, alpha_prev: float) -> float:
    """Equation 16 of arXiv 2010.02502 with eta = 1."""
    return math.sqrt((1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev))

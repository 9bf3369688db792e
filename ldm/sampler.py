"""Samplers as pure functions of (denoiser, noise, plan), classifier-free guidance, and the noise of a seed.

Shapes: x, noise (N, C, H, W); t (N,), int64, for a flow floating; labels (N,) int64; seeds (N,) int64.
"""

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from ldm.config import RequestError
from ldm.diffusion import Denoiser, PredictionType, to_x0_and_epsilon
from ldm.plan import SamplingPlan
from ldm.random import normal
from ldm.steps import Step

DenoiserFn = Callable[[Tensor, Tensor], Tensor]
"""(x_t (N, C, H, W), t (N,)) => model output (N, C, H, W): a denoiser with its labels and guidance bound."""


@torch.no_grad()
def sample_latents(
    denoiser_fn: DenoiserFn,
    noise: Tensor,
    plan: SamplingPlan,
    *,
    noise_fn: Callable[[int], Tensor] | None = None,
    after_step: Callable[[Tensor, Step], Tensor] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Initial noise => x0, both (N, C, H, W), computed in the dtype of `noise`.

    noise_fn: step index => fresh noise (N, C, H, W), needed where a plan adds noise (`step_noise` makes one).
    after_step: (x, the step that led to it) => x, for what is imposed on the samples.
    progress: called after each step with the number of steps done.
    """
    if noise_fn is None and any(plan.sigmas):
        raise ValueError("a plan that adds noise needs noise_fn; step_noise(seeds, shape) makes one")
    x, x0 = noise, None
    for i, now in enumerate(plan.steps):
        model_output = denoiser_fn(x, timesteps(now, x))
        fresh = noise_fn(i) if noise_fn is not None and now.sigma > 0 else None
        x, x0 = step(model_output, x, now, plan.prediction_type, x0_before=x0, noise=fresh)
        if after_step is not None:
            x = after_step(x, now)
        if progress is not None:
            progress(i + 1)
    return x


def step(
    model_output: Tensor,
    x: Tensor,
    steps: Step | Sequence[Step],
    prediction_type: PredictionType,
    *,
    x0_before: Tensor | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x at the steps' t => (x at their t_prev, the predicted x0), each (N, C, H, W).

    steps: one for all rows, or one for each, of any plans for this model: a row gets the bits that it gets alone.
    x0_before: what this returned for the rows' steps before; any finite values where a row has none.
    noise: standard Gaussians, for steps with sigma > 0.
    """
    rows = [steps] if isinstance(steps, Step) else list(steps)
    columns = torch.tensor(rows, dtype=torch.float64).T.to(x.device, x.dtype)
    columns = columns.reshape(*columns.shape, *[1] * (x.ndim - 1))  # each (N or 1, 1, 1, 1)
    now = SimpleNamespace(**dict(zip(Step._fields, columns, strict=True)))
    x0, epsilon = to_x0_and_epsilon(model_output.to(x.dtype), x, now.signal, now.noise, prediction_type)
    if any(row.clip_x0 < math.inf for row in rows):
        x0 = x0.clamp(-now.clip_x0, now.clip_x0)
        epsilon = torch.where(now.clip_epsilon > 0, (x - now.signal * x0) / now.noise, epsilon)
    x_prev = now.x0_weight * x0 + now.epsilon_weight * epsilon
    if any(row.history_weight for row in rows):
        assert x0_before is not None, "a multistep sampler needs the x0 of the step before"
        x_prev = x_prev + now.history_weight * x0_before
    if any(row.sigma for row in rows):
        assert noise is not None, "a step with sigma > 0 needs noise"
        x_prev = x_prev + now.sigma * noise
    return x_prev, x0


def timesteps(steps: Step | Sequence[Step], x: Tensor) -> Tensor:
    """What the denoiser is told: t (N,), int64, for a flow in the dtype of x."""
    rows = [steps] * len(x) if isinstance(steps, Step) else steps
    discrete = isinstance(rows[0].t, int)
    return torch.tensor([row.t for row in rows], dtype=torch.int64 if discrete else x.dtype, device=x.device)


def guided(
    denoiser: Denoiser,
    labels: Tensor | None,
    guidance_scale: float,
    null_label: int | None,
    *,
    interval: tuple[float, float] = (0.0, math.inf),
    rescale: float = 0.0,
) -> DenoiserFn:
    """Classifier-free guidance (Ho & Salimans 2022): null + scale (conditional - null).

    Scale 1 is the conditional model in one call of N rows; any other is one call of 2N rows, and for steps of which no
    row is inside `interval`, in units of t (arXiv 2404.07724), a call of N. rescale: equations 15 and 16 of arXiv
    2305.08891. An unconditional denoiser has labels and null_label None. Raises RequestError where such a one is to be
    guided.
    """
    if guidance_scale == 1:
        return lambda x, t: denoiser(x, t, labels)
    if labels is None or null_label is None:
        raise RequestError(f"guidance_scale={guidance_scale}: the model is unconditional; must be 1")
    both_labels = torch.cat([labels, torch.full_like(labels, null_label)])

    def denoiser_fn(x: Tensor, t: Tensor) -> Tensor:
        inside = (t >= interval[0]) & (t <= interval[1])
        if not inside.any():
            return denoiser(x, t, labels)
        conditional, null = denoiser(torch.cat([x, x]), torch.cat([t, t]), both_labels).to(x.dtype).chunk(2)
        answer = guide(conditional, null, [guidance_scale], [rescale])
        return answer if inside.all() else torch.where(inside.reshape(-1, *[1] * (x.ndim - 1)), answer, conditional)

    return denoiser_fn


def guide(conditional: Tensor, null: Tensor, scales: Sequence[float], rescales: Sequence[float]) -> Tensor:
    """The two answers of `guided`, (N, C, H, W) each => one. scales, rescales: one for all rows, or one for each."""
    rows = [scales, rescales, [1 - rescale for rescale in rescales]]
    columns = torch.tensor(rows, dtype=torch.float64).to(null.device, null.dtype)
    scale, rescale, kept = columns.reshape(3, -1, *[1] * (null.ndim - 1))
    answer = null + scale * (conditional - null)
    if any(rescales):
        answer = answer * (kept + rescale * _deviation(conditional) / _deviation(answer).clamp(min=1e-12))
    return answer


def initial_noise(seeds: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Where each picture starts: depends on its own seed alone. seeds (N,) => float32 (N, *shape)."""
    return normal(0, "sample-initial", seeds, 0, shape)


def step_noise(seeds: Tensor, shape: tuple[int, ...]) -> Callable[[int | Tensor], Tensor]:
    """The fresh noise of each step, from (the picture's seed, the step): a `noise_fn` for `sample_latents`."""
    return lambda step: normal(0, "sample-step", seeds, step, shape)


def _deviation(x: Tensor) -> Tensor:
    """Standard deviation of each sample: (N, C, H, W) => (N, 1, 1, 1)."""
    return x.std(dim=tuple(range(1, x.ndim)), keepdim=True)

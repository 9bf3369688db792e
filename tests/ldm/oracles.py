"""The best possible denoisers of a Gaussian and of a mixture in closed form, and plans to sample from them."""

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion import Diffusion, DiffusionConfig
from ldm.plan import SamplerConfig, SamplingPlan, make_plan
from ldm.sampler import DenoiserFn

MEAN, STD = 0.3, 0.5  # the data of the oracle: every latent value is N(MEAN, STD^2)
CENTRES, WIDTH = torch.tensor([-1.0, 0.2, 1.1], dtype=torch.float64), 0.3  # a mixture of equal parts
FLOW = DiffusionConfig(schedule="flow")


def plan_of(config: DiffusionConfig, steps: int, **settings: object) -> SamplingPlan:
    return make_plan(config, SamplerConfig(num_inference_steps=steps, **settings))


def oracle(config: DiffusionConfig, best_x0: Callable[[Tensor, Tensor, Tensor], Tensor]) -> DenoiserFn:
    """The best possible denoiser, from E[x0 | x] at a signal and noise level."""
    diffusion = Diffusion(config)

    def denoiser_fn(x: Tensor, t: Tensor) -> Tensor:
        signal, noise = diffusion.levels(t, x)
        x0 = best_x0(x, signal, noise)
        return diffusion.target(x0, (x - signal * x0) / noise, t)

    return denoiser_fn


def gaussian_x0(x: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
    return MEAN + signal * STD**2 * (x - signal * MEAN) / (signal**2 * STD**2 + noise**2)


def mixture_x0(x: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
    variance = signal**2 * WIDTH**2 + noise**2
    offsets = x[..., None] - signal[..., None] * CENTRES
    parts = torch.softmax(-(offsets**2) / (2 * variance[..., None]), dim=-1)
    return (parts * (CENTRES + (signal * WIDTH**2 / variance)[..., None] * offsets)).sum(dim=-1)

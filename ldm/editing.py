"""What a trained denoiser does without retraining: inversion, interpolation, noising a picture, inpainting.

Shapes: x, x0, noise (N, C, H, W); pixels (N, 3, H, W); masks (N or 1, 1, H, W) in [0, 1], 1 where something new comes.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.diffusion import to_x0_and_epsilon
from ldm.plan import SamplingPlan
from ldm.sampler import DenoiserFn, timesteps
from ldm.steps import Step


@torch.no_grad()
def invert(denoiser_fn: DenoiserFn, x0: Tensor, plan: SamplingPlan) -> Tensor:
    """x0 => the noise from which the plan leads back to about x0: Euler's steps of equation 14 of arXiv 2010.02502,
    upwards. The error is of first order in the steps. For a plan that adds no noise.
    """
    assert not any(plan.sigmas), "noise that is added cannot be inverted"
    ladder = [step for step in plan.steps if step.t_prev != step.t]  # without Heun's second calls
    x, lower = x0, ladder[-1]  # the clean picture has no t of its own: the denoiser is told the first above it
    for step in reversed(ladder):
        model_output = denoiser_fn(x, timesteps(lower, x)).to(x.dtype)
        signal, sigma = torch.tensor([lower.signal, lower.noise], dtype=torch.float64).to(x)
        _, epsilon = to_x0_and_epsilon(model_output, x, signal, sigma, plan.prediction_type)
        clean = (x - step.noise_prev * epsilon) / step.signal_prev
        x, lower = step.signal * clean + step.noise * epsilon, step
    return x


def slerp(start: Tensor, end: Tensor, weights: Tensor) -> Tensor:
    """Spherical interpolation of each sample (equation 67 of arXiv 2010.02502), which keeps the norm of noise.

    weights (N,): 0 gives `start`, 1 gives `end`; straight where the two are all but parallel.
    """
    one, other = start.flatten(1).double(), end.flatten(1).double()
    weights = weights.to(one)[:, None]
    cosine = F.cosine_similarity(one, other, dim=1)[:, None].clamp(-1, 1)
    angle = cosine.acos()
    straight = angle.sin() < 1e-6
    sine = torch.where(straight, 1.0, angle.sin())
    of_one = torch.where(straight, 1 - weights, ((1 - weights) * angle).sin() / sine)
    of_other = torch.where(straight, weights, (weights * angle).sin() / sine)
    return (of_one * one + of_other * other).reshape(start.shape).to(start.dtype)


def noised(x0: Tensor, noise: Tensor, plan: SamplingPlan) -> Tensor:
    """x0 at the noise level where the plan begins (SDEdit, arXiv 2108.01073)."""
    first = plan.steps[0]
    return first.signal * x0 + first.noise * noise


def keep_known(x0: Tensor, noise: Tensor, mask: Tensor) -> Callable[[Tensor, Step], Tensor]:
    """An `after_step` for inpainting: where the mask is 0, x is x0 at the noise level that it has come to.

    One noise for all steps, so that the known part follows a straight path; exactly x0 at the end (arXiv 2206.02779).
    """

    def after_step(x: Tensor, step: Step) -> Tensor:
        return mask * x + (1 - mask) * (step.signal_prev * x0 + step.noise_prev * noise)

    return after_step


def to_latent_mask(mask: Tensor, factor: int) -> Tensor:
    """Mask of pixels => of latent cells: a cell that shows any new pixel is new. factor: pixels to a cell's side."""
    return F.max_pool2d(mask, factor)


def soften(mask: Tensor, radius: int) -> Tensor:
    """A soft edge of `radius` pixels, wholly inside the mask: what was 0 stays 0. Thin strokes fade out."""
    if radius == 0:
        return mask
    width = 2 * radius + 1
    blurred = F.avg_pool2d(F.pad(mask, (radius,) * 4, mode="replicate"), width, stride=1)
    return torch.minimum(mask, (2 * blurred - 1).clamp(min=0))  # at a straight edge the mean is 1/2


def paste(pixels: Tensor, original: Tensor, mask: Tensor) -> Tensor:
    """uint8 pixels where the mask is 1, `original` where it is 0 (to the last bit), a mixture between."""
    mixed = mask * pixels + (1 - mask) * original
    return torch.where(mask == 0, original, mixed.round().to(torch.uint8))

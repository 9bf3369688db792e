"""One step's numbers for each sampler. Every one of them is the same linear update with coefficients of its own,

    x_prev = x0_weight x0 + epsilon_weight epsilon + history_weight x0_before + sigma fresh_noise,

where (x0, epsilon) is the denoiser's answer at t and x0_before its answer one step earlier. So a step is a row of
numbers, and rows of different plans, samplers too, can share one batch (`ldm.sampler.step`).
"""

import itertools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

Eta = float | Literal["sigma_hat"]


class Step(NamedTuple):
    """One call of the denoiser and what is made of its answer; see the head of this file."""

    t: float
    """What the denoiser is told: an int, for a flow a float."""
    t_prev: float
    """Where the step leads; -1 after the last of a diffusion, which is the clean picture."""
    alpha_cumprod: float
    """Share of signal variance at t."""
    alpha_cumprod_prev: float
    sigma: float
    """Standard deviation of the fresh noise."""
    signal: float
    noise: float
    """x_t = signal x0 + noise epsilon."""
    signal_prev: float
    noise_prev: float
    """The same at t_prev."""
    x0_weight: float
    epsilon_weight: float
    history_weight: float = 0.0
    clip_x0: float = math.inf
    clip_epsilon: bool = False
    """Whether epsilon follows from the clipped x0, so that both still make up x_t."""


def ddim_step(t: int, t_prev: int, alpha: float, alpha_prev: float, *, eta: Eta) -> Step:
    """Equation 12 of arXiv 2010.02502, sigma by equation 16; sigma_hat adds more than the direction makes room for."""
    ancestral = math.sqrt((1 - alpha_prev) / (1 - alpha) * max(0.0, 1 - alpha / alpha_prev))
    sigma = ancestral if eta == "sigma_hat" else eta * ancestral
    direction = math.sqrt(max(0.0, 1 - alpha_prev - sigma**2))
    if eta == "sigma_hat":  # the last step adds no noise, as in the authors' code
        sigma = 0.0 if t_prev < 0 else math.sqrt(1 - alpha / alpha_prev)
    return Step(t, t_prev, alpha, alpha_prev, sigma, *_levels(alpha, alpha_prev), math.sqrt(alpha_prev), direction)


def ddpm_step(t: int, t_prev: int, alpha: float, alpha_prev: float, *, large: bool) -> Step:
    """Equation 7 of Ho et al. 2020, arXiv 2006.11239: posterior mean, and its variance (small) or beta (large)."""
    beta = 1 - alpha / alpha_prev
    of_x0 = math.sqrt(alpha_prev) * beta / (1 - alpha)
    of_x_t = math.sqrt(1 - beta) * (1 - alpha_prev) / (1 - alpha)  # and x_t = sqrt(a) x0 + sqrt(1 - a) epsilon
    variance = beta if large and t_prev >= 0 else (1 - alpha_prev) / (1 - alpha) * beta
    weights = (of_x0 + of_x_t * math.sqrt(alpha), of_x_t * math.sqrt(1 - alpha))
    sigma = math.sqrt(max(0.0, variance))
    return Step(t, t_prev, alpha, alpha_prev, sigma, *_levels(alpha, alpha_prev), *weights)


def multistep(steps: list[Step]) -> list[Step]:
    """DPM-Solver++(2M), algorithm 2 of arXiv 2211.01095, as DDIM's steps and a share of x0 - x0_before.

    With lambda = log(signal / noise) and h its rise in a step, D = x0 + h / (2 h_before) (x0 - x0_before) stands in
    place of x0. First order where there is no step before, and into the clean picture, where h is infinite.
    """

    def log_snr(alpha: float) -> float:
        return -math.inf if alpha == 0 else math.inf if alpha == 1 else 0.5 * math.log(alpha / (1 - alpha))

    corrected = steps[:1]
    for before, step in itertools.pairwise(steps):
        h_before = log_snr(step.alpha_cumprod) - log_snr(before.alpha_cumprod)
        h = log_snr(step.alpha_cumprod_prev) - log_snr(step.alpha_cumprod)
        share = 0.0 if h == math.inf or h_before == 0 else h / (2 * h_before)
        weight = -math.sqrt(step.alpha_cumprod_prev) * math.expm1(-h) * share
        corrected.append(step._replace(x0_weight=step.x0_weight + weight, history_weight=-weight))
    return corrected


def flow_steps(shares: Sequence[float], total: int, *, heun: bool) -> list[Step]:
    """Euler's steps of dx/dt = velocity through `shares`, t/T, falling to 0; total: T.

    heun: the second-order rule, with Euler for the last step (Karras et al. 2022, algorithm 1). A step is then two
    calls of the denoiser: Euler's, and one where that arrived.
    """
    steps = []
    for now, after in itertools.pairwise(shares):
        # x + (after - now) velocity, for x0 = x - now velocity and epsilon = x + (1 - now) velocity
        steps.append(_flow_step(now, after, total, 1 - after, after))
        if heun and after > 0:
            # The mean of both velocities: from there (after - now) / 2 (velocity - velocity_before), which is
            # (after - now) / (2 after) (x0_before - x0).
            correction = (after - now) / (2 * after)
            steps.append(_flow_step(after, after, total, 1 - after - correction, after, correction))
    return steps


def _flow_step(now: float, after: float, total: int, x0: float, epsilon: float, history: float = 0.0) -> Step:
    levels = (1 - now, now, 1 - after, after)
    shares = (_signal_share(now), _signal_share(after))
    return Step(total * now, total * after, *shares, 0.0, *levels, x0, epsilon, history)


def _levels(alpha: float, alpha_prev: float) -> tuple[float, float, float, float]:
    """Signal and noise at t and at t_prev."""
    return math.sqrt(alpha), math.sqrt(1 - alpha), math.sqrt(alpha_prev), math.sqrt(1 - alpha_prev)


def _signal_share(share: float) -> float:
    return (1 - share) ** 2 / ((1 - share) ** 2 + share**2)

"""Samplers against closed forms in float64: exactness, order of convergence, the algorithms of the papers."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ldm.diffusion import DiffusionConfig, alphas_cumprod
from ldm.plan import SamplingPlan
from ldm.sampler import sample_latents
from tests.ldm.oracles import CENTRES, FLOW, MEAN, STD, WIDTH, gaussian_x0, mixture_x0, oracle, plan_of


def sampled_moments(config: DiffusionConfig, plan: SamplingPlan) -> tuple[float, float]:
    """Mean and variance of the samples, without Monte Carlo: the map is affine, so unit impulses tell all.

    Row 0 has no noise at all, row 1 has 1 as its initial noise, row 2 + i has 1 as the fresh noise of step i.
    """
    impulses = torch.eye(len(plan.steps) + 2, dtype=torch.float64)[:, 1:, None, None, None]
    denoiser_fn = oracle(config, gaussian_x0)
    x0 = sample_latents(denoiser_fn, impulses[:, 0], plan, noise_fn=lambda step: impulses[:, step + 1]).flatten()
    return x0[0].item(), (x0[1:] - x0[0]).square().sum().item()


def ddim_moments(levels: list[float], chosen: tuple[float, ...], eta: float | str) -> tuple[float, float]:
    """The same by the scalar recursion of equations 12 and 16."""
    mean, variance = 0.0, 1.0
    for i, t in enumerate(chosen):
        last = i + 1 == len(chosen)
        a, prev = levels[int(t)], 1.0 if last else levels[int(chosen[i + 1])]
        scale = 1.0 if eta == "sigma_hat" else float(eta)
        sigma = scale * math.sqrt((1 - prev) / (1 - a)) * math.sqrt(1 - a / prev)
        spread = a * STD**2 + 1 - a
        gain = (math.sqrt(prev * a) * STD**2 + math.sqrt((1 - prev - sigma**2) * (1 - a))) / spread
        if eta == "sigma_hat":
            sigma = 0.0 if last else math.sqrt(1 - a / prev)
        mean = math.sqrt(prev) * MEAN + gain * (mean - math.sqrt(a) * MEAN)
        variance = gain**2 * variance + sigma**2
    return mean, variance


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace", "quadratic"])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0, "sigma_hat"])
def test_a_gaussian_matches_the_closed_form(prediction_type, spacing, eta) -> None:
    for steps, schedule in ((1, "linear"), (7, "scaled_linear"), (30, "linear"), (100, "scaled_linear")):
        config = DiffusionConfig(schedule=schedule, prediction_type=prediction_type)
        plan = plan_of(config, steps, eta=eta, spacing=spacing)
        expected = ddim_moments(alphas_cumprod(config).tolist(), plan.timesteps, eta)
        assert sampled_moments(config, plan) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("values", [{"schedule": "cosine"}, {"zero_terminal_snr": True}])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_gaussian_matches_from_pure_noise_at_every_timestep(values: dict, eta: float) -> None:
    config = DiffusionConfig(num_train_timesteps=300, prediction_type="v_prediction", **values)
    expected = ddim_moments(alphas_cumprod(config).tolist(), tuple(range(299, -1, -1)), eta)
    assert sampled_moments(config, plan_of(config, 300, eta=eta)) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_gaussian_through_a_flow_matches_the_closed_form(shift: float) -> None:
    """Euler and Heun of dx/dt = E[noise - x0 | x], which is affine in x, written out for the mean and the deviation."""
    config = DiffusionConfig(schedule="flow", shift=shift)

    def velocity(x: float, t: float) -> float:
        best = MEAN + (1 - t) * STD**2 * (x - (1 - t) * MEAN) / ((1 - t) ** 2 * STD**2 + t**2)
        return (x - (1 - t) * best) / t - best

    for sampler in ("euler", "heun"):
        for steps in (1, 2, 7, 50):
            grid = [shift * i / steps / (1 + (shift - 1) * i / steps) for i in range(steps, -1, -1)]
            ends = []
            for start in (0.0, 1.0):
                x = start
                for now, after in pairwise(grid):
                    first = velocity(x, now)
                    moved = x + (after - now) * first
                    if sampler == "heun" and after > 0:
                        moved = x + (after - now) * (first + velocity(moved, after)) / 2
                    x = moved
                ends.append(x)
            found = sampled_moments(config, plan_of(config, steps, sampler=sampler))
            assert found == pytest.approx((ends[0], (ends[1] - ends[0]) ** 2), abs=1e-10)


def test_a_gaussian_through_the_multistep_solver_matches_algorithm_2() -> None:
    """DPM-Solver++(2M) as arXiv 2211.01095 writes it, on scalars; float64 of x0 by the oracle."""
    config = DiffusionConfig(prediction_type="v_prediction")
    levels = alphas_cumprod(config)
    for steps in (1, 2, 7, 40):
        plan = plan_of(config, steps, sampler="dpmpp_2m")
        ends = []
        for start in (0.0, 1.0):
            x, buffer, h_before = torch.tensor(start, dtype=torch.float64), None, None
            for i, t in enumerate(plan.timesteps):
                alpha, sigma = levels[int(t)].sqrt(), (1 - levels[int(t)]).sqrt()
                x0 = gaussian_x0(x, alpha, sigma)
                if i + 1 == steps:
                    x = x0
                    break
                alpha_next, sigma_next = (levels[int(plan.timesteps[i + 1])] * 1).sqrt(), None
                sigma_next = (1 - alpha_next**2).sqrt()
                h = (alpha_next / sigma_next).log() - (alpha / sigma).log()
                if buffer is None:
                    data = x0
                else:
                    r = h_before / h
                    data = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * buffer
                x = sigma_next / sigma * x - alpha_next * torch.expm1(-h) * data
                buffer, h_before = x0, h
            ends.append(x.item())
        found = sampled_moments(config, plan)
        assert found == pytest.approx((ends[0], (ends[1] - ends[0]) ** 2), abs=1e-10)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_a_mixture_matches_a_high_precision_recursion(eta: float) -> None:
    """The recursion of the paper in 50 decimal digits, mixture and all."""
    from mpmath import exp, mp, mpf, sqrt

    mp.dps = 50
    config = DiffusionConfig()
    plan = plan_of(config, 12, eta=eta)
    generator = torch.Generator().manual_seed(0)
    noises = torch.randn(13, 6, 1, 1, 1, dtype=torch.float64, generator=generator)
    found = sample_latents(oracle(config, mixture_x0), noises[12], plan, noise_fn=lambda step: noises[step]).flatten()
    levels, product = [], mpf(1)
    for i in range(1000):
        product *= 1 - (mpf("0.0001") + (mpf("0.02") - mpf("0.0001")) * i / 999)
        levels.append(product)
    for row in range(6):
        x = mpf(noises[12, row].item())
        for i, t in enumerate(plan.timesteps):
            a, prev = levels[int(t)], levels[int(plan.timesteps[i + 1])] if i < 11 else mpf(1)
            variance = a * mpf(WIDTH) ** 2 + 1 - a
            offsets = [x - sqrt(a) * mpf(c.item()) for c in CENTRES]
            parts = [exp(-(o**2) / (2 * variance)) for o in offsets]
            best = [
                mpf(c.item()) + sqrt(a) * mpf(WIDTH) ** 2 / variance * o for c, o in zip(CENTRES, offsets, strict=True)
            ]
            x0 = sum(p * b for p, b in zip(parts, best, strict=True)) / sum(parts)
            sigma = mpf(eta) * sqrt((1 - prev) / (1 - a)) * sqrt(1 - a / prev)
            epsilon = (x - sqrt(a) * x0) / sqrt(1 - a)
            x = sqrt(prev) * x0 + sqrt(1 - prev - sigma**2) * epsilon + sigma * mpf(noises[i, row].item())
        assert found[row].item() == pytest.approx(float(x), abs=1e-10)


def errors_by_steps(config: DiffusionConfig, chosen: tuple[int, ...], **settings: object) -> list[float]:
    """Max error on the mixture, against the same sampler with very many steps."""
    denoiser_fn = oracle(config, mixture_x0)
    noise = torch.linspace(-2, 2, 64, dtype=torch.float64).reshape(64, 1, 1, 1)
    limit = sample_latents(denoiser_fn, noise, plan_of(config, 4 * chosen[-1], **settings))
    found = [sample_latents(denoiser_fn, noise, plan_of(config, steps, **settings)) for steps in chosen]
    return [(x - limit).abs().max().item() for x in found]


@pytest.mark.parametrize(
    ("config", "settings", "order"),
    [
        (DiffusionConfig(schedule="cosine", prediction_type="v_prediction", num_train_timesteps=6400), {}, 1),
        (FLOW, {"sampler": "euler"}, 1),
        (FLOW, {"sampler": "heun"}, 2),
    ],
)
def test_samplers_converge_at_their_order(config, settings, order) -> None:
    """The error against the limit falls by 2^order when the steps double."""
    errors = errors_by_steps(config, (25, 50, 100), **settings)
    rates = [math.log2(one / other) for one, other in pairwise(errors)]
    assert rates == pytest.approx([order, order], abs=0.35), (errors, rates)


def test_the_multistep_solver_converges_at_second_order() -> None:
    """To a picture with some noise left: into the clean one, where log(SNR) has no end, its step is of first order."""
    config = DiffusionConfig(schedule="cosine", prediction_type="v_prediction", num_train_timesteps=25600)
    denoiser_fn = oracle(config, mixture_x0)
    noise = torch.linspace(-2, 2, 64, dtype=torch.float64).reshape(64, 1, 1, 1)

    def run(steps: int) -> Tensor:
        """From t = 3/4 T to T/4, a whole number of steps for each of these counts."""
        plan = plan_of(config, steps, sampler="dpmpp_2m", spacing="leading")
        kept = [row for row in plan.steps if 6400 < row.t <= 19200]
        kept[0] = kept[0]._replace(x0_weight=kept[0].signal_prev, history_weight=0.0)  # nothing came before
        return sample_latents(denoiser_fn, noise, SamplingPlan(tuple(kept), config.prediction_type, len(kept)))

    limit = run(1600)
    errors = [(run(steps) - limit).abs().max().item() for steps in (100, 200, 400)]
    rates = [math.log2(one / other) for one, other in pairwise(errors)]
    assert rates == pytest.approx([2, 2], abs=0.35), (errors, rates)


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_the_limit_is_the_data(spacing: str) -> None:
    """Deterministic DDIM's deviation comes to the data's own, at first order."""
    config = DiffusionConfig(schedule="cosine", prediction_type="v_prediction", num_train_timesteps=4000)
    found = [sampled_moments(config, plan_of(config, steps, spacing=spacing))[1] for steps in (50, 100, 200)]
    errors = [STD - variance**0.5 for variance in found]
    assert 0 < errors[2] < 0.01
    assert [errors[1] / errors[0], errors[2] / errors[1]] == pytest.approx([0.5, 0.5], abs=0.03)


def test_ddpm_and_ddim_with_eta_one_are_ho_et_al_s_algorithm_2() -> None:
    config = DiffusionConfig(num_train_timesteps=60, beta_start=0.005, beta_end=0.25)
    levels = alphas_cumprod(config)
    betas = 1 - levels / torch.cat([torch.ones(1, dtype=torch.float64), levels[:-1]])
    noises = torch.randn(61, 5, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def answer(x: Tensor, t: Tensor) -> Tensor:  # any nonlinear denoiser will do
        return torch.tanh(x) + t.reshape(-1, 1, 1, 1) / 60

    def by_the_paper(large: bool) -> Tensor:
        x = noises[60]
        for t in reversed(range(60)):
            epsilon = answer(x, torch.full((5,), t))
            mean = (x - betas[t] / (1 - levels[t]).sqrt() * epsilon) / (1 - betas[t]).sqrt()
            previous = levels[t - 1] if t else torch.ones((), dtype=torch.float64)
            small = (1 - previous) / (1 - levels[t]) * betas[t]
            x = mean + (betas[t] if large and t else small).sqrt() * noises[t]
        return x

    def ours(**settings: object) -> Tensor:
        return sample_latents(answer, noises[60], plan_of(config, 60, **settings), noise_fn=lambda i: noises[59 - i])

    for settings in ({"sampler": "ddpm"}, {"eta": 1.0}):
        torch.testing.assert_close(ours(**settings), by_the_paper(large=False), rtol=0, atol=1e-10)
    for sampler in ("ddpm", "ddim"):
        found = ours(sampler=sampler, eta="sigma_hat")
        torch.testing.assert_close(found, by_the_paper(large=True), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (DiffusionConfig(prediction_type="v_prediction"), {}),
        (DiffusionConfig(prediction_type="v_prediction"), {"sampler": "dpmpp_2m"}),
        (DiffusionConfig(prediction_type="sample", zero_terminal_snr=True), {}),
        (FLOW, {}),
        (FLOW, {"sampler": "heun"}),
    ],
)
def test_a_denoiser_that_knows_the_one_picture_leads_to_it(config, settings) -> None:
    picture = torch.randn(1, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    answer = oracle(config, lambda x, signal, noise: picture)
    for steps in (1, 3, 50):
        x0 = sample_latents(answer, torch.ones(1, 2, 4, 4, dtype=torch.float64), plan_of(config, steps, **settings))
        torch.testing.assert_close(x0, picture, rtol=0, atol=1e-9)

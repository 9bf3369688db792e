"""DDIM against closed forms in float64, against diffusers, and the promises about seeds and guidance."""

import math
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from ldm.config import RequestError
from ldm.denoiser import DenoiserConfig, build_denoiser
from ldm.diffusion import Diffusion, DiffusionConfig, alphas_cumprod
from ldm.sampler import Spacing, ddim, guided, initial_noise, make_plan, step_noise

SPACINGS = get_args(Spacing)
MEAN, STD = 0.3, 0.5  # the data of the oracle: every latent value is N(MEAN, STD^2)


def gaussian_oracle(config: DiffusionConfig) -> Callable[[Tensor, Tensor], Tensor]:
    """The best possible denoiser for that data, in closed form."""
    levels = alphas_cumprod(config)

    def denoiser_fn(x: Tensor, t: Tensor) -> Tensor:
        alpha = levels[t].reshape(-1, 1, 1, 1)
        centred = (x - alpha.sqrt() * MEAN) / (alpha * STD**2 + 1 - alpha)
        epsilon = (1 - alpha).sqrt() * centred
        x0 = MEAN + alpha.sqrt() * STD**2 * centred
        return epsilon if config.prediction_type == "epsilon" else alpha.sqrt() * epsilon - (1 - alpha).sqrt() * x0

    return denoiser_fn


def closed_form(levels: list[float], timesteps: tuple[int, ...], eta: float) -> tuple[float, float]:
    """Mean and variance of DDIM's result from N(0, 1), by the scalar recursion of equations 12 and 16."""
    mean, variance = 0.0, 1.0
    for i, t in enumerate(timesteps):
        a = levels[t]
        prev = levels[timesteps[i + 1]] if i + 1 < len(timesteps) else 1.0
        sigma = eta * math.sqrt((1 - prev) / (1 - a)) * math.sqrt(1 - a / prev)
        spread = a * STD**2 + 1 - a
        gain = (math.sqrt(prev * a) * STD**2 + math.sqrt((1 - prev - sigma**2) * (1 - a))) / spread
        mean = math.sqrt(prev) * MEAN + gain * (mean - math.sqrt(a) * MEAN)
        variance = gain**2 * variance + sigma**2
    return mean, variance


def sampled_moments(config: DiffusionConfig, steps: int, eta: float, spacing: Spacing) -> tuple[float, float]:
    """The same from the sampler, without Monte Carlo: it is affine in its noises, so unit impulses tell all.

    Row 0 has no noise at all, row 1 has 1 as its initial noise, row 2 + i has 1 as the fresh noise of step i.
    """
    impulses = torch.eye(steps + 2, dtype=torch.float64)[:, 1:]  # (rows, initial and each step)
    shaped = impulses[:, :, None, None, None]
    plan = make_plan(config, steps, eta=eta, spacing=spacing)
    x0 = ddim(gaussian_oracle(config), shaped[:, 0], plan, noise_fn=lambda step: shaped[:, step + 1]).flatten()
    return x0[0].item(), (x0[1:] - x0[0]).square().sum().item()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("steps", [1, 7, 10, 30, 100])
def test_gaussian_oracle_matches_the_closed_form(prediction_type, spacing, eta, steps) -> None:
    for schedule in ("linear", "scaled_linear"):
        config = DiffusionConfig(schedule=schedule, prediction_type=prediction_type)
        timesteps = make_plan(config, steps, spacing=spacing).timesteps
        expected = closed_form(alphas_cumprod(config).tolist(), timesteps, eta)
        assert sampled_moments(config, steps, eta, spacing) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_gaussian_oracle_matches_at_every_timestep_of_the_cosine_schedule(eta: float) -> None:
    config = DiffusionConfig(schedule="cosine", num_train_timesteps=300, prediction_type="v_prediction")
    expected = closed_form(alphas_cumprod(config).tolist(), tuple(range(299, -1, -1)), eta)
    assert sampled_moments(config, 300, eta, "trailing") == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_the_error_halves_when_the_steps_double(spacing: Spacing) -> None:
    """Deterministic DDIM is a first-order solver; its limit is the data's own deviation."""
    config = DiffusionConfig(schedule="cosine", prediction_type="v_prediction", num_train_timesteps=4000)
    errors = [STD - sampled_moments(config, steps, 0.0, spacing)[1] ** 0.5 for steps in (50, 100, 200)]
    assert 0 < errors[2] < 0.01
    assert [errors[1] / errors[0], errors[2] / errors[1]] == pytest.approx([0.5, 0.5], abs=0.03)


def test_eta_one_at_every_timestep_is_ddpm_with_the_posterior_variance() -> None:
    config = DiffusionConfig(num_train_timesteps=60, beta_start=0.005, beta_end=0.25)
    levels = alphas_cumprod(config)
    betas = 1 - levels / torch.cat([torch.ones(1, dtype=torch.float64), levels[:-1]])
    generator = torch.Generator().manual_seed(0)
    noises = torch.randn(61, 5, 1, 2, 2, dtype=torch.float64, generator=generator)

    def answer(x: Tensor, t: Tensor) -> Tensor:  # any nonlinear denoiser will do
        return torch.tanh(x) + t.reshape(-1, 1, 1, 1) / 60

    x = noises[60]
    for t in reversed(range(60)):  # Ho et al. 2020, algorithm 2 with sigma^2 = beta~, equation 7
        epsilon = answer(x, torch.full((5,), t))
        mean = (x - betas[t] / (1 - levels[t]).sqrt() * epsilon) / (1 - betas[t]).sqrt()
        previous = levels[t - 1] if t else torch.ones((), dtype=torch.float64)
        x = mean + ((1 - previous) / (1 - levels[t]) * betas[t]).sqrt() * noises[t]

    ours = ddim(answer, noises[60], make_plan(config, 60, eta=1.0), noise_fn=lambda step: noises[59 - step])
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-10)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("steps", [1, 10, 50, 250])
def test_equals_diffusers_where_it_follows_the_paper(prediction_type: str, eta: float, steps: int) -> None:
    """Leading, S dividing T: there diffusers' `step` takes the same stride as its timesteps. In float64."""
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=0,
        timestep_spacing="leading",
    )
    scheduler.set_timesteps(steps)
    config = DiffusionConfig(schedule="scaled_linear", prediction_type=prediction_type)
    scheduler.alphas_cumprod = alphas_cumprod(config)  # theirs is the same in float32: see test_diffusion.py
    plan = make_plan(config, steps, eta=eta, spacing="leading")
    assert list(plan.timesteps) == scheduler.timesteps.tolist()

    def answer(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x + t.reshape(-1, 1, 1, 1) / 1000)

    noises = torch.randn(steps + 1, 3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = noises[steps]
    for step, t in enumerate(scheduler.timesteps):
        x = scheduler.step(answer(x, t.expand(3)), int(t), x, eta=eta, variance_noise=noises[step]).prev_sample
    torch.testing.assert_close(ddim(answer, noises[steps], plan, noise_fn=lambda i: noises[i]), x, rtol=0, atol=1e-9)


@pytest.mark.parametrize("total", [1000, 37])
def test_plans_have_exactly_the_asked_number_of_steps(total: int) -> None:
    config = DiffusionConfig(schedule="cosine", prediction_type="v_prediction", num_train_timesteps=total)
    for steps in (n for n in (1, 2, 3, 7, 30, 36, 37, 62, 250, 300, 333, 999, 1000) if n <= total):
        for spacing in SPACINGS:
            plan = make_plan(config, steps, spacing=spacing)
            assert plan.num_inference_steps == steps == len(plan.sigmas)
            assert all(a > b for a, b in zip(plan.timesteps, plan.timesteps_prev, strict=True))
            assert plan.timesteps[-1] >= 0 and plan.timesteps[0] <= total - 1
            assert plan.timesteps_prev == (*plan.timesteps[1:], -1)
            assert plan.alphas_cumprod_prev == (*plan.alphas_cumprod[1:], 1.0)
        assert make_plan(config, steps, spacing="trailing").timesteps[0] == total - 1
        assert make_plan(config, steps, spacing="linspace").timesteps[0] == total - 1
        assert make_plan(config, steps, spacing="leading").timesteps[-1] == 0


def test_known_spacings() -> None:
    config = DiffusionConfig()
    assert make_plan(config, 4, spacing="trailing").timesteps == (999, 749, 499, 249)
    assert make_plan(config, 4, spacing="leading").timesteps == (750, 500, 250, 0)
    assert make_plan(config, 4, spacing="linspace").timesteps == (999, 666, 333, 0)
    # where S does not divide T: rounded to the nearest, and still exactly S
    assert make_plan(config, 3, spacing="trailing").timesteps == (999, 666, 332)
    assert make_plan(config, 3, spacing="leading").timesteps == (666, 333, 0)
    assert make_plan(config, 4) == make_plan(config, 4, spacing="trailing")


def test_epsilon_on_the_cosine_schedule_does_not_start_where_nothing_is_left() -> None:
    config = DiffusionConfig(schedule="cosine", prediction_type="epsilon")
    assert make_plan(config, 50) == make_plan(config, 50, spacing="leading")
    with pytest.raises(RequestError, match=r"spacing=trailing: starts at t=999, .*; use leading"):
        make_plan(config, 50, spacing="trailing")
    with pytest.raises(RequestError, match="at most 500"):
        make_plan(config, 1000)
    make_plan(config, 500)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_inference_steps": 1001}, "num_inference_steps=1001: must be 1 to 1000"),
        ({"num_inference_steps": 0}, "num_inference_steps=0: must be 1 to 1000"),
        ({"num_inference_steps": 10, "eta": 1.5}, "eta=1.5: must be from 0"),
        ({"num_inference_steps": 10, "eta": math.nan}, "eta=nan: must be from 0"),
        ({"num_inference_steps": 10, "spacing": "quad"}, "spacing=quad: unknown; use trailing"),
    ],
)
def test_impossible_plans_are_refused(arguments: dict, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        make_plan(DiffusionConfig(), **arguments)


def test_fresh_noise_is_needed_only_for_eta_above_zero() -> None:
    noise = torch.zeros(1, 1, 2, 2)
    ddim(lambda x, t: x, noise, make_plan(DiffusionConfig(), 3))
    with pytest.raises(ValueError, match="noise_fn"):
        ddim(lambda x, t: x, noise, make_plan(DiffusionConfig(), 3, eta=0.5))


def test_progress_counts_the_steps_and_the_denoiser_sees_the_timesteps() -> None:
    seen: list[int] = []
    timesteps: list[list[int]] = []

    def answer(x: Tensor, t: Tensor) -> Tensor:
        timesteps.append(t.tolist())
        return x

    ddim(answer, torch.zeros(2, 1, 2, 2), make_plan(DiffusionConfig(), 4), progress=seen.append)
    assert seen == [1, 2, 3, 4]
    assert timesteps == [[999, 999], [749, 749], [499, 499], [249, 249]]


def test_guidance_is_one_call_of_conditional_and_null_rows() -> None:
    calls: list[list[int]] = []

    def denoiser(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        assert labels is not None
        calls.append(labels.tolist())
        return labels.reshape(-1, 1, 1, 1) * torch.ones_like(x)

    x, t, labels = torch.zeros(2, 1, 2, 2), torch.zeros(2, dtype=torch.long), torch.tensor([1, 2])
    values = guided(denoiser, labels, 3.0, null_label=10)(x, t)[:, 0, 0, 0]
    assert calls == [[1, 2, 10, 10]]
    assert values.tolist() == [10 + 3 * (1 - 10), 10 + 3 * (2 - 10)]
    assert guided(denoiser, labels, 0.0, null_label=10)(x, t)[:, 0, 0, 0].tolist() == [10, 10]
    assert guided(denoiser, labels, 1.0, null_label=10)(x, t)[:, 0, 0, 0].tolist() == [1, 2]
    assert calls[-1] == [1, 2]


def test_an_unconditional_denoiser_cannot_be_guided() -> None:
    def denoiser(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        assert labels is None
        return x

    x, t = torch.ones(1, 1, 2, 2), torch.zeros(1, dtype=torch.long)
    assert torch.equal(guided(denoiser, None, 1.0, None)(x, t), x)
    with pytest.raises(RequestError, match=r"guidance_scale=2.0: the model is unconditional; must be 1"):
        guided(denoiser, None, 2.0, None)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_seed_gives_the_same_bits_in_any_row_of_one_batch_shape(guidance_scale: float, eta: float) -> None:
    config = DenoiserConfig(hidden_size=64, depth=2, num_heads=4)
    denoiser = build_denoiser(config, in_channels=4, sample_size=(8, 8), num_classes=10)
    generator = torch.Generator().manual_seed(0)
    for parameter in denoiser.parameters():  # a fresh DiT answers 0, which would prove nothing
        parameter.data.normal_(std=0.1, generator=generator)
    plan = make_plan(DiffusionConfig(), 5, eta=eta)

    def sample(seeds: list[int], labels: list[int]) -> Tensor:
        seed_tensor = torch.tensor(seeds)
        denoiser_fn = guided(denoiser, torch.tensor(labels), guidance_scale, null_label=10)
        noise = initial_noise(seed_tensor, (4, 8, 8))
        return ddim(denoiser_fn, noise, plan, noise_fn=step_noise(seed_tensor, (4, 8, 8)))

    first = sample([7, 1, 2, 3, 4], [3, 0, 1, 2, 9])
    for row in range(5):
        seeds, labels = [100 + row] * 5, [row] * 5
        seeds[row], labels[row] = 7, 3
        assert torch.equal(sample(seeds, labels)[row], first[0])
    assert not torch.equal(first[0], first[1])


def test_noise_depends_on_seed_and_step_alone() -> None:
    seeds, shape = torch.tensor([5, 2**40 + 5, 6]), (1, 2, 2)
    noise, fresh = initial_noise(seeds, shape), step_noise(seeds, shape)
    draws = torch.stack([noise, fresh(0), fresh(1)]).flatten(2).flatten(0, 1)
    assert len({tuple(row.tolist()) for row in draws}) == 9
    assert torch.equal(initial_noise(seeds.flip(0), shape).flip(0), noise)
    assert torch.equal(step_noise(seeds[:1], shape)(1), fresh(1)[:1])


def test_sampling_inverts_the_forward_process_for_a_perfect_denoiser() -> None:
    """A denoiser that knows the one picture there is leads to it from any noise, in any number of steps."""
    picture = torch.randn(1, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    diffusion = Diffusion(DiffusionConfig(prediction_type="v_prediction"))

    def answer(x: Tensor, t: Tensor) -> Tensor:
        alpha = diffusion.alphas_cumprod[t].reshape(-1, 1, 1, 1)
        epsilon = (x - alpha.sqrt() * picture) / (1 - alpha).sqrt()
        return alpha.sqrt() * epsilon - (1 - alpha).sqrt() * picture

    for steps in (1, 3, 50):
        x0 = ddim(answer, torch.ones(1, 2, 4, 4, dtype=torch.float64), make_plan(diffusion.config, steps))
        torch.testing.assert_close(x0, picture, rtol=0, atol=1e-9)

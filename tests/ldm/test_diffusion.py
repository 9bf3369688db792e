"""The schedules against diffusers and the papers' numbers, and the algebra of the two predictions."""

import math

import pytest
import torch
from diffusers import DDIMScheduler

from ldm.config import RequestError, validate
from ldm.diffusion import Diffusion, DiffusionConfig, alphas_cumprod, to_x0_and_epsilon

SCHEDULES = ("linear", "scaled_linear", "cosine")
DIFFUSERS_NAMES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
BETAS = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012), "cosine": (1e-4, 0.02)}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedule_equals_diffusers(schedule: str) -> None:
    start, end = BETAS[schedule]
    theirs = DDIMScheduler(beta_start=start, beta_end=end, beta_schedule=DIFFUSERS_NAMES[schedule])
    ours = alphas_cumprod(DiffusionConfig(schedule=schedule))
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours.float(), theirs.alphas_cumprod, rtol=2e-5, atol=2e-7)


def test_schedule_values_of_the_papers() -> None:
    # sqrt(alphas_cumprod) at T: 0.068265 for LDM (Lin et al. 2023, table 1), and for DDPM about 4e-5 squared
    assert alphas_cumprod(DiffusionConfig(schedule="scaled_linear"))[-1].sqrt().item() == pytest.approx(
        0.068265, abs=5e-7
    )
    assert alphas_cumprod(DiffusionConfig(schedule="linear"))[-1].item() == pytest.approx(4.036e-5, rel=1e-3)
    cosine = alphas_cumprod(DiffusionConfig(schedule="cosine"))
    for t in (
        0,
        499,
        990,
    ):  # the product of the betas telescopes back to f(t) / f(0), wherever nothing is clipped
        f = [math.cos((u / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for u in (t + 1, 0)]
        assert cosine[t].item() == pytest.approx(f[0] / f[1], rel=1e-9)
    assert 1 - cosine[-1].item() / cosine[-2].item() == pytest.approx(0.999)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_target_converts_back_to_x0_and_epsilon(schedule: str, prediction_type: str) -> None:
    diffusion = Diffusion(DiffusionConfig(schedule=schedule, prediction_type=prediction_type))
    x0, noise = torch.randn(2, 6, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 1, 300, 600, 950, 998])
    x_t = diffusion.add_noise(x0, noise, t)
    target = diffusion.target(x0, noise, t)
    found_x0, found_noise = diffusion.to_x0_and_epsilon(target, x_t, t)
    torch.testing.assert_close(found_x0, x0, rtol=0, atol=1e-9)
    torch.testing.assert_close(found_noise, noise, rtol=0, atol=1e-9)
    # one noise level for all rows is the same conversion
    alpha = diffusion.alphas_cumprod[t[2]]
    single = to_x0_and_epsilon(target[2:3], x_t[2:3], alpha, diffusion.config.prediction_type)
    torch.testing.assert_close(single[0], found_x0[2:3], rtol=0, atol=0)


def test_noised_data_keeps_unit_variance_at_every_t() -> None:
    diffusion = Diffusion(DiffusionConfig())
    t = torch.arange(1000)
    ones, zeros = (
        torch.ones(1000, 1, 1, 1, dtype=torch.float64),
        torch.zeros(1000, 1, 1, 1, dtype=torch.float64),
    )
    signal, sigma = diffusion.add_noise(ones, zeros, t), diffusion.add_noise(zeros, ones, t)
    torch.testing.assert_close(signal**2 + sigma**2, ones, rtol=0, atol=1e-14)
    torch.testing.assert_close(signal.flatten() ** 2, diffusion.alphas_cumprod, rtol=0, atol=1e-14)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_loss_is_the_mean_squared_error_of_each_sample(prediction_type: str) -> None:
    diffusion = Diffusion(DiffusionConfig(prediction_type=prediction_type))
    x0, noise = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    t, labels = torch.tensor([5, 500, 999]), torch.tensor([0, 1, 2])
    target = diffusion.target(x0, noise, t)
    offsets = torch.tensor([0.0, 0.5, 2.0])

    def denoiser(x: torch.Tensor, t_given: torch.Tensor, labels_given: torch.Tensor | None) -> torch.Tensor:
        assert torch.equal(x, diffusion.add_noise(x0, noise, t))
        assert t_given is t and labels_given is labels
        return target + offsets[:, None, None, None]

    loss = diffusion.loss(denoiser, x0, noise, t, labels)
    torch.testing.assert_close(loss, offsets**2)
    # a denoiser that answers in bf16 (autocast) is compared in fp32
    half = diffusion.loss(lambda *_: torch.zeros(3, 2, 4, 4, dtype=torch.bfloat16), x0, noise, t, labels)
    torch.testing.assert_close(half, target.square().mean(dim=(1, 2, 3)), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"schedule": "cosin"}, ["schedule=cosin", "'cosine'"]),
        ({"schedule": "cosine", "beta_end": 0.1}, ["beta_end=0.1", "schedule=cosine"]),
        ({"schedule": "cosine", "beta_start": 0.1}, ["beta_start=0.1", "schedule=cosine"]),
        ({"beta_start": 0.02, "beta_end": 0.01}, ["beta_end=0.01", "above beta_start"]),
        ({"beta_start": 0.03}, ["0.02 is not above 0.03"]),
        ({"num_train_timesteps": 100}, ["num_train_timesteps=100", "0.36", "schedule=cosine"]),
        ({"num_train_timesteps": 1}, ["num_train_timesteps=1"]),
        ({"prediction_type": "sample"}, ["prediction_type=sample", "'epsilon' or 'v_prediction'"]),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(values: dict[str, object], words: list[str]) -> None:
    with pytest.raises(RequestError) as refused:
        validate(DiffusionConfig, values)
    assert "\n" not in str(refused.value)
    for word in words:
        assert word in str(refused.value)


def test_cosine_reaches_noise_for_any_number_of_timesteps() -> None:
    for steps in (2, 10, 100, 4000):
        assert alphas_cumprod(DiffusionConfig(schedule="cosine", num_train_timesteps=steps))[-1] < 1e-3

"""The schedules against diffusers and the papers' numbers, and the algebra of the two predictions."""

import math

import pytest
import torch
from diffusers import DDIMScheduler

from ldm.config import RequestError, validate
from ldm.diffusion import Diffusion, DiffusionConfig, alphas_cumprod, shifted

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
def test_zero_terminal_snr_equals_diffusers_and_is_exactly_zero(schedule: str) -> None:
    start, end = BETAS[schedule]
    theirs = DDIMScheduler(
        beta_start=start, beta_end=end, beta_schedule=DIFFUSERS_NAMES[schedule], rescale_betas_zero_snr=True
    )
    config = DiffusionConfig(schedule=schedule, zero_terminal_snr=True, prediction_type="v_prediction")
    ours = alphas_cumprod(config)
    torch.testing.assert_close(ours.float(), theirs.alphas_cumprod, rtol=1e-4, atol=2e-6)
    assert ours[-1] == 0 and (ours.diff() < 0).all()
    plain = alphas_cumprod(DiffusionConfig(schedule=schedule))
    assert ours[0].item() == pytest.approx(plain[0].item(), rel=1e-12)
    # algorithm 1 of arXiv 2305.08891: an affine map of sqrt(alphas_cumprod)
    mapped = (plain.sqrt() - plain[-1].sqrt()) * plain[0].sqrt() / (plain[0].sqrt() - plain[-1].sqrt())
    torch.testing.assert_close(ours.sqrt(), mapped, rtol=0, atol=1e-12)


def predictions(schedule: str) -> list[str]:
    return ["velocity"] if schedule == "flow" else ["epsilon", "v_prediction", "sample"]


EACH_PREDICTION = [(schedule, name) for schedule in (*SCHEDULES, "flow") for name in predictions(schedule)]


@pytest.mark.parametrize(("schedule", "prediction_type"), EACH_PREDICTION)
def test_target_converts_back_to_x0_and_epsilon(schedule: str, prediction_type: str) -> None:
    diffusion = Diffusion(DiffusionConfig(schedule=schedule, prediction_type=prediction_type))
    x0, noise = torch.randn(2, 6, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 1, 300, 600, 950, 998])
    x_t = diffusion.add_noise(x0, noise, t)
    target = diffusion.target(x0, noise, t)
    found_x0, found_noise = diffusion.to_x0_and_epsilon(target, x_t, t)
    torch.testing.assert_close(found_x0, x0, rtol=0, atol=1e-9)
    torch.testing.assert_close(found_noise, noise, rtol=0, atol=1e-9)


def test_a_flow_is_the_straight_line() -> None:
    diffusion = Diffusion(DiffusionConfig(schedule="flow"))
    x0, noise = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.0, 250.0, 1000.0])
    x_t = diffusion.add_noise(x0, noise, t)
    assert torch.equal(x_t[0], x0[0]) and torch.equal(x_t[2], noise[2])
    torch.testing.assert_close(x_t[1], 0.75 * x0[1] + 0.25 * noise[1], rtol=0, atol=1e-15)
    assert torch.equal(diffusion.target(x0, noise, t), noise - x0)  # which is dx_t / d(t/T)


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
        ({"prediction_type": "x0"}, ["prediction_type=x0", "'epsilon'", "'sample'"]),
        ({"zero_terminal_snr": True}, ["prediction_type", "v_prediction or sample"]),
        ({"zero_terminal_snr": True, "schedule": "flow"}, ["zero_terminal_snr=true", "leave it out"]),
        ({"prediction_type": "velocity"}, ["prediction_type=velocity", "schedule=linear"]),
        ({"schedule": "flow", "prediction_type": "epsilon"}, ["prediction_type=epsilon", "use velocity"]),
        ({"schedule": "flow", "beta_end": 0.1}, ["beta_end=0.1", "flow has no betas"]),
        ({"shift": 3.0}, ["shift=3.0", "schedule=flow"]),
        ({"timestep_sampling": "logit_normal"}, ["timestep_sampling=logit_normal", "schedule=flow"]),
        ({"min_snr_gamma": 0}, ["min_snr_gamma=0"]),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(values: dict[str, object], words: list[str]) -> None:
    with pytest.raises(RequestError) as refused:
        validate(DiffusionConfig, values)
    assert "\n" not in str(refused.value)
    for word in words:
        assert word in str(refused.value)


def test_a_config_of_before_is_read_with_what_it_meant() -> None:
    old = {"schedule": "cosine", "num_train_timesteps": 1000, "beta_start": None, "beta_end": None}
    config = validate(DiffusionConfig, {**old, "prediction_type": "v_prediction"})
    assert config == DiffusionConfig(schedule="cosine", prediction_type="v_prediction")
    assert validate(DiffusionConfig, config.model_dump(mode="json")) == config
    assert DiffusionConfig(schedule="flow").prediction_type == "velocity"


@pytest.mark.parametrize(("schedule", "prediction_type"), EACH_PREDICTION)
def test_min_snr_weighs_the_error_of_x0_alike_for_every_prediction(schedule: str, prediction_type: str) -> None:
    """Equation of section 3.4 there: min(SNR, gamma) times the error of x0, whatever is predicted."""
    values = {"schedule": schedule, "prediction_type": prediction_type}
    diffusion = Diffusion(DiffusionConfig(loss_weighting="min_snr", min_snr_gamma=5.0, **values))
    x0, noise, error = torch.randn(3, 5, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([1, 100, 400, 700, 990])
    x_t, target = diffusion.add_noise(x0, noise, t), diffusion.target(x0, noise, t)
    found_x0, _ = diffusion.to_x0_and_epsilon(target + error, x_t, t)
    signal, sigma = diffusion.levels(t, x0)
    capped = (signal / sigma).square().clamp(max=5.0).flatten()
    expected = capped * (found_x0 - x0).square().mean(dim=(1, 2, 3))
    loss = diffusion.loss(lambda *_: target + error, x0, noise, t, None)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    plain = Diffusion(DiffusionConfig(**values)).loss(lambda *_: target + error, x0, noise, t, None)
    torch.testing.assert_close(plain, error.square().mean(dim=(1, 2, 3)), rtol=1e-9, atol=0)


def test_min_snr_is_finite_at_both_ends() -> None:
    zero = Diffusion(DiffusionConfig(zero_terminal_snr=True, prediction_type="v_prediction"))
    assert zero.loss_weights(torch.tensor([0, 999])).tolist() == pytest.approx([5e-4, 0], rel=1e-3)
    flow = Diffusion(DiffusionConfig(schedule="flow"))
    assert flow.loss_weights(torch.tensor([0.0, 1000.0])).tolist() == [0, 0]


def test_timesteps_of_training() -> None:
    """A function of seed, counter and id; uniform, or as Esser et al. have it, with the shift of SD3."""
    ids = torch.arange(20_000)
    discrete = Diffusion(DiffusionConfig()).draw_timesteps(1, ids, 0)
    assert discrete.dtype == torch.int64 and (discrete.min(), discrete.max()) == (0, 999)
    for values, distribution in (
        ({}, lambda u: u),
        ({"shift": 3.0}, lambda u: u / (3 - 2 * u)),  # share below u, by the inverse of the shift
        (
            {"timestep_sampling": "logit_normal", "logit_mean": 0.5, "logit_std": 0.8},
            lambda u: 0.5 * (1 + math.erf((math.log(u / (1 - u)) - 0.5) / 0.8 / math.sqrt(2))),
        ),
    ):
        diffusion = Diffusion(DiffusionConfig(schedule="flow", **values))
        t = diffusion.draw_timesteps(1, ids, 0)
        assert t.dtype == torch.float32 and t.min() >= 0 and t.max() <= 1000
        for u in (0.1, 0.3, 0.5, 0.8):
            assert (t < 1000 * u).double().mean().item() == pytest.approx(distribution(u), abs=0.015)
        picked = torch.tensor([3, 19_999, 500])
        assert torch.equal(diffusion.draw_timesteps(1, picked, 0), t[picked])
        assert not torch.equal(diffusion.draw_timesteps(1, ids, 1), t)
    assert (shifted(0.0, 3.0), shifted(1.0, 3.0), shifted(0.5, 3.0)) == (0, 1, 0.75)


def test_cosine_reaches_noise_for_any_number_of_timesteps() -> None:
    for steps in (2, 10, 100, 4000):
        assert alphas_cumprod(DiffusionConfig(schedule="cosine", num_train_timesteps=steps))[-1] < 1e-3

"""Inversion, interpolation, noised pictures and inpainting, against what they promise."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ldm.diffusion import Diffusion, DiffusionConfig
from ldm.editing import invert, keep_known, noised, paste, slerp, soften, to_latent_mask
from ldm.plan import SamplerConfig, make_plan
from ldm.sampler import DenoiserFn, sample_latents

PROCESSES = [
    DiffusionConfig(),
    DiffusionConfig(schedule="scaled_linear", prediction_type="v_prediction"),
    DiffusionConfig(prediction_type="sample", zero_terminal_snr=True),
    DiffusionConfig(schedule="flow"),
]


def mixture_denoiser(config: DiffusionConfig) -> DenoiserFn:
    """The best denoiser for values that are N(-1, 0.4^2) or N(0.8, 0.4^2) with equal odds."""
    diffusion, centres = Diffusion(config), torch.tensor([-1.0, 0.8], dtype=torch.float64)

    def denoiser_fn(x: Tensor, t: Tensor) -> Tensor:
        signal, noise = diffusion.levels(t, x)
        variance = (signal**2 * 0.16 + noise**2)[..., None]
        offsets = x[..., None] - signal[..., None] * centres
        parts = torch.softmax(-(offsets**2) / (2 * variance), dim=-1)
        x0 = (parts * (centres + signal[..., None] * 0.16 / variance * offsets)).sum(dim=-1)
        return diffusion.target(x0, (x - signal * x0) / noise, t)

    return denoiser_fn


def pictures() -> Tensor:
    return torch.linspace(-1.8, 1.6, 48, dtype=torch.float64).reshape(3, 1, 4, 4)


@pytest.mark.parametrize("config", PROCESSES)
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_the_error_of_inversion_falls_with_the_steps(config: DiffusionConfig, spacing: str) -> None:
    """As table 2 of the DDIM paper: at each S of it the mean squared error is lower than at the one before."""
    denoiser_fn, errors = mixture_denoiser(config), []
    chosen = None if config.is_flow else spacing
    for steps in (10, 20, 50, 100, 200) + (500, 1000) * (config.schedule == "flow"):
        plan = make_plan(config, SamplerConfig(num_inference_steps=steps, spacing=chosen))
        found = sample_latents(denoiser_fn, invert(denoiser_fn, pictures(), plan), plan)
        errors.append((found - pictures()).square().mean().item())
    assert all(later < earlier for earlier, later in pairwise(errors)), errors
    assert errors[-1] < 0.05 * errors[0]


def test_inverted_pictures_are_noise() -> None:
    """Of data as the model knows it: deviation 1, for the ODE carries the data's distribution to the noise's."""
    config = DiffusionConfig(prediction_type="v_prediction", zero_terminal_snr=True)
    generator = torch.Generator().manual_seed(0)
    centres = torch.randint(0, 2, (64, 1, 8, 8), generator=generator).double() * 1.8 - 1
    data = centres + 0.4 * torch.randn(64, 1, 8, 8, dtype=torch.float64, generator=generator)
    noise = invert(mixture_denoiser(config), data, make_plan(config, SamplerConfig(num_inference_steps=150)))
    assert abs(noise.mean().item()) < 0.05 and noise.std().item() == pytest.approx(1, abs=0.04)


def test_a_plan_of_heun_is_inverted_without_its_second_calls() -> None:
    config = DiffusionConfig(schedule="flow")
    denoiser_fn = mixture_denoiser(config)
    plans = [make_plan(config, SamplerConfig(num_inference_steps=9, sampler=name)) for name in ("euler", "heun")]
    assert torch.equal(*(invert(denoiser_fn, pictures(), plan) for plan in plans))


def test_noise_that_was_added_cannot_be_inverted() -> None:
    with pytest.raises(AssertionError, match="cannot be inverted"):
        invert(lambda x, t: x, pictures(), make_plan(DiffusionConfig(), SamplerConfig(eta=1.0)))


def test_slerp_goes_from_one_to_the_other_on_an_arc() -> None:
    one, other = torch.randn(2, 5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    ends = slerp(one, other, torch.tensor([0.0, 0.0, 1.0, 1.0, 0.5]))
    assert torch.equal(ends[:2], one[:2]) and torch.equal(ends[2:4], other[2:4])
    # halfway between vectors of about one length their length is kept, which a straight mean would shorten
    lengths = [x.norm().item() for x in (ends[4], one[4], other[4])]
    assert lengths[0] == pytest.approx((lengths[1] + lengths[2]) / 2, rel=0.05)
    mean = (one[4] + other[4]) / 2
    torch.testing.assert_close(ends[4] / ends[4].norm(), mean / mean.norm(), rtol=0, atol=0.02)
    # at right angles: sine and cosine
    axes = torch.tensor([[1.0, 0, 0, 0], [0, 2.0, 0, 0]]).reshape(2, 1, 1, 2, 2)
    quarter = slerp(axes[0], axes[1], torch.tensor([1 / 3])).flatten()
    torch.testing.assert_close(quarter, torch.tensor([3**0.5 / 2, 1.0, 0, 0]))
    same = slerp(one, one, torch.full((5,), 0.3))
    torch.testing.assert_close(same, one)


@pytest.mark.parametrize("config", PROCESSES)
def test_a_picture_is_noised_to_where_the_plan_begins(config: DiffusionConfig) -> None:
    noise = torch.randn(pictures().shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plan = make_plan(config, SamplerConfig(num_inference_steps=10), strength=0.4)
    t = torch.full((3,), plan.timesteps[0])
    torch.testing.assert_close(
        noised(pictures(), noise, plan), Diffusion(config).add_noise(pictures(), noise, t), rtol=0, atol=1e-12
    )
    if config.schedule != "linear" or config.zero_terminal_snr:
        whole = make_plan(config, SamplerConfig(num_inference_steps=10))
        torch.testing.assert_close(noised(pictures(), noise, whole), noise, rtol=0, atol=0.12)


@pytest.mark.parametrize("config", PROCESSES)
@pytest.mark.parametrize("sampler", [None, "second order"])
def test_inpainting_keeps_what_is_known_exactly(config: DiffusionConfig, sampler: str | None) -> None:
    name = sampler and ("heun" if config.is_flow else "dpmpp_2m")
    plan = make_plan(config, SamplerConfig(num_inference_steps=12, sampler=name))
    noise = torch.randn(pictures().shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    mask[..., 2:] = 1
    seen: list[Tensor] = []

    def denoiser_fn(x: Tensor, t: Tensor) -> Tensor:
        seen.append(Diffusion(config).add_noise(pictures(), noise, t) - x)
        return mixture_denoiser(config)(x, t)

    keep = keep_known(pictures(), noise, mask)
    found = sample_latents(denoiser_fn, noised(pictures(), noise, plan), plan, after_step=keep)
    assert torch.equal(found[..., :2], pictures()[..., :2])
    assert not torch.equal(found[..., 2:], pictures()[..., 2:]) and found.isfinite().all()
    # at each step the denoiser saw the known part at that step's own noise level
    assert max(difference[..., :2].abs().max().item() for difference in seen) < 1e-12


def test_a_cell_is_new_where_any_of_its_pixels_is() -> None:
    mask = torch.zeros(1, 1, 4, 6)
    mask[0, 0, 0, 1], mask[0, 0, 3, 4] = 1, 0.25
    assert to_latent_mask(mask, 2).tolist() == [[[[1, 0, 0], [0, 0, 0.25]]]]
    assert torch.equal(to_latent_mask(mask, 1), mask)


def test_a_soft_edge_lies_inside_the_mask() -> None:
    mask = torch.zeros(1, 1, 12, 12)
    mask[..., 5:] = 1
    soft = soften(mask, 2)
    assert (soft[..., :5] == 0).all() and (soft[..., 7:] == 1).all()
    torch.testing.assert_close(soft[0, 0, 6, 4:8], torch.tensor([0, 0.2, 0.6, 1.0]))
    assert torch.equal(soften(mask, 0), mask)
    corner = torch.ones(1, 1, 12, 12)
    corner[..., 5, 5] = 0  # one known pixel amid new ones stays known
    assert soften(corner, 2)[0, 0, 5, 5] == 0


def test_known_pixels_come_through_to_the_last_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn, original = torch.randint(0, 256, (2, 3, 3, 4, 4), dtype=torch.uint8, generator=generator)
    mask = torch.tensor([0.0, 0.0, 0.5, 1.0]).expand(1, 1, 4, 4)
    found = paste(drawn, original, mask)
    assert found.dtype == torch.uint8
    assert torch.equal(found[..., :2], original[..., :2]) and torch.equal(found[..., 3], drawn[..., 3])
    mean = (drawn[..., 2].float() + original[..., 2].float()) / 2
    assert (found[..., 2].float() - mean).abs().max() <= 0.5

"""Sampling step by step: seeds, fresh noise, thresholding, rows of different plans in one batch."""

import pytest
import torch
from torch import Tensor

from ldm.denoiser import DenoiserConfig, build_denoiser
from ldm.diffusion import DiffusionConfig
from ldm.sampler import guided, initial_noise, sample_latents, step, step_noise, timesteps
from tests.ldm.oracles import FLOW, plan_of


def test_fresh_noise_is_needed_only_for_eta_above_zero() -> None:
    noise = torch.zeros(1, 1, 2, 2)
    sample_latents(lambda x, t: x, noise, plan_of(DiffusionConfig(), 3))
    with pytest.raises(ValueError, match="noise_fn"):
        sample_latents(lambda x, t: x, noise, plan_of(DiffusionConfig(), 3, eta=0.5))


def test_progress_counts_the_steps_and_the_denoiser_sees_the_timesteps() -> None:
    seen: list[int] = []
    told: list[Tensor] = []

    def answer(x: Tensor, t: Tensor) -> Tensor:
        told.append(t)
        return x

    sample_latents(answer, torch.zeros(2, 1, 2, 2), plan_of(DiffusionConfig(), 4), progress=seen.append)
    assert seen == [1, 2, 3, 4]
    assert [t.tolist() for t in told] == [[999, 999], [749, 749], [499, 499], [249, 249]]
    assert all(t.dtype == torch.int64 for t in told)
    told.clear()
    sample_latents(answer, torch.zeros(1, 1, 2, 2), plan_of(FLOW, 2, sampler="heun"))
    assert [t.tolist() for t in told] == [[1000], [500], [500]] and told[0].dtype == torch.float32


def test_static_thresholding_bounds_x0_and_keeps_x_t_whole() -> None:
    config = DiffusionConfig(prediction_type="sample")
    plan = plan_of(config, 5, clip_x0=0.5)
    x = torch.randn(3, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    row = plan.steps[2]
    moved, x0 = step(2 * x, x, row, "sample")
    assert torch.equal(x0, (2 * x).clamp(-0.5, 0.5)) and x0.abs().max() == 0.5
    epsilon = (x - row.signal * x0) / row.noise
    torch.testing.assert_close(moved, row.signal_prev * x0 + row.noise_prev * epsilon, rtol=0, atol=1e-12)


def noisy_denoiser() -> torch.nn.Module:
    denoiser = build_denoiser(
        DenoiserConfig(hidden_size=64, depth=2, num_heads=4), in_channels=4, sample_size=(8, 8), num_classes=10
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in denoiser.parameters():  # a fresh DiT answers 0, which would prove nothing
        parameter.data.normal_(std=0.1, generator=generator)
    return denoiser


SAMPLERS = [
    (DiffusionConfig(), {"eta": 0.0}),
    (DiffusionConfig(), {"eta": 1.0}),
    (DiffusionConfig(), {"sampler": "dpmpp_2m", "clip_x0": 2.0}),
    (FLOW, {"sampler": "heun"}),
]


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize(("config", "settings"), SAMPLERS)
def test_a_seed_gives_the_same_bits_in_any_row_of_one_batch_shape(guidance_scale, config, settings) -> None:
    denoiser, plan = noisy_denoiser(), plan_of(config, 5, **settings)

    def sample(seeds: list[int], labels: list[int]) -> Tensor:
        seed_tensor = torch.tensor(seeds)
        denoiser_fn = guided(denoiser, torch.tensor(labels), guidance_scale, null_label=10, rescale=0.5)
        noise = initial_noise(seed_tensor, (4, 8, 8))
        return sample_latents(denoiser_fn, noise, plan, noise_fn=step_noise(seed_tensor, (4, 8, 8)))

    first = sample([7, 1, 2, 3, 4], [3, 0, 1, 2, 9])
    for row in range(5):
        seeds, labels = [100 + row] * 5, [row] * 5
        seeds[row], labels[row] = 7, 3
        assert torch.equal(sample(seeds, labels)[row], first[0])
    assert not torch.equal(first[0], first[1])
    alone = sample([7], [3])[0]  # another batch shape: other kernels, other last bits
    assert (alone - first[0]).abs().max() <= 1e-4 * first[0].abs().max()


def test_rows_at_different_steps_of_different_plans_share_a_batch() -> None:
    """What a step-level server does: each row goes on by itself, and gets the bits that it gets alone."""
    config, shape = DiffusionConfig(), (4, 8, 8)
    plans = [
        plan_of(config, 6),
        plan_of(config, 4, eta=1.0, clip_x0=1.0),
        plan_of(config, 5, sampler="dpmpp_2m"),
        plan_of(config, 3, profile="diffusers", spacing="linspace", eta=0.5, clip_x0=0.5),
    ]
    noise, fresh = initial_noise(torch.arange(4), shape), step_noise(torch.arange(4), shape)

    def answer(x: Tensor, t: Tensor) -> Tensor:  # elementwise, so that only the sampler is compared
        return torch.tanh(x + t.reshape(-1, 1, 1, 1) / 1000)

    alone = [
        sample_latents(answer, noise[i : i + 1], plan, noise_fn=lambda k, i=i: fresh(k)[i : i + 1])
        for i, plan in enumerate(plans)
    ]
    x, x0 = noise, torch.zeros_like(noise)
    at, finished = [0, 0, -1, -2], {}  # the last two join one and two rounds later
    while len(finished) < 4:
        active = [i for i in range(4) if at[i] >= 0 and i not in finished]
        rows = [plans[i].steps[at[i]] for i in active]
        drawn = torch.stack([fresh(at[i])[i] for i in active])
        output = answer(x[active], timesteps(rows, x))
        moved, predicted = step(output, x[active], rows, "epsilon", x0_before=x0[active], noise=drawn)
        x[active], x0[active] = moved, predicted
        at = [k + 1 for k in at]
        finished |= {i: x[i].clone() for i in active if at[i] == len(plans[i].steps)}
    assert all(torch.equal(finished[i], alone[i][0]) for i in range(4))


def test_noise_depends_on_seed_and_step_alone() -> None:
    seeds, shape = torch.tensor([5, 2**40 + 5, 6]), (1, 2, 2)
    noise, fresh = initial_noise(seeds, shape), step_noise(seeds, shape)
    draws = torch.stack([noise, fresh(0), fresh(1)]).flatten(2).flatten(0, 1)
    assert len({tuple(row.tolist()) for row in draws}) == 9
    assert torch.equal(initial_noise(seeds.flip(0), shape).flip(0), noise)
    assert torch.equal(step_noise(seeds[:1], shape)(1), fresh(1)[:1])

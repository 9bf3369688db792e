"""Plans: diffusers bit for bit, the DDIM paper and CompVis LDM by independent loops, and what is refused."""

import itertools
import math
from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from ldm.config import RequestError, parse, validate
from ldm.diffusion import DiffusionConfig, alphas_cumprod
from ldm.plan import SamplerConfig, Spacing, make_plan, spaced_timesteps
from ldm.sampler import step, timesteps

STEPS = (1, 7, 10, 30, 50, 100, 250, 1000)
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SPACINGS = get_args(Spacing)
ETAS = (0.0, 0.5, 1.0, "sigma_hat")
CLIPS = (None, 1.0)
NOISES = torch.randn(1001, 2, 2, 2, generator=torch.Generator().manual_seed(0))
FLOW = DiffusionConfig(schedule="flow")


def answer(x: Tensor, t: Tensor) -> Tensor:
    """Any nonlinear denoiser will do."""
    return torch.tanh(x + t.reshape(-1, 1, 1, 1) / 1000)


def run(config: DiffusionConfig, rows: list[dict[str, object]], **common: object) -> Tensor:
    """One batch of which each row has a plan of its own: (rows, 2, 2, 2)."""
    plans = [make_plan(config, validate(SamplerConfig, {**common, **row})) for row in rows]
    x, x0 = NOISES[-1].expand(len(rows), 2, 2, 2), None
    for i, now in enumerate(zip(*(plan.steps for plan in plans), strict=True)):
        output = answer(x, timesteps(now, x))
        x, x0 = step(output, x, now, config.prediction_type, x0_before=x0, noise=NOISES[i].expand_as(x))
    return x


def their_ddim(config: DiffusionConfig, steps: int, spacing: str, row: dict[str, Any]) -> Tensor:
    """What diffusers' scheduler makes of it: (2, 2, 2)."""
    start, end = (0.00085, 0.012) if config.schedule == "scaled_linear" else (1e-4, 0.02)
    scheduler = DDIMScheduler(
        beta_start=start,
        beta_end=end,
        beta_schedule="squaredcos_cap_v2" if config.schedule == "cosine" else config.schedule,
        prediction_type=config.prediction_type,
        rescale_betas_zero_snr=config.zero_terminal_snr,
        timestep_spacing=spacing,
        clip_sample=row["clip_x0"] is not None,
        clip_sample_range=row["clip_x0"] or 1.0,
        steps_offset=row.get("steps_offset", 0),
        set_alpha_to_one=row.get("final_alpha_cumprod") != "first",
    )
    scheduler.set_timesteps(steps)
    x = NOISES[-1][None]
    for i, t in enumerate(scheduler.timesteps):
        output = answer(x, t[None])
        x = scheduler.step(output, int(t), x, eta=row["eta"], variance_noise=NOISES[i][None], return_dict=False)[0]
    return x[0]


def assert_diffusers(config: DiffusionConfig, steps: int, spacing: str, rows: list[dict[str, Any]]) -> None:
    found = run(config, rows, num_inference_steps=steps, spacing=spacing, profile="diffusers")
    for row, ours in zip(rows, found, strict=True):
        expected = their_ddim(config, steps, spacing, row)
        assert expected.isfinite().all() and torch.equal(ours, expected), row


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", STEPS)
def test_the_diffusers_profile_is_diffusers_bit_for_bit(steps: int, prediction: str, spacing: str) -> None:
    rows = [{"eta": eta, "clip_x0": clip} for eta in (0.0, 0.5, 1.0) for clip in CLIPS]
    assert_diffusers(DiffusionConfig(prediction_type=prediction), steps, spacing, rows)


@pytest.mark.parametrize("values", [{"schedule": "scaled_linear"}, {"schedule": "cosine"}, {"zero_terminal_snr": True}])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [1, 7, 30])
def test_the_diffusers_profile_on_other_schedules(values: dict, prediction: str, steps: int) -> None:
    if values.get("zero_terminal_snr") and prediction == "epsilon":
        prediction = "sample"  # epsilon is refused by the config
    config = DiffusionConfig(prediction_type=prediction, **values)
    rows = [{"eta": 0.0, "clip_x0": clip, "final_alpha_cumprod": end} for clip in CLIPS for end in ("one", "first")]
    for spacing in ("trailing", "linspace"):
        assert_diffusers(config, steps, spacing, rows)
    assert_diffusers(config, steps, "leading", [{**row, "steps_offset": 1} for row in rows if steps > 1])


@pytest.mark.parametrize("steps", [10, 20, 30, 40, 50])
def test_where_diffusers_gives_nan_on_some_processors_is_refused(steps: int) -> None:
    """At zero SNR with eta 1 the square of its direction is 0 and a rounding, below 0 on one processor and not on
    another: it is refused on all, whichever this is."""
    config = DiffusionConfig(prediction_type="v_prediction", zero_terminal_snr=True)
    settings = {"num_inference_steps": steps, "spacing": "trailing", "eta": 1.0}
    assert alphas_cumprod(config, torch.float32)[-1] == 0
    with pytest.raises(RequestError, match="^eta=1.0: .* profile=exact"):
        make_plan(config, SamplerConfig(**settings, profile="diffusers"))
    assert run(config, [settings]).isfinite().all()


def paper_ddim(
    levels: list[float],
    timesteps: list[int],
    *,
    eta: float | str = 0.0,
    prediction: str = "epsilon",
    clip_x0: float | None = None,
    final: float = 1.0,
) -> np.ndarray:
    """Equations 12 and 16 of arXiv 2010.02502 as they stand there, one after the other, in float64."""
    x = NOISES[-1].double().numpy()
    for i, t in enumerate(timesteps):
        a, prev = levels[t], levels[timesteps[i + 1]] if i + 1 < len(timesteps) else final
        output = np.tanh(x + t / 1000)
        if prediction == "epsilon":
            x0 = (x - math.sqrt(1 - a) * output) / math.sqrt(a)
        elif prediction == "v_prediction":
            x0 = math.sqrt(a) * x - math.sqrt(1 - a) * output
        else:
            x0 = output
        if clip_x0 is not None:
            x0 = x0.clip(-clip_x0, clip_x0)
        epsilon = (x - math.sqrt(a) * x0) / math.sqrt(1 - a)
        scale = 1.0 if eta == "sigma_hat" else float(eta)
        sigma = scale * math.sqrt((1 - prev) / (1 - a)) * math.sqrt(1 - a / prev)
        mean = math.sqrt(prev) * x0 + math.sqrt(max(0.0, 1 - prev - sigma**2)) * epsilon
        if eta == "sigma_hat":  # appendix D.3; the authors' code adds nothing in the last step
            sigma = math.sqrt(1 - a / prev) if i + 1 < len(timesteps) else 0.0
        x = mean + sigma * NOISES[i].numpy()
    return x


def assert_near(found: Tensor, expected: np.ndarray) -> None:
    """1e-5 max-abs in float32; relative where results are larger than 1, as those of a senseless denoiser are."""
    assert found.dtype == torch.float32
    assert np.abs(found.numpy() - expected).max() <= 1e-5 * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", STEPS)
def test_the_exact_profile_is_the_paper(spacing: Spacing, prediction: str, steps: int) -> None:
    config = DiffusionConfig(prediction_type=prediction)
    levels, chosen = alphas_cumprod(config).tolist(), spaced_timesteps(1000, steps, spacing)
    rows = [{"eta": eta, "clip_x0": clip} for eta in ETAS for clip in CLIPS]
    found = run(config, rows, num_inference_steps=steps, spacing=spacing)
    for row, ours in zip(rows, found, strict=True):
        assert_near(ours, paper_ddim(levels, chosen, prediction=prediction, **row))


@pytest.mark.parametrize("steps", [10, 20, 50, 100, 1000])
def test_the_settings_of_the_ddim_paper(steps: int) -> None:
    """CIFAR-10, table 1: linear betas, T = 1000, and the quadratic timesteps of the authors' code."""
    config = DiffusionConfig()
    chosen = [int(s) for s in np.linspace(0, np.sqrt(1000 * 0.8), steps) ** 2][::-1]
    levels = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)).tolist()
    found = run(config, [{"eta": eta} for eta in ETAS], num_inference_steps=steps, spacing="quadratic")
    for eta, ours in zip(ETAS, found, strict=True):
        assert_near(ours, paper_ddim(levels, chosen, eta=eta))


@pytest.mark.parametrize("steps", [10, 50, 250, 500])
def test_the_settings_of_compvis_ldm(steps: int) -> None:
    """Its timesteps are uniform + 1, and its last step ends at the first noise level."""
    config = DiffusionConfig(schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195)
    chosen = [t + 1 for t in range(0, 1000, 1000 // steps)][::-1]
    levels = np.cumprod(1 - np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2).tolist()
    settings = {"spacing": "leading", "steps_offset": 1, "final_alpha_cumprod": "first"}
    found = run(config, [{"eta": 0.0}, {"eta": 1.0}], num_inference_steps=steps, **settings)
    assert_near(found[0], paper_ddim(levels, chosen, final=levels[0]))
    assert_near(found[1], paper_ddim(levels, chosen, eta=1.0, final=levels[0]))


@pytest.mark.parametrize("total", [1000, 37])
def test_plans_have_exactly_the_asked_number_of_steps(total: int) -> None:
    config = DiffusionConfig(schedule="cosine", prediction_type="v_prediction", num_train_timesteps=total)
    for steps in (n for n in (1, 2, 3, 7, 30, 36, 37, 61, 62, 250, 300, 333, 999, 1000) if n <= total):
        for spacing in SPACINGS:
            plan = make_plan(config, SamplerConfig(num_inference_steps=steps, spacing=spacing))
            assert plan.num_inference_steps == steps == len(plan.steps)
            if spacing != "quadratic":
                assert all(a > b for a, b in itertools.pairwise(plan.timesteps))
            assert plan.timesteps[-1] >= 0 and plan.timesteps[0] <= total - 1
            assert plan.timesteps_prev == (*plan.timesteps[1:], -1)
            assert plan.alphas_cumprod_prev == (*plan.alphas_cumprod[1:], 1.0)
            assert not any(plan.sigmas)
        for spacing in ("trailing", "linspace"):
            assert spaced_timesteps(total, steps, spacing)[0] == total - 1
        assert spaced_timesteps(total, steps, "leading")[-1] == 0


def test_known_spacings() -> None:
    assert spaced_timesteps(1000, 4, "trailing") == [999, 749, 499, 249]
    assert spaced_timesteps(1000, 4, "leading") == [750, 500, 250, 0]
    assert spaced_timesteps(1000, 4, "linspace") == [999, 666, 333, 0]
    assert spaced_timesteps(1000, 4, "quadratic") == [800, 355, 88, 0]
    # where S does not divide T: rounded to the nearest, and still exactly S
    assert spaced_timesteps(1000, 3, "trailing") == [999, 666, 332]
    assert spaced_timesteps(1000, 3, "leading") == [666, 333, 0]
    one = SamplerConfig(num_inference_steps=4)
    assert make_plan(DiffusionConfig(), one) == make_plan(
        DiffusionConfig(), one.model_copy(update={"spacing": "trailing"})
    )


def test_a_part_of_a_plan_is_its_end() -> None:
    for config, sampler in ((DiffusionConfig(), "ddim"), (DiffusionConfig(), "dpmpp_2m"), (FLOW, "heun")):
        settings = SamplerConfig(num_inference_steps=10, sampler=sampler)
        whole, part = make_plan(config, settings), make_plan(config, settings, strength=0.31)
        assert part.num_inference_steps == 3
        assert part.timesteps == whole.timesteps[-len(part.steps) :]
        assert part.steps[0].history_weight == 0  # nothing came before
        assert make_plan(config, settings, strength=0.01).num_inference_steps == 1


def test_epsilon_on_the_cosine_schedule_does_not_start_where_nothing_is_left() -> None:
    config = DiffusionConfig(schedule="cosine", prediction_type="epsilon")
    settings = SamplerConfig(num_inference_steps=50)
    assert make_plan(config, settings) == make_plan(config, settings.model_copy(update={"spacing": "leading"}))
    with pytest.raises(RequestError, match=r"spacing=trailing: starts at t=999, .*; use leading"):
        make_plan(config, settings.model_copy(update={"spacing": "trailing"}))
    with pytest.raises(RequestError, match="at most 500"):
        make_plan(config, SamplerConfig(num_inference_steps=1000))
    make_plan(config, SamplerConfig(num_inference_steps=500))


def test_diffusers_own_extra_step_is_refused() -> None:
    """Its trailing timesteps are S + 1 for 62 values of S; the last, -1, is read as pure noise."""
    for steps in (61, 103, 499, 998):
        settings = SamplerConfig(num_inference_steps=steps, spacing="trailing", profile="diffusers")
        with pytest.raises(RequestError, match=f"^num_inference_steps={steps}: diffusers takes {steps + 1} steps here"):
            make_plan(DiffusionConfig(), settings)
        make_plan(DiffusionConfig(), settings.model_copy(update={"num_inference_steps": steps + 1}))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("num_inference_steps=0", ["num_inference_steps=0"]),
        ("eta=1.5", ["eta=1.5: must be from 0", "sigma_hat"]),
        ("eta=nan", ["eta=nan: must be from 0"]),
        ("spacing=quad", ["spacing=quad", "quadratic"]),
        ("sampler=dpmpp_2m eta=0.5", ["eta=0.5: sampler=dpmpp_2m is deterministic"]),
        ("sampler=ddpm eta=0.5", ["eta=0.5: sampler=ddpm has eta 1 by itself"]),
        ("profile=diffusers spacing=quadratic", ["profile=diffusers", "no spacing=quadratic"]),
        ("profile=diffusers sampler=dpmpp_2m", ["no sampler=dpmpp_2m"]),
        ("profile=diffusers eta=sigma_hat", ["no eta=sigma_hat"]),
        ("guidance_interval=[0.8,0.2]", ["guidance_interval", "rising"]),
        ("guidance_interval=0.8,0.2", ["guidance_interval", "rising"]),
        ("guidance_interval=[0.2,0.8]", ["guidance_interval=[0.2, 0.8]: at guidance_scale=1 nothing is guided"]),
        ("guidance_rescale=0.7", ["guidance_rescale=0.7: at guidance_scale=1 nothing is guided"]),
        ("guidance_rescale=2", ["guidance_rescale=2"]),
        ("clip_x0=0", ["clip_x0=0"]),
    ],
)
def test_settings_that_cannot_work_are_refused_by_the_config(overrides: str, words: list[str]) -> None:
    with pytest.raises(RequestError) as refused:
        parse(SamplerConfig, [], overrides.split())
    assert "\n" not in str(refused.value)
    assert all(word in str(refused.value) for word in words), refused.value


def test_an_interval_is_read_as_labels_are() -> None:
    for text in ("0.2,0.8", "[0.2,0.8]"):
        found = parse(SamplerConfig, [], ["guidance_scale=4", f"guidance_interval={text}"])
        assert found.guidance_interval == (0.2, 0.8)


def test_the_smallest_shift_has_a_plan() -> None:
    with pytest.raises(RequestError, match=r"^shift=1e-17: input should be greater than or equal to 0\.001"):
        parse(DiffusionConfig, [], ["schedule=flow", "shift=1e-17"])
    plan = make_plan(DiffusionConfig(schedule="flow", shift=1e-3), SamplerConfig(num_inference_steps=10))
    assert all(step.t > step.t_prev for step in plan.steps)


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (DiffusionConfig(), {"num_inference_steps": 1001}, "^num_inference_steps=1001: must be 1 to 1000"),
        (DiffusionConfig(), {"sampler": "heun"}, "^sampler=heun: is for a flow; .*use ddim"),
        (DiffusionConfig(), {"spacing": "leading", "steps_offset": 30}, "^steps_offset=30: .* past the last, 999"),
        (
            DiffusionConfig(),
            {"num_inference_steps": 1000, "steps_offset": 1, "profile": "diffusers"},
            "^steps_offset=1",
        ),
        (FLOW, {"num_inference_steps": 1001}, "^num_inference_steps=1001: must be 1 to 1000"),
        (FLOW, {"sampler": "ddim"}, "^sampler=ddim: .*this model is a flow: use euler or heun$"),
        (FLOW, {"sampler": "dpmpp_2m"}, "^sampler=dpmpp_2m: .*use euler or heun$"),
        (FLOW, {"eta": 0.5}, "^eta=0.5: .*leave it out$"),
        (FLOW, {"spacing": "leading"}, "^spacing=leading: .*leave it out$"),
        (FLOW, {"profile": "diffusers"}, "^profile=diffusers: .*leave it out$"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(config, settings, message) -> None:
    with pytest.raises(RequestError, match=message):
        make_plan(config, SamplerConfig(**settings))

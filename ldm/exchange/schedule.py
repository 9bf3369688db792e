"""The diffusion as a scheduler of diffusers, and back."""

from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field

from ldm.config import Config, RequestError, validate
from ldm.diffusion import CONVENTIONAL_BETAS, DiffusionConfig, alphas_cumprod
from ldm.plan import SamplerConfig, make_plan

SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
"""diffusers' name => ours."""
DIFFUSIONS = (
    *("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LMSDiscreteScheduler", "UniPCMultistepScheduler"),
    *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DEISMultistepScheduler"),
    *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"),
)
"""Schedulers of a diffusion with betas, which `SchedulerConfig` describes; others are of other processes."""
PREDICTIONS = ("epsilon", "v_prediction", "sample")


def to_scheduler(diffusion: DiffusionConfig) -> dict[str, Any]:
    """Arguments of diffusers' DDIMScheduler that take our steps wherever their number divides num_train_timesteps.

    Raises RequestError where no such scheduler can.
    """
    if diffusion.prediction_type not in PREDICTIONS:
        raise RequestError(
            f"to=diffusers: its DDIMScheduler cannot sample prediction_type={diffusion.prediction_type}, "
            f"only {', '.join(PREDICTIONS)}"
        )
    first_step = make_plan(diffusion, SamplerConfig(num_inference_steps=1)).timesteps[0]
    return {
        "num_train_timesteps": diffusion.num_train_timesteps,
        **_betas(diffusion),
        "prediction_type": diffusion.prediction_type,
        "timestep_spacing": "trailing" if first_step == diffusion.num_train_timesteps - 1 else "leading",
        "clip_sample": False,
        "set_alpha_to_one": True,
    }


class SchedulerConfig(Config):
    """What of a diffusers scheduler says how the model was trained; what says how to sample is ours to choose."""

    model_config = ConfigDict(extra="ignore")

    num_train_timesteps: int = Field(1000, description="T")
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = Field("linear", description="betas")
    beta_start: float = Field(0.0001, description="first beta")
    beta_end: float = Field(0.02, description="last beta")
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = Field(
        "epsilon", description="what the denoiser predicts"
    )
    rescale_betas_zero_snr: bool = Field(False, description="whether T-1 is pure noise")


def from_scheduler(values: dict[str, Any]) -> DiffusionConfig:
    """scheduler_config.json => our diffusion. Raises RequestError where ours has no such schedule."""
    if (name := values.get("_class_name", DIFFUSIONS[0])) not in DIFFUSIONS:
        raise RequestError(f"_class_name={name}: is no diffusion with betas that is read; {', '.join(DIFFUSIONS)} are")
    if values.get("use_flow_sigmas"):
        raise RequestError("use_flow_sigmas=true: is of a flow; only diffusions with betas are read")
    if values.get("trained_betas") is not None:
        raise RequestError(f"trained_betas: gives betas one by one; only {', '.join(SCHEDULES)} are read")
    found = validate(SchedulerConfig, values)
    ours = found.model_dump(include={"num_train_timesteps", "prediction_type"})
    ours["zero_terminal_snr"] = found.rescale_betas_zero_snr
    if (schedule := SCHEDULES[found.beta_schedule]) in CONVENTIONAL_BETAS:
        ours |= found.model_dump(include={"beta_start", "beta_end"})
    return validate(DiffusionConfig, {"schedule": schedule, **ours})


def _betas(diffusion: DiffusionConfig) -> dict[str, Any]:
    """By name where diffusers has the schedule, else one by one."""
    from diffusers import DDIMScheduler

    wanted = alphas_cumprod(diffusion)
    for name in (theirs for theirs, ours in SCHEDULES.items() if ours == diffusion.schedule):
        named: dict[str, Any] = {"beta_schedule": name, "rescale_betas_zero_snr": diffusion.zero_terminal_snr}
        if diffusion.schedule in CONVENTIONAL_BETAS:
            start, end = CONVENTIONAL_BETAS[diffusion.schedule]
            named |= {"beta_start": diffusion.beta_start or start, "beta_end": diffusion.beta_end or end}
        theirs = DDIMScheduler(num_train_timesteps=len(wanted), **named).alphas_cumprod.double()
        if torch.allclose(theirs, wanted, rtol=1e-3, atol=1e-9):
            return named
    before = torch.cat([wanted.new_ones(1), wanted[:-1]])
    return {"trained_betas": (1 - wanted / before).tolist()}

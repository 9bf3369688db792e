"""How long a study is about to take: FLOPs, counted, over an assumed share of a matmul rate that is measured."""

from collections.abc import Sequence

import torch

from ldm.config import validate
from ldm.cost import Cost, UntraceableError, cost
from ldm.denoiser import BUILT_IN, DenoiserConfig, build_denoiser
from ldm.diffusion import DiffusionConfig
from ldm.plan import SamplerConfig, make_plan
from ldm.snapshot import Snapshot
from pipelines.train.estimate import ASSUMED_MFU
from pipelines.train.rate import matmul_rate

NOTE = (
    f"the estimate is of the denoiser alone, at {ASSUMED_MFU:.0%} of this machine's matmul rate: assumed, not measured"
)
UNKNOWN = "no estimate: the denoiser's work cannot be counted"


def drawing_seconds(
    snapshot: Snapshot, settings: Sequence[SamplerConfig], num_images: int, num_workers: int
) -> tuple[float | None, str]:
    """(seconds to draw `num_images` with each of `settings`, what is to be said of that); None where not known."""
    if snapshot.denoiser["type"] not in BUILT_IN:
        return None, UNKNOWN
    config = validate(DenoiserConfig, snapshot.denoiser)
    try:
        found = denoiser_cost(
            config, snapshot.latent_shape, snapshot.conditioning.num_classes, snapshot.diffusion_config
        )
    except UntraceableError:
        return None, UNKNOWN
    calls = sum(denoiser_calls(snapshot.diffusion_config, one) for one in settings)
    return calls * num_images * found.forward_flops / (flops_per_second() * num_workers), NOTE


def denoiser_calls(diffusion: DiffusionConfig, settings: SamplerConfig) -> int:
    """For one picture; guidance calls twice."""
    return len(make_plan(diffusion, settings).steps) * (1 if settings.guidance_scale == 1 else 2)


def denoiser_cost(
    config: DenoiserConfig, latent_shape: tuple[int, int, int], num_classes: int, diffusion: DiffusionConfig
) -> Cost:
    """In fp32, for latents (C, h, w). Raises RequestError where it does not fit them; UntraceableError."""
    with torch.device("meta"):
        denoiser = build_denoiser(
            config, in_channels=latent_shape[0], sample_size=latent_shape[1:], num_classes=num_classes or None
        )
    dtype = torch.float32 if diffusion.is_flow else torch.int64
    on_gpu = torch.cuda.is_available()
    return cost(denoiser, latent_shape, "fp32", has_labels=num_classes > 0, timestep_dtype=dtype, on_gpu=on_gpu)


def flops_per_second() -> float:
    """Of this machine as a whole, at the assumed share."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return ASSUMED_MFU * matmul_rate("fp32", device, torch.get_num_threads()).flops_per_second

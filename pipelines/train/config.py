"""What a training run is asked for, and which of it may change when the run goes on."""

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, field_validator

from ldm.config import Config, Location, RequestError
from ldm.denoiser import DenoiserConfig
from ldm.diffusion import DiffusionConfig
from ldm.latents.dataset import Shuffle
from pipelines.tracking import TrackingConfig

Beta = Annotated[float, Field(ge=0, lt=1)]


class EmaConfig(Config):
    """The moving average of the weights, which is what samples are drawn from."""

    decay: float = Field(0.9999, gt=0, lt=1, description="share of the average kept at each step, once warmed up")


class TrainConfig(Config):
    """Trains the latent denoiser with DeepSpeed ZeRO under Ray Train; run again, it goes on."""

    latents: Location | tuple[Location, ...] = Field(
        description="latent dataset: what `ldm encode` wrote; several of one fingerprint are mixed"
    )
    weights: tuple[PositiveFloat, ...] | None = Field(
        None, description="shares of several data sets in each batch; by their sizes unless given"
    )
    where: str = Field("", description="condition on the columns, as in `aesthetic > 5 and width >= 512`")
    exclude: Location | None = Field(
        None, description="text file of ids that are left out, one a line; a run that goes on may add to it"
    )
    shuffle: Shuffle = Field("lanes", description="lanes: by windows of shards; full: all samples, local data only")
    cache_gb: PositiveFloat | None = Field(
        None, description="most that a node keeps of remote latents, GB (10^9 bytes); what its disk has unless given"
    )
    output: Location = Field(description="directory or URL of checkpoints and snapshots")
    max_steps: int = Field(400_000, gt=0, description="optimizer steps in all")
    global_batch_size: int = Field(256, gt=0, description="samples in one optimizer step over all workers")
    micro_batch_size: int | Literal["auto"] = Field(
        "auto", description="samples in one forward pass of a worker; auto: a worker's whole share"
    )
    learning_rate: float = Field(1e-4, gt=0, description="of AdamW, after the warm-up")
    warmup_images: int = Field(0, ge=0, description="images over which the learning rate rises from 0")
    weight_decay: float = Field(0.0, ge=0, description="of AdamW")
    adam_betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="of AdamW")
    gradient_clip: float = Field(1.0, gt=0, description="largest global gradient norm")
    holdout: float = Field(0.0, ge=0, lt=1, description="share of the samples, by a hash of the id, never trained on")
    seed: int = Field(0, ge=0, le=2**53 - 1, description="of order, noise, timesteps, dropped labels and fresh weights")
    num_workers: int = Field(1, gt=0, description="Ray Train workers: one GPU each, or a share of the CPU cores")
    zero_stage: Literal[0, 1, 2, 3] = Field(2, description="what DeepSpeed shards: 1 optimizer, 2 gradients, 3 weights")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: autocast over fp32 master weights")
    checkpoint_every: int = Field(5_000, gt=0, description="optimizer steps between checkpoints")
    keep_last: int = Field(3, gt=0, description="checkpoints kept; snapshots are all kept")
    keep_every: int | None = Field(
        None, gt=0, description="optimizer steps; checkpoints at its multiples are kept for good"
    )
    log_every: int = Field(50, gt=0, description="optimizer steps between points in MLflow")
    max_failures: int = Field(3, ge=0, description="times that Ray restarts the workers from the newest checkpoint")
    resume: Literal["auto", "required", "never"] = Field(
        "auto", description="go on from the newest checkpoint in output: when there is one, always, or refuse"
    )
    resume_from: int | None = Field(
        None, gt=0, description="optimizer step of the checkpoint to go on from; the newest unless given"
    )
    init_from: Location | None = Field(None, description="snapshot whose weights a fresh run begins with")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the workers run")
    ema: EmaConfig = EmaConfig()
    denoiser: DenoiserConfig = DenoiserConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    tracking: TrackingConfig = TrackingConfig()

    @property
    def latents_urls(self) -> list[str]:
        return [self.latents] if isinstance(self.latents, str) else list(self.latents)

    @field_validator("zero_stage", mode="before")
    @classmethod
    def _stage(cls, value: Any) -> Any:
        if str(value) not in ("0", "1", "2", "3"):
            raise ValueError("should be 0, 1, 2 or 3")
        return int(value)


OPERATIONAL = frozenset(
    [
        "latents",
        "exclude",
        "cache_gb",
        "output",
        "max_steps",
        "micro_batch_size",
        "num_workers",
        "zero_stage",
        "checkpoint_every",
        "keep_last",
        "keep_every",
        "log_every",
        "max_failures",
        "resume",
        "resume_from",
        "device",
        "tracking",
    ]
)
"""Keys that may change when a run goes on: they do not change what is learned. (`latents` may move: its generation,
which names its content, may not change. `exclude` may grow, and the run keeps what was left out from which step on.)"""


_ONLY_WITH = {
    "logit_mean": ("timestep_sampling", "logit_normal"),
    "logit_std": ("timestep_sampling", "logit_normal"),
    "min_snr_gamma": ("loss_weighting", "min_snr"),
}


def check_unused(diffusion: DiffusionConfig) -> None:
    """Raises RequestError for what a fresh run would ignore; snapshots and runs that have it are still read."""
    for key, (needs, right) in _ONLY_WITH.items():
        value = getattr(diffusion, key)
        if value != DiffusionConfig.model_fields[key].default and getattr(diffusion, needs) != right:
            raise RequestError(f"diffusion.{key}={value}: is for diffusion.{needs}={right}; leave it out")


def trajectory(config: TrainConfig) -> dict[str, Any]:
    """The keys that decide what is learned."""
    return config.model_dump(mode="json", exclude=set(OPERATIONAL))

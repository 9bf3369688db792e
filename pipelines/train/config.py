"""What a training run is asked for, and which of it may change when the run goes on."""

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from ldm.config import Config, Location, RequestError
from ldm.denoiser import DenoiserConfig
from ldm.diffusion import DiffusionConfig
from ldm.latents.dataset import Shuffle
from pipelines.tracking import TrackingConfig

Beta = Annotated[float, Field(ge=0, lt=1)]


class EmaConfig(Config):
    """Moving averages of the weights: `main`, which samples are drawn from, and a `short` one to compare it with."""

    decay: float = Field(0.9999, gt=0, lt=1, description="share of `main` kept at each step, once warmed up")
    short_decay: float | None = Field(
        0.999, gt=0, lt=1, description="share of `short` kept at each step; null: there is only `main`"
    )

    @property
    def num_profiles(self) -> int:
        return 1 if self.short_decay is None else 2


class ValidationConfig(Config):
    """The loss of the average on held-out samples at eight fixed timesteps, and pictures that it draws."""

    every: int | None = Field(None, gt=0, description="optimizer steps between validations; null: at each checkpoint")
    images: int = Field(256, ge=0, description="samples of the holdout, at most; 0 or without a holdout: no loss")
    grid: int = Field(16, ge=0, description="pictures drawn at each validation; 0: none")
    num_inference_steps: int = Field(25, gt=0, description="DDIM steps of these pictures")
    guidance_scale: float = Field(1.0, ge=0, description="of these pictures; 1 is no guidance")


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
    micro_batch_size: PositiveInt | Literal["auto"] = Field(
        "auto", description="samples in one forward pass of a worker; auto: as many as fit, of a worker's share"
    )
    optimizer: Literal["adamw", "adam"] = Field("adamw", description="adam: weight decay as a part of the gradient")
    learning_rate: float = Field(1e-4, gt=0, description="after the warm-up")
    warmup_images: int = Field(0, ge=0, description="images over which the learning rate rises from 0")
    learning_rate_schedule: Literal["constant", "cosine"] = Field("constant", description="after the warm-up")
    learning_rate_images: int | None = Field(
        None, gt=0, description="images seen at which a cosine schedule ends; needed with it, whatever max_steps is"
    )
    learning_rate_end: float = Field(0.0, ge=0, description="at the end of a cosine schedule and after it")
    weight_decay: float = Field(0.0, ge=0, description="of the optimizer")
    adam_betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="of the optimizer")
    gradient_clip: float = Field(1.0, gt=0, description="largest global gradient norm")
    holdout: float = Field(0.0, ge=0, lt=1, description="share of the samples, by a hash of the id, never trained on")
    seed: int = Field(0, ge=0, le=2**53 - 1, description="of order, noise, timesteps, dropped labels and fresh weights")
    num_workers: PositiveInt | tuple[PositiveInt, PositiveInt] = Field(
        1, description="Ray Train workers, a GPU or a share of the CPU cores each; [least, most]: as many as have room"
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(2, description="what DeepSpeed shards: 1 optimizer, 2 gradients, 3 weights")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: autocast over fp32 master weights")
    activation_checkpointing: bool = Field(
        False, description="computes each block again in the backward pass: less memory, a third more work"
    )
    compile: bool = Field(False, description="compiles the denoiser with torch.compile; needs g++; not with ZeRO-3")
    deterministic: bool = Field(
        False,
        description="kernels that give the same bits on the same GPUs and world; slower, by what is measured and said "
        "when a run starts; needless on a CPU",
    )
    deepspeed: dict[str, Any] = Field(
        {}, description="DeepSpeed settings, for experts, such as offload; see docs/training.md"
    )
    checkpoint_every: int = Field(5_000, gt=0, description="optimizer steps between checkpoints")
    keep_last: int = Field(3, gt=0, description="newest checkpoints kept")
    keep_every: int | None = Field(
        None,
        gt=0,
        description="optimizer steps, a multiple of checkpoint_every; checkpoints at its multiples are kept for good",
    )
    keep_snapshots: int | None = Field(
        None, gt=0, description="newest snapshots kept, and the best one by validation loss; null: all"
    )
    log_every: int = Field(50, gt=0, description="optimizer steps between points in MLflow")
    skip_limit: int = Field(10, gt=0, description="so many steps in a row that are not finite end the run")
    max_failures: int = Field(3, ge=0, description="times that Ray restarts the workers from the newest checkpoint")
    resume: Literal["auto", "required", "never"] = Field(
        "auto",
        description="auto: go on from output's newest checkpoint, if any; required: fail without; never: fail with",
    )
    resume_from: int | None = Field(
        None, gt=0, description="optimizer step of the checkpoint to go on from; the newest unless given"
    )
    init_from: Location | None = Field(None, description="snapshot whose weights a fresh run begins with")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the workers run")
    price_per_hour: float | None = Field(None, gt=0, description="of one worker, in any currency; for --dry-run")
    ema: EmaConfig = EmaConfig()
    validation: ValidationConfig = ValidationConfig()
    denoiser: DenoiserConfig = DenoiserConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    tracking: TrackingConfig = TrackingConfig()

    @property
    def latents_urls(self) -> list[str]:
        return [self.latents] if isinstance(self.latents, str) else list(self.latents)

    @property
    def workers_range(self) -> tuple[int, int]:
        """(least, most) workers."""
        return (self.num_workers, self.num_workers) if isinstance(self.num_workers, int) else self.num_workers

    @field_validator("num_workers")
    @classmethod
    def _range(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        if isinstance(value, tuple) and value[0] > value[1]:
            raise ValueError(f"should be [least, most]; give [{value[1]}, {value[0]}]")
        return value

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
        "activation_checkpointing",
        "compile",
        "deterministic",
        "deepspeed",
        "checkpoint_every",
        "keep_last",
        "keep_every",
        "keep_snapshots",
        "log_every",
        "skip_limit",
        "max_failures",
        "resume",
        "resume_from",
        "device",
        "price_per_hour",
        "validation",
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

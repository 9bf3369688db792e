"""What studies that train are asked, and how an arm is trained: by `ldm train` itself, in a folder of its own."""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from pydantic import Field, PositiveInt

from ldm import storage
from ldm.config import validate
from ldm.denoiser import DenoiserConfig
from ldm.diffusion import DiffusionConfig
from ldm.plan import SamplerConfig, make_plan
from pipelines.study.config import StudyConfig
from pipelines.tracking import TrackingConfig
from pipelines.train import TrainConfig, plan, train
from pipelines.train.config import EmaConfig

_SPEED_STEPS = 20


class TrainedConfig(StudyConfig):
    """How the arms of a study are trained: all alike."""

    global_batch_size: int = Field(16, gt=0, description="samples in one optimizer step over all workers")
    learning_rate: float = Field(1e-4, gt=0, description="of AdamW, constant")
    num_workers: PositiveInt = Field(1, description="Ray Train workers, a GPU or a share of the CPU cores each")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of training; bf16: autocast over fp32 weights")
    num_inference_steps: int = Field(25, gt=0, description="sampling steps of the pictures that are measured")
    ema: EmaConfig = EmaConfig()
    diffusion: DiffusionConfig = DiffusionConfig()

    @property
    def sampler(self) -> SamplerConfig:
        """What pictures are drawn with: DDIM, or Euler of a flow."""
        return SamplerConfig(num_inference_steps=self.num_inference_steps)


@dataclass(frozen=True)
class Trained:
    """An arm that is trained. images_per_second: steady, over the second half of its steps."""

    snapshot: str
    steps: int
    images_seen: int
    images_per_second: float
    peak_memory_gb: float


def train_config(
    config: TrainedConfig, latents: str, output: str, denoiser: DenoiserConfig, max_steps: int, **changes: Any
) -> TrainConfig:
    """One arm's run. A worker's share is one micro-batch, so that the memory of arms compares; two points are logged,
    of half of the steps each."""
    values: dict[str, Any] = {
        "latents": latents,
        "output": output,
        "max_steps": max_steps,
        "global_batch_size": config.global_batch_size,
        "micro_batch_size": max(1, config.global_batch_size // config.num_workers),
        "learning_rate": config.learning_rate,
        "num_workers": config.num_workers,
        "precision": config.precision,
        "holdout": config.holdout,
        "seed": config.seed,
        "device": config.device,
        "checkpoint_every": max_steps,
        "keep_last": 1,
        "log_every": max(1, max_steps // 2),
        "validation": {"grid": 0, "images": 0},
        "ema": config.ema.model_dump(),
        "diffusion": config.diffusion.model_dump(),
        "denoiser": denoiser.model_dump(),
        "tracking": config.tracking.model_dump(),
    }
    return validate(TrainConfig, values | changes)


def check_sampler(config: TrainedConfig) -> None:
    """Raises RequestError where the diffusion cannot be sampled so."""
    make_plan(config.diffusion, config.sampler)


def train_for(seconds: float, config: TrainConfig, speed_output: str) -> Trained:
    """Trains for about so many seconds of steady training.

    A few steps in `speed_output`, which are thrown away, say how many steps that is. Their number is kept beside it:
    measured again, it would be another one, and a run that is done would go on for some steps that are not steady.
    """
    of = {"seconds": seconds, **_about(config)}
    if (pairs := _kept(f"{speed_output}.json", of)) is None:
        pairs = _measured_pairs(seconds, config, speed_output)
        _keep(f"{speed_output}.json", of, pairs)
    config = config.model_copy(update={"max_steps": 2 * pairs, "checkpoint_every": 2 * pairs, "log_every": pairs})
    if pairs <= plan(config).step < 2 * pairs:
        storage.remove(config.output)  # interrupted in the half that is timed: what is left of it is no measure
    return train_anew(config)


def train_anew(config: TrainConfig) -> Trained:
    """Trains, or goes on. What is trained is kept with its figures, and neither done nor timed again.

    A run that is done, but whose figures were lost in a kill, is done again.
    """
    file, of = storage.join(config.output, "trained.json"), _about(config)
    report = train(config)
    if report.steady_images_per_second is None:
        if (kept := _kept(file, of)) is not None:
            return replace(Trained(**kept), snapshot=storage.absolute(report.snapshot))
        storage.remove(config.output)
        report = train(config)
    assert report.steady_images_per_second is not None and report.peak_memory_gb is not None
    found = Trained(
        storage.absolute(report.snapshot),
        report.step,
        report.images_seen,
        report.steady_images_per_second,
        report.peak_memory_gb,
    )
    _keep(file, of, asdict(found))
    return found


def _measured_pairs(seconds: float, config: TrainConfig, speed_output: str) -> int:
    """Half as many steps as take so long, at least one."""
    storage.remove(speed_output)
    quick = {
        "output": speed_output,
        "max_steps": _SPEED_STEPS,
        "checkpoint_every": _SPEED_STEPS,
        "log_every": _SPEED_STEPS // 2,
        "tracking": TrackingConfig(enabled=False),
    }
    found = train(config.model_copy(update=quick))
    storage.remove(speed_output)
    assert found.steady_images_per_second is not None
    return max(1, round(seconds * found.steady_images_per_second / config.global_batch_size / 2))


def _about(config: TrainConfig) -> dict[str, Any]:
    """All that a run's speed depends on, and not where it lies."""
    return config.model_dump(mode="json", exclude={"latents", "output", "exclude", "tracking"})


def _keep(url: str, of: dict[str, Any], found: Any) -> None:
    storage.write_json(url, {"of": of, "found": found})


def _kept(url: str, of: dict[str, Any]) -> Any:
    """What `_keep` wrote; None where that was of something else."""
    kept = storage.read_json(url) if storage.exists(url) else {}
    return kept["found"] if kept.get("of") == of else None

"""What every study is asked."""

from typing import Annotated, Literal, TypeVar

from pydantic import BeforeValidator, Field

from ldm.config import Config, Location
from pipelines.tracking import TrackingConfig

T = TypeVar("T")


def _split(value: object) -> object:
    """`10,25,50` and 10 are read as lists."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    return [value] if isinstance(value, int | float) else value


Values = Annotated[tuple[T, ...], BeforeValidator(_split), Field(min_length=1)]
"""An axis of a study: one value or several."""


class StudyConfig(Config):
    """Where a study goes, and how its pictures are drawn and measured."""

    output: Location = Field("study", description="directory or URL; run again, what is done there is not done again")
    num_images: int = Field(500, gt=1, description="pictures drawn for each arm, of the same seeds, classes in turn")
    features: Location = Field(
        "classifier",
        description="what the Fréchet distance is taken in: classifier (trained on the reference), vae, or the path or "
        "URL of a network from pictures uint8 (N, 3, H, W) to features (N, D), which is code and is RUN: TorchScript "
        "(.pt, .ts) or torch.export (.pt2)",
    )
    holdout: float = Field(0.1, gt=0, lt=1, description="share of the pictures, by a hash of the id, that are held out")
    max_reference: int = Field(20_000, gt=1, description="reference pictures read at most, the first ones")
    seed: int = Field(0, ge=0, le=2**53 - 1, description="picture i has seed + i; also of training and intervals")
    batch_size: int = Field(32, gt=0, description="pictures in one call when drawing; the last call is padded to it")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the workers run")
    tracking: TrackingConfig = TrackingConfig()

"""The configuration of `ldm sample`."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from ldm.config import Location
from ldm.plan import SamplerConfig

DEFAULT_IMAGES = 16
SAMPLES_PER_SHARD = 1000

Task = Literal["generate", "reconstruct", "interpolate", "variations", "image_to_image", "inpaint"]


class SampleConfig(SamplerConfig):
    """Draws pictures from a snapshot, on this machine."""

    snapshot: Location = Field(description="what `ldm train` wrote: a snapshot directory or URL")
    output: Location = Field("samples", description="directory or URL of the pictures")
    num_images: int | None = Field(
        None, gt=0, description=f"number of pictures; null: {DEFAULT_IMAGES}, or for reconstruct one for each given"
    )
    labels: tuple[str, ...] | None = Field(
        None,
        description="class numbers or names, taken in turn; null: all classes in turn, but for a task with "
        "pictures and for interpolate no class",
    )
    seed: int = Field(0, ge=0, le=2**53 - 1, description="seed of the first picture; picture i has seed + i")
    task: Task = Field(
        "generate",
        description="reconstruct: pictures inverted to noise and back; interpolate: between two pictures, or from seed "
        "to seed + 1; variations: of pictures, or of the picture of seed; image_to_image; inpaint",
    )
    pictures: Location | tuple[Location, ...] | None = Field(
        None, description="pictures to start from, taken in turn: files, a folder, a glob or a comma set"
    )
    mask: Location | None = Field(
        None, description="picture that is white where inpaint paints; grey mixes, black keeps the picture exactly"
    )
    mask_blur: int = Field(0, ge=0, description="width of a soft edge inside the mask, pixels")
    strength: float | None = Field(
        None,
        gt=0,
        le=1,
        description="how far from the pictures: share of the steps (image_to_image, inpaint) or way to fresh noise "
        "(variations); null: 0.6, for inpaint 1",
    )
    format: Literal["png", "webdataset", "adm-npz"] = Field(
        "png",
        description="png: one file a picture; webdataset: shards, which an interrupted run fills up when it is given "
        "again; adm-npz: samples.npz of one array uint8 (N, H, W, 3) and the labels, as the ADM suite reads",
    )
    samples_per_shard: int | None = Field(
        None, gt=0, description=f"pictures in a shard of format=webdataset; null: {SAMPLES_PER_SHARD:,}"
    )
    batch_size: int = Field(32, gt=0, description="pictures in one call; a part of what a picture depends on")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="what the denoiser computes in")
    compile: bool = Field(
        False,
        description="whether the denoiser is compiled (torch.compile): faster after half a minute; other last bits",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where it runs")
    denoiser_type: str | None = Field(None, description="package:Class, for a snapshot of your own denoiser class")

    @field_validator("labels", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        """`apple,3`, 3 and [apple, 3] are all read."""
        if isinstance(value, str):
            value = [label.strip() for label in value.split(",")]
        elif isinstance(value, int):
            value = [value]
        return tuple(str(label) for label in value) if isinstance(value, list | tuple) else value

    @model_validator(mode="after")
    def _shards_are_asked_for(self) -> "SampleConfig":
        if self.samples_per_shard is not None and self.format != "webdataset":
            raise ValueError(
                f"samples_per_shard={self.samples_per_shard}: is of format=webdataset, not of format={self.format}; "
                "leave it out"
            )
        return self

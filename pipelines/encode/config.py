"""What can be asked of encode."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from ldm.autoencoder import Precision
from ldm.config import Config, Location
from ldm.images import Buckets, PictureRules
from ldm.latents.manifest import Store
from pipelines.tracking import TrackingConfig

Level = Annotated[int, Field(ge=0, le=255)]
Side = Annotated[int, Field(gt=0)]
Retry = Literal["missing", "quarantined"]
BATCHES_IN_FLIGHT = 8
"""Batches of pixels that an encoder holds at most."""


class EncodeConfig(Config):
    """Pre-encodes image shards into a latent dataset."""

    source: Location | tuple[Location, ...] = Field(
        description="image shards (WebDataset tars): path, URL, glob, comma set or brace range; a .txt of them; "
        "a folder of tars, or one of pictures (class = sub-folder)"
    )
    destination: Location = Field(description="directory or URL of the latent dataset")
    autoencoder: Location = Field(
        description="diffusers autoencoder: folder, URL or hub id; identity: none, pixels in [-1, 1] are the latents"
    )
    image_size: Side | tuple[Side, ...] = Field(
        256, description="side of the encoded square, pixels; several: each picture once in each size"
    )
    buckets: Buckets | None = Field(None, description="keep the aspect ratio: image_size² is then the area")
    min_size: int = Field(0, ge=0, description="pictures whose short side is below, pixels, are filtered")
    flip: bool = Field(False, description="store a mirrored copy of each picture too, marked as such")
    background: tuple[Level, Level, Level] = Field((255, 255, 255), description="RGB 0-255 behind transparent pictures")
    label: str = Field("cls", description="what holds the class number: a member's extension, or json.FIELD")
    caption: str = Field("txt", description="what holds the caption: a member's extension, or json.FIELD")
    keep_json: tuple[str, ...] = Field((), description="fields of .json that become columns; json_NAME where taken")
    class_names: Location | None = Field(None, description="JSON file with the list of class names")
    batch_size: int = Field(32, gt=0, description="pictures in one call of the autoencoder")
    store: Store = Field("moments", description="what is stored: posterior mean and log variance, or the mean alone")
    precision: Precision = Field("float32", description="what the autoencoder computes in, on any device")
    compile: bool = Field(False, description="whether the autoencoder's encoder is compiled (torch.compile)")
    max_shards: int | None = Field(None, gt=0, description="encode the first so many shards only; a later run goes on")
    retry: Retry = Field("missing", description="what is encoded: shards without a commit, or quarantined samples too")
    max_tries: int = Field(
        3, gt=0, description="tries of a shard whose worker dies or whose storage fails, before it is set aside"
    )
    max_quarantined: float = Field(
        0.05, ge=0, le=1, description="share of quarantined inputs beyond which the exit is 3"
    )
    num_workers: int | None = Field(
        None, gt=0, description="encoder actors; null: what the cluster has room for, also while it grows"
    )
    gpus_per_worker: float = Field(1.0, gt=0, description="of an encoder actor on CUDA; 0.5: two on a GPU")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the autoencoder runs")
    price_per_hour: float | None = Field(None, gt=0, description="of the cluster, in any currency: gives that of a run")
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("max_quarantined", mode="before")
    @classmethod
    def _percent(cls, value: object) -> object:
        if isinstance(value, str) and value.strip().endswith("%"):
            return float(value.strip()[:-1]) / 100
        return value

    @property
    def sizes(self) -> tuple[int, ...]:
        return (self.image_size,) if isinstance(self.image_size, int) else self.image_size

    @property
    def rules(self) -> PictureRules:
        return PictureRules(self.sizes, self.buckets, self.background, self.min_size, self.flip)

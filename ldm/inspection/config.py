"""What can be asked of inspect."""

from typing import Literal

from pydantic import Field

from ldm.autoencoder import Precision
from ldm.config import Config, Location
from ldm.latents.manifest import Store


class InspectConfig(Config):
    """Looks at image shards, a folder of pictures or a latent dataset; changes nothing."""

    target: Location | tuple[Location, ...] = Field(
        description="a latent dataset (a directory with manifest.json), or what encode takes as its source: image "
        "shards (path, URL, glob, comma set, brace range, a .txt of them) or one folder of pictures"
    )
    preview: Location | None = Field(
        None, description="PNG to write: pictures of the probe, or random latents decoded beside their sources"
    )
    count: int = Field(8, gt=0, le=1000, description="pictures in the preview")
    seed: int = Field(0, description="chooses the pictures of the preview")
    generation: str | None = Field(None, description="of a latent dataset; null: the newest")
    probe: int | None = Field(None, gt=0, description="samples to look into; null: 1 %, at least 200")
    label: str = Field("cls", description="what holds the class number: a member's extension, or json.FIELD")
    caption: str = Field("txt", description="what holds the caption: a member's extension, or json.FIELD")
    autoencoder: Location | None = Field(
        None, description="diffusers autoencoder (folder, URL or hub id): measures here what an encode would take"
    )
    image_size: int = Field(256, gt=0, description="side of the encoded square, pixels, for that measurement")
    batch_size: int = Field(32, gt=0, description="pictures in one call of the autoencoder")
    store: Store = Field("moments", description="what would be stored: posterior mean and log variance, or the mean")
    precision: Precision = Field("float32", description="what the autoencoder computes in")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the autoencoder runs")
    num_workers: int = Field(1, gt=0, description="machines such as this one that would encode")
    price_per_hour: float | None = Field(None, gt=0, description="of all of them, in any currency")

"""`ldm.json` in an exported folder: what diffusers has no place for. diffusers itself never reads it."""

from typing import Any, Literal

from pydantic import Field, field_validator

from ldm.config import Config
from ldm.denoiser import DenoiserConfig
from ldm.diffusion import DiffusionConfig
from ldm.images import PictureRules
from ldm.latents.manifest import Conditioning

SIDE_FILE = "ldm.json"


class SideFile(Config):
    """What the snapshot said, and of which weights: of others put in their place it says nothing."""

    format: Literal["ldm-export"] = "ldm-export"
    version: Literal[1] = 1
    weights_sha256: str = Field(description="of the transformer's safetensors file")
    denoiser: DenoiserConfig = Field(description="as in the snapshot")
    diffusion: DiffusionConfig = Field(description="as in the snapshot")
    conditioning: Conditioning = Field(description="as in the snapshot")
    pictures: dict[str, Any] = Field(description="the rules that its pictures were made by")
    step: int = Field(ge=0, description="optimizer steps")
    images_seen: int = Field(ge=0, description="pictures")

    @field_validator("conditioning")
    @classmethod
    def _is_one_of_ours(cls, value: Conditioning) -> Conditioning:
        count = value.num_classes
        if count < 0 or (value.type == "class") != (count > 0) or len(value.names) not in (0, count):
            raise ValueError("is none that a snapshot has")
        return value

    @field_validator("pictures")
    @classmethod
    def _can_be_read(cls, value: dict[str, Any]) -> dict[str, Any]:
        try:
            PictureRules.from_fingerprint(value)
        except (KeyError, TypeError) as error:
            raise ValueError(f"are no rules of pictures ({type(error).__name__}: {error})") from None
        return value

"""What the HTTP interface takes and gives. What it says of a field is what the OpenAPI page shows."""

import base64
import binascii
import hashlib
import json
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, Field, StrictInt, StringConstraints, model_validator
from torch import Tensor

from ldm import images
from ldm.config import RequestError
from ldm.drawing import Blend, Edit
from ldm.labels import check_guidance, resolve_labels
from ldm.latents.manifest import Conditioning
from ldm.plan import SamplerConfig
from ldm.snapshot import Snapshot

MAX_SEED = 2**53 - 1
"""The largest integer that every JSON reader keeps."""
MAX_STEPS = 100_000
"""Whatever the model; its own limit, num_train_timesteps, is mostly far below."""
DEFAULT_STRENGTH = 0.6

Status = Literal["waiting", "running", "done", "failed", "cancelled"]
Seed = Annotated[StrictInt, Field(ge=0, le=MAX_SEED)]
Label = Annotated[StrictInt, Field(ge=0)] | Annotated[str, StringConstraints(max_length=200)]


class DrawRequest(SamplerConfig):
    """What to draw, and how."""

    model: str | None = Field(None, max_length=200, description="a name of /v1/models; null: the default one")
    labels: list[Label] | None = Field(
        None, min_length=1, max_length=1_000_000, description="class numbers or names, taken in turn; null: all in turn"
    )
    prompt: str | None = Field(None, max_length=2000, description="for a model of texts; one of classes takes labels")
    num_images: Annotated[StrictInt, Field(gt=0)] | None = Field(
        None, description="number of pictures; null: one for each seed, else for each label, else 1"
    )
    seed: Seed | None = Field(None, description="picture i has seed + i; null: 0")
    seeds: list[Seed] | None = Field(
        None, min_length=1, max_length=1_000_000, description="the seed of each picture, in place of seed"
    )
    seed_to: Seed | None = Field(
        None, description="interpolation: the pictures go from the noise of seed to that of seed_to (slerp)"
    )
    picture: str | None = Field(
        None, max_length=12 * 2**20, description="image to image: a picture in base64 (PNG, JPEG, WebP) to start from"
    )
    strength: float | None = Field(
        None, gt=0, le=1, description=f"how far from the picture, as a share of the steps; null: {DEFAULT_STRENGTH}"
    )
    size: int | tuple[int, int] | None = Field(None, description="of the pictures, a side or [height, width]")
    num_inference_steps: Annotated[int, Field(strict=True, gt=0, le=MAX_STEPS)] = Field(
        50, description="sampling steps S; heun calls the denoiser 2 S - 1 times"
    )
    guidance_scale: float = Field(1.0, ge=0, le=1000, description="classifier-free guidance; 1: none")
    exact: bool = Field(
        False,
        description="always computed in the largest batch shape: the same bytes whatever else is drawn, but slower",
    )
    deadline_s: float | None = Field(
        None, gt=0, le=1e6, description="seconds within which all is drawn, else refused at once; null: the server's"
    )

    @model_validator(mode="after")
    def _agrees(self) -> "DrawRequest":
        if self.seeds is not None and (self.seed is not None or self.seed_to is not None):
            raise ValueError("seeds: stands with seed or seed_to; give one of them")
        if self.seeds is not None and self.num_images not in (None, len(self.seeds)):
            raise ValueError(f"num_images={self.num_images}: {len(self.seeds)} seeds are given; leave it out")
        if self.picture is not None and self.seed_to is not None:
            raise ValueError("seed_to: stands with a picture; give one of them")
        if self.strength is not None and self.picture is None:
            raise ValueError(f"strength={self.strength}: is of a picture; leave it out")
        return self

    @property
    def count(self) -> int:
        return self.num_images or len(self.seeds or self.labels or [0])

    def check(self, snapshot: Snapshot) -> None:
        """Raises RequestError where the model cannot draw this."""
        if self.prompt is not None:
            raise RequestError("prompt: this model knows classes, not texts; give labels, or leave it out")
        check_guidance(self.guidance_scale, snapshot)
        height, width = snapshot.picture_shape()
        if self.size is not None and self.size not in ((height, width), *[height] * (height == width)):
            raise RequestError(
                f"size={json.dumps(self.size)}: this model draws [{height}, {width}] alone; leave it out"
            )

    def settings(self) -> dict[str, Any]:
        """What a picture depends on beside the model, its seed and its label: JSON values, for its provenance."""
        values = self.model_dump(mode="json", include={*SamplerConfig.model_fields, "exact"}, exclude_none=True)
        if self.seed_to is not None:
            values |= {"seed_from": self.seed or 0, "seed_to": self.seed_to, "num_images": self.count}
        if self.picture is not None:
            values["picture_sha256"] = hashlib.sha256(base64.b64decode(self.picture)).hexdigest()
            values["strength"] = self.strength or DEFAULT_STRENGTH
        return values

    def part(self, first: int, count: int) -> dict[str, Any]:
        """The body of a request for `count` of the pictures from number `first`: of its lists only what it needs."""
        body = self.model_dump(mode="json", exclude_unset=True)
        if self.seeds is not None:
            body |= {"seeds": self.seeds[first : first + count], "num_images": count}
        if self.labels is not None:
            body["labels"] = [self.labels[i % len(self.labels)] for i in range(first, first + count)]
        return body

    def rows(self, conditioning: Conditioning, first: int, count: int) -> tuple[Tensor | None, Tensor]:
        """Labels and seeds of `count` pictures from number `first`, int64 (count,); labels None where there are none.

        Of a request that `part` made, whose lists begin with number `first`. Raises RequestError.
        """
        names = [str(label) for label in self.labels or ()]
        labels = resolve_labels(names, conditioning, count, 0 if self.labels else first)
        if self.seeds is not None:
            seeds = torch.tensor(self.seeds)
        elif self.seed_to is not None:
            seeds = torch.full((count,), self.seed or 0)
        else:
            seeds = torch.arange(first, first + count) + (self.seed or 0)
        if int(seeds.max()) > MAX_SEED:
            raise RequestError(f"seed={self.seed}: the last picture's would be above {MAX_SEED}; give a smaller one")
        return labels, seeds

    def source(self, snapshot: Snapshot, first: int, count: int) -> Blend | Edit | None:
        """Where those pictures start; None: from the noise of their seeds. Raises RequestError."""
        if self.seed_to is not None:
            ends = torch.tensor([[self.seed or 0], [self.seed_to]]).expand(2, count)
            return Blend(ends[0], ends[1], torch.arange(first, first + count) / max(1, self.count - 1))
        if self.picture is None:
            return None
        pixels = torch.from_numpy(self._decode(snapshot))
        return Edit(pixels.expand(count, *pixels.shape), self.strength or DEFAULT_STRENGTH)

    def _decode(self, snapshot: Snapshot) -> np.ndarray:
        """uint8 (3, H, W), cut as training cut its pictures."""
        assert self.picture is not None
        try:
            data = base64.b64decode(self.picture, validate=True)
        except (binascii.Error, ValueError) as error:
            raise RequestError(f"picture={self.picture[:16]}…: is no base64 ({error})") from None
        try:
            background = tuple(snapshot.fingerprint["pictures"]["background"])
            return images.decode(data, snapshot.picture_shape(), background)[0]
        except images.BadPicture as error:
            raise RequestError(f"picture: cannot be read as a picture ({error})") from None


class SamplesRequest(DrawRequest):
    """What to draw, how, and how it is answered."""

    previews: Annotated[StrictInt, Field(ge=0, le=20)] = Field(
        0, description="how often each picture's predicted x0 is shown on the way, in the events"
    )
    response_format: Literal["json", "png", "urls"] = Field(
        "json", description="json: PNGs in base64; png: one picture; urls: links that stand for some minutes"
    )
    background: bool = Field(False, description="whether the answer comes at once, to be followed by events")

    @model_validator(mode="after")
    def _one_png(self) -> "SamplesRequest":
        if self.response_format == "png" and (self.count > 1 or self.background):
            what = (
                "comes at the end; leave background out" if self.background else f"holds one picture, not {self.count}"
            )
            raise ValueError(f"response_format=png: {what}; or use json or urls")
        return self


class BulkRequest(DrawRequest):
    """What to draw, and how: any number of pictures, as a stream."""

    exact: bool = Field(
        True, description="always computed in the largest batch shape: the same bytes whatever else is drawn"
    )
    response_format: Literal["png", "npy"] = Field(
        "png", description="members of the tar: 00000000.png, or 00000000.npy of uint8 (3, H, W)"
    )


class Picture(BaseModel):
    """One picture, and what makes it again."""

    index: int
    seed: int
    label: int | None = Field(description="class number; null for an unconditional model")
    url: str | None = Field(None, description="where it stands for some minutes")
    png: str | None = Field(None, description="base64")


class SamplesResponse(BaseModel):
    """The state of a request, and the pictures that are drawn, in the order that was asked for."""

    id: str
    status: Status
    model: str
    step: int = Field(description="of the training, that the model is of")
    num_images: int
    images_done: int
    steps: int = Field(description="calls of the denoiser, of all pictures together")
    steps_done: int
    seconds: float
    detail: str | None = Field(None, description="of one that failed: why")
    events: str
    images: list[Picture]


class Problem(BaseModel):
    """Why a request was not answered."""

    detail: str = Field(description="one line that names the field")


def one_line(problem: dict[str, Any]) -> str:
    """Pydantic's report on a body => the field, its value, what would be right."""
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "json_invalid":
        return f"body: is no JSON ({problem['ctx']['error']})"
    key = ".".join(str(part) for part in problem["loc"][1:3])  # the field, and the place in a list
    value = json.dumps(problem["input"], default=str)[:80]
    return f"{key}={value}: {message[0].lower()}{message[1:]}" if key else message

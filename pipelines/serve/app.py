"""The HTTP interface, plain ASGI without Ray: request => the sampler => pictures.

`Engine` is all that it draws through: batching of another kind changes the engine alone. A picture over HTTP
has the bytes that it has off line, for the same snapshot, settings, batch size and number of threads.
"""

import asyncio
import base64
import io
import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, Field, StrictInt, StringConstraints, model_validator
from torch import Tensor

import ldm
from ldm import images
from ldm.config import RequestError
from ldm.drawing import PictureSampler
from ldm.latents.manifest import Conditioning
from ldm.plan import SamplerConfig, make_plan
from ldm.sampling import check_guidance, resolve_labels
from ldm.snapshot import Snapshot

if TYPE_CHECKING:
    from fastapi import FastAPI

MAX_SEED = 2**53 - 1
"""The largest integer that every JSON reader keeps."""
MAX_STEPS = 100_000
"""Whatever the model; its own limit, num_train_timesteps, is mostly far below."""
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Label = Annotated[StrictInt, Field(ge=0)] | Annotated[str, StringConstraints(max_length=200)]


class SamplesRequest(SamplerConfig):
    """What to draw, and how."""

    labels: list[Label] | None = Field(
        None, min_length=1, description="class numbers or names, taken in turn; null: all classes in turn"
    )
    num_images: int | None = Field(
        None, gt=0, description="number of pictures; null: one for each seed, else for each label, else 1"
    )
    seed: Seed | None = Field(None, description="picture i has seed + i; null: 0")
    seeds: list[Seed] | None = Field(None, min_length=1, description="the seed of each picture, in place of seed")
    num_inference_steps: int = Field(
        50, gt=0, le=MAX_STEPS, description="sampling steps S; heun calls the denoiser 2 S - 1 times"
    )
    guidance_scale: float = Field(1.0, ge=0, le=1000, description="classifier-free guidance; 1: none")
    response_format: Literal["json", "png", "npy"] = Field(
        "json", description="json: PNGs in base64; png: one picture; npy: raw uint8 (N, 3, H, W), for bulk"
    )

    @model_validator(mode="after")
    def _seeds_agree(self) -> "SamplesRequest":
        if self.seeds is not None and self.seed is not None:
            raise ValueError("seed, seeds: both are given; give one of them")
        if self.seeds is not None and self.num_images not in (None, len(self.seeds)):
            raise ValueError(f"num_images={self.num_images}: {len(self.seeds)} seeds are given; leave it out")
        return self

    def resolve(self, conditioning: Conditioning, max_images: int) -> tuple[Tensor | None, Tensor]:
        """Labels and seeds of the pictures, int64 (N,); labels None for an unconditional model.

        Raises RequestError.
        """
        count = self.num_images or len(self.seeds or self.labels or [0])
        if count > max_images:
            raise RequestError(f"num_images={count}: the most in one request is {max_images}")
        if count > 1 and self.response_format == "png":
            raise RequestError(f"response_format=png: holds one picture, not {count}; use json or npy")
        first = self.seed or 0
        seeds = self.seeds or range(first, first + count)
        labels = resolve_labels([str(label) for label in self.labels or ()], conditioning, count)
        return labels, torch.tensor(list(seeds), dtype=torch.int64)


class Picture(BaseModel):
    """One picture, and what makes it again."""

    seed: int
    label: int | None = Field(description="class number; null for an unconditional model")
    png: str = Field(description="base64")


class SamplesResponse(BaseModel):
    """The pictures, in the order that was asked for."""

    images: list[Picture]
    snapshot: str
    step: int


class Problem(BaseModel):
    """Why a request was not answered."""

    detail: str = Field(description="one line that names the field")


class Overloaded(Exception):
    """As many requests wait as may wait."""


class Engine:
    """Draws one request after the other, in a thread of its own, so that the event loop answers meanwhile."""

    def __init__(self, sampler: PictureSampler, max_waiting: int) -> None:
        self.sampler, self.max_waiting = sampler, max_waiting
        self.waiting = 0  # requests that are here, the running one included
        self._thread = ThreadPoolExecutor(1, "engine", torch.set_num_threads, (torch.get_num_threads(),))

    def refuse_overload(self) -> None:
        """Raises Overloaded where a request would not be taken now."""
        if self.waiting >= self.max_waiting:
            raise Overloaded

    async def draw(self, labels: Tensor | None, seeds: Tensor, request: SamplesRequest) -> npt.NDArray[np.uint8]:
        """=> raw pixels uint8 (N, 3, H, W). Raises RequestError and Overloaded."""
        # Made once more where it is drawn; here so that a wrong request is told at once, and does not queue.
        make_plan(self.sampler.diffusion, request)
        self.refuse_overload()
        work = partial(self.sampler.draw, labels, seeds, request)
        self.waiting += 1
        try:
            pictures = await asyncio.get_running_loop().run_in_executor(self._thread, work)
        finally:
            self.waiting -= 1
        return pictures.numpy()


def create_app(engine: Engine, snapshot: Snapshot, max_images: int) -> "FastAPI":
    """The application. OpenAPI stands at /openapi.json, a page to try it at /docs."""
    from fastapi import FastAPI, Response

    app = FastAPI(title="ldm", summary="Pictures from a latent diffusion model", version=ldm.__version__)
    _explain_errors(app)
    model = {**_describe(snapshot), "batch_size": engine.sampler.batch_size, "max_images": max_images}

    @app.post(
        "/v1/samples",
        response_model=SamplesResponse,
        responses={422: {"model": Problem}, 429: {"model": Problem}},
    )
    async def samples(request: SamplesRequest) -> Response:
        """Draws pictures. What a picture shows depends on its seed, its label and the settings alone."""
        check_guidance(request.guidance_scale, snapshot)
        labels, seeds = request.resolve(snapshot.conditioning, max_images)
        pictures = await engine.draw(labels, seeds, request)
        if request.response_format == "npy":
            return Response(_to_npy(pictures), media_type="application/octet-stream")
        if request.response_format == "png":
            return Response(images.to_png(pictures[0]), media_type="image/png")
        body = await asyncio.to_thread(_to_json, pictures, labels, seeds, snapshot)
        return Response(body, media_type="application/json")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """What is served: its step, its classes, the size of its pictures (a side, or [height, width]), the limits."""
        return {"models": [model]}

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether the replica lives."""
        return {"status": "ok"}

    @app.get("/readyz", responses={429: {"model": Problem}})
    async def readyz() -> dict[str, str | int]:
        """Whether the model is loaded, and a request would be taken now."""
        engine.refuse_overload()
        return {"status": "ready", "waiting": engine.waiting}

    return app


def _explain_errors(app: "FastAPI") -> None:
    """Every refusal is a `Problem`: one line that names the field."""
    from fastapi import Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse({"detail": _one_line(error.errors()[0])}, 422)

    @app.exception_handler(RequestError)
    async def wrong(request: Request, error: RequestError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 422)

    @app.exception_handler(Overloaded)
    async def overloaded(request: Request, error: Overloaded) -> JSONResponse:
        detail = "as many requests wait as may wait; try again in a moment"
        return JSONResponse({"detail": detail}, 429, {"Retry-After": "1"})


def _one_line(problem: dict[str, Any]) -> str:
    """Pydantic's report on a body => the field, its value, what would be right."""
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "json_invalid":
        return f"body: is no JSON ({problem['ctx']['error']})"
    key = ".".join(str(part) for part in problem["loc"][1:3])  # the field, and the place in a list
    value = json.dumps(problem["input"], default=str)[:80]
    return f"{key}={value}: {message[0].lower()}{message[1:]}" if key else message


def _describe(snapshot: Snapshot) -> dict[str, Any]:
    height, width = snapshot.picture_shape()
    return {
        "snapshot": snapshot.url,
        "step": snapshot.step,
        "images_seen": snapshot.images_seen,
        "weights_sha256": snapshot.weights_sha256,
        "image_size": height if height == width else [height, width],
        "num_classes": snapshot.conditioning.num_classes,
        "classes": snapshot.conditioning.names,
        "num_train_timesteps": snapshot.diffusion_config.num_train_timesteps,
    }


def _to_npy(pictures: npt.NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, pictures, allow_pickle=False)
    return buffer.getvalue()


def _to_json(pictures: npt.NDArray[np.uint8], labels: Tensor | None, seeds: Tensor, snapshot: Snapshot) -> bytes:
    """The body of a `SamplesResponse`."""
    numbers = [None] * len(seeds) if labels is None else labels.tolist()
    rows = [
        {"seed": seed, "label": label, "png": base64.b64encode(images.to_png(picture)).decode()}
        for picture, label, seed in zip(pictures, numbers, seeds.tolist(), strict=True)
    ]
    return json.dumps({"images": rows, "snapshot": snapshot.url, "step": snapshot.step}).encode()

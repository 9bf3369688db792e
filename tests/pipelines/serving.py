"""The application in this process, without Ray: what tests of HTTP talk to."""

import asyncio
import base64
import contextlib
import io
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, TypeVar

import httpx
import numpy as np
import numpy.typing as npt
from PIL import Image

from pipelines.serve.config import ServeConfig
from pipelines.serve.local import local_app
from pipelines.serve.replica import Replica

T = TypeVar("T")


@contextlib.contextmanager
def replica(snapshot: str, **settings: Any) -> Iterator[Replica]:
    """A replica on the CPU; batches of 8 rows unless told otherwise, and no look for newer versions."""
    made = Replica(ServeConfig(snapshot=snapshot, **{"batch_size": 8, "refresh_s": 0, **settings}), "cpu")
    try:
        yield made
    finally:
        made.close()


def within(made: Replica, work: Callable[[httpx.AsyncClient], Awaitable[T]], **options: Any) -> T:
    """What `work` answers, given a client of the application."""

    async def main() -> T:
        transport = httpx.ASGITransport(local_app(made, **options))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client:
            return await work(client)

    return asyncio.run(main())


def post(made: Replica, body: Any, path: str = "/v1/samples", **options: Any) -> httpx.Response:
    """The answer to one request; bytes are sent as they are."""

    async def send(client: httpx.AsyncClient) -> httpx.Response:
        if isinstance(body, bytes):
            return await client.post(path, content=body, headers={"content-type": "application/json"})
        return await client.post(path, json=body)

    return within(made, send, **options)


async def read_events(answer: httpx.Response) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    """Server-sent events as (kind, data)."""
    kind = ""
    async for line in answer.aiter_lines():
        if line.startswith("event: "):
            kind = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield kind, json.loads(line.removeprefix("data: "))


def pngs(answer: httpx.Response) -> list[bytes]:
    return [base64.b64decode(picture["png"]) for picture in answer.raise_for_status().json()["images"]]


def pixels(png: bytes) -> npt.NDArray[np.uint8]:
    """uint8 (3, H, W)."""
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).transpose(2, 0, 1)


def provenance(png: bytes) -> dict[str, Any]:
    """What a picture says of itself."""
    about: dict[str, Any] = json.loads(Image.open(io.BytesIO(png)).text["ldm"])  # type: ignore[attr-defined]
    return about

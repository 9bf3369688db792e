"""The application in this process, around one replica and without Ray: for a notebook, and for tests."""

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from pipelines.serve.app import create_app
from pipelines.serve.replica import Replica, Task

if TYPE_CHECKING:
    from fastapi import FastAPI


class LocalBackend:
    """A `Backend` of one replica."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica

    def draw(self, task: Task) -> AsyncIterator[list[dict[str, Any]]]:
        return self.replica.draw(task)

    async def describe(self) -> dict[str, Any]:
        return await asyncio.to_thread(self.replica.describe)


def local_app(replica: Replica, **options: Any) -> "FastAPI":
    """An ASGI application: `uvicorn.run(local_app(Replica(ServeConfig(snapshot=…), "cpu")))`."""
    return create_app(LocalBackend(replica), **options)

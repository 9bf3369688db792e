"""Any number of pictures of one setting, as a stream: a tar that a WebDataset reader takes, in the order asked for."""

import asyncio
import tarfile
from collections import deque
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from pipelines.serve.replica import Task
from pipelines.serve.requests import BulkRequest
from pipelines.serve.table import TRIES, Backend, Unserved

PART = 64
"""Pictures in one request to a replica: small enough that several replicas share the work to its end."""
_LONGEST_WAIT_S = 5.0


async def draw_all(backend: Backend, request: BulkRequest, in_flight: int) -> AsyncIterator[bytes]:
    """The tar, a member at a time, with `in_flight` parts at the replicas. A part whose replica dies is drawn again.

    Raises Unserved, before the first bytes where the request is wrong.
    """
    firsts = iter(range(0, request.count, PART))
    running: deque[tuple[int, asyncio.Task[dict[int, bytes]]]] = deque()

    def begin() -> None:
        if (first := next(firsts, None)) is not None:
            count = min(PART, request.count - first)
            task = Task(request.part(first, count), bulk=True, first=first, count=count)
            running.append((first, asyncio.create_task(_draw_part(backend, task))))

    try:
        for _ in range(in_flight):
            begin()
        while running:
            first, part = running[0]
            pictures = await part
            running.popleft()
            begin()
            for index in sorted(pictures):
                yield _member(f"{first + index:08d}.{request.response_format}", pictures[index])
        yield bytes(2 * tarfile.BLOCKSIZE)
    finally:
        for _, part in running:
            part.cancel()


async def _draw_part(backend: Backend, task: Task) -> dict[int, bytes]:
    """The pictures of a part by their index in it. Where there is no room it waits. Raises Unserved."""
    lost = 0
    while True:
        pictures: dict[int, bytes] = {}
        problem: dict[str, Any] = {"status": 503, "detail": "the answer broke off"}
        try:
            async with aclosing(backend.draw(task)) as stream:  # type: ignore[type-var]
                async for events in stream:
                    for event in events:
                        if event["type"] == "picture":
                            pictures[event["index"]] = event["data"]
                        elif event["type"] == "done":
                            return pictures
                        elif event["type"] in ("refused", "failed"):
                            problem = event
        except Unserved as error:
            problem = {"status": error.status, "detail": error.detail, "retry_after": error.retry_after}
        except Exception as error:
            problem["detail"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        lost += problem["status"] != 429
        if problem["status"] == 422 or lost == TRIES:
            raise Unserved(problem["status"], problem["detail"])
        await asyncio.sleep(min(_LONGEST_WAIT_S, problem.get("retry_after") or 0.1))


def _member(name: str, data: bytes) -> bytes:
    header = tarfile.TarInfo(name)
    header.size = len(data)
    return header.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE)

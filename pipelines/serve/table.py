"""The requests of one frontend, by id: what has become of each, for whoever asks, follows or cancels it.

The frontend owns every id, whichever replica draws: there is one frontend, and it holds no model. A picture is a
pure function of its request, so one whose replica dies is drawn again by another.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, Protocol, cast

from pipelines.serve.replica import Task
from pipelines.serve.requests import Picture, SamplesRequest, SamplesResponse, Status

KEPT_S, KEPT_BYTES = 600.0, 256 * 2**20
"""For how long, and how much of, what is done can be fetched."""
TRIES = 3
_log = logging.getLogger("ldm.serve")


class Backend(Protocol):
    """What draws: a `Replica`, or a Ray Serve handle to several."""

    def draw(self, task: Task) -> AsyncIterator[list[dict[str, Any]]]:
        """See `pipelines.serve.replica`. Closing the iterator cancels the request."""

    async def describe(self) -> dict[str, Any]:
        """The models and limits; `waiting`."""


class Unserved(Exception):
    """A request that is not answered. status: of HTTP. retry_after: seconds, None where another try is no use."""

    def __init__(self, status: int, detail: str, retry_after: float | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.retry_after = status, detail, retry_after


class Record:
    """One request. pngs: by the picture's index."""

    def __init__(self, request: SamplesRequest) -> None:
        self.id, self.request = uuid.uuid4().hex, request
        self.status: Status = "waiting"
        self.detail: str | None = None
        self.http_status, self.retry_after = 500, cast(float | None, None)  # of one that failed
        self.began, self.ended = time.monotonic(), cast(float | None, None)
        self.taken: dict[str, Any] = {}
        self.steps_done = 0
        self.pngs: dict[int, bytes] = {}
        self.previews: dict[int, dict[str, Any]] = {}  # the newest of each picture
        self.known, self.finished = asyncio.Event(), asyncio.Event()  # taken or refused; over
        self.task: asyncio.Task[None] | None = None
        self._followers: set[asyncio.Queue[dict[str, Any]]] = set()

    def take(self, event: dict[str, Any]) -> None:
        """What a replica tells."""
        kind = event["type"]
        if kind == "taken":
            self.taken, self.status = event, "running"
            self.known.set()
        elif kind == "progress":
            self.steps_done = event["steps_done"]
        elif kind == "preview":
            self.previews[event["index"]] = event
        elif kind == "picture":
            self.pngs[event["index"]] = event["data"]
            self.previews.pop(event["index"], None)
        elif kind == "done":
            self.end("done")
        else:
            self.http_status, self.retry_after = event["status"], event.get("retry_after")
            self.end("failed", event["detail"])
        for follower in self._followers:
            follower.put_nowait(event)

    def end(self, status: Status, detail: str | None = None) -> None:
        if not self.finished.is_set():
            self.status, self.detail, self.ended = status, detail, time.monotonic()
            self.known.set()
            self.finished.set()
            for follower in self._followers:
                follower.put_nowait({"type": "over"})

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """All that is worth knowing of what was, then what comes; "quiet" now and then where nothing does."""
        queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._followers.add(queue)
        try:
            before = [{"type": "picture", "index": index, "data": png} for index, png in sorted(self.pngs.items())]
            over = self.finished.is_set()
            for event in [*before, *self.previews.values(), {"type": "progress"}]:
                yield event
            while not (over and queue.empty()):
                try:
                    event = await asyncio.wait_for(queue.get(), 15)
                except TimeoutError:
                    yield {"type": "quiet"}
                    continue
                if event["type"] == "over":
                    over = True
                else:
                    yield event
        finally:
            self._followers.discard(queue)

    def picture(self, index: int, *, png: str | None = None, link: bool = False) -> Picture:
        labels = self.taken["labels"]
        url = f"/v1/samples/{self.id}/{index}.png" if link else None
        label = None if labels is None else labels[index]
        return Picture(index=index, seed=self.taken["seeds"][index], label=label, url=url, png=png)

    def answer(self, pictures: list[Picture]) -> SamplesResponse:
        count = len(self.taken.get("seeds", ())) or self.request.count
        steps = count * self.taken.get("calls", 0)
        return SamplesResponse(
            id=self.id,
            status=self.status,
            model=self.taken.get("model", ""),
            step=self.taken.get("step", 0),
            num_images=count,
            images_done=len(self.pngs),
            steps=steps,
            steps_done=steps if self.status == "done" else self.steps_done,
            seconds=round((self.ended or time.monotonic()) - self.began, 3),
            detail=self.detail,
            events=f"/v1/samples/{self.id}/events",
            images=pictures,
        )


class Table:
    """The requests of the last minutes."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._records: dict[str, Record] = {}  # the oldest first

    async def start(self, request: SamplesRequest) -> Record:
        """Returns when a replica has taken the request. Raises Unserved where it is refused."""
        record = Record(request)
        self._forget_old()
        self._records[record.id] = record
        record.task = asyncio.create_task(self._follow(record))
        try:
            await record.known.wait()
        except asyncio.CancelledError:
            self.cancel(record)
            raise
        if record.status == "failed":
            del self._records[record.id]
            raise Unserved(record.http_status, record.detail or "", record.retry_after)
        return record

    def find(self, id: str) -> Record:
        """Raises Unserved where there is no such request, or no longer."""
        if id not in self._records:
            raise Unserved(404, f"id={id[:64]}: is no request of the last {KEPT_S / 60:.0f} minutes")
        return self._records[id]

    def cancel(self, record: Record) -> None:
        """Its pictures leave the batch at the next step. Nothing where it is over."""
        record.end("cancelled")
        if record.task is not None:
            record.task.cancel()

    async def _follow(self, record: Record) -> None:
        """Draws, and draws again where the replica is lost on the way."""
        request = record.request
        task = Task(request.part(0, request.count), bulk=False, first=0, count=request.count, events=request.background)
        problem = ""
        for _ in range(TRIES):
            try:
                async with aclosing(self.backend.draw(task)) as stream:  # type: ignore[type-var]
                    async for events in stream:
                        for event in events:
                            record.take(event)
                if record.finished.is_set():
                    return
                problem = "the answer broke off"
            except asyncio.CancelledError:
                record.end("cancelled")
                raise
            except Exception as error:
                problem = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            _log.warning("serve: request %s is drawn again: %s", record.id, problem)
        record.http_status, record.retry_after = 503, 5.0
        record.end("failed", f"the replica was lost {TRIES} times ({problem})")

    def _forget_old(self) -> None:
        """Of the requests that are over: those of long ago, and the oldest of too many pictures."""
        over = [record for record in self._records.values() if record.finished.is_set()]
        kept = sum(len(png) for record in over for png in record.pngs.values())
        for record in over:
            if time.monotonic() - (record.ended or 0) > KEPT_S or kept > KEPT_BYTES:
                kept -= sum(map(len, record.pngs.values()))
                del self._records[record.id]

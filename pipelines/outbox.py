"""What is on its way to MLflow: sent in order, tried again while the server is down, and kept in files meanwhile.

Callers only queue. Two threads send: what the tracking server takes, and the artifacts, which go to another store, so
that a fault of one holds up nothing of the other. A third thread keeps: a record that is not written after a few
seconds, because the server is down, slow or silent, becomes a line in a file, so that a kill loses none of it; once
all lines of a file are written the file is removed. With a server that answers nothing touches the disk. The next
tracker of the same folder sends what is left. Each file is written whole and never appended to, which is the same on a
local disk and on an object store.
"""

import json
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from ldm import storage
from pipelines.progress import say
from pipelines.tracking_records import (
    Artifact,
    Points,
    Record,
    Status,
    Upload,
    from_values,
    one_line,
    to_values,
)
from pipelines.tracking_writer import Writer

BACKOFF_S = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
KEEP_AFTER_S = 5.0
UPLOAD_WAIT_S = 600.0
"""How long the end of a stage waits for weights that are on their way, and meet no fault."""
_KEEP_EVERY_S = 1.0
_PREFIX = "backlog-"
_AT_ONCE = 200  # records of points in one request


@dataclass(eq=False)
class _Item:
    run_id: str
    record: Record
    since: float  # on the monotonic clock
    file: str | None = None  # that keeps it


@dataclass(eq=False)
class _Lane:
    """What one thread sends. failures: of the first item, one after the other."""

    items: deque[_Item] = field(default_factory=deque)
    failures: int = 0


class Outbox:
    """The queue of one run.

    Args:
        uri: of the server, for what is kept may only be sent there.
        folder: URL of the folder of what is kept; None: what is not sent at the end is lost.
    """

    def __init__(self, writer: Writer, uri: str, run_id: str, folder: str | None) -> None:
        self.uri, self.run_id, self.folder = uri, run_id, folder
        self.refused: list[str] = []
        self._writer = writer
        self._run, self._artifacts = self._lanes = (_Lane(), _Lane())
        self._changed, self._keeping = threading.Condition(), threading.Lock()
        self._known: set[str] = set()  # files that this outbox wrote or read
        self._ready = self._closing = self._abandoned = self._says_down = self._says_unkept = False
        self._keeper = self._start(self._keep_loop)
        self._senders = [self._start(self._send_loop, lane) for lane in self._lanes]

    def put(self, record: Record) -> None:
        with self._changed:
            self._lane(record).items.append(_Item(self.run_id, record, time.monotonic()))
            self._changed.notify_all()

    def secure(self, seconds: float) -> None:
        """Waits until all that is queued now is written or in a file: after so long it is put into one."""

        def unsafe() -> list[_Item]:
            pending = set(self._pending())
            return [item for item in queued if item.file is None and item in pending]

        with self._changed:
            queued = self._pending()
            self._changed.wait_for(lambda: not unsafe() or any(lane.failures for lane in self._lanes), seconds)
            left = unsafe()
        if left and self.folder:
            self._keep(self.folder, left)

    def close(self, seconds: float, load: bool) -> tuple[int, int]:
        """Sends what is left, for at most so long, and keeps the rest.

        load: sends, too, what other trackers of the folder have kept by now. Returns how many records are kept, and
        how many are lost.
        """
        if load:
            self._load()
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        deadline = time.monotonic() + seconds
        for lane, sender in zip(self._lanes, self._senders, strict=True):
            sender.join(max(0.0, deadline - time.monotonic()))
            while sender.is_alive() and self._uploads(lane) and time.monotonic() < deadline + UPLOAD_WAIT_S:
                sender.join(1.0)
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()
        self._keeper.join()
        kept = [item.file is not None for item in self._pending()]
        return kept.count(True), kept.count(False)

    def _start(self, target: Callable[..., None], *args: Any) -> threading.Thread:
        thread = threading.Thread(target=target, args=args, name="tracking", daemon=True)
        thread.start()
        return thread

    def _lane(self, record: Record) -> _Lane:
        return self._artifacts if isinstance(record, Artifact | Upload) else self._run

    def _pending(self) -> list[_Item]:
        return [item for lane in self._lanes for item in lane.items]

    def _uploads(self, lane: _Lane) -> bool:
        with self._changed:
            calm = not any(other.failures for other in self._lanes)  # it may wait for the other lane
            return bool(lane.items) and isinstance(lane.items[0].record, Upload) and calm

    def _send_loop(self, lane: _Lane) -> None:
        while batch := self._next(lane):
            try:
                refused = self._writer.write(batch[0].run_id, [item.record for item in batch])
            except Exception as error:  # any client, server or network fault: it is tried again
                self._failed(lane, error)
            else:
                self._done(lane, batch, refused)

    def _next(self, lane: _Lane) -> list[_Item]:
        """Waits for what is to be sent next; nothing where this thread has no more to do."""
        with self._changed:
            if lane.failures:
                pause = BACKOFF_S[0] if self._closing else BACKOFF_S[min(lane.failures, len(BACKOFF_S)) - 1]
                closing = self._closing
                self._changed.wait_for(lambda: self._abandoned or self._closing != closing, pause)
            self._changed.wait_for(lambda: self._abandoned or (self._ready and self._may_go_on(lane)))
            if self._abandoned or not lane.items:
                return []
            first = lane.items[0]
            batch: list[_Item] = []
            for item in islice(lane.items, _AT_ONCE):
                if batch and not (isinstance(item.record, Points) and item.run_id == first.run_id):
                    break
                batch.append(item)
                if not isinstance(item.record, Points):
                    break
            return batch

    def _may_go_on(self, lane: _Lane) -> bool:
        """Whether there is something to be sent now, or nothing more. Weights wait for the model that they go into."""
        if not lane.items:
            return self._closing
        first = lane.items[0]
        others = () if lane is self._run or not isinstance(first.record, Upload) else self._run.items
        return not any(item.since <= first.since for item in others)

    def _failed(self, lane: _Lane, error: Exception) -> None:
        with self._changed:
            lane.failures += 1
            says, self._says_down = not self._says_down, True
            self._changed.notify_all()
        if says:
            say(f"tracking: {self.uri} cannot be written to now, goes on and sends later ({one_line(error)})")

    def _done(self, lane: _Lane, batch: list[_Item], refused: list[str]) -> None:
        with self._changed:
            self.refused += refused
            for _ in batch:
                lane.items.popleft()
            lane.failures = 0
            back = self._says_down and not any(other.failures for other in self._lanes)
            self._says_down = self._says_down and not back
            self._changed.notify_all()
        if back:
            say(f"tracking: {self.uri} is written to again")
        self._forget({item.file for item in batch})

    def _forget(self, files: set[str | None]) -> None:
        """Removes the files of which no record is left to be sent."""
        with self._changed:
            left = files - {item.file for item in self._pending()} - {None}
        for file in left:
            try:
                storage.remove(str(file))
            except OSError as error:  # the next tracker sends it again, which changes nothing
                say(f"tracking: {error}")

    def _keep_loop(self) -> None:
        self._load()
        with self._changed:
            self._ready = True
            self._changed.notify_all()
        last = False
        while not last:
            with self._changed:
                self._changed.wait_for(lambda: self._abandoned or bool(self._late()), _KEEP_EVERY_S)
                last, late = self._abandoned, self._late()
            if late and self.folder:
                self._keep(self.folder, late)
                with self._changed:  # many records in a file, not a file for each
                    self._changed.wait_for(lambda: self._abandoned, _KEEP_EVERY_S)

    def _late(self) -> list[_Item]:
        """What should be in a file by now and is not."""
        before = time.monotonic() - KEEP_AFTER_S
        return [
            item
            for lane in self._lanes
            for item in lane.items
            if item.file is None and (lane.failures or self._abandoned or item.since < before)
        ]

    def _keep(self, folder: str, items: list[_Item]) -> None:
        with self._keeping:
            self._write_file(folder, [item for item in items if item.file is None])

    def _write_file(self, folder: str, items: list[_Item]) -> None:
        if not items:
            return
        url = storage.join(folder, f"{_PREFIX}{time.time_ns()}-{uuid.uuid4().hex[:8]}.jsonl")
        lines = [{"uri": self.uri, "run_id": item.run_id, **to_values(item.record)} for item in items]
        with self._changed:
            self._known.add(url)
        try:
            storage.write_bytes(url, "".join(json.dumps(line) + "\n" for line in lines).encode())
        except OSError as error:
            if not self._says_unkept:
                say(f"tracking: what waits to be sent cannot be kept ({one_line(error)})")
            self._says_unkept = True
            return
        with self._changed:
            for item in items:
                item.file = url
        self._forget({url})  # where all of it was sent meanwhile

    def _load(self) -> None:
        """Queues what earlier trackers have kept, before all that is new."""
        if self.folder is None:
            return
        try:
            urls = [storage.join(self.folder, name) for name in kept_files(self.folder)]
        except OSError as error:
            say(f"tracking: {error}")
            return
        with self._changed:
            urls = [url for url in urls if url not in self._known]
            self._known.update(urls)
        items = [item for url in urls for item in self._read(url)]
        with self._changed:
            for lane in self._lanes:
                # How the run that goes on now once ended is no longer true.
                old = [item for item in items if self._lane(item.record) is lane and not self._is_own_status(item)]
                if self._ready:  # what stands first may be on its way
                    lane.items.extend(old)
                else:
                    lane.items.extendleft(reversed(old))
            self._changed.notify_all()
        self._forget({item.file for item in items})  # where nothing in one is left to be sent

    def _read(self, url: str) -> list[_Item]:
        try:
            lines = storage.read_json_lines(url)
            if others := {line["uri"] for line in lines} - {self.uri}:
                say(f"tracking: {url} waits for {', '.join(sorted(others))}, and is left there")
                return []
            return [_Item(line["run_id"], from_values(line), time.monotonic(), url) for line in lines]
        except FileNotFoundError:  # another tracker has sent it
            return []
        except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
            say(f"tracking: {url} cannot be read, and is left there ({one_line(error)})")
            return []

    def _is_own_status(self, item: _Item) -> bool:
        return isinstance(item.record, Status) and item.run_id == self.run_id


def kept_files(folder: str) -> list[str]:
    """Names of the files that wait to be sent, the oldest first."""
    return [name for name in storage.list_dir(folder) if name.startswith(_PREFIX) and name.endswith(".jsonl")]

"""A process that draws: the loaded models, the thread that steps them, and requests as streams of events. No Ray in it.

A request goes in as plain values and comes out as batches of events (`pipelines.serve.events`), so that it may come
from another process.
"""

import asyncio
import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from ldm.buckets import measure_buckets
from ldm.config import RequestError, validate
from ldm.drawing import load_sampler
from ldm.engine import StepEngine
from ldm.job import Event, Finished, Job, Preview, Progress
from ldm.sharing import Refused
from ldm.snapshot import Snapshot
from pipelines.serve.catalog import Catalog, Version
from pipelines.serve.config import ServeConfig
from pipelines.serve.events import Taken, describe
from pipelines.serve.requests import BulkRequest, SamplesRequest

_NICE = 19
_log = logging.getLogger("ldm.serve")
Observe = Callable[[str, float], None]
"""(name of a metric, value): see `pipelines.serve.metrics`."""


@dataclass(frozen=True)
class Task:
    """Pictures `first` to `first + count` of a request. body: its JSON. events: whether progress is told."""

    body: dict[str, Any]
    bulk: bool
    first: int
    count: int
    events: bool = False


@dataclass
class _Model:
    version: Version
    engine: StepEngine
    used: float = field(default_factory=time.monotonic)

    @property
    def snapshot(self) -> Snapshot:
        return self.version.snapshot


class Replica:
    """The models of one process. Raises RequestError where the default one cannot be loaded.

    device: "cpu" or "cuda". observe: is told the figures of the metrics.
    """

    def __init__(self, config: ServeConfig, device: str, observe: Observe = lambda name, value: None) -> None:
        self.config, self.device, self.observe = config, device, observe
        self.catalog = Catalog(config.snapshot)
        self._models: dict[tuple[str, str], _Model] = {}  # by URL and weights
        self._loading = threading.Lock()
        self._wake, self._stopped = threading.Event(), threading.Event()
        self._num_threads = torch.get_num_threads()  # each thread has a number of its own
        self._default = self._load(self.catalog.default())
        self._threads = [threading.Thread(target=self._step_all, daemon=True)]
        if config.refresh_s > 0:
            self._threads.append(threading.Thread(target=self._follow_default, daemon=True))
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Ends the threads. Jobs that are not done stay so."""
        self._stopped.set()
        self._wake.set()
        for thread in self._threads:
            thread.join()

    def check(self) -> None:
        """Raises RuntimeError where nothing is drawn any more."""
        if not all(thread.is_alive() for thread in self._threads):
            raise RuntimeError("a thread of the replica has ended")

    @property
    def waiting(self) -> int:
        """Requests that are here, those that are drawn included."""
        return sum(len(model.engine.jobs) for model in list(self._models.values()))

    def describe(self) -> dict[str, Any]:
        """What can be asked for: the body of /v1/models."""
        loaded = {model.version.name for model in list(self._models.values())}
        default, config = self._default.version, self.config
        versions = {version.name: version for version in self.catalog.versions()} | {default.name: default}
        listed = sorted(versions.values(), key=lambda version: (version != default, -version.snapshot.step))
        return {
            "models": [
                {"name": v.name, "default": v == default, "loaded": v.name in loaded, **describe(v.snapshot)}
                for v in listed
            ],
            "limits": {
                "max_images": config.max_images,
                "max_steps": config.max_steps,
                "batch_size": self._default.engine.capacity,
                "deadline_s": config.deadline_s,
                "precision": config.precision,
                "compile": config.compile,
                "device": self.device,
            },
            "waiting": self.waiting,
        }

    async def draw(self, task: Task) -> AsyncIterator[list[dict[str, Any]]]:
        """The events of a request, some at a time. Closing the iterator cancels it."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def emit(event: Event) -> None:
            if task.events or not isinstance(event, Progress):
                with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is there to be told
                    loop.call_soon_threadsafe(queue.put_nowait, event)

        began, previewed, ended = time.monotonic(), False, False
        taking = asyncio.ensure_future(asyncio.to_thread(self._take, task, emit))
        try:
            engine, taken = await asyncio.shield(taking)
        except asyncio.CancelledError:
            taking.add_done_callback(_cancel_taken)
            raise
        except RequestError as error:
            yield [{"type": "refused", "status": 422, "detail": str(error), "retry_after": None}]
            return
        except Refused as error:
            self.observe("refused", 1)
            yield [{"type": "refused", "status": 429, "detail": str(error), "retry_after": error.retry_after}]
            return
        try:
            yield [taken.event()]
            while not ended:
                events = [await queue.get()]
                while not queue.empty():
                    events.append(queue.get_nowait())
                told = [event for event in events if not isinstance(event, Progress)]
                progress = [event for event in events if isinstance(event, Progress)][-1:]
                if not previewed and any(isinstance(event, Preview) for event in events):
                    previewed = True
                    self.observe("first_preview_s", time.monotonic() - began)
                ended = isinstance(events[-1], Finished)
                yield await asyncio.to_thread(taken.encode, [*progress, *told], task.bulk and _is_npy(task))
        finally:
            if not ended:
                engine.cancel(taken.job)
                self.observe("cancelled", 1)

    def _take(self, task: Task, emit: Callable[[Event], None]) -> tuple[StepEngine, Taken]:
        """Checks the request and queues it. Raises RequestError and Refused."""
        request = validate(BulkRequest if task.bulk else SamplesRequest, task.body)
        config = self.config
        if request.num_inference_steps > config.max_steps:
            raise RequestError(
                f"num_inference_steps={request.num_inference_steps}: the most here is {config.max_steps}"
            )
        if not task.bulk and request.count > config.max_images:
            raise RequestError(
                f"num_images={request.count}: the most in one request is {config.max_images}; use /v1/bulk"
            )
        model = self._model(request.model)
        request.check(model.snapshot)
        labels, seeds = request.rows(model.snapshot.conditioning, task.first, task.count)
        seconds = request.deadline_s or (None if task.bulk else config.deadline_s)
        job = Job(
            request,
            labels,
            seeds,
            emit,
            source=request.source(model.snapshot, task.first, task.count),
            exact=request.exact,
            previews=getattr(request, "previews", 0),
            deadline=None if seconds is None else time.monotonic() + seconds,
        )
        model.engine.submit(job)
        model.used = time.monotonic()
        self._wake.set()
        settings = request.settings() | {
            "batch_size": max(1, model.engine.capacity // job.rows),  # of an `ldm sample` with calls of as many rows
            "precision": config.precision,
            "compile": config.compile,
            "device": self.device,
        }
        return model.engine, Taken(model.version.name, model.snapshot, job, settings)

    def _model(self, name: str | None) -> _Model:
        """The model of this name, loaded where it is not. Raises RequestError and Refused."""
        default = self._default
        if name is None or name == default.version.name:
            return default
        version = self.catalog.find(name)
        with self._loading:
            try:
                return self._load(version)
            except (OSError, ValueError) as error:  # RequestError is one
                raise RequestError(f"model={name}: cannot be loaded ({error})") from None

    def _make_room(self) -> None:
        """Lets go of the model that was not asked for longest. Raises Refused where all are at work."""
        while len(self._models) >= self.config.max_models:
            idle = [model for model in self._models.values() if model is not self._default and not model.engine.jobs]
            if not idle:
                raise Refused("as many models as fit are at work; try again in a moment", 5.0)
            del self._models[min(idle, key=lambda model: model.used).version.key]

    def _load(self, version: Version) -> _Model:
        """A model that is ready: each batch shape was computed once. Raises RequestError, ValueError and Refused."""
        if version.key not in self._models:
            self._make_room()
            # In a thread that ends. Each thread that computes has its OpenMP threads, and while there are more of these
            # than cores all of them sleep at every barrier: calls of few rows took twice as long.
            with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(self._num_threads,)) as thread:
                self._models[version.key] = thread.submit(self._ready, version).result()
        return self._models[version.key]

    def _ready(self, version: Version) -> _Model:
        config = self.config
        capacity = None if config.batch_size == "auto" else int(config.batch_size)
        if self._models:  # one size for all versions: it is a part of what an exact picture depends on
            capacity = self._default.engine.capacity
        sampler = load_sampler(
            version.snapshot.url, capacity or 1, self.device, config.denoiser_type, config.precision, config.compile
        )
        engine = StepEngine(sampler, measure_buckets(sampler, capacity), config.max_waiting)
        sampler.decode(torch.zeros(1, *sampler.latent_shape, device=sampler.device))
        return _Model(version, engine)

    def _step_all(self) -> None:
        torch.set_num_threads(self._num_threads)
        if self.device == "cpu" and sys.platform == "linux":
            # This thread, and those of OpenMP that it starts: what answers requests needs a core for a moment only. Ray
            # gives its workers a niceness of 15.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        while not self._stopped.is_set():
            self._wake.clear()
            for model in list(self._models.values()):
                if model.engine.step():
                    self._wake.set()
                    self._observe_call(model.engine)
            self._wake.wait()

    def _observe_call(self, engine: StepEngine) -> None:
        self.observe("queue", self.waiting)
        if engine.last_call is not None:
            rows, _, seconds = engine.last_call
            self.observe("occupancy", rows / engine.capacity)
            self.observe("step_s", seconds)

    def _follow_default(self) -> None:
        """Switches to a newer version when it is loaded and warm; a broken one leaves the old one in its place."""
        told = None
        while not self._stopped.wait(self.config.refresh_s):
            try:
                version = self.catalog.default()
                if version.key != self._default.version.key:
                    with self._loading:
                        self._default, before = self._load(version), self._default
                    _log.warning("serve: %s takes the place of %s", _named(version), _named(before.version))
                told = None
            except Refused:  # no room yet: the models that are loaded are at work
                continue
            except Exception as error:  # it goes on with what it has, whatever the new version is
                text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                if text != told:
                    _log.error("serve: goes on with %s: %s", _named(self._default.version), text)
                told = text


def _cancel_taken(taking: "asyncio.Future[tuple[StepEngine, Taken]]") -> None:
    """Nobody waits any more for a request that was being taken."""
    if not taking.cancelled() and taking.exception() is None:
        engine, taken = taking.result()
        engine.cancel(taken.job)


def _named(version: Version) -> str:
    return f"{version.name} (step {version.snapshot.step})"


def _is_npy(task: Task) -> bool:
    return task.body.get("response_format") == "npy"

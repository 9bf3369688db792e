"""A training on gloo ranks that saves through the Saver, and a killer that strikes at a request to the object store."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines.train import zero
from pipelines.train.checkpoint import Part, checkpoint_url, committed_steps, read_full, save_checkpoint
from pipelines.train.checkpoint_files import CheckpointError, read_marker
from pipelines.train.ema import Ema, EmaProfile
from pipelines.train.resume import find_origin, resume
from pipelines.train.saver import Saver
from tests.chaos_s3 import ChaosProxy
from tests.pipelines import gloo, tiny


class Run:
    """A training on this rank. saved: (URL, progress) of what was called after each commit."""

    def __init__(self, rank: int, world: int, output: str, stage: int = 1) -> None:
        self.engine = tiny.engine(rank, world, stage, "fp32", seed=5)
        self.ema = Ema(self.engine.state, (EmaProfile("main", 0.9),))
        self.step, self.output = 0, output
        self.saved: list[tuple[str, dict[str, Any]]] = []
        self.saver = Saver(
            output,
            self.engine.state,
            self.ema,
            before_commit=lambda: None,
            after_commit=lambda url, progress: self.saved.append((url, progress)),
            keep_last=9,
        )

    @classmethod
    def resumed(cls, rank: int, world: int, output: str) -> tuple[Run, str | None]:
        """A new one that has gone on as `resume` says, and the URL from which."""
        run = cls(rank, world, output)
        try:
            origin = find_origin(output, zero.all_gather)
            url, progress = origin.url, resume(output, origin, run.engine.state, run.ema, zero.all_gather)
        except CheckpointError:
            run.engine.close()
            raise
        run.step = progress.get("step", 0)
        return run, url

    def train(self, steps: int = 1) -> None:
        for _ in range(steps):
            tiny.train_step(self.engine, self.step)
            self.ema.update()
            self.step += 1

    def save(self) -> None:
        self.saver.save({"step": self.step})

    def save_now(self, output: str) -> str:
        """The same moment without the saver."""
        return save_checkpoint(output, Part.of(self.engine.state, self.ema), {"step": self.step}, zero.all_gather)


def files(url: str) -> list[Any]:
    """The counters of a checkpoint, and the names, sizes and hashes of its files, which are whole."""
    marker = read_marker(url)
    for kind in ("master", "exp_avg", "exp_avg_sq", "ema.main", "buffer"):
        read_full(url, kind)  # verifies
    return [marker["optimizer_step"], marker["ema"], *marker["files"]]


def train_to(rank: int, world: int, output: str, last: int, pids: str) -> None:
    """Goes on to the step `last` and saves each; names its process in the folder `pids`."""
    run, _ = Run.resumed(rank, world, output)
    Path(pids, str(rank)).write_text(str(os.getpid()))
    while run.step < last:
        run.train()
        run.save()
    run.saver.close()


class Killer:
    """Kills `victim` with SIGKILL where it pleases `moment(method, path)`, once; that request gets lost if `drop`."""

    def __init__(self, chaos: ChaosProxy, pids: str) -> None:
        self.pids, self.killed = pids, False
        self._lock, self._pass_on = threading.Lock(), chaos.fault
        chaos.fault = self._fault  # type: ignore[method-assign]
        self.moment: Callable[[str, str], bool] = lambda method, path: False

    def arm(self, moment: Callable[[str, str], bool], victim: int, drop: bool) -> None:
        self.moment, self.victim, self.drop, self.killed = moment, victim, drop, False

    def _fault(self, method: str, path: str) -> str:
        with self._lock:
            if self.killed or not self.moment(method, path):
                return self._pass_on(method, path)
            self.killed = True
            os.kill(int(Path(self.pids, str(self.victim)).read_text()), signal.SIGKILL)
            return "reset" if self.drop else ""


def killed_run(output: str, last: int, pids: str, start: str = "spawn") -> str:
    """Trains on two ranks; what went wrong, or ""."""
    try:
        gloo.run(train_to, 2, output, last, pids, start=start)
    except RuntimeError as error:
        return str(error)
    return ""


def assert_whole(output: str, reference: str) -> int:
    """Every committed checkpoint is that of an undisturbed run, bit for bit. Returns the newest one's step, or 0."""
    steps = committed_steps(output)
    for step in steps:
        assert files(checkpoint_url(output, step)) == files(checkpoint_url(reference, step))
    return max(steps, default=0)


def upload(name: str, nth: int = 1) -> Callable[[str, str], bool]:
    """The moment of the n-th upload whose path matches `name`."""
    seen = 0

    def moment(method: str, path: str) -> bool:
        nonlocal seen
        seen += method == "PUT" and re.search(name, path) is not None
        return seen == nth

    return moment

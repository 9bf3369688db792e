"""Kills workers of a run that goes on in this process's Ray, at random moments."""

import contextlib
import os
import random
import signal
import threading
import time

import psutil

from pipelines.train.checkpoint import committed_steps
from tests.processes import named


class Killer(threading.Thread):
    """SIGKILLs a worker `times` times: each at a random moment after the first checkpoint of a start.

    kills: time.time() of each.
    """

    def __init__(self, output: str, times: int, seed: int = 0, spread_s: float = 1.0) -> None:
        super().__init__(daemon=True)
        self.output, self.times, self.spread_s = output, times, spread_s
        self.random = random.Random(seed)
        self.kills: list[float] = []
        self.over = threading.Event()

    def run(self) -> None:
        killed, found, step = set[int](), list[int](), 0
        while len(self.kills) < self.times and not self.over.is_set():
            found = [pid for pid in found if psutil.pid_exists(pid)] or [p for p in _workers() if p not in killed]
            if found and max(committed_steps(self.output), default=0) > step:
                time.sleep(self.random.uniform(0, self.spread_s))
                step = max(committed_steps(self.output))
                killed.update(found)
                with contextlib.suppress(ProcessLookupError):  # ended by itself in the meantime
                    os.kill(self.random.choice(found), signal.SIGKILL)
                    self.kills.append(time.time())
                found = []
            time.sleep(0.01)


def _workers() -> list[int]:
    """The processes of Ray Train's workers below this one."""
    return sorted(process.pid for process in named("ray::RayTrainWorker"))

"""What is averaged between two points of the log, and what becomes of it."""

import contextlib
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch


@dataclass
class Window:
    """Sums since the last point of the log, the same on all ranks. They are saved, so that a resumed run logs the same
    points."""

    loss: float = 0.0
    grad_norm: float = 0.0
    applied: int = 0
    skipped: int = 0


@dataclass
class Clock:
    """Of this process, and of no other."""

    started: float = field(default_factory=time.monotonic)
    waited: float = 0.0
    steps: int = 0


class Meter:
    """Sums up steps, and turns them into the metrics of a point.

    flops_per_image: of training; None where they are not known. matmul_flops: of one worker in a second, measured.
    """

    def __init__(self, global_batch_size: int, world: int, flops_per_image: float | None, matmul_flops: float) -> None:
        self.global_batch_size = global_batch_size
        self._flops_per_image, self._matmul_flops = flops_per_image, matmul_flops * world
        self.window, self.clock = Window(), Clock()

    def state(self) -> dict[str, Any]:
        """JSON that `load` takes back."""
        return asdict(self.window)

    def load(self, state: dict[str, Any]) -> None:
        self.window = Window(**state)

    def restart(self) -> None:
        """Time begins to count."""
        self.clock = Clock()

    def add(self, applied: bool, loss: float, grad_norm: float) -> None:
        """One step of all ranks."""
        self.clock.steps += 1
        if applied:
            self.window.applied += 1
            self.window.loss += loss
            self.window.grad_norm += grad_norm
        else:
            self.window.skipped += 1

    def point(self, device: torch.device) -> dict[str, float]:
        """The metrics since the last point; the next ones begin here. perf/mfu: FLOPs of training an image x images a
        second / (workers x the matmul rate of one)."""
        window, clock = self.window, self.clock
        self.window, self.clock = Window(), Clock()
        means = {"train/loss": window.loss, "train/gradient_norm": window.grad_norm}
        seconds = max(1e-9, time.monotonic() - clock.started)
        rate = clock.steps * self.global_batch_size / seconds
        return {
            **({key: total / window.applied for key, total in means.items()} if window.applied else {}),
            "train/skipped_steps": window.skipped,
            "perf/images_per_second": rate,
            "perf/step_seconds": seconds / max(1, clock.steps),
            **({"perf/mfu": rate * self._flops_per_image / self._matmul_flops} if self._flops_per_image else {}),
            "perf/matmul_tflops": self._matmul_flops / 1e12,
            "perf/memory_gb": peak_memory(device) / 1e9,
            "data/wait_share": clock.waited / seconds,
        }

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """For data."""
        began = time.monotonic()
        yield
        self.clock.waited += time.monotonic() - began

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """For what is no training, such as validation: its time is left out."""
        began = time.monotonic()
        yield
        self.clock.started += time.monotonic() - began


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU, or of this process on a CPU, at most so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

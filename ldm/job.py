"""What the engine draws: jobs of pictures, each on its own way through its plan, and the events that are told of it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import Tensor

from ldm.drawing import Blend, Edit
from ldm.plan import SamplerConfig, SamplingPlan


@dataclass(frozen=True)
class Progress:
    """Steps and pictures done, of all pictures of the job together."""

    steps_done: int
    images_done: int


@dataclass(frozen=True)
class Preview:
    """The x0 that a picture's step predicts, raw pixels uint8 (3, H, W)."""

    index: int
    steps_done: int
    pixels: Tensor


@dataclass(frozen=True)
class Drawn:
    """A finished picture, raw pixels uint8 (3, H, W)."""

    index: int
    pixels: Tensor


@dataclass(frozen=True)
class Finished:
    """The last event of a job: all is drawn, or why not. late: for its deadline."""

    problem: str | None = None
    late: bool = False


Event = Progress | Preview | Drawn | Finished


@dataclass(eq=False)
class Job:
    """Pictures of one setting.

    labels, seeds: int64 (N,); labels None for an unconditional model. source: where they start, of seeds or of pictures
    without a mask; None: from the seeds' noise. emit: is told each event, in the engine's thread, and must be quick.
    exact: always in the largest bucket, so that the bits do not depend on what else is drawn. previews: how often each
    picture shows its x0 on the way. deadline: of `time.monotonic`, None for none.
    """

    settings: SamplerConfig
    labels: Tensor | None
    seeds: Tensor
    emit: Callable[[Event], None]
    source: Blend | Edit | None = None
    exact: bool = False
    previews: int = 0
    deadline: float | None = None

    plan: SamplingPlan = field(init=False)
    steps_done: int = field(init=False, default=0)
    images_done: int = field(init=False, default=0)
    running: list["Picture"] = field(init=False, default_factory=list)
    started: int = field(init=False, default=0)

    @property
    def steps(self) -> int:
        """Calls of the denoiser that each picture takes."""
        return len(self.plan.steps)

    @property
    def rows(self) -> int:
        """Rows of a call that a picture takes: the guided answer needs two."""
        return 1 if self.settings.guidance_scale == 1 else 2

    @property
    def work_left(self) -> int:
        """Rows of all calls to come."""
        return (len(self.seeds) * self.steps - self.steps_done) * self.rows

    @property
    def rows_left(self) -> int:
        """Rows that its pictures take in a call with room for all of them."""
        return (len(self.seeds) - self.images_done) * self.rows

    @property
    def longest_left(self) -> int:
        """Calls that the last of its pictures needs, were there room for all."""
        if self.started < len(self.seeds):
            return self.steps
        return max((self.steps - picture.step for picture in self.running), default=0)

    def pictures(self) -> Iterator["Picture"]:
        """Those that could take a step, the oldest first; new ones begin as they are asked for."""
        yield from list(self.running)
        while self.started < len(self.seeds):
            self.running.append(Picture(self, self.started))
            self.started += 1
            yield self.running[-1]


@dataclass(eq=False)
class Picture:
    """One picture on its way. x, x0: (C, h, w), None before the first step."""

    job: Job
    index: int
    step: int = 0
    x: Tensor | None = None
    x0: Tensor | None = None

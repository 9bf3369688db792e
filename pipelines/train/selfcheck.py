"""`ldm verify --resume`: whether a run that loses a worker ends as one that does not, on the hardware at hand.

Two runs that nothing disturbs show what this hardware repeats at all: their difference is the floor. A third one loses
a worker to SIGKILL and goes on; its weights, moments, averages and losses are held against the first.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from pydantic import Field
from torch import Tensor

from ldm import storage
from ldm.config import Location, RequestError, validate
from pipelines import cluster
from pipelines.progress import say
from pipelines.train.checkpoint import checkpoint_url, committed_steps, newest_checkpoint, read_full
from pipelines.train.checkpoint_files import read_marker
from pipelines.train.config import TrainConfig
from pipelines.train.killer import killing
from pipelines.train.run import plan, train

MARGIN = 2.0
"""A resumed run may differ by so many times the floor: one pair of runs measures it roughly."""
_CHECKPOINTS = 4  # of a run; their losses cover all of its steps


class ResumeCheckConfig(TrainConfig):
    """Whether a resumed run ends as one that was never stopped: trains three times, shortly, with the keys of train."""

    output: Location = Field(
        "ldm-resume-check",
        description="where the three runs go meanwhile, which every node reaches; removed at the end",
    )
    steps: int = Field(24, ge=8, multiple_of=4, description="optimizer steps of each run, in place of max_steps")


@dataclass(frozen=True)
class ResumeCheckReport:
    """What scripts may rely on: ok and verdict, "equal", "within the floor" or "different".

    floor, difference: the largest absolute difference of two undisturbed runs, and of the resumed run, in all that was
    compared. first_difference: the tensor, index and values where the resumed run differs; "" where it does not.
    """

    ok: bool
    verdict: str
    floor: float
    difference: float
    first_difference: str
    compared: int
    steps: int
    resumed_from: int
    exit_code: int = 0


@dataclass(frozen=True)
class Difference:
    """Of two runs. by_kind: the largest absolute difference in the weights, in each moment, average, and the losses."""

    by_kind: Mapping[str, float] = field(default_factory=dict)
    first: str = ""
    compared: int = 0  # elements

    @property
    def largest(self) -> float:
        return max(self.by_kind.values(), default=0.0)

    def within(self, floor: Difference) -> bool:
        return all(found <= MARGIN * floor.by_kind[kind] for kind, found in self.by_kind.items())


def check_resume(config: ResumeCheckConfig) -> ResumeCheckReport:
    """Trains twice undisturbed and once with a worker killed, and compares. Raises RequestError before any work.

    RuntimeError where the run was over before its worker could be killed.
    """
    scratch = storage.join(storage.absolute(config.output), f"resume-check-{uuid.uuid4().hex[:8]}")
    first, second, third = (storage.join(scratch, name) for name in ("first", "second", "killed"))
    plan(short_run(config, first))
    was_there = storage.exists(config.output)
    try:
        with cluster.ray_session():
            for number, output in enumerate((first, second), 1):
                say(f"verify: run {number} of 3, undisturbed")
                train(short_run(config, output))
            floor = compare(first, second)
            storage.remove(second)
            say(f"verify: floor of this hardware: {floor.first or 'none, two runs are equal to the last bit'}")
            say("verify: run 3 of 3, one worker of which is killed")
            with killing(third) as kills:
                train(short_run(config, third))
            found = compare(first, third)
    finally:
        storage.remove(scratch)
        if not was_there and storage.is_local(config.output):
            with contextlib.suppress(OSError):  # somebody else's files came into it meanwhile
                storage.local_path(config.output).rmdir()
    return report(config, floor, found, kills)


def report(config: ResumeCheckConfig, floor: Difference, found: Difference, kills: list[int]) -> ResumeCheckReport:
    """The verdict. kills: the step of the checkpoint that was newest when the worker was killed."""
    if not kills or kills[0] >= config.steps:
        raise RuntimeError("the run was over before its worker could be killed: nothing was shown; give larger steps")
    ok = found.within(floor)
    made = ResumeCheckReport(
        ok=ok,
        verdict="equal" if not found.first else "within the floor" if ok else "different",
        floor=floor.largest,
        difference=found.largest,
        first_difference=found.first,
        compared=found.compared,
        steps=config.steps,
        resumed_from=kills[0],
        exit_code=0 if ok else 1,
    )
    where = f"; {found.first}" if found.first else ""
    say(f"verify: resumed from step {made.resumed_from} of {made.steps}: {made.verdict}{where}")
    return made


def short_run(config: ResumeCheckConfig, output: str) -> TrainConfig:
    """One of the runs of a check: its length, log, checkpoints, validation and tracking are the check's own.

    Raises RequestError.
    """
    least, most = config.workers_range
    if least != most:  # a worker that is lost might leave another world, which rounds otherwise
        raise RequestError(f"num_workers=[{least}, {most}]: a resume is exact in one world; give num_workers={most}")
    values = config.model_dump(exclude={"steps"}) | {
        "output": output,
        "max_steps": config.steps,
        "checkpoint_every": config.steps // _CHECKPOINTS,
        "log_every": config.steps // _CHECKPOINTS,
        "keep_last": _CHECKPOINTS,
        "keep_every": None,
        "resume": "auto",
        "resume_from": None,
        "max_failures": max(1, config.max_failures),
        "tracking": config.tracking.model_copy(update={"enabled": False}).model_dump(),
        "validation": config.validation.model_copy(update={"images": 0, "grid": 0}).model_dump(),
    }
    return validate(TrainConfig, values)


def compare(one: str, other: str) -> Difference:
    """All that two finished runs of the same steps hold: the state in the newest checkpoint, and the logged losses."""
    newest = [newest_checkpoint(output) for output in (one, other)]
    assert newest[0] is not None and newest[1] is not None, (one, other)
    profiles = sorted(read_marker(newest[0])["ema"])
    by_kind, first, compared = {}, "", 0
    for kind in ("master", "exp_avg", "exp_avg_sq", *(f"ema.{name}" for name in profiles), "loss"):
        ones, others = (
            _losses(output) if kind == "loss" else read_full(str(url), kind)
            for output, url in zip((one, other), newest, strict=True)
        )
        if ones.keys() != others.keys():
            raise RuntimeError(
                f"{one} and {other}: hold other names of {kind}: {sorted(ones.keys() ^ others.keys())[:3]}"
            )
        largest = 0.0
        for name in sorted(ones):
            size, where = _tensor_difference(f"{kind}/{name}", ones[name], others[name])
            largest, first = max(largest, size), first or where
            compared += ones[name].numel()
        by_kind[kind] = largest
    return Difference(by_kind, first, compared)


def _losses(output: str) -> dict[str, Tensor]:
    """Of each window of steps that ends at a checkpoint."""
    return {
        f"step {step}": torch.tensor(
            [read_marker(checkpoint_url(output, step))["progress"]["loss"]], dtype=torch.float64
        )
        for step in committed_steps(output)
    }


def _tensor_difference(name: str, one: Tensor, other: Tensor) -> tuple[float, str]:
    """(largest absolute difference, the first element that differs, in words); bits are compared, so NaN equals NaN."""
    if one.shape != other.shape:
        return float("inf"), f"{name}: shape {tuple(one.shape)} != {tuple(other.shape)}"
    bits = torch.int64 if one.element_size() == 8 else torch.int32
    differs = one.contiguous().flatten().view(bits) != other.contiguous().flatten().view(bits)
    if not bool(differs.any()):
        return 0.0, ""
    at = int(differs.nonzero()[0])
    a, b = one.flatten(), other.flatten()
    size = float((a.double() - b.double()).abs().nan_to_num(nan=float("inf")).max())
    return size, f"{name}[{at}]: {a[at].item()!r} != {b[at].item()!r} ({int(differs.sum()):,} of {len(a):,} differ)"

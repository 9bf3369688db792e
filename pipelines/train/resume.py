"""Which checkpoint a run goes on from: the newest, or the one that `resume_from` names.

Going back is done once, by the workers and only when the older checkpoint has loaded: `OUTPUT/resume_from.json` says
whether it is done, so that workers that Ray starts again, and the same command given again, go on from the newest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ldm import storage
from ldm.config import RequestError
from pipelines.train.checkpoint import (
    AllGather,
    checkpoint_url,
    committed_steps,
    load_checkpoint,
    newest_checkpoint,
    remove_checkpoint,
    together,
)
from pipelines.train.ema import Ema
from pipelines.train.record import forget_validations
from pipelines.train.sharded_state import ShardedState

_FILE = "resume_from.json"


def choose_checkpoint(output: str, resume_from: int | None) -> str | None:
    """The URL of the checkpoint that a run in `output` would go on from. Raises RequestError where it is not there."""
    if resume_from is None or _asked(output) == {"step": resume_from, "done": True}:
        return newest_checkpoint(output)
    steps = committed_steps(output)
    if resume_from not in steps:
        held = f"those of {', '.join(map(str, steps))}" if steps else "none"
        raise RequestError(f"resume_from={resume_from}: {output} has no checkpoint of that step; it has {held}")
    return checkpoint_url(output, resume_from)


def ask_to_go_back(output: str, resume_from: int | None) -> None:
    """Leaves word for the workers, before they start; None takes back what was asked."""
    if resume_from is None:
        storage.remove(storage.join(output, _FILE))
    elif _asked(output) != {"step": resume_from, "done": True}:
        storage.write_json(storage.join(output, _FILE), {"step": resume_from, "done": False})


@dataclass(frozen=True)
class Origin:
    """What a run goes on from. url: of the checkpoint; None where it begins. back_to: the step that it goes back to."""

    url: str | None
    back_to: int | None


def find_origin(output: str, all_gather: AllGather) -> Origin:
    """Collective: one rank decides for all, for they might not see the same newest one."""
    asked, newest = all_gather((_asked(output), newest_checkpoint(output)))[0]
    if asked is not None and not asked["done"]:
        return Origin(checkpoint_url(output, asked["step"]), asked["step"])
    return Origin(newest, None)


def resume(output: str, origin: Origin, state: ShardedState, ema: Ema, all_gather: AllGather) -> dict[str, Any]:
    """Loads what the run in `output` goes on from; {} where it begins. Collective.

    Raises CheckpointError on every rank, which names the damaged file and what to do about it. Going back removes the
    newer checkpoints and snapshots once the older checkpoint is loaded.
    """
    if origin.url is None:
        return {}
    progress = load_checkpoint(origin.url, state, ema, all_gather)
    back_to = origin.back_to
    if back_to is not None:
        together(origin.url, state.rank, all_gather, lambda: _go_back(output, back_to) if state.rank == 0 else None)
    return progress


def _asked(output: str) -> dict[str, Any] | None:
    url = storage.join(output, _FILE)
    return storage.read_json(url) if storage.exists(url) else None


def _go_back(output: str, step: int) -> None:
    for newer in committed_steps(output):
        if newer > step:
            remove_checkpoint(output, newer)
    forget_validations(output, step)
    snapshots = storage.join(output, "snapshots")
    for name in storage.list_dir(snapshots):
        if name > f"step-{step:010d}":  # of the branch that is left
            storage.remove(storage.join(snapshots, name, "snapshot.json"))
    storage.write_json(storage.join(output, _FILE), {"step": step, "done": True})

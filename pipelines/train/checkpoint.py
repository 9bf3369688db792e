"""Checkpoints: what resuming needs, keyed by parameter name, so that any ZeRO stage and world size reads any other's.

    OUTPUT/checkpoints/step-0000000100/
        rank-00000-of-00002-HASH.safetensors    flat fragments: master/NAME@START, exp_avg/..., ema.PROFILE/...
        rank-00000-of-00002-HASH.json           their index: name, start, count, shape of the whole parameter
        buffers-HASH.safetensors, .json         the module's persistent buffers, if it has any
        checkpoint.json                         the commit, written last: counters, files, sizes, sha256

File names carry their contents' hash, so that two writers never replace one another's files. A directory without
`checkpoint.json` is a save that did not finish: it is never resumed from.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor

from ldm import storage
from ldm.config import RequestError
from pipelines.train.checkpoint_files import FORMAT_VERSION, MARKER, CheckpointError, Range, Reader, write_file
from pipelines.train.ema import Ema
from pipelines.train.sharded_state import ShardedState

_NAME = re.compile(r"step-(\d{10,})")
_ADAMW = ("master", "exp_avg", "exp_avg_sq")

T = TypeVar("T")
AllGather = Callable[[Any], list[Any]]
"""Gives every rank the values of all ranks, in the order of the ranks; it is a barrier too."""


def save_checkpoint(
    output: str, state: ShardedState, ema: Ema, progress: Mapping[str, Any], all_gather: AllGather
) -> str:
    """Writes this rank's part, waits for all ranks, then commits on rank 0. Collective; returns the URL.

    `progress` is JSON that `load_checkpoint` gives back; it holds "step" at least. Where any rank fails, nothing is
    committed and every rank raises.
    """
    url = checkpoint_url(output, progress["step"])
    files = _together(url, state.rank, all_gather, lambda: _write_rank(url, state, ema))

    def commit() -> None:
        marker = {
            "format_version": FORMAT_VERSION,
            "progress": dict(progress),
            "optimizer_step": state.optimizer_step,
            "ema": {p.name: {"decay": p.decay, "updates": ema.updates[p.name]} for p in ema.profiles},
            "world": state.world,
            "stage": state.stage,
            "files": [file for of_rank in files for file in of_rank],
        }
        if state.rank == 0:
            storage.write_json(storage.join(url, MARKER), marker)

    _together(url, state.rank, all_gather, commit)
    return url


def load_checkpoint(url: str, state: ShardedState, ema: Ema, all_gather: AllGather) -> dict[str, Any]:
    """Loads a checkpoint of any stage and world size into this rank. Collective; returns the saved `progress`.

    Each rank reads and verifies only the files that hold its ranges. Raises CheckpointError on every rank where a
    file is damaged, or the parameters are not this model's; RequestError where an EMA profile is not in it.
    """

    def load() -> dict[str, Any]:
        with Reader(url) as reader:
            _load(reader, state, ema)
            return dict(reader.marker["progress"])

    progress = _together(url, state.rank, all_gather, load)[state.rank]
    state.publish()
    return progress


def read_full(url: str, kind: str) -> dict[str, Tensor]:
    """Whole tensors by name, in one process: kind is "master", "exp_avg", "exp_avg_sq", "ema.PROFILE" or "buffer"."""
    with Reader(url) as reader:
        return {n: reader.read(kind, n, 0, s.numel()).view(s) for n, s in reader.shapes(kind).items()}


def checkpoint_url(output: str, step: int) -> str:
    """Where the checkpoint of an optimizer step lies."""
    return storage.join(output, "checkpoints", f"step-{step:010d}")


def committed_steps(output: str) -> list[int]:
    """The optimizer steps of the committed checkpoints under `output`."""
    return [step for step in _steps(output) if storage.exists(storage.join(checkpoint_url(output, step), MARKER))]


def newest_checkpoint(output: str) -> str | None:
    """The URL of the newest committed checkpoint under `output`."""
    committed = committed_steps(output)
    return checkpoint_url(output, max(committed)) if committed else None


def prune(output: str, keep_last: int, keep_every: int | None = None) -> None:
    """Removes checkpoints but the newest `keep_last` and every one whose step `keep_every` divides.

    Saves that did not finish go too, where there is a newer commit. For one process only.
    """
    assert keep_last >= 1, keep_last
    committed = sorted(committed_steps(output))
    kept = set(committed[-keep_last:]) | {s for s in committed if keep_every and s % keep_every == 0}
    for step in _steps(output):
        if committed and step < committed[-1] and step not in kept:
            url = checkpoint_url(output, step)
            storage.remove(storage.join(url, MARKER))  # first: what is half removed is not committed
            storage.remove(url)


def _steps(output: str) -> list[int]:
    names = storage.list_dir(storage.join(output, "checkpoints"))
    return [int(match.group(1)) for match in map(_NAME.fullmatch, names) if match]


def _together(url: str, rank: int, all_gather: AllGather, work: Callable[[], T]) -> list[T]:
    """Every rank's result of `work`; where it fails on any rank it fails on all, and no rank waits for ever."""
    result, failure = None, None
    try:
        result = work()
    except Exception as error:
        failure = error
    replies = all_gather((result, failure and f"rank {rank}: {type(failure).__name__}: {failure}"))
    if failure is not None:
        raise failure
    problems = [problem for _, problem in replies if problem]
    if problems:
        raise CheckpointError(f"{url}: {problems[0]}")
    return [reply for reply, _ in replies]


def _write_rank(url: str, state: ShardedState, ema: Ema) -> list[dict[str, Any]]:
    ranges = [Range(f.name, f.start, f.count, f.shape) for f in state.fragments]
    columns = {kind: [getattr(f, kind) for f in state.fragments] for kind in _ADAMW}
    columns |= {f"ema.{name}": averages for name, averages in ema.averages.items()}
    files = [write_file(url, f"rank-{state.rank:05d}-of-{state.world:05d}", ranges, columns)]
    if state.rank == 0 and state.buffers:
        ranges = [Range(n, 0, b.numel(), tuple(b.shape)) for n, b in state.buffers.items()]
        files.append(write_file(url, "buffers", ranges, {"buffer": list(state.buffers.values())}))
    return files


def _load(reader: Reader, state: ShardedState, ema: Ema) -> None:
    reader.check("parameter", reader.shapes("master"), state.shapes)
    reader.check("buffer", reader.shapes("buffer"), {n: b.shape for n, b in state.buffers.items()})
    saved = reader.marker["ema"]
    for profile in ema.profiles:
        if profile.name not in saved:
            raise RequestError(f"ema={profile.name}: {reader.url} has no such average; it has {', '.join(saved)}")
    for held in state.held:
        for kind in _ADAMW:
            getattr(held, kind).copy_(reader.read(kind, held.name, held.start, held.count))
    for name, buffer in state.buffers.items():
        buffer.copy_(reader.read("buffer", name, 0, buffer.numel()).view(buffer.shape))
    for name, averages in ema.averages.items():
        ema.updates[name] = saved[name]["updates"]
        for own, average in zip(state.fragments, averages, strict=True):
            average.copy_(reader.read(f"ema.{name}", own.name, own.start, own.count))
    state.optimizer_step = reader.marker["optimizer_step"]

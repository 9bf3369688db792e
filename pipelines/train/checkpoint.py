"""Checkpoints: what resuming needs, keyed by parameter name, so that any ZeRO stage and world size reads any other's.

    OUTPUT/checkpoints/step-0000000100/
        rank-00000-of-00002-HASH.safetensors    flat fragments: master/NAME@START, exp_avg/..., exp_avg_sq/...
        rank-00000-of-00002-HASH.json           their index: name, start, count, shape of the whole parameter
        ema-00000-of-00002-HASH.safetensors     ema.PROFILE/...; a file of its own: a snapshot is made of no other
        buffers-HASH.safetensors, .json         the module's persistent buffers, if it has any
        checkpoint.json                         the commit, written last: counters, files, sizes, sha256

File names carry their contents' hash, so that two writers never replace one another's files. A directory without
`checkpoint.json` is a save that did not finish: it is never resumed from. A killed process may live on for seconds and
even commit, so what it wrote is removed only where there is a newer commit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from ldm import storage
from ldm.config import RequestError
from pipelines.train.checkpoint_files import (
    MARKER,
    CheckpointError,
    DamagedCheckpoint,
    Range,
    Reader,
    read_marker,
    remove_file,
    write_file,
    write_marker,
)
from pipelines.train.ema import Ema
from pipelines.train.sharded_state import ShardedState

_NAME = re.compile(r"step-(\d{10,})")
_ADAMW = ("master", "exp_avg", "exp_avg_sq")

T = TypeVar("T")
AllGather = Callable[[Any], list[Any]]
"""Gives every rank the values of all ranks, in the order of the ranks; it is a barrier too."""


@dataclass(frozen=True)
class Part:
    """What one rank writes of a checkpoint. columns: flat tensors by kind, beside `ranges`."""

    rank: int
    world: int
    stage: int
    optimizer_step: int
    ema: dict[str, dict[str, Any]]  # decay and updates by profile
    ranges: list[Range]
    columns: dict[str, list[Tensor]]
    buffers: dict[str, Tensor]  # on rank 0 alone

    @classmethod
    def of(cls, state: ShardedState, ema: Ema) -> Part:
        """This rank's part; its tensors are live views."""
        columns = {kind: [getattr(f, kind) for f in state.fragments] for kind in _ADAMW}
        return cls(
            rank=state.rank,
            world=state.world,
            stage=state.stage,
            optimizer_step=state.optimizer_step,
            ema={p.name: {"decay": p.decay, "updates": ema.updates[p.name]} for p in ema.profiles},
            ranges=[Range(f.name, f.start, f.count, f.shape) for f in state.fragments],
            columns=columns | {f"ema.{name}": averages for name, averages in ema.averages.items()},
            buffers=dict(state.buffers) if state.rank == 0 else {},
        )


def save_checkpoint(output: str, part: Part, progress: Mapping[str, Any], all_gather: AllGather) -> str:
    """Writes this rank's part, waits for all ranks, then commits on rank 0. Collective; returns the URL.

    `progress` is JSON that `load_checkpoint` gives back; it holds "step" at least. Where any rank fails, nothing is
    committed and every rank raises CheckpointError.
    """
    url = checkpoint_url(output, progress["step"])
    entries: list[dict[str, Any]] = []

    def write() -> list[dict[str, Any]]:
        entries.extend(_write_part(url, part))
        return entries

    try:
        files = together(url, part.rank, all_gather, write)
    except (CheckpointError, RequestError):
        together(url, part.rank, all_gather, lambda: _take_back(url, entries))
        raise
    marker = {
        "progress": dict(progress),
        "optimizer_step": part.optimizer_step,
        "ema": part.ema,
        "world": part.world,
        "stage": part.stage,
        "files": [file for of_rank in files for file in of_rank],
    }
    together(url, part.rank, all_gather, lambda: write_marker(url, marker) if part.rank == 0 else None)
    return url


def load_checkpoint(url: str, state: ShardedState, ema: Ema, all_gather: AllGather) -> dict[str, Any]:
    """Loads a checkpoint of any stage and world size into this rank. Collective; returns the saved `progress`.

    Each rank reads and verifies only the files that hold its ranges. Raises CheckpointError on every rank where a
    file is damaged, or the parameters are not this model's; RequestError where an EMA profile is not in it.
    """

    def load() -> dict[str, Any]:
        try:
            with Reader(url) as reader:
                _load(reader, state, ema)
                return dict(reader.marker["progress"])
        except DamagedCheckpoint as error:
            raise DamagedCheckpoint(f"{error}; {_remedy(url)}") from error

    progress = together(url, state.rank, all_gather, load)[state.rank]
    state.publish()
    return progress


def read_full(url: str, kind: str) -> dict[str, Tensor]:
    """Whole tensors by name, in one process: kind is "master", "exp_avg", "exp_avg_sq", "ema.PROFILE" or "buffer"."""
    with Reader(url) as reader:
        return {n: reader.read(kind, n, 0, s.numel()).view(s) for n, s in reader.shapes(kind).items()}


def read_progress(url: str) -> dict[str, Any]:
    """What `save_checkpoint` was given. Raises CheckpointError, with what to do where the commit is damaged."""
    try:
        return dict(read_marker(url)["progress"])
    except DamagedCheckpoint as error:
        raise DamagedCheckpoint(f"{error}; {_remedy(url)}") from error


def checkpoint_url(output: str, step: int) -> str:
    """Where the checkpoint of an optimizer step lies."""
    return storage.join(output, "checkpoints", f"step-{step:010d}")


def committed_steps(output: str) -> list[int]:
    """The optimizer steps of the committed checkpoints under `output`, in order."""
    return _committed(storage.join(output, "checkpoints"))


def newest_checkpoint(output: str) -> str | None:
    """The URL of the newest committed checkpoint under `output`."""
    committed = committed_steps(output)
    return checkpoint_url(output, max(committed)) if committed else None


def remove_checkpoint(output: str, step: int) -> None:
    """The commit goes first: what is half removed is not committed."""
    url = checkpoint_url(output, step)
    storage.remove(storage.join(url, MARKER))
    storage.remove(url)


def prune(output: str, keep_last: int, keep_every: int | None = None) -> None:
    """Removes checkpoints but the newest `keep_last` and every one whose step `keep_every` divides.

    What saves that did not finish left goes too, where there is a newer commit. For one process only.
    """
    assert keep_last >= 1, keep_last
    committed = committed_steps(output)
    kept = set(committed[-keep_last:]) | {s for s in committed if keep_every and s % keep_every == 0}
    for step in _steps(storage.join(output, "checkpoints")):
        if committed and step < committed[-1] and step not in kept:
            remove_checkpoint(output, step)
    for step in committed[-keep_last - 1 : -1]:  # not all that are kept for good: they were seen when they were new
        if step in kept:
            _remove_unlisted(checkpoint_url(output, step))


def sweep_unfinished(output: str) -> None:
    """Removes the temporary files that processes of this host that are dead left in saves that did not finish."""
    if not storage.is_local(output):
        return
    folder = storage.join(output, "checkpoints")
    for step in set(_steps(folder)) - set(_committed(folder)):
        storage.sweep(checkpoint_url(output, step))


def together(url: str, rank: int, all_gather: AllGather, work: Callable[[], T]) -> list[T]:
    """Every rank's result of `work`; where it fails on any rank it fails on all, and no rank waits for ever.

    Raises CheckpointError (RequestError where that is what `work` raised here); anything else comes from `all_gather`.
    """
    result, problem, failure = None, "", None
    try:
        result = work()
    except Exception as error:
        problem, failure = f"rank {rank}: {type(error).__name__}: {error}", error
    replies = all_gather((result, problem))
    if isinstance(failure, CheckpointError | RequestError):
        raise failure
    problems = [problem for _, problem in replies if problem]
    if problems:
        raise CheckpointError(f"{url}: {problem or problems[0]}") from failure
    return [reply for reply, _ in replies]


def _steps(folder: str) -> list[int]:
    return sorted(int(match.group(1)) for match in map(_NAME.fullmatch, storage.list_dir(folder)) if match)


def _committed(folder: str) -> list[int]:
    return [step for step in _steps(folder) if storage.exists(storage.join(folder, f"step-{step:010d}", MARKER))]


def _remedy(url: str) -> str:
    """What a user can do who is told that this checkpoint is damaged."""
    folder, _, name = url.rstrip("/").rpartition("/")
    step = _NAME.fullmatch(name)
    before = [earlier for earlier in _committed(folder) if step and earlier < int(step.group(1))]
    if not before:
        return "no earlier checkpoint is there; give another output"
    return f"give resume_from={before[-1]} to go on from the one before it"


def _write_part(url: str, part: Part) -> Iterator[dict[str, Any]]:
    """The entries of this rank's files, each when it is written."""
    of = f"{part.rank:05d}-of-{part.world:05d}"
    averages = {kind: column for kind, column in part.columns.items() if kind not in _ADAMW}
    yield write_file(url, f"rank-{of}", part.ranges, {kind: part.columns[kind] for kind in _ADAMW})
    yield write_file(url, f"ema-{of}", part.ranges, averages)
    if part.buffers:
        ranges = [Range(n, 0, b.numel(), tuple(b.shape)) for n, b in part.buffers.items()]
        yield write_file(url, "buffers", ranges, {"buffer": list(part.buffers.values())})


def _take_back(url: str, entries: list[dict[str, Any]]) -> None:
    """Makes room on a disk that may be full; in an object store the next commit has it removed."""
    # A commit by an attempt that was taken for dead may name the same files.
    if storage.is_local(url) and not storage.exists(storage.join(url, MARKER)):
        for entry in entries:
            remove_file(url, entry)


def _remove_unlisted(url: str) -> None:
    """Removes from a committed checkpoint what other attempts at the same step left in it."""
    try:
        files = read_marker(url)["files"]
    except CheckpointError:  # nobody knows what belongs to it; it is for those who load it to say so
        return
    listed = {f"{file['name']}.{suffix}" for file in files for suffix in ("safetensors", "json")}
    for name in storage.list_dir(url):
        if name not in listed | {MARKER}:
            storage.remove(storage.join(url, name))


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

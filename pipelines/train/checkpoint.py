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

import contextlib
import hashlib
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm import storage
from ldm.config import RequestError
from pipelines.train.ema import Ema
from pipelines.train.zero import ShardedState

FORMAT_VERSION = 1
MARKER = "checkpoint.json"
_NAME = re.compile(r"step-(\d{10,})")
_ADAMW = ("master", "exp_avg", "exp_avg_sq")

T = TypeVar("T")
AllGather = Callable[[Any], list[Any]]
"""Gives every rank the values of all ranks, in the order of the ranks; it is a barrier too."""


class CheckpointError(RuntimeError):
    """A checkpoint is damaged, does not fit this model, or could not be written."""


@dataclass(frozen=True)
class _Range:
    """A flat range of a named tensor. One range has a tensor of `count` elements for each kind in its file."""

    name: str
    start: int
    count: int
    shape: tuple[int, ...]  # of the whole tensor

    def key(self, kind: str) -> str:
        return f"{kind}/{self.name}@{self.start}"


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
        with _Reader(url) as reader:
            _load(reader, state, ema)
            return dict(reader.marker["progress"])

    progress = _together(url, state.rank, all_gather, load)[state.rank]
    state.publish()
    return progress


def read_full(url: str, kind: str) -> dict[str, Tensor]:
    """Whole tensors by name, in one process: kind is "master", "exp_avg", "exp_avg_sq", "ema.PROFILE" or "buffer"."""
    with _Reader(url) as reader:
        return {n: reader.read(kind, n, 0, s.numel()).view(s) for n, s in reader.shapes(kind).items()}


def read_marker(url: str) -> dict[str, Any]:
    """The commit of a checkpoint. Raises CheckpointError where there is none, or one of another format."""
    try:
        marker = storage.read_json(storage.join(url, MARKER))
    except (FileNotFoundError, ValueError) as error:
        raise CheckpointError(f"{url}: is no committed checkpoint ({error})") from None
    if marker.get("format_version") != FORMAT_VERSION:
        found = marker.get("format_version")
        raise CheckpointError(f"{url}: has checkpoint format {found}; this version reads {FORMAT_VERSION}")
    return marker


def checkpoint_url(output: str, step: int) -> str:
    """Where the checkpoint of an optimizer step lies."""
    return storage.join(output, "checkpoints", f"step-{step:010d}")


def newest_checkpoint(output: str) -> str | None:
    """The URL of the newest committed checkpoint under `output`."""
    committed = _committed(output)
    return checkpoint_url(output, max(committed)) if committed else None


def prune(output: str, keep_last: int, keep_every: int | None = None) -> None:
    """Removes checkpoints but the newest `keep_last` and every one whose step `keep_every` divides.

    Saves that did not finish go too, where there is a newer commit. For one process only.
    """
    assert keep_last >= 1, keep_last
    committed = sorted(_committed(output))
    kept = set(committed[-keep_last:]) | {s for s in committed if keep_every and s % keep_every == 0}
    for step in _steps(output):
        if committed and step < committed[-1] and step not in kept:
            url = checkpoint_url(output, step)
            storage.remove(storage.join(url, MARKER))  # first: what is half removed is not committed
            storage.remove(url)


def _steps(output: str) -> list[int]:
    names = storage.list_dir(storage.join(output, "checkpoints"))
    return [int(match.group(1)) for match in map(_NAME.fullmatch, names) if match]


def _committed(output: str) -> list[int]:
    return [step for step in _steps(output) if storage.exists(storage.join(checkpoint_url(output, step), MARKER))]


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
    ranges = [_Range(f.name, f.start, f.count, f.shape) for f in state.fragments]
    columns = {kind: [getattr(f, kind) for f in state.fragments] for kind in _ADAMW}
    columns |= {f"ema.{name}": averages for name, averages in ema.averages.items()}
    files = [_write_file(url, f"rank-{state.rank:05d}-of-{state.world:05d}", ranges, columns)]
    if state.rank == 0 and state.buffers:
        ranges = [_Range(n, 0, b.numel(), tuple(b.shape)) for n, b in state.buffers.items()]
        files.append(_write_file(url, "buffers", ranges, {"buffer": list(state.buffers.values())}))
    return files


def _write_file(
    url: str, stem: str, ranges: Sequence[_Range], columns: Mapping[str, Sequence[Tensor]]
) -> dict[str, Any]:
    """Commits one safetensors file, then its index; returns its entry in the marker."""
    tensors = {
        piece.key(kind): values.detach().reshape(-1).cpu()
        for kind, column in columns.items()
        for piece, values in zip(ranges, column, strict=True)
    }
    with _temporary_file(url) as temporary:
        save_file(tensors, temporary)
        size, digest = temporary.stat().st_size, _sha256(temporary)
        name = f"{stem}-{digest[:16]}"
        storage.commit_file(temporary, storage.join(url, f"{name}.safetensors"))
    index = {"kinds": sorted(columns), "ranges": [asdict(piece) for piece in ranges]}
    storage.write_json(storage.join(url, f"{name}.json"), index)
    index_digest = hashlib.sha256(storage.read_bytes(storage.join(url, f"{name}.json"))).hexdigest()
    return {"name": name, "bytes": size, "sha256": digest, "index_sha256": index_digest}


def _load(reader: _Reader, state: ShardedState, ema: Ema) -> None:
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


class _Reader(contextlib.ExitStack):
    """Reads flat ranges of a committed checkpoint. A file is fetched and verified when it is first needed."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url
        self.marker = read_marker(url)
        self._entries: dict[str, dict[str, Any]] = {entry["name"]: entry for entry in self.marker["files"]}
        self._open: dict[str, Any] = {}
        self._ranges: dict[str, dict[str, list[tuple[_Range, str]]]] = {}
        for file, entry in self._entries.items():
            index = self._index(file, entry["index_sha256"])
            for raw in index["ranges"]:
                piece = _Range(raw["name"], raw["start"], raw["count"], tuple(raw["shape"]))
                for kind in index["kinds"]:
                    self._ranges.setdefault(kind, {}).setdefault(piece.name, []).append((piece, file))

    def shapes(self, kind: str) -> dict[str, torch.Size]:
        return {name: torch.Size(pieces[0][0].shape) for name, pieces in self._ranges.get(kind, {}).items()}

    def check(self, what: str, saved: Mapping[str, torch.Size], own: Mapping[str, torch.Size]) -> None:
        """Raises CheckpointError, naming the first of the tensors that differ."""
        for name in sorted({*saved, *own}):
            if saved.get(name) != own.get(name):
                was, now = (tuple(s[name]) if name in s else "none" for s in (saved, own))
                raise CheckpointError(f"{self.url}: {what} {name} has shape {was}, but this model's is {now}")

    def read(self, kind: str, name: str, start: int, count: int) -> Tensor:
        """Elements [start, start + count) of the flat tensor, as a 1-D tensor on the CPU."""
        parts, position, end = [], start, start + count
        for piece, file in sorted(self._ranges[kind][name], key=lambda pair: pair[0].start):
            last = min(end, piece.start + piece.count)
            if piece.start <= position < last:
                values = self._file(file).get_slice(piece.key(kind))
                parts.append(values[position - piece.start : last - piece.start])
                position = last
        if position != end:
            raise CheckpointError(f"{self.url}: {kind} of {name} lacks the elements from {position} on")
        return torch.cat(parts) if parts else torch.empty(0)

    def _index(self, file: str, digest: str) -> Any:
        url = storage.join(self.url, f"{file}.json")
        try:
            data = storage.read_bytes(url)
        except FileNotFoundError:
            raise CheckpointError(f"{url}: is missing") from None
        if hashlib.sha256(data).hexdigest() != digest:
            raise CheckpointError(f"{url}: is damaged; its sha256 is not the committed one")
        return storage.read_json(url)

    def _file(self, file: str) -> Any:
        if file not in self._open:
            url = storage.join(self.url, f"{file}.safetensors")
            path = self._fetched(url)
            size, expected = path.stat().st_size, self._entries[file]["bytes"]
            if size != expected:
                raise CheckpointError(f"{url}: is truncated or damaged; it has {size} bytes, expected {expected}")
            if _sha256(path) != self._entries[file]["sha256"]:
                raise CheckpointError(f"{url}: is damaged; its sha256 is not the committed one")
            self._open[file] = self.enter_context(safetensors.safe_open(path, framework="pt"))
        return self._open[file]

    def _fetched(self, url: str) -> Path:
        if storage.is_local(url):
            path = storage.local_path(url)
            if not path.exists():
                raise CheckpointError(f"{url}: is missing")
            return path
        path = Path(self.enter_context(tempfile.TemporaryDirectory())) / storage.name(url)
        try:
            storage.fetch(url, path)
        except FileNotFoundError:
            raise CheckpointError(f"{url}: is missing") from None
        return path


@contextlib.contextmanager
def _temporary_file(url: str) -> Iterator[Path]:
    """A name for a file on its way to the directory `url`: on the same disk where that is local."""
    if not storage.is_local(url):
        with tempfile.TemporaryDirectory() as directory:
            yield Path(directory) / "part"
        return
    temporary = storage.temporary_beside(storage.join(url, "part"))
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

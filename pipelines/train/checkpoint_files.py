"""The files of a checkpoint: safetensors of flat ranges, each with a JSON index, and the marker that commits them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm import storage

FORMAT_VERSION = 2
"""Version 1 had no hash of the marker itself."""
MARKER = "checkpoint.json"


class CheckpointError(RuntimeError):
    """A checkpoint is damaged, does not fit this model, or could not be written."""


class DamagedCheckpoint(CheckpointError):
    """A file of a committed checkpoint is not what was committed."""


@dataclass(frozen=True)
class Range:
    """A flat range of a named tensor. One range has a tensor of `count` elements for each kind in its file."""

    name: str
    start: int
    count: int
    shape: tuple[int, ...]  # of the whole tensor

    def key(self, kind: str) -> str:
        return f"{kind}/{self.name}@{self.start}"


def write_file(url: str, stem: str, ranges: Sequence[Range], columns: Mapping[str, Sequence[Tensor]]) -> dict[str, Any]:
    """Commits one safetensors file and its index; returns its entry in the marker."""
    tensors = {
        piece.key(kind): values.detach().reshape(-1).cpu()
        for kind, column in columns.items()
        for piece, values in zip(ranges, column, strict=True)
    }
    with _temporary_file(url) as temporary:
        save_file(tensors, temporary)
        size, digest = temporary.stat().st_size, _sha256(temporary)
        name = f"{stem}-{digest[:16]}"
        index = storage.to_json({"kinds": sorted(columns), "ranges": [asdict(piece) for piece in ranges]})
        # The index first: where the second of them fails, it is the small one that is left behind.
        storage.write_bytes(storage.join(url, f"{name}.json"), index)
        storage.commit_file(temporary, storage.join(url, f"{name}.safetensors"))
    return {"name": name, "bytes": size, "sha256": digest, "index_sha256": hashlib.sha256(index).hexdigest()}


def remove_file(url: str, entry: Mapping[str, Any]) -> None:
    """Removes what `write_file` wrote."""
    for suffix in ("safetensors", "json"):
        storage.remove(storage.join(url, f"{entry['name']}.{suffix}"))


def write_marker(url: str, marker: Mapping[str, Any]) -> None:
    """Commits a checkpoint: its files are all there."""
    body = {**marker, "format_version": FORMAT_VERSION}
    storage.write_json(storage.join(url, MARKER), {**body, "sha256": _body_hash(body)})


def read_marker(url: str) -> dict[str, Any]:
    """The commit of a checkpoint. Raises CheckpointError where there is none, or one of another format."""
    try:
        marker = storage.read_json(storage.join(url, MARKER))
    except FileNotFoundError as error:
        raise CheckpointError(f"{url}: is no committed checkpoint ({error})") from None
    except ValueError as error:
        raise DamagedCheckpoint(f"{error}; it is damaged") from None
    if not isinstance(marker, dict):
        raise DamagedCheckpoint(f"{storage.join(url, MARKER)}: is damaged; it is no JSON object")
    if marker.get("format_version") != FORMAT_VERSION:
        found = marker.get("format_version")
        raise CheckpointError(f"{url}: has checkpoint format {found}; this version reads {FORMAT_VERSION}")
    if marker.pop("sha256", None) != _body_hash(marker):
        raise DamagedCheckpoint(f"{storage.join(url, MARKER)}: is damaged; its sha256 is not the one that it names")
    for entry in marker["files"]:
        if "/" in entry["name"]:
            raise DamagedCheckpoint(
                f"{storage.join(url, MARKER)}: names the file {entry['name']!r}, which is none of it"
            )
    return marker


class Reader(contextlib.ExitStack):
    """Reads flat ranges of a committed checkpoint. A file is fetched and verified when it is first needed."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url
        self.marker = read_marker(url)
        self._entries: dict[str, dict[str, Any]] = {entry["name"]: entry for entry in self.marker["files"]}
        self._open: dict[str, Any] = {}
        self._ranges: dict[str, dict[str, list[tuple[Range, str]]]] = {}
        for file, entry in self._entries.items():
            index = self._index(file, entry["index_sha256"])
            for raw in index["ranges"]:
                piece = Range(raw["name"], raw["start"], raw["count"], tuple(raw["shape"]))
                for kind in index["kinds"]:
                    self._ranges.setdefault(kind, {}).setdefault(piece.name, []).append((piece, file))

    def shapes(self, kind: str) -> dict[str, torch.Size]:
        """Whole shapes by name. A model may have no buffers; every other kind has to be there."""
        if kind not in self._ranges and kind != "buffer":
            raise CheckpointError(f"{self.url}: has no {kind}; it has {', '.join(sorted(self._ranges))}")
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
            raise DamagedCheckpoint(f"{url}: is missing") from None
        if hashlib.sha256(data).hexdigest() != digest:
            raise DamagedCheckpoint(f"{url}: is damaged; its sha256 is not the committed one")
        return json.loads(data)

    def _file(self, file: str) -> Any:
        if file not in self._open:
            url = storage.join(self.url, f"{file}.safetensors")
            path = self._fetched(url)
            size, expected = path.stat().st_size, self._entries[file]["bytes"]
            if size != expected:
                raise DamagedCheckpoint(f"{url}: is truncated or damaged; it has {size} bytes, expected {expected}")
            if _sha256(path) != self._entries[file]["sha256"]:
                raise DamagedCheckpoint(f"{url}: is damaged; its sha256 is not the committed one")
            self._open[file] = self.enter_context(safetensors.safe_open(path, framework="pt"))
        return self._open[file]

    def _fetched(self, url: str) -> Path:
        if storage.is_local(url):
            path = storage.local_path(url)
            if not path.exists():
                raise DamagedCheckpoint(f"{url}: is missing")
            return path
        path = Path(self.enter_context(tempfile.TemporaryDirectory())) / storage.name(url)
        try:
            storage.fetch(url, path)
        except FileNotFoundError:
            raise DamagedCheckpoint(f"{url}: is missing") from None
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


def _body_hash(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(storage.to_json(body)).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

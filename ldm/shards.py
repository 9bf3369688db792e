"""Input shards: WebDataset tars of pictures. A sample is the run of members that share a key."""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, BinaryIO, cast

from ldm import storage
from ldm.config import RequestError

MAX_LABEL = 999_999
"""A larger class number is a mistake in the data: each class up to the largest gets a row of weights."""
MAX_SAMPLE_BYTES = 256 << 20
PICTURE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "avif", "bmp", "gif", "tif", "tiff", "ppm", "jp2", "jfif")


@dataclass
class RawSample:
    """One sample as it stands in the tar: its members by extension. offset: where it begins there, bytes.

    problem: why it cannot be used, found while reading; empty where it can.
    """

    key: str
    members: dict[str, bytes] = field(default_factory=dict)
    offset: int = field(default=0, compare=False)
    problem: str = ""

    @property
    def picture(self) -> bytes | None:
        return next((data for ext, data in self.members.items() if ext in PICTURE_EXTENSIONS), None)

    @property
    def label(self) -> int | None:
        """The class of `.cls`. Raises ValueError where it is no number."""
        return self.label_from("cls")

    @property
    def caption(self) -> str | None:
        return self.caption_from("txt")

    def label_from(self, source: str) -> int | None:
        """The class number of the member `source`, or of `json.FIELD`. Raises ValueError where it is none."""
        value = self._value(source)
        if value is None or isinstance(value, bytes):
            return None if value is None else parse_label(value, f".{source}")
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_LABEL:
            raise ValueError(f"its {source} is {str(value)[:40]!r}, expected a class number from 0 to {MAX_LABEL}")
        return value

    def caption_from(self, source: str) -> str | None:
        """The text of the member `source`, or of `json.FIELD`. Raises ValueError where that is no text."""
        value = self._value(source)
        if value is None or isinstance(value, str):
            return value and clean(value)
        if not isinstance(value, bytes):
            raise ValueError(f"its {source} is {str(value)[:40]!r}, expected a text")
        return value.decode("utf-8", "replace").strip()

    def fields(self) -> dict[str, Any]:
        """The JSON object of `.json`, empty where there is none. Raises ValueError where it is not one."""
        text = self.members.get("json")
        if text is None:
            return {}
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"its .json is no JSON ({str(error)[:80]})") from None
        if not isinstance(values, dict):
            raise ValueError(f"its .json holds a {type(values).__name__}, expected an object")
        return values

    def _value(self, source: str) -> Any:
        return self.fields().get(source[len("json.") :]) if source.startswith("json.") else self.members.get(source)


def clean(text: str) -> str:
    """Text that UTF-8 can hold: half a surrogate pair, as JSON may have, is written out (`\\ud83d`)."""
    return text.encode("utf-8", "backslashreplace").decode()


def parse_label(data: bytes, name: str = ".cls") -> int:
    """Class number of a `.cls` member. Raises ValueError."""
    text = data.decode("ascii", "replace").strip()
    if not text.isdigit() or len(text) > 9 or int(text) > MAX_LABEL:
        raise ValueError(f"its {name} holds {text[:40]!r}, expected a class number from 0 to {MAX_LABEL}")
    return int(text)


class ShardReader:
    """Reads one tar, local or remote, in order, and hashes all of its bytes on the way.

    size: bytes that it was listed with. After the iteration `bytes_read` and `sha256` stand for the whole file. Raises
    tarfile.TarError where the tar is damaged: what comes after the damage cannot be counted, so the shard is not to be
    committed; also where samples interleave, for they cannot be put together without holding the whole tar. Raises
    OSError where the storage fails.
    """

    def __init__(self, url: str, size: int | None = None) -> None:
        self.url, self.size = url, size
        self.bytes_read = 0
        self.sha256 = ""

    def __iter__(self) -> Iterator[RawSample]:
        with storage.open_read(self.url) as raw:
            hashed = Hashed(raw)
            file = cast(BinaryIO, hashed)
            with tarfile.open(fileobj=file, mode="r|", ignore_zeros=True, tarinfo=_StrictTarInfo) as tar:
                yield from _group(tar)
            hashed.drain()
        if hashed.tail.strip(b"\0"):
            raise tarfile.ReadError("its end marker is missing, so it was cut off")
        if self.size is not None and hashed.count != self.size:
            raise OSError(f"{self.url}: gave {hashed.count} bytes, {self.size} were listed")
        self.bytes_read, self.sha256 = hashed.count, hashed.digest.hexdigest()


def bytes_per_sample(url: str, most: int = 64) -> float | None:
    """Bytes of the tar for each sample, on average over its first `most`; None where they cannot be read."""
    count = offset = 0
    try:
        for sample in islice(ShardReader(url), most + 1):
            count, offset = count + 1, sample.offset
    except (tarfile.TarError, OSError):
        return None
    if count > most:
        return offset / most
    return storage.size(url) / count if count else None


def shard_names(urls: list[str]) -> dict[str, str]:
    """Name of each output shard => its input URL. Raises RequestError where two inputs have one name."""
    named: dict[str, str] = {}
    for url in urls:
        name = storage.name(url)
        if not name.endswith(".tar"):
            raise RequestError(f"source={url}: is no .tar; give WebDataset tars")
        name = name.removesuffix(".tar")
        if name in named:
            raise RequestError(
                f"source={url}: has the same name as {named[name]}; output shards are named after inputs, rename one"
            )
        named[name] = url
    return named


def write_shard(path: str, samples: Iterable[RawSample]) -> None:
    """Writes a WebDataset tar whose bytes depend on the samples alone: whole, or none. Holds one sample at a time."""
    with storage.writing(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for sample in samples:
            for extension, data in sample.members.items():
                info = tarfile.TarInfo(f"{sample.key}.{extension}")
                info.size, info.mode = len(data), 0o644
                tar.addfile(info, io.BytesIO(data))


def read_class_names(url: str) -> tuple[str, ...]:
    """Class names by number, from a JSON list or a JSON object {"0": name, ...}. Raises RequestError."""
    try:
        names = json.loads(storage.read_bytes(url))
        if isinstance(names, dict):
            names = [names[str(number)] for number in range(len(names))]
    except (OSError, ValueError, KeyError) as error:
        raise RequestError(f"class_names={url}: cannot be read ({type(error).__name__}: {error})") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RequestError(f'class_names={url}: holds no list of names; give JSON such as ["apple", "pear"]')
    return tuple(names)


def _group(tar: tarfile.TarFile) -> Iterator[RawSample]:
    current: RawSample | None = None
    done: dict[str, frozenset[str]] = {}
    for member in tar:
        key, extension = _key_and_extension(member)
        if not key:
            continue
        if current is None or current.key != key or extension in current.members:
            if current is not None:
                done[current.key] = done.get(current.key, frozenset()) | current.members.keys()
                yield current
            if key in done and extension not in done[key]:
                raise tarfile.ReadError(f"the members of {key} stand apart ({key}.{extension}); write each in a run")
            current = RawSample(key, offset=member.offset)
        size = member.size + sum(map(len, current.members.values()))
        if size > MAX_SAMPLE_BYTES:  # left in the tar, not read: a worker's memory is not the user's to fill
            current.problem = f"has {size:,} bytes with its .{extension}, the limit is {MAX_SAMPLE_BYTES:,}"
            current.members[extension] = b""
            continue
        handle = tar.extractfile(member)
        assert handle is not None
        current.members[extension] = handle.read()
    if current is not None:
        yield current


def _key_and_extension(member: tarfile.TarInfo) -> tuple[str, str]:
    """WebDataset's rule: the key ends at the first dot of the base name. Empty texts for what belongs to no sample."""
    directory, _, base = member.name.rpartition("/")
    stem, _, extension = base.partition(".")
    if not (member.isfile() and stem and extension):
        return "", ""
    key = f"{directory}/{stem}" if directory else stem
    # Names need not be UTF-8; keys are.
    key, extension = (
        part.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") for part in (key, extension.lower())
    )
    return key, extension


class _StrictTarInfo(tarfile.TarInfo):
    """Refuses what tarfile takes for the end of the tar: a damaged header, or a part of one."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_StrictTarInfo":
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if buf.strip(b"\0"):
                raise tarfile.ReadError(f"damaged header ({error})") from None
            raise  # zeros, or the end of the file: as tarfile has it


class Hashed:
    """A readable file that hashes what is read, and keeps the last block."""

    def __init__(self, raw: storage.Readable) -> None:
        self.raw, self.count, self.digest, self.tail = raw, 0, hashlib.sha256(), b""

    def read(self, size: int = -1) -> bytes:
        data = self.raw.read(size)
        self.count += len(data)
        self.digest.update(data)
        self.tail = (self.tail + data[-tarfile.BLOCKSIZE :])[-tarfile.BLOCKSIZE :]
        return data

    def drain(self) -> None:
        while self.read(1 << 20):
            pass

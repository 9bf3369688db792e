"""What the tests of the cache ask of it: what it holds, and whether that is right."""

import hashlib
import time
from collections.abc import Callable
from pathlib import Path

from ldm.latents.cache import RemoteFile

SIZE = 60_000


def is_right(path: Path, file: RemoteFile) -> bool:
    return hashlib.sha256(path.read_bytes()).hexdigest() == file.sha256


def held(folder: Path, files: list[RemoteFile]) -> list[int]:
    """The numbers of the files that are in the cache."""
    names = {path.name for path in folder.glob("??/*")}
    return [number for number, file in enumerate(files) if f"{file.sha256}.tar" in names]


def parts(folder: Path) -> list[Path]:
    return list((folder / "parts").glob("*"))


def until(true: Callable[[], object], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came about"
        time.sleep(0.01)

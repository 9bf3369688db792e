"""The folder of the cache: whole files, files on their way, room for both. Safe among processes, whatever their caps.

FOLDER/ab/abcdef….tar  a whole file, under its sha256; its mtime says when it was last used
       parts/abcdef…   a file on its way; whoever brings it holds its flock, which the kernel frees when that one dies
       taken           flocked while room is made; holds how many bytes all these take, or more
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from pathlib import Path

from ldm import storage
from ldm.config import DamagedError, RequestError

FULL = (errno.ENOSPC, errno.EDQUOT)
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class RemoteFile:
    """A file as its manifest names it. url: may be a local path, too. sha256: in hex."""

    url: str
    sha256: str
    bytes: int


class Shelf:
    """Files by their hash in a folder, of at most `max_bytes` together; None: 80% of what is free or taken already."""

    def __init__(self, folder: Path, max_bytes: int | None) -> None:
        self._folder, self._max_bytes = folder, max_bytes

    @cached_property
    def max_bytes(self) -> int:
        """The cap in bytes. At its first use the folder is made, and swept."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._sweep()
        if self._max_bytes is not None:
            return self._max_bytes
        return (shutil.disk_usage(self._folder).free + self._count()) * 4 // 5

    def place(self, file: RemoteFile) -> Path:
        """Where the whole file is, or would be."""
        if not _SHA256.fullmatch(file.sha256):  # it becomes a path
            raise DamagedError(f"{file.url}: its manifest says sha256 {file.sha256!r}, which is none; it is damaged")
        return self._folder / file.sha256[:2] / f"{file.sha256}{Path(file.url).suffix}"

    def use(self, file: RemoteFile, verify: bool = True) -> bool:
        """Whether the whole file is here; marks it as just used.

        One that was not used since the machine began is verified again, or without `verify` said not to be here.
        """
        place, now = self.place(file), time.time_ns()
        try:
            found = place.stat()
            if found.st_size != file.bytes:
                return False  # somebody has cut it; a good one will replace it
            # Files are not flushed to the disk, which is often slower than the link: a power cut may leave other bytes.
            if found.st_ctime < _machine_began() and not (verify and hash_file(place) == file.sha256):
                return False
            os.utime(place, ns=(now, now))  # not the kernel's own clock, which ticks in milliseconds
        except FileNotFoundError:
            return False
        except OSError as error:
            if error.errno not in _READ_ONLY:  # what can only be read is as good
                raise
        return True

    @contextlib.contextmanager
    def part(self, file: RemoteFile, wait: bool) -> Iterator[FileIO | None]:
        """What to download to, this thread's alone, and gone afterwards unless put; None where another has it, and
        `wait` is false."""
        with _flocked(self._folder / "parts" / file.sha256, wait) as part:
            try:
                yield part
            finally:
                if part is not None:
                    _remove(part)

    def make_room(self, file: RemoteFile, part: FileIO, needed_now: bool) -> bool:
        """Gives `part` the size of `file`, on the disk too; others give way to it.

        False where the files on their way take all the room, and this one is not `needed_now`: else it comes in spite
        of them. Raises RequestError, OSError.
        """
        if file.bytes > self.max_bytes:
            raise RequestError(
                f"{file.url}: has {storage.readable(file.bytes)}, and the cache {self._folder} may take "
                f"{storage.readable(self.max_bytes)}; let it take more, or set LDM_CACHE to a folder on a larger disk"
            )
        with self._taken() as taken:
            if taken.bytes + file.bytes > self.max_bytes:
                taken.bytes = self._evict(self.max_bytes - file.bytes)
            if taken.bytes + file.bytes > self.max_bytes and not needed_now:
                return False
            taken.bytes += file.bytes
            part.truncate(file.bytes)  # from now on whoever counts sees it
        if file.bytes:
            os.posix_fallocate(part.fileno(), 0, file.bytes)
        return True

    def put(self, file: RemoteFile, part: FileIO) -> None:
        """Makes the finished part a whole file."""
        place, now = self.place(file), time.time_ns()
        place.parent.mkdir(exist_ok=True)
        with self._taken() as taken:
            os.utime(part.name, ns=(now, now))
            os.replace(part.name, place)
            if taken.bytes > self.max_bytes:  # it came in spite of others
                taken.bytes = self._evict(self.max_bytes, but=place)

    def give_way(self, needed: int) -> bool:
        """Removes the least recently used files, of `needed` bytes or more together; False where none is left."""
        with self._taken() as taken:
            before = self._count()
            taken.bytes = self._evict(before - needed)
            return taken.bytes < before

    def explain(self, error: OSError, file: RemoteFile) -> None:
        """Raises an OSError of one line that says what to do, where `error` is one of this folder."""
        if error.errno in FULL:
            text = (
                f"no room for {file.url} ({storage.readable(file.bytes)}), and nothing is left to give way; free some"
            )
        elif error.filename is None or str(error.filename).startswith(str(self._folder)):
            text = f"the cache cannot take {file.url} ({error.strerror}); let it be written to"
        else:
            return
        assert error.errno
        raise OSError(error.errno, f"{text}, or set LDM_CACHE to another folder", str(self._folder)) from error

    def _evict(self, limit: int, but: Path | None = None) -> int:
        """Removes what killed processes left, then the least recently used files until `limit` bytes are left, or less.

        Answers how many are left: what is on its way stays.
        """
        self._sweep()
        taken = self._count()
        if taken > limit:
            limit = min(limit, self.max_bytes * 15 // 16)  # so that not every file to come has all of them counted
            for _, size, path in sorted(self._files()):
                if taken <= limit:
                    break
                if path != but:
                    path.unlink(missing_ok=True)
                    taken -= size
        return taken

    @contextlib.contextmanager
    def _taken(self) -> Iterator["_Taken"]:
        """How many bytes are taken, to be changed; nobody else on this node has it meanwhile."""
        with _flocked(self._folder / "taken") as handle:
            assert handle is not None
            text = os.pread(handle.fileno(), 20, 0)
            taken = _Taken(int(text) if text.strip().isdigit() else self._count())
            yield taken
            try:
                os.pwrite(handle.fileno(), b"%20d" % taken.bytes, 0)
            except OSError:
                handle.truncate(0)  # the disk is full; the next one counts

    def _count(self) -> int:
        return sum(size for _, size, _ in [*self._files(), *_stat((self._folder / "parts").glob("*"))])

    def _files(self) -> Iterator[tuple[int, int, Path]]:
        # The folder is the user's: what is not ours in it is not counted and stays.
        return _stat(path for path in self._folder.glob("[0-9a-f][0-9a-f]/*") if _SHA256.match(path.name))

    def _sweep(self) -> None:
        """Removes the parts that nobody holds: a process was killed over them."""
        for path in (self._folder / "parts").glob("*"):
            with contextlib.suppress(OSError), _flocked(path, wait=False) as part:
                if part is not None:
                    _remove(part)


@dataclass
class _Taken:
    bytes: int


def _stat(paths: Iterable[Path]) -> Iterator[tuple[int, int, Path]]:
    """(when it was last used in ns, its bytes, path) of each."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            about = path.stat()
            yield about.st_mtime_ns, about.st_size, path


@contextlib.contextmanager
def _flocked(path: Path, wait: bool = True) -> Iterator[FileIO | None]:
    """The file at `path`, made where there is none, this thread's alone; None where another has it, without `wait`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with open(path, "r+b", buffering=0, opener=_create) as handle:
            if not _flock(handle, wait):
                yield None
                return
            if not _stands(handle):
                continue  # it was removed, or made a whole file, while this one waited
            try:
                yield handle
                return
            finally:
                fcntl.flock(handle, fcntl.LOCK_UN)  # closing it is not enough where a fork has it, too


def hash_file(path: Path) -> str:
    """sha256 in hex."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _machine_began() -> float:
    """Seconds since 1970."""
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


def _flock(handle: FileIO, wait: bool) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _create(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT, 0o666)


def _stands(handle: FileIO) -> bool:
    """Whether the open file is still the one that its name leads to."""
    try:
        return os.path.samestat(os.fstat(handle.fileno()), os.stat(handle.name))
    except FileNotFoundError:
        return False


def _remove(part: FileIO) -> None:
    if _stands(part):
        os.unlink(part.name)

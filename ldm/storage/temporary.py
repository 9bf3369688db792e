"""Temporary names that say which process they belong to, so that what a killed one left can be told and swept."""

import contextlib
import os
import re
import shutil
import socket
import tempfile
import uuid
from pathlib import Path

from ldm.storage.transport import is_local, local_path

_OWNED = re.compile(r"\.(?:attempt|.*\.)-?(?P<host>[\w-]+)-(?P<pid>\d+)-(?P<born>\d+)-[0-9a-f]{12}(?:\.tmp)?")


def temporary_beside(url: str) -> Path:
    """A name of its own for each attempt, on the disk of the local `url`, so that overlapping writers never meet."""
    path = local_path(url)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name[:40]}.{_owner()}.tmp")  # a name has at most 255 bytes


def attempt_folder(url: str) -> Path:
    """A new folder for one attempt at what goes to the directory `url`, for its caller to remove. It lies in a local
    `url`, so that a commit is a rename; for an object store in the folder for temporary files."""
    place = local_path(url) if is_local(url) else Path(tempfile.gettempdir())
    folder = place / f".attempt-{_owner()}"
    folder.mkdir(parents=True)
    return folder


def sweep(url: str) -> list[str]:
    """Removes what processes of this host that are dead left in the local directory `url`, and names it.

    Not what lies in its folders. What belongs to a living process or to another host stays, for nobody here knows
    whether that one lives. An object store holds nothing to sweep: what is not complete does not show there.
    """
    if not is_local(url) or not local_path(url).is_dir():
        return []
    removed = []
    for path in sorted(local_path(url).iterdir()):
        owner = _OWNED.fullmatch(path.name)
        if owner and owner["host"] == _host() and _born(int(owner["pid"])) != int(owner["born"]):
            removed.append(path.name)
            with contextlib.suppress(FileNotFoundError, PermissionError):  # another one sweeps too, or it is another's
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    return removed


def _owner() -> str:
    # Not once for all: a fork has another number than its parent.
    return f"{_host()}-{os.getpid()}-{_born(os.getpid())}-{uuid.uuid4().hex[:12]}"


def _host() -> str:
    """Where process numbers mean the same: containers can share a host's name without sharing its processes."""
    processes = os.stat("/proc/self/ns/pid").st_ino
    return f"{re.sub('[^A-Za-z0-9]', '-', socket.gethostname())[:40]}-{processes}"


def _born(pid: int) -> int | None:
    """When a process began, in clock ticks since the start of the machine: numbers come again, not at the same tick.

    None where there is none, or a zombie, which writes no more.
    """
    try:
        # The name of the program, in brackets, may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])

"""Processes of the test bed, with all that they start: ended by their ids, or killed as a machine dies."""

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

PATIENCE_S = 180.0
"""Within which a part of the bed answers, on a machine that others use too."""


def start(
    command: Sequence[str], log: Path, env: Mapping[str, str], report: Path | None = None, **options: Any
) -> subprocess.Popen[bytes]:
    """Starts a process whose output is added to the file `log`, or what it writes to stdout to `report`."""
    with log.open("ab") as stderr, (report or log).open("ab") as stdout:
        streams = {"stdin": subprocess.DEVNULL, "stdout": stdout, "stderr": stderr}
        return subprocess.Popen(list(command), env=dict(env), **streams, **options)


def end(process: subprocess.Popen[Any], wait_s: float = 15.0) -> None:
    """SIGTERM to the process and, once that is over, SIGKILL to what is left of its family."""
    family = _family(process)
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    _, alive = psutil.wait_procs(family, timeout=wait_s)
    _kill(alive)
    process.wait()


def kill(process: subprocess.Popen[Any]) -> None:
    """SIGKILL to the whole family at once."""
    _kill(_family(process))
    process.wait()


def until(ready: Callable[[], object], what: str, process: subprocess.Popen[Any] | None = None) -> None:
    """Polls for what other processes bring about; an error where `process` ends before, or `PATIENCE_S` is over."""
    limit = time.monotonic() + PATIENCE_S
    while not ready():
        assert process is None or process.poll() is None, f"{what}: ended by itself with {process and process.poll()}"
        assert time.monotonic() < limit, f"{what}: not within {PATIENCE_S:.0f} s"
        time.sleep(0.05)


def _family(process: subprocess.Popen[Any]) -> list[psutil.Process]:
    try:
        parent = psutil.Process(process.pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _kill(family: list[psutil.Process]) -> None:
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(family, timeout=15)


def clean_environment() -> dict[str, str]:
    """This process's environment without what would lead elsewhere than to the bed."""
    led = ("RAY_", "MLFLOW_", "AWS_", "PG")
    return {key: value for key, value in os.environ.items() if not key.startswith(led)}

"""The commands of a page, and the `ldm` command in a process of its own, killed half way."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def console_commands(text: str) -> list[str]:
    """The `$ …` commands of the console blocks of a page, lines that end in a backslash joined."""
    blocks = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line[2:] for line in lines if line.startswith("$ ")]


def kill_when(arguments: list[str], ready: Callable[[], bool], place: Path) -> None:
    """Starts `ldm ARGUMENTS` in the folder `place`, with as many threads as here, and sends SIGKILL once `ready`."""
    threads = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    log = place / "stderr.txt"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs.cli", *arguments],
            stderr=stderr, stdout=subprocess.DEVNULL, cwd=place, env={**os.environ, **threads},
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 200
        while not ready():
            assert process.poll() is None, f"ended by itself: {log.read_text()}"
            assert time.monotonic() < deadline, f"was never ready: {log.read_text()}"
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()

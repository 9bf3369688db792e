"""Processes below this one, found by their titles while others come and go."""

import psutil


def named(start: str, below: int | None = None) -> list[psutil.Process]:
    """Those whose command line begins with `start`, among all that the process `below` (this one) started."""
    found = []
    for process in psutil.Process(below).children(recursive=True):
        try:
            line = " ".join(process.cmdline())
        except psutil.Error:  # ended in the meantime
            continue
        if line.startswith(start):
            found.append(process)
    return found

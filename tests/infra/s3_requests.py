"""Counts what moto's S3 server in this process is asked for, as S3 bills it."""

import logging
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

_LINE = re.compile(r'"(?:\x1b\[[0-9;]*m)*(GET|HEAD|PUT|POST|DELETE) (\S+) ')


@contextmanager
def billed() -> Iterator[Counter[str]]:
    """The requests of the block, at its end: `put` (PUT, POST, LIST), `get` (GET, HEAD). DELETE costs nothing."""
    counts: Counter[str] = Counter()
    notes = _Notes()
    logger = logging.getLogger("werkzeug")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(notes)
    try:
        yield counts
    finally:
        logger.removeHandler(notes)
        logger.setLevel(level)
    counts.update(filter(None, map(_tier, notes.lines)))


class _Notes(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _tier(line: str) -> str:
    found = _LINE.search(line)
    assert found, line
    method, path = found.groups()
    if method in ("PUT", "POST") or (method == "GET" and "list-type=" in path):
        return "" if "?delete" in path else "put"
    return "get" if method in ("GET", "HEAD") else ""

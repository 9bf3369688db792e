"""Progress on stderr: a bar with rate and ETA on a terminal, a line every 30 s elsewhere. stdout is for reports."""

import sys
import time
from types import TracebackType

from tqdm import tqdm

_EVERY_S = 30.0


class Progress:
    """Counts `unit`s towards `total`, from `initial`. Use as a context manager."""

    def __init__(self, title: str, total: int, unit: str, initial: int = 0) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done, self.initial = initial, initial
        self.started = self._last = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=initial, desc=title, unit=unit, leave=False, smoothing=0.1)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance_to(self, done: int, note: str = "") -> None:
        """Shows that `done` units are done; `note` stands behind the figures."""
        if self._bar is not None:
            self._bar.total = self.total
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(done - self.done)
        elif time.monotonic() - self._last > _EVERY_S:
            self._last = time.monotonic()
            rate = (done - self.initial) / max(1e-9, self._last - self.started)
            left = f", {tqdm.format_interval((self.total - done) / rate)} left" if rate > 0 else ""
            say(f"{self.title}: {done:,}/{self.total:,} {self.unit}, {rate:.1f}/s{left}; {note}".rstrip("; "))
        self.done = done

    def advance(self, count: int, note: str = "") -> None:
        self.advance_to(self.done + count, note)


def counted(number: int, unit: str) -> str:
    """As in `1 worker` or `2,000 workers`."""
    return f"{number:,} {unit}" + "s" * (number != 1)


def say(line: str) -> None:
    """One line for the person who watches."""
    tqdm.write(line, file=sys.stderr)
    sys.stderr.flush()

"""Where the seconds between two starts and their first step went."""

import time


class StartTimes:
    """Seconds of each phase, in their order. entered: time.time() at which the worker's function began."""

    def __init__(self, entered: float) -> None:
        self.seconds: dict[str, float] = {}
        self._last = entered

    def done(self, phase: str) -> None:
        """The phase ends now; it began where the one before it ended."""
        now = time.time()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now


def describe(seconds: dict[str, float]) -> str:
    """As in `14.2 s (processes 6.1, imports 3.0, step 1.8)`."""
    phases = ", ".join(f"{phase} {value:.1f}" for phase, value in seconds.items())
    return f"{sum(seconds.values()):.1f} s ({phases})"

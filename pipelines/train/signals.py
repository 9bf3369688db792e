"""How a rank learns that a checkpoint is wanted before its time, or that the run is to stop; and how a run gives up."""

import signal
import time
from types import FrameType
from typing import Any

_POLL_S = 0.1
_terminations: list[int] = []


class FatalError(RuntimeError):
    """What starting again would not cure. It ends the run, whichever rank raises it. `str(error)` is one line."""


def listen() -> None:
    """SIGTERM asks for a checkpoint from now on; the next one ends the process, as Ray would. For the main thread."""
    before = signal.getsignal(signal.SIGTERM)

    def note(number: int, frame: FrameType | None) -> None:
        _terminations.append(number)
        signal.signal(signal.SIGTERM, before)

    signal.signal(signal.SIGTERM, note)


class Notices:
    """What this rank has been asked: on rank 0 by the driver through the `board`, on every rank by SIGTERM.

    Ranks hear at different times: they agree on the step by combining what each of them was asked.
    """

    def __init__(self, board: Any = None) -> None:
        self._board, self._reply, self._replied_at = board, None, 0.0
        self._asked, self._answered, self._stop = 0, 0, False
        self._terminations, self._handled = 0, len(_terminations)

    def asked(self) -> tuple[bool, bool]:
        """(a checkpoint is wanted, the run is to stop after it), as far as this rank knows; never waits."""
        self._hear()
        self._terminations = len(_terminations)
        return self._stop or self._asked > self._answered or self._terminations > self._handled, self._stop

    def saved(self) -> None:
        """Call after every checkpoint: it answers what `asked` has returned."""
        self._handled = self._terminations
        if self._board is not None and self._asked > self._answered:
            self._answered = self._asked
            self._board.answer.remote(self._answered)

    def failed(self) -> None:
        """Call where the checkpoint could not be taken: who asked is told. A SIGTERM stands, for the next step."""
        if self._board is not None and self._asked > self._answered:
            self._answered = self._asked
            self._board.refuse.remote(self._answered)

    def _hear(self) -> None:
        """Takes the board's reply, if it is there, and asks again: one question at a time."""
        if self._board is None or time.monotonic() < self._replied_at + _POLL_S:
            return
        import ray

        if self._reply is not None and ray.wait([self._reply], timeout=0)[0]:
            self._asked, answered, self._stop = ray.get(self._reply)
            self._answered = max(self._answered, answered)
            self._reply, self._replied_at = None, time.monotonic()
        elif self._reply is None:
            self._reply = self._board.wishes.remote()

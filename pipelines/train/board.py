"""What the driver, Ray Train's controller and the workers tell one another while a run goes, and how it is shown."""

import contextlib
import time
from collections.abc import Callable
from typing import Any

from pipelines import cluster
from pipelines.progress import Progress, counted, say
from pipelines.train import start_times

_DRAINS_EVERY_S = 1.0


class Board:
    """A Ray actor on the driver's node. Times are its own: seconds since 1970."""

    def __init__(self) -> None:
        self.status: dict[str, Any] = {}
        self.lines: list[str] = []
        self.asked, self.answered, self.refused, self.stop = 0, 0, 0, False
        self.attempt: dict[str, Any] = {"number": 0, "world": 0, "first_step": None}
        self.nodes: dict[int, str] = {}
        self.fatal: tuple[bool, str] | None = None
        self.entered = 0
        self._heard = self._noticed = time.time()

    def write(self, status: dict[str, Any]) -> None:
        """What rank 0 says: start, step, note; at the end the result."""
        self.status, self._heard = status, time.time()

    def read(self) -> dict[str, Any]:
        """What the driver shows. A line is given once."""
        lines, self.lines = self.lines, []
        return {
            "status": self.status,
            "lines": lines,
            "attempt": self.attempt,
            "nodes": set(self.nodes.values()),
            "fatal": self.fatal,
        }

    def say(self, line: str) -> None:
        """A line that the driver is to show."""
        self.lines.append(line)

    def lost(self, line: str) -> None:
        """The workers are ended, for a reason that the driver is to show."""
        if self.attempt["first_step"] is not None:  # not for the loss of workers that were still starting
            self._noticed = time.time()
        self.attempt = {**self.attempt, "first_step": None}
        self.say(line)

    def end(self, wrong_request: bool, line: str) -> None:
        """Nothing is to be tried again, because of the request or for another reason."""
        self.fatal = (wrong_request, line)

    def enter(self, rank: int, world: int, node: str) -> None:
        """A worker's function has begun."""
        self.entered += 1
        self.nodes = {r: n for r, n in self.nodes.items() if r < world} | {rank: node}
        if rank == 0:
            now = time.time()
            waits = {"notice": max(0.0, self._noticed - self._heard)} if self.attempt["number"] else {}
            waits["processes"] = now - max(self._noticed, self._heard)
            self.status = {}
            self.attempt = {"number": self.attempt["number"] + 1, "world": world, "first_step": None, "waits": waits}

    def starts(self) -> int:
        """How many workers have begun so far."""
        return self.entered

    def where(self) -> set[str]:
        """The ids of the nodes that workers are on."""
        return set(self.nodes.values())

    def started(self, seconds: dict[str, float]) -> None:
        """The first step is done; rank 0 gives the seconds of each phase since its `enter`."""
        self.attempt = {**self.attempt, "first_step": {**self.attempt["waits"], **seconds}}

    def ask(self) -> int:
        """Wants a checkpoint; returns the number to compare with `answers`."""
        self.asked += 1
        return self.asked

    def ask_to_stop(self) -> None:
        """Wants a checkpoint, and the end of the run after it."""
        self.stop = True

    def wishes(self) -> tuple[int, int, bool]:
        """(checkpoints asked for, those answered, whether to stop): what rank 0 wants to know."""
        return self.asked, self.answered, self.stop

    def answer(self, number: int) -> None:
        self.answered = max(self.answered, number)

    def refuse(self, number: int) -> None:
        """The checkpoint could not be taken."""
        self.answered, self.refused = max(self.answered, number), max(self.refused, number)

    def answers(self) -> tuple[int, int]:
        """(checkpoints answered, the last of them that could not be taken)"""
        return self.answered, self.refused


def watch(
    running: Any, board: Any, max_steps: int, started: Callable[[int, float], None], check: Callable[[], None]
) -> int | None:
    """Shows the progress until the task `running` has ended; returns the signal that stopped it, if one did.

    The first Ctrl-C or SIGTERM asks the workers for a checkpoint, the second raises KeyboardInterrupt; so does the
    first where they have done no step that is not saved. `started` is told the step of each start, and its seconds.
    `check` is called again and again: what it raises ends the watch.
    """
    with cluster.interrupts_noted() as caught, contextlib.ExitStack() as shown:
        watcher = _Watcher(board, max_steps, shown, started)
        while not watcher.ended(running):
            watcher.look()
            check()
            if caught:
                watcher.stop(caught[0])
        watcher.look()
    return caught[0] if caught else None


class _Watcher:
    def __init__(
        self, board: Any, max_steps: int, bar: contextlib.ExitStack, started: Callable[[int, float], None]
    ) -> None:
        self.board, self.max_steps, self.bar, self.started = board, max_steps, bar, started
        self.progress: Progress | None = None
        self.shown, self.first_step_of, self.idle = 0, 0, True
        self.leaving: set[str] = set()
        self.looked_for_drains, self.stopping = 0.0, False

    @staticmethod
    def ended(running: Any) -> bool:
        import ray

        return bool(ray.wait([running], timeout=0.25)[0])

    def look(self) -> None:
        """Shows what is new on the board."""
        import ray

        board = ray.get(self.board.read.remote())
        attempt, status = board["attempt"], board["status"]
        for line in board["lines"]:
            say(f"train: {line}")
        self.idle = attempt["first_step"] is None
        if not status:
            return
        if attempt["number"] != self.shown:
            self._show_start(attempt, status)
        assert self.progress is not None
        self.progress.advance_to(status["step"], status["note"])
        if attempt["first_step"] is not None and self.first_step_of != attempt["number"]:
            self.first_step_of = attempt["number"]
            say(f"train: first step after {start_times.describe(attempt['first_step'])}")
            self.started(status["start"] + 1, sum(attempt["first_step"].values()))
        self._look_for_drains(board["nodes"])

    def _show_start(self, attempt: dict[str, Any], status: dict[str, Any]) -> None:
        if self.shown:
            say(f"train: goes on from step {status['start']:,} with {counted(attempt['world'], 'worker')}")
        self.shown = attempt["number"]
        self.bar.close()  # that of the workers before
        self.progress = self.bar.enter_context(Progress("train", self.max_steps, "steps", initial=status["start"]))

    def stop(self, number: int) -> None:
        """What the first Ctrl-C or SIGTERM does."""
        if self.idle:  # nothing is lost
            raise KeyboardInterrupt(number)
        if not self.stopping:
            self.stopping = True
            say("train: takes a checkpoint and stops; once more stops it at once")
            self.board.ask_to_stop.remote()

    def _look_for_drains(self, nodes: set[str]) -> None:
        """Asks for a checkpoint when a node of the workers is about to be taken away."""
        if time.monotonic() < self.looked_for_drains + _DRAINS_EVERY_S:
            return
        self.looked_for_drains = time.monotonic()
        draining = cluster.draining_nodes()
        for node in nodes & (draining.keys() - self.leaving):
            left = f" in {draining[node] / 1000 - time.time():.0f} s" if draining[node] else ""
            say(f"train: node {node[:8]} is to be taken away{left}: takes a checkpoint")
            self.board.ask.remote()
        self.leaving = set(draining)

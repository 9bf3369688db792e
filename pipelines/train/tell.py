"""What a rank has to say is shown by the driver: nobody reads what a worker prints."""

from typing import Any

from pipelines.progress import say

_board: Any = None


def tell_through(board: Any) -> None:
    """From now on what this process tells goes to the driver, over the `Board`."""
    global _board
    _board = board


def tell(line: str) -> None:
    """One line for the person who watches the run; never waits."""
    if _board is None:
        say(f"train: {line}")
    else:
        _board.say.remote(line)

"""What a replica refused a moment ago: who asks for as much, in no more time, is refused without being passed on.

Under overload most requests are refused, and each way to a replica and back takes time of the cores that draw.
"""

import time
from dataclasses import dataclass, field
from typing import Any

from pipelines.serve.replica import Task

HOLDS_S = 0.25


@dataclass(frozen=True)
class _Refusal:
    """rows: of all calls of the denoiser that were asked for. event: what the replica said."""

    rows: float
    deadline_s: float
    event: dict[str, Any]
    when: float


@dataclass
class Refusals:
    """The newest refusal of each model."""

    _newest: dict[str | None, _Refusal] = field(default_factory=dict)

    def note(self, task: Task, events: list[dict[str, Any]]) -> None:
        """Keeps what a replica answered, where it has no room for now."""
        first = events[0] if events else {}
        if first.get("type") == "refused" and first["status"] == 429:
            self._newest[task.body.get("model")] = _Refusal(*_asked(task), first, time.monotonic())

    def find(self, task: Task) -> dict[str, Any] | None:
        """The refusal that holds for this request too. A bulk request has none: it waits for its turn."""
        found = self._newest.get(task.body.get("model"))
        if found is None or task.bulk or time.monotonic() - found.when > HOLDS_S:
            return None
        rows, deadline_s = _asked(task)
        return found.event if rows >= found.rows and deadline_s <= found.deadline_s else None


def _asked(task: Task) -> tuple[float, float]:
    """(rows of all calls, seconds) of a request; the replicas' own deadline counts as the longest."""
    body = task.body
    rows = task.count * body.get("num_inference_steps", 50) * (1 if body.get("guidance_scale", 1.0) == 1 else 2)
    return rows, body.get("deadline_s") or float("inf")

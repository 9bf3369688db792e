"""Which requests a refusal of a moment ago holds for."""

import time
from typing import Any

import pytest

from pipelines.serve.refusals import HOLDS_S, Refusals
from pipelines.serve.replica import Task

NO_ROOM = {"type": "refused", "status": 429, "detail": "no room", "retry_after": 1.0}
REFUSED = {"model": None, "num_inference_steps": 20, "guidance_scale": 1.0, "deadline_s": 10.0}


def task(count: int = 2, *, bulk: bool = False, **changes: Any) -> Task:
    return Task({**REFUSED, **changes}, bulk=bulk, first=0, count=count)


@pytest.fixture
def refusals() -> Refusals:
    noted = Refusals()
    noted.note(task(), [NO_ROOM])
    return noted


@pytest.mark.parametrize(
    "same", [task(), task(3), task(num_inference_steps=50), task(guidance_scale=2.0), task(1, guidance_scale=2.0)]
)
def test_who_asks_for_as_much_is_refused_too(refusals: Refusals, same: Task) -> None:
    assert refusals.find(same) == NO_ROOM


@pytest.mark.parametrize(
    "other",
    [
        task(1),
        task(num_inference_steps=10),
        task(deadline_s=11.0),
        task(deadline_s=None),
        task(model="another"),
        task(bulk=True),
    ],
)
def test_who_asks_for_less_or_has_more_time_is_passed_on(refusals: Refusals, other: Task) -> None:
    assert refusals.find(other) is None


def test_a_refusal_holds_for_a_moment(refusals: Refusals, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + HOLDS_S + 0.1)
    assert refusals.find(task()) is None


@pytest.mark.parametrize("event", [{"type": "refused", "status": 422, "detail": "wrong"}, {"type": "taken"}])
def test_only_a_lack_of_room_is_noted(event: dict[str, Any]) -> None:
    refusals = Refusals()
    refusals.note(task(), [event])
    refusals.note(task(), [])
    assert refusals.find(task()) is None

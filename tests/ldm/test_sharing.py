"""Whose turn it is: as fair as equal shares to every job, whatever comes when."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm.sharing import FairShare

Arrivals = list[tuple[int, int]]  # (when it comes, its work)


def fair(arrivals: Arrivals) -> list[int]:
    """When each job ends that `FairShare` orders, one unit of work at each moment."""
    share: FairShare[int] = FairShare()
    left, ends, now = {}, {}, 0
    while len(ends) < len(arrivals):
        for job, (when, work) in enumerate(arrivals):
            if when == now:
                share.add(job, work)
                left[job] = work
        now += 1
        if not (order := share.in_order()):
            continue
        left[order[0]] -= 1
        share.served(1)
        if left[order[0]] == 0:
            share.remove(order[0], done=True)
            ends[order[0]] = now
    return [ends[job] for job in range(len(arrivals))]


def equal(arrivals: Arrivals) -> list[float]:
    """When each job ends that has an equal share all the time: processor sharing, event by event."""
    left: dict[int, float] = {}
    ends, now, coming = {}, 0.0, sorted(range(len(arrivals)), key=lambda job: arrivals[job][0])
    while len(ends) < len(arrivals):
        following = arrivals[coming[0]][0] if coming else float("inf")
        first = now + min(left.values(), default=float("inf")) * len(left)
        until = min(following, first)
        left = {job: work - (until - now) / len(left) for job, work in left.items()}
        now = until
        for job in [job for job, work in left.items() if work < 1e-9]:
            ends[job] = now
            del left[job]
        while coming and arrivals[coming[0]][0] <= now:
            job = coming.pop(0)
            left[job] = float(arrivals[job][1])
    return [ends[job] for job in range(len(arrivals))]


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 30)), min_size=1, max_size=8))
def test_no_job_ends_later_than_with_equal_shares(arrivals: Arrivals) -> None:
    for found, bound in zip(fair(arrivals), equal(arrivals), strict=True):
        assert found <= bound + 1 + 1e-6  # one unit is not divided


def test_a_small_job_passes_a_large_one() -> None:
    assert fair([(0, 1000), (10, 5)]) == [1005, 15]


def test_equal_jobs_are_served_as_they_come() -> None:
    assert fair([(0, 10), (1, 10), (2, 10)]) == [10, 20, 30]


def test_cancelled_jobs_slow_nobody() -> None:
    share: FairShare[str] = FairShare()
    share.add("large", 100)
    for number in range(1000):
        share.add(f"cancelled {number}", 50)
        share.remove(f"cancelled {number}", done=False)
    share.served(60)
    share.add("later", 50)  # ends at 110: were the cancelled ones still counted, it would pass the large one
    assert share.in_order() == ["large", "later"]


def test_what_would_be_the_order_changes_nothing() -> None:
    share: FairShare[str] = FairShare()
    share.add("one", 10)
    assert share.in_order_with("two", 5) == ["two", "one"]
    assert share.in_order() == ["one"]


@pytest.mark.parametrize("done", [True, False])
def test_what_is_not_here_is_not_removed(done: bool) -> None:
    share: FairShare[str] = FairShare()
    share.remove("nobody", done=done)
    assert share.in_order() == []

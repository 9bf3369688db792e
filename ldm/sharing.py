"""Whose turn it is: each job is done no later than if all had equal shares all the time.

Equal shares are simulated, and jobs are served one after the other in the order in which they would end there. That is
as fair as equal shares to each of them, and most end earlier (Friedman and Henderson, "Fairness and efficiency in web
server protocols", SIGMETRICS 2003). In the simulation a job's end, in units of service to each job, is known when it
comes and does not change: a number to sort by.
"""

import heapq
from typing import Generic, TypeVar

T = TypeVar("T")


class Refused(Exception):
    """There is no room for a job now. retry_after: seconds."""

    def __init__(self, reason: str, retry_after: float) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class FairShare(Generic[T]):
    """Jobs in the order in which they are served. Work is in any unit."""

    def __init__(self) -> None:
        self._ends: dict[T, float] = {}
        self._clock = 0.0  # service that each job has had, were the shares equal
        self._simulated: list[float] = []  # ends of the jobs that equal shares would still be at

    def add(self, job: T, work: float) -> None:
        self._ends[job] = self._clock + work
        heapq.heappush(self._simulated, self._ends[job])

    def remove(self, job: T, *, done: bool) -> None:
        """Nothing where it is not here. One that is done lives on in the simulation until it would be done there."""
        end = self._ends.pop(job, None)
        if end is not None and not done and end in self._simulated:
            self._simulated.remove(end)
            heapq.heapify(self._simulated)
        if not self._ends:
            self._clock, self._simulated = 0.0, []

    def in_order(self) -> list[T]:
        return sorted(self._ends, key=self._ends.__getitem__)

    def in_order_with(self, job: T, work: float) -> list[T]:
        """The order, were this job added."""
        ends = {**self._ends, job: self._clock + work}
        return sorted(ends, key=ends.__getitem__)

    def served(self, work: float) -> None:
        """So much was done, for whichever job."""
        while self._simulated and work > 0:
            jobs = len(self._simulated)
            step = min(work, (self._simulated[0] - self._clock) * jobs)
            self._clock += step / jobs
            work -= step
            if self._clock >= self._simulated[0] - 1e-9:
                heapq.heappop(self._simulated)

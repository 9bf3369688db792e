"""How many workers a run has: decided by Ray Train's controller at each start, and again where nodes come back."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.scaling_policy import (
    FixedScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
)
from ray.train.v2.api.exceptions import WorkerGroupError

from ldm.config import RequestError
from pipelines import cluster
from pipelines.progress import counted
from pipelines.train.signals import FatalError

_PATIENCE_S = 10.0  # for resources that are given back late, and for news of nodes that are gone
_SAY_EVERY_S = 60.0
_LOOK_EVERY_S = 5.0
_DEATHS = (WorkerHealthCheckFailedError, ray.exceptions.RayActorError)


class Worlds(FixedScalingPolicy):
    """The largest world of a list that the nodes hold now.

    A world that could grow takes a checkpoint first, and then begins again with more workers.
    """

    def __init__(self, scaling_config: Any, worlds: Sequence[int], device: str, board: Any) -> None:
        super().__init__(scaling_config)
        self.worlds, self.device, self.board = list(worlds), device, board
        self._wanted: ResizeDecision | None = None  # while a checkpoint is taken for it
        self._ticket, self._seen = 0, 0
        self._others: dict[str, dict[str, float]] = {}  # what others use of each node
        self._entered, self._looked = -1, 0.0
        self._waits_since: float | None = None
        self._said = float("-inf")

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        self._maybe_send_resource_request()
        now = time.monotonic()
        entered = ray.get(self.board.starts.remote())
        if entered == self._entered or self._waits_since is not None:
            self._measure([])  # no worker has begun since the last decision: we hold nothing
        self._waits_since = self._waits_since or now
        room = self._room()
        best = cluster.place_workers(self.worlds, self.device, list(cluster.live_nodes().values()))
        if not _holds(room, best) and now > self._waits_since + _PATIENCE_S:
            best = cluster.place_workers(self.worlds, self.device, list(room.values()))
        if best is not None and _holds(room, best):
            self._entered, self._waits_since, self._wanted = entered, None, None
            self._seen, self._looked = 0, now
            return ResizeDecision(num_workers=best[0], resources_per_worker=best[1])
        if now > max(self._said + _SAY_EVERY_S, self._waits_since + _PATIENCE_S):
            self._said = now
            self.board.say.remote(f"waits for room for {counted(self.worlds[0], 'worker')} at least")
        time.sleep(0.25)  # Ray asks again at once
        return NoopDecision()

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        self._maybe_send_resource_request()
        if self._wanted is not None:
            return self._grow(self._wanted)
        now, world = time.monotonic(), len(worker_group_state.workers)
        if now < self._looked + _LOOK_EVERY_S:
            return NoopDecision()
        self._looked = now
        self._measure(worker_group_state.workers)
        if world == self.worlds[-1]:
            return NoopDecision()
        best = cluster.place_workers(self.worlds, self.device, list(self._room().values()))
        larger = best[0] if best is not None and best[0] > world else 0
        if best is not None and larger and larger == self._seen:  # twice: no node that comes and goes
            self._wanted = ResizeDecision(num_workers=best[0], resources_per_worker=best[1])
            self._ticket = ray.get(self.board.ask.remote())
            self.board.say.remote(f"there is room for {counted(best[0], 'worker')}: takes a checkpoint first")
        self._seen = larger
        return NoopDecision()

    def _grow(self, wanted: ResizeDecision) -> ScalingDecision:
        """Begins again with more workers once the checkpoint is there."""
        answered, refused = ray.get(self.board.answers.remote())
        if answered < self._ticket:
            return NoopDecision()
        if refused >= self._ticket:  # what was not saved would be lost
            self._wanted, self._seen, self._looked = None, 0, time.monotonic()
            return NoopDecision()
        ray.get(self.board.lost.remote(f"begins again with {counted(wanted.num_workers, 'worker')}"))
        self._entered = ray.get(self.board.starts.remote())
        self._wanted, self._seen, self._looked = None, 0, time.monotonic()
        return wanted

    def _measure(self, ours: Sequence[Any]) -> None:
        """Notes what others use now, where these workers are ours. It is never seen at once what has been freed."""
        free = cluster.free_resources()
        used = {}
        for node, total in cluster.live_nodes().items():
            held = [worker.resources for worker in ours if worker.metadata.node_id == node]
            used[node] = {
                name: max(0.0, total[name] - free[node].get(name, 0.0) - sum(each.get(name, 0.0) for each in held))
                for name in total.keys() & {"CPU", "GPU"}
            }
        self._others = used

    def _room(self) -> dict[str, dict[str, float]]:
        """What of each node others leave to us."""
        return {
            node: {
                name: total[name] - self._others.get(node, {}).get(name, 0.0) for name in total.keys() & {"CPU", "GPU"}
            }
            for node, total in cluster.live_nodes().items()
        }


def _holds(room: Mapping[str, Mapping[str, float]], best: tuple[int, dict[str, float]] | None) -> bool:
    return best is not None and cluster.places(best[1], room.values()) >= best[0]


class Failures(DefaultFailurePolicy):
    """A FatalError or a RequestError of a worker ends the run; everything else is counted, and said."""

    def __init__(self, failure_config: Any, board: Any) -> None:
        super().__init__(failure_config)
        self.board = board

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        failures = training_failed_error.worker_failures if isinstance(training_failed_error, WorkerGroupError) else {}
        for error in failures.values():
            if isinstance(error, FatalError | RequestError):
                ray.get(self.board.end.remote(isinstance(error, RequestError), str(error)))
                return FailureDecision.RAISE
        decision = super().make_decision(training_failed_error)
        if decision == FailureDecision.RETRY:
            ray.get(self.board.lost.remote(_reason(failures)))
        return decision


def _reason(failures: Mapping[int, Exception]) -> str:
    """One line. Where a rank died, the errors of the others are of its absence."""
    if not failures:
        return "the workers did not all start: tries again"
    died = [rank for rank, error in failures.items() if isinstance(error, _DEATHS)]
    if died:
        return f"a worker was lost (rank {', '.join(map(str, sorted(died)))})"
    rank, error = next(iter(sorted(failures.items())))
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"a worker failed (rank {rank}: {type(error).__name__}: {lines[0][:200] if lines else ''})"

"""SIGKILL for a training worker, wherever it runs: what a check of resuming does to a run."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from pipelines.progress import say
from pipelines.train.checkpoint import committed_steps


@contextlib.contextmanager
def killing(output: str) -> Iterator[list[int]]:
    """Kills one worker of the run in `output` with SIGKILL, on whichever node of this Ray session it is.

    As soon as there is a checkpoint to go on from. Yields a list of the step of that one, which is empty before.
    """
    stop, kills, failures = threading.Event(), list[int](), list[BaseException]()
    killers = _killers()

    def watch() -> None:
        try:
            while not stop.wait(0.02):
                if committed_steps(output) and _kill_worker(killers):
                    kills.append(max(committed_steps(output)))
                    return
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=watch, name="killer", daemon=True)
    thread.start()
    try:
        yield kills
    finally:
        stop.set()
        thread.join()
    if failures:
        raise failures[0]


class _Killer:
    """An actor that is there before it is needed: a task takes seconds to start, and short runs do not wait."""

    def kill(self, pid: int) -> bool:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:  # it had just ended
            return False
        return True

    def ready(self) -> None:
        pass


def _killers() -> dict[str, Any]:
    """One on each node, by the node's id."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    killers = {
        node["NodeID"]: ray.remote(_Killer)
        .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
        .remote()
        for node in ray.nodes()
        if node["Alive"]
    }
    ray.get([killer.ready.remote() for killer in killers.values()])
    return killers


def _kill_worker(killers: dict[str, Any]) -> bool:
    """Whether there was a training worker of this job to kill."""
    import ray
    from ray._private.state import state  # the public list of actors needs a dashboard

    job = ray.get_runtime_context().get_job_id()
    actors = state.actor_table(None, ray.JobID.from_hex(job), "ALIVE").values()
    workers = sorted((a["Address"]["NodeID"], a["Pid"]) for a in actors if a["ActorClassName"] == "RayTrainWorker")
    for node, pid in workers[-1:]:
        if ray.get(killers[node].kill.remote(pid)):
            say(f"kill -9 {pid}  (a training worker)")
            return True
    return False

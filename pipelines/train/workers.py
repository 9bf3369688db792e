"""Ray Train: starts the workers of a run, and starts them again where one is lost or a node comes back."""

import contextlib
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from ldm import storage
from ldm.config import RequestError
from pipelines import cluster
from pipelines.progress import say
from pipelines.system_metrics import SystemMetrics
from pipelines.tracking import Tracker
from pipelines.train.board import Board, watch
from pipelines.train.build import check_compiler
from pipelines.train.config import TrainConfig
from pipelines.train.record import RunRecord

_HEALTH_CHECK_S, _START_TIMEOUT_S = "0.5", "8"


def possible_worlds(config: TrainConfig) -> list[int]:
    """The numbers of workers that divide the global batch, smallest first. Raises RequestError where there is none."""
    least, most = config.workers_range
    batch, micro = config.global_batch_size, config.micro_batch_size
    divide = [world for world in range(least, most + 1) if batch % world == 0]
    if not divide and least == most:
        raise RequestError(
            f"global_batch_size={batch}: num_workers={least} does not divide it; give {-(-batch // least) * least}"
        )
    if not divide:
        raise RequestError(
            f"num_workers=[{least}, {most}]: none of these divides global_batch_size={batch}; "
            f"give a range with {max(world for world in range(1, least) if batch % world == 0)} in it"
        )
    worlds = [world for world in divide if micro == "auto" or batch // world % micro == 0]
    if not worlds:
        shares = [batch // world for world in divide]
        assert micro != "auto"
        right = max(d for d in range(1, min(micro, batch) + 1) if any(share % d == 0 for share in shares))
        raise RequestError(
            f"micro_batch_size={micro}: does not divide a worker's share of {' or '.join(map(str, shares))} "
            f"(global_batch_size / num_workers); give {right}"
        )
    return worlds


def check_cluster(config: TrainConfig) -> None:
    """Raises RequestError for what the cluster does not have, where that is known before the run."""
    nodes = cluster.known_nodes()
    if nodes is None:
        return
    device = cluster.choose_device(config.device, nodes)
    cluster.check_room(possible_worlds(config)[0], device, nodes)
    if len(nodes) == 1:  # this machine
        check_compiler(config, device)


def run_workers(
    config: TrainConfig,
    record: RunRecord,
    tracker: Tracker,
    started: Callable[[int, float], None],
    check: Callable[[], None],
) -> dict[str, Any]:
    """Trains, and shows what rank 0 reports meanwhile; returns the report's values.

    `started` is told each first step and the seconds before it; `check` is called again and again, and what it raises
    ends the run. Raises KeyboardInterrupt after a checkpoint where Ctrl-C or SIGTERM asked for one, RequestError, and
    RuntimeError where the workers failed.

    Ray Train runs in a task of its own: in this process its Ctrl-C handler would end it with 0, and in a thread it
    would outlive the Ray session.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    worlds, nodes = possible_worlds(config), list(cluster.live_nodes().values())
    device = cluster.choose_device(config.device, nodes)
    cluster.check_room(worlds[0], device, nodes)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = ray.remote(Board).options(num_cpus=0, scheduling_strategy=here).remote()
    job = {
        "config": config.model_dump(mode="json"),
        "generations": record.generations,
        "exclusions": {at: storage.absolute(storage.join(config.output, url)) for at, url in record.exclusions.items()},
        "run_id": tracker.run_id,
        "device": device,
        "dashboard": cluster.has_dashboard(),
        "board": board,
    }
    scratch, filesystem = _ray_storage(config.output)
    try:
        fit = ray.remote(_fit).options(num_cpus=0, max_retries=0, scheduling_strategy=here)
        running = fit.remote(job, config.max_failures, worlds, scratch, filesystem)
        with SystemMetrics(tracker, lambda: ray.get(board.where.remote())):
            stopped_by = watch(running, board, config.max_steps, started, check)
            ray.get(running)
    except ray.exceptions.RayError as error:
        raise _failure(error, board) from error
    finally:
        with contextlib.suppress(OSError):  # a store that is away: why the run ended is what is to be said
            storage.remove(scratch)
    result: dict[str, Any] = ray.get(board.read.remote())["status"]["result"]
    if result["step"] < config.max_steps:
        say(f"train: stopped at step {result['step']:,} with the checkpoint {result['checkpoint']}")
        raise KeyboardInterrupt(stopped_by)
    return result


def _failure(error: Exception, board: Any) -> Exception:
    """What ended the run, in one line."""
    import ray

    try:
        fatal = ray.get(board.read.remote())["fatal"]
    except ray.exceptions.RayError:  # it stands on this node
        return RuntimeError("training failed: the Ray of this node is gone; the same command goes on where it stopped")
    if fatal is not None:
        wrong_request, line = fatal
        return RequestError(line) if wrong_request else RuntimeError(f"training failed: {line}")
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return RuntimeError(f"training failed: {lines[-1]}")


def _fit(job: dict[str, Any], max_failures: int, worlds: Sequence[int], scratch: str, filesystem: Any) -> None:
    """The Ray task in which Ray Train runs: it starts the workers, and starts them again where one is lost."""
    # Of Ray's: a lost worker is noticed in half a second, and a world that has no room after all is given up early.
    # Nodes that are to be taken away are looked for by our driver: Ray's watcher is one more process at each start.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", _HEALTH_CHECK_S)
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", _START_TIMEOUT_S)
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2._internal.execution.callback import WorkerGroupCallback

    from pipelines.train.elastic import Failures, Worlds
    from pipelines.train.signals import listen

    class Trainer(TorchTrainer):
        """With our policies, and without the helpers that can do nothing here, each a process that costs seconds.

        One hands out Ray datasets. The other asks the dashboard whether the controller lives, to free its workers'
        resources if not; where there is no dashboard it waits for its answer, and each run ends 12 s late.
        """

        def _create_default_callbacks(self) -> list[Any]:
            idle = ["DatasetsCallback"] + ["PlacementGroupCleanerCallback"] * (not job["dashboard"])
            return [made for made in super()._create_default_callbacks() if type(made).__name__ not in idle]

        def _initialize_and_run_controller(self, **options: Any) -> Any:
            options["scaling_policy"] = Worlds(self.scaling_config, worlds, job["device"], job["board"])
            options["failure_policy"] = Failures(self.run_config.failure_config, job["board"])
            return super()._initialize_and_run_controller(**options)

    class Listen(WorkerGroupCallback):
        """Handlers of signals are set in the main thread of a worker, and training runs in another one."""

        def after_worker_group_training_start(self, worker_group: Any) -> None:
            worker_group.execute_async(listen)

    def enter(job: dict[str, Any]) -> None:
        """Pickled by value, so that the time that our imports take is seen."""
        entered = time.time()
        from pipelines.train.entry import train_worker

        train_worker({**job, "entered": entered})

    on_gpu = job["device"] == "cuda"
    # Policies give the resources of a worker: a share that depends on the world.
    resources = {"CPU": 1.0, "GPU": 1.0} if on_gpu else {"CPU": 1.0}
    Trainer(
        enter,
        train_loop_config=job,
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=worlds[-1], use_gpu=on_gpu, resources_per_worker=resources),
        run_config=RunConfig(
            name=f"train-{uuid.uuid4().hex[:8]}",
            storage_path=scratch if filesystem is None else storage.open_fs(scratch)[1],
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=max_failures),
            callbacks=[Listen()],
        ),
    ).fit()


def _ray_storage(output: str) -> tuple[str, Any]:
    """Where Ray Train keeps its own notes (metrics only, never weights)."""
    if storage.is_local(output):
        folder = storage.local_path(output)
        folder.mkdir(parents=True, exist_ok=True)
        return tempfile.mkdtemp(prefix=".ray-", dir=folder), None
    scratch = storage.join(output, ".ray", uuid.uuid4().hex)  # of this command alone
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    return scratch, PyFileSystem(FSSpecHandler(storage.open_fs(scratch)[0]))

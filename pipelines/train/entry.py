"""What Ray Train runs on each worker: the process is made ready, and a `Worker` trains in it."""

import os
from typing import Any

from ldm import storage
from ldm.config import validate
from pipelines import cluster
from pipelines.tracking import Tracker
from pipelines.train import zero
from pipelines.train.checkpoint_files import CheckpointError
from pipelines.train.config import TrainConfig
from pipelines.train.deterministic import use_deterministic
from pipelines.train.loop import Worker
from pipelines.train.record import tracking_url
from pipelines.train.signals import FatalError
from pipelines.train.start_times import StartTimes
from pipelines.train.tell import tell_through


def train_worker(job: dict[str, Any]) -> None:
    """The function that Ray Train runs on each worker."""
    import ray.train

    context = ray.train.get_context()
    # DeepSpeed guesses the local rank by host name, wrongly: it is told.
    os.environ["LOCAL_RANK"] = str(context.get_local_rank())
    os.environ["RANK"], os.environ["WORLD_SIZE"] = (
        str(context.get_world_rank()),
        str(context.get_world_size()),
    )
    os.environ["DS_ACCELERATOR"] = job["device"]
    times = StartTimes(job["entered"])
    tell_through(job["board"])
    node = ray.get_runtime_context().get_node_id()
    job["board"].enter.remote(context.get_world_rank(), context.get_world_size(), node)
    zero.import_deepspeed()
    times.done("imports")
    cluster.use_threads(cluster.worker_threads(context.get_local_world_size()))
    config = validate(TrainConfig, job["config"])
    if config.deterministic:
        use_deterministic(job["device"])
    board = job["board"] if context.get_world_rank() == 0 else None
    run_id = job["run_id"]
    tracking = config.tracking if board is not None else config.tracking.model_copy(update={"enabled": False})
    name, folder = f"train/{storage.name(config.output)}", tracking_url(config.output)
    with Tracker(tracking, name, run_id=run_id, ends_run=False, folder=folder) as tracker:
        times.done("tracking")
        try:
            result = Worker(config, job["generations"], job["exclusions"], tracker, board, times).run()
        except CheckpointError as error:  # a damaged file, a store that takes nothing: to start again would not help
            raise FatalError(str(error)) from error
    first_step = result.pop("first_step")
    if board is not None:
        ray.get(board.write.remote({"start": first_step, "step": result["step"], "note": "", "result": result}))

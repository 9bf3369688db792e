"""The driver's side of training: checks the request, claims the output, asks Ray Train for workers, shows progress."""

import contextlib
import tempfile
import uuid
from dataclasses import dataclass
from typing import Any

from ldm import storage
from ldm.config import RequestError
from ldm.latents.dataset import LatentDataset
from ldm.latents.manifest import fingerprint_hash
from ldm.snapshot import read_snapshot
from ldm.transfer import check_fit
from pipelines import cluster, lineage
from pipelines.progress import Progress, say
from pipelines.tracking import Tracker
from pipelines.train.checkpoint import newest_checkpoint
from pipelines.train.checkpoint_files import read_marker
from pipelines.train.config import TrainConfig, check_unused, trajectory
from pipelines.train.estimate import meta_denoiser
from pipelines.train.loop import open_latents, snapshot_url, train_worker
from pipelines.train.record import (
    RunRecord,
    exclusions_asked,
    read_record,
    write_exclusions,
    write_record,
)
from pipelines.train.space import check_space


@dataclass(frozen=True)
class TrainReport:
    """What scripts may rely on. loss: mean since the last point of the log; None where no step was applied."""

    snapshot: str
    checkpoint: str
    step: int
    images_seen: int
    loss: float | None
    images_per_second: float
    run_id: str | None


@dataclass(frozen=True)
class TrainPlan:
    """What a run will do. dataset: its generations are fixed for the whole run."""

    dataset: LatentDataset
    exclusions: dict[int, frozenset[int]]  # by the step from which each is left out
    parameters: int
    output_bytes: int  # that the rest of the run adds at most
    checkpoint: str | None
    record: RunRecord | None  # of the run that goes on
    notes: tuple[str, ...] = ()  # what changes on the way from the snapshot of init_from

    @property
    def generations(self) -> tuple[str, ...]:
        return tuple(manifest.generation for manifest in self.dataset.manifests)

    @property
    def step(self) -> int:
        """The optimizer step that the run goes on from."""
        return int(read_marker(self.checkpoint)["progress"]["step"]) if self.checkpoint and self.record else 0

    @property
    def fingerprint(self) -> str:
        return fingerprint_hash(self.dataset.manifest.fingerprint)


def plan(config: TrainConfig) -> TrainPlan:
    """Checks the whole request without starting a worker. Raises RequestError."""
    storage.check_writable("output", config.output)
    checkpoint = newest_checkpoint(config.output)
    record = read_record(config, checkpoint)
    step = read_marker(checkpoint)["progress"]["step"] if checkpoint and record else 0
    exclusions = exclusions_asked(config, record, step)
    dataset = open_latents(config, record.generations if record else None, exclusions)
    _check_batch(config)
    if record is None:
        check_unused(config.diffusion)
    denoiser = meta_denoiser(config, dataset)
    notes: tuple[str, ...] = ()
    if config.init_from and checkpoint is None:
        snapshot = read_snapshot(config.init_from, "init_from")
        notes = check_fit(snapshot, config.denoiser, config.diffusion, dataset.latent_shape, dataset.num_classes)
    if config.resume == "required" and checkpoint is None:
        raise RequestError(f"resume=required: {config.output} holds no checkpoint; give resume=auto to begin")
    if config.resume == "never" and checkpoint:
        raise RequestError(f"resume=never: {config.output} holds a run; give another output, or resume=auto")
    parameters = sum(p.numel() for p in denoiser.parameters())
    output_bytes = check_space(config, parameters)
    return TrainPlan(dataset, exclusions, parameters, output_bytes, checkpoint, record, notes)


def train(config: TrainConfig) -> TrainReport:
    """Trains to `max_steps`, from the newest checkpoint in `output` where there is one.

    Raises RequestError; RuntimeError where the workers failed more than `max_failures` times.
    """
    if config.init_from:  # part of what a run began with: the same from any folder
        config = config.model_copy(update={"init_from": storage.absolute(config.init_from)})
    todo = plan(config)
    config = config.model_copy(
        update={
            "latents": tuple(storage.absolute(url) for url in config.latents_urls),
            "output": storage.absolute(config.output),
            "tracking": config.tracking.resolved(),
        }
    )
    if (finished := _finished(config, todo)) is not None:
        say(f"train: step {finished.step:,} is reached already")
        _keep_record(config, todo, finished.run_id)  # what is excluded now stays so when the run goes on
        return finished
    run_id = todo.record.run_id if todo.record else None
    with (
        Tracker(config.tracking, f"train/{storage.name(config.output)}", config, run_id) as tracker,
        cluster.ray_session(),
    ):
        record = _keep_record(config, todo, tracker.run_id)
        generation = "+".join(record.generations)
        if tracker.run_id != run_id:
            tracker.tag({"generation": generation, "fingerprint": record.fingerprint, **cluster.describe()})
        tracker.tag({"samples": record.chosen["samples"], "chosen": record.chosen["hash"]})
        for manifest in todo.dataset.manifests:
            tracker.dataset(lineage.latent_dataset(manifest), "training")
        where = f"goes on from {todo.checkpoint}" if todo.checkpoint else "begins"
        say(f"train: {where}; {todo.parameters / 1e6:.1f} M parameters, {describe_samples(todo.dataset)}")
        for note in todo.notes:
            say(f"train: init_from: {note}")
        result = _run_workers(config, record, tracker.run_id)
        tracker.model(read_snapshot(result["snapshot"]))
    return TrainReport(**result, run_id=tracker.run_id)


def describe_samples(dataset: LatentDataset) -> str:
    """As in `1,000 samples (left out: 3 by exclude)`."""
    left_out = ", ".join(f"{count:,} by {reason}" for reason, count in dataset.chosen["left_out"].items())
    return f"{dataset.num_samples:,} samples" + (f" (left out: {left_out})" if left_out else "")


def _keep_record(config: TrainConfig, todo: TrainPlan, run_id: str | None) -> RunRecord:
    """Writes down what the run began with and what is excluded from now on."""
    record = RunRecord(
        trajectory=trajectory(config),
        generations=todo.generations,
        fingerprint=todo.fingerprint,
        run_id=run_id,
        chosen=todo.dataset.chosen,
        exclusions=write_exclusions(config.output, todo.exclusions),
    )
    if record != todo.record:
        write_record(config.output, record)
    return record


def _finished(config: TrainConfig, todo: TrainPlan) -> TrainReport | None:
    """The report of a run that has nothing left to do, without starting a worker."""
    if todo.checkpoint is None or todo.record is None:
        return None
    progress = read_marker(todo.checkpoint)["progress"]
    snapshot = snapshot_url(config.output, progress["step"])
    if progress["step"] < config.max_steps or not storage.exists(storage.join(snapshot, "snapshot.json")):
        return None
    return TrainReport(
        snapshot=snapshot,
        checkpoint=storage.absolute(todo.checkpoint),
        images_per_second=0.0,
        run_id=todo.record.run_id,
        **{key: progress[key] for key in ("step", "images_seen", "loss")},
    )


def _check_batch(config: TrainConfig) -> None:
    if config.global_batch_size % config.num_workers:
        raise RequestError(
            f"global_batch_size={config.global_batch_size}: num_workers={config.num_workers} does not divide it; "
            f"give {-(-config.global_batch_size // config.num_workers) * config.num_workers}"
        )
    share = config.global_batch_size // config.num_workers
    if config.micro_batch_size != "auto" and share % config.micro_batch_size:
        raise RequestError(
            f"micro_batch_size={config.micro_batch_size}: does not divide a worker's share of {share} "
            "(global_batch_size / num_workers)"
        )


def _run_workers(config: TrainConfig, record: RunRecord, run_id: str | None) -> dict[str, Any]:
    """Runs Ray Train in a task of its own, and shows what rank 0 reports meanwhile.

    In this process its Ctrl-C handler would end it with 0, and in a thread it would outlive the Ray session.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    device = cluster.resolve_device(config.device)
    resources, threads = cluster.resources_per_worker(config.num_workers, device)
    board = ray.remote(Board).options(num_cpus=0).remote()
    job = {
        "config": config.model_dump(mode="json"),
        "generations": record.generations,
        "exclusions": {at: storage.absolute(storage.join(config.output, url)) for at, url in record.exclusions.items()},
        "run_id": run_id,
        "device": device,
        "threads": threads,
        "dashboard": cluster.has_dashboard(),
        "board": board,
    }
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    scratch, filesystem = _ray_storage(config.output)
    try:
        fit = ray.remote(_fit).options(num_cpus=0, max_retries=0, scheduling_strategy=here)
        running = fit.remote(job, config.max_failures, config.num_workers, resources, scratch, filesystem)
        _watch(running, board, config.max_steps)
        ray.get(running)
    except ray.exceptions.RayError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise RuntimeError(f"training failed: {lines[-1]}") from error
    finally:
        storage.remove(scratch if filesystem is None else storage.join(config.output, ".ray"))
    status: dict[str, Any] = ray.get(board.read.remote())
    return dict(status["result"])


def _fit(
    job: dict[str, Any], max_failures: int, num_workers: int, resources: dict[str, float], scratch: str, filesystem: Any
) -> None:
    """The Ray task in which Ray Train runs: it starts the workers, and starts them again where one is lost."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    class Trainer(TorchTrainer):
        """Without the helpers that can do nothing here, each a process that costs seconds.

        One hands out Ray datasets. The other asks the dashboard whether the controller lives, to free its workers'
        resources if not; where there is no dashboard it waits for its answer, and each run ends 12 s late.
        """

        def _create_default_callbacks(self) -> list[Any]:
            idle = ["DatasetsCallback"] + ["PlacementGroupCleanerCallback"] * (not job["dashboard"])
            return [made for made in super()._create_default_callbacks() if type(made).__name__ not in idle]

    on_gpu = job["device"] == "cuda"
    Trainer(
        train_worker,
        train_loop_config=job,
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=on_gpu, resources_per_worker=resources),
        run_config=RunConfig(
            name=f"train-{uuid.uuid4().hex[:8]}",
            storage_path=scratch,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=max_failures),
        ),
    ).fit()


class Board:
    """A Ray actor that holds what rank 0 last said; the driver reads it to show progress."""

    def __init__(self) -> None:
        self.status: dict[str, Any] = {}

    def write(self, status: dict[str, Any]) -> None:
        self.status = status

    def read(self) -> dict[str, Any]:
        return self.status


def _watch(running: Any, board: Any, max_steps: int) -> None:
    """Shows the progress until the task `running` has ended."""
    import ray

    with contextlib.ExitStack() as stack:
        progress, start = None, 0
        while not ray.wait([running], timeout=0.25)[0]:
            status = ray.get(board.read.remote())
            if not status:
                continue
            if progress is None or status["start"] != start:
                if progress is not None:
                    say(f"train: a worker was lost; goes on from step {status['start']}")
                start = status["start"]
                progress = stack.enter_context(Progress("train", max_steps, "steps", initial=start))
            progress.advance_to(status["step"], status["note"])


def _ray_storage(output: str) -> tuple[str, Any]:
    """Where Ray Train keeps its own notes (metrics only, never weights)."""
    if storage.is_local(output):
        folder = storage.local_path(output)
        folder.mkdir(parents=True, exist_ok=True)
        return tempfile.mkdtemp(prefix=".ray-", dir=folder), None
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    fs, path = storage.open_fs(storage.join(output, ".ray"))
    return path, PyFileSystem(FSSpecHandler(fs))

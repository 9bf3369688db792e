"""The driver's side of training: checks the request, claims the output, asks Ray Train for workers, shows progress."""

import contextlib
import tempfile
import uuid
from dataclasses import dataclass
from typing import Any

import torch

from ldm import storage
from ldm.config import RequestError, differences, validate
from ldm.denoiser import build_denoiser
from ldm.latents.dataset import LatentDataset
from ldm.latents.manifest import Manifest, fingerprint_hash
from ldm.snapshot import read_snapshot
from ldm.transfer import check_fit
from pipelines import cluster, lineage
from pipelines.progress import Progress, say
from pipelines.tracking import Tracker
from pipelines.train.checkpoint import newest_checkpoint
from pipelines.train.checkpoint_files import read_marker
from pipelines.train.config import TrainConfig, trajectory
from pipelines.train.loop import snapshot_url, train_worker
from pipelines.train.space import check_space

RUN_FILE = "run.json"


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
    """What a run will do. manifest: of the latent dataset; its generation is fixed for the whole run."""

    manifest: Manifest
    num_samples: int
    parameters: int
    output_bytes: int  # that the rest of the run adds at most
    checkpoint: str | None
    record: dict[str, Any] | None  # of the run that goes on
    notes: tuple[str, ...] = ()  # what changes on the way from the snapshot of init_from

    @property
    def generation(self) -> str:
        return self.manifest.generation

    @property
    def fingerprint(self) -> str:
        return fingerprint_hash(self.manifest.fingerprint)


def plan(config: TrainConfig) -> TrainPlan:
    """Checks the whole request without starting a worker. Raises RequestError."""
    storage.check_writable("output", config.output)
    checkpoint = newest_checkpoint(config.output)
    record = _read_record(config, checkpoint)
    generation = record["generation"] if record else None
    dataset = LatentDataset(
        config.latents,
        global_batch_size=config.global_batch_size,
        holdout=config.holdout,
        generation=generation,
    )
    _check_batch(config)
    with torch.device("meta"):
        denoiser = build_denoiser(
            config.denoiser,
            in_channels=dataset.latent_shape[0],
            sample_size=dataset.latent_shape[1:],
            num_classes=dataset.num_classes or None,
        )
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
    return TrainPlan(dataset.manifest, dataset.num_samples, parameters, output_bytes, checkpoint, record, notes)


def train(config: TrainConfig) -> TrainReport:
    """Trains to `max_steps`, from the newest checkpoint in `output` where there is one.

    Raises RequestError; RuntimeError where the workers failed more than `max_failures` times.
    """
    if config.init_from:  # part of what a run began with: the same from any folder
        config = config.model_copy(update={"init_from": storage.absolute(config.init_from)})
    todo = plan(config)
    config = config.model_copy(
        update={
            "latents": storage.absolute(config.latents),
            "output": storage.absolute(config.output),
            "tracking": config.tracking.resolved(),
        }
    )
    if (finished := _finished(config, todo)) is not None:
        say(f"train: step {finished.step:,} is reached already")
        return finished
    run_id = todo.record["run_id"] if todo.record else None
    with (
        Tracker(config.tracking, f"train/{storage.name(config.output)}", config, run_id) as tracker,
        cluster.ray_session(),
    ):
        if todo.record is None or tracker.run_id != run_id:
            _write_record(config, todo, tracker.run_id)
            tracker.tag({"generation": todo.generation, "fingerprint": todo.fingerprint, **cluster.describe()})
        tracker.dataset(lineage.latent_dataset(todo.manifest), "training")
        where = f"goes on from {todo.checkpoint}" if todo.checkpoint else "begins"
        say(f"train: {where}; {todo.parameters / 1e6:.1f} M parameters, {todo.num_samples:,} samples")
        for note in todo.notes:
            say(f"train: init_from: {note}")
        result = _run_workers(config, todo, tracker.run_id)
        tracker.model(read_snapshot(result["snapshot"]))
    return TrainReport(**result, run_id=tracker.run_id)


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
        run_id=todo.record["run_id"],
        **progress,
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


def _read_record(config: TrainConfig, checkpoint: str | None) -> dict[str, Any] | None:
    """What the run in `output` began with; None where it never came to a checkpoint, and so binds nobody.

    Raises RequestError where this request would change what it learns.
    """
    url = storage.join(config.output, RUN_FILE)
    if checkpoint is None or not storage.exists(url):
        return None
    record: dict[str, Any] = storage.read_json(url)
    # What the run began with, with the defaults of keys that are newer than it.
    began = validate(TrainConfig, {"latents": config.latents, "output": config.output, **record["trajectory"]})
    changed = differences(trajectory(began), trajectory(config))
    if changed and config.resume != "never":
        raise RequestError(
            f"output={config.output}: holds a run with other settings ({'; '.join(changed)}); "
            "give another output, or the settings that it began with"
        )
    return record


def _write_record(config: TrainConfig, todo: TrainPlan, run_id: str | None) -> None:
    storage.write_json(
        storage.join(config.output, RUN_FILE),
        {
            "format": "ldm-run",
            "version": 1,
            "trajectory": trajectory(config),
            "generation": todo.generation,
            "fingerprint": todo.fingerprint,
            "run_id": run_id,
        },
    )


def _run_workers(config: TrainConfig, todo: TrainPlan, run_id: str | None) -> dict[str, Any]:
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
        "generation": todo.generation,
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

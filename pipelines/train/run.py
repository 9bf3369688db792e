"""The driver's side of training: checks the request, claims the output, has the workers train, reports."""

import hashlib
from dataclasses import dataclass

from ldm import storage
from ldm.config import RequestError, canonical_json
from ldm.latents.dataset import LatentDataset
from ldm.latents.manifest import fingerprint_hash
from ldm.snapshot import read_snapshot
from ldm.transfer import check_fit
from pipelines import cluster, lineage
from pipelines.outbox import kept_files
from pipelines.progress import say
from pipelines.tracking import Tracker
from pipelines.train.build import engine_settings, open_holdout, open_latents
from pipelines.train.checkpoint import newest_checkpoint, read_progress
from pipelines.train.claim import Claim
from pipelines.train.config import TrainConfig, check_unused, trajectory
from pipelines.train.memory import meta_denoiser
from pipelines.train.record import (
    RunRecord,
    best_steps,
    exclusions_asked,
    newest_samples,
    read_record,
    tracking_url,
    write_exclusions,
    write_record,
)
from pipelines.train.resume import ask_to_go_back, choose_checkpoint
from pipelines.train.schedule import check_schedule
from pipelines.train.snapshots import is_there, snapshot_url
from pipelines.train.space import check_kept, check_space
from pipelines.train.validation import check_validation
from pipelines.train.workers import check_cluster, possible_worlds, run_workers


@dataclass(frozen=True)
class TrainReport:
    """What scripts may rely on. loss: mean since the last point of the log; None where no step was applied.

    steady_images_per_second: since the last point of the log but one, so without the start, validation and the last
    checkpoint; None where nothing was trained. peak_memory_gb: of rank 0's GPU, or of its whole process on a CPU.
    """

    snapshot: str
    checkpoint: str
    step: int
    images_seen: int
    loss: float | None
    images_per_second: float
    run_id: str | None
    steady_images_per_second: float | None = None
    peak_memory_gb: float | None = None


@dataclass(frozen=True)
class TrainPlan:
    """What a run will do. dataset: its generations are fixed for the whole run."""

    dataset: LatentDataset
    exclusions: dict[int, frozenset[int]]  # by the step from which each is left out
    parameters: int
    output_bytes: int  # that the rest of the run adds at most
    checkpoint: str | None
    record: RunRecord | None  # of the run that goes on
    goes_back: bool = False  # to an earlier checkpoint than the newest
    notes: tuple[str, ...] = ()  # what changes on the way from the snapshot of init_from

    @property
    def generations(self) -> tuple[str, ...]:
        return tuple(manifest.generation for manifest in self.dataset.manifests)

    @property
    def step(self) -> int:
        """The optimizer step that the run goes on from."""
        return int(read_progress(self.checkpoint)["step"]) if self.checkpoint and self.record else 0

    @property
    def fingerprint(self) -> str:
        return fingerprint_hash(self.dataset.manifest.fingerprint)


def check(config: TrainConfig) -> None:
    """Raises RequestError for what is wrong whatever the latents are, and wherever it runs."""
    world = possible_worlds(config)[0]
    check_schedule(config)
    check_kept(config)
    engine_settings(config, 1, world)


def plan(config: TrainConfig) -> TrainPlan:
    """Checks the whole request without starting a worker. Raises RequestError."""
    check(config)
    storage.check_writable("output", config.output)
    checkpoint = choose_checkpoint(config.output, config.resume_from)
    record = read_record(config, checkpoint)
    batches_read = read_progress(checkpoint)["batches_read"] if checkpoint and record else 0
    exclusions = exclusions_asked(config, record, batches_read)
    dataset = open_latents(config, record.generations if record else None, exclusions)
    check_cluster(config)
    check_validation(config, dataset)
    if config.holdout > 0 and config.validation.images > 0:
        open_holdout(config, record.generations if record else None, exclusions)
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
    output_bytes = check_space(config, parameters, checkpoint)
    # Asked for: a newer checkpoint may also come of a command that is about to learn of this one.
    goes_back = config.resume_from is not None and checkpoint not in (None, newest_checkpoint(config.output))
    return TrainPlan(dataset, exclusions, parameters, output_bytes, checkpoint, record, goes_back, notes)


def train(config: TrainConfig) -> TrainReport:
    """Trains to `max_steps`, from the newest checkpoint in `output` where there is one.

    Raises RequestError; RuntimeError where the workers failed more than `max_failures` times, or another command took
    the output over; KeyboardInterrupt where Ctrl-C or SIGTERM asked for the end, after a checkpoint.
    """
    config, todo = _checked(config)
    if (report := _finished(config, todo)) is not None:
        say(f"train: step {report.step:,} is reached already")
        _keep_record(config, todo, report.run_id)  # what is excluded now stays so when the run goes on
        if report.run_id and kept_files(tracking_url(config.output)):
            with _tracker(config, report.run_id):
                pass  # which sends what MLflow has not heard yet
        return report
    if cluster.known_nodes() is None:  # asked before the claim, which ends a run that works on this output
        with cluster.ray_session():
            check_cluster(config)
    # Another trajectory, whose points would meet those of the one that is left, has a run of its own.
    run_id = todo.record.run_id if todo.record and not todo.goes_back else None
    with Claim(config.output) as claim, _tracker(config, run_id) as tracker, cluster.ray_session():
        record = _keep_record(config, todo, tracker.run_id)
        generation = "+".join(record.generations)
        if tracker.run_id != run_id:
            tracker.tag({"generation": generation, "fingerprint": record.fingerprint, **cluster.describe()})
        tracker.tag({"samples": record.chosen["samples"], "chosen": record.chosen["hash"]})
        for manifest in todo.dataset.manifests:
            tracker.dataset(lineage.latent_dataset(manifest), "training")
        where = f"goes on from {todo.checkpoint}" if todo.checkpoint else "begins"
        if config.resume_from and todo.checkpoint and int(todo.checkpoint.rpartition("-")[2]) != config.resume_from:
            where += f", as it went back to step {config.resume_from:,} before"
        say(f"train: {where}; {todo.parameters / 1e6:.1f} M parameters, {describe_samples(todo.dataset)}")
        for note in todo.notes:
            say(f"train: init_from: {note}")
        ask_to_go_back(config.output, config.resume_from)

        def started(step: int, seconds: float) -> None:
            tracker.log({"perf/start_seconds": seconds}, step * config.global_batch_size)

        result = run_workers(config, record, tracker, started, claim.check)
        _name_the_best(config, tracker, generation)
    return TrainReport(**result, run_id=tracker.run_id)


def finished(config: TrainConfig) -> TrainReport | None:
    """The report of a run that is at `max_steps`; None where there is work left. Raises RequestError."""
    return _finished(*_checked(config))


def _checked(config: TrainConfig) -> tuple[TrainConfig, TrainPlan]:
    """The request as workers in other folders are given it, and what is left of it. Raises RequestError."""
    if config.init_from:  # part of what a run began with: the same from any folder
        config = config.model_copy(update={"init_from": storage.absolute(config.init_from)})
    todo = plan(config)
    where = {
        "latents": tuple(storage.absolute(url) for url in config.latents_urls),
        "output": storage.absolute(config.output),
        "tracking": config.tracking.resolved(),
    }
    return config.model_copy(update=where), todo


def _name_the_best(config: TrainConfig, tracker: Tracker, generation: str) -> None:
    """Of the snapshots that are there and were validated as the last one was, the one with the smallest loss."""
    samples = newest_samples(config.output)
    for loss, step in best_steps(config.output):
        if is_there(config.output, step):
            # What a loss depends on beside the weights.
            about = [samples, generation, config.diffusion.model_dump(mode="json")]
            measured_on = hashlib.sha256(canonical_json(about).encode()).hexdigest()[:16]
            tracker.best_model(read_snapshot(snapshot_url(config.output, step)), "val/loss", loss, measured_on)
            return


def _tracker(config: TrainConfig, run_id: str | None) -> Tracker:
    folder = tracking_url(config.output)
    return Tracker(config.tracking, f"train/{storage.name(config.output)}", config, run_id, folder=folder)


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
    progress = read_progress(todo.checkpoint)
    if progress["step"] < config.max_steps or not is_there(config.output, progress["step"]):
        return None
    return TrainReport(
        snapshot=snapshot_url(config.output, progress["step"]),
        checkpoint=storage.absolute(todo.checkpoint),
        images_per_second=0.0,
        run_id=todo.record.run_id,
        **{key: progress[key] for key in ("step", "images_seen", "loss")},
    )

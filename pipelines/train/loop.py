"""What a training worker does: batches by position, noise by sample, one ZeRO step, EMA, checkpoint, snapshot.

Nothing random depends on rank, world or micro-batch: order, posterior, noise, timestep and dropped label of a sample
are functions of (seed, epoch, sample id).
"""

import contextlib
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ldm.cost import UntraceableError
from ldm.latents.batch import LatentBatch
from ldm.snapshot import read_snapshot
from pipelines import lineage
from pipelines.tracking import PROGRESS_KEY, Tracker
from pipelines.train import zero
from pipelines.train.build import build_denoiser, build_engine, ema_profiles, open_holdout, open_latents
from pipelines.train.checkpoint_files import CheckpointError
from pipelines.train.config import TrainConfig
from pipelines.train.deterministic import Slowdown, measure_slowdown
from pipelines.train.ema import Ema
from pipelines.train.guard import Guard, Samples, Usual, poisoned
from pipelines.train.memory import training_flops
from pipelines.train.meter import Meter
from pipelines.train.microbatch import micro_batch_size, worker_device
from pipelines.train.objective import Objective
from pipelines.train.rate import matmul_rate
from pipelines.train.record import note_validation, validations
from pipelines.train.resume import Origin, find_origin, resume
from pipelines.train.saver import Saver
from pipelines.train.schedule import learning_rate
from pipelines.train.signals import Notices
from pipelines.train.snapshots import is_there, make_snapshot, prune_snapshots, snapshot_url, validated_snapshot
from pipelines.train.start_times import StartTimes
from pipelines.train.tell import tell
from pipelines.train.validation import Validation


class Worker:
    """One rank of a training run.

    step counts the optimizer steps that were applied; batches_read counts the batches of skipped ones too.
    """

    def __init__(
        self,
        config: TrainConfig,
        generations: list[str],
        exclusions: dict[int, str],
        tracker: Tracker,
        board: Any,
        times: StartTimes,
    ) -> None:
        self.config, self.tracker, self.board, self.times = config, tracker, board, times
        self.notices = Notices(board)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.share = config.global_batch_size // self.world
        self.dataset = open_latents(config, generations, exclusions)
        times.done("latents")
        denoiser = build_denoiser(config, self.dataset)
        origin, device = find_origin(config.output, zero.all_gather), worker_device()
        on_gpu = device.type == "cuda"
        self.micro_batch = micro_batch_size(config, denoiser, self.dataset, device, origin.url, by_trial=on_gpu)
        self.slowdown: Slowdown | None = None
        if config.deterministic:
            times.done("denoiser")
            self.slowdown = measure_slowdown(config, denoiser, self.dataset, device, self.micro_batch)
            if self.rank == 0:
                tell(f"deterministic=true: {self.slowdown}")
            times.done("deterministic")
        self.engine = build_engine(config, denoiser, self.micro_batch)
        times.done("engine")
        self.device = self.engine.device
        self.objective = Objective(config, self.dataset, self.device)
        self.ema = Ema(self.engine.state, ema_profiles(config))
        self.guard = Guard(config.output, config.skip_limit, Usual())
        self.meter = self._build_meter()
        times.done("meter")
        self.validation = self._build_validation(generations, exclusions)
        self.saver = self._build_saver()
        self.step, self.batches_read = 0, 0
        self.loss: float | None = None
        self.point: dict[str, float] = {}  # the newest of the log
        self._resume(origin)
        times.done("checkpoint")
        self.first_step = self.step

    @property
    def snapshot(self) -> str:
        return snapshot_url(self.config.output, self.step)

    @property
    def images_seen(self) -> int:
        return self.step * self.config.global_batch_size

    def run(self) -> dict[str, Any]:
        """Trains from `first_step` to `max_steps`; returns the report's values.

        Raises FatalError and CheckpointError on all ranks alike.
        """
        if self.saver.checkpoint and self.rank == 0:
            self._finish_snapshot(self.saver.checkpoint)
        if self._missed_validation():
            self._validate()
        started = time.monotonic()
        self.meter.restart()
        self._show()
        pin = self.device.type == "cuda"
        batches = self.dataset.batches(self.batches_read, rank=self.rank, world=self.world, workers=1, pin=pin)
        with contextlib.closing(batches):
            while self.step < self.config.max_steps:
                with self.meter.waiting():
                    batch = next(batches)
                applied, save, stop = self._train_step(batch)
                self._after_step(applied, save, stop)
                self._show()
                if stop:
                    break
        self.saver.close()
        images = (self.step - self.first_step) * self.config.global_batch_size
        return {
            "snapshot": self.snapshot,
            "checkpoint": self.saver.checkpoint,
            "first_step": self.first_step,
            "step": self.step,
            "images_seen": self.images_seen,
            "loss": self.loss,
            "images_per_second": round(images / (time.monotonic() - started), 2),
            "steady_images_per_second": self.point.get("perf/images_per_second"),
            "peak_memory_gb": self.point.get("perf/memory_gb"),
        }

    def _train_step(self, batch: LatentBatch) -> tuple[bool, bool, bool]:
        """One optimizer step: the rank's share in micro-batches.

        Returns (it was applied, a checkpoint is wanted, the run is to stop after it), on all ranks alike.
        """
        rate = learning_rate(self.config, self.images_seen + self.config.global_batch_size)
        # For a denoiser of the user's own that draws random numbers, such as dropout: a resumed run draws the same.
        torch.manual_seed((self.config.seed + self.batches_read * 1_000_003) * self.world + self.rank)
        outcome, samples = None, list[Samples]()
        for first in range(0, self.share, self.micro_batch):
            part = batch[first : first + self.micro_batch]
            losses = self.objective.training_losses(self.engine, part)
            self.engine.backward(poisoned(losses.mean()))
            outcome = self.engine.step(rate)
            samples.append((part.ids, losses.detach()))
        assert outcome is not None
        loss, save, stop = self._agree(torch.cat([losses for _, losses in samples]))
        self.batches_read += 1
        self.meter.add(outcome.applied, loss, outcome.grad_norm)
        where = {"batch": self.batches_read - 1, "step": self.step, "gradient_norm": outcome.grad_norm}
        if outcome.applied:
            self.ema.update()
            self.step += 1
            self.guard.applied(loss, samples, where)
        else:
            self.guard.skipped(samples, where, self.saver.checkpoint)
        return outcome.applied, save, stop

    def _agree(self, losses: Tensor) -> tuple[float, bool, bool]:
        """(the mean loss of all ranks, and whether any was asked to save, to stop) in one collective."""
        asked = torch.tensor(self.notices.asked(), dtype=torch.float64, device=self.device)
        sums = torch.cat([losses.double().mean()[None], asked])
        dist.all_reduce(sums)
        loss, save, stop = sums.tolist()
        return loss / self.world, save > 0, stop > 0

    def _after_step(self, applied: bool, asked: bool, stop: bool) -> None:
        """What is due at this step: a point of the log, a validation, a checkpoint."""
        config, last = self.config, self.step == self.config.max_steps
        saves = applied and (self.step % config.checkpoint_every == 0 or last)
        if applied and (self.step % config.log_every == 0 or last):
            self._log()
        if saves or asked:
            self._save()
        if asked:
            self._answer(stop)
        if applied and self._validates():
            self._validate()

    def _validates(self) -> bool:
        """Whether a validation is due at this step."""
        every = self.config.validation.every or self.config.checkpoint_every
        return self.step % every == 0 or self.step == self.config.max_steps

    def _build_meter(self) -> Meter:
        """Every rank measures its matmul rate, at the same time as those that share its cores."""
        rate = matmul_rate(self.config.precision, self.device.type, torch.get_num_threads()).flops_per_second
        flops = None
        if self.rank == 0:  # whose points are logged
            with contextlib.suppress(UntraceableError):  # then there is no MFU
                flops = training_flops(self.config, self.dataset)
        return Meter(self.config.global_batch_size, self.world, flops, rate)

    def _build_validation(self, generations: list[str], exclusions: dict[int, str]) -> Validation:
        config, holdout = self.config, None
        if config.holdout > 0 and config.validation.images > 0:
            holdout = open_holdout(config, generations, exclusions)
        return Validation(config, self.engine, self.ema, self.objective, self.dataset, holdout, self.micro_batch)

    def _log(self) -> None:
        """A point in MLflow: means over ranks and over the steps since the last point."""
        point = self.point = self.meter.point(self.device)
        self.loss = point.get("train/loss", self.loss)
        counts = {
            "train/learning_rate": learning_rate(self.config, self.images_seen),
            "train/loss_spikes": self.guard.spikes,
            "perf/workers": self.world,
            "perf/micro_batch_size": self.micro_batch,
            PROGRESS_KEY: self.step,
        }
        slowdown = {} if self.slowdown is None else {"perf/deterministic_cost": self.slowdown.share}
        self.tracker.log({**point, **self.saver.metrics, **counts, **slowdown}, self.images_seen)

    def _missed_validation(self) -> bool:
        """Whether a kill came between the checkpoint of this step and its validation. Collective."""
        missed = self.step > 0 and self._validates() and self.step not in validations(self.config.output)
        return bool(self.validation.measures and zero.all_gather(missed)[0])

    def _validate(self) -> None:
        """After the checkpoint, which what goes wrong here cannot take along."""
        with self.meter.pause():
            losses, grid = self.validation.run()
        if losses:
            self.tracker.log(losses, self.images_seen)
            if self.rank == 0:
                self.tracker.secure()
                note_validation(self.config.output, self.step, losses["val/loss"], self.validation.samples)
                self._say_validated(self.step)
        if grid is not None:
            self.tracker.grid("samples", grid, self.images_seen)

    def _say_validated(self, step: int) -> None:
        """A step's validation is its snapshot's: said by whichever of the two comes last, or by both."""
        if (snapshot := validated_snapshot(self.config.output, step)) is not None:
            self.tracker.validated(snapshot, lineage.latent_dataset(self.dataset.manifest))

    def _build_saver(self) -> Saver:
        config = self.config
        return Saver(
            config.output,
            self.engine.state,
            self.ema,
            before_commit=self.tracker.secure,  # points up to here: a resumed run logs those after it
            after_commit=self._write_snapshot,
            keep_last=config.keep_last,
            keep_every=config.keep_every,
        )

    def _resume(self, origin: Origin) -> None:
        progress = resume(self.config.output, origin, self.engine.state, self.ema, zero.all_gather)
        self.saver.checkpoint = origin.url
        if progress:
            self.step, self.batches_read, self.loss = progress["step"], progress["batches_read"], progress["loss"]
            self.guard.load(progress["guard"])
            self.meter.load(progress["meter"])

    def _save(self) -> None:
        progress = {
            "step": self.step,
            "images_seen": self.images_seen,
            "loss": self.loss,
            "batches_read": self.batches_read,
            "guard": self.guard.state(),
            "meter": self.meter.state(),
            "micro_batch_size": self.micro_batch,
        }
        self.saver.save(progress)

    def _answer(self, stop: bool) -> None:
        """The checkpoint that was asked for is committed, or known to have failed."""
        try:
            self.saver.wait()
        except CheckpointError:  # which the saver has told and counted: training goes on
            if stop:
                raise
            self.notices.failed()
        else:
            self.notices.saved()

    def _finish_snapshot(self, checkpoint: str) -> None:
        """What a kill after the checkpoint may have prevented."""
        if is_there(self.config.output, self.step):
            self.tracker.model(read_snapshot(self.snapshot))
            self._say_validated(self.step)
        else:
            self._write_snapshot(checkpoint, {"step": self.step, "images_seen": self.images_seen})

    def _write_snapshot(self, checkpoint: str, progress: dict[str, Any]) -> None:
        """Of a committed checkpoint; on rank 0, beside the training."""
        self.tracker.model(make_snapshot(self.config, self.dataset, checkpoint, progress))
        self._say_validated(progress["step"])
        self.tracker.gone_models(prune_snapshots(self.config.output, self.config.keep_snapshots))

    def _show(self) -> None:
        if self.board is not None:
            if self.step > self.first_step and "step" not in self.times.seconds:
                self.times.done("step")
                self.board.started.remote(self.times.seconds)
            note = "" if self.loss is None else f"loss {self.loss:.4f}"
            self.board.write.remote({"start": self.first_step, "step": self.step, "note": note})

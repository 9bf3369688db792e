"""What a training worker does: batches by position, noise by sample, one ZeRO step, EMA, checkpoint, snapshot.

Nothing random depends on rank, world or micro-batch: order, posterior, noise, timestep and dropped label of a sample
are functions of (seed, epoch, sample id).
"""

import contextlib
import os
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ldm import random, storage
from ldm.config import validate
from ldm.denoiser import build_denoiser
from ldm.diffusion import Diffusion
from ldm.latents.batch import LatentBatch, draw_latents
from ldm.latents.cache import Cache
from ldm.latents.dataset import LatentDataset
from ldm.snapshot import read_snapshot, write_snapshot
from ldm.transfer import initial_weights
from pipelines import cluster
from pipelines.tracking import PROGRESS_KEY, Tracker
from pipelines.train import zero
from pipelines.train.checkpoint import load_checkpoint, newest_checkpoint, prune, read_full, save_checkpoint
from pipelines.train.checkpoint_files import CheckpointError
from pipelines.train.config import TrainConfig
from pipelines.train.ema import Ema, EmaProfile
from pipelines.train.signals import FatalError, Notices
from pipelines.train.start_times import StartTimes

EMA_PROFILE = "main"


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
    node = ray.get_runtime_context().get_node_id()
    job["board"].enter.remote(context.get_world_rank(), context.get_world_size(), node)
    zero.import_deepspeed()
    times.done("imports")
    cluster.use_threads(cluster.worker_threads(context.get_local_world_size()))
    config = validate(TrainConfig, job["config"])
    board = job["board"] if context.get_world_rank() == 0 else None
    run_id = job["run_id"]
    tracking = config.tracking if board is not None else config.tracking.model_copy(update={"enabled": False})
    with Tracker(tracking, "train", run_id=run_id, ends_run=False) as tracker:
        times.done("tracking")
        result = Worker(config, job["generations"], job["exclusions"], tracker, board, times).run()
    first_step = result.pop("first_step")
    if board is not None:
        ray.get(board.write.remote({"start": first_step, "step": result["step"], "note": "", "result": result}))


def open_latents(
    config: TrainConfig, generations: Sequence[str] | None, exclusions: Mapping[int, str | Collection[int]]
) -> LatentDataset:
    """The samples that a run trains on. exclusions: ids, or URLs of lists, by the step from which they are left out."""
    return LatentDataset(
        config.latents_urls,
        global_batch_size=config.global_batch_size,
        seed=config.seed,
        weights=config.weights,
        where=config.where,
        exclude=exclusions,
        holdout=config.holdout,
        shuffle=config.shuffle,
        generation=generations,
        cache=Cache(None if config.cache_gb is None else int(config.cache_gb * 1e9)),
    )


@dataclass
class _Window:
    """What is averaged between two points of the log. loss: the rank's sum over the steps that were applied."""

    loss: Tensor
    applied: int = 0
    skipped: int = 0
    waited: float = 0.0
    started: float = 0.0


class Worker:
    """One rank of a training run."""

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
        self.micro_batch = self.share if config.micro_batch_size == "auto" else int(config.micro_batch_size)
        self.dataset = open_latents(config, generations, exclusions)
        times.done("latents")
        self.engine = self._build_engine()
        times.done("engine")
        self.device = self.engine.device
        self.diffusion = Diffusion(config.diffusion, self.device)
        self.ema = Ema(self.engine.state, [EmaProfile(EMA_PROFILE, config.ema.decay)])
        # One rank decides for all: they might not see the same newest one.
        self.checkpoint: str | None = zero.all_gather(newest_checkpoint(config.output))[0]
        progress = {}
        if self.checkpoint:
            try:
                progress = load_checkpoint(self.checkpoint, self.engine.state, self.ema, zero.all_gather)
            except CheckpointError as error:
                raise FatalError(str(error)) from error
        times.done("checkpoint")
        self.first_step = self.step = int(progress.get("step", 0))
        self.loss: float | None = progress.get("loss")
        self.snapshot = ""

    @property
    def images_seen(self) -> int:
        return self.step * self.config.global_batch_size

    def run(self) -> dict[str, Any]:
        """Trains from `first_step` to `max_steps`; returns the report's values."""
        if self.checkpoint:
            self._write_snapshot()  # which a kill after the checkpoint may have prevented
        started = time.monotonic()
        self._window = self._new_window()
        self._show()
        on_gpu = self.device.type == "cuda"
        batches = self.dataset.batches(self.step, rank=self.rank, world=self.world, workers=1, pin=on_gpu)
        with contextlib.closing(batches):
            while self.step < self.config.max_steps:
                asked = time.monotonic()
                batch = next(batches)
                self._window.waited += time.monotonic() - asked
                self._train_step(batch)
                self.step += 1
                last = self.step == self.config.max_steps
                save, stop = self._agreed(*self.notices.asked())
                if self.step % self.config.log_every == 0 or last:
                    self._log()
                if self.step % self.config.checkpoint_every == 0 or last or save:
                    self._save()
                    self.notices.saved()
                self._show()
                if stop:
                    break
        images = (self.step - self.first_step) * self.config.global_batch_size
        return {
            "snapshot": self.snapshot,
            "checkpoint": self.checkpoint,
            "first_step": self.first_step,
            "step": self.step,
            "images_seen": self.images_seen,
            "loss": self.loss,
            "images_per_second": round(images / (time.monotonic() - started), 2),
        }

    def _agreed(self, *asked: bool) -> list[bool]:
        """What any rank was asked."""
        flags = torch.tensor(asked, dtype=torch.int32, device=self.device)
        dist.all_reduce(flags)
        return [bool(flag) for flag in flags.tolist()]

    def _build_engine(self) -> zero.Engine:
        config, dataset = self.config, self.dataset
        denoiser = build_denoiser(
            config.denoiser,
            in_channels=dataset.latent_shape[0],
            sample_size=dataset.latent_shape[1:],
            num_classes=dataset.num_classes or None,
            seed=config.seed,
        )
        if config.init_from and newest_checkpoint(config.output) is None:
            snapshot = read_snapshot(config.init_from, "init_from")
            denoiser.load_state_dict(initial_weights(snapshot, config.denoiser, denoiser))
        settings = zero.deepspeed_config(
            stage=config.zero_stage,
            precision=config.precision,
            global_batch_size=config.global_batch_size,
            micro_batch_size=self.micro_batch,
            world=self.world,
            gradient_clipping=config.gradient_clip,
        )
        return zero.initialize(denoiser, settings, betas=config.adam_betas, weight_decay=config.weight_decay)

    def _train_step(self, batch: LatentBatch) -> None:
        """One optimizer step: the rank's share in micro-batches."""
        learning_rate = self._learning_rate()
        outcome, loss_sum = None, torch.zeros((), device=self.device)
        for first in range(0, self.share, self.micro_batch):
            loss = self._loss(batch[first : first + self.micro_batch])
            self.engine.backward(loss)
            outcome = self.engine.step(learning_rate)
            loss_sum += loss.detach() * (self.micro_batch / self.share)
        assert outcome is not None
        if not outcome.applied:  # a gradient was not finite: every rank skips alike, and the loss means nothing
            self._window.skipped += 1
            return
        self.ema.update()
        self._window.applied += 1
        self._window.loss += loss_sum

    def _loss(self, batch: LatentBatch) -> Tensor:
        """Mean loss of a micro-batch. What is random is keyed by (seed, epoch, sample id)."""
        seed, ids, epochs = self.config.seed, batch.ids.to(self.device), batch.epochs.to(self.device)
        latents = draw_latents(batch, self.dataset.statistics, seed, self.device)
        noise = random.normal(seed, "noise", ids, epochs, tuple(latents.shape[1:]))
        t = self.diffusion.draw_timesteps(seed, ids, epochs)
        labels = None
        if self.dataset.num_classes:
            dropped = random.uniform(seed, "label-dropout", ids, epochs) < self.config.denoiser.label_dropout
            labels = torch.where(dropped, self.dataset.num_classes, batch.labels.to(self.device))
        return self.diffusion.loss(self.engine, latents, noise, t, labels).mean()

    def _learning_rate(self) -> float:
        """Linear warm-up, counted in images, then constant."""
        warm = (self.images_seen + self.config.global_batch_size) / max(1, self.config.warmup_images)
        return self.config.learning_rate * min(1.0, warm)

    def _new_window(self) -> _Window:
        return _Window(loss=torch.zeros((), device=self.device), started=time.monotonic())

    def _log(self) -> None:
        """A point in MLflow: the mean loss over ranks and over the steps since the last point."""
        window, self._window = self._window, self._new_window()
        dist.all_reduce(window.loss)
        steps = window.applied + window.skipped
        losses = {}
        if window.applied:
            self.loss = losses["train/loss"] = float(window.loss) / (window.applied * self.world)
        seconds = max(1e-9, time.monotonic() - window.started)
        self.tracker.log(
            {
                **losses,
                "train/learning_rate": self._learning_rate(),
                "train/skipped_steps": window.skipped,
                "perf/images_per_second": steps * self.config.global_batch_size / seconds,
                "data/wait_share": window.waited / seconds,
                PROGRESS_KEY: self.step,
            },
            self.images_seen,
        )

    def _save(self) -> None:
        """Checkpoint on all ranks, then rank 0 writes the snapshot from its files."""
        progress = {"step": self.step, "images_seen": self.images_seen, "loss": self.loss}
        self.checkpoint = save_checkpoint(self.config.output, self.engine.state, self.ema, progress, zero.all_gather)
        self._write_snapshot()
        if self.rank == 0:
            prune(self.config.output, self.config.keep_last)

    def _write_snapshot(self) -> None:
        assert self.checkpoint is not None
        self.snapshot = snapshot_url(self.config.output, self.step)
        if self.rank != 0 or storage.exists(storage.join(self.snapshot, "snapshot.json")):
            return
        manifest = self.dataset.manifest
        write_snapshot(
            self.snapshot,
            read_full(self.checkpoint, f"ema.{EMA_PROFILE}") | read_full(self.checkpoint, "buffer"),
            denoiser_config=self.config.denoiser,
            diffusion_config=self.config.diffusion,
            statistics=self.dataset.statistics,
            conditioning=manifest.conditioning,
            latent_shape=self.dataset.latent_shape,
            fingerprint=manifest.fingerprint,
            step=self.step,
            images_seen=self.images_seen,
            autoencoder_url=storage.join(manifest.url, "autoencoder"),
        )

    def _show(self) -> None:
        if self.board is not None:
            if self.step > self.first_step and "step" not in self.times.seconds:
                self.times.done("step")
                self.board.started.remote(self.times.seconds)
            note = "" if self.loss is None else f"loss {self.loss:.4f}"
            self.board.write.remote({"start": self.first_step, "step": self.step, "note": note})


def snapshot_url(output: str, step: int) -> str:
    return storage.join(output, "snapshots", f"step-{step:010d}")

"""What the average of the weights has learned: its loss on held-out samples at fixed timesteps, and pictures it draws.

Nothing is gathered but pictures: the average takes the masters' place for a while, on every rank and at every stage.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from ldm import images, storage
from ldm.autoencoder import load_autoencoder
from ldm.config import RequestError
from ldm.drawing import PictureSampler
from ldm.labels import resolve_labels
from ldm.latents.dataset import LatentDataset
from ldm.plan import SamplerConfig, make_plan
from pipelines.train import zero
from pipelines.train.config import TrainConfig, ValidationConfig
from pipelines.train.ema import Ema
from pipelines.train.objective import Objective


class Validation:
    """Validates the average `main` as `config.validation` asks. Every method is collective.

    holdout: the split that is never trained on; None where there is none.
    """

    def __init__(
        self,
        config: TrainConfig,
        engine: zero.Engine,
        ema: Ema,
        objective: Objective,
        dataset: LatentDataset,
        holdout: LatentDataset | None,
        micro_batch: int,
    ) -> None:
        self.config, self.engine, self.ema, self.objective = config, engine, ema, objective
        self.dataset, self.holdout, self.micro_batch = dataset, holdout, micro_batch
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._sampler: PictureSampler | None = None

    def run(self) -> tuple[dict[str, float], npt.NDArray[np.uint8] | None]:
        """(val/loss and val/loss_tNNNN, a grid of pictures uint8 (3, H, W)), each where it was asked for."""
        if not self._draws and not self.measures:
            return {}, None
        with averaged(self.engine, self.ema, "main"):
            losses = self._losses() if self.measures else {}
            return losses, self._grid() if self._draws else None

    @property
    def measures(self) -> bool:
        return self.holdout is not None and self.config.validation.images > 0

    @functools.cached_property
    def samples(self) -> str:
        """Names those that are measured: how many, and of which."""
        assert self.holdout is not None
        return f"{self._count} of {self.holdout.chosen['hash']}"

    @property
    def _count(self) -> int:
        assert self.holdout is not None
        return min(self.config.validation.images, self.holdout.num_samples)

    @property
    def _draws(self) -> bool:
        return self.config.validation.grid > 0

    def _losses(self) -> dict[str, float]:
        """Of the first samples of the holdout in its order, which no world changes."""
        assert self.holdout is not None
        times, batch_size = self.objective.validation_times(), self.config.global_batch_size
        count = self._count
        sums = torch.zeros(len(times), dtype=torch.float64, device=self.engine.device)
        slots = torch.from_numpy(self.holdout.slots(self.rank, self.world))
        for step in range(-(-count // batch_size)):
            batch, inside = self.holdout.batch(step, self.rank, self.world), slots + step * batch_size < count
            for first in range(0, len(batch), self.micro_batch):
                part = slice(first, first + self.micro_batch)
                weights = inside[part].to(self.engine.device)  # the last batch begins the samples again
                for number, t in enumerate(times):
                    losses = self.objective.validation_losses(self.engine, batch[part], t)
                    sums[number] += (losses * weights).sum()
        dist.all_reduce(sums)
        means = (sums / count).tolist()
        return {"val/loss": float(np.mean(means))} | {
            f"val/loss_t{t:04d}": loss for t, loss in zip(times, means, strict=True)
        }

    def _grid(self) -> npt.NDArray[np.uint8]:
        """The first seeds of `ldm sample`, each rank its share; classes in turn."""
        settings, conditioning = self.config.validation, self.dataset.manifest.conditioning
        share = -(-settings.grid // self.world)
        if self._sampler is None:
            folder = storage.join(self.dataset.manifest.url, "autoencoder")
            autoencoder = load_autoencoder(folder, str(self.engine.device))
            self._sampler = PictureSampler(
                self.engine.inner,
                autoencoder,
                self.config.diffusion,
                self.dataset.statistics,
                conditioning,
                self.dataset.latent_shape,
                batch_size=min(share, self.micro_batch),
            )
        labels = resolve_labels(None, conditioning, share * self.world)
        own = torch.arange(self.rank * share, (self.rank + 1) * share)
        drawn = self._sampler.draw(None if labels is None else labels[own], own, _sampler(settings))
        pictures = torch.cat(zero.all_gather(drawn.cpu()))[: settings.grid]
        return images.grid(pictures.numpy(), columns=max(1, round(len(pictures) ** 0.5)))


def check_validation(config: TrainConfig, dataset: LatentDataset) -> None:
    """Raises RequestError where the latents have no decoder, or for pictures that the model cannot draw."""
    settings, conditioning = config.validation, dataset.manifest.conditioning
    folder = storage.join(dataset.manifest.url, "autoencoder")
    if not storage.exists(storage.join(folder, "config.json")):  # of snapshots, too
        raise RequestError(f"latents={dataset.manifest.url}: lacks its autoencoder; give what `ldm encode` wrote")
    if not settings.grid:
        return
    try:
        make_plan(config.diffusion, _sampler(settings))
    except RequestError as error:
        prefix = "" if str(error).startswith("diffusion.") else "validation."
        raise RequestError(f"{prefix}{error}") from None
    if settings.guidance_scale != 1:
        line = f"validation.guidance_scale={settings.guidance_scale}: "
        if conditioning.type == "none":
            raise RequestError(line + "the latents have no classes; must be 1")
        if config.denoiser.label_dropout == 0:
            raise RequestError(line + "denoiser.label_dropout=0 trains no null class; must be 1")


def _sampler(settings: ValidationConfig) -> SamplerConfig:
    return SamplerConfig(num_inference_steps=settings.num_inference_steps, guidance_scale=settings.guidance_scale)


@contextlib.contextmanager
def averaged(engine: zero.Engine, ema: Ema, profile: str) -> Iterator[None]:
    """Forward passes are evaluation with an average in the masters' place; after it all is as before. Collective."""
    state = engine.state
    kept = [held.master.clone() for held in state.held]
    training = engine.inner.training
    engine.inner.eval()
    with torch.no_grad():
        _put(engine, ema.averages[profile])
        yield  # an error of one rank ends the run, and must not wait in `publish` for the others
        for held, master in zip(state.held, kept, strict=True):
            held.master.copy_(master)
        state.publish()
    engine.inner.train(training)


def _put(engine: zero.Engine, averages: Sequence[torch.Tensor]) -> None:
    """Averages of this rank's fragments => the masters of all ranks."""
    state = engine.state
    if state.stage == 0:  # every rank holds all masters, and averages its share of them
        for held in state.held:
            held.master.zero_()
    for fragment, average in zip(state.fragments, averages, strict=True):
        fragment.master.copy_(average)
    if state.stage == 0:
        for held in state.held:
            dist.all_reduce(held.master)
    state.publish()

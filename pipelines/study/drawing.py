"""Drawing on Ray workers, timed: one arm at a time on each, and nothing else there meanwhile."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from ldm.config import RequestError, validate
from ldm.drawing import PictureSampler, load_sampler
from ldm.labels import resolve_labels
from ldm.plan import SamplerConfig
from pipelines import cluster
from pipelines.study.config import StudyConfig
from pipelines.study.quality import Quality

SHOWN = 10
"""Pictures that an arm keeps for the grid, those of the first seeds."""


@dataclass(frozen=True)
class Drawn:
    """What drawing gave. seconds: of all pictures, decoding included, a first call not. first: uint8 (n, 3, H, W)."""

    seconds: float
    figures: dict[str, float]
    first: npt.NDArray[np.uint8]
    device: str
    threads: int

    def row(self, config: StudyConfig, quality: Quality | None) -> dict[str, Any]:
        """What a table says of it."""
        return {
            **self.figures,
            **(quality.about if quality else {}),
            "seconds_per_picture": self.seconds / config.num_images,
            "num_images": config.num_images,
            "batch_size": config.batch_size,
            "device": self.device,
            "threads": self.threads,
        }


class Drawer:
    """A worker that draws from one snapshot."""

    def __init__(
        self,
        snapshot: str,
        config: StudyConfig,
        threads: int,
        denoiser_type: str | None = None,
        precision: Literal["fp32", "bf16"] = "fp32",
    ) -> None:
        cluster.use_threads(threads)
        self.config = config
        self._asked = snapshot, config.batch_size, config.device, denoiser_type, precision
        self._loaded: PictureSampler | None = None
        self._warm: set[bool] = set()

    @property
    def sampler(self) -> PictureSampler:
        """Loaded when it is asked for the first time: what is wrong with it then comes as itself, and not as a worker
        that did not start."""
        if self._loaded is None:
            self._loaded = load_sampler(*self._asked)
        return self._loaded

    def draw(self, name: str, settings: Mapping[str, Any], quality: Quality | None) -> tuple[str, Drawn]:
        """(name, the pictures of the study's seeds). settings: those of a `SamplerConfig`."""
        sampler, config = self.sampler, validate(SamplerConfig, settings)
        count = self.config.num_images
        labels = resolve_labels(None, sampler.conditioning, count)
        seeds = torch.arange(self.config.seed, self.config.seed + count)
        self._warm_up(config)
        started = time.perf_counter()
        pixels = sampler.draw(labels, seeds, config)  # ends on the CPU, so that nothing is under way
        seconds = time.perf_counter() - started
        figures = quality.figures(pixels, labels) if quality else {}
        first, device = pixels[:SHOWN].numpy(), device_name(sampler)
        return name, Drawn(seconds, figures, first, device, torch.get_num_threads())

    def _warm_up(self, settings: SamplerConfig) -> None:
        """One call of the shape that comes: guided batches have twice the rows."""
        guided = settings.guidance_scale != 1
        if guided in self._warm:
            return
        self._warm.add(guided)
        count = self.config.batch_size
        labels = resolve_labels(None, self.sampler.conditioning, count)
        self.sampler.draw(labels, torch.arange(count), settings)


def device_name(sampler: PictureSampler) -> str:
    return torch.cuda.get_device_name() if sampler.device.type == "cuda" else "cpu"


def check_workers(device: str, num_workers: int) -> str:
    """`auto` => where so many workers will run, "cuda" or "cpu". Raises RequestError for GPUs that are not there."""
    if (nodes := cluster.known_nodes()) is None:
        with cluster.ray_session():
            nodes = list(cluster.live_nodes().values())
    device = cluster.choose_device(device, nodes)
    cluster.check_room(num_workers, device, nodes)
    return device


def draw_all(
    cells: Mapping[str, SamplerConfig],
    snapshot: str,
    config: StudyConfig,
    quality: Quality | None,
    num_workers: int = 1,
    **options: Any,
) -> Iterator[tuple[str, Drawn]]:
    """(name, what was drawn) of each cell, as they end; a worker that is lost is started again.

    Within a Ray session. options: of `Drawer`. Raises RequestError, also that of a worker; RuntimeError.
    """
    import ray
    from ray.util import ActorPool

    device = cluster.resolve_device(config.device)
    workers = min(num_workers, len(cells))
    resources, threads = cluster.resources_per_worker(workers, device)
    config = config.model_copy(update={"device": device})
    actor = ray.remote(Drawer).options(
        num_cpus=resources["CPU"], num_gpus=resources.get("GPU", 0), max_restarts=2, max_task_retries=2
    )
    shared = ray.put(quality)
    actors = [actor.remote(snapshot, config, threads, **options) for _ in range(workers)]
    try:
        yield from ActorPool(actors).map_unordered(
            lambda worker, cell: worker.draw.remote(cell[0], cell[1].model_dump(mode="json"), shared),
            list(cells.items()),
        )
    except ray.exceptions.RayError as error:
        if isinstance(cause := getattr(error, "cause", None), RequestError):
            raise cause from None
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise RuntimeError(f"drawing failed: {lines[-1]}; the same command goes on") from error
    finally:
        for one in actors:
            ray.kill(one)

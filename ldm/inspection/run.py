"""Tells a latent dataset from pictures, checks the request, and looks."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ldm import storage
from ldm.autoencoder import Autoencoder, load_autoencoder
from ldm.config import RequestError
from ldm.inspection.config import InspectConfig
from ldm.inspection.latents import LatentsReport, inspect_latents
from ldm.inspection.pictures import PicturesReport, inspect_pictures
from ldm.latents.manifest import Manifest, read_manifest
from ldm.sources import InputShard, find_shards


@dataclass(frozen=True)
class InspectPlan:
    """manifest: of a latent dataset, else None. shards, class_names: of pictures."""

    manifest: Manifest | None
    shards: dict[str, InputShard]
    class_names: tuple[str, ...]
    autoencoder: Autoencoder | None


def inspect(
    config: InspectConfig, progress: Callable[[int, int], None] | None = None
) -> PicturesReport | LatentsReport:
    """Looks, and changes nothing but the preview. Raises RequestError; DamagedError of a manifest."""
    todo = plan(config)
    if todo.manifest is not None:
        return inspect_latents(config, todo.manifest, progress)
    return inspect_pictures(config, todo.shards, todo.class_names, todo.autoencoder, progress)


def plan(config: InspectConfig) -> InspectPlan:
    """Checks the whole request. Raises RequestError."""
    if config.preview is not None:
        _check_preview(config.preview)
    if isinstance(config.target, str) and _is_latents(config.target):
        if config.autoencoder is not None:
            raise RequestError(
                f"autoencoder={config.autoencoder}: is for pictures; {config.target} holds latents and has its own"
            )
        return InspectPlan(read_manifest(config.target, config.generation, key="target"), {}, (), None)
    if config.generation is not None:
        raise RequestError(f"generation={config.generation}: is of a latent dataset, which {config.target} is not")
    if config.price_per_hour is not None and config.autoencoder is None:
        raise RequestError(f"price_per_hour={config.price_per_hour:g}: needs hours; give autoencoder= to measure them")
    try:
        shards, class_names = find_shards(config.target)
    except RequestError as error:
        raise RequestError(str(error).replace("source=", "target=", 1)) from None
    return InspectPlan(None, shards, class_names, _load(config))


def _is_latents(target: str) -> bool:
    return storage.is_directory(target) and storage.exists(storage.join(target, "manifest.json"))


def _load(config: InspectConfig) -> Autoencoder | None:
    if config.autoencoder is None:
        return None
    there = torch.cuda.is_available()
    if config.device == "cuda" and not there:
        raise RequestError("device=cuda: this machine has no GPU; give device=cpu or device=auto")
    device = "cuda" if there and config.device != "cpu" else "cpu"
    autoencoder = load_autoencoder(config.autoencoder, device, config.precision)
    if config.image_size % autoencoder.factor:
        near = max(1, round(config.image_size / autoencoder.factor)) * autoencoder.factor
        raise RequestError(
            f"image_size={config.image_size}: the autoencoder's factor {autoencoder.factor} does not divide it; "
            f"give {near}"
        )
    return autoencoder


def _check_preview(place: str) -> None:
    if not place.endswith(".png"):
        raise RequestError(f"preview={place}: is no .png; give the file to write, such as preview=grid.png")
    if storage.is_local(place):
        path = storage.local_path(place)
        if path.is_dir():
            raise RequestError(f"preview={place}: is a directory; give the file to write")
        storage.check_writable("preview", str(path.parent))

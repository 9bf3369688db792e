"""A snapshot from a DiT of others: diffusers' DiTPipeline folder, or a checkpoint of facebookresearch/DiT.

Files of others are not trusted: JSON and safetensors, and `.pt` through torch's weights-only loader, which runs none
of what a file says.
"""

import math
import re
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ConfigDict, Field

from ldm import storage
from ldm.autoencoder import Autoencoder, load_autoencoder
from ldm.config import Config, Location, RequestError
from ldm.exchange.foreign import ForeignModel
from ldm.exchange.original import read_original
from ldm.exchange.pipeline import fetch_pipeline, read_pipeline
from ldm.images import PictureRules
from ldm.latents.manifest import Conditioning, make_fingerprint
from ldm.latents.receipt import Statistics
from ldm.shards import read_class_names
from ldm.snapshot import write_snapshot


class ImportConfig(Config):
    """Makes a snapshot of a model of others, to sample or to fine-tune from."""

    model_config = ConfigDict(populate_by_name=True)  # `from` is no name in Python

    source: Location = Field(
        alias="from", description="diffusers DiTPipeline (folder, URL or hub id), or an original DiT checkpoint (.pt)"
    )
    output: Location = Field(description="directory or URL of the snapshot; empty or new")
    autoencoder: Location | None = Field(
        None, description="diffusers autoencoder (folder, URL or hub id); a .pt needs one, a pipeline has its own"
    )
    num_heads: int | None = Field(
        None, ge=1, description="attention heads of a .pt, which does not say; null: those of the published size"
    )
    class_names: Location | None = Field(None, description="JSON file with the list of class names")


@dataclass(frozen=True)
class ImportReport:
    """What scripts may rely on. notes: what was understood, or is otherwise than there, a line each."""

    snapshot: str
    parameters: int
    num_classes: int
    latent_shape: tuple[int, int, int]
    notes: tuple[str, ...]


def import_model(config: ImportConfig, dry_run: bool = False) -> ImportReport:
    """Reads everything, checks it, and writes the snapshot unless `dry_run`.

    Raises RequestError where a file is damaged, of another kind, or holds a model that ours cannot be.
    """
    storage.check_writable("output", config.output)
    if storage.list_dir(config.output):
        raise RequestError(f"output={config.output}: holds something already; give an empty or new folder")
    with tempfile.TemporaryDirectory() as temporary:
        try:
            model, vae_folder = _read(config, Path(temporary))
            model.check()
        except RequestError as error:
            if re.split("[:=]", str(error))[0] in ImportConfig.model_fields:
                raise
            raise RequestError(f"from={config.source}: {error}") from None
        autoencoder = _load_autoencoder(config, vae_folder)
        factor = autoencoder.config.get("scaling_factor")
        if not isinstance(factor, int | float) or not 0 < factor < math.inf:
            raise RequestError(f"from={config.source}: its autoencoder's scaling_factor={factor}: must be above 0")
        if autoencoder.latent_channels != model.latent_shape[0]:
            raise RequestError(
                f"from={config.source}: is of latents of {model.latent_shape[0]} channels, "
                f"but the autoencoder has {autoencoder.latent_channels}"
            )
        conditioning = _named(config, model.conditioning)
        if not dry_run:
            autoencoder.save(temporary := str(Path(temporary) / "autoencoder"))
            _write(config, model, conditioning, autoencoder, temporary)
    return ImportReport(
        snapshot=config.output,
        parameters=sum(tensor.numel() for tensor in model.weights.values()),
        num_classes=conditioning.num_classes,
        latent_shape=model.latent_shape,
        notes=(*model.notes, *_notes(model)),
    )


def _read(config: ImportConfig, temporary: Path) -> tuple[ForeignModel, Path | None]:
    """(the model, the folder of its autoencoder if it has one)"""
    if not config.source.endswith((".pt", ".pth")):
        folder = fetch_pipeline(config.source, temporary)
        return read_pipeline(folder), folder / "vae"
    if config.autoencoder is None:
        raise RequestError("autoencoder: missing; a .pt has none, give the one that it was trained with")
    return read_original(config.source, config.num_heads, temporary), None


def _load_autoencoder(config: ImportConfig, folder: Path | None) -> Autoencoder:
    if config.autoencoder is not None or folder is None:
        return load_autoencoder(str(config.autoencoder))
    try:
        return load_autoencoder(str(folder))
    except RequestError as error:
        text = str(error).removeprefix(f"autoencoder={folder}: ")
        raise RequestError(f"from={config.source}: vae/: {text}; or give autoencoder=") from None


def _named(config: ImportConfig, conditioning: Conditioning) -> Conditioning:
    if config.class_names is None:
        return conditioning
    names = read_class_names(config.class_names)
    if len(names) != conditioning.num_classes:
        raise RequestError(
            f"class_names={config.class_names}: gives {len(names)} names, but the model has "
            f"{conditioning.num_classes} classes"
        )
    return replace(conditioning, names=names)


def _write(
    config: ImportConfig,
    model: ForeignModel,
    conditioning: Conditioning,
    autoencoder: Autoencoder,
    autoencoder_url: str,
) -> None:
    # A pipeline knows one factor for all channels: latents times it are what the denoiser was trained on.
    factor, channels = float(autoencoder.config["scaling_factor"]), autoencoder.latent_channels
    pictures = model.pictures or PictureRules((model.latent_shape[1] * autoencoder.factor,)).fingerprint()
    write_snapshot(
        config.output,
        model.weights,
        denoiser_config=model.denoiser,
        diffusion_config=model.diffusion,
        statistics=Statistics((0.0,) * channels, (1 / factor,) * channels),
        conditioning=conditioning,
        latent_shape=model.latent_shape,
        fingerprint=make_fingerprint(
            autoencoder, pictures, "mean" if autoencoder.deterministic else "moments", "float32"
        ),
        step=model.step,
        images_seen=model.images_seen,
        autoencoder_url=autoencoder_url,
    )


def _notes(model: ForeignModel) -> list[str]:
    if not model.denoiser.learned_sigma:
        return []
    return [
        "it has a learned sigma: sampling uses the epsilon half of its answer; a fine-tune keeps the rest as it is "
        "with denoiser.learned_sigma=true, and drops it with false"
    ]

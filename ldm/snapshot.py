"""The snapshot: all that sampling needs, as safetensors and JSON. Nothing in it is ever executed.

SNAPSHOT/snapshot.json         configs, statistics, conditioning, hashes; written last
         denoiser.safetensors  EMA weights, fp32
         autoencoder/          the frozen first stage, a diffusers folder
"""

import contextlib
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from ldm import storage
from ldm.autoencoder import FILES, Autoencoder, downsampling_factor, load_autoencoder
from ldm.config import RequestError, validate
from ldm.denoiser import BUILT_IN, DenoiserConfig, build_denoiser
from ldm.diffusion import DiffusionConfig
from ldm.latents.cache import hash_file, local_copy
from ldm.latents.manifest import Conditioning
from ldm.latents.receipt import Statistics

FORMAT = "ldm-snapshot"
VERSION = 1


@dataclass(frozen=True)
class Snapshot:
    """A denoiser that is ready to sample. latent_shape: (C, h, w)."""

    url: str
    denoiser: dict[str, Any]  # a DenoiserConfig's values; type is built in, or "custom"
    diffusion_config: DiffusionConfig
    statistics: Statistics
    conditioning: Conditioning
    latent_shape: tuple[int, int, int]
    fingerprint: dict[str, Any]
    step: int
    images_seen: int
    weights_sha256: str

    def picture_shape(self) -> tuple[int, int]:
        """(H, W) of the pictures that the latents are of; with buckets neither is the fingerprint's size."""
        file = storage.join(self.url, "autoencoder", FILES[0])
        if not storage.exists(file):
            raise RequestError(f"snapshot={self.url}: holds no autoencoder/{FILES[0]}; it is damaged")
        factor = downsampling_factor(storage.read_json(file))
        return self.latent_shape[1] * factor, self.latent_shape[2] * factor

    def load_denoiser(self, device: str = "cpu", denoiser_type: str | None = None) -> nn.Module:
        """The denoiser with its EMA weights.

        `denoiser_type` names a custom class (`my_package:MyDenoiser`): it comes from the caller, for a snapshot never
        names code to import. Raises RequestError without one; ValueError where a file is damaged.
        """
        kind = self.denoiser["type"]
        if kind not in BUILT_IN and denoiser_type is None:
            raise RequestError(
                f"denoiser_type=null: {self.url} was trained with a class of its own; "
                "give denoiser_type=package.module:Class"
            )
        config = validate(DenoiserConfig, {**self.denoiser, "type": kind if kind in BUILT_IN else denoiser_type})
        path = local_copy(storage.join(self.url, "denoiser.safetensors"), self.weights_sha256)
        if hash_file(path) != self.weights_sha256:
            raise ValueError(f"{path}: does not have the hash that snapshot.json names; it is damaged")
        weights = safetensors.torch.load_file(path)
        denoiser = build_denoiser(
            config,
            in_channels=self.latent_shape[0],
            sample_size=self.latent_shape[1:],
            num_classes=self.conditioning.num_classes or None,
        )
        denoiser.load_state_dict(weights)
        return denoiser.eval().requires_grad_(False).to(device)

    def load_autoencoder(self, device: str = "cpu") -> Autoencoder:
        autoencoder = load_autoencoder(storage.join(self.url, "autoencoder"), device)
        if autoencoder.weights_sha256[:16] != self.fingerprint["autoencoder"]["weights"]:
            raise ValueError(f"{self.url}/autoencoder: its weights are not those that the snapshot was trained with")
        return autoencoder


def write_snapshot(
    url: str,
    weights: dict[str, Tensor],
    *,
    denoiser_config: DenoiserConfig,
    diffusion_config: DiffusionConfig,
    statistics: Statistics,
    conditioning: Conditioning,
    latent_shape: tuple[int, int, int],
    fingerprint: dict[str, Any],
    step: int,
    images_seen: int,
    autoencoder_url: str,
) -> None:
    """Writes a whole snapshot; `snapshot.json` comes last, so that a partial one is never taken for whole."""
    denoiser = denoiser_config.model_dump(mode="json")
    denoiser["type"] = denoiser_config.type if denoiser_config.type in BUILT_IN else "custom"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "denoiser.safetensors"
        safetensors.torch.save_file({k: v.detach().cpu().contiguous() for k, v in weights.items()}, file)
        weights_sha256 = hash_file(file)
        storage.commit_file(file, storage.join(url, "denoiser.safetensors"))
    copy_autoencoder(autoencoder_url, storage.join(url, "autoencoder"))
    storage.write_json(
        storage.join(url, "snapshot.json"),
        {
            "format": FORMAT,
            "version": VERSION,
            "denoiser": denoiser,
            "diffusion": diffusion_config.model_dump(mode="json"),
            "statistics": asdict(statistics),
            "conditioning": asdict(conditioning),
            "latent_shape": list(latent_shape),
            "fingerprint": fingerprint,
            "step": step,
            "images_seen": images_seen,
            "weights_sha256": weights_sha256,
        },
    )


def read_snapshot(url: str, key: str = "snapshot") -> Snapshot:
    """Opens a snapshot. Raises RequestError where the directory is none (for the config key `key`)."""
    file = storage.join(url, "snapshot.json")
    if not storage.exists(file):
        raise RequestError(f"{key}={url}: is no snapshot (no snapshot.json); give one that `ldm train` wrote")
    try:
        values = storage.read_json(file)
    except ValueError as error:
        raise RequestError(f"{key}={error}") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise RequestError(f"{key}={url}: snapshot.json is not of a snapshot; give one that `ldm train` wrote")
    if not isinstance(values.get("version"), int):
        raise RequestError(f"{key}={url}: snapshot.json is damaged (version={values.get('version')})")
    if values["version"] > VERSION:
        raise RequestError(f"{key}={url}: has format version {values['version']}, this program reads up to {VERSION}")
    try:
        return Snapshot(
            url=url,
            denoiser=values["denoiser"],
            diffusion_config=_read_diffusion(values["diffusion"]),
            statistics=Statistics(tuple(values["statistics"]["mean"]), tuple(values["statistics"]["std"])),
            conditioning=Conditioning.from_dict(values["conditioning"]),
            latent_shape=tuple(values["latent_shape"]),
            fingerprint=values["fingerprint"],
            step=values["step"],
            images_seen=values["images_seen"],
            weights_sha256=values["weights_sha256"],
        )
    except RequestError as error:
        raise RequestError(f"{key}={url}: snapshot.json: {error}") from None
    except (KeyError, TypeError) as error:
        raise RequestError(f"{key}={url}: snapshot.json is damaged ({type(error).__name__}: {error})") from None


def _read_diffusion(values: dict[str, Any]) -> DiffusionConfig:
    try:
        return validate(DiffusionConfig, values)
    except RequestError as error:
        raise RequestError(f"diffusion.{error}") from None


def copy_autoencoder(source: str, target: str) -> None:
    """Copies a diffusers folder. On one local disk its weights are a hard link: all snapshots of a run share them."""
    for file in FILES:
        origin, copy = storage.join(source, file), storage.join(target, file)
        with tempfile.TemporaryDirectory() as folder:
            temporary = storage.temporary_beside(copy) if storage.is_local(copy) else Path(folder) / file
            linked = False
            if storage.is_local(origin) and file.endswith(".safetensors"):
                with contextlib.suppress(OSError):  # another disk, or one without hard links
                    temporary.hardlink_to(storage.local_path(origin))
                    linked = True
            if not linked:
                storage.fetch(origin, temporary)
            storage.commit_file(temporary, copy)
            temporary.unlink(missing_ok=True)  # a rename onto another link of the same file does nothing

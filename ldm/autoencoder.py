"""The frozen first stage, any diffusers autoencoder, or none: "raw pixels => raw moments", "raw latents => raw pixels".

Raw means as the network gives them: no scaling factor, no shift, no sampling. Normalising belongs to the reader of a
latent dataset, so that a change of scaling never needs a new encode.
"""

import hashlib
import json
import re
import tempfile
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ldm import storage
from ldm.config import RequestError
from ldm.identity import IdentityAutoencoder

CLASSES = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC", IdentityAutoencoder.__name__)
IDENTITY = "identity"
"""In place of a location: no autoencoder, pixels are the latents."""
Precision = Literal["float32", "bfloat16", "float16"]
FILES = ("config.json", "diffusion_pytorch_model.safetensors")


class Autoencoder:
    """A frozen autoencoder on one device.

    factor: pixels to one latent cell. latent_channels: C. deterministic: True where the encoder gives latents
    (N, C, h, w), False where it gives moments (N, 2C, h, w), mean then log variance.
    """

    def __init__(self, model: nn.Module, precision: Precision = "float32") -> None:
        # Hash before the cast: the same weights have one hash whatever they are computed in.
        self.weights_sha256 = hash_tensors(model.state_dict())
        self.dtype = getattr(torch, precision)
        model = model.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model = model if self.dtype == torch.float32 else model.to(self.dtype)
        self.class_name = type(model).__name__
        self.config: dict[str, Any] = {**_plain_config(dict(cast(Any, model.config))), "_class_name": self.class_name}
        self.factor = downsampling_factor(self.config)
        self.latent_channels = int(self.config["latent_channels"])
        self.deterministic = self.class_name != "AutoencoderKL"

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """Raw pixels uint8 (N, 3, H, W) => raw moments (N, 2C, H/f, W/f), or latents (N, C, ..), float32."""
        x = pixels.to(self.device, self.dtype).div(127.5).sub(1.0)  # every class listed above takes [-1, 1]
        encoded: Any = self.model.encode(x.contiguous(memory_format=torch.channels_last))  # type: ignore[operator]
        if self.deterministic:
            return (encoded.latent if hasattr(encoded, "latent") else encoded.latents).float()
        posterior = encoded.latent_dist
        return torch.cat((posterior.mean, posterior.logvar), dim=1).float()  # log variance as clamped by diffusers

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Raw latents (N, C, h, w) => raw pixels uint8 (N, 3, h f, w f), on the CPU."""
        x: Any = self.model.decode(latents.to(self.device, self.dtype))  # type: ignore[operator]
        return x.sample.float().add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8).cpu()

    def compile(self) -> None:
        """Compiles the encoder: the same function, of which the last bits may differ. Needs a C++ compiler."""
        self.model.encoder = torch.compile(self.model.encoder)  # type: ignore[assignment, arg-type]

    def save(self, url: str) -> None:
        """Writes a diffusers folder (config.json and safetensors) at a path or URL; the config comes last."""
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)  # type: ignore[operator]
            config = Path(folder) / "config.json"
            # Where it was loaded from, of a URL a temporary folder: no part of what it is, nor of anybody's business.
            values = {k: v for k, v in json.loads(config.read_text()).items() if k != "_name_or_path"}
            config.write_bytes(storage.to_json(values))
            for name in reversed(FILES):
                storage.commit_file(Path(folder) / name, storage.join(url, name))


def load_autoencoder(url: str, device: str = "cpu", precision: Precision = "float32") -> Autoencoder:
    """Loads a diffusers autoencoder: a local folder, an fsspec URL, or a hub id (`stabilityai/sd-vae-ft-mse`).

    `identity` is none at all.

    Safetensors only. Raises RequestError where there is none.
    """
    if storage.exists(storage.join(url, "config.json")):
        if storage.is_local(url):
            return _load_folder(storage.local_path(url), url, device, precision)
        with tempfile.TemporaryDirectory() as folder:
            for name in FILES:
                storage.fetch(storage.join(url, name), Path(folder) / name)
            return _load_folder(Path(folder), url, device, precision)
    if url == IDENTITY:
        return Autoencoder(IdentityAutoencoder().to(device), precision)
    if is_name(url):
        return _load_from_hub(url, device, precision)
    raise RequestError(
        f"autoencoder={url}: holds no config.json; give a diffusers autoencoder folder, a hub id, or {IDENTITY}"
    )


def is_name(url: str) -> bool:
    """Whether a text is no location: `identity`, or a hub id `owner/name`, and nothing of that name is here."""
    if url == IDENTITY:
        return not Path(url).exists()
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", url) is not None and not Path(url.split("/")[0]).exists()


def downsampling_factor(config: dict[str, Any]) -> int:
    """Pixels to one latent cell along a side."""
    stages = config.get("encoder_block_out_channels") or config["block_out_channels"]
    return int(2 ** (len(stages) - 1))


def hash_tensors(tensors: dict[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes in the order of the names: one hash for one set of weights."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _check_class(url: str, config: Any) -> str:
    name = config.get("_class_name") if isinstance(config, dict) else None
    if name not in CLASSES:
        raise RequestError(f"autoencoder={url}: is a {name}, expected one of {', '.join(CLASSES)}")
    return str(name)


def _load_folder(folder: Path, url: str, device: str, precision: Precision) -> Autoencoder:
    try:
        config = storage.read_json(str(folder / FILES[0]))
    except ValueError as error:
        raise RequestError(f"autoencoder={error}") from None
    name = _check_class(url, config)
    if not (folder / FILES[1]).exists():
        raise RequestError(f"autoencoder={url}: holds no {FILES[1]}; only safetensors weights are loaded")
    if name == IdentityAutoencoder.__name__:
        return Autoencoder(IdentityAutoencoder().to(device), precision)
    import diffusers

    diffusers.utils.logging.set_verbosity_error()  # it warns of keys that its own classes write
    try:
        model = getattr(diffusers, name).from_pretrained(folder, use_safetensors=True, low_cpu_mem_usage=False)
    except (OSError, RuntimeError, TypeError, ValueError) as error:  # a damaged file, or that of another config
        text = " ".join(str(error).split())[:160]
        raise RequestError(f"autoencoder={url}: its weights cannot be loaded ({text})") from None
    return Autoencoder(model.to(device), precision)


def _load_from_hub(hub_id: str, device: str, precision: Precision) -> Autoencoder:
    import diffusers

    try:
        config = diffusers.AutoencoderKL.load_config(hub_id)
        name = _check_class(hub_id, config)
        model = getattr(diffusers, name).from_pretrained(hub_id, use_safetensors=True, low_cpu_mem_usage=False)
    except OSError as error:
        raise RequestError(
            f"autoencoder={hub_id}: is no local folder and cannot be loaded from the hub ({str(error).splitlines()[0]})"
        ) from None
    return Autoencoder(model.to(device), precision)


def _plain_config(config: dict[str, Any]) -> dict[str, Any]:
    """Without what changes from machine to machine and says nothing of the function."""
    return {k: v for k, v in config.items() if k not in ("_name_or_path", "_diffusers_version")}

"""What distances between pictures are taken in: networks from raw pixels to features, named with their hash.

A network of the user's own is a file of code: TorchScript or a `torch.export` program. It is run, so it is loaded only
where the user names it (SECURITY.md). A file that is neither is refused, and no other loader is tried.

    N  pictures      D  features      K  classes
"""

import hashlib
import io
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm import storage
from ldm.autoencoder import Autoencoder
from ldm.config import RequestError

BATCH_SIZE = 32
LATENT_SIDE = 8
SUFFIXES = (".pt", ".ts", ".pt2")
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"  # pragma: allowlist secret
"""Of `inception-2015-12-05.pt`, NVIDIA's TorchScript of the network that FID and IS are defined with (StyleGAN2-ADA's
metrics; the hash is that of k-diffusion's `evaluation.py`, which downloads it). It resizes pictures by itself."""


class Features(Protocol):
    """A network from pictures to features; `name` carries the hash of its weights."""

    name: str

    def features(self, pictures: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) => float32 (N, D)"""


class VaeFeatures:
    """Mean latents, averaged to at most 8 x 8 cells: blind to what the decoder does, and to fine detail."""

    def __init__(self, autoencoder: Autoencoder, batch_size: int = BATCH_SIZE) -> None:
        self.autoencoder, self.batch_size = autoencoder, batch_size
        self.name = f"vae-{autoencoder.weights_sha256[:12]}"

    def features(self, pictures: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) => float32 (N, D), on the CPU."""
        return in_fixed_batches(self._batch, pictures, self.batch_size)

    def _batch(self, pictures: Tensor) -> Tensor:
        latents = self.autoencoder.encode(pictures)[:, : self.autoencoder.latent_channels]
        height, width = (min(side, LATENT_SIDE) for side in latents.shape[2:])
        return F.adaptive_avg_pool2d(latents, (height, width)).flatten(1).cpu()


class Extractor:
    """A network from a file: uint8 (N, 3, H, W) => features (N, D), or (features, whatever else).

    name: the file's, with its hash. is_inception: the very network of FID and IS.
    """

    def __init__(self, url: str, content: bytes, shape: tuple[int, int], device: str, batch_size: int) -> None:
        """Loads it. content: of the file at `url`; shape: (H, W) of the pictures. Raises RequestError where it cannot.

        A `.pt2` of a fixed batch size has that one.
        """
        self.key, self.device, self.batch_size = f"features={url}", device, batch_size
        self._file = url, content, shape
        file, digest = Path(storage.name(url)), hashlib.sha256(content).hexdigest()
        self.is_inception = digest == INCEPTION_SHA256
        stem = "inception" if self.is_inception else re.sub(r"[^A-Za-z0-9_.]+", "_", file.stem)
        self.name = f"{stem}-{digest[:12]}"
        self.network: Callable[..., Any]
        if file.suffix == ".pt2":
            self.network, self.batch_size = _load_exported(self.key, content, shape, device, batch_size)
        else:
            self.network = _load_script(self.key, content, device)

    def __reduce__(self) -> tuple[Any, ...]:
        """To another process it goes as its file, and is loaded there: neither kind of network can be pickled."""
        return _load_there, (*self._file, self.device, self.batch_size)

    def features(self, pictures: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) => float32 (N, D), on the CPU. Raises RequestError where the network fails at it."""
        options = {"return_features": True} if self.is_inception else {}
        return in_fixed_batches(lambda batch: self._call(batch, **options), pictures, self.batch_size)

    def log_probabilities(self, pictures: Tensor) -> Tensor | None:
        """uint8 (N, 3, H, W) => float32 (N, K), on the CPU, as the Inception Score takes them; None of another one."""
        if not self.is_inception:
            return None
        return in_fixed_batches(lambda batch: self._call(batch, no_output_bias=True), pictures, self.batch_size).log()

    def _call(self, batch: Tensor, **options: Any) -> Tensor:
        try:
            with torch.no_grad():
                output = self.network(batch.to(self.device), **options)
        except Exception as error:  # whatever a network of someone else's raises
            raise RequestError(f"{self.key}: fails at uint8 {tuple(batch.shape)} ({_last_line(error)})") from None
        features = output[0] if isinstance(output, tuple | list) and output else output
        if not isinstance(features, Tensor):
            raise RequestError(f"{self.key}: gives a {type(features).__name__}; expected features (N, D)")
        if features.ndim != 2 or len(features) != len(batch) or not features.is_floating_point():
            shape = f"{features.dtype} {tuple(features.shape)}".removeprefix("torch.")
            raise RequestError(f"{self.key}: gives {shape} for {len(batch)} pictures; expected features (N, D), floats")
        if not features.isfinite().all():
            raise RequestError(f"{self.key}: gives features that are not finite")
        return features.float().cpu()


def load_extractor(url: str, shape: tuple[int, int], *, device: str = "cpu", batch_size: int = BATCH_SIZE) -> Extractor:
    """Loads, and RUNS, the network at a path or URL: `.pt2` of `torch.export.save`, `.pt` or `.ts` of TorchScript.

    It is tried on one batch of pictures of `shape` (H, W). Raises RequestError where it is no such network.
    """
    check_extractor(url)
    found = Extractor(url, storage.read_bytes(url), shape, device, batch_size)
    found.features(torch.zeros(1, 3, *shape, dtype=torch.uint8))
    return found


def check_extractor(url: str) -> None:
    """Raises RequestError where there is no file of a known kind at the path or URL. Runs nothing."""
    if Path(storage.name(url)).suffix not in SUFFIXES:
        raise RequestError(
            f"features={url}: is none; give classifier, vae, or a file of TorchScript (.pt, .ts) or torch.export (.pt2)"
        )
    if not storage.exists(url):
        raise RequestError(f"features={url}: is not there; give the path or URL of a network")


def in_fixed_batches(network: Callable[[Tensor], Tensor], rows: Tensor, batch_size: int) -> Tensor:
    """network of rows (N, ...), N at least 1, in batches that are padded to one size.

    What a row becomes then depends neither on N nor on the rows beside it.
    """
    *whole, last = rows.split(batch_size)
    padded = torch.cat([last, last.new_zeros(batch_size - len(last), *rows.shape[1:])])
    return torch.cat([network(batch) for batch in (*whole, padded)])[: len(rows)]


def _load_there(url: str, content: bytes, shape: tuple[int, int], device: str, batch_size: int) -> Extractor:
    """Where another process sent it; a worker may have no GPU."""
    return Extractor(url, content, shape, device if torch.cuda.is_available() else "cpu", batch_size)


def _load_script(key: str, content: bytes, device: str) -> Callable[..., Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its deprecation: such files are what people have
            return torch.jit.load(io.BytesIO(content), map_location=device).eval()
    except Exception as error:  # a damaged file raises nearly anything
        raise RequestError(f"{key}: is no TorchScript module ({_last_line(error)})") from None


def _load_exported(
    key: str, content: bytes, shape: tuple[int, int], device: str, batch_size: int
) -> tuple[Callable[..., Any], int]:
    """(network, the batch size that it was exported with, or else `batch_size`)"""
    try:
        program = torch.export.load(io.BytesIO(content))
        network = program.module().to(device)
        (name,) = program.graph_signature.user_inputs
        example = next(node.meta["val"] for node in program.graph.nodes if node.name == name)
    except Exception as error:
        raise RequestError(f"{key}: is no torch.export program of one input ({_last_line(error)})") from None
    expected = (None, 3, *shape)
    taken = tuple(side if isinstance(side, int) else None for side in example.shape)
    fits = len(taken) == 4 and all(side in (None, asked) for side, asked in zip(taken[1:], expected[1:], strict=True))
    if example.dtype != torch.uint8 or not fits:
        raise RequestError(
            f"{key}: takes {str(example.dtype).removeprefix('torch.')} {_shape(taken)}; "
            f"the pictures are uint8 {_shape(expected)}"
        )
    return network, taken[0] or batch_size


def _shape(sides: tuple[int | None, ...]) -> str:
    return "(" + ", ".join("N" if side is None else str(side) for side in sides) + ")"


def _last_line(error: Exception) -> str:
    """TorchScript's own trace stands above it."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:160]

"""Latents to look at: random records decoded, each beside the picture that it was made of."""

import io
import random
import tarfile
from dataclasses import dataclass
from itertools import islice
from typing import BinaryIO, cast

import numpy as np
import numpy.typing as npt
import torch

from ldm import images, storage
from ldm.autoencoder import Autoencoder
from ldm.config import RequestError
from ldm.decoding import DecoderPool
from ldm.latents.manifest import Manifest, generation_receipts
from ldm.latents.receipt import OutputShard, ShardReceipt
from ldm.latents.tables import from_parquet
from ldm.latents.writer import MEMBER, columns_url, latents_url
from ldm.shards import RawSample
from ldm.sources import reader_of

_SHARDS = 4
"""Records are drawn from so many shards, which are chosen at random, and from the head of each: a tar is read from its
start, and perhaps from far away."""
_HEAD = 64
_SOURCES_HEAD = 1024  # samples of an input shard that are looked through
_MISSING = 128  # grey, where a source cannot be reached
_EQUAL_DB = 100.0
_DECODE_LIMIT_S = 60.0

Picture = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Preview:
    """grid: uint8 (3, H, W), pairs of (source, decoded), grey where a source is not there. psnr: dB of each pair that
    has one, by `shard/record`, 100 where both are equal. problems: why sources could not be had."""

    grid: Picture
    psnr: dict[str, float]
    problems: tuple[str, ...]

    @property
    def mean_psnr(self) -> float | None:
        return sum(self.psnr.values()) / len(self.psnr) if self.psnr else None


@dataclass(frozen=True)
class _Record:
    receipt: ShardReceipt
    name: str  # of the member, without its ending
    key: str
    flipped: bool
    latent: npt.NDArray[np.float16]


def preview(manifest: Manifest, autoencoder: Autoencoder, count: int = 8, seed: int = 0) -> Preview:
    """Decodes the posterior means of `count` records, fewer where there are fewer.

    Raises OSError where the latents cannot be read, ValueError or tarfile.TarError where they are damaged.
    """
    records = _choose(manifest, count, random.Random(seed))
    rules = images.PictureRules.from_fingerprint(manifest.fingerprint["pictures"])
    pairs: list[tuple[Picture | None, Picture]] = []
    psnr: dict[str, float] = {}
    with DecoderPool(1, rules, _DECODE_LIMIT_S) as decoders:
        sources = _Sources(records, decoders)
        for record in records:
            latent = torch.from_numpy(record.latent[None, : manifest.channels]).float()
            decoded = autoencoder.decode(latent)[0].numpy()
            source = sources.view(record, decoded.shape[1:])
            if source is not None:
                psnr[f"{record.receipt.source}/{record.name}"] = min(images.psnr(decoded, source), _EQUAL_DB)
            pairs.append((source, decoded))
    return Preview(_grid(pairs), psnr, tuple(dict.fromkeys(sources.problems)))


class _Sources:
    """The pictures that records were made of, each input shard read once. `problems`: of those that are not there."""

    def __init__(self, records: list[_Record], decoders: DecoderPool) -> None:
        self.records, self.decoders = records, decoders
        self.problems: list[str] = []
        self._samples: dict[str, dict[str, RawSample]] = {}

    def view(self, record: _Record, shape: tuple[int, ...]) -> Picture | None:
        """The view (3, *shape) of which the record was made, None where it cannot be had."""
        source = record.receipt.source
        if source not in self._samples:
            keys = {other.key for other in self.records if other.receipt.source == source}
            self._samples[source] = self._read(record.receipt, keys)
        sample = self._samples[source].get(record.key)
        if sample is None or sample.picture is None:
            return None
        try:
            made, _ = self.decoders.submit(sample.picture).result()
        except images.BadPicture as error:
            self.problems.append(f"{source}/{record.key}: {error}")
            return None
        return next((v.pixels for v in made if v.pixels.shape[1:] == shape and v.flipped == record.flipped), None)

    def _read(self, receipt: ShardReceipt, keys: set[str]) -> dict[str, RawSample]:
        found: dict[str, RawSample] = {}
        place = receipt.input_url or receipt.source
        try:
            for sample in islice(reader_of(receipt.input_url, receipt.source), _SOURCES_HEAD):
                if sample.key in keys:
                    found.setdefault(sample.key, sample)
                if len(found) == len(keys):
                    return found
        except FileNotFoundError:
            self.problems.append(f"{place}: is not there any more")
        except (OSError, tarfile.TarError, RequestError) as error:
            self.problems.append(f"{place}: cannot be read ({' '.join(str(error).split())})")
        else:
            missing = ", ".join(sorted(keys - found.keys()))
            self.problems.append(f"{place}: its first {_SOURCES_HEAD:,} samples do not hold {missing}")
        return found


def _choose(manifest: Manifest, count: int, draw: random.Random) -> list[_Record]:
    """Random records of a few random shards, in the order of the shards."""
    receipts = generation_receipts(manifest.url, manifest.generation)
    shards = [(receipt, output) for receipt in receipts for output in receipt.outputs]
    shards = draw.sample(shards, min(_SHARDS, count, len(shards)))
    found = []
    for number, (receipt, output) in enumerate(shards):
        wanted = count // len(shards) + (number < count % len(shards))
        head = range(min(_HEAD, output.count))
        found += _read_records(manifest.url, receipt, output, sorted(draw.sample(head, min(wanted, len(head)))))
    return sorted(found, key=lambda record: (record.receipt.name, record.name))


def _read_records(url: str, receipt: ShardReceipt, output: OutputShard, places: list[int]) -> list[_Record]:
    columns = from_parquet(storage.read_bytes(columns_url(url, output.columns)), ["key", "flipped"]).to_pydict()
    found = []
    with (
        storage.open_read(latents_url(url, output.name)) as raw,
        tarfile.open(fileobj=cast(BinaryIO, raw), mode="r|") as tar,
    ):
        for number, member in enumerate(islice(tar, places[-1] + 1)):
            if number in places:
                content = tar.extractfile(member)
                latent = np.load(io.BytesIO(content.read() if content else b""), allow_pickle=False)
                if latent.shape != output.shape or latent.dtype != np.float16:
                    raise ValueError(f"{latents_url(url, output.name)}: {member.name} is not of fp16 {output.shape}")
                key, flipped = columns["key"][number], bool(columns["flipped"][number])
                found.append(_Record(receipt, member.name.removesuffix(f".{MEMBER}"), key, flipped, latent))
    return found


def _grid(pairs: list[tuple[Picture | None, Picture]], columns: int = 4) -> Picture:
    """Pairs of one cell size, the largest; smaller ones lie on white."""
    height, width = (max(decoded.shape[axis] for _, decoded in pairs) for axis in (1, 2))
    cells = np.full((2 * len(pairs), 3, height, width), 255, np.uint8)
    for number, (source, decoded) in enumerate(pairs):
        _, h, w = decoded.shape
        cells[2 * number, :, :h, :w] = _MISSING if source is None else source
        cells[2 * number + 1, :, :h, :w] = decoded
    return images.grid(cells, 2 * min(columns, len(pairs)))

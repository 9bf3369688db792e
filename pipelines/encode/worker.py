"""What an encoder actor does with one shard: read, decode ahead in other processes, encode in batches, commit."""

import os
import tarfile
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ldm import images, storage
from ldm.autoencoder import Autoencoder, load_autoencoder
from ldm.decoding import DecoderPool
from ldm.latents.columns import SCHEMA
from ldm.latents.manifest import fingerprint_hash, make_fingerprint
from ldm.latents.receipt import ShardReceipt, read_receipt, receipt_name
from ldm.latents.writer import ShardWriter
from ldm.shards import RawSample
from pipelines.encode.config import BATCHES_IN_FLIGHT, EncodeConfig
from pipelines.encode.plan import Task
from pipelines.encode.turns import OldestFirst

_AT_VAE = 2  # of them for each shard; one more is of pictures that are being decoded, the others fill
_BYTES_AHEAD = 128 << 20  # of encoded pictures that wait, for each shard
_DECODE_LIMIT_S = 60.0


@dataclass(frozen=True)
class ShardResult:
    """seconds: what the shard waited for, by read, decode, vae and write."""

    receipt: ShardReceipt
    seconds: dict[str, float]


@dataclass(frozen=True)
class _Record:
    """One view of one picture on its way to a batch."""

    key: str
    index: int
    size: int  # of the encoded picture, bytes
    variant: str
    pixels: npt.NDArray[np.uint8]
    columns: dict[str, Any]


def shards_at_once(config: EncodeConfig) -> int:
    """While one shard is opened or committed, which on an object store takes seconds, the autoencoder works on another.

    With several shapes one alone, whose unfilled batches, one for each shape, then may take most of the memory.
    """
    return 2 if len(config.rules.shapes) == 1 else 1


class ShardEncoder:
    """A Ray actor: one autoencoder, and processes that decode ahead of it.

    On CPU cores each batch is encoded by one thread, several batches at a time: a result that depends on nothing but
    the batch, where torch's own threads give other last bits for another number of them.
    """

    def __init__(self, config: EncodeConfig, fingerprint: str, device: str, threads: int) -> None:
        threads = min(threads, len(os.sched_getaffinity(0)))
        storage.sweep(tempfile.gettempdir())  # where attempts lie whose destination is an object store
        self.config, self.fingerprint, self.device, self.rules = config, fingerprint, device, config.rules
        self.autoencoder = load_autoencoder(self._autoencoder_url, device, config.precision)
        self._check_autoencoder()
        self._exact: Autoencoder | None = None
        if config.compile:
            self.autoencoder.compile()
        self.decoders = DecoderPool(threads, self.rules, _DECODE_LIMIT_S)
        at_once = 1 if device == "cuda" else min(threads, shards_at_once(config) * _AT_VAE)
        self.vae = OldestFirst(at_once, "vae", partial(torch.set_num_threads, 1))  # torch keeps one for each thread
        self.turns = count()
        self._loading = threading.Lock()

    @property
    def _autoencoder_url(self) -> str:
        return storage.join(self.config.destination, "autoencoder")

    def _check_autoencoder(self) -> None:
        """Raises RuntimeError where the one that lies at the destination is not that of the run."""
        config = self.config
        found = make_fingerprint(self.autoencoder, self.rules.fingerprint(), config.store, config.precision)
        if fingerprint_hash(found) != self.fingerprint:
            raise RuntimeError(f"{self._autoencoder_url}: is not the autoencoder of this run; give another destination")

    def ready(self) -> str:
        """Answers once the autoencoder is loaded, with the id of its node."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def encode_shard(self, task: Task) -> ShardResult:
        """Reads, decodes, encodes and commits one input shard. Raises OSError or tarfile.TarError."""
        committed = read_receipt(self.config.destination, receipt_name(task.shard.name, task.attempt))
        if committed is not None:  # a run that was thought dead came first
            return ShardResult(committed, {})
        return _OneShard(self, task).run()

    def encode(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float16]:
        """uint8 (N, 3, H, W), padded to a whole batch => what is stored, fp16 (N, 2C or C, h, w).

        What is not finite in fp16 is tried again in fp32 (the SDXL autoencoder overflows in half precision).
        """
        on_device = torch.from_numpy(pixels).to(self.device, non_blocking=True)
        records = self._moments(self.autoencoder, on_device)
        bad = ~np.isfinite(records).all((1, 2, 3))
        if bad.any() and self.config.precision != "float32":
            with self._loading:
                if self._exact is None:
                    self._exact = load_autoencoder(self._autoencoder_url, self.device, "float32")
            records[bad] = self._moments(self._exact, on_device)[bad]
        return records

    def close(self) -> None:
        self.vae.shutdown()
        self.decoders.close()

    def _moments(self, autoencoder: Autoencoder, pixels: torch.Tensor) -> npt.NDArray[np.float16]:
        moments = autoencoder.encode(pixels)
        if self.config.store == "mean":
            moments = moments[:, : autoencoder.latent_channels]
        records: npt.NDArray[np.float16] = moments.half().cpu().numpy()
        return records


class _OneShard:
    """The work on one shard: what is under way, and where the time goes."""

    def __init__(self, encoder: ShardEncoder, task: Task) -> None:
        self.encoder, self.task, self.config = encoder, task, encoder.config
        self.turn = next(encoder.turns)
        self.seconds = dict.fromkeys(("read", "decode", "vae", "write"), 0.0)
        self.waiting: deque[tuple[int, str, int, dict[str, Any], Future[Any]]] = deque()  # with the picture's bytes
        self.batches: dict[tuple[int, ...], list[_Record]] = {}
        self.at_vae: deque[tuple[list[_Record], Future[npt.NDArray[np.float16]]]] = deque()
        self.not_finite: dict[int, tuple[str, int]] = {}  # index => key, bytes of the picture
        views = len(self.config.sizes) * (2 if self.config.flip else 1)
        self.most_waiting = max(1, self.config.batch_size // views)
        batches = BATCHES_IN_FLIGHT // shards_at_once(self.config) - _AT_VAE - 1
        self.most_unfilled = batches * self.config.batch_size

    def run(self) -> ShardResult:
        task, encoder = self.task, self.encoder
        reader = task.shard.reader()
        self.writer = ShardWriter(
            self.config.destination,
            task.shard.name,
            encoder.fingerprint,
            encoder.autoencoder.latent_channels,
            attempt=task.attempt,
            batch_size=self.config.batch_size,
            many_shapes=len(encoder.rules.shapes) > 1,
        )
        with self.writer:
            inputs = self._encode_all(iter(reader))
            if task.input_sha256 not in ("", reader.sha256):
                raise tarfile.ReadError("is another file than the one whose quarantined pictures are to be tried again")
            with self._timed("write"):
                receipt = self.writer.commit(inputs, reader.bytes_read, reader.sha256, task.shard.etag, task.shard.url)
        return ShardResult(receipt, self.seconds)

    def _encode_all(self, samples: Iterator[RawSample]) -> int:
        """Encodes the task's samples; returns how many there were."""
        seen: set[str] = set()
        inputs = index = 0
        while True:
            with self._timed("read"):
                sample = next(samples, None)
            if sample is None:
                break
            twice = sample.key in seen
            seen.add(sample.key)
            if self.task.only is None or index in self.task.only:
                inputs += 1
                self._begin(index, sample, twice)
            index += 1
            while len(self.waiting) >= self.most_waiting or self._bytes_waiting() > _BYTES_AHEAD:
                self._finish_one()
        while self.waiting:
            self._finish_one()
        for shape in sorted(self.batches):
            self._encode_batch(shape)
        while self.at_vae:
            self._store_batch()
        for index, (key, size) in self.not_finite.items():
            # Of several records of one picture some may be good: it counts as encoded, and the loss is on record.
            outcome = "partial" if self.writer.holds(key) else "quarantined"
            self.writer.refuse(outcome, key, "its latent is not finite in fp16", index, size)
        return inputs

    def _begin(self, index: int, sample: RawSample, twice: bool) -> None:
        """Sends a sample's picture to a decoder, or the sample to quarantine."""
        picture = sample.picture
        size = len(picture or b"")
        try:
            if twice:
                raise ValueError("its key stands twice in the shard")
            if sample.problem:
                raise ValueError(sample.problem)
            if picture is None:
                raise ValueError(f"holds no picture, only {', '.join(sorted(sample.members))}")
            columns = self._columns(sample)
        except ValueError as error:
            self.writer.refuse("quarantined", sample.key, str(error), index, size)
            return
        self.waiting.append((index, sample.key, size, columns, self.encoder.decoders.submit(picture)))

    def _columns(self, sample: RawSample) -> dict[str, Any]:
        config = self.config
        columns = {"label": sample.label_from(config.label), "caption": sample.caption_from(config.caption)}
        if config.keep_json:
            values = sample.fields()
            columns |= {column_name(field): values.get(field) for field in config.keep_json}
        return columns

    def _finish_one(self) -> None:
        """Waits for the oldest picture, and puts its views into their batches."""
        index, key, size, columns, future = self.waiting.popleft()
        try:
            with self._timed("decode"):
                views, (width, height) = future.result()
        except images.TooSmall as error:
            self.writer.refuse("filtered", key, str(error), index, size)
            return
        except images.BadPicture as error:
            self.writer.refuse("quarantined", key, str(error), index, size)
            return
        for view in views:
            box = dict(zip(("left", "top", "right", "bottom"), view.box, strict=True))
            row = {**columns, "width": width, "height": height, **box, "flipped": view.flipped}
            shape = view.pixels.shape[1:]
            record = _Record(key, index, size, self._variant(view), view.pixels, row)
            self.batches.setdefault(shape, []).append(record)
            if len(self.batches[shape]) == self.config.batch_size:
                self._encode_batch(shape)
        if sum(map(len, self.batches.values())) > self.most_unfilled:  # of many shapes
            self._encode_batch(max(self.batches, key=lambda shape: (len(self.batches[shape]), shape)))

    def _variant(self, view: images.View) -> str:
        """Which of the records of one picture a view gives; empty for the only one."""
        parts = ["x".join(map(str, view.pixels.shape[1:]))] if len(self.config.sizes) > 1 else []
        return "-".join([*parts, "flip"] if view.flipped else parts)

    def _encode_batch(self, shape: tuple[int, ...]) -> None:
        records = self.batches.pop(shape)
        # Padded to one shape: what an autoencoder gives depends on the batch shape.
        pixels = np.zeros((self.config.batch_size, 3, *shape), np.uint8)
        for row, record in enumerate(records):
            pixels[row] = record.pixels
        while len(self.at_vae) >= _AT_VAE:
            self._store_batch()
        self.at_vae.append((records, self.encoder.vae.submit(self.turn, partial(self.encoder.encode, pixels))))

    def _store_batch(self) -> None:
        """Waits for the oldest batch, and writes it: the order of the records depends on nothing else."""
        records, future = self.at_vae.popleft()
        with self._timed("vae"):
            latents = future.result()
        with self._timed("write"):
            for record, latent in zip(records, latents[: len(records)], strict=True):
                if np.isfinite(latent).all():
                    self.writer.add(record.key, latent, variant=record.variant, **record.columns)
                else:
                    self.not_finite[record.index] = (record.key, record.size)

    def _bytes_waiting(self) -> int:
        return sum(size for _, _, size, _, _ in self.waiting)

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - began


def column_name(field: str) -> str:
    """Of a kept JSON field: its own, unless the data set has a column of that name."""
    return f"json_{field}" if field in (*SCHEMA.names, "variant") else field

"""Image shards => latent dataset: Ray actors with a frozen autoencoder; a shard is the unit of work and of commit.

Ray core rather than Ray Data: one actor reads, decodes, encodes and commits a whole shard, so that a kill at any moment
loses the shards in flight and nothing else, and names, order and accounting never depend on the schedule.
"""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from ldm import images, shards, storage
from ldm.autoencoder import Autoencoder, Precision, load_autoencoder
from ldm.config import Config, Location, RequestError
from ldm.latents.manifest import (
    Accounting,
    ShardReceipt,
    Store,
    check_fingerprint,
    commit_generation,
    fingerprint_hash,
    make_fingerprint,
    read_manifest,
    read_receipts,
)
from ldm.latents.writer import ShardWriter
from pipelines import cluster, lineage
from pipelines.progress import Progress, say
from pipelines.tracking import Tracker, TrackingConfig

Level = Annotated[int, Field(ge=0, le=255)]


class EncodeConfig(Config):
    """Pre-encodes image shards into a latent dataset."""

    source: Location | tuple[Location, ...] = Field(
        description="image shards (WebDataset tars): path, URL, glob, comma set or brace range"
    )
    destination: Location = Field(description="directory or URL of the latent dataset")
    autoencoder: Location = Field(description="diffusers autoencoder: folder, URL or hub id")
    image_size: int = Field(256, gt=0, description="side of the encoded square, pixels")
    batch_size: int = Field(32, gt=0, description="pictures in one call of the autoencoder")
    store: Store = Field("moments", description="what is stored: posterior mean and log variance, or the mean alone")
    precision: Precision = Field("float32", description="what the autoencoder computes in")
    background: tuple[Level, Level, Level] = Field((255, 255, 255), description="RGB 0-255 behind transparent pictures")
    class_names: Location | None = Field(None, description="JSON file with the list of class names")
    max_shards: int | None = Field(None, gt=0, description="encode the first so many shards only; a later run goes on")
    num_workers: int | None = Field(None, gt=0, description="encoder actors; null: one for each GPU, or two CPU cores")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the autoencoder runs")
    retry: int = Field(
        3, ge=0, description="times that a shard is tried again when its worker dies or its storage fails"
    )
    max_quarantined: float = Field(
        0.05, ge=0, le=1, description="share of quarantined inputs beyond which the exit is 3"
    )
    tracking: TrackingConfig = TrackingConfig()


@dataclass(frozen=True)
class EncodeReport:
    """What scripts may rely on. Inputs, encoded, filtered and quarantined are of the whole data set."""

    inputs: int
    encoded: int
    filtered: int
    quarantined: int
    shards: int
    skipped_shards: int
    images_per_second: float
    destination: str
    generation: str
    exit_code: int = 0


@dataclass(frozen=True)
class EncodePlan:
    """What a run will do. `todo` and `done` are names of shards. sizes: bytes of every input, by URL.

    output_bytes: an estimate of what is written; None where the first shard cannot be read.
    """

    urls: dict[str, str]
    sizes: dict[str, int]
    todo: tuple[str, ...]
    done: dict[str, ShardReceipt]
    output_bytes: int | None
    class_names: tuple[str, ...]
    autoencoder: Autoencoder
    fingerprint: dict[str, Any]

    @property
    def input_bytes(self) -> int:
        """Of the shards that are still to do."""
        return sum(self.sizes[self.urls[name]] for name in self.todo)


def plan(config: EncodeConfig) -> EncodePlan:
    """Checks the whole request, without Ray. Raises RequestError."""
    storage.check_writable("destination", config.destination)
    autoencoder = load_autoencoder(config.autoencoder)  # its weights are part of the fingerprint
    factor = autoencoder.factor
    if config.image_size % factor:
        near = max(factor, round(config.image_size / factor) * factor)
        raise RequestError(
            f"image_size={config.image_size}: the autoencoder's factor {factor} does not divide it; give {near}"
        )
    fingerprint = make_fingerprint(autoencoder, config.image_size, config.background, config.store, config.precision)
    if storage.exists(_mark(config.destination)):
        check_fingerprint(config.destination, storage.read_json(_mark(config.destination)), fingerprint)
    urls = shards.shard_names(storage.expand(config.source))
    urls = dict(islice(urls.items(), config.max_shards))
    receipts = read_receipts(config.destination)
    sizes = {url: storage.size(url) for url in urls.values()}
    for name, url in urls.items():
        found = sizes[url]
        if found == 0:
            raise RequestError(f"source={url}: is empty; give a WebDataset tar that holds pictures")
        if name in receipts and receipts[name].input_bytes != found:
            raise RequestError(
                f"source={url}: has {found} bytes, but {receipts[name].input_bytes} when it was encoded into "
                f"{config.destination}; give another destination"
            )
    names = shards.read_class_names(config.class_names) if config.class_names else ()
    todo = tuple(name for name in urls if name not in receipts)
    needed = _output_bytes(config, autoencoder, {urls[name]: sizes[urls[name]] for name in todo})
    remedy = "give a destination on a larger disk, or a smaller max_shards"
    storage.check_space("destination", config.destination, needed or 0, remedy)
    return EncodePlan(urls, sizes, todo, receipts, needed, names, autoencoder, fingerprint)


def _output_bytes(config: EncodeConfig, autoencoder: Autoencoder, sizes: dict[str, int]) -> int | None:
    """An estimate of what inputs (URL => bytes) give, from the head of the first; None where that cannot be read."""
    if not sizes:
        return 0
    per_sample = shards.bytes_per_sample(next(iter(sizes)))
    if per_sample is None:
        return None
    parts = 2 if config.store == "moments" and not autoencoder.deterministic else 1
    latent = parts * autoencoder.latent_channels * (config.image_size // autoencoder.factor) ** 2
    overhead = 1024 + 100  # of the tar; of index and columns
    return round(sum(sizes.values()) / per_sample * (2 * latent + overhead))


def encode(config: EncodeConfig) -> EncodeReport:
    """Encodes what is missing, then commits the manifest. Raises RequestError; RuntimeError where shards failed."""
    todo = plan(config)
    # On a cluster that was started elsewhere the workers stand in another folder.
    config = config.model_copy(update={"destination": storage.absolute(config.destination)})
    fingerprint = todo.fingerprint
    if not storage.exists(_mark(config.destination)):
        todo.autoencoder.save(storage.join(config.destination, "autoencoder"))
        storage.write_json(_mark(config.destination), fingerprint)

    started = time.monotonic()
    receipts = dict(todo.done)
    with Tracker(config.tracking, f"encode/{storage.name(config.destination)}", config) as tracker:
        tracker.dataset(lineage.image_dataset(todo.sizes), "source")
        if todo.todo:
            with cluster.ray_session():
                for receipt in _encode_shards(config, todo, fingerprint_hash(fingerprint)):
                    receipts[receipt.name] = receipt
        new = sum((receipts[name].accounting for name in todo.todo), Accounting())
        total = sum((r.accounting for r in receipts.values()), Accounting())
        if total.encoded == 0:
            raise RequestError(f"source={config.source}: holds no picture that can be encoded ({total})")
        shard_receipts = list(receipts.values())
        generation = commit_generation(
            config.destination, shard_receipts, fingerprint, todo.autoencoder, _class_names(config, todo)
        )
        rate = new.encoded / (time.monotonic() - started)
        say(f"encode: {total}")
        tracker.log(
            {"perf/images_per_second": rate, **{f"data/{k}": v for k, v in asdict(total).items()}},
            total.encoded,
        )
        tracker.tag({"fingerprint": fingerprint_hash(fingerprint), "generation": generation})
        tracker.dataset(lineage.latent_dataset(read_manifest(config.destination, generation)), "latents")
    return EncodeReport(
        **asdict(total),
        shards=len(receipts),
        skipped_shards=len(todo.urls) - len(todo.todo),
        images_per_second=round(rate, 2),
        destination=config.destination,
        generation=generation,
        exit_code=3 if total.quarantined > config.max_quarantined * total.inputs else 0,
    )


def _class_names(config: EncodeConfig, todo: EncodePlan) -> tuple[str, ...]:
    """The names that were asked for, else those that the data set has already."""
    if todo.class_names or not storage.exists(storage.join(config.destination, "manifest.json")):
        return todo.class_names
    return read_manifest(config.destination, key="destination").conditioning.names


class ShardEncoder:
    """A Ray actor: one autoencoder, and threads that decode ahead of it."""

    def __init__(self, config: EncodeConfig, fingerprint: str, device: str, threads: int) -> None:
        cluster.use_threads(threads)
        self.config, self.fingerprint = config, fingerprint
        self.autoencoder = load_autoencoder(storage.join(config.destination, "autoencoder"), device, config.precision)
        self.decoders = ThreadPoolExecutor(max(2, threads))

    def encode_shard(self, name: str, url: str) -> ShardReceipt:
        """Reads, decodes, encodes and commits one input shard."""
        reader = shards.ShardReader(url)
        writer = ShardWriter(self.config.destination, name, self.fingerprint, self.autoencoder.latent_channels)
        with writer:
            for batch in _batches(self._decoded(reader, writer), self.config.batch_size):
                self._encode_batch(batch, writer)
            return writer.commit(reader.bytes_read, reader.sha256)

    def _decoded(self, reader: shards.ShardReader, writer: ShardWriter) -> Iterator["_Picture"]:
        """Pictures in the order of the shard, decoded ahead by threads within a bounded window."""
        seen: set[str] = set()
        waiting: list[tuple[shards.RawSample, Any]] = []

        def finish(sample: shards.RawSample, future: Any) -> Iterator[_Picture]:
            try:
                yield future.result()
            except images.BadPicture as error:
                writer.quarantine(sample.key, str(error))

        for sample in reader:
            if sample.key in seen:
                writer.quarantine(sample.key, "its key stands twice in the shard")
                continue
            seen.add(sample.key)
            waiting.append((sample, self.decoders.submit(self._decode, sample)))
            if len(waiting) >= 2 * self.config.batch_size:
                yield from finish(*waiting.pop(0))
        for entry in waiting:
            yield from finish(*entry)

    def _decode(self, sample: shards.RawSample) -> "_Picture":
        if sample.picture is None:
            raise images.BadPicture(f"holds no picture, only {', '.join(sorted(sample.members))}")
        try:
            label = sample.label
        except ValueError as error:
            raise images.BadPicture(str(error)) from None
        pixels, (width, height) = images.decode(sample.picture, self.config.image_size, self.config.background)
        columns = {"label": label, "caption": sample.caption, "width": width, "height": height}
        return _Picture(sample.key, pixels, columns)

    def _encode_batch(self, batch: list["_Picture"], writer: ShardWriter) -> None:
        # Padded to one shape: what an autoencoder gives depends on the batch shape.
        side = self.config.image_size
        pixels = np.zeros((self.config.batch_size, 3, side, side), np.uint8)
        pixels[: len(batch)] = [picture.pixels for picture in batch]
        moments = self.autoencoder.encode(torch.from_numpy(pixels))[: len(batch)]
        if self.config.store == "mean":
            moments = moments[:, : self.autoencoder.latent_channels]
        records = moments.half().cpu().numpy()
        for picture, record in zip(batch, records, strict=True):
            if np.isfinite(record).all():
                writer.add(picture.key, record, **picture.columns)
            else:
                writer.quarantine(picture.key, "its latent is not finite in fp16")


@dataclass(frozen=True)
class _Picture:
    """One decoded sample. pixels: uint8 (3, size, size)."""

    key: str
    pixels: npt.NDArray[np.uint8]
    columns: dict[str, Any]


def _batches(pictures: Iterator[_Picture], size: int) -> Iterator[list[_Picture]]:
    while batch := list(islice(pictures, size)):
        yield batch


def _mark(destination: str) -> str:
    """The file that claims a destination for one fingerprint."""
    return storage.join(destination, "fingerprint.json")


def _encode_shards(config: EncodeConfig, todo: EncodePlan, fingerprint: str) -> Iterator[ShardReceipt]:
    """Runs the shards over a pool of actors; yields receipts as they are committed.

    A shard whose worker dies or whose storage fails is tried again; one that fails to the end does not stop the others.
    """
    import ray

    device = cluster.resolve_device(config.device)
    total = ray.cluster_resources()
    wanted = int(total["GPU"]) if device == "cuda" else max(1, int(total.get("CPU", 1)) // 2)
    num_workers = min(config.num_workers or wanted, len(todo.todo))
    resources, threads = cluster.resources_per_worker(num_workers, device)
    actor_class = ray.remote(ShardEncoder).options(num_cpus=resources["CPU"], num_gpus=resources.get("GPU", 0))

    def start() -> Any:
        return actor_class.remote(config, fingerprint, device, threads)

    queue, tries, failed = list(todo.todo), dict.fromkeys(todo.todo, 0), {}
    idle = [start() for _ in range(num_workers)]
    running: dict[Any, tuple[str, Any]] = {}
    done = sum(todo.done[name].accounting.inputs for name in todo.urls if name in todo.done)
    with Progress("encode", len(todo.urls), "shards", initial=len(todo.urls) - len(queue)) as progress:
        while queue or running:
            while queue and idle:
                name, actor = queue.pop(0), idle.pop()
                running[actor.encode_shard.remote(name, todo.urls[name])] = (name, actor)
            ready, _ = ray.wait(list(running), timeout=1.0)
            progress.advance(0, f"{done:,} pictures")
            for future in ready:
                name, actor = running.pop(future)
                try:
                    receipt = ray.get(future)
                except ray.exceptions.RayError as error:
                    died = not isinstance(error, ray.exceptions.RayTaskError)  # the actor, its node or its object
                    idle.append(start() if died else actor)
                    tries[name] += 1
                    if tries[name] <= config.retry and (died or isinstance(error, OSError)):
                        queue.append(name)
                        say(f"encode: {name} failed, try {tries[name] + 1} follows ({_brief(error)})")
                    else:
                        failed[name] = _brief(error)
                    continue
                idle.append(actor)
                done += receipt.accounting.inputs
                progress.advance(1, f"{done:,} pictures")
                for key, reason in receipt.quarantined:
                    say(f"encode: quarantined {name}/{key}: {reason}")
                yield receipt
    if failed:
        details = "; ".join(f"{todo.urls[name]}: {why}" for name, why in sorted(failed.items()))
        raise RuntimeError(f"{len(failed)} of {len(todo.urls)} shards failed, the others are committed: {details}")


def _brief(error: BaseException) -> str:
    """The last line of an error, which is where Ray puts the cause."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()[:300]

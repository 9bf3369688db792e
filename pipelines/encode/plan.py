"""What a run of encode will do, checked as a whole before any work and without Ray."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from ldm import shards, storage
from ldm.autoencoder import Autoencoder, load_autoencoder
from ldm.config import RequestError, differences
from ldm.latents import reading
from ldm.latents.manifest import check_fingerprint, make_fingerprint, read_manifest, read_receipts
from ldm.latents.receipt import ShardReceipt
from ldm.latents.writer import estimate_bytes, quarantine_url
from ldm.sources import InputShard, find_shards
from pipelines import cluster
from pipelines.encode.config import BATCHES_IN_FLIGHT, EncodeConfig

_BATCH_BYTES = (1 << 30) // BATCHES_IN_FLIGHT


@dataclass(frozen=True)
class Task:
    """One shard to encode; of a later attempt, the samples at the places `only` of the file that has this hash."""

    shard: InputShard
    attempt: int = 0
    only: frozenset[int] | None = None
    input_sha256: str = ""


@dataclass(frozen=True)
class EncodePlan:
    """shards: all that were asked for, by name. receipts: all that the destination holds, by name.

    output_bytes: an estimate of what is written; None where the first shard cannot be read.
    """

    shards: dict[str, InputShard]
    tasks: tuple[Task, ...]
    receipts: dict[str, ShardReceipt]
    output_bytes: int | None
    class_names: tuple[str, ...]
    autoencoder: Autoencoder
    fingerprint: dict[str, Any]

    @property
    def input_bytes(self) -> int:
        """Of the shards that are to be read."""
        return sum(task.shard.bytes for task in self.tasks)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every input, by URL."""
        return {storage.join(s.url, s.name) if s.files else s.url: s.bytes for s in self.shards.values()}


def mark_url(destination: str) -> str:
    """The file that claims a destination for one fingerprint."""
    return storage.join(destination, "fingerprint.json")


def plan(config: EncodeConfig) -> EncodePlan:
    """Checks the whole request. Raises RequestError."""
    storage.check_writable("destination", config.destination)
    _check_apart(config)
    autoencoder = load_autoencoder(config.autoencoder)  # its weights are part of the fingerprint
    _check_sizes(config, autoencoder.factor)
    _check_batch(config)
    pictures = config.rules.fingerprint()
    fingerprint = make_fingerprint(autoencoder, pictures, config.store, config.precision)
    if storage.exists(mark_url(config.destination)):
        check_fingerprint(config.destination, storage.read_json(mark_url(config.destination)), fingerprint)
    check_reading(config)
    found, folders = find_shards(config.source)
    found = dict(islice(found.items(), config.max_shards))
    receipts = read_receipts(config.destination)
    _check_unchanged(config.destination, found, receipts)
    tasks = [Task(shard) for shard in found.values() if shard.name not in receipts]
    if config.retry == "quarantined":
        tasks += _second_tries(config.destination, found, receipts.values())
    needed = _output_bytes(config, autoencoder, [task.shard for task in tasks])
    remedy = "give a destination on a larger disk, or a smaller max_shards"
    storage.check_space("destination", config.destination, needed or 0, remedy)
    names = shards.read_class_names(config.class_names) if config.class_names else folders
    if storage.exists(storage.join(config.destination, "manifest.json")):
        before = read_manifest(config.destination, key="destination").conditioning.names
        if before and names and names != before and not config.class_names:
            raise RequestError(
                f"source={config.source}: has the classes {', '.join(names)}, but {config.destination} has "
                f"{', '.join(before)}; give another destination, or class_names"
            )
        names = names or before
    highest = max((output.max_label for r in receipts.values() for output in r.outputs), default=-1)
    if names and len(names) <= highest:
        key = f"class_names={config.class_names}" if config.class_names else f"source={config.source}"
        raise RequestError(f"{key}: gives {len(names)} names, but labels go up to {highest} already; name all")
    return EncodePlan(found, tuple(tasks), receipts, needed, names, autoencoder, fingerprint)


def check_cluster(config: EncodeConfig) -> None:
    """Raises RequestError where the cluster takes nobody, or no node of it has what an encoder needs."""
    if (nodes := cluster.known_nodes()) is None:
        with cluster.ray_session():
            nodes = list(cluster.live_nodes().values())
    encoder_size(config, nodes)


def encoder_size(config: EncodeConfig, nodes: Sequence[Mapping[str, float]]) -> tuple[str, dict[str, float], int]:
    """(device, Ray resources, CPU threads) of one encoder. nodes: their resources.

    Raises RequestError where no node has them.
    """
    if (device := cluster.choose_device(config.device, nodes)) == "cuda":
        resources, threads = {"CPU": 1.0, "GPU": config.gpus_per_worker}, 4
    else:
        pairs_of_cores = max(1, cluster.places({"CPU": 2.0}, nodes))
        resources, threads = cluster.resources_per_worker(config.num_workers or pairs_of_cores, device, nodes=nodes)
    if not cluster.places(resources, nodes):
        wanted = " and ".join(f"{amount:g} {name}" for name, amount in resources.items())
        raise RequestError(f"device={device}: no node of the cluster has {wanted} for an encoder; add one")
    return device, resources, threads


def reading_of(config: EncodeConfig) -> dict[str, Any]:
    """What is taken of a sample beside its pixels."""
    return config.model_dump(mode="json", include={"label", "caption", "keep_json", "min_size"})


def check_reading(config: EncodeConfig) -> None:
    """Raises RequestError where shards of this destination were read in another way; older ones do not say."""
    kept = reading.kept(config.destination)
    if kept is not None and (lines := differences(kept, reading_of(config))):
        raise RequestError(
            f"destination={config.destination}: holds shards that were read in another way ({'; '.join(lines)}); give "
            "another destination, or these keys as they were; `ldm convert` makes other labels, captions and columns"
        )


def _check_sizes(config: EncodeConfig, factor: int) -> None:
    if len(set(config.sizes)) < max(1, len(config.sizes)):
        raise RequestError(f"image_size={list(config.sizes)}: give at least one size, and each once")
    if config.buckets and len(config.sizes) > 1:
        raise RequestError(f"image_size={list(config.sizes)}: with buckets it is one area; give one size")
    sides = [("buckets.step", config.buckets.step)] if config.buckets else []
    for key, side in [*sides, *(("image_size", size) for size in config.sizes)]:
        if side % factor:
            near = max(factor, round(side / factor) * factor)
            raise RequestError(f"{key}={side}: the autoencoder's factor {factor} does not divide it; give {near}")


def _check_apart(config: EncodeConfig) -> None:
    source, destination = config.source, storage.absolute(config.destination)
    if isinstance(source, str) and f"{destination}/".startswith(f"{storage.absolute(source).rstrip('/')}/"):
        raise RequestError(f"destination={config.destination}: lies in the source; give a folder of its own")


def _check_batch(config: EncodeConfig) -> None:
    largest = max(3 * height * width for height, width in config.rules.shapes)
    if config.batch_size > 1 and config.batch_size * largest > _BATCH_BYTES:
        raise RequestError(
            f"batch_size={config.batch_size}: has {storage.readable(config.batch_size * largest)} of pixels, and an "
            f"encoder holds eight batches; give at most {max(1, _BATCH_BYTES // largest)}"
        )


def _check_unchanged(destination: str, found: dict[str, InputShard], receipts: dict[str, ShardReceipt]) -> None:
    for name, shard in found.items():
        if name not in receipts:
            continue
        was = receipts[name]
        if was.input_bytes != shard.bytes:
            change = f"has {shard.bytes} bytes, but {was.input_bytes} when it was encoded"
        elif was.input_etag and shard.etag and was.input_etag != shard.etag:
            change = f"is another version ({shard.etag}) than the one that was encoded ({was.input_etag})"
        else:
            continue
        where = shard.url if not shard.files else storage.join(shard.url, shard.name)
        raise RequestError(f"source={where}: {change} into {destination}; give another destination")


def _second_tries(destination: str, found: dict[str, InputShard], receipts: Iterable[ShardReceipt]) -> list[Task]:
    """What the latest attempt at each shard left in quarantine."""
    latest = {receipt.source: receipt for receipt in sorted(receipts, key=lambda r: r.attempt)}
    tasks = []
    for name, shard in found.items():
        receipt = latest.get(name)
        if receipt is None or receipt.accounting.quarantined == 0:
            continue
        records = storage.read_json_lines(quarantine_url(destination, receipt.name))
        only = frozenset(record["index"] for record in records if record["outcome"] == "quarantined")
        tasks.append(Task(shard, receipt.attempt + 1, only, receipt.input_sha256))
    return tasks


def _output_bytes(config: EncodeConfig, autoencoder: Autoencoder, todo: list[InputShard]) -> int | None:
    """An estimate of what shards give, from the head of the first; None where that cannot be read."""
    if not todo:
        return 0
    first = todo[0]
    count = len({name.rpartition(".")[0] for name in first.files})
    per_sample = first.bytes / count if count else shards.bytes_per_sample(first.url)
    if not per_sample:
        return None
    parts = 2 if config.store == "moments" and not autoencoder.deterministic else 1
    channels, copies = parts * autoencoder.latent_channels, 2 if config.flip else 1
    records = sum(estimate_bytes(channels, (size // autoencoder.factor) ** 2) for size in config.sizes)
    return round(sum(shard.bytes for shard in todo) / per_sample * copies * records)

"""The stage: claims the destination, encodes what is missing, commits a generation, and says what was done."""

import tarfile
import time
from collections import Counter
from dataclasses import asdict, dataclass

from ldm import storage
from ldm.autoencoder import Autoencoder
from ldm.config import RequestError
from ldm.latents import reading
from ldm.latents.manifest import (
    Manifest,
    check_fingerprint,
    commit_generation,
    fingerprint_hash,
    read_manifest,
    read_receipts,
)
from ldm.latents.preview import preview
from ldm.latents.receipt import Accounting, ShardReceipt, account, names_in, receipt_name
from ldm.latents.writer import quarantine_url
from pipelines import cluster, lineage
from pipelines.encode.config import EncodeConfig
from pipelines.encode.plan import EncodePlan, check_cluster, check_reading, mark_url, plan, reading_of
from pipelines.encode.pool import EncoderPool, SetAside
from pipelines.encode.worker import ShardResult
from pipelines.progress import Progress, say
from pipelines.system_metrics import SystemMetrics
from pipelines.tracking import Tracker

_SHOWN = 20  # quarantined samples said one by one; all are in their files
_LOG_EVERY_S = 10.0


@dataclass(frozen=True)
class EncodeReport:
    """What scripts may rely on. Inputs, encoded, filtered and quarantined are of the whole data set.

    shards: input shards in it. skipped_shards: of those asked for, that were there already.
    """

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


def encode(config: EncodeConfig) -> EncodeReport:
    """Encodes what is missing, then commits the manifest. Raises RequestError; RuntimeError where shards failed."""
    todo = plan(config)
    # On a cluster that was started elsewhere the workers stand in another folder.
    config = config.model_copy(update={"destination": storage.absolute(config.destination)})
    if todo.tasks:
        check_cluster(config)  # before anything is written
    name, folder = f"encode/{storage.name(config.destination)}", storage.join(config.destination, "tracking")
    with Tracker(config.tracking, name, config, folder=folder) as tracker:
        _claim(config, todo)
        tracker.dataset(lineage.image_dataset(todo.sizes), "source")
        work = _Work(config, todo, tracker)
        if todo.tasks:
            with cluster.ray_session():
                work.run()
        _sweep(config.destination)
        generation = work.commit()
        total = account(work.receipts.values())
        if total.encoded == 0 and not work.set_aside:
            raise RequestError(f"source={config.source}: holds no picture that can be encoded ({total})")
        say(f"encode: {total}")
        tracker.log({f"data/{key}": value for key, value in asdict(total).items()}, total.encoded)
        tracker.tag({"fingerprint": fingerprint_hash(todo.fingerprint), "generation": generation})
        if generation:
            manifest = read_manifest(config.destination, generation)
            tracker.dataset(lineage.latent_dataset(manifest), "latents")
            if todo.tasks and config.tracking.enabled:
                _show(manifest, todo.autoencoder, tracker)
        _raise_for(work.set_aside, todo)
    return _report(config, todo, work.receipts, generation, work.rate)


def finished(config: EncodeConfig) -> EncodeReport | None:
    """The report of a destination whose newest generation holds all of the source; None where there is work left.

    Writes nothing. Raises RequestError, also for a destination that was made in another way.
    """
    todo = plan(config)
    if todo.tasks or not storage.exists(storage.join(config.destination, "manifest.json")):
        return None
    manifest = read_manifest(config.destination, key="destination")
    renamed = bool(todo.class_names) and todo.class_names != manifest.conditioning.names
    if manifest.accounting != account(todo.receipts.values()) or renamed:  # killed before it could commit
        return None
    config = config.model_copy(update={"destination": storage.absolute(config.destination)})
    return _report(config, todo, todo.receipts, manifest.generation, 0.0)


def _report(
    config: EncodeConfig, todo: EncodePlan, receipts: dict[str, ShardReceipt], generation: str, rate: float
) -> EncodeReport:
    total = account(receipts.values())
    return EncodeReport(
        **asdict(total),
        shards=len({receipt.source for receipt in receipts.values()}),
        skipped_shards=len(todo.shards) - len({task.shard.name for task in todo.tasks}),
        images_per_second=round(rate, 2),
        destination=config.destination,
        generation=generation,
        exit_code=3 if total.quarantined > config.max_quarantined * total.inputs else 0,
    )


class _Work:
    """What a run has done so far."""

    def __init__(self, config: EncodeConfig, todo: EncodePlan, tracker: Tracker) -> None:
        self.config, self.todo, self.tracker = config, todo, tracker
        self.receipts = dict(todo.receipts)
        self.new = Accounting()
        self.set_aside: dict[str, SetAside] = {}  # by the name of the receipt that they did not get
        self.seconds: Counter[str] = Counter()
        self.rate = 0.0

    def run(self) -> None:
        pool = EncoderPool(self.config, fingerprint_hash(self.todo.fingerprint), self.todo.tasks)
        logged = time.monotonic()
        watched = SystemMetrics(self.tracker, lambda: set(pool.nodes))
        with watched, Progress("encode", len(self.todo.tasks), "shards") as progress:
            for end in pool:
                if isinstance(end, SetAside):
                    self.set_aside[receipt_name(end.task.shard.name, end.task.attempt)] = end
                    say(f"encode: {end.task.shard.name} is set aside: {end.reason}")
                elif end is not None:
                    self._take(end)
                elapsed = time.monotonic() - (pool.started or time.monotonic())
                self.rate = self.new.encoded / elapsed if elapsed > 0 else 0.0
                note = f"{self.new.inputs:,} pictures, {self.rate:,.0f}/s, {self.new.quarantined:,} quarantined"
                progress.advance(0 if end is None else 1, note)
                if time.monotonic() - logged > _LOG_EVERY_S:
                    logged = time.monotonic()
                    self._log()
        self._log()

    def _take(self, result: ShardResult) -> None:
        receipt = result.receipt
        self.receipts[receipt.name] = receipt
        before, self.new = self.new.quarantined, self.new + receipt.accounting
        self.seconds.update(result.seconds)
        if receipt.accounting.quarantined and before < _SHOWN:
            place = quarantine_url(self.config.destination, receipt.name)
            try:
                records = storage.read_json_lines(place)
            except OSError as error:  # it is there: only nobody can look at it now
                say(f"encode: {error}")
                records = []
            for record in records[: _SHOWN - before]:
                say(f"encode: {record['outcome']} {record['shard']}/{record['key']}: {record['reason']}")
            if self.new.quarantined > _SHOWN:
                say(f"encode: more are quarantined; all are in {storage.join(self.config.destination, 'quarantine')}")

    def _log(self) -> None:
        """Throughput so far, where the encoders' time went, and the price."""
        whole = sum(self.seconds.values()) or 1.0
        metrics = {f"perf/{part}_share": value / whole for part, value in self.seconds.items()}
        metrics["perf/images_per_second"] = self.rate
        if self.config.price_per_hour and self.rate:
            metrics["perf/price_per_million_images"] = self.config.price_per_hour / 3600 / self.rate * 1e6
        self.tracker.log(metrics, self.new.encoded)

    def commit(self) -> str:
        """Commits what the destination holds by now, of other runs too; "" where that is no latent.

        The last of several runs that end at once finds all receipts: each looks again after it has committed.
        """
        destination, generation = self.config.destination, ""
        while True:
            self.receipts = read_receipts(destination)
            self.set_aside = {name: end for name, end in self.set_aside.items() if name not in self.receipts}
            # A shard of which a second try failed is in the data set, by its first.
            missing = {name: end.reason for name, end in self.set_aside.items() if end.task.attempt == 0}
            if any(receipt.outputs for receipt in self.receipts.values()):
                generation = commit_generation(
                    destination,
                    list(self.receipts.values()),
                    self.todo.fingerprint,
                    self.todo.autoencoder.latent_channels,
                    self.todo.autoencoder.factor,
                    self.todo.class_names,
                    missing,
                )
            if names_in(destination) <= self.receipts.keys():
                return generation


def _show(manifest: Manifest, autoencoder: Autoencoder, tracker: Tracker) -> None:
    """Some records decoded beside their sources, in MLflow."""
    try:
        shown = preview(manifest, autoencoder)
    except (OSError, ValueError, tarfile.TarError) as error:  # of the look, not of the run: the data set is committed
        say(f"encode: no preview ({error})")
        return
    tracker.image("preview.png", shown.grid)
    if shown.mean_psnr is not None:
        tracker.log({"data/preview_psnr": shown.mean_psnr}, manifest.accounting.encoded)


def _claim(config: EncodeConfig, todo: EncodePlan) -> None:
    """Marks the destination as made in this way, before any latent is written to it. Raises RequestError."""
    destination = config.destination
    storage.create(mark_url(destination), storage.to_json(todo.fingerprint))
    # Another run may have come first.
    check_fingerprint(destination, storage.read_json(mark_url(destination)), todo.fingerprint)
    reading.keep(destination, reading_of(config))
    check_reading(config)
    _sweep(destination)
    place = storage.join(destination, "autoencoder")
    if not storage.exists(storage.join(place, "config.json")):  # which is written last
        todo.autoencoder.save(place)


def _sweep(destination: str) -> None:
    """Removes what killed processes of this machine left half written."""
    for folder in ("", "latents", "columns", "receipts", "quarantine", "generations", "autoencoder"):
        storage.sweep(storage.join(destination, folder) if folder else destination)


def _raise_for(set_aside: dict[str, SetAside], todo: EncodePlan) -> None:
    if set_aside:
        details = "; ".join(f"{end.task.shard.url}: {end.reason}" for _, end in sorted(set_aside.items()))
        raise RuntimeError(
            f"{len(set_aside)} of {len(todo.shards)} shards failed, the others are committed; "
            f"the same command tries again: {details}"
        )

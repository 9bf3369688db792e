"""Is a latent dataset what its manifest says? Every check gives lines that name the file and what is wrong with it.

Quick, here, looks at names, sizes and sums: few requests, however large the data set. `verify_shard` reads every byte.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from ldm import storage
from ldm.autoencoder import load_autoencoder
from ldm.config import DamagedError, RequestError, differences
from ldm.latents import reading
from ldm.latents.manifest import (
    Manifest,
    fingerprint_hash,
    generation_receipts,
    make_fingerprint,
    read_manifest,
)
from ldm.latents.receipt import (
    ShardReceipt,
    account,
    receipt_name,
    receipt_url,
    receipts_in,
    statistics,
)
from ldm.latents.writer import files_of, quarantine_url

_FOLDERS = ("latents", "columns", "quarantine", "receipts")


@dataclass(frozen=True)
class Opened:
    """A generation as far as it can be opened. manifest: None where it is damaged; `problems` then says why."""

    manifest: Manifest | None
    receipts: tuple[ShardReceipt, ...]
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Extras:
    """What is there and belongs to no generation: files of a run that was killed, receipts of one not yet done."""

    orphans: int
    newer_receipts: int


def open_to_verify(url: str, generation: str | None = None) -> Opened:
    """The newest generation, or the named one. Raises RequestError where there is no data set, or not that one."""
    try:
        manifest = read_manifest(url, generation)
        return Opened(manifest, tuple(generation_receipts(url, manifest.generation)), ())
    except RequestError as error:
        pointer = storage.join(url, "manifest.json")
        # With generations beside it, a pointer that leads nowhere is damaged; else there is no data set.
        if (
            generation is not None
            or not storage.exists(pointer)
            or not storage.list_dir(storage.join(url, "generations"))
        ):
            raise
        return Opened(None, (), (f"{pointer}: {str(error).removeprefix('latents=')}",))
    except FileNotFoundError as error:
        return Opened(None, (), (f"{error.filename or error}: is missing",))
    except ValueError as error:
        return Opened(None, (), (str(error),))


def verify_quick(manifest: Manifest, receipts: tuple[ShardReceipt, ...]) -> tuple[list[str], Extras]:
    """Problems of the generation as a whole: missing files, wrong sizes, sums that do not add up."""
    listed = {folder: storage.list_files(storage.join(manifest.url, folder)) for folder in _FOLDERS}
    problems = [
        *_missing_files(manifest.url, receipts, listed),
        *_wrong_sums(manifest, receipts),
        *_wrong_mark(manifest),
    ]
    newer: list[ShardReceipt] = []
    try:
        newer = receipts_in(manifest.url, but=[receipt.name for receipt in receipts])
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        problems.append(f"{storage.join(manifest.url, 'receipts')}: one that is no part yet cannot be read ({error!r})")
    known = _known_files([*receipts, *newer])
    orphans = sum(len(listed[folder].keys() - known[folder]) for folder in known)
    return problems, Extras(orphans, len(newer))


def _missing_files(
    url: str, receipts: tuple[ShardReceipt, ...], listed: dict[str, dict[str, tuple[int, str]]]
) -> Iterator[str]:
    for receipt in receipts:
        if f"{receipt.name}.json" not in listed["receipts"]:
            yield f"{receipt_url(url, receipt.name)}: is missing"
        if receipt.quarantine_sha256 and f"{receipt.name}.jsonl" not in listed["quarantine"]:
            yield f"{quarantine_url(url, receipt.name)}: is missing"
        for output in receipt.outputs:
            for place, wanted in files_of(url, output):
                folder, name = place.split("/")[-2:]
                if name not in listed[folder]:
                    yield f"{place}: is missing"
                elif (size := listed[folder][name][0]) != wanted:
                    yield f"{place}: has {size:,} bytes, its receipt says {wanted:,}"


def _wrong_sums(manifest: Manifest, receipts: tuple[ShardReceipt, ...]) -> Iterator[str]:
    """Of counts and statistics, over what the receipts say."""
    where = f"{storage.join(manifest.url, 'generations', manifest.generation)}.json"
    outputs = [output for receipt in receipts for output in receipt.outputs]
    total = sum(output.count for output in outputs)
    if total != manifest.num_samples:
        yield f"{where}: says {manifest.num_samples:,} records, its receipts {total:,}"
    try:
        if account(receipts) != manifest.accounting:
            yield f"{where}: says {manifest.accounting}, its receipts {account(receipts)}"
    except AssertionError:
        yield f"{where}: of a shard that was tried again, the tries do not hand over what they say"
    if statistics([output.moments for output in outputs]) != manifest.statistics:
        yield f"{where}: its mean and standard deviation are not those of its receipts"
    highest = max(output.max_label for output in outputs)
    if highest >= manifest.conditioning.num_classes:
        yield f"{where}: has {manifest.conditioning.num_classes} classes, but labels up to {highest}"
    wanted = fingerprint_hash(manifest.fingerprint)
    for receipt in receipts:
        if receipt.fingerprint != wanted:
            yield f"{receipt_url(manifest.url, receipt.name)}: was made with another fingerprint"
        if receipt.name != receipt_name(receipt.source, receipt.attempt):
            yield f"{receipt_url(manifest.url, receipt.name)}: names input {receipt.source}, try {receipt.attempt}"


def _wrong_mark(manifest: Manifest) -> Iterator[str]:
    """Of the files that claim the folder, which `ldm encode` goes by when it goes on."""
    try:
        reading.kept(manifest.url)
    except DamagedError as error:
        yield str(error)
    mark = storage.join(manifest.url, "fingerprint.json")
    try:
        found = storage.read_json(mark)
    except FileNotFoundError:
        yield f"{mark}: is missing"
    except ValueError as error:
        yield str(error)
    else:
        if found != manifest.fingerprint:
            yield f"{mark}: is not that of the generation"


def _known_files(receipts: list[ShardReceipt]) -> dict[str, set[str]]:
    outputs = [output.name for receipt in receipts for output in receipt.outputs]
    return {
        "latents": {name + ending for name in outputs for ending in (".tar", ".index.parquet")},
        "quarantine": {f"{receipt.name}.jsonl" for receipt in receipts if receipt.quarantine_sha256},
    }


def verify_autoencoder(manifest: Manifest) -> list[str]:
    """Whether the autoencoder that lies beside the latents is the one of the fingerprint."""
    url, wanted = storage.join(manifest.url, "autoencoder"), manifest.fingerprint
    try:
        loaded = load_autoencoder(url)
    except Exception as error:  # a damaged config or weights: diffusers and safetensors raise nearly anything
        text = " ".join(str(error).split()).removeprefix(f"autoencoder={url}: ")[:200]
        return [f"{url}: cannot be loaded ({text})"]
    found = make_fingerprint(loaded, wanted["pictures"], wanted["store"], wanted["autoencoder"]["precision"])
    return [
        f"{url}: is not the one that made the latents ({line})"
        for line in differences(wanted["autoencoder"], found["autoencoder"])
    ]

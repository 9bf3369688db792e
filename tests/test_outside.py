"""No name that a file gives leads out of the folder of that file: it is refused, or is no path."""

import hashlib
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ldm import storage
from ldm.config import DamagedError, RequestError
from ldm.latents.dataset import LatentDataset
from ldm.latents.join import JoinConfig, join
from ldm.latents.manifest import _hash, read_manifest, read_receipts
from ldm.latents.verify import open_to_verify
from ldm.latents.writer import ShardWriter
from ldm.shards import RawSample, ShardReader, write_shard
from pipelines.train.checkpoint_files import DamagedCheckpoint, read_marker, write_marker
from pipelines.train.config import TrainConfig
from pipelines.train.record import read_record
from tests.pictures import kl_model, latent_dataset, records

HOSTILE = ["../../planted", "/planted", "sub/../../../planted", "..\\/planted", "a\0b", ""]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from ldm.autoencoder import Autoencoder

    folder = tmp_path_factory.mktemp("outside") / "latents"
    latent_dataset(str(folder), Autoencoder(kl_model()))
    return folder


@pytest.fixture
def latents(made: Path, tmp_path: Path) -> Path:
    """A copy to be made hostile by somebody who knows the format: all hashes are right."""
    return Path(shutil.copytree(made, tmp_path / "a" / "b" / "latents"))


def rewrite(folder: Path, table: str, column: str, value: str) -> None:
    """Another value in the first row of a table of the newest generation, as a generation of its own."""
    pointer = json.loads((folder / "manifest.json").read_text())
    base = folder / "generations" / pointer["generation"]
    manifest = json.loads(base.with_suffix(".json").read_text())
    found = pq.read_table(f"{base}.{table}.parquet")
    changed = pa.array([value, *found[column].to_pylist()[1:]])
    found = found.set_column(found.column_names.index(column), column, changed)
    pq.write_table(found, folder / "new")
    manifest[table] = hashlib.sha256((folder / "new").read_bytes()).hexdigest()
    name = _hash(manifest)
    for other in ("receipts", "shards"):
        shutil.copy(f"{base}.{other}.parquet", folder / "generations" / f"{name}.{other}.parquet")
    (folder / "new").rename(folder / "generations" / f"{name}.{table}.parquet")
    storage.write_json(str(folder / "generations" / f"{name}.json"), manifest)
    storage.write_json(str(folder / "manifest.json"), {**pointer, "generation": name})


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize(
    ("table", "column"), [("shards", "name"), ("shards", "columns"), ("receipts", "name"), ("receipts", "source")]
)
def test_names_in_the_tables_of_a_generation(latents: Path, tmp_path: Path, table: str, column: str, name: str) -> None:
    rewrite(latents, table, column, name)
    captions = tmp_path / "captions.csv"
    captions.write_text("key,caption\n00000,new\n")
    before, url = everything(tmp_path), str(latents)
    readers: list[Callable[[], Any]] = [
        lambda: join(JoinConfig(latents=url, table=str(captions), columns=("caption",)))
    ]
    readers.append(lambda: read_receipts(url))
    if table == "shards":
        readers.append(lambda: LatentDataset(url, global_batch_size=2))
    for read in readers:
        with pytest.raises(DamagedError, match="which is none of its data set"):
            read()
    opened = open_to_verify(url)
    assert opened.manifest is None and "which is none of its data set" in opened.problems[0]
    assert everything(tmp_path) == before


def test_the_rewriting_itself_is_taken(latents: Path) -> None:
    """Else the tests above would prove nothing."""
    rewrite(latents, "shards", "name", "shard-0")
    assert len(read_receipts(str(latents))) == 4
    assert LatentDataset(str(latents), global_batch_size=2).batch(0).moments.shape[0] == 2


@pytest.mark.parametrize("place", ["name", "source", "outputs"])
def test_names_in_a_receipt(latents: Path, place: str) -> None:
    receipt = json.loads((latents / "receipts" / "shard-0.json").read_text())
    if place == "outputs":
        receipt["outputs"][0]["columns"] = "../../planted"
    else:
        receipt[place] = "../../planted"
    (latents / "receipts" / "shard-9.json").write_text(json.dumps(receipt))
    with pytest.raises(DamagedError, match="'../../planted', which is none of its data set"):
        read_receipts(str(latents))


@pytest.mark.parametrize("generation", ["../../outside", "/outside", "0" * 15, "0123456789abcdeg"])
def test_the_generation_that_the_pointer_names(latents: Path, generation: str) -> None:
    (latents.parent / "outside.json").write_text('{"version": 2}')
    storage.write_json(str(latents / "manifest.json"), {"format": "ldm-latents", "generation": generation})
    with pytest.raises(RequestError, match=f"^latents={latents}: generation {generation} is not there; it holds"):
        read_manifest(str(latents))


def test_keys_of_a_tar_are_no_paths(tmp_path: Path) -> None:
    """They stay keys, of tar members, columns and quarantine, and nothing is ever unpacked."""
    keys = ["../../planted", "/etc/planted", "a/../../b", "..", "C:\\planted"]
    write_shard(str(tmp_path / "in.tar"), (RawSample(key, {"png": b"x", "cls": b"1"}) for key in keys))
    read = [sample.key for sample in ShardReader(str(tmp_path / "in.tar"))]
    assert read[:3] == keys[:3]
    destination = tmp_path / "a" / "b" / "latents"
    with ShardWriter(str(destination), "in", "0" * 16, 4) as writer:
        for key, record in zip(keys, records(len(keys)), strict=True):
            writer.add(key, record, label=1)
        writer.refuse("quarantined", "../../../bad", "planted")
        writer.commit(len(keys) + 1, 1000, "0" * 64)
    inside = {str(path.relative_to(destination)) for path in destination.rglob("*") if path.is_file()}
    assert inside == {
        "latents/in.tar",
        "latents/in.index.parquet",
        "columns/in.parquet",
        "quarantine/in.jsonl",
        "receipts/in.json",
    }
    outside = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_relative_to(destination)]
    assert outside == [tmp_path / "in.tar"]
    with tarfile.open(destination / "latents" / "in.tar") as tar:
        assert [member.name for member in tar] == [f"{key}.latents.npy" for key in keys]


def test_links_and_devices_in_a_tar_are_no_samples(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "in.tar", "w") as tar:
        for kind, target in ((tarfile.SYMTYPE, "/etc/passwd"), (tarfile.LNKTYPE, "/etc/passwd"), (tarfile.CHRTYPE, "")):
            member = tarfile.TarInfo("00000.png")
            member.type, member.linkname = kind, target
            tar.addfile(member)
    assert list(ShardReader(str(tmp_path / "in.tar"))) == []


def test_files_of_a_checkpoint(tmp_path: Path) -> None:
    entry = {"name": "../../../planted", "bytes": 1, "sha256": "0" * 64, "index_sha256": "0" * 64}
    write_marker(str(tmp_path), {"files": [entry], "progress": {}})
    with pytest.raises(DamagedCheckpoint, match=r"names the file '../../../planted', which is none of it"):
        read_marker(str(tmp_path))


@pytest.mark.parametrize(
    "name", ["../../ids.txt", "/etc/passwd", "exclude/../../ids.txt", "exclude/x/0123456789abcdef.txt"]
)
def test_lists_of_a_run(tmp_path: Path, name: str) -> None:
    record = {"format": "ldm-run", "version": 2, "generations": [], "exclusions": {"0": name}}
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(DamagedError, match=f"names the list '{name}', which is none of the run"):
        read_record(TrainConfig(latents="latents", output=str(tmp_path)), checkpoint="there is one")

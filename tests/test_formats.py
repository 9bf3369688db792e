"""docs/formats.md is right: a reader that stands in it, made of numpy, pyarrow and tarfile, reads what ours reads."""

import ast
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from ldm.autoencoder import Autoencoder
from ldm.latents.dataset import LatentDataset
from ldm.latents.join import JoinConfig, join
from ldm.latents.writer import ShardWriter
from tests.pictures import kl_model, latent_dataset, records, write_tiny_snapshot

PAGE = (Path(__file__).parents[1] / "docs" / "formats.md").read_text()
Reader = Callable[[str], list[tuple[int, str, int | None, np.ndarray]]]


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """The names that the page's code block defines."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    imported = {
        name.name.split(".")[0] if isinstance(node, ast.Import) else str(node.module).split(".")[0]
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in node.names
    }
    assert imported - sys.stdlib_module_names == {"numpy", "pyarrow"}  # nothing of ours
    names: dict[str, Any] = {}
    exec(code, names)
    return names


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("formats")
    autoencoder = Autoencoder(kl_model())
    latent_dataset(str(folder / "latents"), autoencoder)
    autoencoder.save(str(folder / "vae"))
    write_tiny_snapshot(str(folder / "snapshot"), autoencoder, str(folder / "vae"))
    return str(folder)


def same(read: list[tuple[int, str, int | None, np.ndarray]], url: str) -> bool:
    """Whether the reader of the page and ours give the same records, ids and labels."""
    dataset = LatentDataset(url, global_batch_size=1)
    ours = dataset.all()
    ids, _, labels, latents = zip(*read, strict=True)
    assert list(ids) == ours.ids.tolist() and len(ids) == dataset.num_samples
    assert [dataset.num_classes if label is None else label for label in labels] == ours.labels.tolist()
    return torch.equal(torch.from_numpy(np.stack(latents)), ours.moments)


def test_the_reader_of_the_page_reads_what_ours_reads(page: dict[str, Any], made: str) -> None:
    url = f"{made}/latents"
    read = list(page["read_latents"](url))
    assert same(read, url)
    assert [number for number, key, *_ in read[:7]] == [page["sample_id"]("shard-0", key) for _, key, *_ in read[:7]]


def test_it_follows_a_joined_table(page: dict[str, Any], made: str, tmp_path: Path) -> None:
    import shutil

    url = str(shutil.copytree(f"{made}/latents", tmp_path / "latents"))
    (tmp_path / "labels.csv").write_text("shard,key,label\nshard-0,00000,8\n")
    join(JoinConfig(latents=url, table=str(tmp_path / "labels.csv")))
    read = list(page["read_latents"](url))
    assert same(read, url) and read[0][2] == 8


def test_it_finds_damage(page: dict[str, Any], made: str, tmp_path: Path) -> None:
    import shutil

    url = shutil.copytree(f"{made}/latents", tmp_path / "latents")
    tar = url / "latents" / "shard-1.tar"
    data = bytearray(tar.read_bytes())
    data[5000] ^= 1
    tar.write_bytes(data)
    with pytest.raises(AssertionError, match=r"shard-1\.tar is damaged"):
        list(page["read_latents"](url))


def test_the_ids_of_variants(page: dict[str, Any], tmp_path: Path) -> None:
    with ShardWriter(str(tmp_path), "in", "0" * 16, 4) as writer:
        for variant, record in zip(("2x2", "2x2-flip"), records(2), strict=True):
            writer.add("a", record, variant=variant)
        writer.commit(1, 1, "0" * 64)
    columns = pq.read_table(tmp_path / "columns" / "in.parquet").to_pylist()
    assert [row["id"] for row in columns] == [page["sample_id"]("in", "a", v) for v in ("2x2", "2x2-flip")]
    assert {row["picture"] for row in columns} == {page["sample_id"]("in", "a")}


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_every_field_of_every_file_stands_on_the_page(made: str) -> None:
    folder = Path(made, "latents")
    generation = json.loads((folder / "manifest.json").read_text())["generation"]
    text = section("The latent dataset")
    named = set(re.findall(r"[a-z_0-9]+", " ".join(re.findall(r"`([^`]+)`", text))))
    tables = [folder / "generations" / f"{generation}.{name}.parquet" for name in ("receipts", "shards")]
    tables += [folder / "latents" / "shard-0.index.parquet", folder / "columns" / "shard-0.parquet"]
    for path in tables:
        assert set(pq.read_schema(path).names) <= named, path
    for path in (folder / "generations" / f"{generation}.json", folder / "receipts" / "shard-0.json"):
        values = json.loads(path.read_text())
        assert values.keys() <= named, path
        for inner in ("accounting", "statistics", "conditioning", "fingerprint"):
            assert not isinstance(values.get(inner), dict) or values[inner].keys() <= named, (path, inner)
    snapshot = json.loads(Path(made, "snapshot", "snapshot.json").read_text())
    assert snapshot.keys() <= set(re.findall(r"`([a-z_0-9]+)`", section("The snapshot")))

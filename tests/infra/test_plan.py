"""The plan of a large run: its arithmetic by hand, and what it says of files and requests against the real stages."""

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldm import storage
from ldm.latents.dataset import LatentDataset
from ldm.latents.writer import ShardWriter
from pipelines.encode import encode
from tests.infra.s3_requests import billed
from tests.pictures import image_shard, records, samples, tiny_model
from tests.pipelines.encoding import config

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "infra" / "plan.py"


def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


def test_the_page_holds_what_the_script_prints() -> None:
    done = plan()
    assert done.returncode == 0 and done.stdout.count("\n") > 40
    page = (ROOT / "docs" / "scale.md").read_text()
    assert done.stdout in page
    commands = [line.split()[3:] for line in page.splitlines() if line.startswith("$ python infra/plan.py ")]
    assert commands and all(plan(*arguments).returncode == 0 for arguments in commands)


def test_the_arithmetic_by_hand() -> None:
    """A million pictures of 100 kB in shards of 10,000; records of 8 x 32 x 32 halves."""
    simple = {"pictures": 1e6, "picture_bytes": 1e5, "columns_bytes": 50, "parameters": 1e9, "months": 2}
    rates = {"encode_rate": 100, "encode_efficiency": 0.5, "gpus_encode": 4, "train_rate": 50, "epochs": 3}
    prices = {"price_gpu_hour": 2, "price_gb_month": 0.02, "price_1000_puts": 0.005, "price_1000_gets": 0.0004}
    asked = {**simple, **rates, **prices, "gpus_train": 16, "cache_bytes": 1e9}
    lines = plan(*(f"{key}={value}" for key, value in asked.items())).stdout.splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines]
    found = {row[0]: row[1] for row in rows if len(row) == 2}
    # A record: 512 of header, 128 + 16,384 of npy, filled up to 16,896.
    assert found["Storage: latents"] == "0.01741 TB"  # 1e6 x 17,408 + 100 x 1,024
    assert found["Storage in all"] == "0.1815 TB"  # + 0.1 pictures, 0.000016, 0.00005, 1.8e-7, 0.064 checkpoints
    assert found["Encode: GPU hours"] == "6"  # 1e6 / 50 / 3600 = 5.56
    assert found["Encode: wall time"] == "1.4 hours (0.1 days)"
    assert found["Training: GPU hours"] == "17"  # 3e6 / 50 / 3600 = 16.67
    assert found["Training: times that S3 is read"] == "3 (2 nodes)"  # 2 GB of cache hold no 17 GB
    # Of a shard of 174 MB: 11 parts of 16 MiB, and the two files beside it.
    assert found["Training: GET"] == "3,900"  # 3 x 100 x 13
    # 100 x (2 + 4 parts of 50 MiB, 3 other files, 3 lists), and four listings.
    assert found["Encode: PUT, POST, LIST"] == "1,204"
    assert found["Price: encode"] == "$11" and found["Price: training"] == "$33"
    assert found["Price: storage"] == "$7"  # 181.5 GB x 2 x 0.02


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["pictres=5"], "pictres=5: there is no such input; give one of pictures, "),
        (["pictures=many"], "pictures=many: give a number above 0"),
        (["pictures=-1"], "pictures=-1: give a number above 0"),
        (["/absent.yaml"], "/absent.yaml: cannot be read ("),
        (["a.yaml", "b.yaml"], "b.yaml: is a second file of inputs; give one, and key=value"),
    ],
)
def test_wrong_inputs_are_one_line(arguments: list[str], line: str) -> None:
    done = plan(*arguments)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith(line) and done.stderr.count("\n") == 1


def test_sizes_are_those_of_the_files(script: dict[str, Any], tmp_path: Path) -> None:
    asked = {"pictures": 500, "pictures_per_shard": 500, "latent_channels": 8, "latent_cells": 1024}
    others = {"picture_bytes": 1, "columns_bytes": 1, "parameters": 1}
    said = script["sizes"]({**asked, **others})
    with ShardWriter(str(tmp_path), "train-000000", "0" * 16, 4) as writer:
        for number, record in enumerate(np.broadcast_to(records(1, shape=(8, 32, 32)), (500, 8, 32, 32))):
            writer.add(f"{number:08d}", record)
        receipt = writer.commit(500, 1, "0" * 64, "0" * 32, "s3://bucket/shards/train-000000.tar")
    output = receipt.outputs[0]
    assert output.bytes == said["latent tar"] == said["latents"]
    assert output.index_bytes == pytest.approx(said["indexes"], rel=0.2)
    assert (tmp_path / "receipts" / "train-000000.json").stat().st_size == pytest.approx(1547, rel=0.05)


@pytest.mark.ray
def test_requests_are_those_of_an_encode_and_of_a_reader(
    script: dict[str, Any], ray_session: None, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What four more shards cost is four times what the plan says of one."""
    tiny_model().save_pretrained(f"{tmp_path}/vae")
    encoded, read = [], []
    for shards in (1, 5):
        for number in range(shards):
            image_shard(tmp_path / "s.tar", samples(8, start=8 * number))
            storage.write_bytes(f"{s3}/plan{shards}/s-{number}.tar", (tmp_path / "s.tar").read_bytes())
        destination = f"{s3}/plan{shards}-latents"
        monkeypatch.setenv("LDM_CACHE", str(tmp_path / f"cache{shards}"))  # which would know the first shard again
        with billed() as requests:
            encode(config(f"{s3}/plan{shards}", destination, f"{tmp_path}/vae", num_workers=1))
        encoded.append(requests)
        with billed() as requests:
            dataset = LatentDataset(destination, global_batch_size=8)
            for step in range(shards):
                dataset.batch(step)
        read.append(requests)
    said = [script["encode_requests"]({"shards": n, "latent tar": 1, "input shard": 1}) for n in (1, 5)]
    assert encoded[1]["put"] - encoded[0]["put"] == said[1][0] - said[0][0]
    assert encoded[1]["get"] - encoded[0]["get"] == said[1][1] - said[0][1]
    assert read[1]["get"] - read[0]["get"] == 4 * script["read_requests"]({"shards": 1, "latent tar": 1})


def test_large_files_go_in_these_parts(script: dict[str, Any], s3: str, tmp_path: Path) -> None:
    large, size = tmp_path / "large", 120 << 20
    large.touch()
    os.truncate(large, size)
    with billed() as put:
        storage.commit_file(large, f"{s3}/large")
    one = {"shards": 1, "latent tar": size, "input shard": size}
    small = {**one, "latent tar": 1, "input shard": 1}
    more = [a - b for a, b in zip(script["encode_requests"](one), script["encode_requests"](small), strict=True)]
    assert put["put"] == more[0] + 1
    with billed() as read, storage.open_read(f"{s3}/large") as file:
        while file.read(1 << 20):
            pass
    assert read["get"] - 1 == more[1] + 1  # the first request asks for its size
    with billed() as fetched:
        storage.fetch_known(f"{s3}/large", tmp_path / "copy", size)
    assert fetched["get"] == script["read_requests"](one) - 2

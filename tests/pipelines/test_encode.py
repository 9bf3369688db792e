"""Image shards to a latent dataset on a real Ray: accounting, running again, kills, damage, and what is refused."""

import os
import shutil
import subprocess
import sys
import threading
import time
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ldm.autoencoder import load_autoencoder
from ldm.config import RequestError
from ldm.images import decode
from ldm.latents.dataset import LatentDataset
from ldm.latents.manifest import (
    fingerprint_hash,
    read_manifest,
    read_receipts,
)
from ldm.shards import RawSample, ShardReader
from pipelines.encode import encode, run
from pipelines.tracking import TrackingConfig
from tests.pictures import encoded, image_shard, kl_model, picture, samples
from tests.pipelines.encoding import SIZE, config, contents, quarantine, tree
from tests.processes import named

GENERATION = ("json", "receipts.parquet", "shards.parquet")


@pytest.fixture(scope="module")
def whole(ray_session, source, vae, tmp_path_factory):
    """One run over everything: (destination, report)."""
    destination = tmp_path_factory.mktemp("encoded") / "latents"
    return destination, encode(config(source, destination, vae))


@pytest.mark.ray
def test_the_accounting_adds_up(whole):
    destination, report = whole
    assert (report.inputs, report.encoded, report.filtered, report.quarantined) == (60, 56, 0, 4)
    assert (report.shards, report.skipped_shards, report.exit_code) == (3, 0, 0)
    assert report.images_per_second > 0 and report.destination == str(destination)
    manifest = read_manifest(str(destination))
    assert manifest.generation == report.generation
    assert [(row["name"], row["count"]) for row in manifest.shards] == [
        ("train-00000", 20),
        ("train-00001", 16),
        ("train-00002", 20),
    ]
    for receipt in read_receipts(str(destination)).values():
        assert receipt.accounting.inputs == 20


@pytest.mark.ray
def test_every_quarantined_sample_has_its_reason(whole):
    records = quarantine(whole[0], "train-00001")
    reasons = {record["key"]: record["reason"] for record in records}
    assert len(records) == 4 and {record["shard"] for record in records} == {"train-00001"}
    assert {record["outcome"] for record in records} == {"quarantined"}
    assert reasons["00022"] == "its key stands twice in the shard"
    assert reasons["00023"] == "is no picture that Pillow knows"
    assert reasons["00031"] == "holds no picture, only cls, txt"
    assert reasons["00035"] == "its .cls holds 'seven', expected a class number from 0 to 999999"


@pytest.mark.ray
def test_nothing_but_the_data_set_is_left(whole):
    names = set(contents(whole[0]))
    shards = [f"train-0000{n}" for n in range(3)]
    parts = (("latents", ".tar"), ("latents", ".index.parquet"), ("columns", ".parquet"), ("receipts", ".json"))
    expected = {f"{folder}/{name}{end}" for name in shards for folder, end in parts}
    generation = whole[1].generation
    expected |= {f"generations/{generation}.{end}" for end in GENERATION}
    expected |= {
        "manifest.json",
        "quarantine/train-00001.jsonl",
        "fingerprint.json",
        "reading.json",
        "autoencoder/config.json",
        "autoencoder/diffusion_pytorch_model.safetensors",
    }
    assert names == expected


@pytest.mark.ray
def test_latents_are_those_of_the_autoencoder(whole, source, vae):
    """Each stored record is what the network gives for that very picture, with its label and caption."""
    data = LatentDataset(str(whole[0]), global_batch_size=8)
    stored = dict(zip(data.all().ids.tolist(), data.all().moments, strict=True))
    autoencoder = load_autoencoder(vae)
    for name in ("train-00000", "train-00001"):
        columns = pq.read_table(f"{whole[0]}/columns/{name}.parquet").to_pylist()
        raw = {sample.key: sample for sample in reversed(list(ShardReader(f"{source}/{name}.tar")))}
        for row in columns:
            sample = raw[row["key"]]
            pixels, size = decode(sample.picture, SIZE)
            batch = torch.zeros(8, 3, SIZE, SIZE, dtype=torch.uint8)
            batch[0] = torch.from_numpy(pixels)
            expected = autoencoder.encode(batch)[0]
            assert (stored[row["id"]].float() - expected).abs().max() < 4e-3 * expected.abs().max()
            assert (row["label"], row["caption"]) == (sample.label, sample.caption)
            assert (row["width"], row["height"]) == size == (20, 16)
    assert data.latent_shape == (4, 8, 8) and data.num_classes == 3


@pytest.mark.ray
def test_running_again_touches_nothing(whole, source, vae):
    before = tree(whole[0])
    report = encode(config(source, whole[0], vae))
    assert tree(whole[0]) == before
    assert (report.skipped_shards, report.encoded, report.generation) == (3, 56, whole[1].generation)


@pytest.mark.ray
def test_a_run_in_parts_is_the_run_in_one_go(whole, source, vae, tmp_path):
    first = encode(config(source, tmp_path / "latents", vae, max_shards=1, num_workers=1))
    assert (first.inputs, first.shards, first.skipped_shards) == (20, 1, 0)
    after_first = tree(tmp_path / "latents")
    second = encode(config(source, tmp_path / "latents", vae))
    assert (second.inputs, second.shards, second.skipped_shards) == (60, 3, 1)
    assert second.generation == whole[1].generation
    # The first part's own generation stays beside: a run that began with it goes on with it.
    first_files = {f"generations/{first.generation}.{end}" for end in GENERATION}
    found = contents(tmp_path / "latents")
    assert {name: data for name, data in found.items() if name not in first_files} == contents(whole[0])
    now = tree(tmp_path / "latents")
    assert {n for n, state in after_first.items() if now[n] != state} == {"manifest.json"}


@pytest.mark.ray
def test_too_many_quarantined_is_exit_code_3(whole, source, vae):
    report = encode(config(source, whole[0], vae, max_quarantined=0.06))
    assert 4 / 60 > 0.06 and report.exit_code == 3
    assert encode(config(source, whole[0], vae, max_quarantined=0.07)).exit_code == 0


@pytest.mark.ray
def test_a_relative_destination_and_tracking(whole, source, vae, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    shutil.copytree(whole[0], tmp_path / "latents")
    monkeypatch.chdir(tmp_path)
    tracking = TrackingConfig(uri="sqlite:///mlflow.db", experiment="tests")
    report = encode(config(source, "latents", vae, tracking=tracking))
    assert report.destination == str(tmp_path / "latents")
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    assert run.info.run_name == "encode/latents" and run.info.status == "FINISHED"
    assert run.data.metrics["data/inputs"] == 60 and run.data.metrics["data/quarantined"] == 4
    assert run.data.tags["generation"] == report.generation
    assert run.data.tags["fingerprint"] == fingerprint_hash(read_manifest("latents").fingerprint)
    data = {i.tags[0].value: (i.dataset.name, i.dataset.digest) for i in run.inputs.dataset_inputs}
    assert set(data) == {"source", "latents"} and data["latents"] == ("latents", report.generation)


@pytest.mark.ray
def test_what_another_run_commits_meanwhile_is_not_forgotten(ray_session, source, vae, tmp_path, monkeypatch):
    """Two runs into one destination, each with shards of its own: the last one's generation holds all."""
    planned, destination = run.plan, tmp_path / "latents"

    def plan_while_another_works(settings):
        todo = planned(settings)
        monkeypatch.undo()
        encode(config(source, destination, vae, source=f"{source}/train-00001.tar"))
        return todo

    monkeypatch.setattr(run, "plan", plan_while_another_works)
    report = encode(config(source, destination, vae, source=f"{source}/train-00000.tar"))
    assert report.shards == 2 and report.inputs == 40
    assert {row["name"] for row in read_manifest(str(destination)).shards} == {"train-00000", "train-00001"}


@pytest.mark.ray
def test_a_second_try_that_fails_is_no_success(ray_session, source, vae, tmp_path):
    """The shard itself is committed, by its first try; the failure of the second must be said all the same."""
    (tmp_path / "images").mkdir()
    content = list(ShardReader(f"{source}/train-00001.tar"))
    image_shard(tmp_path / "images" / "s.tar", content)
    settings = config(str(tmp_path / "images"), tmp_path / "latents", vae, max_quarantined=1)
    first = encode(settings)
    assert first.quarantined > 0
    image_shard(tmp_path / "images" / "s.tar", content[::-1])  # of the same size
    with pytest.raises(RuntimeError, match=r"^1 of 1 shards failed, .*s\.tar: .*is another file than the one"):
        encode(settings.model_copy(update={"retry": "quarantined"}))
    manifest = read_manifest(first.destination)
    assert manifest.generation == first.generation and manifest.set_aside == {}


@pytest.mark.ray
def test_what_mlflow_shows_of_an_encode(ray_session, source, vae, tmp_path):
    """Its parameters, throughput, where the time went, the price, and decoded records beside their sources."""
    from mlflow import MlflowClient

    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db", experiment="tests")
    report = encode(config(source, tmp_path / "latents", vae, tracking=tracking, price_per_hour=3.6, num_workers=1))
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    assert run.data.params["price_per_hour"] == "3.6" and run.data.params["image_size"] == str(SIZE)
    metrics = run.data.metrics
    shares = [metrics[f"perf/{part}_share"] for part in ("read", "decode", "vae", "write")]
    assert min(shares) > 0 and sum(shares) == pytest.approx(1)
    assert metrics["perf/images_per_second"] == pytest.approx(report.images_per_second, rel=0.01)
    assert metrics["perf/price_per_million_images"] == pytest.approx(1000 / metrics["perf/images_per_second"])
    assert 0 < metrics["data/preview_psnr"] < 60
    grid = Image.open(client.download_artifacts(run.info.run_id, "preview.png", str(tmp_path)))
    assert grid.size == (8 * SIZE + 14, 2 * SIZE + 2)  # four pairs a row, gaps of two


@pytest.mark.ray
def test_a_changed_input_is_refused(whole, source, vae, tmp_path):
    shutil.copytree(source, tmp_path / "images")
    image_shard(tmp_path / "images" / "train-00001.tar", samples(40, start=20))
    before = tree(whole[0])
    with pytest.raises(RequestError, match=r"^source=.*train-00001\.tar: has \d+ bytes, but \d+ when it was encoded"):
        encode(config(str(tmp_path / "images"), whole[0], vae))
    assert tree(whole[0]) == before


@pytest.mark.ray
@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"image_size": 32}, "pictures.size: 16 != 32"),
        ({"store": "mean"}, "store: moments != mean"),
        ({"precision": "bfloat16"}, "autoencoder.precision: float32 != bfloat16"),
        ({"background": (0, 0, 0)}, "pictures.background: [255, 255, 255] != [0, 0, 0]"),
        ({"autoencoder": "other"}, "autoencoder.weights: "),
    ],
)
def test_another_way_of_making_is_refused_with_what_differs(whole, source, vae, tmp_path, changes, difference):
    if "autoencoder" in changes:
        kl_model(seed=1).save_pretrained(tmp_path)
        changes = {"autoencoder": str(tmp_path)}
    before = tree(whole[0])
    with pytest.raises(RequestError) as caught:
        encode(config(source, whole[0], vae, **changes))
    message = str(caught.value)
    assert message.startswith(f"destination={whole[0]}: holds latents made in another way (") and "\n" not in message
    assert difference in message and message.count("!=") == 1
    assert tree(whole[0]) == before


@pytest.mark.ray
@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"label": "json.class"}, "label: cls != json.class"),
        ({"caption": "json.title"}, "caption: txt != json.title"),
        ({"keep_json": ("score",)}, 'keep_json: [] != ["score"]'),
        ({"min_size": 8}, "min_size: 0 != 8"),
    ],
)
def test_shards_of_one_destination_are_read_alike(whole, source, vae, changes, difference):
    """Also by `ldm run`, which would say that what is asked for is there."""
    before, asked = tree(whole[0]), config(source, whole[0], vae, **changes)
    for ask in (encode, run.finished):
        with pytest.raises(RequestError) as caught:
            ask(asked)
        message = f"destination={whole[0]}: holds shards that were read in another way ({difference}); give another"
        assert str(caught.value).startswith(message)
    assert tree(whole[0]) == before


@pytest.mark.parametrize(
    ("changes", "environment", "message"),
    [
        ({"device": "cuda"}, {}, "device=cuda: the cluster has no GPU; give device=cpu or device=auto"),
        (
            {},
            {"RAY_ADDRESS": "http://127.0.0.1:8265"},
            "RAY_ADDRESS=http://127.0.0.1:8265: is a dashboard; give HEAD:6379, or use `ldm submit`",
        ),
        ({"tracking.uri": "http://127.0.0.1:9"}, {}, "tracking.uri=http://127.0.0.1:9: cannot be written to"),
    ],
)
def test_what_cannot_begin_claims_no_destination(source, vae, tmp_path, changes, environment, message):
    """In a process of its own, where no Ray runs yet."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    values = {"source": source, "destination": tmp_path / "latents", "autoencoder": vae, "image_size": SIZE, **changes}
    command = [sys.executable, "-m", "jobs.cli", "encode", *(f"{key}={value}" for key, value in values.items())]
    if "tracking.uri" not in changes:
        command.append("tracking.enabled=false")
    own = {**os.environ, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", **environment}
    done = subprocess.run(command, env=own, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {message}"), done.stderr
    assert not (tmp_path / "latents").exists() or not contents(tmp_path / "latents")


@pytest.mark.ray
def test_a_damaged_tar_is_named_and_stops_no_other(ray_session, source, vae, tmp_path):
    shutil.copytree(source, tmp_path / "images")
    broken = tmp_path / "images" / "train-00001.tar"
    data = broken.read_bytes()
    broken.write_bytes(data[: len(data) // 2 + 100])
    with pytest.raises(RuntimeError, match=r"^1 of 3 shards failed, the others are committed; the same .*00001\.tar: "):
        encode(config(str(tmp_path / "images"), tmp_path / "latents", vae))
    assert sorted(read_receipts(str(tmp_path / "latents"))) == ["train-00000", "train-00002"]
    manifest = read_manifest(str(tmp_path / "latents"))  # the others can be used, and it says what they are without
    assert manifest.num_samples == 40 and list(manifest.set_aside) == ["train-00001"]
    assert not list((tmp_path / "latents").glob(".attempt-*"))


def kill_one_encoder(destination: Path, killed: list[int], stop: threading.Event) -> None:
    """SIGKILL to one actor that is in the middle of a shard."""
    while not stop.is_set() and not killed:
        if list(destination.glob(".attempt-*/*.tar")):
            for process in named("ray::ShardEncoder.encode_shard"):
                process.kill()
                killed.append(process.pid)
                return
        time.sleep(0.005)


@pytest.mark.ray
@pytest.mark.faults
def test_a_killed_encoder_loses_nothing(ray_session, vae, tmp_path, capsys):
    for shard in range(4):
        content = [
            RawSample(f"{n:05d}", {"png": encoded(picture(n, 80, 64)), "cls": b"1"})
            for n in range(60 * shard, 60 * shard + 60)
        ]
        image_shard(tmp_path / "images" / f"s-{shard}.tar", content)
    destination, killed, stop = tmp_path / "latents", [], threading.Event()
    killer = threading.Thread(target=kill_one_encoder, args=(destination, killed, stop))
    killer.start()
    try:
        report = encode(config(str(tmp_path / "images"), destination, vae, image_size=64, batch_size=4))
    finally:
        stop.set()
        killer.join()
    assert len(killed) == 1 and not psutil.pid_exists(killed[0])
    assert "failed, try 2 follows" in capsys.readouterr().err
    assert (report.inputs, report.encoded, report.quarantined, report.shards) == (240, 240, 0, 4)
    data = LatentDataset(str(destination), global_batch_size=240)
    assert len(set(data.batch(0).ids.tolist())) == 240
    assert torch.isfinite(data.batch(0).moments.float()).all()


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """uint8 (N, 3, H, W) => dB (N,)"""
    error = (a.float() - b.float()).square().mean((1, 2, 3)).clamp(min=1e-9)
    return 10 * torch.log10(255**2 / error)


def reconstructions(destination: object, source: str, vae: str, size: int) -> tuple[float, float]:
    """Mean PSNR in dB against the photos: of decoded stored latents, and of the autoencoder's own reconstruction."""
    data, autoencoder = LatentDataset(str(destination), global_batch_size=8), load_autoencoder(vae)
    stored = dict(zip(data.all().ids.tolist(), data.all().moments, strict=True))
    ours, direct = [], []
    for name in sorted(row["name"] for row in data.manifest.shards):
        rows = pq.read_table(f"{destination}/columns/{name}.parquet", columns=["id", "key"]).to_pylist()
        raw = {sample.key: sample for sample in reversed(list(ShardReader(f"{source}/{name}.tar")))}
        for first in range(0, len(rows), 32):
            part = rows[first : first + 32]
            pixels = np.stack([decode(raw[row["key"]].picture, size)[0] for row in part])
            photos = torch.from_numpy(pixels)
            latents = torch.stack([stored[row["id"]] for row in part])[:, : data.latent_shape[0]]
            mean = autoencoder.encode(photos)[:, : data.latent_shape[0]]
            ours.append(psnr(autoencoder.decode(latents), photos))
            direct.append(psnr(autoencoder.decode(mean), photos))
    return float(torch.cat(ours).mean()), float(torch.cat(direct).mean())


@pytest.mark.ray
def test_decoded_latents_are_the_autoencoders_own_reconstruction(whole, source, vae):
    stored, direct = reconstructions(whole[0], source, vae, SIZE)
    assert abs(stored - direct) <= 0.1


@pytest.mark.ray
@pytest.mark.real_data
def test_real_photos_through_the_pretrained_autoencoder(ray_session, shared, tmp_path):
    vae, images = str(shared / "models" / "taesd"), str(tmp_path / "images")
    photos = list(islice(ShardReader(str(shared / "data" / "grocery" / "val-00000.tar")), 100))
    image_shard(tmp_path / "images" / "photos.tar", photos)
    report = encode(config(images, tmp_path / "latents", vae, image_size=64, num_workers=1))
    assert report.inputs == report.encoded == 100 and report.quarantined == 0
    stored, direct = reconstructions(tmp_path / "latents", images, vae, 64)
    print(f"\ntaesd at 64 px, {report.encoded} photos: stored {stored:.3f} dB, direct {direct:.3f} dB")
    assert abs(stored - direct) <= 0.1

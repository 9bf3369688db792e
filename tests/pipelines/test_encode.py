"""Image shards to a latent dataset on a real Ray: accounting, running again, kills, damage, and what is refused."""

import os
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch

from ldm import storage
from ldm.autoencoder import load_autoencoder
from ldm.config import RequestError
from ldm.images import decode
from ldm.latents.dataset import LatentDataset
from ldm.latents.manifest import (
    Accounting,
    ShardReceipt,
    commit_generation,
    fingerprint_hash,
    read_manifest,
    read_receipts,
)
from ldm.shards import RawSample, ShardReader
from pipelines.encode import EncodeConfig, ShardEncoder, encode, plan
from pipelines.tracking import TrackingConfig
from tests.pictures import encoded, image_shard, kl_model, picture, samples, tiny_model

SIZE = 16


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    kl_model().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Three shards of 20 samples; the middle one holds four that cannot be encoded."""
    folder = tmp_path_factory.mktemp("images")
    image_shard(folder / "train-00000.tar", samples(20))
    bad = samples(20, start=20)
    bad[3].members["png"] = b"no picture"
    bad[7] = RawSample("00022", bad[7].members)  # stands twice
    del bad[11].members["png"]
    bad[15].members["cls"] = b"seven"
    image_shard(folder / "train-00001.tar", bad)
    image_shard(folder / "train-00002.tar", samples(20, start=40))
    return str(folder)


def config(folder: str, destination: object, vae: str, **changes: object) -> EncodeConfig:
    values = {
        "source": f"{folder}/*.tar",
        "destination": str(destination),
        "autoencoder": vae,
        "image_size": SIZE,
        "batch_size": 8,
        "tracking": TrackingConfig(enabled=False),
        "max_quarantined": 0.1,
        **changes,
    }
    return EncodeConfig(**values)


def tree(folder: object) -> dict[str, tuple[bytes, int]]:
    """Content and time of change of every file."""
    files = sorted(path for path in Path(str(folder)).rglob("*") if path.is_file())
    return {str(p.relative_to(str(folder))): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


def contents(folder: object) -> dict[str, bytes]:
    return {name: data for name, (data, _) in tree(folder).items()}


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
    receipt = read_receipts(str(whole[0]))["train-00001"]
    reasons = dict(receipt.quarantined)
    assert len(receipt.quarantined) == 4
    assert reasons["00022"] == "its key stands twice in the shard"
    assert reasons["00023"] == "is no picture that Pillow knows"
    assert reasons["00031"] == "holds no picture, only cls, txt"
    assert reasons["00035"] == "its .cls holds 'seven', expected a class number from 0 to 999999"


@pytest.mark.ray
def test_nothing_but_the_data_set_is_left(whole):
    names = set(contents(whole[0]))
    shards = [f"train-0000{n}" for n in range(3)]
    expected = {f"{folder}/{name}{end}" for name in shards for folder, end in (
        ("latents", ".tar"), ("latents", ".index.parquet"), ("columns", ".parquet"), ("receipts", ".json"))}  # fmt: skip
    generation = whole[1].generation
    expected |= {f"generations/{generation}.json", f"generations/{generation}.parquet", "manifest.json"}
    expected |= {
        "fingerprint.json",
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
    first_files = {f"generations/{first.generation}.json", f"generations/{first.generation}.parquet"}
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 17}, r"^image_size=17: the autoencoder's factor 2 does not divide it; give 16$"),
        ({"image_size": 1}, r"^image_size=1: the autoencoder's factor 2 does not divide it; give 2$"),
        ({"source": "absent/*.tar"}, r"^source=absent/\*\.tar: matches no file"),
        ({"source": "absent.tar"}, r"^source=absent\.tar: does not exist"),
        ({"source": ""}, r"^source='': is empty"),
        ({"source": "pipe:cat x.tar"}, r"^pipe:cat x\.tar: runs a shell command, which is refused"),
        ({"autoencoder": "/absent"}, r"^autoencoder=/absent: holds no config\.json"),
        ({"class_names": "/absent.json"}, r"^class_names=/absent\.json: cannot be read"),
    ],
)
def test_a_wrong_request_is_refused_before_any_work(source, vae, tmp_path, changes, message):
    with pytest.raises(RequestError, match=message) as caught:
        encode(config(source, tmp_path / "latents", vae, **changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "latents").exists()


def test_an_empty_source_and_one_name_twice_are_refused(source, vae, tmp_path):
    (tmp_path / "empty.tar").write_bytes(b"")
    with pytest.raises(RequestError, match=r"^source=.*empty\.tar: is empty; give a WebDataset tar"):
        encode(config(str(tmp_path), tmp_path / "latents", vae))
    (tmp_path / "other").mkdir()
    shutil.copy(f"{source}/train-00000.tar", tmp_path / "other")
    both = (f"{source}/*.tar", f"{tmp_path}/other/*.tar")
    with pytest.raises(RequestError, match=r"has the same name as .*train-00000\.tar"):
        encode(config(source, tmp_path / "latents", vae, source=both))
    assert not (tmp_path / "latents").exists()


@pytest.mark.parametrize("background", [(0, 0, 256), (-1, 0, 0)])
def test_a_background_that_is_no_colour_is_refused(background, vae):
    with pytest.raises(ValueError, match="less than or equal to 255|greater than or equal to 0"):
        config("x", "y", vae, background=background)


def test_the_plan_says_what_is_left(source, vae, tmp_path):
    todo = plan(config(source, tmp_path / "latents", vae, max_shards=2))
    assert todo.todo == ("train-00000", "train-00001") and todo.done == {}
    assert todo.input_bytes == sum(os.path.getsize(f"{source}/{name}.tar") for name in todo.todo)
    assert not (tmp_path / "latents").exists()


@pytest.mark.ray
def test_a_damaged_tar_is_named_and_stops_no_other(ray_session, source, vae, tmp_path):
    shutil.copytree(source, tmp_path / "images")
    broken = tmp_path / "images" / "train-00001.tar"
    data = broken.read_bytes()
    broken.write_bytes(data[: len(data) // 2 + 100])
    with pytest.raises(RuntimeError, match=r"^1 of 3 shards failed, the others are committed: .*train-00001\.tar: "):
        encode(config(str(tmp_path / "images"), tmp_path / "latents", vae))
    assert sorted(read_receipts(str(tmp_path / "latents"))) == ["train-00000", "train-00002"]
    assert not (tmp_path / "latents" / "manifest.json").exists()
    assert not list((tmp_path / "latents").glob(".attempt-*"))
    # Repaired, it goes on from there.
    shutil.copy(f"{source}/train-00001.tar", broken)
    report = encode(config(str(tmp_path / "images"), tmp_path / "latents", vae))
    assert (report.inputs, report.skipped_shards) == (60, 2)


def encode_here(settings: EncodeConfig, name: str) -> ShardReceipt:
    """One shard through the actor's class in this very process."""
    todo = plan(settings)
    todo.autoencoder.save(storage.join(settings.destination, "autoencoder"))
    encoder = ShardEncoder(settings, fingerprint_hash(todo.fingerprint), "cpu", 1)
    return encoder.encode_shard(name, todo.urls[name])


def test_a_source_without_pictures_is_refused(vae, tmp_path):
    image_shard(tmp_path / "a.tar", [RawSample("x", {"txt": b"words"})])
    settings = config(str(tmp_path), tmp_path / "latents", vae)
    assert encode_here(settings, "a").accounting == Accounting(1, 0, 0, 1)
    with pytest.raises(RequestError, match=r"holds no picture that can be encoded \(1 = 0 encoded \+ 0 filtered \+ 1"):
        encode(settings)


def kill_one_encoder(destination: Path, killed: list[int], stop: threading.Event) -> None:
    """SIGKILL to one actor that is in the middle of a shard."""
    while not stop.is_set() and not killed:
        if list(destination.glob(".attempt-*/*.tar")):
            for process in psutil.Process().children(recursive=True):
                try:
                    if process.name().startswith("ray::ShardEnc") and "encode_shard" in " ".join(process.cmdline()):
                        os.kill(process.pid, signal.SIGKILL)
                        killed.append(process.pid)
                        return
                except psutil.NoSuchProcess:
                    continue
        time.sleep(0.005)


@pytest.mark.ray
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


def test_one_encoder_on_an_object_store(source, s3, vae, tmp_path, monkeypatch):
    """The actor is a plain class: the same shard from and to S3 is the same bytes as on the disk."""
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    storage.write_bytes(f"{s3}/images/train-00001.tar", Path(f"{source}/train-00001.tar").read_bytes())
    autoencoder = load_autoencoder(vae)
    found = {}
    for place, inputs in ((str(tmp_path / "latents"), source), (f"{s3}/encoded", f"{s3}/images")):
        settings = config(inputs, place, vae, source=f"{inputs}/train-00001.tar")
        receipt = encode_here(settings, "train-00001")
        commit_generation(place, [receipt], plan(settings).fingerprint, autoencoder)
        found[place] = (receipt, storage.read_bytes(f"{place}/latents/train-00001.tar"), read_manifest(place).generation)
    local, remote = found.values()
    assert local == remote and local[0].accounting.encoded == 16
    batch = LatentDataset(f"{s3}/encoded", global_batch_size=16).batch(0)
    assert len(set(batch.ids.tolist())) == 16


@pytest.mark.parametrize("store", ["moments", "mean"])
def test_a_deterministic_autoencoder_and_the_mean_alone(source, vae, tmp_path, store):
    if store == "moments":
        tiny_model().save_pretrained(tmp_path / "vae")
        vae = str(tmp_path / "vae")
    settings = config(source, tmp_path / "latents", vae, store=store, source=f"{source}/train-00000.tar")
    receipt = encode_here(settings, "train-00000")
    side = SIZE // load_autoencoder(vae).factor
    assert receipt.shape == (4, side, side) and receipt.accounting.encoded == 20


def test_a_latent_beyond_fp16_is_quarantined(source, tmp_path):
    model = kl_model()
    model.quant_conv.weight.data[0] *= 1e9
    model.save_pretrained(tmp_path / "vae")
    settings = config(source, tmp_path / "latents", str(tmp_path / "vae"), source=f"{source}/train-00000.tar")
    receipt = encode_here(settings, "train-00000")
    assert receipt.accounting.quarantined == 20
    assert {reason for _, reason in receipt.quarantined} == {"its latent is not finite in fp16"}


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
    images, vae = str(shared / "data" / "grocery"), str(shared / "models" / "taesd")
    settings = config(images, tmp_path / "latents", vae, source=f"{images}/val-*.tar", image_size=64, batch_size=32)
    report = encode(settings)
    assert report.inputs == report.encoded == 296 and report.quarantined == 0
    stored, direct = reconstructions(tmp_path / "latents", images, vae, 64)
    print(f"\ntaesd at 64 px, {report.encoded} photos: stored {stored:.3f} dB, direct {direct:.3f} dB")
    assert abs(stored - direct) <= 0.1


@pytest.mark.real_data
def test_real_transparent_pictures_and_their_captions(shared, vae, tmp_path):
    folder = str(shared / "data" / "emoji")
    settings = config(folder, tmp_path / "latents", vae, source=f"{folder}/emoji-00006.tar", background=(255, 0, 255))
    receipt = encode_here(settings, "emoji-00006")
    raw = {sample.key: sample for sample in ShardReader(f"{folder}/emoji-00006.tar")}
    assert receipt.accounting == Accounting(len(raw), len(raw), 0, 0) and len(raw) > 50
    columns = pq.read_table(tmp_path / "latents" / "columns" / "emoji-00006.parquet").to_pylist()
    assert [(row["key"], row["caption"], row["width"]) for row in columns] == [
        (key, sample.caption, 128) for key, sample in raw.items()
    ]

"""Encoding without Ray: what is refused before any work, and one shard through the actor's class."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from ldm import images, storage
from ldm.autoencoder import load_autoencoder
from ldm.config import RequestError
from ldm.latents.dataset import LatentDataset
from ldm.latents.manifest import (
    commit_generation,
    read_manifest,
)
from ldm.latents.receipt import Accounting
from ldm.shards import RawSample, ShardReader
from pipelines.encode import encode, plan
from tests.pictures import encoded, image_shard, kl_model, picture, tiny_model
from tests.pipelines.encoding import SIZE, config, encode_here, quarantine


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
        ({"image_size": (16, 16)}, r"^image_size=\[16, 16\]: give at least one size, and each once$"),
        ({"image_size": ()}, r"^image_size=\[\]: give at least one size, and each once$"),
        ({"image_size": 4096}, r"^batch_size=8: has 402\.7 MB of pixels, .*; give at most 2$"),
        ({"image_size": (16, 17)}, r"^image_size=17: the autoencoder's factor 2 does not divide it; give 16$"),
        ({"image_size": (16, 32), "buckets": {"step": 8}}, r"^image_size=\[16, 32\]: with buckets it is one area"),
        ({"image_size": 64, "buckets": {"step": 3}}, r"^buckets\.step=3: the autoencoder's factor 2 does not divide"),
    ],
)
def test_a_wrong_request_is_refused_before_any_work(source, vae, tmp_path, changes, message):
    with pytest.raises(RequestError, match=message) as caught:
        encode(config(source, tmp_path / "latents", vae, **changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "latents").exists()


def test_a_destination_in_a_folder_of_pictures_is_refused(vae, tmp_path):
    storage.write_bytes(f"{tmp_path}/in/a.png", encoded(picture(1)))
    for place in ("in", "in/latents"):
        with pytest.raises(RequestError, match=r"^destination=.*: lies in the source; give a folder of its own$"):
            plan(config("", tmp_path / place, vae, source=f"{tmp_path}/in"))


def test_other_classes_than_before_are_refused(vae, tmp_path):
    for name in ("one/cats/a.png", "one/dogs/b.png", "two/ant/c.png", "two/bee/d.png"):
        storage.write_bytes(f"{tmp_path}/{name}", encoded(picture(1)))
    settings = config("", tmp_path / "latents", vae, source=f"{tmp_path}/one")
    todo = plan(settings)
    receipts = [encode_here(settings, name) for name in todo.shards]
    model = todo.autoencoder
    commit_generation(
        settings.destination, receipts, todo.fingerprint, model.latent_channels, model.factor, todo.class_names
    )
    with pytest.raises(RequestError, match=r"^source=.*two: has the classes ant, bee, but .* has cats, dogs; give"):
        plan(config("", tmp_path / "latents", vae, source=f"{tmp_path}/two"))


def test_an_empty_source_and_one_name_twice_are_refused(source, vae, tmp_path):
    with pytest.raises(RequestError, match=r"^source=.*: matches no file"):
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


def names(todo):
    return [task.shard.name for task in todo.tasks]


def test_the_plan_says_what_is_left(source, vae, tmp_path):
    todo = plan(config(source, tmp_path / "latents", vae, max_shards=2))
    assert names(todo) == ["train-00000", "train-00001"] and todo.receipts == {}
    assert todo.input_bytes == sum(os.path.getsize(f"{source}/{name}.tar") for name in names(todo))
    assert not (tmp_path / "latents").exists()


@pytest.mark.parametrize("store", ["moments", "mean"])
def test_the_plan_estimates_what_is_written(source, vae, tmp_path, store):
    """From the samples at the head of the first shard that is left; what is done takes no more."""
    settings = config(source, tmp_path / "latents", vae, store=store, image_size=64, max_shards=1)
    estimate = plan(settings).output_bytes
    encode_here(settings, "train-00000")
    files = [path for name in ("latents", "columns") for path in (tmp_path / "latents" / name).iterdir()]
    assert sum(path.stat().st_size for path in files) == pytest.approx(estimate, rel=0.2)
    assert plan(settings).output_bytes == 0
    two_more = plan(settings.model_copy(update={"max_shards": None})).output_bytes
    assert two_more == pytest.approx(2 * estimate, rel=0.2)


def test_more_than_the_disk_holds_is_refused(source, vae, tmp_path):
    huge = config(source, tmp_path / "latents", vae, image_size=2**24, batch_size=1)  # 1 PB for each picture
    message = r"^destination=.*latents: needs about [\d.,]+ TB, but [\d.,]+ .B are free; give a destination on a larger"
    with pytest.raises(RequestError, match=message):
        plan(huge)


def test_where_the_first_shard_is_damaged_there_is_no_estimate(source, vae, tmp_path):
    data = Path(source, "train-00000.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data[: len(data) // 2])
    shutil.copy(f"{source}/train-00001.tar", tmp_path / "b.tar")
    todo = plan(config(str(tmp_path), tmp_path / "latents", vae))
    assert todo.output_bytes is None and names(todo) == ["a", "b"]


def test_a_source_without_pictures_is_refused(vae, tmp_path):
    image_shard(tmp_path / "a.tar", [RawSample("x", {"txt": b"words"})])
    settings = config(str(tmp_path), tmp_path / "latents", vae)
    assert encode_here(settings, "a").accounting == Accounting(1, 0, 0, 1)
    with pytest.raises(RequestError, match=r"holds no picture that can be encoded \(1 = 0 encoded \+ 0 filtered \+ 1"):
        encode(settings)


def test_one_encoder_on_an_object_store(source, s3, vae, tmp_path, monkeypatch):
    """The actor is a plain class: the same shard from and to S3 is the same bytes as on the disk."""
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    storage.write_bytes(f"{s3}/images/train-00001.tar", Path(f"{source}/train-00001.tar").read_bytes())
    autoencoder = load_autoencoder(vae)
    found = {}
    for place, inputs in ((str(tmp_path / "latents"), source), (f"{s3}/encoded", f"{s3}/images")):
        settings = config(inputs, place, vae, source=f"{inputs}/train-00001.tar")
        receipt = encode_here(settings, "train-00001")
        commit_generation(place, [receipt], plan(settings).fingerprint, autoencoder.latent_channels, autoencoder.factor)
        found[place] = (
            replace(receipt, input_url="", input_etag=""),
            storage.read_bytes(f"{place}/latents/train-00001.tar"),
            read_manifest(place).statistics,
        )
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
    assert [output.shape for output in receipt.outputs] == [(4, side, side)] and receipt.accounting.encoded == 20


def test_without_an_autoencoder_the_pixels_are_the_latents(source, tmp_path):
    settings = config(source, tmp_path / "latents", "identity", source=f"{source}/train-00000.tar")
    todo, receipt = plan(settings), encode_here(settings, "train-00000")
    assert [output.shape for output in receipt.outputs] == [(3, SIZE, SIZE)] and receipt.accounting.encoded == 20
    assert todo.fingerprint["autoencoder"]["class"] == "IdentityAutoencoder"
    commit_generation(settings.destination, [receipt], todo.fingerprint, 3, 1)
    data = LatentDataset(settings.destination, global_batch_size=20)
    assert data.latent_shape == (3, SIZE, SIZE)
    shown = load_autoencoder(f"{settings.destination}/autoencoder").decode(data.all().moments)
    pictures = [images.decode(sample.members["png"], SIZE)[0] for sample in ShardReader(str(settings.source))]
    assert np.array_equal(shown.numpy(), np.stack(pictures))


def test_a_latent_beyond_fp16_is_quarantined(source, tmp_path):
    model = kl_model()
    model.quant_conv.weight.data[0] *= 1e9
    model.save_pretrained(tmp_path / "vae")
    settings = config(source, tmp_path / "latents", str(tmp_path / "vae"), source=f"{source}/train-00000.tar")
    receipt = encode_here(settings, "train-00000")
    assert receipt.accounting.quarantined == 20
    assert {record["reason"] for record in quarantine(tmp_path / "latents", "train-00000")} == {
        "its latent is not finite in fp16"
    }


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

"""What encode makes of pictures and of what stands beside them: one shard through the actor's class, without Ray."""

import io
import itertools
import json
import tarfile

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from ldm import storage
from ldm.autoencoder import load_autoencoder
from ldm.images import Buckets, PictureRules, views
from ldm.latents.manifest import commit_generation, fingerprint_hash, read_manifest
from ldm.latents.receipt import Accounting, account
from ldm.shards import RawSample, ShardReader
from pipelines.encode import plan
from pipelines.encode.worker import ShardEncoder, _OneShard
from tests.pictures import encoded, image_shard, kl_model, picture
from tests.pipelines.encoding import config, contents, encode_here, quarantine

SHAPES = [(40, 30), (30, 40), (32, 32), (64, 20), (20, 64), (31, 33)]


@pytest.fixture(scope="module")
def varied(tmp_path_factory):
    """A shard of 30 pictures of six shapes; two of them are broken."""
    folder = tmp_path_factory.mktemp("varied")
    content = [
        RawSample(f"{n:03d}", {"png": encoded(picture(n, *SHAPES[n % 6])), "cls": str(n % 3).encode()})
        for n in range(30)
    ]
    content[4].members["png"] = b"broken"
    content[17].members["png"] = content[17].members["png"][:99]
    image_shard(folder / "s.tar", content)
    return folder


def rows_of(place, name):
    return pq.read_table(f"{place}/columns/{name}.parquet").to_pylist()


def records_of(place, name):
    """Member name => fp16 record."""
    found = {}
    for sample in ShardReader(f"{place}/latents/{name}.tar"):
        found[sample.key] = np.lib.format.read_array(io.BytesIO(sample.members["latents.npy"]))
    return found


def test_the_bytes_do_not_depend_on_the_number_of_threads(varied, vae, tmp_path):
    """Nor on whether batches are encoded one at a time: torch's own threads give other last bits."""
    for place, threads in (("one", 1), ("many", 4)):
        encode_here(config(str(varied), tmp_path / place, vae, image_size=64), "s", threads=threads)
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


@pytest.mark.slow
def test_a_compiled_encoder_gives_nearly_the_same(varied, vae, tmp_path):
    """From several threads at once, too."""
    for place, compiled in (("eager", False), ("compiled", True)):
        encode_here(config(str(varied), tmp_path / place, vae, compile=compiled), "s", threads=2)
    eager, compiled = (records_of(tmp_path / place, "s") for place in ("eager", "compiled"))
    assert eager.keys() == compiled.keys()
    assert max(np.abs(eager[key].astype(float) - compiled[key]).max() for key in eager) <= 2**-9


def test_another_batch_size_changes_the_last_bits_at_most(varied, vae, tmp_path):
    """It is part of the record, not of the fingerprint: a run may go on with another."""
    receipts = [
        encode_here(config(str(varied), tmp_path / str(size), vae, batch_size=size), "s") for size in (1, 8, 32)
    ]
    assert [receipt.batch_size for receipt in receipts] == [1, 8, 32]
    assert len({receipt.fingerprint for receipt in receipts}) == 1
    ours, *others = (records_of(tmp_path / str(size), "s") for size in (1, 8, 32))
    for other in others:
        assert ours.keys() == other.keys()
        # One step of fp16 at the size of the largest value, which is where fp32's 1e-6 may tip the rounding.
        assert max(np.abs(ours[key].astype(float) - other[key]).max() for key in ours) <= 2**-9


def test_several_sizes_and_mirrored_copies(varied, vae, tmp_path):
    """One tar for each size; each record says which view it is, and all of a picture share its id."""
    settings = config(str(varied), tmp_path / "latents", vae, image_size=(16, 32), flip=True)
    receipt = encode_here(settings, "s")
    assert receipt.accounting == Accounting(30, 28, 0, 2)
    assert [(output.name, output.shape, output.count) for output in receipt.outputs] == [
        ("s.8x8", (8, 8, 8), 56),
        ("s.16x16", (8, 16, 16), 56),
    ]
    small, large = (rows_of(tmp_path / "latents", output.name) for output in receipt.outputs)
    assert {row["picture"] for row in small} == {row["picture"] for row in large} and len(small) == 56
    ids = [row["id"] for row in small + large]
    assert len(set(ids)) == len(ids) == 112
    assert sum(row["flipped"] for row in small) == 28
    keys = list(records_of(tmp_path / "latents", "s.16x16"))
    assert keys[:4] == ["000~32x32", "000~32x32-flip", "001~32x32", "001~32x32-flip"]


def test_a_flipped_record_is_that_of_the_mirrored_picture(varied, vae, tmp_path):
    settings = config(str(varied), tmp_path / "latents", vae, image_size=32, flip=True)
    encode_here(settings, "s")
    found, autoencoder = records_of(tmp_path / "latents", "s"), load_autoencoder(vae)
    raw = next(iter(ShardReader(f"{varied}/s.tar")))
    plain, mirrored = views(raw.picture, PictureRules((32,), flip=True))[0]
    assert (mirrored.pixels == plain.pixels[:, :, ::-1]).all()
    for key, view in (("000", plain), ("000~flip", mirrored)):
        direct = autoencoder.encode(torch.from_numpy(view.pixels.copy()[None]).repeat(8, 1, 1, 1))[0]
        torch.testing.assert_close(torch.from_numpy(found[key]).float(), direct, atol=2e-3, rtol=2e-3)


def test_aspect_buckets(varied, vae, tmp_path):
    """One shape in each tar; the columns keep the original size and the crop, in its pixels."""
    buckets = Buckets(step=8, max_ratio=4)
    settings = config(str(varied), tmp_path / "latents", vae, image_size=32, buckets=buckets)
    receipt = encode_here(settings, "s")
    assert receipt.accounting == Accounting(30, 28, 0, 2)
    assert len(receipt.outputs) > 3 and sum(output.count for output in receipt.outputs) == 28
    for output in receipt.outputs:
        height, width = (2 * side for side in output.shape[1:])
        assert height * width <= 32**2 and height % 8 == width % 8 == 0
        for row in rows_of(tmp_path / "latents", output.name):
            assert (row["width"], row["height"]) in SHAPES
            wide, high = row["right"] - row["left"], row["bottom"] - row["top"]
            assert wide / high == pytest.approx(width / height, rel=1e-5)
            assert wide == pytest.approx(row["width"]) or high == pytest.approx(row["height"])


def test_small_pictures_are_filtered_and_counted(varied, vae, tmp_path):
    receipt = encode_here(config(str(varied), tmp_path / "latents", vae, min_size=30), "s")
    assert receipt.accounting == Accounting(30, 19, 9, 2)  # ten have 20 pixels, one of them is broken
    outcomes = [record["outcome"] for record in quarantine(tmp_path / "latents", "s")]
    assert (outcomes.count("filtered"), outcomes.count("quarantined")) == (9, 2)
    reasons = {r["reason"] for r in quarantine(tmp_path / "latents", "s") if r["outcome"] == "filtered"}
    assert reasons == {f"{w}x{h} pixels, its short side is under 30" for w, h in [(64, 20), (20, 64)]}


def test_labels_captions_and_columns_from_json(vae, tmp_path):
    fields = [
        {"class": 2, "text": "a pear", "aesthetic": 5, "width": 99, "tags": ["x"]},
        {"class": 0, "text": "an apple", "aesthetic": 6.5, "tags": "y"},
        {"aesthetic": None},
    ]
    content = [
        RawSample(str(n), {"png": encoded(picture(n)), "json": json.dumps(f).encode(), "cls": b"9"})
        for n, f in enumerate(fields)
    ]
    content += [
        RawSample("no-json", {"png": encoded(picture(7))}),
        RawSample("wrong-class", {"png": encoded(picture(8)), "json": b'{"class": "pear"}'}),
        RawSample("wrong-json", {"png": encoded(picture(9)), "json": b"{"}),
    ]
    image_shard(tmp_path / "s.tar", content)
    keep = ("aesthetic", "width", "tags")
    settings = config(str(tmp_path), tmp_path / "latents", vae, label="json.class", caption="json.text", keep_json=keep)
    assert encode_here(settings, "s").accounting == Accounting(6, 4, 0, 2)
    rows = rows_of(tmp_path / "latents", "s")
    assert [(row["label"], row["caption"], row["aesthetic"], row["json_width"], row["tags"]) for row in rows] == [
        (2, "a pear", 5.0, 99.0, '["x"]'),
        (0, "an apple", 6.5, None, "y"),
        (None, None, None, None, None),
        (None, None, None, None, None),
    ]
    assert [row["width"] for row in rows] == [20] * 4  # the picture's own
    reasons = {record["key"]: record["reason"] for record in quarantine(tmp_path / "latents", "s")}
    assert reasons["wrong-class"].startswith("its json.class is 'pear', expected a class number")
    assert reasons["wrong-json"].startswith("its .json is no JSON")


def test_texts_and_numbers_that_no_column_can_hold_cost_no_shard(vae, tmp_path):
    """Half a surrogate pair, as a cut emoji leaves it in JSON, and ids beyond float64."""
    fields = [b'{"text": "cut \\ud83d", "id": 1234567890123456789, "variant": 1}', b'{"id": 2, "variant": 2}']
    content = [RawSample(str(n), {"png": encoded(picture(n)), "json": data}) for n, data in enumerate(fields)]
    content.append(RawSample("no-picture", {"caf\udce9": b"x"}))
    image_shard(tmp_path / "s.tar", content)
    settings = config(
        str(tmp_path), tmp_path / "latents", vae, caption="json.text", keep_json=("text", "id", "variant")
    )
    assert encode_here(settings, "s").accounting == Accounting(3, 2, 0, 1)
    rows = rows_of(tmp_path / "latents", "s")
    assert [(row["caption"], row["text"]) for row in rows] == [("cut \\ud83d", "cut \\ud83d"), (None, None)]
    assert [row["json_id"] for row in rows] == ["1234567890123456789", "2"]
    assert [row["json_variant"] for row in rows] == [1.0, 2.0]
    assert quarantine(tmp_path / "latents", "s")[0]["reason"] == "holds no picture, only caf\\xe9"


def test_another_file_is_not_tried_for_the_one_that_was_quarantined(varied, vae, tmp_path):
    """Tars are padded, so another one often has the same size; places in the old one mean nothing in it."""
    folder = tmp_path / "images"
    folder.mkdir()
    content = list(ShardReader(f"{varied}/s.tar"))
    image_shard(folder / "s.tar", content)
    settings = config(str(folder), tmp_path / "latents", vae, retry="quarantined")
    encode_here(settings, "s")
    image_shard(folder / "s.tar", content[::-1])
    assert (folder / "s.tar").stat().st_size == (varied / "s.tar").stat().st_size
    before = contents(tmp_path / "latents")
    with pytest.raises(tarfile.ReadError, match="is another file than the one whose quarantined pictures"):
        encode_here(settings, "s", attempt=1)
    assert contents(tmp_path / "latents") == before


def test_an_encoder_does_not_work_with_another_autoencoder(varied, vae, tmp_path):
    """What lies at the destination may have been replaced since the plan."""
    settings = config(str(varied), tmp_path / "latents", vae)
    encode_here(settings, "s")
    kl_model(seed=1).save_pretrained(tmp_path / "latents" / "autoencoder")
    with pytest.raises(RuntimeError, match="autoencoder: is not the autoencoder of this run"):
        ShardEncoder(settings, fingerprint_hash(plan(settings).fingerprint), "cpu", 1)


def test_a_committed_shard_is_not_written_again(varied, vae, tmp_path):
    """Two writers that began together: the second finds the receipt of the first, whose files stay as it says."""
    settings = config(str(varied), tmp_path / "latents", vae)
    todo = plan(settings)
    todo.autoencoder.save(f"{tmp_path}/latents/autoencoder")
    encoders = [
        ShardEncoder(
            config(str(varied), tmp_path / "latents", vae, batch_size=size),
            fingerprint_hash(todo.fingerprint),
            "cpu",
            1,
        )
        for size in (8, 4)
    ]
    task = todo.tasks[0]
    second = _OneShard(encoders[1], task)
    first = encoders[0].encode_shard(task).receipt
    before = contents(tmp_path / "latents")
    assert second.run().receipt == first and first.batch_size == 8
    assert contents(tmp_path / "latents") == before
    for encoder in encoders:
        encoder.close()


def test_only_what_is_quarantined_is_tried_again(varied, tmp_path, vae):
    """What is committed stays as it is."""
    place = tmp_path / "latents"
    first = encode_here(config(str(varied), place, vae), "s")
    before = contents(place)
    again = config(str(varied), place, vae, retry="quarantined")
    (task,) = plan(again).tasks
    assert (task.attempt, task.only) == (1, frozenset({4, 17}))
    second = encode_here(again, "s", attempt=1)
    assert second.name == "s~1" and second.accounting == Accounting(2, 0, 0, 2) and second.outputs == ()
    assert account([first, second]) == Accounting(30, 28, 0, 2)
    assert {name: data for name, data in contents(place).items() if name in before} == before
    assert [record["index"] for record in quarantine(place, "s~1")] == [4, 17]
    assert [task.attempt for task in plan(again).tasks] == [2]
    assert plan(config(str(varied), place, vae)).tasks == ()


def test_a_second_try_that_succeeds_is_added(vae, tmp_path, monkeypatch):
    """A latent that was not finite on one machine may be on another."""
    image_shard(tmp_path / "s.tar", [RawSample(str(n), {"png": encoded(picture(n)), "cls": b"1"}) for n in range(5)])
    settings, broken = config(str(tmp_path), tmp_path / "latents", vae), {2, 3}
    real = ShardEncoder.encode

    def encode(self, pixels):
        records = real(self, pixels)
        records[list(broken)] = np.inf
        return records

    with monkeypatch.context() as patch:
        patch.setattr(ShardEncoder, "encode", encode)
        first = encode_here(settings, "s")
    assert first.accounting == Accounting(5, 3, 0, 2)
    second = encode_here(settings.model_copy(update={"retry": "quarantined"}), "s", attempt=1)
    assert second.accounting == Accounting(2, 2, 0, 0) and second.quarantine_sha256 == ""
    autoencoder, todo = load_autoencoder(vae), plan(settings)
    commit_generation(
        settings.destination, [first, second], todo.fingerprint, autoencoder.latent_channels, autoencoder.factor
    )
    manifest = read_manifest(settings.destination)
    assert manifest.accounting == Accounting(5, 5, 0, 0) and manifest.num_samples == 5
    assert [row["key"] for row in rows_of(settings.destination, "s~1")] == ["2", "3"]


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_an_overflow_of_half_precision_is_tried_again_in_fp32(varied, vae, tmp_path, monkeypatch, precision):
    """The SDXL autoencoder overflows in fp16: what is not finite there is computed in fp32."""
    exact = encode_here(config(str(varied), tmp_path / "exact", vae), "s")
    real, calls = ShardEncoder._moments, []

    def overflow(self, autoencoder, pixels):
        calls.append(autoencoder.dtype)
        records = real(self, autoencoder, pixels)
        if autoencoder.dtype != torch.float32:
            records[::2] = np.nan
        return records

    monkeypatch.setattr(ShardEncoder, "_moments", overflow)
    receipt = encode_here(config(str(varied), tmp_path / "half", vae, precision=precision), "s")
    assert receipt.accounting == exact.accounting and {getattr(torch, precision), torch.float32} == set(calls)
    half, whole = (records_of(tmp_path / place, "s") for place in ("half", "exact"))
    assert all((half[key] == whole[key]).all() for key in itertools.islice(half, 0, 8, 2))


@pytest.mark.real_data
def test_real_hostile_files_are_all_accounted_for(shared, vae, tmp_path):
    """1,708 fuzzed pictures: none crashes or hangs the encoder, each has its reason."""
    settings = config(str(shared / "data" / "hostile"), tmp_path / "latents", vae)
    receipt = encode_here(settings, "fuzz-00000", threads=2)
    counts = receipt.accounting
    assert counts.inputs == 1708 and counts.encoded > 300 and counts.filtered == 0
    refused = quarantine(tmp_path / "latents", "fuzz-00000")
    assert len(refused) == counts.quarantined and all(record["reason"] and record["key"] for record in refused)
    assert len({record["index"] for record in refused}) == counts.quarantined


@pytest.mark.real_data
def test_real_orientations_come_out_alike(shared, tmp_path):
    """The latents of all eight orientations, and of none, decode to nearly one picture."""
    model = tmp_path / "vae"
    kl_model().save_pretrained(model)
    settings = config(str(shared / "data" / "hostile"), tmp_path / "latents", str(model), image_size=64)
    assert encode_here(settings, "exif-00000").accounting == Accounting(18, 18, 0, 0)
    found = records_of(tmp_path / "latents", "exif-00000")
    for kind in ("landscape", "portrait"):
        means = np.stack([record[:4].astype(float) for key, record in found.items() if kind in key.lower()])
        assert len(means) == 9
        assert np.abs(means - means.mean(0)).mean() < 0.1 * means.std()


def test_a_shard_without_a_sample_is_done(vae, tmp_path):
    image_shard(tmp_path / "s.tar", [])
    receipt = encode_here(config(str(tmp_path), tmp_path / "latents", vae), "s")
    assert receipt.accounting == Accounting() and receipt.outputs == ()
    assert storage.list_dir(f"{tmp_path}/latents/latents") == []

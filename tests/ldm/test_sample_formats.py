"""Pictures as PNGs, shards and one array: the same bits in each, whole after a kill, and each says where it is from."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import webdataset

import ldm
from ldm import storage
from ldm.autoencoder import load_autoencoder
from ldm.config import DamagedError, RequestError, validate
from ldm.latents.manifest import Conditioning
from ldm.sample_config import SampleConfig
from ldm.sampling import check, sample
from ldm.shards import ShardReader, write_shard
from ldm.snapshot import read_snapshot
from tests.commands import kill_when
from tests.pictures import write_tiny_snapshot

SETTINGS = {"num_images": 22, "seed": 100, "num_inference_steps": 2, "batch_size": 4, "device": "cpu"}


@pytest.fixture(scope="module")
def snapshot(kl, kl_folder, tmp_path_factory) -> str:
    """Of three classes, and 8 x 8 pixels."""
    url = str(tmp_path_factory.mktemp("snapshot"))
    write_tiny_snapshot(url, kl, str(kl_folder))
    return url


@pytest.fixture(scope="module")
def pixel_snapshot(tmp_path_factory) -> str:
    """The same of pixel diffusion: without an autoencoder a picture takes a tenth of the time."""
    place = tmp_path_factory.mktemp("pixels")
    identity = load_autoencoder("identity")
    identity.save(str(place / "identity"))
    write_tiny_snapshot(str(place / "snapshot"), identity, str(place / "identity"), latent_shape=(3, 8, 8))
    return str(place / "snapshot")


def asked(snapshot: str, output: Path | str, **changes: Any) -> SampleConfig:
    return validate(SampleConfig, {"snapshot": snapshot, "output": str(output), **SETTINGS, **changes})


def in_shards(snapshot: str, output: Path | str, **changes: Any) -> SampleConfig:
    return asked(snapshot, output, **{"format": "webdataset", "samples_per_shard": 6, **changes})


def pixels_of(png: bytes) -> np.ndarray:
    return np.asarray(PIL.Image.open(io.BytesIO(png)))


@pytest.fixture(scope="module")
def pngs(snapshot, tmp_path_factory) -> list[bytes]:
    """As `format=png` gives them."""
    folder = tmp_path_factory.mktemp("pngs")
    sample(asked(snapshot, folder))
    return [(folder / f"{number:06d}.png").read_bytes() for number in range(22)]


@pytest.fixture(scope="module")
def filled(snapshot, tmp_path_factory) -> Path:
    """A folder of shards that no test changes."""
    folder = tmp_path_factory.mktemp("shards")
    sample(in_shards(snapshot, folder))
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_each_png_says_what_draws_it_again(snapshot, pngs, tmp_path):
    (tmp_path / "picture.png").write_bytes(pngs[7])
    about = json.loads(PIL.Image.open(tmp_path / "picture.png").text["ldm"])  # as docs/samplers.md has it
    made = read_snapshot(snapshot)
    assert (about["weights_sha256"], about["step"]) == (made.weights_sha256, made.step)
    assert (about["seed"], about["label"], about["version"]) == (107, 7 % 3, ldm.__version__)
    again = {key: about["settings"][key] for key in SampleConfig.model_fields if key in about["settings"]}
    one = {"seed": about["seed"], "labels": str(about["label"]), "num_images": 1}
    sample(validate(SampleConfig, {"snapshot": snapshot, "output": str(tmp_path), **one, **again}))
    assert (tmp_path / "000000.png").read_bytes() == pngs[7]


def test_a_picture_of_others_names_them(snapshot, pngs, tmp_path):
    (tmp_path / "given.png").write_bytes(pngs[0])
    edit = {"task": "image_to_image", "pictures": f"{tmp_path}/given.png", "num_images": 1}
    about = []
    for strength in (0.5, 1.0):
        sample(asked(snapshot, tmp_path, strength=strength, **edit))
        about.append(json.loads(PIL.Image.open(tmp_path / "000000.png").text["ldm"]))
    assert [one["settings"]["strength"] for one in about] == [0.5, 1.0]
    assert len(about[0]["settings"]["pictures_sha256"]) == 64
    assert about[0]["label"] is None  # drawn without a class


@pytest.mark.parametrize("place", ["local", "s3"])
def test_shards_hold_the_pictures_of_png(snapshot, pngs, place, tmp_path, request):
    output = str(tmp_path) if place == "local" else f"{request.getfixturevalue('s3')}/{tmp_path.name}"
    report = sample(in_shards(snapshot, output))
    assert (report.images, report.images_per_second > 0) == (22, True)
    names = ["0000000100-0000000105.tar", "0000000106-0000000111.tar", "0000000112-0000000117.tar"]
    names += ["0000000118-0000000121.tar"]  # the rest
    assert storage.list_dir(output) == [*names, "grid.png", "samples.json"]
    found = [sample for name in names for sample in ShardReader(f"{output}/{name}")]
    assert [sample.key for sample in found] == [f"{seed:010d}" for seed in range(100, 122)]
    assert [sample.members["png"] for sample in found] == pngs
    assert [sample.label for sample in found] == [number % 3 for number in range(22)]
    about = [json.loads(PIL.Image.open(io.BytesIO(png)).text["ldm"]) for png in pngs]
    assert [sample.fields() for sample in found] == about


def test_plain_webdataset_reads_them(filled, pngs):
    tars = sorted(str(path) for path in filled.glob("*.tar"))
    found = list(webdataset.WebDataset(tars, shardshuffle=False).decode("rgb8").to_tuple("png", "cls", "json"))
    assert [label for _, label, _ in found] == [number % 3 for number in range(22)]
    assert all(np.array_equal(picture, pixels_of(png)) for (picture, *_), png in zip(found, pngs, strict=True))
    assert [about["seed"] for *_, about in found] == list(range(100, 122))


def test_1001_pictures_are_1001(pixel_snapshot, tmp_path):
    done: list[int] = []
    counts = {"num_images": 1001, "samples_per_shard": 500, "num_inference_steps": 1, "batch_size": 64}
    config = in_shards(pixel_snapshot, tmp_path, **counts)
    report = sample(config, done.append)
    found = [sum(1 for _ in ShardReader(str(path))) for path in sorted(tmp_path.glob("*.tar"))]
    assert (report.images, found, done[0], done[-1]) == (1001, [500, 500, 1], 0, 1001)


def test_killed_it_goes_on_to_the_same_bytes(pixel_snapshot, tmp_path):
    """SIGKILL costs the shard at work; what was there is not touched."""
    place = {"num_images": 242, "samples_per_shard": 4}
    sample(in_shards(pixel_snapshot, tmp_path / "whole", **place))
    killed, settings = tmp_path / "killed", {**SETTINGS, **place, "format": "webdataset", "snapshot": pixel_snapshot}
    arguments = ["sample", f"output={killed}", *(f"{key}={value}" for key, value in settings.items())]
    kill_when(arguments, lambda: len(list(killed.glob("*.tar"))) > 2, tmp_path)
    there = {path: path.stat().st_mtime_ns for path in killed.glob("*.tar")}
    assert 2 < len(there) < 61 and not (killed / "grid.png").exists()
    sample(in_shards(pixel_snapshot, killed, **place))
    assert {path: path.stat().st_mtime_ns for path in there} == there
    assert files(killed) == files(tmp_path / "whole")  # nothing of the dead process is left either


def test_what_is_there_is_not_drawn_again(snapshot, tmp_path):
    sample(in_shards(snapshot, tmp_path))
    before = files(tmp_path)
    (tmp_path / "0000000106-0000000111.tar").unlink()
    done: list[int] = []
    assert sample(in_shards(snapshot, tmp_path), done.append).images_per_second > 0
    assert (done, files(tmp_path)) == ([16, 20, 22], before)
    assert sample(in_shards(snapshot, tmp_path)).images_per_second == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 5}, "seed: 100 != 5"),
        ({"num_images": 23}, "num_images: 22 != 23"),
        ({"samples_per_shard": 7}, "samples_per_shard: 6 != 7"),
        ({"labels": "pear"}, r'labels: null != \["pear"\]'),
        ({"batch_size": 8}, "batch_size: 4 != 8"),
        ({"guidance_scale": 2.0}, "guidance_scale: 1.0 != 2.0"),
        ({"precision": "bf16"}, "precision: fp32 != bf16"),
        ({"sampler": "dpmpp_2m"}, "sampler: null != dpmpp_2m"),
    ],
)
def test_another_request_into_the_same_folder_is_refused(snapshot, filled, changes, message):
    before = files(filled)
    for stage in (check, sample):  # a dry run says it too
        with pytest.raises(RequestError, match=rf"^output=.*: holds pictures of another request \({message}\); give"):
            stage(in_shards(snapshot, filled, **changes))
    assert files(filled) == before


def test_another_model_into_the_same_folder_is_refused(filled, kl, kl_folder, tmp_path):
    write_tiny_snapshot(str(tmp_path / "plain"), kl, str(kl_folder), conditioning=Conditioning())
    with pytest.raises(RequestError, match="another request \\(weights_sha256: "):
        check(in_shards(str(tmp_path / "plain"), filled))


@pytest.mark.parametrize("record", [b"{", b"[]", b'{"format": "ldm-samples", "version": 2, "request": {}}'])
def test_a_record_that_is_none_is_named(snapshot, tmp_path, record):
    (tmp_path / "samples.json").write_bytes(record)
    with pytest.raises(DamagedError, match=r"^.*/samples\.json: is no "):
        check(in_shards(snapshot, tmp_path))


def test_a_shard_that_is_not_what_was_drawn_is_named(snapshot, tmp_path):
    sample(in_shards(snapshot, tmp_path))
    shard = tmp_path / "0000000100-0000000105.tar"
    whole, read = shard.read_bytes(), list(ShardReader(str(shard)))
    elsewhere = list(ShardReader(str(tmp_path / "0000000106-0000000111.tar")))
    about = {**read[0].fields(), "settings": {}}
    strange = [type(one)(one.key, {**one.members, "json": json.dumps(about).encode()}) for one in read]
    noise = [type(one)(one.key, {**one.members, "png": b"no picture"}) for one in read]
    for samples, problem in [
        (read[:-1], "it ends before 0000000105"),
        (elsewhere, "0000000106 is none of its pictures"),
        ([*read, elsewhere[0]], "0000000106 is none of its pictures"),
        (strange, "0000000100 is a picture of another request"),
        (noise, "is no picture that Pillow knows"),
    ]:
        write_shard(str(shard), samples)
        with pytest.raises(DamagedError, match=rf"^{shard}: is damaged \({problem}\); remove it, and the same command"):
            sample(in_shards(snapshot, tmp_path))
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DamagedError, match=f"^{shard}: is damaged"):
        sample(in_shards(snapshot, tmp_path))
    shard.unlink()
    sample(in_shards(snapshot, tmp_path))
    assert shard.read_bytes() == whole


@pytest.mark.parametrize("place", ["local", "s3"])
def test_the_array_is_what_adm_saves(snapshot, pngs, place, tmp_path, request):
    """guided-diffusion saves `np.savez(path, images, labels)`."""
    output = str(tmp_path) if place == "local" else f"{request.getfixturevalue('s3')}/{tmp_path.name}"
    sample(asked(snapshot, output, format="adm-npz"))
    assert storage.list_dir(output) == ["grid.png", "samples.npz"]
    wanted = np.stack([pixels_of(png) for png in pngs]), np.arange(22) % 3
    reference = io.BytesIO()
    np.savez(reference, *wanted)
    reference.seek(0)
    data = storage.read_bytes(f"{output}/samples.npz")
    with np.load(io.BytesIO(data), allow_pickle=False) as found, np.load(reference) as saved:
        assert found.files == saved.files == ["arr_0", "arr_1"]
        for name in found.files:
            assert (found[name].dtype, found[name].shape) == (saved[name].dtype, saved[name].shape)
            assert np.array_equal(found[name], saved[name])
    sample(asked(snapshot, f"{output}/again", format="adm-npz"))
    assert storage.read_bytes(f"{output}/again/samples.npz") == data


def test_the_array_has_no_labels_where_there_are_none(kl, kl_folder, tmp_path):
    write_tiny_snapshot(str(tmp_path / "plain"), kl, str(kl_folder), conditioning=Conditioning())
    sample(asked(str(tmp_path / "plain"), tmp_path / "out", format="adm-npz"))
    with np.load(tmp_path / "out" / "samples.npz") as found:
        assert found.files == ["arr_0"] and found["arr_0"].shape == (22, 8, 8, 3)
    sample(in_shards(str(tmp_path / "plain"), tmp_path / "shards"))
    assert {tuple(one.members) for one in ShardReader(str(next((tmp_path / "shards").glob("*.tar"))))} == {
        ("png", "json")
    }


def test_on_a_full_disk_shards_are_whole_or_absent(snapshot, small_disk):
    disk = small_disk("size=200k")
    config = in_shards(snapshot, disk / "out", num_images=400, samples_per_shard=20)
    with pytest.raises(OSError, match="No space left on device"):
        sample(config)
    there = sorted((disk / "out").glob("*.tar"))
    assert there and [sum(1 for _ in ShardReader(str(path))) for path in there] == [20] * len(there)
    assert {path.suffix for path in (disk / "out").iterdir()} == {".tar", ".json"}
    with pytest.raises(RequestError, match=r"^output=.*: needs about 200.0 kB, but .* are free; give another disk, or"):
        check(asked(snapshot, disk / "array", format="adm-npz", num_images=1000))
    with pytest.raises(OSError, match="No space left on device"), storage.writing(f"{disk}/array/a.npz") as file:
        file.write(bytes(200_000))
    assert list((disk / "array").iterdir()) == []


def test_samples_per_shard_is_of_shards():
    with pytest.raises(RequestError, match="^samples_per_shard=5: is of format=webdataset, not of format=png; leave"):
        validate(SampleConfig, {"snapshot": "s", "samples_per_shard": 5})

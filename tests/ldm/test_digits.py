"""The demonstration data: what the shards hold, that their bytes are fixed, that two pictures are broken."""

import io
import sys
import tarfile

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from ldm import digits
from ldm.config import RequestError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    accounting = digits.write_digit_shards(folder)
    assert accounting == {"inputs": 1799, "digits": 1797, "broken": 2, "shards": 8}
    return folder


def read(folder):
    """(key, png bytes, label) of every sample, as a plain reader of WebDataset sees them."""
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    samples = webdataset.WebDataset(urls, shardshuffle=False)
    return [(sample["__key__"], sample["png"], int(sample["cls"])) for sample in samples]


def test_shards_hold_every_digit_and_two_broken_pictures(folder):
    samples = read(folder)
    assert [path.name for path in sorted(folder.iterdir())] == [f"digits-{i:05d}.tar" for i in range(8)]
    assert [key for key, _, _ in samples] == [f"{i:05d}" for i in range(1799)]
    found, broken = set(), []
    for key, data, label in samples:
        try:
            image = Image.open(io.BytesIO(data))
            image.load()
        except OSError:
            broken.append((int(key), data))
            continue
        assert (image.mode, image.size, image.format) == ("RGB", (32, 32), "PNG")
        found.add((image.tobytes(), label))
    assert [place for place, _ in broken] == sorted(digits.BROKEN)
    assert broken[0][1].startswith(b"\x89PNG") and not broken[1][1].startswith(b"\x89PNG")
    pictures, labels = digits.load_digit_pictures()
    expected = {
        (picture.permute(1, 2, 0).numpy().tobytes(), label)
        for picture, label in zip(pictures, labels.tolist(), strict=True)
    }
    assert found == expected


def test_the_bytes_are_the_same_each_time(folder, tmp_path):
    digits.write_digit_shards(tmp_path)
    for path in sorted(folder.iterdir()):
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()
    with tarfile.open(folder / "digits-00000.tar") as tar:
        assert {(member.mtime, member.uid, member.gid) for member in tar} == {(0, 0, 0)}


def test_every_shard_holds_every_class(folder):
    for path in sorted(folder.iterdir()):
        with tarfile.open(path) as tar:
            labels = [int(tar.extractfile(m).read()) for m in tar if m.name.endswith(".cls")]
        assert np.bincount(labels, minlength=10).min() >= 10


def test_load_digit_pictures_is_scikit_learns_own_order():
    from sklearn.datasets import load_digits

    source = load_digits()
    pictures, labels = digits.load_digit_pictures()
    assert pictures.shape == (1797, 3, 32, 32) and pictures.dtype == torch.uint8
    assert labels.tolist() == source.target.tolist() and labels.dtype == torch.int64
    assert torch.equal(pictures[:, 0], pictures[:, 2])
    # Averaged back over 4 x 4 pixels a picture is its own 8 x 8 source, smoothed a little.
    small = torch.nn.functional.avg_pool2d(pictures[:, :1].double(), 4)[:, 0].flatten(1)
    distances = torch.cdist(small * (16 / 255), torch.from_numpy(source.images).flatten(1))
    assert (distances.argmin(1) == torch.arange(1797)).double().mean() > 0.99


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(RequestError, match=r"scikit-learn, which is not installed; pip install scikit-learn"):
        digits.write_digit_shards(tmp_path)

"""Random records decoded, each beside its source: the right pairs, the right figures, grey where there is no source."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ldm import images
from ldm.autoencoder import Autoencoder
from ldm.images import PictureRules, views
from ldm.latents.manifest import commit_generation, fingerprint_hash, make_fingerprint, read_manifest
from ldm.latents.preview import preview
from ldm.latents.writer import ShardWriter
from tests.pictures import image_shard, samples

SIZES = (8, 16)


class Shrink:
    """Stands for an autoencoder that can be checked by hand: latents are the picture's means over 2x2."""

    latent_channels, factor = 3, 2

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents.repeat_interleave(2, 2).repeat_interleave(2, 3).round().clamp(0, 255).to(torch.uint8)


def shrunk(pixels: np.ndarray) -> np.ndarray:
    _, h, w = pixels.shape
    return pixels.reshape(3, h // 2, 2, w // 2, 2).mean((2, 4)).astype(np.float16)


@pytest.fixture
def place(kl, tmp_path) -> Path:
    """Two shards of pictures and their latents, in two sizes and with mirrored copies."""
    rules, url = PictureRules(SIZES, flip=True), str(tmp_path / "latents")
    fingerprint = make_fingerprint(kl, rules.fingerprint(), "mean", "float32")
    receipts = []
    for number in range(2):
        content = samples(6, start=6 * number)
        source = image_shard(tmp_path / f"in-{number}.tar", content)
        with ShardWriter(url, f"in-{number}", fingerprint_hash(fingerprint), 3, many_shapes=True) as writer:
            for sample in content:
                for view in views(sample.picture or b"", rules)[0]:
                    side = view.pixels.shape[1]
                    variant = f"{side}x{side}" + ("-flip" if view.flipped else "")
                    writer.add(sample.key, shrunk(view.pixels), variant=variant, flipped=view.flipped)
            receipts.append(writer.commit(6, 1000, "0" * 64, input_url=source))
    commit_generation(url, receipts, fingerprint, 3, 2)
    return tmp_path


def look(place: Path, count: int = 8, seed: int = 0):
    stand_in: Autoencoder = Shrink()  # type: ignore[assignment]
    return preview(read_manifest(str(place / "latents")), stand_in, count, seed)


def test_each_pair_is_a_source_and_its_latent_decoded(place):
    made = look(place)
    assert made.problems == () and len(made.psnr) == 8
    assert made.grid.shape == (3, 2 * 16 + 2, 8 * 16 + 7 * 2)
    # Against pairs that were made by hand: the source of the record of that name, shrunk and enlarged again.
    originals = {f"in-{n}/{s.key}": s.picture for n in range(2) for s in samples(6, start=6 * n)}
    for number, (name, psnr) in enumerate(made.psnr.items()):
        key, _, variant = name.partition("~")
        side = int(variant.split("x")[0])
        (source,) = (
            view.pixels
            for view in views(originals[key], PictureRules(SIZES, flip=True))[0]
            if view.pixels.shape[1] == side and view.flipped == variant.endswith("-flip")
        )
        decoded = Shrink().decode(torch.from_numpy(shrunk(source)[None]).float())[0].numpy()
        assert psnr == images.psnr(decoded, source) > 10
        row, column = divmod(2 * number, 8)
        for picture, left in ((source, column * 18), (decoded, (column + 1) * 18)):
            assert np.array_equal(made.grid[:, row * 18 : row * 18 + side, left : left + side], picture)
    assert made.mean_psnr == pytest.approx(np.mean(list(made.psnr.values())))
    assert any(name.endswith("-flip") for name in made.psnr)


def test_the_seed_decides_which(place):
    assert look(place).psnr == look(place).psnr != look(place, seed=1).psnr


@pytest.mark.parametrize("count", [1, 2, 3, 48, 1000])
def test_any_count(place, count):
    assert len(look(place, count).psnr) == min(count, 48)


def test_a_source_that_is_gone_is_grey_and_said(place):
    (place / "in-0.tar").unlink()
    made = look(place)
    assert made.problems == (f"{place}/in-0.tar: is not there any more",)
    assert 0 < len(made.psnr) < 8 and all(name.startswith("in-1/") for name in made.psnr)
    assert (made.grid == 128).all(0).sum() >= 64
    (place / "in-1.tar").write_bytes(b"no tar" * 500)
    made = look(place)
    assert made.psnr == {} and made.mean_psnr is None and len(made.problems) == 2


def test_a_source_that_was_replaced(place):
    content = samples(6)
    content[0].members["png"] = b"no picture any more"
    del content[1:]
    image_shard(place / "in-0.tar", content)
    text = "\n".join(look(place, 48).problems)
    assert "in-0.tar: its first 1,024 samples do not hold 00001" in text
    assert "in-0/00000: is no picture that Pillow knows" in text


def test_damaged_latents_are_an_error(place):
    for path in (place / "latents" / "latents").glob("*.tar"):
        path.write_bytes(path.read_bytes().replace(b"fortran", b"fortram"))
    with pytest.raises(ValueError):
        look(place)

"""`verify` on Ray, of a data set that encode itself wrote."""

import random
import shutil
from pathlib import Path

import pytest

from ldm.latents.manifest import read_manifest
from ldm.shards import RawSample
from pipelines.encode import encode
from pipelines.verify import VerifyConfig, VerifyReport, verify
from tests.ldm.damage import flip_a_bit
from tests.pictures import encoded, image_shard, picture, samples
from tests.pipelines.encoding import config, encode_here

pytestmark = pytest.mark.ray


def full(place: Path) -> VerifyReport:
    return verify(VerifyConfig(latents=str(place), level="full"))


@pytest.fixture(scope="module")
def original(ray_session: None, vae: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sizes, mirrored copies, what is filtered and quarantined, and a second try of the latter."""
    folder, place = tmp_path_factory.mktemp("images"), tmp_path_factory.mktemp("latents")
    for number in range(3):
        content = samples(10, start=10 * number)
        content[2].members["png"] = encoded(picture(2, 9, 9))
        content[4] = RawSample(content[4].key, {"png": b"no picture"})
        image_shard(folder / f"train-{number}.tar", content)
    options = {"image_size": (16, 32), "flip": True, "min_size": 10}
    encode(config(str(folder), place, vae, **options, max_quarantined=0.5))
    encode(config(str(folder), place, vae, **options, max_quarantined=0.5, retry="quarantined"))
    return place


@pytest.fixture
def place(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "latents")
    return tmp_path / "latents"


def test_what_encode_wrote_is_whole(original: Path) -> None:
    report = full(original)
    assert (report.ok, report.problems, report.exit_code) == (True, [], 0)
    assert (report.checked, report.orphans, report.newer_receipts) == (3 * 8 * 4, 0, 0)
    assert sorted(path.stem for path in (original / "receipts").iterdir()) == sorted(
        f"train-{number}{end}" for number in range(3) for end in ("", "~1")
    )


def test_one_flipped_bit_in_any_file_is_found(place: Path) -> None:
    """In every file but the autoencoder's config, whose hash is of its values."""
    draw = random.Random(0)
    newest = read_manifest(str(place)).generation
    older = [path for path in (place / "generations").iterdir() if not path.name.startswith(newest)]
    files = [path for path in sorted(place.rglob("*")) if path.is_file() and path not in older]
    kinds = {path.parent.name + path.suffix: path for path in files if path.parent.name != "autoencoder"}
    chosen = [*kinds.values(), place / "autoencoder" / "diffusion_pytorch_model.safetensors"]
    assert len(chosen) >= 8
    for path in chosen:
        data = path.read_bytes()
        solid = [at for at in range(len(data)) if not data[at : at + 1].isspace()]  # in JSON white space says nothing
        flip_a_bit(path, draw.choice(solid[len(solid) // 2 :]))
        report = full(place)
        assert not report.ok and report.exit_code == 1, path
        named = {place / "manifest.json": "manifest.json", chosen[-1]: "autoencoder"}.get(path, path.name)
        assert any(named in line for line in report.problems), (path, report.problems)
        path.write_bytes(data)
    assert full(place).ok


def test_a_shard_that_is_encoded_but_in_no_generation(place: Path, vae: str, tmp_path: Path) -> None:
    image_shard(tmp_path / "more" / "train-9.tar", samples(3, start=90))
    encode_here(config(str(tmp_path / "more"), place, vae, image_size=(16, 32), flip=True, min_size=10), "train-9")
    report = full(place)
    assert report.ok and (report.newer_receipts, report.orphans) == (1, 0)


def test_what_a_check_cannot_foresee_is_a_problem_of_its_receipt(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any memory left, say."""

    def fails(url: str, channels: int, receipt: object) -> list[str]:
        raise MemoryError("no memory is left")

    monkeypatch.setattr("pipelines.verify.verify_receipt", fails)
    report = full(place)
    assert len(report.problems) == 6
    assert "receipts/train-0.json: what it names could not be checked (" in report.problems[0]
    assert "no memory is left" in report.problems[0]

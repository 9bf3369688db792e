"""What inspect says of pictures and of latents, against what was put there; damage is a line and never a crash."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm import storage
from ldm.autoencoder import Autoencoder
from ldm.config import RequestError
from ldm.inspection import InspectConfig, LatentsReport, PicturesReport, inspect, plan
from ldm.inspection import forecast as forecast_module
from ldm.inspection.probe import format_of
from ldm.inspection.table import to_text
from ldm.latents.manifest import read_manifest
from ldm.shards import RawSample
from tests.ldm.damage import flip_a_bit, whole_dataset
from tests.pictures import encoded, image_shard, picture, samples


def pictures(target: object, **options: object) -> PicturesReport:
    report = inspect(InspectConfig(target=str(target), **options))  # type: ignore[arg-type]
    assert isinstance(report, PicturesReport)
    json.dumps(report.__dict__, default=lambda value: value.__dict__)
    to_text(report)
    return report


def latents(target: object, **options: object) -> LatentsReport:
    report = inspect(InspectConfig(target=str(target), **options))  # type: ignore[arg-type]
    assert isinstance(report, LatentsReport)
    return report


@pytest.fixture
def place(tmp_path) -> Path:
    """Two shards: 12 samples, six kinds of pictures and of trouble among them, and 5 more."""
    content = samples(12)
    content[1].members["png"] = encoded(picture(1, 40, 30), "JPEG")  # named .png
    content[2].members = {"webp": encoded(picture(2, 10, 50), "WEBP"), "txt": b"a"}
    content[3].members["png"] = b"no picture"
    content[4].members["png"] = content[4].members["png"][:60]
    content[5].members["cls"] = b"seven"
    del content[6].members["png"]
    content[7] = RawSample("00000", content[7].members)
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    content[8].members["png"] = encoded(picture(8, 60, 20), "JPEG", exif=exif)
    image_shard(tmp_path / "in-0.tar", content)
    image_shard(tmp_path / "in-1.tar", samples(5, start=20))
    return tmp_path


def test_all_of_a_few_pictures(place):
    report = pictures(place / "in-*.tar", preview=str(place / "grid.png"))
    assert (report.shards, report.samples, report.exact, report.encodable) == (2, 17, True, 12)
    assert report.bytes == sum((place / f"in-{n}.tar").stat().st_size for n in range(2))
    assert report.formats == {"PNG": 9, "JPEG": 2, "WEBP": 1}
    assert (report.width, report.height) == ([10, 20, 40], [16, 16, 60])  # upright
    broken = report.broken
    assert sum(broken.values()) == 5 and report.broken_share == round(5 / 17, 6)
    for reason in ("is no picture that Pillow knows", "holds no picture", "its key stands twice in the shard"):
        assert broken[reason] == 1
    assert any("seven" in reason for reason in broken)
    assert report.problems == []
    with Image.open(place / "grid.png") as grid:
        assert grid.size == (8 * 130 - 2, 128)
    text = to_text(report)
    assert "17, of which 12 can be encoded" in text and "give autoencoder= to have it measured" in text


def test_shares_of_labels_and_captions(place):
    content = samples(10)
    for sample in content[:4]:
        del sample.members["cls"]
    del content[0].members["txt"]
    image_shard(place / "in-2.tar", content)
    report = pictures(place / "in-2.tar")
    assert (report.labelled, report.captioned, report.broken) == (0.6, 0.9, {})
    assert pictures(place / "in-2.tar", label="json.class").labelled == 0


def test_a_folder_of_pictures(tmp_path):
    for number in range(5):
        file = tmp_path / "set" / ("cat" if number < 3 else "dog") / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(picture(number)))
    report = pictures(tmp_path / "set")
    assert (report.samples, report.exact, report.labelled, report.class_names) == (5, True, 1.0, ["cat", "dog"])


def test_one_percent_is_spread_over_the_shards_and_read_from_their_heads(tmp_path):
    """6 shards of 100 alike; the last sample of each is broken and must not be met by a probe of 30."""
    for number in range(6):
        content = samples(100, start=100 * number)
        content[-1].members["png"] = b"no picture"
        image_shard(tmp_path / f"in-{number}.tar", content)
    report = pictures(tmp_path / "in-*.tar", probe=30)
    assert (report.probed, report.probed_shards, report.broken, report.exact) == (30, 6, {}, False)
    assert report.samples == pytest.approx(600, rel=0.05)
    assert pictures(tmp_path / "in-*.tar").probed >= 200
    everything = pictures(tmp_path / "in-*.tar", probe=320)
    assert (everything.probed, everything.exact, everything.broken_share) == (600, True, 0.01)


@pytest.mark.parametrize("change", ["cut", "flipped", "no tar", "zeros"])
def test_a_damaged_tar_is_a_line(place, change):
    path = place / "in-0.tar"
    data = path.read_bytes()
    header = data.index(b"00009.png")
    damaged = {
        "cut": data[: len(data) // 2 - 100],
        "flipped": data[:header] + b"\xff" + data[header + 1 :],
        "no tar": b"no tar" * 1000,
        "zeros": bytes(len(data)),
    }[change]
    path.write_bytes(damaged)
    report = pictures(place / "in-*.tar")
    assert report.probed >= 5 and not (report.exact and report.problems)
    if change == "zeros":  # a tar without a member
        assert (report.samples, report.problems) == (5, [])
    else:
        assert len(report.problems) == 1 and report.problems[0].startswith(f"{path}: after ")


def test_no_flipped_bit_of_a_tar_is_a_crash(tmp_path):
    path = Path(image_shard(tmp_path / "in-0.tar", samples(2)))
    data = path.read_bytes()
    from ldm.decoding import DecoderPool
    from ldm.images import PictureRules
    from ldm.inspection.probe import Prober
    from ldm.sources import find_shards

    with DecoderPool(1, PictureRules((128,)), 20) as decoders:
        for at in [*range(0, 512, 3), *range(512 * 2, 512 * 2 + 512, 7)]:
            for bit in (0, 7):
                changed = bytearray(data)
                changed[at] ^= 1 << bit
                path.write_bytes(changed)
                prober = Prober("cls", "txt", 4, 0)
                (shard,) = find_shards(str(path))[0].values()
                prober._look_into(shard, None, decoders, 4)
                while prober._waiting:
                    prober._finish_one()
                assert prober.found.samples <= 6


def bomb() -> bytes:
    """A PNG whose header claims 60,000 x 60,000 pixels."""
    data = bytearray(encoded(picture(0)))
    data[16:24] = struct.pack(">II", 60000, 60000)
    return bytes(data)


def test_hostile_pictures_cost_themselves_alone(tmp_path):
    content = samples(6)
    content[1].members["png"] = bomb()
    content[2].members["png"] = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    content[3].members["png"] = b"\x00" * 100_000
    image_shard(tmp_path / "in.tar", content)
    report = pictures(tmp_path / "in.tar")
    assert sum(report.broken.values()) == 3 and report.formats == {"PNG": 3}


def test_formats_are_known_by_the_header():
    assert format_of(encoded(picture(0), "GIF")) == "GIF"
    assert format_of(b"nothing") == format_of(b"") == "unknown"


def test_what_an_encode_would_take(place, kl_folder, monkeypatch):
    monkeypatch.setattr(forecast_module, "_MEASURE_S", 0.1)
    options = {"autoencoder": str(kl_folder), "image_size": 16, "batch_size": 4, "device": "cpu"}
    report = pictures(place / "in-*.tar", **options)
    made = report.forecast
    assert made is not None and made.images_per_second > 0 and made.price is None
    # 12 records of 2 x 4 channels in fp16 on 8 x 8 cells, with their headers and rows.
    assert made.output_bytes == 12 * (2 * 8 * 64 + 1124)
    assert f"{made.images_per_second:,.1f} images/s decoded and encoded here (cpu)" in to_text(report)

    monkeypatch.setattr(forecast_module, "measure", lambda *_: 2.0)
    report = pictures(place / "in-*.tar", **options, num_workers=3, price_per_hour=3600.0, store="mean")
    made = report.forecast
    assert made is not None and made.hours == round(12 / 2 / 3 / 3600, 4) and made.price == 2.0
    assert made.output_bytes == 12 * (2 * 4 * 64 + 1124)


def test_the_rate_is_that_of_whole_batches(monkeypatch):
    """The clock stands still but while a batch is encoded, which takes it 3 s."""
    monkeypatch.setattr(forecast_module, "_MEASURE_S", 5.0)
    now, calls = [0.0], []

    class Slow:
        device = __import__("torch").device("cpu")

        def encode(self, pixels):
            calls.append(tuple(pixels.shape))
            now[0] += 3.0
            return pixels

    monkeypatch.setattr(forecast_module.time, "perf_counter", lambda: now[0])
    slow: Autoencoder = Slow()  # type: ignore[assignment]
    assert forecast_module.measure(slow, [encoded(picture(0))], 16, 4) == pytest.approx(4 / 3)
    assert calls == [(1, 3, 16, 16), (4, 3, 16, 16), (4, 3, 16, 16)]


def test_nothing_that_can_be_encoded(tmp_path, kl_folder):
    image_shard(tmp_path / "in.tar", [RawSample("a", {"png": b"no picture"})])
    report = pictures(tmp_path / "in.tar", autoencoder=str(kl_folder), image_size=16, preview=str(tmp_path / "g.png"))
    assert (report.encodable, report.forecast, report.preview, report.width) == (0, None, None, [])
    assert not (tmp_path / "g.png").exists() and "nothing that can be decoded" in to_text(report)


def test_on_an_object_store(place, s3, kl):
    for number in range(2):
        storage.write_bytes(f"{s3}/inspect/in-{number}.tar", (place / f"in-{number}.tar").read_bytes())
    assert pictures(f"{s3}/inspect/in-{{0..1}}.tar", preview=f"{s3}/grid.png").samples == 17
    assert storage.read_bytes(f"{s3}/grid.png").startswith(b"\x89PNG")
    whole_dataset(f"{s3}/inspected", kl)
    assert latents(f"{s3}/inspected").records == 44


def test_a_latent_dataset(kl, tmp_path):
    url = tmp_path / "latents"
    generation = whole_dataset(str(url), kl)
    report = latents(url)
    assert (report.generation, report.records, report.tars) == (generation, 44, 6)
    assert report.shapes == {"8x2x2": 22, "8x4x4": 22}
    assert report.bytes == sum(path.stat().st_size for path in url.glob("latents/*.tar"))
    assert report.classes == {"0": 16, "1": 16, "2": 12} and report.unlabelled == 0
    assert report.accounting == {"inputs": 14, "encoded": 11, "filtered": 2, "quarantined": 1}
    assert list(report.columns)[:4] == ["id", "picture", "key", "label"]
    manifest = read_manifest(str(url))
    assert report.statistics["std"] == [*manifest.statistics.std] and report.fingerprint == manifest.fingerprint
    text = to_text(report)
    for part in ("8x2x2 22", "14 = 11 encoded + 2 filtered + 1 quarantined", "autoencoder.class: AutoencoderKL"):
        assert part in text
    assert latents(url, generation=generation) == report


def test_damaged_columns_are_a_line(kl, tmp_path):
    url = tmp_path / "latents"
    whole_dataset(str(url), kl)
    flip_a_bit(url / "columns" / "one.2x2.parquet")
    (url / "columns" / "two.4x4.parquet").unlink()
    report = latents(url)
    assert report.problems == [
        f"{url}/columns/one.2x2.parquet: does not have the hash that its manifest names; it is damaged",
        f"{url}/columns/two.4x4.parquet: is missing",
    ]
    assert sum(report.classes.values()) == 24


def test_a_preview_of_latents(kl, tmp_path):
    """Their inputs were never there: grey beside what is decoded, and said."""
    url = tmp_path / "latents"
    whole_dataset(str(url), kl)
    report = latents(url, preview=str(tmp_path / "grid.png"), count=4)
    assert report.preview == str(tmp_path / "grid.png") and report.psnr == {}
    with Image.open(tmp_path / "grid.png") as grid:
        assert (np.asarray(grid) == 128).all(-1).any()
    assert report.problems
    (tmp_path / "grid.png").unlink()
    (url / "autoencoder" / "config.json").unlink()
    report = latents(url, preview=str(tmp_path / "grid.png"))
    assert report.preview is None and "holds no config.json" in report.problems[0]
    assert not (tmp_path / "grid.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "PLACE/none.tar"}, "target=PLACE/none.tar: does not exist"),
        ({"target": "PLACE/note.txt.gz"}, "target=PLACE/note.txt.gz: is no .tar"),
        ({"preview": "grid.jpg"}, "preview=grid.jpg: is no .png"),
        ({"preview": "PLACE/in-0.tar/grid.png"}, "preview=PLACE/in-0.tar: PLACE/in-0.tar is a file; give a directory"),
        ({"generation": "abc"}, "generation=abc: is of a latent dataset, which PLACE/in-0.tar is not"),
        ({"price_per_hour": 2.0}, "price_per_hour=2: needs hours; give autoencoder= to measure them"),
        ({"autoencoder": "PLACE"}, "autoencoder=PLACE: holds no config.json"),
        (
            {"autoencoder": "KL", "image_size": 15},
            "image_size=15: the autoencoder's factor 2 does not divide it; give 16",
        ),
        ({"target": "PLACE/web"}, "target=PLACE/web: manifest.json is not of a latent dataset"),
    ],
)
def test_a_mistake_is_said_before_any_work(place, kl_folder, options, message):
    (place / "note.txt.gz").write_text("x")
    (place / "web").mkdir()
    (place / "web" / "manifest.json").write_text('{"name": "a web app"}')
    values = {"target": "PLACE/in-0.tar", "device": "cpu", **options}
    values = {
        key: value.replace("PLACE", str(place)).replace("KL", str(kl_folder)) if isinstance(value, str) else value
        for key, value in values.items()
    }
    with pytest.raises(RequestError) as caught:
        plan(InspectConfig(**values))
    assert str(caught.value).startswith(message.replace("PLACE", str(place))), caught.value


def test_latents_take_no_autoencoder(kl, tmp_path):
    whole_dataset(str(tmp_path), kl)
    with pytest.raises(RequestError, match="^autoencoder=x/y: is for pictures"):
        plan(InspectConfig(target=str(tmp_path), autoencoder="x/y"))


@pytest.mark.real_data
def test_a_fuzzing_corpus_and_photos(shared, tmp_path):
    report = pictures(f"{shared}/data/hostile/fuzz-00000.tar", probe=2000)
    assert report.probed == report.samples == 1708 and report.exact
    assert sum(report.formats.values()) + sum(report.broken.values()) == 1708 and report.broken_share > 0.5
    report = pictures(f"{shared}/data/grocery/train-*.tar", preview=str(tmp_path / "grid.png"))
    assert report.samples == pytest.approx(2640, rel=0.1) and report.formats == {"JPEG": report.probed}

"""Studies that train: arms, done once; what the table says is what was trained; laws are of the points they name."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm.config import RequestError, parse
from ldm.drawing import resolve_device
from ldm.latents.choice import hashed_between, is_held_out
from ldm.latents.dataset import LatentDataset
from ldm.latents.manifest import read_manifest
from ldm.snapshot import read_snapshot
from ldm.storage import write_json
from pipelines.study import latent_vs_pixel, scaling
from pipelines.study.latent_vs_pixel import LatentVsPixelConfig
from pipelines.study.laws import _quality, fits_of, plots_of, points_of
from pipelines.study.outcome import StudyReport
from pipelines.study.scaling import ScalingConfig
from pipelines.train.record import validations
from tests.pictures import image_shard, samples, tiny_model

SMALL: dict[str, Any] = {
    "features": "vae",
    "num_images": 6,
    "batch_size": 6,
    "num_inference_steps": 2,
    "holdout": 0.25,
    "global_batch_size": 8,
    "device": "cpu",
    "tracking": {"enabled": False},
}
TINY = {"type": "dit", "hidden_size": 16, "depth": 1, "num_heads": 2, "patch_size": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 pictures in two shards, and an autoencoder of factor 4."""
    place = tmp_path_factory.mktemp("studies")
    for number in range(2):
        image_shard(place / f"train-{number}.tar", samples(24, start=24 * number))
    tiny_model().save_pretrained(place / "vae")
    return place


def comparing(place: Path, **changes: Any) -> LatentVsPixelConfig:
    where = {"source": f"{place}/train-*.tar", "autoencoder": str(place / "vae"), "output": str(place / "compared")}
    asked = {**SMALL, **where, "image_size": 16, "train_seconds": 0.2, "denoiser": TINY}
    return parse(LatentVsPixelConfig, [("test", asked), ("changes", changes)])


@pytest.fixture(scope="module")
def compared(ray_session: None, place: Path) -> StudyReport:
    return latent_vs_pixel.run(comparing(place))


@pytest.mark.ray
@pytest.mark.faults  # as long as these rounds: four trainings are started
class TestLatentVsPixel:
    def test_the_arms_differ_in_the_space_alone(self, place: Path, compared: StudyReport) -> None:
        latent, pixel = compared.rows
        assert (latent["latent_shape"], pixel["latent_shape"]) == ("4x4x4", "3x16x16")
        assert latent["features"] == pixel["features"] and latent["floor"] == pixel["floor"]
        assert latent["activation_mb_per_image"] < pixel["activation_mb_per_image"] / 4  # 4 tokens against 64
        runs = [
            json.loads((place / "compared" / "runs" / row["name"] / "run.json").read_text()) for row in compared.rows
        ]
        one, other = (run["trajectory"] for run in runs)
        assert one == other
        for row in compared.rows:
            (snapshot,) = sorted((place / "compared" / "runs" / row["name"] / "snapshots").iterdir())
            found = read_snapshot(str(snapshot))
            assert (found.step, found.images_seen) == (row["steps"], row["images_seen"])
            assert row["train_seconds"] == pytest.approx(row["images_seen"] / row["train_images_per_second"])
        assert not (place / "compared" / "speed" / "latent-16").exists()

    def test_the_ratios_are_those_of_the_rows_beside_the_published_ones(
        self, place: Path, compared: StudyReport
    ) -> None:
        latent, pixel = compared.rows
        (ratios,) = compared.summary["ratios"]
        assert ratios["sampling"] == pixel["seconds_per_picture"] / latent["seconds_per_picture"]
        assert ratios["training"] == latent["train_images_per_second"] / pixel["train_images_per_second"]
        assert ratios["activations"] > 4
        assert any("916 / 271" in str(value) for value in compared.summary.values())
        for name in ("training", "sampling", "memory", "quality", "ratios", "grid"):
            assert Image.open(place / "compared" / f"{name}.png").size > (50, 20)

    def test_what_is_done_is_not_done_again(self, place: Path, compared: StudyReport) -> None:
        again = latent_vs_pixel.run(comparing(place))
        assert (again.arms, again.skipped, again.rows) == (2, 2, compared.rows)
        planned = latent_vs_pixel.dry_run(comparing(place, image_size="16,32"))
        assert planned.done == ["latent-16", "pixel-16"] and planned.arms[2:] == ["latent-32", "pixel-32"]
        with pytest.raises(RequestError, match=r"^output=.*another request \(train_seconds: 0.2 != 1.0\)"):
            latent_vs_pixel.plan(comparing(place, train_seconds=1))

    def test_an_arm_of_other_features_is_measured_again_and_not_trained(
        self, place: Path, compared: StudyReport, tmp_path: Path
    ) -> None:
        """As where another node goes on, whose classifier is another one; here also in another place."""
        output = tmp_path / "moved"
        shutil.copytree(place / "compared", output)
        latent, pixel = compared.rows
        arm = output / "arms" / "latent-16.json"
        write_json(str(arm), json.loads(arm.read_text()) | {"features": "fd-classifier-of-another-node"})
        (output / "arms" / "pixel-16.json").unlink()
        trained = {file: file.stat().st_mtime_ns for file in output.glob("runs/*/snapshots/*/snapshot.json")}
        report = latent_vs_pixel.run(comparing(place, output=str(output)))
        assert report.skipped == 0 and len(trained) == 2
        assert trained == {file: file.stat().st_mtime_ns for file in output.glob("runs/*/snapshots/*/snapshot.json")}
        for key in ("features", "fd", "steps", "train_images_per_second", "peak_memory_gb"):
            assert [row[key] for row in report.rows] == [latent[key], pixel[key]]

    def test_an_arm_that_was_interrupted_in_the_timed_half_begins_anew(
        self, place: Path, compared: StudyReport, tmp_path: Path
    ) -> None:
        output, steps = tmp_path / "interrupted", compared.rows[0]["steps"]
        shutil.copytree(place / "compared", output)
        (output / "arms" / "latent-16.json").unlink()
        speed = output / "speed" / "latent-16.json"
        write_json(str(speed), json.loads(speed.read_text()) | {"found": steps})  # of 2 x steps, it has one half
        row, _ = latent_vs_pixel.run(comparing(place, output=str(output))).rows
        assert row["steps"] == 2 * steps
        assert len(list(output.glob("runs/latent-16/snapshots/*"))) == 1  # none of the first half


def test_what_is_wrong_is_told_before_any_work(place: Path, tmp_path: Path) -> None:
    image_shard(tmp_path / "bare.tar", [_without_label(sample) for sample in samples(3)])
    for changes, line in [
        ({"image_size": "16,30"}, "image_size=30: the autoencoder's factor 4 does not divide it; give 32"),
        ({"autoencoder": "identity"}, "autoencoder=identity: has a factor of 1"),
        (
            {"source": f"{tmp_path}/bare.tar", "features": "classifier"},
            "features=classifier: source=.* without a label",
        ),
        ({"source": "nothing.tar"}, "source=nothing.tar: does not exist"),
        ({"features": "inception"}, "features=inception: is none; give classifier, vae, or a file"),
        ({"features": f"{tmp_path}/no.pt"}, "features=.*no.pt: is not there"),
        ({"num_inference_steps": 2000}, "num_inference_steps=2000: must be 1 to 1000"),
        ({"denoiser": {"patch_size": 3}}, "denoiser.patch_size=3: "),
    ]:
        with pytest.raises(RequestError, match=f"^{line}"):
            latent_vs_pixel.plan(comparing(place, **{"output": str(tmp_path / "out"), **changes}))
    assert not (tmp_path / "out").exists()


def test_scaling_tells_of_a_reference_without_labels_before_any_work(latents: str, tmp_path: Path) -> None:
    bare = image_shard(tmp_path / "bare.tar", [_without_label(sample) for sample in samples(3)])
    with pytest.raises(RequestError, match="^features=classifier: reference=.* has pictures without a label"):
        scaling.plan(growing(latents, tmp_path / "out", reference=bare, features="classifier"))
    assert not (tmp_path / "out").exists()


def test_arms_of_one_size_are_measured_alike_and_timed_on_one_device(place: Path, tmp_path: Path) -> None:
    asked = comparing(place, output=str(tmp_path), image_size="16,32", device="auto")
    planned = latent_vs_pixel.plan(asked)
    assert planned.arms.request["device"] == planned.config.device == resolve_device("auto")
    for name, features in [("latent-16", "a"), ("pixel-16", "b"), ("latent-32", "c"), ("pixel-32", "c")]:
        planned.arms.finish(name, {"features": features})
    assert planned.done == ["latent-16", "latent-32", "pixel-32"]


def test_the_pixels_patch_is_theirs_alone(place: Path, tmp_path: Path) -> None:
    asked = comparing(place, pixel_patch_size=8, output=str(tmp_path))
    found = {arm.space: latent_vs_pixel.denoiser_of(asked, arm) for arm in latent_vs_pixel.plan(asked).todo}
    assert (found["latent"].patch_size, found["pixel"].patch_size) == (2, 8)
    assert found["latent"].model_copy(update={"patch_size": 8}) == found["pixel"]
    default = parse(LatentVsPixelConfig, [("test", {"source": "s", "autoencoder": "a"})]).denoiser
    assert (default.type, default.unet.model_channels) == ("unet", 32)


def _without_label(sample: Any) -> Any:
    del sample.members["cls"]
    return sample


def growing(latents: str, output: Path, /, **changes: Any) -> ScalingConfig:
    where = {"latents": latents, "output": str(output), "denoiser": {"patch_size": 1}}
    asked = {**SMALL, **where, "sizes": "16x1", "fractions": "0.5", "max_steps": 8}
    return parse(ScalingConfig, [("test", asked), ("changes", changes)])


@pytest.mark.ray
def test_scaling(ray_session: None, latents: str, tmp_path: Path) -> None:
    asked = growing(latents, tmp_path / "grown")
    planned = scaling.dry_run(growing(latents, tmp_path / "grown", sizes="16x1,24x2", fractions="0.5,1"))
    assert planned.arms == ["16x1-data0.5", "16x1-data1", "24x2-data0.5", "24x2-data1"] and planned.seconds is not None
    report = scaling.run(asked)
    (row,) = report.rows
    manifest = read_manifest(latents)
    held_out = LatentDataset(latents, global_batch_size=1, holdout=0.25, split="holdout").all().ids.numpy()
    assert row["samples"] == len(hashed_between(manifest, 0.625, 1.0))
    left_out = {int(line) for line in (tmp_path / "grown" / "left-out-0.5.txt").read_text().split()}
    assert not left_out & set(held_out.tolist()) and len(left_out) == 45 - len(held_out) - row["samples"] > 0
    losses = validations(str(tmp_path / "grown" / "runs" / row["name"]))
    assert sorted(losses) == list(range(1, 9)) and losses[8].loss == row["loss"]
    assert (row["images_seen"], row["epochs"]) == (64, 64 / row["samples"])
    assert set(report.summary["laws"]) <= {"compute"}  # one arm is no law of models, nor of data
    for name in ("parameters", "compute", "data"):
        assert Image.open(tmp_path / "grown" / f"{name}.png").size > (50, 20)
    again = scaling.run(asked)
    assert (again.skipped, again.rows, again.summary) == (1, report.rows, report.summary)
    # Killed before its row was written: what is trained stays, with its speed.
    (tmp_path / "grown" / "arms" / f"{row['name']}.json").unlink()
    again = scaling.run(asked)
    assert (again.skipped, again.rows, again.summary) == (0, report.rows, report.summary)


@pytest.mark.ray
@pytest.mark.faults
def test_scaling_measures_pictures_where_there_is_a_reference(
    place: Path, compared: StudyReport, tmp_path: Path
) -> None:
    latents = f"{place}/compared/latents/latent-16"
    report = scaling.run(growing(latents, tmp_path / "grown", fractions="1", reference=f"{place}/train-*.tar"))
    (row,) = report.rows
    assert row["fd"] > 0 and row["features"] == compared.rows[0]["features"] and row["seconds_per_picture"] > 0
    for name in ("quality", "grid"):
        assert Image.open(tmp_path / "grown" / f"{name}.png").size > (50, 20)


def test_shares_are_nested(latents: str) -> None:
    manifest = read_manifest(latents)
    everything, small, large = (set(hashed_between(manifest, low, 1.0).tolist()) for low in (0.0, 0.7, 0.4))
    assert small < large < everything and len(everything) == 45
    assert is_held_out(np.array(sorted(everything - large)), 0.4).all()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"sizes": "64x2,wide"}, "sizes=.*wide is no WIDTHxDEPTH; give such as 128x4"),
        ({"sizes": "18x1"}, "hidden_size=18: must be a multiple of 4; the nearest is"),
        ({"fractions": "0.5,2"}, "fractions=.*: must be above 0 and at most 1"),
        ({"max_steps": 9}, "max_steps=9: must be a multiple of 8"),
        ({"denoiser": {"type": "unet"}}, "denoiser.type=unet: sizes are widths and depths of a DiT"),
        ({"latents": "nowhere"}, "latents=nowhere: is no latent dataset"),
    ],
)
def test_a_wrong_grid_is_told(changes: dict[str, Any], line: str, latents: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=f"^{line}"):
        scaling.plan(growing(latents, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def grid(law: Any) -> list[dict[str, Any]]:
    """Rows of three models and four shares whose losses are a law of each, without noise."""
    rows = []
    for parameters in (1e5, 1e6, 1e7, 1e8):
        for fraction in (0.125, 0.25, 0.5, 1.0):
            curve = [
                {"images_seen": n, "flops": 6 * parameters * n, "loss": law(parameters, fraction) + 1 / n}
                for n in (100, 400, 1600)
            ]
            about = {"name": f"{parameters:g}-{fraction:g}", "parameters": parameters, "fraction": fraction}
            rows.append({**about, "samples": 8000 * fraction, "loss": law(parameters, fraction), "curve": curve})
    return rows


def test_each_law_is_of_its_points() -> None:
    rows = grid(lambda parameters, fraction: 5 * parameters**-0.2 + 0.3 * fraction**-0.4)
    x, y = points_of(rows)["parameters"]
    assert x == [1e5, 1e6, 1e7, 1e8] and y[0] == pytest.approx(0.5 + 0.3)
    x, y = points_of(rows)["data"]
    assert x == [1000, 2000, 4000, 8000] and y[-1] == pytest.approx(5 * 1e8**-0.2 + 0.3)
    flops, losses = points_of(rows)["compute"]
    assert sorted(flops) == flops and sorted(losses, reverse=True) == losses
    every = [(p["flops"], p["loss"]) for row in rows for p in row["curve"]]
    for point in zip(flops, losses, strict=True):
        assert not [o for o in every if o[0] <= point[0] and o[1] < point[1]]
    laws = fits_of(rows, seed=0)
    assert laws["parameters"].b == pytest.approx(0.2, abs=0.01) and laws["parameters"].c == pytest.approx(0.3, abs=0.01)
    assert laws["data"].b == pytest.approx(0.4, abs=0.01)
    assert set(plots_of(rows, laws)) == {"parameters.png", "compute.png", "data.png"}


def test_shares_have_names_of_their_own() -> None:
    rows = [
        {"name": f"{share}", "fraction": share, "training_flops": 1e9, "fd": 2.0, "floor": 1.0}
        for share in (0.001, 0.004, 0.07, 0.125, 1.0)
    ]
    names = ["0.1% of the data", "0.4% of the data", "7% of the data", "12.5% of the data", "100% of the data"]
    assert list(_quality(rows)) == [*names, "floor (held-out pictures)"]

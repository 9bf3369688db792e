"""A sweep: what is drawn, what is refused before any work, and what is not done twice."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from mlflow import MlflowClient
from PIL import Image

from ldm import metrics
from ldm.autoencoder import Autoencoder
from ldm.classifier import Classifier
from ldm.config import RequestError, parse
from ldm.digits import load_digit_pictures, write_digit_shards
from ldm.drawing import load_sampler
from ldm.labels import resolve_labels
from ldm.latents.manifest import Conditioning
from ldm.plan import SamplerConfig
from ldm.snapshot import read_snapshot
from ldm.storage import write_json
from pipelines.study import sweep
from pipelines.study.drawing import draw_all
from pipelines.study.sweep import SweepConfig
from tests.commands import kill_when
from tests.ldm.extractors import Means, write_script
from tests.pictures import image_shard, samples
from tests.pipelines.tiny_snapshot import write_tiny_snapshot
from tests.pipelines.training import tracked

SMALL: dict[str, Any] = {
    "features": "vae",
    "num_images": 12,
    "batch_size": 8,
    "max_reference": 120,
    "holdout": 0.2,
    "device": "cpu",
    "tracking": {"enabled": False},
    "steps": "3,5",
    "eta": "0,1",
    "sampler": "ddim,dpmpp_2m",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A snapshot of ten classes, and digits."""
    place = tmp_path_factory.mktemp("sweep")
    write_tiny_snapshot(place / "snapshot")
    write_digit_shards(place / "digits", shards=8)
    return place


def config(place: Path, output: Path, **changes: Any) -> SweepConfig:
    where = {"snapshot": str(place / "snapshot"), "reference": f"{place}/digits/*.tar", "output": str(output)}
    return parse(SweepConfig, [("test", {**SMALL, **where, **changes})])


class TestCombinations:
    def asked(self, place: Path, **changes: Any) -> tuple[list[str], list[str]]:
        found, left_out = sweep.combinations(
            config(place, place / "nothing", **changes), read_snapshot(str(place / "snapshot"))
        )
        return list(found), left_out

    def test_every_one_once_and_what_cannot_be_is_told(self, place: Path) -> None:
        names, left_out = self.asked(place)
        assert names == [f"{how}-g1-s{steps}" for how in ("ddim-eta0", "ddim-eta1", "dpmpp_2m") for steps in (3, 5)]
        assert left_out == [
            f"left out: sampler=dpmpp_2m eta=1.0 guidance_scale=1.0 steps={steps}: "
            "eta=1.0: sampler=dpmpp_2m is deterministic; leave it out"
            for steps in (3, 5)
        ]

    def test_what_would_draw_the_same_pictures_is_drawn_once(self, place: Path) -> None:
        """A single step into the clean picture has no noise, and DPM-Solver++ begins and ends with steps of DDIM."""
        names, left_out = self.asked(place, steps="1,3", sampler="ddim,dpmpp_2m", eta="0,1")
        assert names == ["ddim-eta0-g1-s1", "ddim-eta0-g1-s3", "ddim-eta1-g1-s3", "dpmpp_2m-g1-s3"]
        assert [line for line in left_out if "draws what" in line] == [
            f"left out: sampler={how} guidance_scale=1.0 steps=1: draws what ddim-eta0-g1-s1 draws"
            for how in ("ddim eta=1.0", "dpmpp_2m eta=0.0")
        ]

    def test_ddpm_is_named_by_the_eta_that_it_has(self, place: Path) -> None:
        names, _ = self.asked(place, steps="3", sampler="ddpm", eta="0,sigma_hat")
        assert names == ["ddpm-eta1-g1-s3", "ddpm-sigma_hat-g1-s3"]

    def test_the_axes_of_table_1(self, place: Path) -> None:
        names, left_out = self.asked(
            place, steps="10,20,50,100,1000", eta="0,0.2,0.5,1,sigma_hat", sampler="ddim", spacing="quadratic"
        )
        assert len(names) == 25 and not left_out and "ddim-sigma_hat-g1-s1000" in names

    def test_values_that_nothing_can_have_are_refused_all_at_once(self, place: Path) -> None:
        with pytest.raises(RequestError) as caught:
            self.asked(place, steps="3,2000,4000", sampler="ddim,euler")
        assert str(caught.value) == (
            "sampler=euler: is for a flow; this model is a diffusion: use ddim, ddpm or dpmpp_2m; "
            "steps=2000: must be 1 to 1000, the num_train_timesteps here; "
            "steps=4000: must be 1 to 1000, the num_train_timesteps here"
        )

    def test_a_flow_has_its_own_sampler(self, place: Path, tmp_path: Path) -> None:
        about = json.loads((place / "snapshot" / "snapshot.json").read_text())
        about["diffusion"] |= {"schedule": "flow", "prediction_type": "velocity"}
        write_json(str(tmp_path / "snapshot.json"), about)
        asked = config(place, tmp_path, sampler=None, eta="0", steps="2")
        assert list(sweep.combinations(asked, read_snapshot(str(tmp_path)))[0]) == ["euler-g1-s2"]


def test_what_is_wrong_is_told_before_any_work(place: Path, tmp_path: Path) -> None:
    write_tiny_snapshot(tmp_path / "blank", Conditioning())
    blank = str(tmp_path / "blank")
    bare = samples(3)
    for sample in bare:
        del sample.members["cls"]
    image_shard(tmp_path / "bare.tar", bare)
    (tmp_path / "text.tar").write_text("no tar" * 200)
    own = write_tiny_snapshot(tmp_path / "own")
    about = json.loads((tmp_path / "own" / "snapshot.json").read_text())
    write_json(f"{own}/snapshot.json", about | {"denoiser": about["denoiser"] | {"type": "custom"}})
    for changes, line in [
        ({"snapshot": blank, "features": "classifier"}, "features=classifier: the model is unconditional"),
        ({"features": "no.pt"}, r"features=\S*no\.pt: is not there"),
        ({"features": "inception"}, r"features=\S*inception: is none"),
        ({"snapshot": blank, "guidance_scale": "3"}, "guidance_scale=3.0: the model is unconditional; must be 1"),
        ({"reference": f"{place}/nothing.tar"}, "reference=.*nothing.tar: does not exist"),
        ({"reference": f"{tmp_path}/text.tar"}, "reference=.*text.tar: is no whole tar"),
        (
            {"reference": f"{tmp_path}/bare.tar", "features": "classifier"},
            "features=classifier: reference=.*bare.tar has pictures without a label; give features=vae",
        ),
        ({"snapshot": own}, "denoiser_type=null: .*own was trained with a class of its own; give"),
        ({"snapshot": own, "denoiser_type": "absent:Class"}, "denoiser_type=absent:Class: cannot import absent"),
        ({"snapshot": own, "denoiser_type": "absent"}, "denoiser_type=absent: is no denoiser"),
        ({"steps": "ten"}, "steps=ten: input should be a valid integer"),
        ({"steps": []}, r"steps=\[\]: "),
    ]:
        with pytest.raises(RequestError, match=f"^{line}"):
            sweep.plan(config(place, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_told_before_any_work(place: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="^device=cuda: the cluster has no GPU"):
        sweep.plan(config(place, tmp_path / "out", device="cuda"))


def test_a_request_can_be_mended_until_there_is_an_arm(place: Path, tmp_path: Path) -> None:
    first = sweep.plan(config(place, tmp_path, features="classifier")).arms
    first.claim("run-7")
    mended = sweep.plan(config(place, tmp_path, features="vae")).arms
    assert mended.run_id == "run-7"
    mended.claim("run-7")
    mended.finish("ddim-eta0-g1-s3", {})
    with pytest.raises(RequestError, match=r"another request \(features: vae != classifier\)"):
        sweep.plan(config(place, tmp_path, features="classifier"))


def test_seconds_compare_on_one_device_and_number_of_threads(place: Path, tmp_path: Path) -> None:
    todo = sweep.plan(config(place, tmp_path, sampler="ddim"))
    timed = [("cpu", 2, 1.0, 5.0), ("cpu", 2, 2.0, 6.0), ("H100", 8, 0.1, 4.0), ("H100", 8, 0.2, 3.0)]
    for (name, settings), (device, threads, seconds, fd) in zip(todo.cells.items(), timed, strict=True):
        measured = {"seconds_per_picture": seconds, "fd": fd, "fd_low": fd, "fd_high": fd, "floor": 1.0}
        where = {"device": device, "threads": threads, "features": "fd-vae"}
        todo.arms.finish(name, {**sweep._settings(settings), **measured, **where})
    rows = sweep._rows(todo)
    assert [row["name"] for row in rows if not row["pareto"]] == ["ddim-eta0-g1-s5"]  # the slower and worse of the CPU
    fronts = {key: value for key, value in sweep._summary(rows).items() if key.startswith("front")}
    assert fronts == {
        "front (H100, 8 threads)": "ddim-eta1-g1-s3, ddim-eta1-g1-s5",
        "front (cpu, 2 threads)": "ddim-eta0-g1-s3",
    }
    assert set(sweep._plots(rows)) == {"steps.png", "seconds.png", "seconds-2.png"}


@pytest.mark.ray
def test_workers_have_ones_own_network_and_tell_what_is_wrong(ray_session: None, place: Path, tmp_path: Path) -> None:
    own = str(write_script(Means(), tmp_path / "means.pt"))
    asked = config(place, tmp_path / "out", features=own, num_images=4, steps="1", eta="0", sampler="ddim")
    (row,) = sweep.run(asked).rows
    assert row["features"].startswith("fd-means-") and row["fd"] > 0
    with pytest.raises(RequestError, match=r"^snapshot=nowhere: is no snapshot"):
        list(draw_all({"one": SamplerConfig(num_inference_steps=1)}, "nowhere", asked, None))


@pytest.mark.ray
def test_a_sweep_and_the_same_command_again(
    ray_session: None, place: Path, tmp_path: Path, mlflow_folder: Path
) -> None:
    output, uri = tmp_path / "out", f"sqlite:///{mlflow_folder}/mlflow.db"
    tracking = tracked(uri)
    first = sweep.run(config(place, output, steps="3", eta="0", sampler="ddim", tracking=tracking))
    assert (first.arms, first.skipped) == (1, 0)
    wider = config(place, output, tracking=tracking)
    planned = sweep.dry_run(wider)
    assert planned.done == ["ddim-eta0-g1-s3"] and len(planned.arms) == 6 and planned.seconds is not None
    untouched = (output / "arms" / "ddim-eta0-g1-s3.json").stat().st_mtime_ns
    report = sweep.run(wider)
    assert (report.arms, report.skipped, report.run_id) == (6, 1, first.run_id)
    assert (output / "arms" / "ddim-eta0-g1-s3.json").stat().st_mtime_ns == untouched

    _assert_the_figure_is_that_of_the_pictures(place, report.rows)
    table = json.loads((output / "table.json").read_text())
    assert table["rows"] == report.rows and table["request"]["num_images"] == 12
    with open(output / "table.csv", newline="") as file:
        assert [row["name"] for row in csv.DictReader(file)] == sorted(planned.arms)
    assert (output / "table.md").read_text().count("\n") == 2 + 6
    rows = report.rows
    assert any(row["pareto"] for row in rows)
    for row in rows:
        beaten = any(o["fd"] < row["fd"] and o["seconds_per_picture"] < row["seconds_per_picture"] for o in rows)
        assert row["pareto"] == (not beaten)
    for name in ("steps.png", "seconds.png", "grid.png"):
        assert Image.open(output / name).size > (100, 100)
    artifacts = {file.path for file in MlflowClient(uri).list_artifacts(report.run_id)}
    assert artifacts >= {"table.json", "steps.png", "seconds.png", "grid.png"}

    again = sweep.run(wider)
    assert (again.skipped, again.rows, again.run_id) == (6, rows, first.run_id)
    # The table keeps what is there.
    narrower = sweep.run(config(place, output, steps="3", eta="1", sampler="ddim", tracking=tracking))
    assert (narrower.arms, narrower.skipped, narrower.rows) == (1, 1, rows)
    with pytest.raises(RequestError, match=r"^output=.*: holds arms of another request \(num_images: 12 != 13\)"):
        sweep.plan(config(place, output, num_images=13))
    (output / "arms" / "ddim-eta0-g1-s3.json").write_bytes(b'{"half')
    assert "ddim-eta0-g1-s3" not in sweep.dry_run(wider).done


@pytest.mark.ray
@pytest.mark.faults
def test_a_killed_sweep_goes_on_to_the_same_figures(
    ray_session: None, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = {"steps": "2,3,4,5", "eta": "0", "sampler": "ddim", "num_images": 64}
    whole = sweep.run(config(place, tmp_path / "whole", **many))
    killed = config(place, tmp_path / "killed", **many)
    (tmp_path / "killed.json").write_text(killed.model_dump_json())
    arms = tmp_path / "killed" / "arms"
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    kill_when(["study", "sweep", "--config", "killed.json"], lambda: len(list(arms.glob("*.json"))) > 0, tmp_path)
    kept = {file: file.stat().st_mtime_ns for file in arms.glob("*.json")}
    assert 1 <= len(kept) < 4
    report = sweep.run(killed)
    assert report.skipped == len(kept) and {file: file.stat().st_mtime_ns for file in kept} == kept
    drawn = [[(row["name"], row["fd"], row["fd_low"]) for row in one.rows] for one in (whole, report)]
    assert drawn[0] == drawn[1]


def _assert_the_figure_is_that_of_the_pictures(place: Path, rows: list[dict[str, Any]]) -> None:
    """Drawn and measured here, by hand."""
    snapshot = read_snapshot(str(place / "snapshot"))
    row = next(row for row in rows if row["name"] == "ddim-eta1-g1-s3")
    sampler = load_sampler(snapshot.url, 8, "cpu")
    labels = resolve_labels(None, snapshot.conditioning, 12)
    pixels = sampler.draw(labels, torch.arange(12), SamplerConfig(num_inference_steps=3, eta=1))
    todo = sweep.plan(config(place, place / "nothing"))
    quality = sweep.make_quality(config(place, place / "nothing"), todo.shards, snapshot, snapshot.load_autoencoder)
    assert row["features"] == quality.name and row["floor"] == pytest.approx(quality.floor)
    assert row["fd"] == pytest.approx(quality.figures(pixels, labels)["fd"], rel=1e-3)
    assert 0 < quality.floor < row["fd"]


def test_figures_are_taken_on_the_device_that_is_asked_for(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot, devices = read_snapshot(str(place / "snapshot")), list[str]()

    def load(device: str) -> Autoencoder:
        devices.append(device)
        return snapshot.load_autoencoder("cpu")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for device in ("cpu", "auto"):
        asked = config(place, place / "nothing", device=device)
        sweep.make_quality(asked, sweep.plan(asked).shards, snapshot, load)
    assert devices == ["cpu", "cuda"]


def test_a_network_of_ones_own_gives_the_features(place: Path, tmp_path: Path) -> None:
    asked = config(place, place / "nothing", features=str(write_script(Means(), tmp_path / "means.pt")))
    snapshot = read_snapshot(asked.snapshot)
    quality = sweep.make_quality(asked, sweep.plan(asked).shards, snapshot, snapshot.load_autoencoder)
    assert quality.name.startswith("fd-means-")
    pixels = load_digit_pictures()[0][:50]
    own = metrics.frechet_contributions(Means()(pixels)[0], quality.train).mean().detach()
    assert quality.figures(pixels, None)["fd"] == pytest.approx(float(own))


def test_the_classifier_counts_what_it_reads_right(place: Path) -> None:
    pixels, labels = load_digit_pictures()
    asked = config(place, place / "nothing", features="classifier", max_reference=700)
    snapshot = read_snapshot(asked.snapshot)
    quality = sweep.make_quality(asked, sweep.plan(asked).shards, snapshot, snapshot.load_autoencoder)
    assert isinstance(quality.features, Classifier)
    good, bad = quality.figures(pixels[:300], labels[:300]), quality.figures(pixels[:300], (labels[:300] + 1) % 10)
    assert good["accuracy_low"] <= good["accuracy"] <= good["accuracy_high"] and good["accuracy"] > 0.9
    assert bad["accuracy"] < 0.05 and bad["fd"] == good["fd"]
    noisy = torch.from_numpy(np.random.default_rng(0).integers(0, 256, pixels[:300].shape, dtype=np.uint8))
    assert quality.figures(noisy, labels[:300])["fd"] > 5 * good["fd"]
    assert good["fd_low"] < good["fd"] < good["fd_high"]
    distance = metrics.frechet_contributions(quality.features.features(pixels[:300]), quality.train).mean()
    assert float(distance) == pytest.approx(good["fd"])

"""The evaluation: figures move the way that they must, add up, and repeat; bad input is refused in one line."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ldm import images
from ldm.config import RequestError
from ldm.snapshot import read_snapshot
from pipelines import serve
from pipelines.evaluate import EvaluateConfig, EvaluateReport, evaluate
from pipelines.tracking import Tracker, TrackingConfig
from tests.ldm.extractors import Means, write_script
from tests.pictures import write_pictures
from tests.pipelines.tiny_snapshot import NAMES as DIGIT_NAMES
from tests.pipelines.tiny_snapshot import write_tiny_snapshot

HOLDOUT = 0.2
QUICK: dict[str, Any] = {"sampler": "dpmpp_2m", "num_inference_steps": 2, "guidance_scale": 1.5, "holdout": HOLDOUT}


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_snapshot(tmp_path_factory.mktemp("evaluate") / "snapshot")


@pytest.fixture(scope="class")
def endpoint(ray_session: None, snapshot: str) -> Iterator[str]:
    with serve.deployment(serve.ServeConfig(snapshot=snapshot, port=0, batch_size=16)) as url:
        yield url


class TestEvaluate:
    @pytest.fixture(scope="class")
    def config(self, digits: Path, snapshot: str, tmp_path_factory: pytest.TempPathFactory) -> EvaluateConfig:
        folder = tmp_path_factory.mktemp("evaluation")
        tracking = TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db", experiment="test")
        return EvaluateConfig(
            snapshot=snapshot,
            reference=f"{digits}/*.tar",
            output=str(folder / "evaluation"),
            num_images=101,
            max_reference=700,
            tracking=tracking,
            **QUICK,
        )

    @pytest.fixture(scope="class")
    def report(self, config: EvaluateConfig, endpoint: str) -> EvaluateReport:
        with Tracker(config.tracking, "train/run") as training:  # which the snapshot came of
            training.model(read_snapshot(config.snapshot))
        return evaluate(config, endpoint)

    def test_random_weights_are_found_out(self, report: EvaluateReport) -> None:
        figures = report.metrics
        assert report.num_images == 101
        assert figures["classifier_accuracy"] > 0.8
        assert figures["accuracy"] < 0.4  # chance is 0.1
        assert figures["recall_ratio"] < 0.2
        assert report.features.startswith("classifier-")
        assert figures[f"fd-{report.features}_equal_n"] > 2 * figures[f"fd-{report.features}_floor"]
        assert figures["nearest_train"] > figures["nearest_train_floor"]
        assert figures[f"precision-{report.features}"] < 0.5 * figures[f"precision-{report.features}_floor"]
        assert figures["memorised"] < 0.1  # noise is near to nothing
        assert all(math.isfinite(value) for value in figures.values())

    def test_report_and_grid_stand_where_asked(self, config: EvaluateConfig, report: EvaluateReport) -> None:
        document = json.loads(Path(report.report).read_text())
        assert Path(report.report).parent == Path(config.output)
        assert document["metrics"] == report.metrics
        counts = document["reference"]
        assert (counts["train"] + counts["holdout"], counts["skipped"]) == (700, 1)
        assert document["settings"]["num_images"] == 101
        assert {key: document["settings"][key] for key in QUICK} == QUICK
        assert document["settings"]["spacing"] is None  # what is not given is named too
        assert document["snapshot"]["step"] == 30
        assert [row["name"] for row in document["by_class"]][:2] == ["zero", "one"]
        drawn = [11] + [10] * 9  # of 101 pictures, the classes in turn
        total = sum(row["accuracy"] * count for row, count in zip(document["by_class"], drawn, strict=True))
        assert total / 101 == pytest.approx(report.metrics["accuracy"])
        _, (width, height) = images.decode(Path(report.grid).read_bytes(), 32)
        assert (width, height) == (10 * 34 - 2, 2 * (4 * 34 - 2) + 8)
        _, (width, height) = images.decode((Path(config.output) / "nearest.png").read_bytes(), 32)
        assert (width, height) == (10 * 34 - 2, 2 * (2 * 34 - 2) + 8)

    def test_every_figure_has_its_n_its_interval_and_its_floors(self, report: EvaluateReport) -> None:
        document = json.loads(Path(report.report).read_text())
        named = {f"{name}-{report.features}" for name in ("fd", "kid", "precision", "density", "recall", "coverage")}
        assert set(document["figures"]) == named | {"sliced_wasserstein", "nearest_train", "memorised"}
        for name in named | {"sliced_wasserstein"}:
            sides = document["figures"][name]
            assert set(sides) == {"samples", "equal_n", "floor", "reconstruction"}
            assert sides["samples"]["count"] == 101
            assert sides["floor"]["count"] == sides["equal_n"]["count"] == sides["reconstruction"]["count"] < 101
            assert all(side["low"] <= side["value"] <= side["high"] for side in sides.values())
        assert set(document["resize"]) == {"reference", "features", "pixels"}
        worst = document["worst_class"]["accuracy"]
        assert worst["accuracy"] == report.metrics["accuracy_worst_class"] and worst["name"] in DIGIT_NAMES
        assert {row["class"] for row in document["by_class"] if "fd_part" in row} == set(range(10))
        pairs = document["nearest"]["samples"]
        assert len(pairs) == 10 and pairs[0]["training_picture"].startswith("digits-0000")
        assert [pair["closeness"] for pair in pairs] == sorted(pair["closeness"] for pair in pairs)

    def test_is_tracked_at_the_images_seen(self, config: EvaluateConfig, report: EvaluateReport) -> None:
        from mlflow import MlflowClient

        client = MlflowClient(str(config.tracking.uri))
        run = client.get_run(str(report.run_id))
        assert run.info.run_name == "evaluate/snapshot"
        assert run.data.metrics["eval/accuracy"] == report.metrics["accuracy"]
        assert client.get_metric_history(str(report.run_id), "eval/recall")[0].step == 960
        assert run.data.tags["features"] == report.features
        assert {file.path for file in client.list_artifacts(str(report.run_id))} == {
            "grid.png",
            "nearest.png",
            "report.json",
        }
        (reference,) = run.inputs.dataset_inputs
        assert reference.tags[0].value == "reference"
        (measured,) = run.inputs.model_inputs
        assert client.get_logged_model(measured.model_id).params["snapshot"] == config.snapshot

    def test_again_it_gives_the_same_figures_and_grid(
        self, config: EvaluateConfig, report: EvaluateReport, endpoint: str, tmp_path: Path
    ) -> None:
        changes = {"output": str(tmp_path), "tracking": TrackingConfig(enabled=False), "endpoint": endpoint}
        again = evaluate(config.model_copy(update=changes))
        assert again.metrics == report.metrics
        assert Path(again.grid).read_bytes() == Path(report.grid).read_bytes()
        assert again.run_id is None

    def test_without_labels_the_vae_measures(self, config: EvaluateConfig, endpoint: str, tmp_path: Path) -> None:
        path = write_pictures(tmp_path / "photos.tar", labels=[None] * 40)
        changes = {
            "reference": path,
            "features": "vae",
            "num_images": 20,
            "output": str(tmp_path),
            "tracking": TrackingConfig(enabled=False),
        }
        report = evaluate(config.model_copy(update=changes), endpoint)
        name = f"fd-{report.features}"
        floors = {f"{name}_equal_n", f"{name}_floor", "nearest_train_floor"}
        assert report.features.startswith("vae-")
        assert set(report.metrics) >= {name, "nearest_train", "sliced_wasserstein"} | floors
        assert not {"accuracy", "recall", "fid", "is"} & set(report.metrics)
        chosen = evaluate(config.model_copy(update={**changes, "features": None}), endpoint)
        assert chosen.metrics == report.metrics
        labelled = config.model_copy(update={**changes, "features": "classifier"})
        with pytest.raises(
            RequestError, match=r"^features=classifier: 40 of 40 reference pictures have no label \(label=cls\)"
        ):
            evaluate(labelled, endpoint)

    def test_statistics_stand_for_the_pictures_that_they_are_of(
        self, config: EvaluateConfig, endpoint: str, tmp_path: Path
    ) -> None:
        """In the features of a network of the user's own."""
        network = write_script(Means(), tmp_path / "means.pt")
        saved = str(tmp_path / "statistics.safetensors")
        changes: dict[str, Any] = {
            "num_images": 20,
            "features": str(network),
            "output": str(tmp_path),
            "tracking": TrackingConfig(enabled=False),
        }
        whole = evaluate(config.model_copy(update={**changes, "save_statistics": saved}), endpoint)
        alone = evaluate(config.model_copy(update={**changes, "reference": saved}), endpoint)
        name = f"fd-{whole.features}"
        assert whole.features.startswith("means-")
        assert set(alone.metrics) == {name, f"{name}_low", f"{name}_high"}
        assert alone.metrics[name] == pytest.approx(whole.metrics[name], rel=1e-9)
        other = config.model_copy(update={**changes, "reference": saved, "features": None})
        with pytest.raises(RequestError, match=r"^reference=.*: holds statistics of means-.*, not of vae-"):
            evaluate(other, endpoint)

    def test_another_snapshot_is_refused(self, config: EvaluateConfig, endpoint: str, tmp_path: Path) -> None:
        other = write_tiny_snapshot(tmp_path / "other", seed=1)
        with pytest.raises(RequestError, match=r"^endpoint=.*: serves .*snapshot \(step 30\), not snapshot=.*other"):
            evaluate(config.model_copy(update={"snapshot": other}), endpoint)

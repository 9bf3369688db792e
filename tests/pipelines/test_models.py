"""Snapshots as MLflow's models: their metrics, the best one that loads, the champion of a registered model."""

import re
import shutil
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image

from ldm.config import RequestError
from ldm.latents.manifest import Conditioning
from ldm.sampling import SampleConfig, sample
from ldm.snapshot import Snapshot, read_snapshot
from pipelines.lineage import image_dataset
from pipelines.serve.catalog import Catalog
from pipelines.tracking import Tracker, TrackingConfig
from tests.chaos_s3 import chaos_in_front_of
from tests.pipelines.mlflow_server import history, mlflow_server
from tests.pipelines.tiny_snapshot import write_tiny_snapshot

DIGITS = image_dataset({"/data/digits/a.tar": 100})
MAY_BE_IN_A_MODEL = {"MLmodel", ".json", ".safetensors", ".txt", "registered_model_meta"}
"""The last of these MLflow itself writes where it downloads."""


@pytest.fixture(scope="module")
def store(mlflow_folder: Path) -> TrackingConfig:
    return TrackingConfig(uri=f"sqlite:///{mlflow_folder}/mlflow.db", experiment="models")


@pytest.fixture(scope="module")
def client(store: TrackingConfig) -> MlflowClient:
    return MlflowClient(store.uri)


@pytest.fixture
def at_store(store: TrackingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow's own functions look there."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(store.uri))
    for name in ("_tracking_uri", "_registry_uri"):
        for module in (mlflow.tracking._tracking_service.utils, mlflow.tracking._model_registry.utils):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, None)


def snapshot(place: Path, seed: int, conditioning: Conditioning | None = None) -> Snapshot:
    made = place / f"snapshot-{seed}"
    return read_snapshot(write_tiny_snapshot(made, *([conditioning] if conditioning else []), seed=seed))


def best(store: TrackingConfig, found: Snapshot, loss: float, measured_on: str = "these", name: str = "") -> str:
    """A training run with this best snapshot; its id."""
    config = store.model_copy(update={"model_name": name or None})
    with Tracker(config, "train/run") as tracker:
        tracker.best_model(found, "val/loss", loss, measured_on)
    return str(tracker.run_id)


def model_of(client: MlflowClient, run_id: str) -> Any:
    (output,) = client.get_run(run_id).outputs.model_outputs
    return client.get_logged_model(output.model_id)


def drawn_by_sample(url: str, folder: Path, **settings: Any) -> np.ndarray:
    """uint8 (N, H, W, 3), what `ldm sample` writes."""
    sample(SampleConfig(snapshot=url, output=str(folder), **settings))
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("0*.png"))])


def test_the_best_snapshot_loads_without_pickle_and_draws_what_sample_draws(
    store: TrackingConfig, client: MlflowClient, at_store: None, tmp_path: Path
) -> None:
    found = snapshot(tmp_path, 9)
    run_id = best(store, found, 0.5, name="loads")
    uri = f"models:/{model_of(client, run_id).model_id}"
    files = Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(tmp_path / "files")))
    names = {str(path.relative_to(files)) for path in files.rglob("*") if path.is_file()}
    assert {"MLmodel", "snapshot/snapshot.json", "snapshot/denoiser.safetensors"} <= names
    assert {Path(name).suffix or Path(name).name for name in names} <= MAY_BE_IN_A_MODEL
    assert "loader_module: ldm.pyfunc" in (files / "MLmodel").read_text()
    options: dict[str, Any] = {"guidance_scale": 2.0, "eta": 0.5}
    four = drawn_by_sample(found.url, tmp_path / "4", num_images=3, num_inference_steps=4, **options)
    five = {"num_images": 1, "seed": 7, "labels": "five", "num_inference_steps": 6}
    six = drawn_by_sample(found.url, tmp_path / "6", **five, **options)
    shutil.rmtree(found.url)  # what it loads lies in MLflow
    loaded = mlflow.pyfunc.load_model("models:/loads@champion")
    rows = {"seed": [0, 1, 2, 7], "label": [0, 1, 2, 5], "num_inference_steps": [4, 4, 4, 6]}
    pictures = loaded.predict(rows, params=options)
    assert pictures.dtype == np.uint8 and pictures.shape == (4, 32, 32, 3) and pictures.std() > 1
    np.testing.assert_array_equal(pictures, np.concatenate([four, six]))
    with pytest.raises(RequestError, match="label=10: is no class of this model; give 0 to 9"):
        loaded.predict({"seed": [0], "label": [10]})
    with pytest.raises(RequestError, match="seed=-1: must be"):
        loaded.predict({"seed": [-1], "label": [0]})
    with pytest.raises(mlflow.MlflowException, match="label"):
        loaded.predict({"seed": [0]})


def test_an_unconditional_model_needs_seeds_alone(
    store: TrackingConfig, client: MlflowClient, at_store: None, tmp_path: Path
) -> None:
    found = snapshot(tmp_path, 12, Conditioning())
    model = model_of(client, best(store, found, 0.5, name="blank"))
    assert "mlflow.model.isExternal" not in model.tags
    pictures = mlflow.pyfunc.load_model(f"models:/{model.model_id}").predict({"seed": [3, 4]}, {"eta": 1.0})
    expected = drawn_by_sample(found.url, tmp_path / "out", num_images=2, seed=3, eta=1.0)
    np.testing.assert_array_equal(pictures, expected)


def test_one_model_of_a_run_is_the_best(store: TrackingConfig, client: MlflowClient, tmp_path: Path) -> None:
    """A run that goes on may find a better one: then that is the only one, and a version of its own."""
    first, last = snapshot(tmp_path, 13), snapshot(tmp_path, 14)
    with Tracker(store, "train/run") as train:
        train.model(first)
        train.best_model(first, "val/loss", 0.5, "these")
    with Tracker(store, "train/run", run_id=train.run_id) as train:
        train.best_model(last, "val/loss", 0.25, "these")
        train.best_model(last, "val/loss", 0.25, "these")
    run = client.get_run(train.run_id)
    assert len(run.outputs.model_outputs) == 2
    models = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{train.run_id}'")
    tags = {model.tags["weights_sha256"]: model.tags for model in models}
    assert "best" not in tags[first.weights_sha256]
    assert (tags[last.weights_sha256]["best"], tags[last.weights_sha256]["val/loss"]) == ("val/loss", "0.25")
    versions = [v for v in client.search_model_versions("name = 'models'") if v.run_id == train.run_id]
    assert sorted(v.tags["val/loss"] for v in versions) == ["0.25", "0.5"]  # of the experiment's name


def test_the_champion_is_never_a_worse_one_of_the_same(
    store: TrackingConfig, client: MlflowClient, at_store: None, tmp_path: Path
) -> None:
    found = [snapshot(tmp_path, seed) for seed in range(20, 25)]
    catalog = Catalog("models:/race@champion")
    served = []
    for one, loss, samples in zip(found, (0.5, 0.7, 0.3, 0.3, 0.9), "AAAAB", strict=True):
        best(store, one, loss, samples, name="race")
        served.append(catalog.default().snapshot.url)
    first, _, third, _, other = (one.url for one in found)
    assert served == [first, first, third, third, other]  # what was measured on other samples does not compare
    assert catalog.default().name == "race@champion"


def test_a_name_that_mlflow_refuses_is_made_one_that_it_takes(store: TrackingConfig) -> None:
    assert store.registered_name == "models"
    assert store.model_copy(update={"model_name": "a/b:c"}).registered_name == "a-b-c"


def test_a_server_without_a_registry_is_said_and_nothing_fails(
    mlflow_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with mlflow_server(mlflow_folder) as url, chaos_in_front_of(url) as chaos:
        chaos.rage(1.0, kinds=("gone",), only=lambda method, path: "registered-models" in path)
        config = TrackingConfig(uri=chaos.endpoint, experiment="old")
        run_id = best(config, snapshot(tmp_path, 15), 0.5)
        client = MlflowClient(url)
        run = client.get_run(run_id)
        assert run.info.status == "FINISHED" and model_of(client, run_id).tags["best"] == "val/loss"
        assert not client.search_model_versions("name = 'old'")
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tracking:")]
    assert len(said) == 1 and "1 writes to" in said[0] and "registered-models" in said[0]


def test_metrics_of_validation_and_evaluation_are_the_models_too(
    store: TrackingConfig, client: MlflowClient, tmp_path: Path
) -> None:
    found = snapshot(tmp_path, 16)
    with Tracker(store, "train/run") as train:
        train.log({"val/loss": 0.9}, 480)  # of an earlier snapshot
        train.log({"val/loss": 0.5, "val/loss_t0125": 0.25, "train/loss": 0.4}, 960)
        train.model(found)
        train.validated(found, DIGITS)
    with Tracker(store, "train/run", run_id=train.run_id) as train:
        train.model(found)
        train.validated(found, DIGITS)  # again, by a run that goes on
    with Tracker(store, "evaluate/snapshot") as evaluate:
        evaluate.used_model(found)
        evaluate.dataset(DIGITS, "reference")
        evaluate.log({"eval/fd": 3.0, "perf/images_per_second": 7.0}, 960)
    model = model_of(client, str(train.run_id))
    rows = sorted((m.key, m.value, m.step, m.dataset_name, m.dataset_digest, m.run_id) for m in model.metrics)
    of = (DIGITS.name, DIGITS.digest)
    assert rows == [
        ("eval/fd", 3.0, 960, *of, evaluate.run_id),
        ("val/loss", 0.5, 960, *of, train.run_id),
        ("val/loss_t0125", 0.25, 960, *of, train.run_id),
    ]
    assert history(client, train.run_id, "val/loss") == [(480, 0.9), (960, 0.5)]
    assert history(client, evaluate.run_id, "eval/fd") == [(960, 3.0)]
    assert client.search_logged_models([model.experiment_id], "metrics.`val/loss` < 0.6")


def test_what_was_removed_is_named_so(store: TrackingConfig, client: MlflowClient, tmp_path: Path) -> None:
    first, last = snapshot(tmp_path, 17), snapshot(tmp_path, 18)
    with Tracker(store, "train/run") as train:
        train.model(first)
        train.model(last)
        train.gone_models([first.weights_sha256])
    run = client.get_run(train.run_id)
    models = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{train.run_id}'")
    assert [m.tags["weights_sha256"] for m in models if m.tags.get("removed") == "true"] == [first.weights_sha256]


def test_a_grid_has_the_name_by_which_mlflow_shows_a_slider(
    store: TrackingConfig, client: MlflowClient, tmp_path: Path
) -> None:
    """Names but for time and random part, tag and pictures as `MlflowClient.log_image` makes them."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 40, 50), np.uint8)
    with Tracker(store, "train/ours") as ours:
        ours.grid("samples/main", pixels, 960)
    with Tracker(store, "train/theirs") as theirs:
        client.log_image(theirs.run_id, pixels.transpose(1, 2, 0), key="samples/main", step=960)
    names, tags = [], []
    for tracker in (ours, theirs):
        paths = sorted(file.path for file in client.list_artifacts(tracker.run_id, "images"))
        names.append([re.sub(r"timestamp\+\d+\+[0-9a-f-]+(?=[.+])", "", path) for path in paths])
        tags.append(client.get_run(tracker.run_id).data.tags["mlflow.loggedImages"])
        full = client.download_artifacts(tracker.run_id, next(path for path in paths if path.endswith(".png")))
        np.testing.assert_array_equal(np.asarray(Image.open(full)).transpose(2, 0, 1), pixels)
    assert names[0] == names[1] == [f"images/samples~main+step+960+{end}" for end in ("+compressed.webp", ".png")]
    assert tags[0] == tags[1]


def test_tables_and_figures(store: TrackingConfig, client: MlflowClient, at_store: None, tmp_path: Path) -> None:
    rows = [{"class": 0, "name": "zero", "recall": 0.5}, {"class": 1, "recall": 1.0}]
    with Tracker(store, "evaluate/run") as tracker:
        tracker.table("tables/by_class.json", rows)
        tracker.table("settings.json", [{"seed": 3}])
        tracker.figure("plots/curve.png", b"\x89PNG")
    with Tracker(store, "evaluate/run", run_id=tracker.run_id) as again:
        again.table("tables/by_class.json", rows)
    experiment = client.get_run(str(tracker.run_id)).info.experiment_id
    found = client.load_table(experiment, "tables/by_class.json", run_ids=[str(tracker.run_id)])
    assert list(found.columns) == ["class", "name", "recall"] and found["recall"].tolist() == [0.5, 1.0]
    assert found["name"].tolist()[0] == "zero" and len(found) == 2
    shown = client.get_run(tracker.run_id).data.tags["mlflow.loggedArtifacts"]
    assert shown == '[{"path": "tables/by_class.json", "type": "table"}, {"path": "settings.json", "type": "table"}]'
    assert Path(client.download_artifacts(tracker.run_id, "plots/curve.png", str(tmp_path))).read_bytes() == b"\x89PNG"

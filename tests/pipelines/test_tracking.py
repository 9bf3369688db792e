"""One MLflow run: what is logged is there once, and a lost write stops nobody."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from pydantic import Field

from ldm.autoencoder import Autoencoder
from ldm.config import Config
from ldm.latents.manifest import read_manifest
from ldm.snapshot import read_snapshot
from pipelines.lineage import image_dataset, latent_dataset
from pipelines.tracking import PROGRESS_KEY, Tracker, TrackingConfig
from tests.pictures import kl_model
from tests.pictures import latent_dataset as write_latent_dataset
from tests.pipelines.mlflow_server import history, wait_until
from tests.pipelines.tiny_snapshot import write_tiny_snapshot


class Inner(Config):
    rate: float = Field(0.5, description="a rate")


class Params(Config):
    name: str = Field("x" * 5, description="a name")
    inner: Inner = Inner()
    tracking: TrackingConfig = TrackingConfig()


@pytest.fixture(scope="module")
def store(mlflow_folder):
    return TrackingConfig(uri=f"sqlite:///{mlflow_folder}/mlflow.db", experiment="tests")


@pytest.fixture(scope="module")
def client(store):
    return MlflowClient(store.uri)


def test_a_run_is_written(store, client, tmp_path):
    params = Params(tracking=store)
    with Tracker(store, "encode/thing", params) as tracker:
        tracker.log({"data/inputs": 7, "perf/rate": 1.5}, 100)
        tracker.log({"data/inputs": 8}, 200)
        tracker.tag({"fingerprint": "abc"})
        tracker.image("grid.png", np.zeros((3, 4, 5), np.uint8))
        tracker.document("metrics.json", {"a": 1})
    run = client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED" and run.info.run_name == "encode/thing"
    assert client.get_experiment(run.info.experiment_id).name == "tests"
    assert run.data.params == {"name": "xxxxx", "inner.rate": "0.5"}
    assert run.data.tags["stage"] == "encode" and run.data.tags["fingerprint"] == "abc"
    assert history(client, tracker.run_id, "data/inputs") == [(100, 7), (200, 8)]
    assert history(client, tracker.run_id, "perf/rate") == [(100, 1.5)]
    assert sorted(f.path for f in client.list_artifacts(tracker.run_id)) == ["grid.png", "metrics.json"]
    assert not (tmp_path / "mlruns").exists()


def test_a_run_that_goes_on_does_not_say_anything_twice(store, client):
    """Killed after step 3; resumed from step 1. Another group of metrics is logged at its own steps."""
    with pytest.raises(RuntimeError), Tracker(store, "train/thing") as first:
        for step in range(4):
            first.log({"train/loss": 10 + step, PROGRESS_KEY: step}, step * 100)
        first.log({"val/loss": 5.0}, 350)
        raise RuntimeError("killed")
    assert client.get_run(first.run_id).info.status == "FAILED"
    with Tracker(store, "train/thing", run_id=first.run_id) as second:
        wait_until(lambda: client.get_run(first.run_id).info.status == "RUNNING")
        for step in range(2, 6):
            second.log({"train/loss": 20 + step, PROGRESS_KEY: step}, step * 100)
        second.log({"val/loss": 6.0}, 350)
        second.log({"val/loss": 7.0}, 550)
        second.log({"val/new": 1.0}, 300)
    assert second.run_id == first.run_id
    losses = [(0, 10), (100, 11), (200, 12), (300, 13), (400, 24), (500, 25)]
    assert history(client, first.run_id, "train/loss") == losses
    assert history(client, first.run_id, "val/loss") == [(350, 5.0), (550, 7.0)]
    assert history(client, first.run_id, "val/new") == [(300, 1.0)]
    assert client.get_run(first.run_id).info.status == "FINISHED"


def test_a_worker_does_not_end_the_run_of_the_driver(store, client):
    with Tracker(store, "train/thing") as driver:
        with Tracker(store, "train/thing", run_id=driver.run_id, ends_run=False) as worker:
            worker.log({"train/loss": 1.0}, 1)
        assert client.get_run(driver.run_id).info.status == "RUNNING"
        assert history(client, driver.run_id, "train/loss") == [(1, 1.0)]
    assert client.get_run(driver.run_id).info.status == "FINISHED"


def test_ctrl_c_is_killed(store, client):
    with pytest.raises(KeyboardInterrupt), Tracker(store, "train/thing") as tracker:
        raise KeyboardInterrupt
    assert client.get_run(tracker.run_id).info.status == "KILLED"


def test_numbers_that_are_not_finite(store, client):
    with Tracker(store, "train/thing") as tracker:
        tracker.log({"train/loss": float("nan")}, 1)
        tracker.log({"train/loss": 2.0}, 2)
    (first, last) = history(client, tracker.run_id, "train/loss")
    assert last == (2, 2.0) and first[0] == 1


def test_a_failed_write_is_reported_and_stops_nobody(store, client, capsys):
    with Tracker(store, "train/thing") as tracker:
        tracker.log({"train/loss": 1.0}, 1)
        tracker.log({"a name! with? bad: characters*": 1.0}, 2)
        tracker.log({"train/loss": 3.0}, 3)
    assert history(client, tracker.run_id, "train/loss") == [(1, 1.0), (3, 3.0)]
    assert client.get_run(tracker.run_id).info.status == "FINISHED"
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tracking:")]
    assert len(lines) == 1 and f"tracking: 1 writes to {store.uri} failed; the first: " in lines[0]


def inputs(client, run_id):
    """(context, data set) of each input of a run, in the order of the contexts."""
    found = client.get_run(run_id).inputs.dataset_inputs
    return sorted(((i.tags[0].value, i.dataset) for i in found), key=lambda pair: pair[0])


def test_runs_meet_in_the_data_set_that_one_wrote_and_one_reads(store, client, tmp_path, monkeypatch):
    latents = tmp_path / "latents"
    write_latent_dataset(str(latents), Autoencoder(kl_model()), counts=(5, 4))
    manifest = read_manifest(str(latents))
    images = image_dataset({"/data/digits/b-1.tar": 200, "/data/digits/a-0.tar": 100})
    with Tracker(store, "encode/latents") as encode:
        encode.dataset(images, "source")
        encode.dataset(latent_dataset(manifest), "latents")
    monkeypatch.chdir(tmp_path)
    with Tracker(store, "train/run") as train:
        train.dataset(latent_dataset(read_manifest("latents")), "training")
    (context_1, wrote), (context_2, source) = inputs(client, encode.run_id)
    ((context_3, read),) = inputs(client, train.run_id)
    assert (context_1, context_2, context_3) == ("latents", "source", "training")
    assert read == wrote  # down to URL and profile
    assert (wrote.name, wrote.digest) == ("latents", manifest.generation)
    assert (wrote.source_type, json.loads(wrote.source)) == ("local", {"uri": str(latents)})
    profile = json.loads(wrote.profile)
    assert (profile["num_samples"], profile["num_shards"], profile["num_classes"]) == (9, 2, 3)
    assert (source.name, source.digest, json.loads(source.source)) == ("digits", images.digest, {"uri": "/data/digits"})
    assert json.loads(source.profile) == {"num_shards": 2, "bytes": 300}


def test_image_shards_are_the_same_data_set_for_the_same_files():
    one = image_dataset({"s3://b/x/a.tar": 1, "s3://b/x/b.tar": 2})
    assert (one.name, one.url) == ("x", "s3://b/x") and len(one.digest) <= 36
    assert image_dataset({"s3://b/x/b.tar": 2, "s3://b/x/a.tar": 1}) == one
    assert image_dataset({"/copy/x/a.tar": 1, "/copy/x/b.tar": 2}).digest == one.digest
    assert image_dataset({"s3://b/x/a.tar": 1, "s3://b/x/b.tar": 3}).digest != one.digest
    assert image_dataset({"s3://b/x/a.tar": 1}).digest != one.digest
    assert image_dataset({"/p/x/a.tar": 1, "/p/y/b.tar": 2}).url == "/p/x,/p/y"


def test_a_snapshot_is_a_logged_model_that_others_find_by_its_weights(store, client, tmp_path):
    snapshot = read_snapshot(write_tiny_snapshot(tmp_path / "snapshot", seed=5))
    elsewhere = read_snapshot(write_tiny_snapshot(tmp_path / "elsewhere", seed=6))
    with Tracker(store, "train/run.2") as train:
        train.model(snapshot)
    with Tracker(store, "evaluate/snapshot") as evaluate:
        evaluate.used_model(snapshot)
        evaluate.used_model(elsewhere)  # which no run of this experiment has logged
    (output,) = client.get_run(train.run_id).outputs.model_outputs
    model = client.get_logged_model(output.model_id)
    assert (model.name, model.source_run_id, model.status) == ("run-2-step-30", train.run_id, "READY")
    assert model.params["snapshot"] == snapshot.url and model.params["step"] == "30"
    assert model.params["denoiser.hidden_size"] == str(snapshot.denoiser["hidden_size"])
    assert model.tags["weights_sha256"] == snapshot.weights_sha256
    assert output.step == snapshot.images_seen == 960
    assert [used.model_id for used in client.get_run(evaluate.run_id).inputs.model_inputs] == [model.model_id]
    assert not list(Path(store.uri.removeprefix("sqlite:///")).parent.rglob("*.safetensors"))


def test_a_run_that_goes_on_holds_its_lineage_once(store, client, tmp_path, monkeypatch):
    first, last = (read_snapshot(write_tiny_snapshot(tmp_path / str(seed), seed=seed)) for seed in (7, 8))
    images = image_dataset({"/data/digits/a.tar": 100})
    with monkeypatch.context() as patch, pytest.raises(RuntimeError), Tracker(store, "train/run") as began:
        patch.setattr(began._client, "log_outputs", lambda *_: None)  # killed before that, with a model half logged
        patch.setattr(began._client, "finalize_logged_model", lambda *_: None)
        began.dataset(images, "training")
        began.model(first)
        raise RuntimeError("killed")
    assert client.get_run(began.run_id).outputs.model_outputs == []
    for _ in range(2):
        with Tracker(store, "train/run", run_id=began.run_id) as again:
            again.dataset(images, "training")
            again.model(first)
            again.model(last)
            again.used_model(last)
    run = client.get_run(began.run_id)
    assert [(context, data.digest) for context, data in inputs(client, began.run_id)] == [("training", images.digest)]
    models = [client.get_logged_model(output.model_id) for output in run.outputs.model_outputs]
    hashes = sorted(model.tags["weights_sha256"] for model in models)
    assert hashes == sorted([first.weights_sha256, last.weights_sha256])
    assert {model.status for model in models} == {"READY"}
    assert len(run.inputs.model_inputs) == 1
    experiment = client.get_run(began.run_id).info.experiment_id
    assert len(client.search_logged_models([experiment], f"source_run_id = '{began.run_id}'")) == 2


def test_disabled_does_nothing(tmp_path):
    """Nor does it load MLflow, which takes seconds."""
    program = f"""
import os, sys
import numpy as np
from pipelines.tracking import Tracker, TrackingConfig
os.chdir({str(tmp_path)!r})
with Tracker(TrackingConfig(enabled=False), "encode/x") as tracker:
    tracker.log({{"a": 1.0}}, 1)
    tracker.tag({{"a": "b"}})
    tracker.image("x.png", np.zeros((3, 2, 2), np.uint8))
    tracker.document("x.json", {{}})
assert tracker.run_id is None
assert not any(name.split(".")[0] == "mlflow" for name in sys.modules), "mlflow was imported"
"""
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", program], cwd=root, check=True, timeout=120)
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_is_said_the_environment_and_then_this_folder_is_taken(monkeypatch, tmp_path):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    assert TrackingConfig().resolved() == TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db", experiment="ldm")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    assert TrackingConfig().resolved() == TrackingConfig(uri="http://server:5000", experiment="mine")
    named = TrackingConfig(uri="sqlite:///x/y.db", experiment="other")
    assert named.resolved() == TrackingConfig(uri=f"sqlite:///{tmp_path}/x/y.db", experiment="other")
    assert named.resolved().resolved() == named.resolved()


def test_git_that_hangs_stops_nobody(store, client, tmp_path, monkeypatch):
    """A `git` that never answers, as on a dead network disk, costs five seconds and no run."""
    (tmp_path / "git").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with Tracker(store, "train/thing") as tracker:
        pass
    assert "mlflow.source.git.commit" not in client.get_run(tracker.run_id).data.tags

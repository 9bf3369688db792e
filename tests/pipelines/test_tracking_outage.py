"""MLflow is down, slow or silent: no caller waits, nothing is lost, and nothing is there twice."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient

from ldm import storage
from ldm.config import RequestError
from ldm.snapshot import read_snapshot
from pipelines import outbox, tracking
from pipelines.lineage import image_dataset
from pipelines.outbox import BACKOFF_S, kept_files
from pipelines.tracking import Tracker, TrackingConfig
from tests.chaos_s3 import chaos_in_front_of
from tests.pipelines.mlflow_server import history, mlflow_server, wait_until
from tests.pipelines.tiny_snapshot import write_tiny_snapshot

DOWN = ("busy", "reset", "lost")
"""503; no connection; and what is worst: the server does what was asked, and nobody hears of it."""


@pytest.fixture(scope="module")
def server(mlflow_folder):
    with mlflow_server(mlflow_folder) as url:
        yield url


@pytest.fixture(scope="module")
def client(server):
    return MlflowClient(server)  # not through the proxy


@pytest.fixture(scope="module")
def proxy(server):
    with chaos_in_front_of(server) as proxy:
        yield proxy


@pytest.fixture
def chaos(proxy):
    proxy.calm()
    return proxy


@pytest.fixture
def config(chaos):
    return TrackingConfig(uri=chaos.endpoint, experiment="outages")


@pytest.fixture(autouse=True)
def haste(monkeypatch):
    """The same waits, shorter."""
    monkeypatch.setattr(outbox, "BACKOFF_S", (0.02, 0.05, 0.1))
    monkeypatch.setattr(tracking, "EXIT_WAIT_S", 20.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


def kept(folder):
    """The records in the files of a folder; a file that the tracker, which works on, has just sent is gone."""
    records = []
    for name in kept_files(str(folder)):
        with suppress(FileNotFoundError):
            records += storage.read_json_lines(storage.join(str(folder), name))
    return records


def kept_points(folder):
    return [
        (line["step"], value) for line in kept(folder) if line["kind"] == "Points" for value in line["metrics"].values()
    ]


def test_what_an_outage_delayed_comes_in_order_and_once(config, chaos, client, tmp_path, capsys):
    picture = np.full((3, 4, 5), 7, np.uint8)
    snapshot = read_snapshot(write_tiny_snapshot(tmp_path / "snapshot", seed=11))
    with Tracker(config, "train/run", folder=str(tmp_path / "kept")) as tracker:
        tracker.log({"train/loss": 0.0}, 0)
        wait_until(lambda: history(client, tracker.run_id, "train/loss"))
        assert not (tmp_path / "kept").exists()  # no trace on the disk while all is well
        chaos.rage(1.0, kinds=DOWN)
        for step in range(1, 1500):
            tracker.log({"train/loss": float(step)}, step)
        tracker.log({"train/nan": float("nan")}, 1500)
        tracker.tag({"late": "yes"})
        tracker.image("grids/grid.png", picture)
        tracker.dataset(image_dataset({"/data/digits/a.tar": 100}), "training")
        tracker.log({"val/loss": 0.5}, snapshot.images_seen)
        tracker.model(snapshot)
        tracker.validated(snapshot, image_dataset({"/data/digits/a.tar": 100}))
        tracker.best_model(snapshot, "val/loss", 0.5, "samples of the outage")
        tracker.gone_models(["0" * 64])
        tracker.system({"system/node/cpu_utilization_percentage": 50.0})
        tracker.table("rows.json", [{"class": 0, "recall": 0.5}])
        wait_until(lambda: len(kept(tmp_path / "kept")) == 1514 and chaos.faults > 5)
        chaos.calm()
        wait_until(lambda: not kept(tmp_path / "kept"))  # while the run goes on
    run = client.get_run(tracker.run_id)
    assert history(client, tracker.run_id, "train/loss") == [(step, float(step)) for step in range(1500)]
    assert [step for step, _ in history(client, tracker.run_id, "train/nan")] == [1500]
    assert run.data.tags["late"] == "yes" and run.info.status == "FINISHED"
    assert [given.dataset.name for given in run.inputs.dataset_inputs] == ["digits"]
    (output,) = run.outputs.model_outputs
    assert output.step == snapshot.images_seen
    model = client.get_logged_model(output.model_id)
    assert [(m.key, m.value, m.step) for m in model.metrics] == [("val/loss", 0.5, snapshot.images_seen)]
    assert history(client, tracker.run_id, "val/loss") == [(snapshot.images_seen, 0.5)]
    assert history(client, tracker.run_id, "system/node/cpu_utilization_percentage")[0][1] == 50.0
    assert client.get_model_version_by_alias("outages", "champion").tags["logged_model"] == model.model_id
    assert {f.path for f in client.list_logged_model_artifacts(model.model_id)} >= {"MLmodel", "snapshot"}
    assert Path(client.download_artifacts(tracker.run_id, "grids/grid.png", str(tmp_path))).read_bytes()[1:4] == b"PNG"
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tracking:")]
    assert len(said) == 2 and "sends later" in said[0] and said[1].endswith("is written to again")


@pytest.mark.parametrize("place", ["disk", "s3"])
def test_what_is_unsent_at_the_end_is_kept_for_the_next_tracker(
    place, config, chaos, client, tmp_path, s3, monkeypatch, capsys
):
    monkeypatch.setattr(tracking, "EXIT_WAIT_S", 0.3)
    folder = str(tmp_path / "kept") if place == "disk" else f"{s3}/unsent/tracking"
    with Tracker(config, "encode/latents", folder=folder) as first:
        chaos.rage(1.0, kinds=DOWN)
        first.log({"data/inputs": 7.0, "data/share": float("inf")}, 100)
        first.log({"data/inputs": 8.0}, 200)
        first.document("a/report.json", {"a": 1})
    assert "4 writes to" in capsys.readouterr().err and len(kept(folder)) == 4
    assert client.get_run(first.run_id).info.status in ("RUNNING", "FINISHED")  # which a lost answer leaves open
    chaos.calm()
    monkeypatch.setattr(tracking, "EXIT_WAIT_S", 20.0)
    with Tracker(config, "encode/latents", folder=folder) as second:  # another run: the same stage, started again
        second.log({"data/inputs": 9.0}, 300)
    assert second.run_id != first.run_id and kept_files(folder) == []
    assert history(client, first.run_id, "data/inputs") == [(100, 7.0), (200, 8.0)]
    assert len(history(client, first.run_id, "data/share")) == 1
    assert client.get_run(first.run_id).info.status == "FINISHED"
    report = Path(client.download_artifacts(first.run_id, "a/report.json", str(tmp_path)))
    assert json.loads(report.read_text()) == {"a": 1}
    assert history(client, second.run_id, "data/inputs") == [(300, 9.0)]


KILLED = """
import sys, threading
from pipelines.tracking import Tracker, TrackingConfig

uri, run_id, folder = sys.argv[1:]
tracker = Tracker(TrackingConfig(uri=uri), "train/run", run_id=run_id, ends_run=False, folder=folder).__enter__()
for step in map(int, sys.stdin):
    tracker.log({"train/loss": float(step)}, step)
"""


def test_a_worker_killed_in_an_outage_and_resumed_leaves_each_point_once(config, chaos, client, tmp_path):
    """Killed at step 30; the checkpoint is of step 15, and the steps from there come again, with other values here."""
    folder = tmp_path / "kept"
    with Tracker(config, "train/run", folder=str(folder)) as driver:
        command = [sys.executable, "-c", KILLED, chaos.endpoint, driver.run_id, str(folder)]
        root = Path(__file__).resolve().parents[2]
        with subprocess.Popen(command, stdin=subprocess.PIPE, cwd=root, text=True) as worker:
            worker.stdin.write("".join(f"{step}\n" for step in range(10)))
            worker.stdin.flush()
            wait_until(lambda: len(history(client, driver.run_id, "train/loss")) == 10)
            chaos.rage(1.0, kinds=DOWN)
            worker.stdin.write("".join(f"{step}\n" for step in range(10, 30)))
            worker.stdin.flush()
            wait_until(lambda: len(kept_points(folder)) >= 20)
            worker.send_signal(signal.SIGKILL)
        resumed = Tracker(config, "train/run", run_id=driver.run_id, ends_run=False, folder=str(folder))
        with resumed:  # while the outage lasts
            for step in range(16, 25):
                resumed.log({"train/loss": 100.0 + step}, step)
            wait_until(lambda: len(kept_points(folder)) >= 29)
            chaos.calm()
            for step in range(25, 40):
                resumed.log({"train/loss": 100.0 + step}, step)
    points = history(client, driver.run_id, "train/loss")
    assert Counter(step for step, _ in points) == Counter(range(40))
    assert points == [(step, step + 100.0 * (step >= 30)) for step in range(40)]
    assert kept_files(str(folder)) == []
    assert client.get_run(driver.run_id).info.status == "FINISHED"


def test_down_at_the_start(config, chaos, client, tmp_path, capsys):
    """A fresh run is refused, for nothing has begun; one that goes on goes on, and so does a worker."""
    with Tracker(config, "train/run") as began:
        began.log({"train/loss": 1.0}, 1)
    chaos.rage(1.0, kinds=("busy",))
    with pytest.raises(RequestError, match=f"^tracking.uri={chaos.endpoint}: cannot be written to .*enabled=false$"):
        Tracker(config, "train/run").__enter__()
    with (
        Tracker(config, "train/run", run_id=began.run_id, folder=str(tmp_path)) as driver,
        Tracker(config, "train/run", run_id=began.run_id, ends_run=False, folder=str(tmp_path)) as worker,
    ):
        assert driver.run_id == began.run_id
        driver.tag({"goes": "on"})
        worker.log({"train/loss": 1.5}, 1)
        worker.log({"train/loss": 2.0}, 2)
        chaos.calm()
    assert history(client, began.run_id, "train/loss") == [(1, 1.0), (2, 2.0)]
    run = client.get_run(began.run_id)
    assert run.data.tags["goes"] == "on" and run.info.status == "FINISHED"
    assert f"tracking: {chaos.endpoint} does not answer, goes on and sends later" in capsys.readouterr().err


def test_a_run_that_is_gone_begins_anew(config, client, capsys):
    with Tracker(config, "train/run", run_id="0" * 32) as tracker:
        tracker.log({"train/loss": 1.0}, 1)
    assert tracker.run_id != "0" * 32 and history(client, tracker.run_id, "train/loss") == [(1, 1.0)]
    assert "has no run 000" in capsys.readouterr().err


def test_no_caller_waits_for_a_server_that_never_answers(monkeypatch, tmp_path):
    monkeypatch.setattr(outbox, "KEEP_AFTER_S", 0.1)
    monkeypatch.setattr(tracking, "WORKER_EXIT_WAIT_S", 0.1)
    asked = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept():
            held = [listener.accept()[0]]
            held[0].recv(1)
            asked.set()
            release.wait(60)

        release = threading.Event()
        thread = threading.Thread(target=accept)
        thread.start()
        config = TrackingConfig(uri="http://127.0.0.1:{}".format(*listener.getsockname()[1:]))
        with Tracker(config, "train/run", run_id="1" * 32, ends_run=False, folder=str(tmp_path)) as tracker:
            tracker.log({"train/loss": 0.0}, 0)
            assert asked.wait(60)  # the request is out, and no answer will ever come
            for step in range(1, 5000):
                tracker.log({"train/loss": float(step)}, step)
            assert not release.is_set()
        assert not release.is_set()
        release.set()
        thread.join()
    assert sorted(kept_points(tmp_path)) == [(step, float(step)) for step in range(5000)]


def test_a_store_of_artifacts_that_is_down_holds_up_no_metric(config, chaos, client, tmp_path):
    with Tracker(config, "train/run", folder=str(tmp_path)) as tracker:
        chaos.rage(1.0, kinds=DOWN, only=lambda method, path: "mlflow-artifacts" in path)
        tracker.image("grid.png", np.zeros((3, 2, 2), np.uint8))
        wait_until(lambda: chaos.faults > 2)
        tracker.log({"train/loss": 1.0}, 1)
        wait_until(lambda: history(client, tracker.run_id, "train/loss"))
        assert [line["kind"] for line in kept(tmp_path)] == ["Artifact"]
        chaos.calm()
    assert [file.path for file in client.list_artifacts(tracker.run_id)] == ["grid.png"]


def test_what_can_never_be_written_is_not_tried_for_ever(config, chaos, client, tmp_path, capsys):
    """Neither now nor by the next tracker: each point that is right is there, the wrong one is said once."""
    with Tracker(config, "train/run", folder=str(tmp_path)) as tracker:
        chaos.rage(1.0, kinds=DOWN)
        for step in range(10):
            tracker.log({"train/loss": 1.0, **({"a bad* name": 1.0} if step == 5 else {})}, step)
        wait_until(lambda: kept_files(str(tmp_path)))
        chaos.calm()
    assert [step for step, _ in history(client, tracker.run_id, "train/loss")] == list(range(10))
    assert kept_files(str(tmp_path)) == []
    assert f"tracking: 1 writes to {chaos.endpoint} failed; the first: " in capsys.readouterr().err


def test_the_end_waits_for_weights_that_are_on_their_way(config, chaos, client, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "EXIT_WAIT_S", 0.1)
    snapshot = read_snapshot(write_tiny_snapshot(tmp_path / "snapshot", seed=12))
    with Tracker(config, "train/run") as tracker:
        chaos.rage(1.0, kinds=("slow",), delay=0.2, only=lambda method, path: method == "PUT")
        tracker.best_model(snapshot, "val/loss", 0.5, "these samples")
        wait_until(lambda: chaos.faults)
    (output,) = client.get_run(tracker.run_id).outputs.model_outputs
    names = {file.path for file in client.list_logged_model_artifacts(output.model_id, "snapshot")}
    assert names == {"snapshot/snapshot.json", "snapshot/denoiser.safetensors", "snapshot/autoencoder"}
    assert client.get_model_version_by_alias("outages", "champion").tags["logged_model"] == output.model_id


def test_no_password_lies_in_a_file(config, chaos, client, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "EXIT_WAIT_S", 0.1)
    named = TrackingConfig(uri=chaos.endpoint.replace("//", "//someone:secret@"), experiment="outages")
    with Tracker(named, "train/run", folder=str(tmp_path)) as first:
        chaos.rage(1.0, kinds=("busy",))
        first.log({"train/loss": 1.0}, 1)
    assert len(kept(tmp_path)) == 2 and not any("secret" in line["uri"] for line in kept(tmp_path))
    chaos.calm()
    monkeypatch.setattr(tracking, "EXIT_WAIT_S", 20.0)
    with Tracker(config, "train/run", run_id=first.run_id, folder=str(tmp_path)):
        pass
    assert history(client, first.run_id, "train/loss") == [(1, 1.0)] and kept_files(str(tmp_path)) == []


@pytest.mark.faults
def test_a_server_that_is_killed_and_back_after_a_minute(free_port, tmp_path, monkeypatch):
    """`mlflow server` itself, with the waits of every day."""
    monkeypatch.setattr(outbox, "BACKOFF_S", BACKOFF_S)
    port, place = free_port(), f"sqlite:///{tmp_path}/mlflow.db"
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", place, "--artifacts-destination", str(tmp_path / "artifacts")]

    @contextmanager
    def server():
        with subprocess.Popen(command, cwd=tmp_path, start_new_session=True) as process:
            try:
                wait_until(lambda: answers(url), 120)
                yield
            finally:
                os.killpg(process.pid, signal.SIGKILL)

    with ExitStack() as later:
        with server():
            config = TrackingConfig(uri=url, experiment="outage")
            tracker, client = Tracker(config, "train/run", folder=str(tmp_path / "kept")).__enter__(), MlflowClient(url)
            tracker.log({"train/loss": 0.0}, 0)
            wait_until(lambda: history(client, tracker.run_id, "train/loss"))
        for step in range(1, 61):  # a step a second
            tracker.log({"train/loss": float(step)}, step)
            time.sleep(1)
        steps = sorted(step for step, _ in kept_points(tmp_path / "kept"))
        # The server can die between keeping step 0 and saying so: then that is sent again, and still stands there once.
        assert steps[-60:] == list(range(1, 61)) and steps[:-60] in ([], [0])
        later.enter_context(server())
        wait_until(lambda: len(history(client, tracker.run_id, "train/loss")) == 61)
        assert history(client, tracker.run_id, "train/loss") == [(step, float(step)) for step in range(61)]
        tracker.__exit__(None, None, None)
        assert kept_files(str(tmp_path / "kept")) == []
        assert client.get_run(tracker.run_id).info.status == "FINISHED"


def answers(url):
    try:
        return urllib.request.urlopen(f"{url}/health", timeout=5).status == 200
    except OSError:
        return False


def test_what_waits_for_another_server_or_is_damaged_stays(config, client, tmp_path, capsys):
    line = {"uri": "http://elsewhere", "run_id": "2" * 32, "kind": "Tags", "tags": {"a": "b"}}
    (tmp_path / "backlog-1-elsewhere.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "backlog-2-damaged.jsonl").write_text('{"uri": ')
    with Tracker(config, "train/run", folder=str(tmp_path)) as tracker:
        tracker.log({"train/loss": 1.0}, 1)
    assert kept_files(str(tmp_path)) == ["backlog-1-elsewhere.jsonl", "backlog-2-damaged.jsonl"]
    assert history(client, tracker.run_id, "train/loss") == [(1, 1.0)]
    said = capsys.readouterr().err
    assert (
        "backlog-1-elsewhere.jsonl waits for http://elsewhere" in said and "backlog-2-damaged.jsonl cannot be" in said
    )


def test_what_is_secured_is_written_or_in_a_file(monkeypatch, server, tmp_path):
    """At once, where a record would be kept only later."""
    monkeypatch.setattr(outbox, "KEEP_AFTER_S", 600.0)
    monkeypatch.setattr(tracking, "SECURE_WAIT_S", 0.2)
    monkeypatch.setattr(tracking, "WORKER_EXIT_WAIT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # which never answers
        config = TrackingConfig(uri="http://127.0.0.1:{}".format(*silent.getsockname()[1:]))
        with Tracker(config, "train/run", run_id="1" * 32, ends_run=False, folder=str(tmp_path)) as tracker:
            tracker.log({"train/loss": 0.5}, 8)
            tracker.secure()
            assert kept_points(tmp_path) == [(8, 0.5)]
            tracker.secure()
            assert len(kept_files(str(tmp_path))) == 1, "and once"
    monkeypatch.setattr(tracking, "SECURE_WAIT_S", 60.0)
    folder = tmp_path / "well"
    with Tracker(TrackingConfig(uri=server, experiment="secured"), "train/run", folder=str(folder)) as tracker:
        tracker.log({"train/loss": 0.5}, 8)
        tracker.secure()
        assert history(MlflowClient(server), tracker.run_id, "train/loss") == [(8, 0.5)] and not kept_files(str(folder))

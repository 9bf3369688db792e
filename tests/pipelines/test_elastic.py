"""A run on nodes that go and come back, and how its ranks learn what is wanted of them."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm import storage
from ldm.autoencoder import Autoencoder
from pipelines.cluster import place_workers
from pipelines.train.board import Board
from pipelines.train.checkpoint import committed_steps, newest_checkpoint, read_full
from pipelines.train.signals import Notices, listen
from pipelines.train.start_times import StartTimes, describe
from tests.pictures import kl_model, latent_dataset

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("worlds", "device", "nodes", "expected"),
    [
        ([1, 2, 4], "cpu", [{"CPU": 2}, {"CPU": 2}], (4, {"CPU": 1.0})),
        ([1, 2, 4], "cpu", [{"CPU": 3}], (2, {"CPU": 1.0})),  # 3 do not divide the batch
        ([1, 2], "cpu", [{"CPU": 8}], (2, {"CPU": 4.0})),
        ([2, 4], "cpu", [{"CPU": 1}], (2, {"CPU": 0.5})),  # the least, whatever it takes
        ([2], "cpu", [{}], None),
        ([2, 4], "cuda", [{"CPU": 16, "GPU": 3}], (2, {"CPU": 1.0, "GPU": 1.0})),
        ([2, 4], "cuda", [{"CPU": 16, "GPU": 1}], None),
    ],
)
def test_the_largest_world_that_has_room(
    worlds: list[int], device: str, nodes: list[dict[str, float]], expected: tuple[int, dict[str, float]] | None
) -> None:
    assert place_workers(worlds, device, nodes) == expected


def test_the_phases_of_a_start_add_up() -> None:
    times = StartTimes(time.time() - 2.0)
    times.done("imports")
    times.done("step")
    assert list(times.seconds) == ["imports", "step"] and 2.0 <= sum(times.seconds.values()) < 3.0
    assert describe({"processes": 1.26, "step": 0.5}) == "1.8 s (processes 1.3, step 0.5)"


@pytest.mark.ray
def test_what_the_driver_wants_reaches_rank_0_until_it_is_done(ray_session: None) -> None:
    import ray

    board = ray.remote(Board).options(num_cpus=0).remote()
    notices = Notices(board)
    assert notices.asked() == (False, False)
    ticket = ray.get(board.ask.remote())
    _until(lambda: notices.asked() == (True, False))
    assert notices.asked() == (True, False), "until it is saved"
    newer = Notices(board)  # of the worker that took over before the checkpoint was taken
    _until(lambda: newer.asked() == (True, False))
    newer.saved()
    assert newer.asked() == (False, False)
    _until(lambda: ray.get(board.answers.remote()) == (ticket, 0))
    board.ask_to_stop.remote()
    _until(lambda: newer.asked() == (True, True))


def test_sigterm_asks_for_one_checkpoint_and_the_next_one_ends() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        listen()
        notices = Notices()
        assert notices.asked() == (False, False)
        os.kill(os.getpid(), signal.SIGTERM)
        assert notices.asked() == (True, False)
        notices.saved()
        assert notices.asked() == (False, False)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.fixture
def two_nodes() -> Iterator[tuple[Any, Any]]:
    """A cluster with two nodes of a CPU each, and the second one."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        yield cluster, cluster.add_node(num_cpus=1)
    finally:
        cluster.shutdown()


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_a_run_goes_on_with_the_nodes_that_are_there(tmp_path: Path, two_nodes: tuple[Any, Any]) -> None:
    """2 -> 1 -> 2 workers, and SIGTERM at the end: the losses of the run that nothing disturbed."""
    from mlflow import MlflowClient

    _write_latents(tmp_path)
    cluster, second = two_nodes
    run = str(tmp_path / "run")
    with _ldm_train(tmp_path, cluster.address, "run", "num_workers=[1,2]", "max_steps=1000000") as process:
        _until(lambda: _world(run) == 2, process)
        cluster.remove_node(second, allow_graceful=False)
        _until(lambda: _world(run) == 1, process)
        cluster.add_node(num_cpus=1)
        _until(lambda: _world(run) == 2, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=100) == 143
    said = (tmp_path / "run.txt").read_text()
    step = max(committed_steps(run))
    assert f"train: stopped at step {step:,} with the checkpoint {newest_checkpoint(run)}\n" in said
    with _ldm_train(tmp_path, cluster.address, "undisturbed", "num_workers=2", f"max_steps={step}") as process:
        assert process.wait(timeout=200) == 0
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = {r.info.run_name: r.info.run_id for r in client.search_runs(["1"])}
    found, expected = (
        {point.step: point.value for point in client.get_metric_history(runs[f"train/{name}"], "train/loss")}
        for name in ("run", "undisturbed")
    )
    assert sorted(found) == sorted(expected) == [64 * (i + 1) for i in range(step)]
    assert max(abs(found[at] - expected[at]) for at in expected) < 1e-5
    weights, others = (read_full(str(newest_checkpoint(str(tmp_path / n))), "master") for n in ("run", "undisturbed"))
    for name, tensor in others.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-4, msg=name)


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_a_node_that_is_to_be_taken_away_has_a_checkpoint_taken_first(
    tmp_path: Path, two_nodes: tuple[Any, Any]
) -> None:
    _write_latents(tmp_path)
    cluster, second = two_nodes
    never = ("checkpoint_every=1000000", "max_steps=1000000")
    run, said = str(tmp_path / "run"), tmp_path / "run.txt"
    with _ldm_train(tmp_path, cluster.address, "run", "num_workers=2", *never) as process:
        _until(lambda: "first step after" in said.read_text(), process)
        assert committed_steps(run) == []
        notice = ["--node-id", second.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        drain = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", cluster.address, *notice]
        subprocess.run([*drain, "--deadline-remaining-seconds", "500"], check=True, capture_output=True)
        _until(lambda: len(committed_steps(run)) == 1, process)
        line = rf"train: node {second.node_id[:8]} is to be taken away in (\d+) s: takes a checkpoint\n"
        (seconds,) = re.findall(line, said.read_text())
        assert 300 <= int(seconds) <= 500
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=100) == 143


def _write_latents(place: Path) -> None:
    autoencoder = Autoencoder(kl_model())
    latent_dataset(str(place / "latents"), autoencoder, counts=(20, 18, 7))
    autoencoder.save(str(place / "latents" / "autoencoder"))


@contextmanager
def _ldm_train(place: Path, address: str, output: str, *changes: str) -> Iterator[subprocess.Popen[bytes]]:
    settings = (
        f"latents=latents output={output} device=cpu global_batch_size=64 micro_batch_size=4 learning_rate=1e-4 "
        f"log_every=1 checkpoint_every=10 tracking.uri=sqlite:///{place}/mlflow.db denoiser.hidden_size=16 "
        "denoiser.depth=1 denoiser.num_heads=2 denoiser.patch_size=1"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": address}
    with (place / f"{output}.txt").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs.cli", "train", *settings.split(), *changes],
            stderr=log, stdout=subprocess.DEVNULL, cwd=place, env=environment, start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()


def _world(output: str) -> int | None:
    """Of the workers that wrote the newest checkpoint."""
    checkpoint = newest_checkpoint(output)
    try:
        return checkpoint and storage.read_json(storage.join(checkpoint, "checkpoint.json"))["world"]
    except FileNotFoundError:  # a newer one took its place
        return None


def _until(ready: Callable[[], bool], process: subprocess.Popen[bytes] | None = None) -> None:
    deadline = time.monotonic() + 200
    while not ready():
        assert process is None or process.poll() is None, "ended by itself"
        assert time.monotonic() < deadline, "was never so"
        time.sleep(0.05)

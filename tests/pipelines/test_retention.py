"""Which checkpoints and snapshots are there, which stay, and what is cleared away of saves that did not finish."""

from __future__ import annotations

import subprocess
import sys

import fsspec
import pytest

from ldm import storage
from pipelines.train.checkpoint import (
    checkpoint_url,
    committed_steps,
    newest_checkpoint,
    prune,
    sweep_unfinished,
)
from pipelines.train.checkpoint_files import write_marker
from pipelines.train.record import note_validation
from pipelines.train.snapshots import prune_snapshots, snapshot_steps, snapshot_url


def fake(output: str, step: int, committed: bool = True) -> None:
    url = checkpoint_url(output, step)
    storage.write_bytes(storage.join(url, "rank-aa.safetensors"), b"weights")
    storage.write_bytes(storage.join(url, "rank-aa.json"), b"{}")
    if committed:
        write_marker(url, {"files": [{"name": "rank-aa"}]})


@pytest.mark.parametrize("where", ["local", "memory"])
def test_the_newest_is_a_committed_one_and_old_ones_are_pruned(tmp_path, where):
    output = str(tmp_path) if where == "local" else f"memory://{tmp_path.name}"
    assert newest_checkpoint(output) is None
    for step in (100, 200, 300, 400, 500):
        fake(output, step)
    fake(output, 250, committed=False)
    fake(output, 600, committed=False)
    storage.write_bytes(storage.join(output, "checkpoints", "step-0000000700.tmp", "checkpoint.json"), b"{}")
    assert newest_checkpoint(output) == checkpoint_url(output, 500)
    prune(output, keep_last=2, keep_every=200)
    left = storage.list_dir(storage.join(output, "checkpoints"))
    # 600 may be a save that is under way.
    assert [name for name in left if not name.endswith(".tmp")] == [f"step-{s:010d}" for s in (200, 400, 500, 600)]
    prune(output, keep_last=1)
    assert newest_checkpoint(output) == checkpoint_url(output, 500)
    assert not storage.exists(checkpoint_url(output, 400))
    if where == "memory":
        fsspec.filesystem("memory").rm("/" + tmp_path.name, recursive=True)


@pytest.mark.parametrize("where", ["local", "memory"])
def test_what_attempts_that_did_not_finish_left_goes_with_the_next_commit(tmp_path, where):
    output = str(tmp_path) if where == "local" else f"memory://{tmp_path.name}"

    def held(step: int) -> list[str]:
        return storage.list_dir(checkpoint_url(output, step))

    whole = ["checkpoint.json", "rank-aa.json", "rank-aa.safetensors"]
    for step in (100, 200, 300):
        fake(output, step)
        for name in ("rank-bb.safetensors", ".part.x.tmp"):  # of a killed attempt at the same step
            storage.write_bytes(storage.join(checkpoint_url(output, step), name), b"half")
    prune(output, keep_last=1, keep_every=200)
    assert committed_steps(output) == [200, 300]
    assert held(200) == whole
    assert len(held(300)) == 5, "another writer may still be at the newest"
    fake(output, 400)
    storage.write_bytes(storage.join(checkpoint_url(output, 200), "checkpoint.json"), b"damaged")
    prune(output, keep_last=3)
    assert [held(step) for step in (200, 300, 400)] == [whole] * 3
    if where == "memory":
        fsspec.filesystem("memory").rm("/" + tmp_path.name, recursive=True)


@pytest.mark.parametrize("where", ["local", "memory"])
def test_the_newest_snapshots_and_the_best_one_stay(tmp_path, where):
    output = str(tmp_path) if where == "local" else f"memory://{tmp_path.name}"

    def fake_snapshot(step: int, whole: bool = True) -> None:
        storage.write_bytes(storage.join(snapshot_url(output, step), "denoiser", "weights"), b"weights")
        if whole:
            about = f'{{"weights_sha256": "weights of {step}"}}'.encode()
            storage.write_bytes(storage.join(snapshot_url(output, step), "snapshot.json"), about)

    def left() -> list[str]:
        return [name.lstrip("step-0") for name in storage.list_dir(storage.join(output, "snapshots"))]

    prune_snapshots(output, 1)
    for step, loss in ((100, 0.3), (200, 0.1), (300, 0.2), (400, 0.4)):
        fake_snapshot(step)
        note_validation(output, step, loss, "9 of a")
    fake_snapshot(250, whole=False)
    fake_snapshot(500, whole=False)  # may be under way
    storage.write_bytes(storage.join(output, "snapshots", "mine.txt"), b"somebody's")
    assert prune_snapshots(output, None) == []
    assert len(left()) == 7
    assert prune_snapshots(output, 2) == ["weights of 100"]
    assert snapshot_steps(output) == [200, 300, 400] and left() == ["mine.txt", "200", "300", "400", "500"]
    note_validation(output, 400, 0.05, "9 of a")
    assert prune_snapshots(output, 1) == ["weights of 200", "weights of 300"]
    assert snapshot_steps(output) == [400]
    if where == "memory":
        fsspec.filesystem("memory").rm("/" + tmp_path.name, recursive=True)


def test_temporary_files_of_dead_processes_go_at_the_start(tmp_path):
    output = str(tmp_path)
    fake(output, 100)
    fake(output, 200, committed=False)
    leave = "from sys import argv; from ldm import storage; storage.temporary_beside(argv[1]).write_bytes(b'part')"
    for step in (100, 200):
        part = storage.join(checkpoint_url(output, step), "part")
        subprocess.run([sys.executable, "-c", leave, part], check=True)
        storage.temporary_beside(part).write_bytes(b"of a living process")
    sweep_unfinished(output)
    assert [len(storage.list_dir(checkpoint_url(output, step))) for step in (100, 200)] == [5, 3]

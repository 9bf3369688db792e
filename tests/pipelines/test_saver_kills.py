"""Workers killed with SIGKILL while a checkpoint is uploaded: what is resumed is whole, and changes no bit."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from ldm import storage
from pipelines.train.checkpoint import checkpoint_url
from pipelines.train.checkpoint_files import read_marker
from tests.chaos_s3 import ChaosProxy
from tests.pipelines.saving import Killer, assert_whole, killed_run, upload


@pytest.mark.faults
def test_workers_killed_while_they_upload(s3: str, chaos_s3: ChaosProxy, tmp_path: Path) -> None:
    output, reference, pids = f"{s3}/{uuid.uuid4().hex}", str(tmp_path / "reference"), str(tmp_path)
    assert killed_run(reference, 4, pids) == ""
    killer = Killer(chaos_s3, pids)
    # Rank 1 has written half of its files; an average is on its way and arrives; so does the commit, of a dead rank 0.
    moments = [("ema-00001.*safetensors", 1, True, 1), ("ema-00000.*safetensors", 0, False, 2), ("t.json", 0, False, 1)]
    reached = []
    for name, victim, drop, nth in moments:
        killer.arm(upload(name, nth), victim, drop)
        assert "rank" in killed_run(output, 4, pids) and killer.killed
        reached.append(assert_whole(output, reference))
    assert reached == [0, 1, 2]
    assert killed_run(output, 4, pids) == ""
    assert assert_whole(output, reference) == 4
    listed = {file["name"] for file in read_marker(checkpoint_url(output, 3))["files"]}
    names = {name.rpartition(".")[0] for name in storage.list_dir(checkpoint_url(output, 3))}
    assert names == listed | {"checkpoint"}

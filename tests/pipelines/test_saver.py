"""Saves beside the training on real gloo processes: the same bits, failures that all ranks see alike, going back."""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import s3fs

from ldm import storage
from ldm.config import RequestError
from ldm.storage import transport
from pipelines.train import zero
from pipelines.train.checkpoint import checkpoint_url, committed_steps
from pipelines.train.checkpoint_files import CheckpointError
from pipelines.train.resume import ask_to_go_back, choose_checkpoint
from tests.chaos_s3 import ChaosProxy
from tests.pipelines import gloo, tiny
from tests.pipelines.saving import Run, files

pytestmark = pytest.mark.slow


def on_s3(rank: int, world: int, place: str, local: str) -> dict[str, Any]:
    """Step 2's upload is held up until this rank asks for "release"; one of rank 1 at step 5 fails for good."""
    transport.FIRST_PAUSE, s3fs.S3FileSystem.retries = 0.01, 1
    run = Run(rank, world, f"{place}/run")
    run.train(2)
    now = run.save_now(local)
    run.save()
    buffers = [tensor.data_ptr() for column in run.saver._host._columns.values() for tensor in column]
    run.train(3)
    found: dict[str, Any] = {"alive": run.saver._running.is_alive(), "committed": committed_steps(run.output)}
    zero.all_gather(None)
    storage.exists(f"{place}/release")
    run.save()  # waits for the first one
    found["first"] = files(run.saver.checkpoint), files(now), run.saver.metrics
    again = [tensor.data_ptr() for column in run.saver._host._columns.values() for tensor in column]
    found["same memory"] = buffers == again
    run.train()
    run.save()
    found["one failed"] = run.saver.checkpoint, run.saver.metrics["train/failed_saves"]
    run.saver.close()
    found["end"] = run.saver.checkpoint, committed_steps(run.output), [progress["step"] for _, progress in run.saved]
    return found


def hold_up(chaos: ChaosProxy, held: str, failing: tuple[str, str]) -> None:
    """Uploads to `held` wait for a question for "release"; those to paths with both parts of `failing` get a 503."""
    released, pass_on = threading.Event(), chaos.fault

    def fault(method: str, path: str) -> str:
        if path.endswith("/release"):
            released.set()
        elif method == "PUT" and held in path:
            assert released.wait(100)
        return pass_on(method, path)

    chaos.fault = fault  # type: ignore[method-assign]
    chaos.rage(1.0, kinds=("busy",), only=lambda method, path: method == "PUT" and all(p in path for p in failing))


def check_saves(found: list[dict[str, Any]], output: str) -> None:
    for of_rank in found:
        assert of_rank["alive"] and of_rank["committed"] == [], "three steps were trained while it was written"
        saved, expected, metrics = of_rank["first"]
        assert saved == expected, "the bits of the step at which it was asked for"
        assert 0 < metrics["perf/checkpoint_wait_seconds"] <= metrics["perf/checkpoint_stall_seconds"]
        assert of_rank["same memory"]
        assert of_rank["one failed"] == (checkpoint_url(output, 2), 1)
        assert of_rank["end"][:2] == (checkpoint_url(output, 6), [2, 6])
    assert [of_rank["end"][2] for of_rank in found] == [[2, 6], []]


def go_back(rank: int, world: int, output: str) -> dict[str, Any]:
    """Saves at 1, 2, 3 and 4; then 4 is damaged, and 2 is gone back to."""
    run, found = Run(rank, world, output), {}
    for _ in range(4):
        run.train()
        run.save()
    run.saver.close()
    found["before"] = [files(checkpoint_url(output, step)) for step in (3, 4)]
    zero.all_gather(None)
    if rank == 0:
        tiny.flip(*Path(checkpoint_url(output, 4)).glob("ema-00001-*.safetensors"))
    zero.all_gather(None)

    run.engine.close()
    with pytest.raises(CheckpointError) as caught:
        Run.resumed(rank, world, output)
    found["damaged"] = str(caught.value), committed_steps(output)
    ask(rank, output, 4)
    with pytest.raises(CheckpointError):
        Run.resumed(rank, world, output)
    found["kept"] = committed_steps(output)
    ask(rank, output, 2)
    run, url = Run.resumed(rank, world, output)
    found["back"] = url, choose_checkpoint(output, 2), committed_steps(output)
    for _ in range(2):
        run.train()
        run.save()
    run.saver.close()
    run.engine.close()
    found["after"] = [files(checkpoint_url(output, step)) for step in (3, 4)]
    ask(rank, output, 2)  # the same command again
    found["again"] = Run.resumed(rank, world, output)[1], choose_checkpoint(output, 2)
    return found


def ask(rank: int, output: str, step: int) -> None:
    """What the driver does before there are workers."""
    if rank == 0:
        ask_to_go_back(output, step)
    zero.all_gather(None)


def check_going_back(output: str, found: list[dict[str, Any]]) -> None:
    urls = [checkpoint_url(output, step) for step in range(5)]
    for of_rank in found:
        message, held = of_rank["damaged"]
        assert f"{urls[4]}/ema-00001-of-00002" in message and held == [1, 2, 3, 4]
        assert message.endswith(
            "is damaged; its sha256 is not the committed one; give resume_from=3 to go on from the one before it"
        )
        assert of_rank["kept"] == [1, 2, 3, 4], "nothing goes before the older one has loaded"
        assert of_rank["back"] == (urls[2], urls[2], [1, 2])
        assert of_rank["after"] == of_rank["before"], "over what had been there, with the same bits"
        assert of_rank["again"] == (urls[4], urls[4])
    assert choose_checkpoint(output, 3) == urls[3]
    with pytest.raises(
        RequestError, match=r"^resume_from=7: .* has no checkpoint of that step; it has those of 1, 2, 3, 4$"
    ):
        choose_checkpoint(output, 7)
    ask_to_go_back(output, None)
    assert choose_checkpoint(output, 2) == urls[2]


def two_scenarios(rank: int, world: int, place: str, local: str, output: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """One start of the processes for both."""
    return go_back(rank, world, output), on_s3(rank, world, place, local)


def test_saves_to_a_slow_and_failing_object_store_and_going_back(
    s3: str, chaos_s3: ChaosProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    place = f"{s3}/{uuid.uuid4().hex}"
    hold_up(chaos_s3, "step-0000000002", ("step-0000000005", "rank-00001"))
    found = gloo.run(two_scenarios, 2, place, str(tmp_path / "now"), str(tmp_path / "run"))
    check_going_back(str(tmp_path / "run"), [back for back, _ in found])
    check_saves([saves for _, saves in found], f"{place}/run")
    assert chaos_s3.faults > 5, "storage tries again"
    said = [line for line in capfd.readouterr().err.splitlines() if "failed" in line]
    assert len(said) == 1 and said[0].startswith("train: the save of step 5 failed: ")
    assert "rank 1: OSError" in said[0]


def on_a_full_disk(rank: int, world: int, output: str, filler: str) -> dict[str, Any]:
    """Rank 0 fills and frees the disk, where the other one stands still."""
    run = Run(rank, world, output, stage=2)

    def fill(full: bool) -> None:
        zero.all_gather(None)
        if rank == 0 and full:
            with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
                while True:
                    file.write(b"x" * 4096)
        elif rank == 0:
            Path(filler).unlink()
        zero.all_gather(None)

    found: dict[str, Any] = {}
    run.train()
    run.save()
    run.saver.wait()
    fill(True)
    run.train()
    run.save()
    with pytest.raises(CheckpointError) as caught:
        run.saver.wait()
    found["last"] = str(caught.value)
    left = Path(checkpoint_url(output, 2))
    found["left"] = sorted(path.name for path in left.iterdir()) if left.exists() else []
    fill(False)
    run.train()
    run.save()
    run.saver.wait()
    found["again"] = committed_steps(output), files(checkpoint_url(output, 3)), files(run.save_now(f"{output}-now"))
    fill(True)
    with pytest.raises(CheckpointError) as caught:
        for _ in range(9):
            run.train()
            run.save()
    found["three"], found["step"] = str(caught.value), run.step
    return found


def test_on_a_full_disk_nothing_is_committed_and_the_next_save_tries_again(
    small_disk: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    disk = small_disk("size=2m")
    output = str(disk / "run")
    for rank, of_rank in enumerate(gloo.run(on_a_full_disk, 2, output, str(disk / "filler"))):
        assert of_rank["last"].startswith(
            f"the last save failed; the last good checkpoint is {checkpoint_url(output, 1)}"
        )
        assert "No space left on device" in of_rank["last"] and "\n" not in of_rank["last"], rank
        assert of_rank["left"] == []
        assert of_rank["again"][0] == [1, 3] and of_rank["again"][1] == of_rank["again"][2]
        good = f"the last good checkpoint is {checkpoint_url(output, 3)}"
        assert of_rank["three"].startswith(f"3 saves in a row failed; {good}; ") and of_rank["step"] == 7
    assert committed_steps(output) == [1, 3]
    assert capfd.readouterr().err.count(" failed: ") == 4

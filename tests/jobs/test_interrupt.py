"""Ctrl-C on a command that started Ray: nothing of it is left, and what was committed goes on.

The same on `ldm serve` is a part of tests/test_readme.py.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from ldm.autoencoder import Autoencoder
from pipelines.train.checkpoint import committed_steps, newest_checkpoint
from tests.pictures import kl_model, latent_dataset
from tests.processes import named

pytestmark = [pytest.mark.ray, pytest.mark.faults]
ROOT = Path(__file__).parents[2]


def interrupt_when(
    command: list[str], ready: Callable[[], bool], place: Path, again_after: str = ""
) -> tuple[int, str, list[psutil.Process]]:
    """Starts `ldm COMMAND` in a process group of its own, presses Ctrl-C for the whole group once `ready`, and where
    it then is to say `again_after` once more.

    Returns (exit code, stderr, the processes of the family that still live 5 s after it).
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"PYTHONPATH": str(ROOT)}
    log = place / "stderr.txt"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs.cli", *command],
            stderr=stderr, stdout=subprocess.DEVNULL, cwd=place, env=environment, start_new_session=True,
            preexec_fn=_listen_to_ctrl_c,
        )  # fmt: skip
    try:
        _until(ready, process, log)
        family = psutil.Process(process.pid).children(recursive=True)
        assert any("raylet" in p.name() for p in family)
        os.killpg(process.pid, signal.SIGINT)
        if again_after:
            _until(lambda: again_after in log.read_text(), process, log)
            os.killpg(process.pid, signal.SIGINT)
        code = process.wait(timeout=60)
        _, alive = psutil.wait_procs(family, timeout=5)
        return code, log.read_text(), alive
    finally:
        if process.poll() is None:
            process.kill()


def _until(ready: Callable[[], bool], process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + 200
    while not ready():
        assert process.poll() is None, f"ended by itself: {log.read_text()}"
        assert time.monotonic() < deadline, f"was never ready: {log.read_text()}"
        time.sleep(0.1)


def _listen_to_ctrl_c() -> None:
    """A shell that starts the tests in the background has told them to ignore it, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def training(place: Path, *model: str) -> list[str]:
    """A command that goes on for ever, and takes no checkpoint by itself."""
    autoencoder = Autoencoder(kl_model())
    latent_dataset(str(place / "latents"), autoencoder)
    autoencoder.save(str(place / "latents" / "autoencoder"))
    settings = "global_batch_size=8 num_workers=1 checkpoint_every=1000000 tracking.enabled=false device=cpu"
    return ["train", "latents=latents", "output=run", *settings.split(), *model, "max_steps=1000000"]


def test_training(tmp_path: Path) -> None:
    """SIGTERM to a worker is answered by a checkpoint, Ctrl-C by one more and the end."""
    run = str(tmp_path / "run")
    model = "denoiser.hidden_size=16 denoiser.depth=1 denoiser.num_heads=2 denoiser.patch_size=1"
    command = training(tmp_path, *model.split())
    told: list[int] = []
    noticed: list[int] = []

    def ready() -> bool:
        if not told and "first step after" in (tmp_path / "stderr.txt").read_text():
            (worker,) = named("ray::RayTrainWorker")
            worker.terminate()
            told.append(worker.pid)
        noticed[:] = committed_steps(run)
        return bool(noticed)

    code, said, alive = interrupt_when(command, ready, tmp_path)
    assert code == 130, said
    assert alive == []
    steps = committed_steps(run)
    assert len(steps) == 2 and steps[0] == noticed[0]
    assert f"train: stopped at step {steps[1]:,} with the checkpoint {newest_checkpoint(run)}\n" in said
    assert "interrupted: what was committed stays usable" in said and "Traceback" not in said
    assert "a worker was lost" not in said
    dry_run = [sys.executable, "-m", "jobs.cli", *command, "--dry-run"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    again = subprocess.run(dry_run, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120)
    assert again.returncode == 0 and f"from {newest_checkpoint('run') or 'run/checkpoints/step-'}" in again.stdout


def test_training_that_cannot_take_a_checkpoint_ends_at_once_by_a_second_ctrl_c(tmp_path: Path) -> None:
    """Its step never comes to an end, so that the checkpoint which the first one asks for never comes."""
    halt = tmp_path / "halt"
    command = training(tmp_path, "denoiser.type=tests.pipelines.failing:Halting", f"denoiser.options.halt={halt}")

    def ready() -> bool:
        if "first step after" not in (tmp_path / "stderr.txt").read_text():
            return False
        halt.touch()
        return True

    code, said, alive = interrupt_when(command, ready, tmp_path, again_after="once more stops it at once")
    assert code == 130, said
    assert alive == []
    assert committed_steps(str(tmp_path / "run")) == [] and "stopped at step" not in said
    assert "interrupted: what was committed stays usable" in said and "Traceback" not in said

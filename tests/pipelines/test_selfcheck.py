"""`ldm verify --resume`: what counts as a difference, and the check itself on real workers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs import cli
from ldm.autoencoder import Autoencoder
from pipelines.train.checkpoint import checkpoint_url
from pipelines.train.checkpoint_files import Range, write_file, write_marker
from pipelines.train.selfcheck import Difference, ResumeCheckConfig, compare, report
from tests.pictures import kl_model, latent_dataset

KINDS = ("master", "exp_avg", "exp_avg_sq", "ema.main", "ema.short")


def finished_run(output: Path, changes: dict[str, float] | None = None, losses: tuple[float, ...] = (0.5, 0.25)) -> str:
    """The checkpoints of a run of one parameter (2, 3); changes: what is added to element 4 of a kind at the end."""
    for step, loss in zip((2, 4), losses, strict=True):
        url = checkpoint_url(str(output), step)
        columns = {kind: [torch.arange(6.0) + 1] for kind in KINDS}
        for kind, change in (changes or {}).items():
            columns[kind][0][4] += change * (step == 4)
        entry = write_file(url, "rank-00000-of-00001", [Range("w", 0, 6, (2, 3))], columns)
        marker = {"world": 1, "stage": 0, "optimizer_step": step, "files": [entry]}
        marker |= {"ema": {"main": {}, "short": {}}, "progress": {"step": step, "images_seen": 8 * step, "loss": loss}}
        write_marker(url, marker)
    return str(output)


def test_one_bit_is_a_difference_and_is_named(tmp_path: Path) -> None:
    first = finished_run(tmp_path / "first")
    same = compare(first, finished_run(tmp_path / "same"))
    assert (same.first, same.largest, same.compared) == ("", 0.0, 5 * 6 + 2)
    bit = 2.0**-21  # the last one of 5
    other = compare(first, finished_run(tmp_path / "bit", {"exp_avg_sq": bit, "ema.short": 1.0}))
    assert other.first == f"exp_avg_sq/w[4]: 5.0 != {5 + bit} (1 of 6 differ)"
    assert other.by_kind["exp_avg_sq"] == bit and other.largest == 1.0 and other.by_kind["master"] == 0
    loss = compare(first, finished_run(tmp_path / "loss", losses=(0.5, 0.375)))
    assert (loss.first, loss.largest) == ("loss/step 4[0]: 0.25 != 0.375 (1 of 1 differ)", 0.125)
    broken = compare(first, finished_run(tmp_path / "nan", {"master": float("nan")}))
    assert broken.largest == float("inf")


@pytest.mark.parametrize(
    ("floor", "found", "verdict", "code"),
    [
        ({"master": 0.0, "loss": 0.0}, {"master": 0.0, "loss": 0.0}, "equal", 0),
        ({"master": 1e-6, "loss": 1e-5}, {"master": 2e-6, "loss": 0.0}, "within the floor", 0),
        ({"master": 1e-6, "loss": 1e-5}, {"master": 3e-6, "loss": 0.0}, "different", 1),  # the loss's floor is no help
        ({"master": 0.0, "loss": 0.0}, {"master": 1e-9, "loss": 0.0}, "different", 1),
    ],
)
def test_a_difference_is_held_against_the_floor_of_its_kind(
    floor: dict[str, float], found: dict[str, float], verdict: str, code: int
) -> None:
    config = ResumeCheckConfig(latents="l", output="o")
    first = "master/w[0]: 1.0 != 2.0 (1 of 6 differ)" if any(found.values()) else ""
    made = report(config, Difference(floor), Difference(found, first), [6])
    assert (made.verdict, made.ok, made.exit_code, made.first_difference) == (verdict, not code, code, first)
    for kills in ([], [24]):
        with pytest.raises(RuntimeError, match="the run was over before its worker could be killed"):
            report(config, Difference(floor), Difference(found, first), kills)


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    autoencoder = Autoencoder(kl_model())
    latent_dataset(str(tmp_path / "latents"), autoencoder)
    autoencoder.save(str(tmp_path / "latents" / "autoencoder"))
    keys: dict[str, Any] = {"latents": tmp_path / "latents", "output": tmp_path / "scratch", "num_workers": 2}
    keys |= {"global_batch_size": 8, "learning_rate": 1e-2, "device": "cpu", "denoiser.hidden_size": 16}
    keys |= {"denoiser.depth": 1, "denoiser.num_heads": 2, "denoiser.patch_size": 1}
    return ["verify", "--resume", *(f"{key}={value}" for key, value in keys.items())]


def test_the_command_is_part_of_verify(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*command, "--dry-run"]) == 0
    assert "three runs of 24 steps on 2 workers" in capsys.readouterr().out
    assert not (tmp_path / "scratch").exists()
    assert cli.main([*command, "steps=6"]) == 2 and "steps=6: " in capsys.readouterr().err
    assert cli.main([*command, "num_workers=3"]) == 2 and "num_workers=3 does not divide" in capsys.readouterr().err
    assert cli.main(["verify", "--help"]) == 0
    said = capsys.readouterr().out
    assert "usage: ldm verify --resume [--config NAME_OR_FILE]" in said and "\n  steps  (" in said


@pytest.mark.faults
@pytest.mark.ray
def test_a_killed_worker_changes_no_bit(
    command: list[str], ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = cli.main([*command, "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    found = json.loads(captured.out)
    assert (found["ok"], found["verdict"], found["floor"], found["difference"]) == (True, "equal", 0.0, 0.0)
    assert "(a training worker)" in captured.err and 6 <= found["resumed_from"] < 24 and found["compared"] > 1000
    assert not (tmp_path / "scratch").exists()

"""The demonstration, shortened: the same commands on the same digits, with fewer steps."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import cli
from ldm.snapshot import read_snapshot

pytestmark = [pytest.mark.ray, pytest.mark.faults, pytest.mark.timeout(1200)]  # the whole path, and four trainings

SHORTER: dict[str, dict[str, Any]] = {
    "demo-first-stage": {"epochs": 1},
    "demo-train": {"max_steps": 12, "checkpoint_every": 6, "log_every": 3},
    "demo-evaluate": {"num_images": 40, "num_inference_steps": 4},
    "demo-sample": {"num_inference_steps": 4},
}


@pytest.fixture
def shorter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The packaged configs with fewer steps."""
    shutil.copytree(cli.CONFIGS, tmp_path / "configs")
    for name, changes in SHORTER.items():
        path = tmp_path / "configs" / f"{name}.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))
    monkeypatch.setattr(cli, "CONFIGS", tmp_path / "configs")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")


def test_the_whole_path(shorter: None, ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "demo"
    code = cli.main(["demo", f"folder={folder}"])
    said = capsys.readouterr().err
    assert code == 0, said
    assert "1,799 = 1,797 encoded + 0 filtered + 2 quarantined" in said
    assert "(a training worker)" in said  # the kill happened
    assert "resumed == uninterrupted: yes (" in said
    assert "$ ldm train --config demo-train latents=" in said
    assert "first samples, " in said and "mlflow ui --backend-store-uri" in said
    for picture in ("first-grid/grid.png", "evaluation/grid.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    snapshot = sorted((folder / "run" / "snapshots").iterdir())[-1]
    assert read_snapshot(str(snapshot)).conditioning.num_classes == 10

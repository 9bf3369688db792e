"""`ldm convert` of models as one calls it; the commands of the README run as they stand there."""

import json
from pathlib import Path

import pytest
import torch

from jobs import cli
from ldm.autoencoder import load_autoencoder
from ldm.snapshot import read_snapshot
from tests.ldm.exchanging import write
from tests.ldm.test_original import checkpoint
from tests.pictures import kl_model
from tests.test_readme import commands_of


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the README's commands find what they name."""
    monkeypatch.chdir(tmp_path)
    kl_model().save_pretrained(tmp_path / "vae")
    write(tmp_path / "run" / "snapshots" / "step-0000000030", load_autoencoder("vae"), "vae")
    torch.save(checkpoint(hidden_size=384), tmp_path / "DiT-XL-2-256x256.pt")
    return tmp_path


def run(command: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = cli.main(command.split())
    out, err = capsys.readouterr()
    return code, out, err


def test_the_commands_of_the_readme(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in commands_of("Models in and out"):
        assert command[:2] == ["ldm", "convert"]
        assert cli.main([*command[1:], "--dry-run"]) == 0
        assert not Path(command[-1].partition("=")[2]).exists()
        assert cli.main(command[1:]) == 0, capsys.readouterr().err
    capsys.readouterr()
    before, back = (read_snapshot(url) for url in ("run/snapshots/step-0000000030", "back"))
    assert back.weights_sha256 == before.weights_sha256
    code, out, _ = run("sample snapshot=dit-xl-2 num_images=2 batch_size=2 num_inference_steps=2 --json", capsys)
    assert code == 0 and json.loads(out)["images"] == 2


def test_reports_and_notes(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run("convert from=DiT-XL-2-256x256.pt autoencoder=vae output=dit --json", capsys)
    report = json.loads(out)
    assert code == 0 and (report["snapshot"], report["num_classes"], report["latent_shape"]) == ("dit", 10, [4, 4, 4])
    for note in report["notes"]:
        assert f"convert: {note}\n" in err
    code, out, _ = run("convert dit to=diffusers output=there --json", capsys)
    assert code == 0 and json.loads(out)["notes"][0].startswith("not exact: ")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("convert vae", "ldm convert: give one of table=, to=, from=; see 'ldm convert --help'"),
        ("convert vae to=onnx output=x", "to=onnx: input should be 'diffusers'"),
        ("convert vae to=diffusers output=x", "snapshot=vae: is no snapshot (no snapshot.json); give one that"),
        ("convert run/snapshots/step-0000000030 to=diffusers", "output: missing; give output=VALUE"),
        ("convert run/snapshots/step-0000000030 to=diffusers output=vae", "output=vae: holds something already"),
        ("convert from=vae output=x", "from=vae: holds no model_index.json; give a folder of diffusers' DiTPipeline"),
        ("convert from=DiT-XL-2-256x256.pt output=x", "autoencoder: missing; a .pt has none, give the one"),
        ("convert from=vae output=x num_head=3", "num_head=3: unknown key; did you mean 'num_heads'?"),
        ("convert from=vae table=t.csv", "from=vae: unknown key"),
    ],
)
def test_wrong_requests(place: Path, command: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(command, capsys)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {said}") and err.count("\n") == 1
    assert not (place / "x").exists()


def test_help_and_config_name_from_as_one_types_it(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run("convert --help", capsys)
    for key in ("table", "to", "from", "num_heads"):
        assert f"\n  {key}  (" in out
    _, out, _ = run("convert from=a output=b --print-config", capsys)
    assert out.startswith("from: a\noutput: b\n")

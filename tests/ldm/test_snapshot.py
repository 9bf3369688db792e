"""The snapshot: what was written is what samples, and nothing in it is executed or trusted unseen."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from ldm import snapshot as snapshot_module
from ldm.config import RequestError
from ldm.denoiser import DenoiserConfig, build_denoiser
from ldm.diffusion import DiffusionConfig
from ldm.latents.manifest import Conditioning
from ldm.latents.receipt import Statistics
from ldm.snapshot import read_snapshot, write_snapshot
from tests.pictures import TINY_DIT, kl_model, some_fingerprint, write_tiny_snapshot

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def place(kl, kl_folder, tmp_path):
    """A snapshot that a test may damage."""
    url = str(tmp_path / "snapshot")
    write_tiny_snapshot(url, kl, str(kl_folder))
    return url


def edit(url: str, **changes: object) -> None:
    file = Path(url) / "snapshot.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_round_trip(place, kl):
    found = read_snapshot(place)
    assert found.diffusion_config == DiffusionConfig(schedule="cosine", prediction_type="v_prediction")
    assert found.statistics == Statistics((0.1, 0.2, 0.3, 0.4), (1.0, 2.0, 0.5, 1.5))
    assert found.conditioning == Conditioning("class", 3, ("apple", "pear", "plum"))
    assert (found.latent_shape, found.step, found.images_seen) == ((4, 4, 4), 7, 700)
    assert found.fingerprint == some_fingerprint(kl, 8)
    denoiser, autoencoder = found.load_denoiser(), found.load_autoencoder()
    expected = build_denoiser(TINY_DIT, in_channels=4, sample_size=(4, 4), num_classes=3)
    assert denoiser.state_dict().keys() == expected.state_dict().keys()
    assert all((v != 0).any() for v in denoiser.state_dict().values())  # those of the file, not fresh ones
    assert not denoiser.training and not any(p.requires_grad for p in denoiser.parameters())
    assert autoencoder.weights_sha256 == kl.weights_sha256


def test_written_twice_it_is_the_same(place, kl, kl_folder, tmp_path):
    write_tiny_snapshot(str(tmp_path / "again"), kl, str(kl_folder))
    for path in sorted(Path(place).rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "again" / path.relative_to(place)).read_bytes()


def test_at_a_url(kl, kl_folder, s3, tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path))
    write_tiny_snapshot(f"{s3}/snapshot", kl, str(kl_folder))
    found = read_snapshot(f"{s3}/snapshot")
    assert found.load_autoencoder().weights_sha256 == kl.weights_sha256
    x, t, labels = torch.ones(1, 4, 4, 4), torch.tensor([3]), torch.tensor([1])
    write_tiny_snapshot(str(tmp_path / "local"), kl, f"{s3}/snapshot/autoencoder")
    local = read_snapshot(str(tmp_path / "local")).load_denoiser()
    assert torch.equal(found.load_denoiser()(x, t, labels), local(x, t, labels))


def test_snapshots_of_a_run_share_one_autoencoder(place, kl, tmp_path):
    again = tmp_path / "again"
    write_tiny_snapshot(str(again), kl, f"{place}/autoencoder")
    name = "autoencoder/diffusion_pytorch_model.safetensors"
    assert (again / name).stat().st_ino == (Path(place) / name).stat().st_ino
    assert not [p for p in again.rglob("*.tmp")]


@pytest.mark.parametrize("content", [None, "{", "[]", '{"format": "ldm-latents"}', "3"])
def test_what_is_no_snapshot(tmp_path, content):
    if content is not None:
        (tmp_path / "snapshot.json").write_text(content)
    with pytest.raises(RequestError, match=r"^init_from=.*snapshot\.json") as caught:
        read_snapshot(str(tmp_path), "init_from")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": None}, r"snapshot.json is damaged \(version=None\)"),
        ({"diffusion": {"schedule": "sigmoid"}}, r"snapshot.json: diffusion\.schedule=sigmoid: input should be"),
        ({"diffusion": {"shift": 0}}, r"snapshot.json: diffusion\.shift=0: "),
    ],
)
def test_a_damaged_description_names_the_snapshot(place, changes, message):
    edit(place, **changes)
    with pytest.raises(RequestError, match=f"^init_from={place}: {message}") as caught:
        read_snapshot(place, "init_from")
    assert "\n" not in str(caught.value)


def test_a_newer_format_is_refused(place):
    edit(place, version=2)
    with pytest.raises(RequestError, match="has format version 2, this program reads up to 1"):
        read_snapshot(place)


def test_a_partial_snapshot_is_none(place):
    (Path(place) / "snapshot.json").unlink()
    with pytest.raises(RequestError, match=r"is no snapshot \(no snapshot\.json\)"):
        read_snapshot(place)


def test_it_is_written_last(kl, kl_folder, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(snapshot_module, "copy_autoencoder", fail)
    with pytest.raises(OSError, match="the disk is full"):
        write_tiny_snapshot(str(tmp_path / "x"), kl, str(kl_folder))
    assert not (tmp_path / "x" / "snapshot.json").exists()


def test_damaged_weights_are_refused(place):
    file = Path(place) / "denoiser.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"denoiser\.safetensors: does not have the hash that snapshot\.json names"):
        read_snapshot(place).load_denoiser()


def test_another_autoencoder_is_refused(place):
    kl_model(seed=5).save_pretrained(f"{place}/autoencoder")
    with pytest.raises(ValueError, match="its weights are not those that the snapshot was trained with"):
        read_snapshot(place).load_autoencoder()


def test_an_unconditional_model(kl, kl_folder, tmp_path):
    write_tiny_snapshot(str(tmp_path / "x"), kl, str(kl_folder), conditioning=Conditioning())
    found = read_snapshot(str(tmp_path / "x"))
    assert found.conditioning == Conditioning()
    assert found.load_denoiser()(torch.ones(2, 4, 4, 4), torch.tensor([1, 2]), None).shape == (2, 4, 4, 4)


@pytest.fixture
def custom(kl, kl_folder, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    config = DenoiserConfig(type="custom_denoiser:MyDenoiser", options={"width": 8})
    write_tiny_snapshot(str(tmp_path / "custom"), kl, str(kl_folder), denoiser_config=config)
    return str(tmp_path / "custom")


def test_a_custom_class_comes_from_the_caller(custom):
    found = read_snapshot(custom)
    denoiser = found.load_denoiser(denoiser_type="custom_denoiser:MyDenoiser")
    assert type(denoiser).__name__ == "MyDenoiser" and denoiser.first.out_channels == 8
    with pytest.raises(RequestError, match=r"^denoiser_type=null: .* give denoiser_type=package\.module:Class$"):
        found.load_denoiser()
    with pytest.raises(RequestError):
        found.load_denoiser(denoiser_type="absent_package:MyDenoiser")


def test_a_snapshot_never_names_code_to_import(custom, place, tmp_path, monkeypatch):
    assert "custom_denoiser" not in (Path(custom) / "snapshot.json").read_text()
    trap = tmp_path / "trap.py"
    trap.write_text("raise SystemExit('executed')")
    monkeypatch.syspath_prepend(str(tmp_path))
    denoiser = json.loads((Path(place) / "snapshot.json").read_text())["denoiser"]
    for kind in ("trap:Denoiser", "custom", "trap"):
        edit(place, denoiser={**denoiser, "type": kind})
        with pytest.raises(RequestError, match="^denoiser_type=null"):
            read_snapshot(place).load_denoiser()
    assert "trap" not in sys.modules
    # Nor does its autoencoder.
    config = Path(place) / "autoencoder" / "config.json"
    values = json.loads(config.read_text())
    config.unlink()  # it may be a link to the original
    config.write_text(json.dumps({**values, "_class_name": "trap"}))
    with pytest.raises(RequestError, match="is a trap, expected one of AutoencoderKL"):
        read_snapshot(place).load_autoencoder()


def test_a_copied_snapshot_works(place, tmp_path):
    shutil.copytree(place, tmp_path / "moved")
    shutil.rmtree(place)
    found = read_snapshot(str(tmp_path / "moved"))
    assert found.load_denoiser() is not None and found.load_autoencoder() is not None


def test_overwriting_with_another_autoencoder(place, kl, tmp_path):
    """The second snapshot at one place is whole too."""
    from ldm.autoencoder import Autoencoder

    other = Autoencoder(kl_model(seed=5))
    other.save(str(tmp_path / "other"))
    write_tiny_snapshot(place, other, str(tmp_path / "other"))
    assert read_snapshot(place).load_autoencoder().weights_sha256 == other.weights_sha256
    write_tiny_snapshot(place, other, str(tmp_path / "other"))
    assert not [p for p in Path(place).rglob("*.tmp")]


def test_write_snapshot_names_its_arguments(kl, kl_folder, tmp_path):
    with pytest.raises(TypeError):
        write_snapshot(str(tmp_path), {})  # type: ignore[call-arg]

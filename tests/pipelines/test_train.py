"""Training end to end: report, snapshot and pictures; the same stream on any world; denoisers of one's own."""

from pathlib import Path

import pytest
import torch

from ldm import storage
from ldm.autoencoder import load_autoencoder
from ldm.config import RequestError, parse, validate
from ldm.denoiser import DenoiserConfig
from ldm.latents.manifest import Conditioning
from ldm.sampling import SampleConfig, sample
from ldm.snapshot import read_snapshot
from pipelines.train import TrainConfig, plan, train
from pipelines.train.checkpoint import newest_checkpoint, read_full
from tests.ldm.exchanging import write
from tests.pipelines.training import SMALL, Run, assert_bitwise, config, state


@pytest.mark.ray
def test_a_run_reports_and_leaves_a_snapshot_that_draws(latents: str, uninterrupted: Run, tmp_path: Path) -> None:
    report = uninterrupted.report
    assert (report.step, report.images_seen) == (8, 64)
    assert report.loss is not None and 0.1 < report.loss < 2.0
    assert report.checkpoint == newest_checkpoint(str(uninterrupted.output))
    assert len(storage.list_dir(str(uninterrupted.output / "checkpoints"))) == 3  # keep_last
    kept = sum(path.stat().st_size for path in uninterrupted.output.rglob("*.safetensors") if path.stat().st_nlink == 1)
    estimate = plan(config(latents, tmp_path / "new")).output_bytes
    assert kept * 96 / 76 == pytest.approx(estimate, rel=0.1), "4 checkpoints at a time, of which 3 stay; 4 snapshots"
    assert train(config(latents, uninterrupted.output)).snapshot == report.snapshot  # again: nothing is left to do
    snapshot = read_snapshot(report.snapshot)
    assert (snapshot.step, snapshot.images_seen, snapshot.conditioning.num_classes) == (8, 64, 3)
    assert_bitwise(dict(snapshot.load_denoiser().state_dict()), read_full(report.checkpoint, "ema.main"))
    drawn = sample(
        SampleConfig(snapshot=report.snapshot, output=str(tmp_path), num_images=3, num_inference_steps=2, batch_size=2)
    )
    assert drawn.images == 3 and len(list(tmp_path.glob("00000?.png"))) == 3


@pytest.mark.ray
def test_another_world_stage_and_micro_batch_see_the_same_stream(
    latents: str, uninterrupted: Run, tmp_path: Path
) -> None:
    """4 steps on two ZeRO-2 workers, then 4 on one ZeRO-0 worker in micro-batches: the same run but for rounding."""
    output = uninterrupted.rewound(tmp_path / "other-world")
    report = train(config(latents, output, num_workers=1, zero_stage=0, micro_batch_size=4))
    assert storage.read_json(storage.join(report.checkpoint, "checkpoint.json"))["world"] == 1
    expected, found = state(uninterrupted.output), state(output)
    began = read_full(storage.join(str(output), "checkpoints", "step-0000000004"), "master")
    moved = 0.0
    for name, tensor in expected.items():
        if name.startswith("master/"):
            if name.endswith("qkv.bias"):  # softmax does not see the keys' bias: its gradient is rounding, which Adam
                width = len(tensor) // 3  # makes into steps of any size
                tensor, found[name] = (torch.cat([t[:width], t[2 * width :]]) for t in (tensor, found[name]))
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6, msg=name)
            if name.endswith("weight"):
                moved = max(moved, float((tensor - began[name.removeprefix("master/")]).abs().max()))
    assert moved > 0.01


@pytest.mark.ray
def test_a_denoiser_of_ones_own_plugs_in_by_name(
    latents: str, ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    mine = {"type": "custom_denoiser:MyDenoiser", "options": {"width": 8}}
    values = {**SMALL, "latents": latents, "output": str(tmp_path / "run"), "tracking": {"enabled": False}}
    values |= {"denoiser": mine, "max_steps": 2, "num_workers": 1}
    report = train(parse(TrainConfig, [("test", values)]))
    draw = {"snapshot": report.snapshot, "output": str(tmp_path), "num_images": 2, "num_inference_steps": 2}
    with pytest.raises(RequestError, match="denoiser_type=null: .* give denoiser_type=package.module:Class"):
        sample(SampleConfig(**draw))
    assert sample(SampleConfig(**draw, denoiser_type="custom_denoiser:MyDenoiser")).images == 2


@pytest.mark.faults
@pytest.mark.ray
def test_workers_that_fail_to_the_end_are_an_error_with_the_cause(
    latents: str, ray_session: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    failing = {"type": "tests.pipelines.failing:Failing"}
    values = {**SMALL, "latents": latents, "output": str(tmp_path / "run"), "tracking": {"enabled": False}}
    with pytest.raises(RuntimeError, match=r"training failed: .*this very denoiser"):
        train(parse(TrainConfig, [("test", {**values, "denoiser": failing, "max_failures": 1})]))
    assert capfd.readouterr().err.count("train: a worker failed (rank ") == 1


@pytest.mark.ray
def test_a_unet_trains_from_a_snapshot_of_other_classes(
    latents: str, ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The U-Net through train, snapshot and sample; `init_from` with five classes where these latents have three."""
    unet = {"model_channels": 8, "channel_multipliers": [1, 2], "attention_resolutions": [2]}
    denoiser = {"type": "unet", "unet": {**unet, "head_channels": 8, "norm_groups": 4}}
    autoencoder = str(Path(latents) / "autoencoder")
    before = write(
        tmp_path / "before",
        load_autoencoder(autoencoder),
        autoencoder,
        denoiser_config=validate(DenoiserConfig, denoiser),
        conditioning=Conditioning("class", 5),
        latent_shape=(4, 2, 2),
    )
    options = {"denoiser": denoiser, "max_steps": 2, "num_workers": 1, "init_from": before, "learning_rate": 1e-12}
    report = train(config(latents, tmp_path / "run", **options))
    said = capsys.readouterr().err
    assert "train: init_from: 5 classes become 3: the rows of classes 0 to 2 and of the null class are kept" in said
    assert said.count("train: micro_batch_size=auto: 8 (estimate: ") == 1, "what rank 0 tells is shown by the driver"
    old, new = (read_snapshot(url).load_denoiser().state_dict() for url in (before, report.snapshot))
    old["unet.class_embedding.weight"] = old["unet.class_embedding.weight"][[0, 1, 2, 5]]
    torch.testing.assert_close(new, old, rtol=0, atol=1e-6)
    drawn = SampleConfig(snapshot=report.snapshot, output=str(tmp_path / "samples"), num_images=3, batch_size=3)
    assert sample(drawn.model_copy(update={"num_inference_steps": 2, "guidance_scale": 2.0})).images == 3
    assert plan(config(latents, tmp_path / "run", **options)).notes == ()  # it goes on from its own

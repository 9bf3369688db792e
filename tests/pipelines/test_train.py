"""Training end to end: exact resume after a kill, the same stream on any world size, refusals before any work."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm import storage
from ldm.autoencoder import Autoencoder, load_autoencoder
from ldm.config import RequestError, parse, validate
from ldm.denoiser import DenoiserConfig
from ldm.latents.dataset import LatentDataset
from ldm.latents.manifest import Conditioning
from ldm.sampling import SampleConfig, sample
from ldm.snapshot import read_snapshot
from pipelines.train import TrainConfig, TrainReport, plan, train
from pipelines.train.checkpoint import newest_checkpoint, read_full
from tests.ldm.exchanging import write
from tests.pictures import kl_model, latent_dataset
from tests.pipelines import tiny
from tests.pipelines.killing import Killer

SMALL: dict[str, Any] = {
    "max_steps": 8,
    "checkpoint_every": 2,
    "log_every": 2,
    "global_batch_size": 8,
    "num_workers": 2,
    "learning_rate": 1e-2,
    "device": "cpu",
    "validation": {"grid": 0},
    "denoiser": {"hidden_size": 16, "depth": 1, "num_heads": 2, "patch_size": 1},
}


def config(latents: str, output: Path | str, **changes: Any) -> TrainConfig:
    values = {"latents": latents, "output": str(output), "tracking": {"enabled": False}, **SMALL}
    return parse(TrainConfig, [("test", values), ("changes", changes)])


def state(output: Path | str) -> dict[str, torch.Tensor]:
    """All that the newest checkpoint holds of weights, moments and average."""
    checkpoint = newest_checkpoint(str(output))
    assert checkpoint is not None
    kinds = ("master", "exp_avg", "exp_avg_sq", "ema.main")
    return {f"{kind}/{name}": tensor for kind in kinds for name, tensor in read_full(checkpoint, kind).items()}


def assert_bitwise(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


@dataclass(frozen=True)
class Run:
    """A run of 8 steps that nothing disturbed."""

    output: Path
    uri: str  # of its tracking
    report: TrainReport

    def rewound(self, output: Path) -> Path:
        """A copy that stands at step 4, where the later checkpoints were lost but their points are logged."""
        shutil.copytree(self.output, output)
        for step in (6, 8):
            shutil.rmtree(output / "checkpoints" / f"step-{step:010d}")
        return output


@pytest.fixture(scope="module")
def uninterrupted(latents: str, ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Run:
    place = tmp_path_factory.mktemp("runs")
    uri = f"sqlite:///{place}/mlflow.db"
    report = train(config(latents, place / "run", tracking=tracked(uri)))
    return Run(place / "run", uri, report)


def tracked(uri: str) -> dict[str, Any]:
    return {"enabled": True, "uri": uri, "experiment": "test"}


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


@pytest.mark.faults
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_worker_killed_with_sigkill_changes_no_bit(latents: str, ray_session: None, tmp_path: Path) -> None:
    """Three times in one run, so that a resume is resumed."""
    from mlflow import MlflowClient

    found = []
    for name, times in (("killed", 3), ("undisturbed", 0)):
        uri, output = f"sqlite:///{tmp_path}/{name}.db", tmp_path / name
        killer = Killer(str(output), times, spread_s=0.1)
        killer.start()
        long = {"max_steps": 60, "checkpoint_every": 6, "log_every": 6}
        report = train(config(latents, output, tracking=tracked(uri), **long))
        killer.over.set()
        killer.join()
        assert len(killer.kills) == times and report.step == 60
        history = MlflowClient(uri).get_metric_history(str(report.run_id), "train/loss")
        found.append((state(output), [(point.step, point.value) for point in history]))
    assert_bitwise(found[0][0], found[1][0])
    assert found[0][1] == found[1][1] and len(found[0][1]) == 10


@pytest.mark.ray
def test_the_same_command_goes_on_with_the_same_bits_and_logs_no_point_twice(
    latents: str, uninterrupted: Run, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    output = uninterrupted.rewound(tmp_path / "run")
    again = config(latents, output, resume="required", tracking=tracked(uninterrupted.uri), max_steps=10)
    report = train(again)
    assert (report.step, report.run_id) == (10, uninterrupted.report.run_id)
    first_part = [
        read_full(storage.join(place, "checkpoints", "step-0000000008"), "master")
        for place in (str(output), str(uninterrupted.output))
    ]
    assert_bitwise(*first_part)
    client = MlflowClient(uninterrupted.uri)
    assert [run.info.run_id for run in client.search_runs(["1"])] == [report.run_id]
    assert client.get_run(report.run_id).info.status == "FINISHED"
    points = client.get_metric_history(report.run_id, "train/loss")
    assert [point.step for point in points] == [16, 32, 48, 64, 80]  # images seen
    run = client.get_run(report.run_id)
    assert run.data.params["denoiser.hidden_size"] == "16"
    (data,) = run.inputs.dataset_inputs
    assert (data.dataset.digest, data.tags[0].value) == (plan(again).generations[0], "training")
    models = {output.step: client.get_logged_model(output.model_id) for output in run.outputs.model_outputs}
    assert sorted(models) == [16, 32, 48, 64, 80]  # each snapshot once, at its images seen
    assert models[80].params["snapshot"] == report.snapshot


@pytest.mark.ray
def test_what_mlflow_missed_of_a_finished_run_the_same_command_sends(
    latents: str, uninterrupted: Run, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    output, run_id = tmp_path / "run", uninterrupted.report.run_id
    shutil.copytree(uninterrupted.output, output)
    kept = {"uri": uninterrupted.uri, "run_id": run_id, "kind": "Tags", "tags": {"late": "yes"}}
    (output / "tracking").mkdir(exist_ok=True)
    (output / "tracking" / "backlog-1.jsonl").write_text(json.dumps(kept) + "\n")
    assert train(config(latents, output, tracking=tracked(uninterrupted.uri))).run_id == run_id
    run = MlflowClient(uninterrupted.uri).get_run(run_id)
    assert run.data.tags["late"] == "yes" and run.info.status == "FINISHED"
    assert list((output / "tracking").iterdir()) == []


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
def test_a_damaged_checkpoint_is_an_error_with_the_cause_and_can_be_gone_back_from(
    latents: str, uninterrupted: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient

    output, tracking = tmp_path / "run", tracked(uninterrupted.uri)
    shutil.copytree(uninterrupted.output, output)
    checkpoint = newest_checkpoint(str(output))
    damaged = next(path for path in Path(str(checkpoint)).glob("rank-*.safetensors"))
    tiny.flip(damaged)
    with pytest.raises(RuntimeError, match=rf"training failed: .*{damaged.name}.* give resume_from=6 to go on from"):
        train(config(latents, output, max_steps=9))
    assert "a worker failed" not in capfd.readouterr().err, "starting again would not cure it"
    tiny.flip(Path(str(checkpoint)) / "checkpoint.json")
    with pytest.raises(
        RequestError, match=r"resume_from=5: .* has no checkpoint of that step; it has those of 4, 6, 8$"
    ):
        plan(config(latents, output, resume_from=5))
    assert plan(config(latents, output, resume_from=6)).output_bytes > 0
    assert train(config(latents, output, resume_from=6, max_steps=7, tracking=tracking)).step == 7
    assert not (output / "snapshots" / "step-0000000008" / "snapshot.json").exists(), "of the branch that was left"
    report = train(config(latents, output, resume_from=6, tracking=tracking))
    assert report.step == 8, "the same command goes on, and does not go back again"
    assert_bitwise(state(output), state(uninterrupted.output))
    assert report.run_id != uninterrupted.report.run_id
    points = MlflowClient(uninterrupted.uri).get_metric_history(report.run_id, "train/loss")
    assert [point.step for point in points] == [56, 64]


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents": "/nowhere"}, "latents=/nowhere: is no latent dataset"),
        ({"num_workers": 3}, "global_batch_size=8: num_workers=3 does not divide it; give 9"),
        ({"num_workers": [3, 3]}, "global_batch_size=8: num_workers=3 does not divide it; give 9"),
        ({"num_workers": [5, 7]}, r"num_workers=\[5, 7\]: none of these divides .*=8; give a range with 4 in it"),
        ({"num_workers": [4, 1]}, r"num_workers=\[4, 1\]: should be \[least, most\]; give \[1, 4\]"),
        ({"num_workers": 0}, "num_workers=0: input should be greater than 0"),
        ({"num_workers": [1, 2], "micro_batch_size": 3}, "micro_batch_size=3: .* share of 8 or 4"),
        ({"micro_batch_size": 3}, "micro_batch_size=3: does not divide a worker's share of 4"),
        ({"zero_stage": 7}, "zero_stage=7: should be 0, 1, 2 or 3"),
        ({"denoiser": {"patch_size": 3}}, "denoiser.patch_size=3: does not divide the latent size 2x2"),
        ({"denoiser": {"type": "no.such:Thing"}}, "denoiser.type=no.such:Thing: cannot import"),
        ({"diffusion": {"min_snr_gamma": 2}}, "diffusion.min_snr_gamma=2.0: is for diffusion.loss_weighting=min_snr; "),
        (
            {"diffusion": {"schedule": "flow", "logit_mean": 0.5}},
            "diffusion.logit_mean=0.5: is for diffusion.timestep_sampling=logit_normal; leave it out",
        ),
        ({"resume": "required"}, "resume=required: .* holds no checkpoint"),
        ({"init_from": "/nowhere"}, "init_from=/nowhere: is no snapshot"),
        ({"holdout": 0.999999}, "the train split holds no sample"),
        ({"holdout": 1e-9}, "the holdout split holds no sample"),
        ({"micro_batch_size": 0}, "micro_batch_size=0: input should be greater than 0"),
        (
            {"validation": {"grid": 4, "guidance_scale": 3}, "denoiser": {"label_dropout": 0}},
            "validation.guidance_scale=3.0: denoiser.label_dropout=0 trains no null class; must be 1",
        ),
        (
            {
                "validation": {"grid": 4, "num_inference_steps": 25},
                "diffusion": {"num_train_timesteps": 20, "schedule": "cosine"},
            },
            "validation.num_inference_steps=25: ",
        ),
        ({"max_steps": 10**13}, "output=.*run: needs about .* TB, but .* are free; give an output on a larger disk"),
    ],
)
def test_a_wrong_request_is_refused_before_any_work(
    latents: str, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        train(config(**{"latents": latents, "output": tmp_path / "run", **changes}))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.ray
def test_a_run_goes_on_only_as_it_began(latents: str, uninterrupted: Run) -> None:
    output = uninterrupted.output
    with pytest.raises(RequestError, match=r"other settings \(learning_rate: 0.01 != 0.1\)"):
        plan(config(latents, output, learning_rate=0.1))
    with pytest.raises(RequestError, match="resume=never: .* holds a run"):
        plan(config(latents, output, resume="never"))
    assert plan(config(latents, output, max_steps=100, num_workers=4, zero_stage=3)).checkpoint is not None


@pytest.mark.ray
def test_what_is_excluded_while_a_run_rests_stays_excluded(
    latents: str, uninterrupted: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The run keeps the list: it goes on without the file, and without taking anything from it."""
    output, listed = tmp_path / "run", tmp_path / "gone.txt"
    shutil.copytree(uninterrupted.output, output)
    before = LatentDataset(latents, global_batch_size=8)
    gone = before.batch(8).ids[:3].tolist()  # what the next step would have read
    listed.write_text("".join(f"{identity}\n" for identity in gone))
    assert train(config(latents, output, max_steps=10, exclude=str(listed))).step == 10
    assert "42 samples (left out: 3 by exclude)" in capfd.readouterr().err
    record = storage.read_json(str(output / "run.json"))
    assert list(record["exclusions"]) == ["8"] and record["chosen"]["left_out"] == {"exclude": 3}
    listed.write_text(f"{gone[0]}\n")
    with pytest.raises(RequestError, match=r"exclude=.*: lacks 2 of the 3 ids that the run leaves out already"):
        plan(config(latents, output, max_steps=12, exclude=str(listed)))
    data = plan(config(latents, output, max_steps=12)).dataset
    assert data.chosen == record["chosen"]
    # Said to a run that has nothing left to do, it holds as well.
    listed.write_text("".join(f"{identity}\n" for identity in [*gone, before.batch(3).ids[0].item()]))
    train(config(latents, output, max_steps=10, exclude=str(listed)))
    assert set(storage.read_json(str(output / "run.json"))["exclusions"]) == {"8", "10"}
    assert plan(config(latents, output, max_steps=12)).dataset.num_samples == 41
    for step in range(8):
        assert torch.equal(data.batch(step).ids, before.batch(step).ids)
    assert not set(gone) & {identity for step in range(8, 60) for identity in data.batch(step).ids.tolist()}


@pytest.mark.ray
def test_a_run_of_an_older_format_is_not_resumed(latents: str, uninterrupted: Run, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(uninterrupted.output, output)
    storage.write_json(str(output / "run.json"), {"format": "ldm-run", "version": 1, "generation": "x"})
    with pytest.raises(RequestError, match=r"a run of another version, which had another order of samples .*init_from"):
        plan(config(latents, output))


@pytest.mark.ray
def test_a_run_that_goes_on_needs_room_for_what_is_missing_only(
    latents: str, uninterrupted: Run, tmp_path: Path
) -> None:
    """A parameter takes 20 bytes in each checkpoint and 4 in each snapshot."""
    output = uninterrupted.output

    def bytes_each(output: Path, **changes: Any) -> float:
        todo = plan(config(latents, output, **changes))
        return todo.output_bytes / todo.parameters

    new = tmp_path / "new"
    assert bytes_each(new) == 4 * 20 + 4 * 4  # at most keep_last + 1 at a time
    assert bytes_each(new, checkpoint_every=5) == 2 * 20 + 2 * 4
    assert bytes_each(new, max_steps=800, keep_last=1) == 2 * 20 + 400 * 4
    assert bytes_each(new, keep_last=1, keep_every=4) == 4 * 20 + 4 * 4
    assert bytes_each(output) == 0
    assert bytes_each(output, max_steps=12) == 1 * 20 + 2 * 4  # three checkpoints are there
    assert bytes_each(output, max_steps=12, keep_last=1) == 1 * 20 + 2 * 4
    assert bytes_each(output, max_steps=9, keep_last=9) == 1 * 20 + 1 * 4


@pytest.mark.ray
def test_a_run_keeps_the_generation_that_it_began_with(latents: str, uninterrupted: Run, tmp_path: Path) -> None:
    began_with = plan(config(latents, uninterrupted.output)).generations
    grown = str(tmp_path / "latents")
    shutil.copytree(latents, grown)
    latent_dataset(grown, Autoencoder(kl_model()), counts=(20, 18, 7, 4))
    assert plan(config(grown, uninterrupted.output)).generations == began_with
    assert plan(config(grown, tmp_path / "new")).generations != began_with


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
    said = "train: init_from: 5 classes become 3: the rows of classes 0 to 2 and of the null class are kept"
    assert said in capsys.readouterr().err
    old, new = (read_snapshot(url).load_denoiser().state_dict() for url in (before, report.snapshot))
    old["unet.class_embedding.weight"] = old["unet.class_embedding.weight"][[0, 1, 2, 5]]
    torch.testing.assert_close(new, old, rtol=0, atol=1e-6)
    drawn = SampleConfig(snapshot=report.snapshot, output=str(tmp_path / "samples"), num_images=3, batch_size=3)
    assert sample(drawn.model_copy(update={"num_inference_steps": 2, "guidance_scale": 2.0})).images == 3
    assert plan(config(latents, tmp_path / "run", **options)).notes == ()  # it goes on from its own


@pytest.mark.ray
def test_a_run_that_is_older_than_an_option_goes_on(latents: str, uninterrupted: Run, tmp_path: Path) -> None:
    output = uninterrupted.rewound(tmp_path / "run")
    record = storage.read_json(str(output / "run.json"))
    for key in ("unet", "qk_norm", "timestep_frequencies"):
        del record["trajectory"]["denoiser"][key]
    for key in ("loss_weighting", "zero_terminal_snr", "shift"):
        del record["trajectory"]["diffusion"][key]
    storage.write_json(str(output / "run.json"), record)
    assert plan(config(latents, output)).checkpoint is not None
    with pytest.raises(RequestError, match=r"other settings \(denoiser.qk_norm: false != true\)"):
        plan(config(latents, output, denoiser={"qk_norm": True}))

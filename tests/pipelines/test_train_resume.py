"""Runs that go on: the same bits after a kill, no point twice, back from damage, and only as they began."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from ldm import storage
from ldm.autoencoder import Autoencoder
from ldm.config import RequestError
from ldm.latents.dataset import LatentDataset
from pipelines.train import plan, train
from pipelines.train.checkpoint import newest_checkpoint, read_full
from pipelines.train.snapshots import snapshot_steps
from tests.pictures import kl_model, latent_dataset
from tests.pipelines import tiny
from tests.pipelines.killing import Killer
from tests.pipelines.training import Run, assert_bitwise, config, state, tracked


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
    again = config(
        latents, output, resume="required", tracking=tracked(uninterrupted.uri), max_steps=10, keep_snapshots=2
    )
    report = train(again)
    assert snapshot_steps(str(output)) == [8, 10]
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
    assert {at for at, model in models.items() if "removed" in model.tags} == {16, 32, 48}


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
def test_a_run_keeps_the_generation_that_it_began_with(latents: str, uninterrupted: Run, tmp_path: Path) -> None:
    began_with = plan(config(latents, uninterrupted.output)).generations
    grown = str(tmp_path / "latents")
    shutil.copytree(latents, grown)
    latent_dataset(grown, Autoencoder(kl_model()), counts=(20, 18, 7, 4))
    assert plan(config(grown, uninterrupted.output)).generations == began_with
    assert plan(config(grown, tmp_path / "new")).generations != began_with


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

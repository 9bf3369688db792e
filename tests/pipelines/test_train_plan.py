"""What is refused before any work, and the room that a run needs."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs import cli
from ldm.config import RequestError
from pipelines.train import plan, train
from tests.pipelines.training import Run, config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents": "/nowhere"}, "latents=/nowhere: is no latent dataset"),
        ({"num_workers": 3}, "global_batch_size=8: num_workers=3 does not divide it; give 9"),
        ({"num_workers": [3, 3]}, "global_batch_size=8: num_workers=3 does not divide it; give 9"),
        ({"num_workers": [5, 7]}, r"num_workers=\[5, 7\]: none of these divides .*=8; give a range with 4 in it"),
        ({"num_workers": [4, 1]}, r"num_workers=\[4, 1\]: should be \[least, most\]; give \[1, 4\]"),
        ({"num_workers": 0}, "num_workers=0: input should be greater than 0"),
        ({"num_workers": [1, 2], "micro_batch_size": 3}, "micro_batch_size=3: .* share of 8 or 4 .*; give 2$"),
        ({"micro_batch_size": 3}, "micro_batch_size=3: does not divide a worker's share of 4 .*; give 2$"),
        ({"micro_batch_size": 9}, "micro_batch_size=9: does not divide a worker's share of 4 .*; give 4$"),
        ({"checkpoint_every": 4, "keep_every": 6}, "keep_every=6: is no multiple of checkpoint_every=4, .*; give 8$"),
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


def test_a_compiler_that_is_not_there_is_missed_before_any_work(
    latents: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = config(latents, tmp_path / "run", compile=True)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RequestError, match=r"^compile=true: .*, and there is no no-such-compiler; install it"):
        plan(asked)
    monkeypatch.setenv("CXX", "sh")  # some program
    assert plan(asked).step == 0


def test_what_a_cluster_has_is_known_where_ray_would_be_started_here(
    latents: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command, as one gives it: another cluster is asked only when the run begins."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    values = {"latents": latents, "output": tmp_path / "run", "device": "cuda", "max_steps": 1, "validation.grid": 0}
    command = ["train", "--dry-run", *(f"{key}={value}" for key, value in values.items())]
    assert cli.main(command) == 2
    assert capsys.readouterr().err == "error: device=cuda: the cluster has no GPU; give device=cpu or device=auto\n"
    program = "import sys; from jobs import cli; sys.exit(cli.main(sys.argv[1:]))"
    environment = {**os.environ, "RAY_ADDRESS": "10.0.0.1:6379", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", program, *command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "1 worker, ZeRO-2" in done.stdout, done.stderr


def test_a_command_that_no_cluster_takes_ends_no_other(latents: str, tmp_path: Path) -> None:
    """The claim on an output is what another `ldm train` that works there would end for."""
    owner = tmp_path / "run" / "owner.json"
    owner.parent.mkdir()
    owner.write_text("{}")
    values = {"latents": latents, "output": owner.parent, "max_steps": 1, "validation.grid": 0}
    command = [sys.executable, "-m", "jobs.cli", "train", *(f"{key}={value}" for key, value in values.items())]
    environment = {**os.environ, "RAY_ADDRESS": "http://127.0.0.1:8265"}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, timeout=120)
    said = "error: RAY_ADDRESS=http://127.0.0.1:8265: is a dashboard; give HEAD:6379, or use `ldm submit`\n"
    assert (done.returncode, done.stderr) == (2, said)
    assert [file.name for file in owner.parent.iterdir()] == ["owner.json"] and owner.read_text() == "{}"


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
    assert bytes_each(new, max_steps=800, keep_last=1, keep_snapshots=2) == 2 * 20 + 3 * 4
    assert bytes_each(new, max_steps=800, keep_last=1, keep_snapshots=2, holdout=0.2) == 2 * 20 + 4 * 4  # the best one
    assert bytes_each(output) == 0
    assert bytes_each(output, max_steps=12) == 1 * 20 + 2 * 4  # three checkpoints are there
    assert bytes_each(output, max_steps=12, keep_last=1) == 1 * 20 + 2 * 4
    assert bytes_each(output, max_steps=12, keep_snapshots=5) == 1 * 20 + 2 * 4  # four are there
    assert bytes_each(output, max_steps=9, keep_last=9) == 1 * 20 + 1 * 4

"""Every `ldm` command of the README runs as it stands there, one after the other, on made pictures."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from jobs import cli
from tests.commands import console_commands
from tests.jobs.test_interrupt import interrupt_when
from tests.pictures import image_shard, samples, tiny_model

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def commands_of(section: str) -> list[list[str]]:
    """The words of the commands of a section."""
    text = README.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return [shlex.split(command, comments=True) for command in console_commands(text)]


@pytest.mark.ray
def test_the_path_on_ones_own_pictures(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for number in range(6):
        image_shard(tmp_path / "shards" / f"train-{number:05d}.tar", samples(12, start=12 * number))
    tiny_model().save_pretrained(tmp_path / "vae")
    commands = commands_of("On your own pictures")
    assert commands.pop(0) == ["source", ".venv/bin/activate"]
    assert [command[:2] for command in commands] == [
        ["ldm", verb] for verb in ("encode", "train", "sample", "serve", "evaluate")
    ]
    for command in commands:
        if command[1] == "serve":  # it runs until Ctrl-C, so in a process of its own
            log = tmp_path / "stderr.txt"
            code, _, alive = interrupt_when(command[1:], lambda log=log: "Ctrl-C stops it" in log.read_text(), tmp_path)
            assert (code, alive) == (0, [])
            continue
        code = cli.main(command[1:])
        assert code == 0, (command, capsys.readouterr().err)
    assert len(list((tmp_path / "samples").glob("0*.png"))) == 8
    _assert_mlflow_joins_the_runs(f"sqlite:///{tmp_path}/mlflow.db")
    _look_check_and_join(tmp_path, capsys)

    code_block = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert code_block is not None
    done = subprocess.run(
        [sys.executable, "-c", code_block.group(1) + "\nprint(tuple(latents.shape))"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        timeout=120,
    )
    assert done.stdout == "(8, 4, 16, 16)\n", done.stderr


def _look_check_and_join(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = "".join(f"train-{n // 12:05d},{n:05d},a new caption of {n}\n" for n in range(72))
    (place / "captions.csv").write_text(f"shard,key,caption\n{rows}")
    commands = commands_of("Look before, check after, join later")
    assert [command[1] for command in commands] == ["inspect", "inspect", "verify", "verify", "convert"]
    said = ["price", "dB PSNR", "ok", "ok", "matched      72\n"]
    for command, text in zip(commands, said, strict=True):
        capsys.readouterr()
        assert cli.main(command[1:]) == 0, (command, capsys.readouterr().err)
        assert text in capsys.readouterr().out
    assert (place / "pictures.png").exists() and (place / "latents.png").exists()


def test_what_the_readme_names_is_there() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert len(links) > 5
    for link in links:
        assert (ROOT / link).exists(), link
    targets = set(re.findall(r"make ([a-z-]+)", README))
    makefile = (ROOT / "Makefile").read_text()
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def _assert_mlflow_joins_the_runs(uri: str) -> None:
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("ldm")
    assert experiment is not None
    found = [client.get_run(run.info.run_id) for run in client.search_runs([experiment.experiment_id])]
    runs = {run.data.tags["stage"]: run for run in found}  # a search leaves out the models that a run used
    data = {
        stage: {i.tags[0].value: (i.dataset.name, i.dataset.digest) for i in run.inputs.dataset_inputs}
        for stage, run in runs.items()
    }
    assert data["train"]["training"] == data["encode"]["latents"]
    assert data["evaluate"]["reference"] == data["encode"]["source"]
    (made,), (measured,) = runs["train"].outputs.model_outputs, runs["evaluate"].inputs.model_inputs
    assert made.model_id == measured.model_id

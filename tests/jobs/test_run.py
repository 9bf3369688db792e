"""`ldm run`: the pipeline of the README, made cheaper, over and over in one folder."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import cli
from jobs.pipeline import read_pipeline
from ldm.shards import RawSample
from tests.pictures import image_shard, samples, tiny_model

ROOT = Path(__file__).parents[2]
CHEAPER: dict[str, dict[str, Any]] = {
    "encode": {"image_size": 16},
    "train": {"max_steps": 2, "num_workers": 1, "denoiser": {"hidden_size": 16, "depth": 1, "num_heads": 2}},
    "evaluate": {"through": "ray", "num_workers": 1, "num_images": 12, "num_inference_steps": 2},
}
OUTPUTS = ("latents", "run", "evaluation")


@pytest.fixture
def steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """The steps of the README's pipeline in a folder with six shards and an autoencoder, where the test stands."""
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    found: dict[str, dict[str, Any]] = yaml.safe_load(text)
    assert list(found) == list(CHEAPER)
    for name, changes in CHEAPER.items():
        found[name] = {**found[name], **changes, "device": "cpu", "tracking": {"enabled": False}}
    monkeypatch.chdir(tmp_path)
    for number in range(6):
        image_shard(tmp_path / "shards" / f"train-{number:05d}.tar", samples(12, start=12 * number))
    tiny_model().save_pretrained(tmp_path / "vae")
    return found


def run(
    steps: dict[str, Any], capsys: pytest.CaptureFixture[str], *options: str
) -> tuple[int, list[dict[str, Any]], str]:
    """(exit code, what is said of each step, stderr)"""
    Path("pipeline.yaml").write_text(yaml.safe_dump(steps, sort_keys=False))
    code = cli.main(["run", "pipeline.yaml", "--json", *options])
    out, err = capsys.readouterr()
    return code, json.loads(out)["steps"] if out else [], err


def tree() -> dict[str, tuple[str, int]]:
    """The hash and the time of change of all that the steps wrote."""
    files = [path for folder in OUTPUTS for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    return {str(p): (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns) for p in files}


def skipped(done: list[dict[str, Any]]) -> list[bool]:
    return [step["skipped"] for step in done]


@pytest.mark.ray
def test_what_is_there_and_fits_is_not_done_again(
    ray_session: None, steps: dict[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    code, first, said = run(steps, capsys)
    assert code == 0, said
    assert [step["step"] for step in first] == ["encode", "train", "evaluate"] and not any(skipped(first))
    assert first[0]["report"]["encoded"] == 72 and first[1]["report"]["step"] == 2
    assert first[2]["report"]["num_images"] == 12

    before = tree()
    code, again, said = run(steps, capsys)
    assert (code, skipped(again)) == (0, [True, True, True])
    assert "encode: skipped, its output is there and fits" in said
    assert tree() == before
    rate = "images_per_second"
    for one, other in zip(first, again, strict=True):
        fixed = {"encoded", "generation", "snapshot", "checkpoint", "loss", "metrics", "grid"} & one["report"].keys()
        assert fixed and {k: one["report"][k] for k in fixed} == {k: other["report"][k] for k in fixed}
        assert other["report"][rate] == 0

    steps["evaluate"]["num_inference_steps"] = 3
    code, changed, _ = run(steps, capsys)
    assert (code, skipped(changed)) == (0, [True, True, False])
    assert {p: v for p, v in tree().items() if "evaluation" not in p} == {
        p: v for p, v in before.items() if "evaluation" not in p
    }

    before = tree()
    steps["train"]["learning_rate"] = 0.5
    code, _, said = run(steps, capsys)
    assert code == 2 and tree() == before
    message = "error: pipeline.yaml: train: output=run: holds a run with other settings (learning_rate: 0.0001 != 0.5)"
    assert said.startswith(message)  # before any step begins

    del steps["train"]["learning_rate"]
    image_shard(Path("no-pictures.tar"), [RawSample("a", {"cls": b"1"})])
    steps["evaluate"]["reference"] = "no-pictures.tar"
    code, _, said = run(steps, capsys)
    assert code == 2 and "error: reference=" in said and "holds no readable picture" in said
    assert "run: ended in evaluate; the same command goes on there: ldm run pipeline.yaml --json" in said


@pytest.mark.parametrize(
    ("step", "key", "value", "message"),
    [
        ("evaluate", "num_imges", 3, "pipeline.yaml: evaluate: num_imges=3: unknown key; did you mean 'num_images'?"),
        ("train", "max_steps", -1, "pipeline.yaml: train: max_steps=-1: input should be greater than 0"),
        ("evaluate", "reference", "none.tar", "pipeline.yaml: evaluate: reference=none.tar: does not exist"),
        ("evaluate", "config", "demo-evalute", "did you mean 'demo-evaluate'?"),
        ("evaluate", "features", "none.pt", "pipeline.yaml: evaluate: features=none.pt: is not there; give the path"),
        (
            "train",
            "num_workers",
            3,
            "pipeline.yaml: train: global_batch_size=32: num_workers=3 does not divide it; give 33",
        ),
        ("train", "learning_rate_schedule", "cosine", "pipeline.yaml: train: learning_rate_images=null: a cosine sche"),
        ("train", "keep_every", 3, "pipeline.yaml: train: keep_every=3: is no multiple of checkpoint_every="),
        ("train", "deepspeed", {"train_batch_size": 3}, "pipeline.yaml: train: deepspeed.train_batch_size"),
    ],
)
def test_a_mistake_in_a_late_step_is_said_before_the_first_begins(
    step: str,
    key: str,
    value: Any,
    message: str,
    steps: dict[str, dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    steps[step][key] = value
    for options in ((), ("--dry-run",)):
        code, done, said = run(steps, capsys, *options)
        assert (code, done) == (2, [])
        assert said.startswith("error: ") and said.count("\n") == 1 and message in said
    assert not Path("latents").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("encode: {}\nencode: {}\n", "p.yaml: encode: stands there twice; give the second one a file of its own"),
        ("serve: {port: 1}\n", "p.yaml: 'serve': cannot be submitted; give one of encode, verify, train"),
        ("train: 3\n", "p.yaml: train: holds a int, expected a mapping of keys to values"),
        ("train: {output: o}\n", "p.yaml: train: latents: missing; give latents=VALUE"),
        ("train --dry-run: {}\n", "p.yaml: train --dry-run: --dry-run runs nothing; leave it out"),
        ("", "p.yaml: holds no step; give stages with their keys, such as encode, train and evaluate"),
        ("- encode\n", "config=p.yaml: holds a list, expected a mapping of keys"),
    ],
)
def test_a_file_that_is_no_pipeline_is_refused(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.yaml").write_text(text)
    assert cli.main(["run", "p.yaml"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_a_dry_run_says_what_each_step_would_do_and_writes_nothing(
    steps: dict[str, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("pipeline.yaml").write_text(yaml.safe_dump(steps, sort_keys=False))
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["run", "pipeline.yaml", "--dry-run"]) == 0
    encode, train, evaluate = capsys.readouterr().out.splitlines()
    assert encode.startswith("encode: encode 6 of 6 shards (")
    assert train == "train: is looked at when encode is done; its keys are right"
    assert evaluate == "evaluate: is looked at when encode is done; its keys are right"
    assert sorted(tmp_path.rglob("*")) == before


def test_labels_are_found_where_encode_found_them(steps: dict[str, dict[str, Any]]) -> None:
    def label_of_evaluation(**changes: Any) -> str:
        evaluation = {**steps["evaluate"], **changes}
        Path("pipeline.yaml").write_text(yaml.safe_dump({**steps, "evaluate": evaluation}, sort_keys=False))
        *_, config = read_pipeline(Path("pipeline.yaml")).configs()
        return str(config.model_dump()["label"])

    steps["encode"]["label"] = "json.kind"
    assert label_of_evaluation() == "json.kind"
    assert label_of_evaluation(label="json.other") == "json.other"
    assert label_of_evaluation(reference="other.tar") == "cls"  # pictures of one's own
    Path("evaluation.yaml").write_text("label: json.of_the_file\n")
    assert label_of_evaluation(config="evaluation.yaml") == "json.of_the_file"

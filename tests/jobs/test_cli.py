"""The `ldm` command: exit codes, one line for each mistake, one line of JSON for a report."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jobs import cli
from ldm.config import RequestError
from tests.pictures import image_shard, samples, tiny_model
from tests.pipelines.tiny_snapshot import write_tiny_snapshot


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_snapshot(tmp_path_factory.mktemp("cli") / "snapshot")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to stand in, with one shard of pictures and a tiny autoencoder of factor 4."""
    monkeypatch.chdir(tmp_path)
    image_shard(tmp_path / "in-0.tar", samples(3))
    tiny_model().save_pretrained(tmp_path / "vae")
    return tmp_path


def run(arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command in this process."""
    code = cli.main(arguments.split())
    captured = capsys.readouterr()
    return code, captured.out, captured.err


WRONG = [
    ("trian", "'trian': is no command; did you mean 'train'?"),
    ("train latnts=x", "latnts=x: unknown key; did you mean 'latents'?"),
    ("train output=o", "latents: missing; give latents=VALUE"),
    ("train latents=in-0.tar output=o", "latents=in-0.tar: is no latent dataset (no manifest.json)"),
    ("train latents=l output=o zero_stage=7", "zero_stage=7: should be 0, 1, 2 or 3"),
    ("train --config dit-xl latents=l", "config=dit-xl: is no file and no packaged config; did you mean 'dit-xl-2'?"),
    ("train latents", "'latents': is no option and no key=value pair"),
    ("train --frobnicate", "unrecognized arguments: --frobnicate; see 'ldm train --help'"),
    ("encode source=none.tar destination=d autoencoder=vae image_size=16", "source=none.tar: does not exist"),
    ("encode source=*.zip destination=d autoencoder=vae image_size=16", "source=*.zip: matches no file"),
    ("encode source=empty.tar destination=d autoencoder=vae image_size=16", "source=PLACE/empty.tar: is empty"),
    ("encode source=pipe:cat destination=d autoencoder=vae image_size=16", "pipe:cat: runs a shell command"),
    (
        "encode source=in-0.tar destination=d autoencoder=vae image_size=30",
        "image_size=30: the autoencoder's factor 4 does not divide it; give 32",
    ),
    ("encode source=in-0.tar destination=d autoencoder=nowhere", "autoencoder=nowhere: holds no config.json"),
    ("sample snapshot=vae", "snapshot=vae: is no snapshot (no snapshot.json)"),
    ("sample snapshot=SNAPSHOT labels=ten", "labels=ten: is no class of this model; give 0 to 9, or zero, one"),
    ("sample snapshot=SNAPSHOT num_inference_steps=2000", "num_inference_steps=2000: must be 1 to 1000"),
    ("sample snapshot=SNAPSHOT eta=2", "eta=2: "),
    ("serve snapshot=vae", "snapshot=vae: holds no snapshot; give one that"),
    ("evaluate snapshot=vae reference=in-0.tar", "snapshot=vae: is no snapshot"),
    ("verify", "latents: missing; give latents=VALUE"),
    ("verify vae", "latents=PLACE/vae: is no latent dataset (no manifest.json)"),
    ("verify vae in-0.tar", 'latents=["vae", "in-0.tar"]: input should be a valid string'),
    ("verify vae level=half", "level=half: input should be 'quick' or 'full'"),
    ("inspect", "target: missing; give target=VALUE"),
    ("inspect none.tar", "target=none.tar: does not exist"),
    ("inspect in-0.tar none.tar", "target=none.tar: does not exist"),
    ("inspect in-0.tar --preview grid.jpg", "preview=grid.jpg: is no .png; give the file to write"),
    ("inspect in-0.tar --preview", "argument --preview: expected one argument; see 'ldm inspect --help'"),
    ("inspect pipe:cat", "pipe:cat: runs a shell command"),
    ("verify vae --preview grid.png", "unrecognized arguments: --preview grid.png; see 'ldm verify --help'"),
    ("convert vae table=t.csv", "latents=vae: is no latent dataset (no manifest.json)"),
    ("convert vae", "ldm convert: give one of table=, to=, from="),
    ("study", "ldm study: give one of sweep, latent-vs-pixel, scaling; see 'ldm study --help'"),
    ("study sweeep", "ldm study sweeep: give one of sweep, latent-vs-pixel, scaling; did you mean 'sweep'?"),
    ("study sweep reference=in-0.tar", "snapshot: missing; give snapshot=VALUE"),
    ("study sweep snapshot=SNAPSHOT reference=in-0.tar stpes=3", "stpes=3: unknown key; did you mean 'steps'?"),
    ("study sweep snapshot=SNAPSHOT reference=in-0.tar steps=2000", "steps=2000: must be 1 to 1000"),
    ("study scaling latents=vae", "latents=vae: is no latent dataset (no manifest.json)"),
    ("submit study swep --address http://127.0.0.1:1", "ldm study swep: give one of sweep, latent-vs-pixel, scaling"),
    ("submit verify vae level=half --address http://127.0.0.1:1", "level=half: input should be 'quick' or 'full'"),
    ("submit verify vae --address http://127.0.0.1:1", "--address=http://127.0.0.1:1: no Ray cluster"),
    ("submit train latents=l output=o", "--address: missing; give --address http://HEAD:8265, or set RAY_ADDRESS"),
    ("submit verify vae --name a/b --address http://127.0.0.1:1", "--name=a/b: give letters, digits, "),
    ("run", "pipeline: missing; give a YAML file of steps"),
    ("run none.yaml", "pipeline=none.yaml: is no file; give one, as in: ldm run pipeline.yaml"),
    ("rnu p.yaml", "'rnu': is no command; did you mean 'run'?"),
    ("submit trian", "'trian': cannot be submitted; give one of encode, verify, train, sample, evaluate, study"),
    ("submit train latnts=x --address http://127.0.0.1:1", "latnts=x: unknown key; did you mean 'latents'?"),
    ("submit train latents=l output=o --address http://127.0.0.1:1", "--address=http://127.0.0.1:1: no Ray cluster"),
]


@pytest.mark.parametrize(("command", "message"), WRONG)
def test_a_mistake_is_one_line_and_exit_2(
    command: str,
    message: str,
    place: Path,
    snapshot: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (place / "empty.tar").touch()
    before = sorted(place.rglob("*"))
    code, out, err = run(command.replace("SNAPSHOT", snapshot), capsys)
    lines = [line for line in err.splitlines() if line]
    assert code == 2 and out == ""
    assert len(lines) == 1 and lines[0].startswith("error: " + message.replace("PLACE", str(place))), err
    assert sorted(place.rglob("*")) == before  # nothing is half made


def test_json_is_one_line_on_stdout_and_pictures_are_there(
    place: Path, snapshot: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = f"sample snapshot={snapshot} num_images=3 num_inference_steps=2 batch_size=2 output=out --json"
    code, out, _ = run(command, capsys)
    assert code == 0 and out.count("\n") == 1
    report = json.loads(out)
    assert report["images"] == 3 and set(report) == {"images", "images_per_second", "output", "grid"}
    assert sorted(path.name for path in (place / "out").iterdir()) == [
        "000000.png",
        "000001.png",
        "000002.png",
        "grid.png",
    ]


@pytest.mark.parametrize(
    ("command", "promise"),
    [
        ("inspect in-0.tar", "inspect 1 % of the samples, at least 200, of 1 shards ("),
        ("inspect target=in-0.tar probe=5", "inspect 5 samples of 1 shards ("),
        ("encode source=in-0.tar destination=d autoencoder=vae image_size=16", ", into d, about 3.8 kB"),
        ("sample snapshot=SNAPSHOT num_images=5", "sample 5 pictures from step 30"),
        ("serve snapshot=SNAPSHOT port=PORT", "serve"),
        ("study sweep snapshot=SNAPSHOT reference=in-0.tar steps=2,4", "sweep: 2 arms, 0 of them done; about "),
        ("demo folder=demo", "the whole path on 1,797 digits in demo"),
    ],
)
def test_a_dry_run_prints_the_plan_and_leaves_nothing(
    command: str, promise: str, place: Path, snapshot: str, capsys: pytest.CaptureFixture[str], free_port: object
) -> None:
    before = sorted(place.rglob("*"))
    full = command.replace("SNAPSHOT", snapshot).replace("PORT", str(free_port()))  # type: ignore[operator]
    code, out, _ = run(f"{full} --dry-run", capsys)
    assert code == 0 and promise in out
    assert sorted(place.rglob("*")) == before


def test_print_config_gives_back_what_it_prints(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, printed, _ = run("train --config dit-s-2 latents=l output=o learning_rate=3e-4 --print-config", capsys)
    (place / "again.yaml").write_text(printed)
    _, again, _ = run("train --config again.yaml --print-config", capsys)
    assert again == printed
    assert yaml.safe_load(printed)["learning_rate"] == 3e-4


@pytest.mark.parametrize("verb", sorted(cli.STAGES))
def test_help_names_every_key(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    from ldm.config import fields

    code, out, _ = run(f"{verb} --help", capsys)
    assert code == 0
    for key, *_ in fields(cli.stage_module(verb).StageConfig):
        assert f"\n  {key}  (" in out


@pytest.mark.parametrize("path", sorted(cli.CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_packaged_config_opens_with_its_command_and_fits_its_stage(path: Path) -> None:
    text = path.read_text()
    command = next(line for line in text.splitlines() if line.startswith("#   ldm "))
    verb = command.split()[2]
    assert f"--config {path.stem}" in command
    if verb == "demo":  # a part of the demonstration that is no stage
        return
    required = {
        "train": ["latents=l", "output=o"],
        "encode": ["source=s", "destination=d", "autoencoder=a"],
        "sample": ["snapshot=s"],
        "evaluate": ["snapshot=s", "reference=r"],
    }
    cli.parse_stage(verb, ["--config", path.stem, *required[verb]])


def test_a_failure_is_exit_1_and_ctrl_c_130(
    monkeypatch: pytest.MonkeyPatch, snapshot: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = cli.stage_module("sample")

    def fails(error: BaseException) -> None:
        def raise_it(config: object) -> None:
            raise error

        monkeypatch.setattr(stage, "run", raise_it)

    for error, code, said in [
        (RuntimeError("the disk is full"), 1, "error: the disk is full\n"),
        (KeyboardInterrupt(), 130, "interrupted: what was committed stays usable, and the same command goes on\n"),
        (
            KeyboardInterrupt(signal.SIGTERM),
            143,
            "interrupted: what was committed stays usable, and the same command goes on\n",
        ),
        (RequestError("key=1: give 2"), 2, "error: key=1: give 2\n"),
    ]:
        fails(error)
        assert run(f"sample snapshot={snapshot}", capsys) == (code, "", said)
    fails(ZeroDivisionError("a bug"))
    code, _, err = run(f"sample snapshot={snapshot}", capsys)
    assert code == 1 and "Traceback" in err  # what nobody expected is shown in full


def test_the_stage_modules_run_as_python_m(snapshot: str, tmp_path: Path) -> None:
    """What a Ray job's entry point calls."""
    command = [sys.executable, "-m", "jobs.sample", f"snapshot={snapshot}", "num_images=0"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: num_images=0: input should be greater than 0")


def test_a_figure_stands_in_one_line_with_its_interval_and_its_floor(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {"fd": 1.5035, "fd_low": 1.3114, "fd_high": 1.708, "fd_floor": 1.36, "recall": 0.71, "recall_floor": 0.96}
    cli.show_values({"num_images": 500, "metrics": metrics, "latency": {}})
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "num_images 500",
        "metrics",
        "fd 1.504 [1.311, 1.708] floor 1.36",
        "recall 0.71 floor 0.96",
        "latency {}",
    ]

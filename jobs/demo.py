"""`ldm demo`: the whole path on real handwritten digits, through the commands and configs that a user would use."""

import contextlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from jobs import cli
from ldm import images, storage
from ldm.config import Config, RequestError, load_yaml, parse
from ldm.digits import write_digit_shards
from ldm.first_stage import FirstStageConfig, train_autoencoder
from ldm.latents.choice import is_held_out
from ldm.latents.writer import sample_id
from ldm.shards import ShardReader
from pipelines import cluster
from pipelines.progress import Progress, say
from pipelines.train.checkpoint import checkpoint_url, newest_checkpoint
from pipelines.train.killer import killing
from pipelines.train.selfcheck import compare

HOLDOUT = 0.2
"""Share of the digits that nothing is trained on; the same digits in every stage (a hash of the id decides)."""


class StageConfig(Config):
    """The demonstration. What is there already is not done again: interrupted, the same command goes on."""

    folder: str = Field("ldm-demo", description="where everything goes")


@dataclass(frozen=True)
class DemoReport:
    """What the demonstration ended with. images_per_second: by stage."""

    images_per_second: dict[str, float]
    accounting: str
    loss: float
    resumed_equals_uninterrupted: bool
    metrics: dict[str, Any]
    first_grid_after_s: float | None
    seconds: float
    grid: str


def dry_run(config: Config) -> str:
    """Checks the request; returns what would be done."""
    assert isinstance(config, StageConfig)
    if Path(config.folder).exists() and not Path(config.folder).is_dir():
        raise RequestError(f"folder={config.folder}: is a file; give a directory")
    return f"the whole path on 1,797 digits in {config.folder}: about 9 minutes on two CPU cores"


def run(config: StageConfig) -> DemoReport:
    """Runs the whole path. Raises RequestError; RuntimeError where a resumed run differs from an uninterrupted one."""
    dry_run(config)
    started = time.monotonic()
    folder = Path(config.folder)
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.pop("RAY_ADDRESS", None)  # the demonstration has a Ray of its own
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{(folder / 'mlflow.db').resolve()}")
    os.environ.setdefault("MLFLOW_EXPERIMENT_NAME", "ldm-demo")

    _title("1/6  1,797 handwritten digits as WebDataset shards, two broken pictures among them")
    write_digit_shards(folder / "shards")
    source = f"{folder}/shards/digits-{{00000..00007}}.tar"
    _title("2/6  a first stage: a small AutoencoderKL, trained on the training digits")
    _train_first_stage(folder, source)
    with cluster.ray_session():
        _title("3/6  encode: Ray and the frozen autoencoder; each picture counted once")
        paths = {"source": source, "destination": f"{folder}/latents", "autoencoder": f"{folder}/autoencoder"}
        encoded = _stage("encode", paths)
        counts = {k: getattr(encoded, k) for k in ("inputs", "encoded", "filtered", "quarantined")}
        accounting = "{inputs:,} = {encoded:,} encoded + {filtered:,} filtered + {quarantined:,} quarantined"
        _title("4/6  train: DeepSpeed ZeRO-2 on two workers")
        with _first_grid(folder, started) as first:
            trained = _stage("train", {"latents": f"{folder}/latents", "output": f"{folder}/run"})
        _title("5/6  is a resume exact? one worker is killed with SIGKILL, the other run is left alone")
        same = _check_resume(folder)
        _title("6/6  evaluate: 500 digits drawn with DDIM through Ray Serve, and measured")
        where = {"snapshot": trained.snapshot, "reference": source, "output": f"{folder}/evaluation"}
        evaluated = _stage("evaluate", where)
    report = DemoReport(
        images_per_second={
            "encode": encoded.images_per_second,
            "train": trained.images_per_second,
            "sample": evaluated.images_per_second,
        },
        accounting=accounting.format(**counts),
        loss=trained.loss,
        resumed_equals_uninterrupted=same,
        metrics=evaluated.metrics,
        first_grid_after_s=first.get("seconds"),
        seconds=round(time.monotonic() - started, 1),
        grid=evaluated.grid,
    )
    _closing_words(report, folder, trained.snapshot)
    return report


def _stage(verb: str, values: dict[str, str], config_name: str = "") -> Any:
    """Runs one stage as `ldm VERB --config demo-VERB key=value …` would, and says so."""
    arguments = [
        "--config",
        config_name or f"demo-{verb}",
        *(f"{key}={value}" for key, value in values.items()),
    ]
    say(f"$ ldm {verb} {' '.join(arguments)}")
    _, config = cli.parse_stage(verb, arguments)
    return cli.stage_module(verb).run(config)


def _train_first_stage(folder: Path, source: str) -> None:
    target = folder / "autoencoder"
    if (target / "config.json").exists():
        say(f"{target} is there already")
        return
    training, held_out = _read_digits(source)
    config = parse(FirstStageConfig, [("demo-first-stage", load_yaml(cli.find_config("demo-first-stage")))])
    with Progress("first stage", 0, "steps") as progress:

        def show(step: int, steps: int, loss: float) -> None:
            progress.total = steps
            progress.advance_to(step, f"loss {loss:.4f}")

        # Written under another name first: a folder that is there is a first stage that is done.
        report = train_autoencoder(training, folder / "autoencoder.part", config, held_out=held_out, progress=show)
    os.replace(folder / "autoencoder.part", target)
    say(f"first stage: {report['psnr']:.1f} dB PSNR on held-out digits, {report['seconds']:.0f} s")


def _read_digits(source: str) -> tuple[Tensor, Tensor]:
    """(training, held-out) pictures, uint8 (N, 3, 32, 32), split as every other stage splits them."""
    pictures, ids = [], []
    for url in storage.expand(source):
        for item in ShardReader(url):
            with contextlib.suppress(images.BadPicture):  # the two that are planted
                pictures.append(images.decode(item.picture or b"", 32)[0])
                ids.append(sample_id(storage.name(url).removesuffix(".tar"), item.key))
    held_out = is_held_out(np.array(ids, np.int64), HOLDOUT)
    stacked = np.stack(pictures)
    return torch.from_numpy(stacked[~held_out]), torch.from_numpy(stacked[held_out])


@contextlib.contextmanager
def _first_grid(folder: Path, started: float) -> Iterator[dict[str, float]]:
    """Samples a grid as soon as training has written its first snapshot: one can look while a model trains."""
    target, found, stop = folder / "first-grid", {}, threading.Event()

    def watch() -> None:
        while not stop.wait(1.0):
            ready = sorted((folder / "run" / "snapshots").glob("*/snapshot.json"))
            if ready:
                report = _stage("sample", {"snapshot": str(ready[0].parent), "output": str(target)})
                found["seconds"] = round(time.monotonic() - started, 1)
                say(f"first samples, {found['seconds']:.0f} s after the start: {report.grid}")
                return

    thread = threading.Thread(target=watch, name="first-grid", daemon=True)
    if not (target / "grid.png").exists():
        thread.start()
    try:
        yield found
    finally:
        stop.set()
        if thread.is_alive():
            thread.join()


def _check_resume(folder: Path) -> bool:
    """Trains a small model twice, once with a worker killed, and compares all of the resulting state."""
    killed, alone = f"{folder}/resume-check/killed", f"{folder}/resume-check/uninterrupted"
    _stage("train", {"latents": f"{folder}/latents", "output": alone}, "demo-resume-check")
    storage.remove(killed)  # of an earlier demonstration: a run that is done shows nothing
    with killing(killed) as kills:
        _stage("train", {"latents": f"{folder}/latents", "output": killed}, "demo-resume-check")
    if not kills or checkpoint_url(killed, kills[0]) == newest_checkpoint(killed):
        raise RuntimeError("the run was over before its worker could be killed: nothing was shown; run it again")
    found = compare(alone, killed)
    say(f"resumed == uninterrupted: {found.first or 'yes'} ({found.compared:,} numbers compared, bit by bit)")
    if found.first:
        raise RuntimeError(f"the resumed run differs: {found.first}")
    return True


def _program(name: str) -> str:
    """How to call it: `make demo` does not activate the environment that it made."""
    return name if shutil.which(name) else os.path.relpath(Path(sys.executable).with_name(name))


def _title(text: str) -> None:
    say(f"\n{text}")


def _closing_words(report: DemoReport, folder: Path, snapshot: str) -> None:
    rates = ", ".join(f"{stage} {rate:,.0f}" for stage, rate in report.images_per_second.items())
    say(f"\n{report.accounting}")
    say(f"images/s           {rates}")
    say(f"loss               {report.loss:.4f}")
    for name, value in report.metrics.items():
        # The table that the stage printed has the others, with their intervals.
        if name.startswith("accuracy") or not name.endswith(("_low", "_high", "_equal_n", "_reconstruction")):
            say(f"{name:<42} {value:.4g}")
    say(f"\nreal on top, sampled below: {report.grid}")
    say(f"look at the runs:   {_program('mlflow')} ui --backend-store-uri {os.environ['MLFLOW_TRACKING_URI']}")
    say(f"draw more digits:   {_program('ldm')} sample --config demo-sample snapshot={snapshot} labels=3")
    say(f"it took {report.seconds:.0f} s")

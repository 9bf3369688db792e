"""What a killed worker costs, and that it changes no bit.

    PYTHONPATH=. python tests/bench/bench_restart.py restart [KILLS] [key=value …]
    PYTHONPATH=. python tests/bench/bench_restart.py kills [KILLS] [key=value …]

`restart`: seconds from SIGKILL to the first step after it, with the phases that the program says. `kills`: the same run
with 20 kills at random moments and without; weights, moments, averages and logged losses are compared bit by bit.
"""

import contextlib
import io
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
import torch

from ldm.autoencoder import Autoencoder
from ldm.config import parse
from pipelines.train import TrainConfig, train
from pipelines.train.checkpoint import newest_checkpoint, read_full
from tests.pictures import kl_model, latent_dataset
from tests.pipelines.killing import Killer

KINDS = ("master", "exp_avg", "exp_avg_sq", "ema.main")
MODEL: dict[str, Any] = {"hidden_size": 64, "depth": 2, "num_heads": 2, "patch_size": 1}


class Timed(io.TextIOBase):
    """stderr that knows when each line came."""

    def __init__(self) -> None:
        self.lines: list[tuple[float, str]] = []

    def write(self, text: str) -> int:
        self.lines += [(time.time(), line) for line in text.splitlines() if line.strip()]
        return len(text)


def run(place: Path, name: str, kills: int, changes: list[str]) -> tuple[str, list[float], list[tuple[float, str]]]:
    """(output, when it was killed, what it said and when)"""
    values = {
        "latents": str(place / "latents"), "output": str(place / name), "num_workers": 2, "device": "cpu",
        "global_batch_size": 32, "micro_batch_size": 4, "checkpoint_every": 20, "log_every": 10,
        "max_steps": 50 * kills + 50, "max_failures": 10 * kills, "denoiser": MODEL,
        "tracking": {"uri": f"sqlite:///{place}/mlflow.db"},
    }  # fmt: skip
    config = parse(TrainConfig, [("bench", values)], changes)
    killer, said = Killer(config.output, kills if name == "killed" else 0), Timed()
    killer.start()
    with contextlib.redirect_stderr(said):
        train(config)
    killer.over.set()
    killer.join()
    return config.output, killer.kills, said.lines


def restarts(kills: list[float], said: list[tuple[float, str]]) -> None:
    firsts = [(at, line) for at, line in said if "first step after" in line]
    print(f"start: {firsts[0][1].removeprefix('train: ')}")
    seconds, phases = [], dict[str, list[float]]()
    for kill in kills:
        at, line = next((at, line) for at, line in firsts if at > kill)
        seconds.append(at - kill)
        print(f"kill: {at - kill:.1f} s; {line.removeprefix('train: ')}")
        for phase, value in re.findall(r"(\w+) ([\d.]+)(?=[,)])", line):
            phases.setdefault(phase, []).append(float(value))
    medians = ", ".join(f"{phase} {statistics.median(values):.1f}" for phase, values in phases.items())
    print(
        f"kill to first step, {len(kills)} kills: median {statistics.median(seconds):.1f} s, worst {max(seconds):.1f} s"
    )
    print(f"medians of the phases: {medians}")


def compare(place: Path, killed: str, undisturbed: str) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{place}/mlflow.db")
    runs = {found.info.run_name: found.info.run_id for found in client.search_runs(["1"])}
    losses = [
        [(p.step, p.value) for p in client.get_metric_history(runs[f"train/{Path(output).name}"], "train/loss")]
        for output in (killed, undisturbed)
    ]
    different = [
        f"{kind}/{name}"
        for kind in KINDS
        for name, tensor in read_full(str(newest_checkpoint(killed)), kind).items()
        if not torch.equal(tensor, read_full(str(newest_checkpoint(undisturbed)), kind)[name])
    ]
    print(f"tensors that differ: {different or 'none'}; {len(losses[0])} logged losses equal: {losses[0] == losses[1]}")


def main() -> None:
    what, *rest = sys.argv[1:]
    kills = int(rest.pop(0)) if rest and rest[0].isdigit() else {"restart": 5, "kills": 20}[what]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        autoencoder = Autoencoder(kl_model())
        latent_dataset(str(place / "latents"), autoencoder, counts=(20, 18, 7))
        autoencoder.save(str(place / "latents" / "autoencoder"))
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        killed, moments, said = run(place, "killed", kills, rest)
        restarts(moments, said)
        if what == "kills":
            undisturbed, *_ = run(place, "undisturbed", kills, rest)
            compare(place, killed, undisturbed)
        ray.shutdown()


if __name__ == "__main__":
    main()

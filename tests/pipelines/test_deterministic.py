"""`deterministic=true`: what it costs is measured and said, and measuring changes nothing of the run."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.config import parse
from pipelines.train import TrainConfig
from pipelines.train.deterministic import Slowdown, choose_kernels, median_seconds
from tests.pipelines import gloo
from tests.pipelines.workers import WORLD, Notebook, config, masters, worker

MOODY = {"type": "tests.pipelines.moody:Moody"}


def train(rank: int, world: int, settings: list[TrainConfig]) -> list[dict[str, Any]]:
    """What each run logs, and all that it ends with."""
    found = []
    for each in settings:
        notebook = Notebook(each)
        run = worker(each, notebook)
        run.run()
        points = [point for _, point in notebook.points if "train/loss" in point]
        found.append(
            {
                "losses": [(point["train/loss"], point["train/gradient_norm"]) for point in points],
                "costs": [point.get("perf/deterministic_cost") for point in points],
                "state": [*masters(run), *(buffer.clone() for buffer in run.engine.state.buffers.values())],
            }
        )
        run.engine.close()
    return found


@pytest.mark.slow
def test_a_run_is_the_same_with_it_on_the_cpu(latents: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Of a DiT, and of a denoiser that draws random numbers and changes a buffer."""
    settings = []
    for kind in ("dit", "moody"):
        values = config(latents, "", zero_stage=1, validation={"grid": 0}).model_dump()
        values |= {"denoiser": MOODY} if kind == "moody" else {}
        for deterministic in (False, True):
            asked = {"output": str(tmp_path / f"{kind}-{deterministic}"), "deterministic": deterministic}
            settings.append(parse(TrainConfig, [("test", {**values, **asked})]))
    ranks = gloo.run(train, WORLD, settings)
    for found in ranks:
        for without, with_it in zip(found[::2], found[1::2], strict=True):
            assert len(without["losses"]) == 2 and with_it["losses"] == without["losses"]
            assert all(map(torch.equal, with_it["state"], without["state"]))
            assert without["costs"] == [None] * 2 and -1 < with_it["costs"][0] == with_it["costs"][1]
    assert ranks[0][1]["costs"] == ranks[1][1]["costs"], "that of the slowest rank"
    assert ranks[0][3]["state"][-1] > 0, "the buffer that counts the passes"
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("train: deterministic=true: ")]
    assert len(said) == 2 and all("% time of forward and backward passes (measured: " in line for line in said)


def test_passes_with_and_without_it_take_turns_and_it_stays_on() -> None:
    seen: list[tuple[bool, bool]] = []

    def note() -> None:
        seen.append((torch.are_deterministic_algorithms_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()))

    try:
        median_seconds(note, "cuda")  # its switches are there without a GPU
        note()
    finally:
        choose_kernels("cuda", deterministic=False)
    assert seen == [(False, True), (True, False)] * 6 + [(True, False)]
    seen.clear()
    median_seconds(note, "cpu")
    assert seen == [(False, True)] * 12, "on the CPU there is nothing to choose"


def test_the_cost_in_words() -> None:
    found = Slowdown(with_it=0.03, without=0.024)
    assert found.share == pytest.approx(0.25)
    assert str(found) == "+25.0% time of forward and backward passes (measured: 30.0 ms for 24.0 ms a micro-batch)"

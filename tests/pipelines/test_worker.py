"""The training loop on gloo ranks, without Ray, at every ZeRO stage: guard, validation, schedules, what is logged."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ldm import images, storage
from ldm.config import RequestError, parse
from ldm.diffusion import Diffusion
from ldm.drawing import load_sampler
from ldm.latents.dataset import LatentDataset
from ldm.plan import SamplerConfig
from ldm.snapshot import read_snapshot
from pipelines.train import TrainConfig, zero
from pipelines.train.build import open_holdout
from pipelines.train.config import TrainConfig as Config
from pipelines.train.guard import Guard, Usual
from pipelines.train.loop import Worker
from pipelines.train.objective import Objective
from pipelines.train.schedule import check_schedule, learning_rate
from pipelines.train.signals import FatalError
from tests.pipelines import gloo, tiny
from tests.pipelines.workers import WORLD, Notebook, config, masters, worker

Runs = list[tuple[Config, list[dict[str, Any]]]]
"""(config, what each rank found)"""
STAGES = (0, 1, 2, 3)
BAD_LOSS, BAD_GRADIENT = 1, 3
"""Batches in which rank 1 alone goes wrong."""


def train_with_faults(rank: int, world: int, settings: list[Config]) -> list[dict[str, Any]]:
    """Each run in turn; rank 1 has a NaN in the loss of one batch, and one in a gradient alone of another."""
    found = []
    for each in settings:
        notebook = Notebook(each)
        run = worker(each, notebook)
        if rank == 1:
            _inject(run)
        report = run.run()
        before = masters(run)
        again, _ = run.validation.run()
        found.append(
            {
                "report": report,
                "points": notebook.points,
                "images": notebook.images,
                "validated again": again,
                "unchanged": all(map(torch.equal, before, masters(run))),
                "updates": dict(run.ema.updates),
                "optimizer_step": run.engine.state.optimizer_step,
            }
        )
        run.engine.close()
    return found


def _inject(run: Worker) -> None:
    losses, weight = run.objective.training_losses, next(p for p in run.engine.module.parameters() if p.requires_grad)

    def training_losses(denoiser: Any, batch: Any) -> torch.Tensor:
        found = losses(denoiser, batch)
        if run.batches_read == BAD_LOSS:
            found = found.clone()
            found[0] = math.inf
        if run.batches_read == BAD_GRADIENT:
            found = found + _NanGradient.apply(found)
        return found

    assert weight is not None
    run.objective.training_losses = training_losses  # type: ignore[method-assign]


class _NanGradient(torch.autograd.Function):
    """0, whose gradient is NaN."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(values)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return torch.full_like(gradient, math.nan)


@pytest.fixture(scope="module")
def runs(latents: str, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A run of 4 applied steps at each ZeRO stage."""
    place = tmp_path_factory.mktemp("worker")
    settings = [config(latents, place / f"stage-{stage}", zero_stage=stage) for stage in STAGES]
    ranks = gloo.run(train_with_faults, WORLD, settings)
    return [(each, [rank[number] for rank in ranks]) for number, each in enumerate(settings)]


def test_a_nan_on_one_rank_skips_the_step_on_all(runs: Runs) -> None:
    for _, ranks in runs:
        for found in ranks:
            assert (found["report"]["step"], found["report"]["images_seen"]) == (4, 32)
            assert found["updates"] == {"main": 4, "short": 4} and found["optimizer_step"] == 4
        progress = storage.read_json(storage.join(ranks[0]["report"]["checkpoint"], "checkpoint.json"))["progress"]
        assert progress["batches_read"] == 6
        logged = ranks[0]["points"]
        assert [at for at, point in logged if "train/loss" in point] == [16, 32]
        assert [point["train/skipped_steps"] for _, point in logged if "train/loss" in point] == [1, 1]
        assert all(0 < point["perf/mfu"] < 1 for _, point in logged if "train/loss" in point)
        assert all(map(math.isfinite, (v for _, point in logged for v in point.values())))
        assert ranks[0]["points"][0][1]["train/loss"] == ranks[1]["points"][0][1]["train/loss"]


def test_what_was_skipped_is_named(runs: Runs) -> None:
    for settings, _ in runs:
        folder = Path(settings.output) / "incidents"
        names = [f"batch-{number:010d}-not-finite.json" for number in (BAD_LOSS, BAD_GRADIENT)]
        assert sorted(path.name for path in folder.iterdir()) == names
        data = LatentDataset(settings.latents_urls, global_batch_size=8, holdout=0.2)
        own = data.batch(BAD_LOSS, 1, WORLD).ids.tolist()
        first, second = (json.loads((folder / name).read_text()) for name in names)
        assert [sample["id"] for sample in first["samples"]] == [own[0], own[2]]  # of each micro-batch the first
        assert {sample["loss"] for sample in first["samples"]} == {"inf"} and first["batch"] == BAD_LOSS
        assert {sample["id"] for sample in second["samples"]} == set(data.batch(BAD_GRADIENT).ids.tolist())


def test_validation_is_that_of_the_snapshot_and_changes_nothing(
    runs: Runs,
) -> None:
    """At every stage and on every rank: the loss of the average on each held-out sample, by plain PyTorch."""
    for settings, ranks in runs:
        snapshot = read_snapshot(ranks[0]["report"]["snapshot"])
        denoiser = snapshot.load_denoiser()
        held_out = LatentDataset(settings.latents_urls, global_batch_size=8, holdout=0.2, split="holdout")
        objective = Objective(settings, held_out, torch.device("cpu"))
        times = objective.validation_times()
        assert times == [125, 250, 375, 500, 625, 750, 875, 999]
        with torch.no_grad():
            everything = held_out.all()
            expected = {
                f"val/loss_t{t:04d}": objective.validation_losses(denoiser, everything, t).mean() for t in times
            }
        for found in ranks:
            assert found["unchanged"]
            (logged,) = [point for _, point in found["points"] if "val/loss" in point]
            assert logged == found["validated again"]
            assert logged.pop("val/loss") == pytest.approx(float(sum(expected.values())) / 8, rel=1e-5)
            assert logged == pytest.approx({key: float(loss) for key, loss in expected.items()}, rel=1e-5)


def test_the_grid_is_what_the_snapshot_draws(runs: Runs) -> None:
    """The classes in turn, from the first seeds."""
    for settings, ranks in runs:
        ((key, images_seen, pixels),) = ranks[0]["images"]
        assert (key, images_seen) == ("samples", 32)
        steps = SamplerConfig(num_inference_steps=settings.validation.num_inference_steps)
        sampler = load_sampler(ranks[0]["report"]["snapshot"], batch_size=2, device="cpu")
        drawn = sampler.draw(torch.arange(3), torch.arange(3), steps)
        expected = images.grid(drawn.numpy(), columns=2)
        assert np.abs(pixels.astype(int) - expected).max() <= 1 and expected.std() > 1


def test_what_is_excluded_while_a_run_rests_is_validated_on_no_more(latents: str) -> None:
    settings = config(latents, "output")
    before = open_holdout(settings, None, {})
    gone = before.batch(0).ids[0].item()
    after = open_holdout(settings, None, {0: [], 8: [gone]})
    assert set(after.all().ids.tolist()) == set(before.all().ids.tolist()) - {gone}
    assert gone not in after.batch(0).ids.tolist() and after.chosen["hash"] != before.chosen["hash"]


def test_stages_agree(runs: Runs) -> None:
    losses = [[point["train/loss"] for _, point in ranks[0]["points"] if "train/loss" in point] for _, ranks in runs]
    for found in losses[1:]:
        assert found == pytest.approx(losses[0], abs=1e-6)


def odds(rank: int, world: int, settings: Config) -> tuple[str, Any]:
    """What a run says that skips too often; a step of Adam with weight decay."""
    run = worker(settings, Notebook(settings))
    run.engine.step = lambda rate: zero.Step(applied=False, grad_norm=math.nan)  # type: ignore[method-assign]
    with pytest.raises(FatalError) as caught:
        run.run()
    run.engine.close()
    stage = {"stage": 1, "precision": "fp32", "global_batch_size": 12, "micro_batch_size": 3, "world": world}
    engine = zero.initialize(
        tiny.Tiny(0), zero.deepspeed_config(**stage), weight_decay=0.1, eps=tiny.EPS, decoupled_decay=False
    )
    tiny.train_step(engine, 0)
    return str(caught.value), tiny.snapshot(engine)


@pytest.fixture(scope="module")
def found_odds(latents: str, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, Any]]:
    settings = config(latents, tmp_path_factory.mktemp("odds"), skip_limit=3, micro_batch_size=4)
    return gloo.run(odds, WORLD, settings)


def test_too_many_in_a_row_are_the_end_on_all_ranks(found_odds: list[tuple[str, Any]]) -> None:
    (line, _), (other, _) = found_odds
    assert line == other and "\n" not in line
    assert line.startswith("skip_limit=3: so many steps in a row")
    assert "at batch 2; there is no checkpoint" in line


def test_the_decay_of_adam_is_a_part_of_the_gradient(found_odds: list[tuple[str, Any]]) -> None:
    model = tiny.Tiny(0)
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    x, y = tiny.batch(0)
    (model(x) - y).square().mean().backward()
    torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
    torch.optim.Adam(weights.values(), lr=0.01, weight_decay=0.1, eps=tiny.EPS).step()
    whole = tiny.assemble(pieces for _, pieces in found_odds)
    for name, weight in weights.items():
        torch.testing.assert_close(whole["master", name], weight.detach().flatten(), rtol=2e-5, atol=2e-6)


def test_a_loss_that_stands_out_is_seen() -> None:
    usual = Usual()
    generator = torch.Generator().manual_seed(0)
    losses = (1 + 0.1 * torch.randn(1000, generator=generator)).tolist()
    seen = []
    for loss in losses:
        seen.append(usual.stands_out(loss))
        usual.add(loss)
    assert not any(seen)
    assert usual.stands_out(2.0) and not usual.stands_out(1.3)
    guard, copy = Guard("", 1, usual, 2, 3), Guard("", 1, Usual())
    copy.load(json.loads(json.dumps(guard.state())))
    assert copy == guard


def test_schedules_count_images() -> None:
    base = {"latents": "x", "output": "y", "learning_rate": 0.1, "warmup_images": 100}
    cosine = {"learning_rate_schedule": "cosine", "learning_rate_images": 300, "learning_rate_end": 0.02}
    constant = parse(TrainConfig, [("test", base)])
    assert [learning_rate(constant, seen) for seen in (10, 100, 10**9)] == pytest.approx([0.01, 0.1, 0.1])
    falling = parse(TrainConfig, [("test", {**base, **cosine})])
    rates = [learning_rate(falling, seen) for seen in (50, 100, 150, 200, 300, 999)]
    assert rates == pytest.approx([0.05, 0.1, 0.02 + 0.08 * (1 + math.sqrt(0.5)) / 2, 0.06, 0.02, 0.02])
    check_schedule(falling)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"learning_rate_images": 5}, "learning_rate_images=5: is for learning_rate_schedule=cosine; leave it out"),
        ({"learning_rate_end": 1e-5}, "learning_rate_end=1e-05: is for learning_rate_schedule=cosine; leave it out"),
        (
            {"learning_rate_schedule": "cosine"},
            "learning_rate_images=null: a cosine schedule has an end; give learning_rate_images=32 for this run",
        ),
        (
            {"learning_rate_schedule": "cosine", "learning_rate_images": 50, "warmup_images": 50},
            "learning_rate_images=50: give more than warmup_images=50",
        ),
        (
            {"learning_rate_schedule": "cosine", "learning_rate_images": 50, "learning_rate_end": 1.0},
            "learning_rate_end=1.0: give at most learning_rate=0.01",
        ),
    ],
)
def test_a_schedule_that_is_none_is_refused(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(RequestError) as caught:
        check_schedule(config("x", "y", **changes))
    assert str(caught.value) == line


def test_a_flow_is_validated_up_to_pure_noise() -> None:
    settings = config("x", "y", diffusion={"schedule": "flow"})
    objective = Objective.__new__(Objective)
    objective.config, objective.diffusion = settings, Diffusion(settings.diffusion)
    assert objective.validation_times()[-1] == 1000

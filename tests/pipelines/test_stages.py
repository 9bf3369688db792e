"""Every ZeRO stage, precision and option trains a real DiT as plain PyTorch does, on any number of ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ldm.autoencoder import Autoencoder
from ldm.latents.dataset import LatentDataset
from pipelines.train import zero
from pipelines.train.checkpoint import Part, checkpoint_url, load_checkpoint, read_full, save_checkpoint
from tests.pictures import kl_model, latent_dataset
from tests.pipelines import denoising, gloo, tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # some 25 engines

PRECISIONS = {"fp32": (50, 1e-6), "bf16": (20, 3.4e-4)}  # steps, largest difference of the loss
CASES = [(stage, precision) for stage in zero.STAGES for precision in PRECISIONS]
EARLY, ON_FOUR, ON_ONE, END = 2, 4, 6, 8  # steps
CPU = {"device": "cpu"}
OPTIONS = {
    "offload-1": (1, {"offload_optimizer": CPU}),
    "offload-2": (2, {"offload_optimizer": CPU}),
    "offload-3": (3, {"offload_optimizer": CPU}),
    "offload-weights": (3, {"offload_optimizer": CPU, "offload_param": CPU}),
    "small-buckets-2": (
        2,
        {
            "overlap_comm": True,
            "reduce_scatter": False,
            "reduce_bucket_size": 1000,
            "allgather_bucket_size": 1000,
        },
    ),
    "small-groups-3": (
        3,
        {
            "overlap_comm": True,
            "sub_group_size": 5000,
            "reduce_bucket_size": 5000,
            "stage3_param_persistence_threshold": 0,
            "memory_efficient_linear": False,
        },
    ),
}
Found = dict[Any, dict[str, Any]]


def progress(step: int) -> dict[str, int]:
    return {"step": step}


def two_ranks(rank: int, world: int, url: str, output: str) -> Found:
    """Each stage from the start; with activation checkpointing; and with options, from the checkpoint of ZeRO-1."""
    found: Found = {}
    for stage, precision in CASES:
        run = denoising.sharded(url, world, stage, precision)
        run.train(0, EARLY)
        found[stage, precision] = {"early": run.state()}
        run.train(EARLY, ON_FOUR)
        if (stage, precision) == (1, "fp32"):
            save_checkpoint(output, Part.of(run.engine.state, run.ema), progress(ON_FOUR), zero.all_gather)
            found["saved"] = {"state": run.state()}
        run.train(ON_FOUR, PRECISIONS[precision][0])
        run.engine.close()
        found[stage, precision] |= {"losses": run.losses, "ids": run.ids}

        again = denoising.sharded(url, world, stage, precision, checkpointing=True)
        again.train(0, EARLY)
        again.engine.close()
        found[stage, precision]["checkpointed"] = again.state()
        assert torch.nn.functional.linear is torch._C._nn.linear
    for name, (stage, options) in OPTIONS.items():
        run = denoising.sharded(url, world, stage, options={"zero_optimization": options})
        load_checkpoint(checkpoint_url(output, ON_FOUR), run.engine.state, run.ema, zero.all_gather)
        found[name] = {"loaded": run.state()}
        run.train(ON_FOUR, END)
        save_checkpoint(f"{output}/{name}", Part.of(run.engine.state, run.ema), progress(END), zero.all_gather)
        found[name] |= {"losses": run.losses, "final": run.state()}
        run.engine.close()
    return found


def go_on(rank: int, world: int, url: str, output: str, stage: int, first: int, saved: int, last: int) -> Any:
    """Goes on from the checkpoint of step `first`, and saves at step `saved`."""
    run = denoising.sharded(url, world, stage)
    load_checkpoint(checkpoint_url(output, first), run.engine.state, run.ema, zero.all_gather)
    run.train(first, saved)
    save_checkpoint(output, Part.of(run.engine.state, run.ema), progress(saved), zero.all_gather)
    run.train(saved, last)
    return run.losses, run.ids


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """45 random moments (8, 2, 2), 3 classes."""
    folder = str(tmp_path_factory.mktemp("latents"))
    latent_dataset(folder, Autoencoder(kl_model()), counts=(20, 18, 7))
    return folder


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("output"))


@pytest.fixture(scope="module")
def ranks(url: str, output: str) -> list[Found]:
    return gloo.run(two_ranks, 2, url, output, timeout=540)


@pytest.fixture(scope="module")
def plain(url: str) -> dict[str, list[float]]:
    return {precision: denoising.plain(url, steps, precision) for precision, (steps, _) in PRECISIONS.items()}


def mean_losses(ranks: list[list[float]]) -> list[float]:
    return [sum(of_step) / len(ranks) for of_step in zip(*ranks, strict=True)]


def whole_ids(dataset: LatentDataset, ranks: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """The global batches of ids that the ranks' shares make."""
    steps = []
    for shares in zip(*ranks, strict=True):
        whole = torch.full((denoising.GLOBAL_BATCH,), -1, dtype=torch.int64)
        for rank, share in enumerate(shares):
            whole[dataset.slots(rank, len(ranks))] = share
        steps.append(whole)
    return steps


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_losses_are_those_of_plain_pytorch_on_one_process(ranks, plain, stage, precision):
    losses = mean_losses([rank[stage, precision]["losses"] for rank in ranks])
    steps, tolerance = PRECISIONS[precision]
    assert len(losses) == steps
    assert losses[-1] < 0.9 * losses[0], "nothing is learned"
    assert losses == pytest.approx(plain[precision], rel=0, abs=tolerance)


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_activation_checkpointing_changes_no_bit(ranks, stage, precision):
    for rank in ranks:
        case = rank[stage, precision]
        assert len(case["early"]) == len(case["checkpointed"])
        for one, other in zip(case["early"], case["checkpointed"], strict=True):
            assert one[:3] == other[:3]
            assert torch.equal(one[3], other[3]), one[:2]


@pytest.mark.parametrize("name", OPTIONS)
def test_options_and_offload_load_train_and_save_the_same(ranks, plain, output, name):
    losses = mean_losses([rank[name]["losses"] for rank in ranks])
    assert losses == pytest.approx(plain["fp32"][ON_FOUR:END], rel=0, abs=1e-6)
    loaded = tiny.assemble(rank[name]["loaded"] for rank in ranks)
    saved = tiny.assemble(rank["saved"]["state"] for rank in ranks)
    final = tiny.assemble(rank[name]["final"] for rank in ranks)
    assert loaded.keys() == saved.keys()
    for key in saved:
        assert torch.equal(loaded[key], saved[key]), key
    kinds = (*tiny.KINDS, "ema.main", "ema.short")
    written = {kind: read_full(checkpoint_url(f"{output}/{name}", END), kind) for kind in kinds}
    for kind, parameter in final:
        assert torch.equal(written[kind][parameter].flatten(), final[kind, parameter]), (kind, parameter)
    assert not torch.equal(final["ema.main", "final.linear.weight"], loaded["ema.main", "final.linear.weight"]), (
        "the average stands still"
    )


def test_two_four_and_one_workers_in_stages_1_3_and_2_are_one_run(ranks, plain, url, output):
    four = gloo.run(go_on, 4, url, output, 3, ON_FOUR, ON_ONE, END)
    one = gloo.run(go_on, 1, url, output, 2, ON_ONE, END, END)
    dataset = denoising.open_latents(url)
    expected = [dataset.batch(step).ids for step in range(50)]
    legs = {
        "two": (0, [rank[1, "fp32"]["losses"] for rank in ranks], [rank[1, "fp32"]["ids"] for rank in ranks]),
        "four": (ON_FOUR, [losses for losses, _ in four], [ids for _, ids in four]),
        "one": (ON_ONE, [losses for losses, _ in one], [ids for _, ids in one]),
    }
    for leg, (first, losses, ids) in legs.items():
        steps = slice(first, first + len(losses[0]))
        assert mean_losses(losses) == pytest.approx(plain["fp32"][steps], rel=0, abs=1e-6), leg
        assert all(torch.equal(a, b) for a, b in zip(whole_ids(dataset, ids), expected[steps], strict=True)), leg

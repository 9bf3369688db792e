"""The estimate of memory against what DeepSpeed really holds, and what a dry run says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from jobs import cli
from ldm.autoencoder import Autoencoder
from ldm.cost import LiveBytes, cost
from ldm.denoiser import DenoiserConfig, build_denoiser
from pipelines.train import zero
from pipelines.train.ema import Ema, EmaProfile
from pipelines.train.memory import memory
from tests.pictures import kl_model, latent_dataset
from tests.pipelines import gloo

DENOISER = DenoiserConfig(hidden_size=192, depth=3, num_heads=3)
SHAPE = (4, 8, 8)
MICRO_BATCH = 4
CASES = [(stage, "fp32", steps, "") for stage in zero.STAGES for steps in (1, 2)] + [(1, "bf16", 2, "")]
CASES += [(stage, "fp32", steps, "optimizer") for stage in (1, 2, 3) for steps in (1, 2)] + [(3, "fp32", 1, "weights")]
CPU = {"device": "cpu"}
OFFLOADED = {
    "": {},
    "optimizer": {"zero_optimization": {"offload_optimizer": CPU}},
    "weights": {"zero_optimization": {"offload_optimizer": CPU, "offload_param": CPU}},
}


def denoiser() -> torch.nn.Module:
    return build_denoiser(DENOISER, in_channels=4, sample_size=SHAPE[1:], num_classes=10)


def held(rank: int, world: int) -> dict[tuple[int, str, int, str], int]:
    """The most bytes of tensors that a rank holds in its second step, by (stage, precision, micro-batches, what is
    offloaded)."""
    return {case: _held(world, *case) for case in CASES}


def _held(world: int, stage: int, precision: str, micro_steps: int, offloaded: str) -> int:
    with LiveBytes() as live:
        config = zero.deepspeed_config(
            stage=stage,
            precision=precision,
            global_batch_size=MICRO_BATCH * world * micro_steps,
            micro_batch_size=MICRO_BATCH,
            world=world,
            options=OFFLOADED[offloaded],
        )
        model = denoiser()
        # As large as the model: a bucket of 50 million elements would hide all else.
        elements = sum(p.numel() for p in model.parameters())
        for bucket in ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size"):
            config["zero_optimization"][bucket] = elements
        engine = zero.initialize(model, config)
        ema = Ema(engine.state, [EmaProfile("main", 0.9999), EmaProfile("short", 0.999)])
        for _ in range(2):
            live.peak = live.live
            for _ in range(micro_steps):
                t = labels = torch.zeros(MICRO_BATCH, dtype=torch.int64)
                loss = engine(torch.ones(MICRO_BATCH, *SHAPE), t, labels).float().square().mean()
                engine.backward(loss)
                engine.step(1e-4)
            ema.update()
        engine.close()
    return live.peak


@pytest.fixture(scope="module")
def ranks() -> list[dict[tuple[int, str, int, str], int]]:
    return gloo.run(held, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "precision", "micro_steps", "offloaded"), CASES)
def test_memory_is_what_deepspeed_holds(ranks, stage, precision, micro_steps, offloaded):
    with torch.device("meta"):
        costs = cost(denoiser(), SHAPE, precision, has_labels=True)
    options = zero.deepspeed_config(
        stage=stage,
        precision=precision,
        global_batch_size=2,
        micro_batch_size=1,
        world=2,
        options=OFFLOADED[offloaded],
    )["zero_optimization"]
    on_cpu, on_gpu = (
        memory(
            costs,
            stage=stage,
            world=2,
            micro_batch=MICRO_BATCH,
            accumulates=micro_steps > 1,
            averages=2,
            options=options,
            on_gpu=on_gpu,
        )
        for on_gpu in (False, True)
    )
    for rank in ranks:
        assert rank[stage, precision, micro_steps, offloaded] == pytest.approx(on_cpu.total, rel=0.15), on_cpu
    assert on_gpu.total + on_gpu.host == on_cpu.total + on_cpu.host, "the same bytes, in two places"
    state = 3 * 2 * costs.trainable_parameters
    assert (on_cpu.total - on_gpu.total > state) is bool(offloaded), "masters and moments at least are moved"


def test_a_dry_run_says_what_it_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    autoencoder = Autoencoder(kl_model())
    latent_dataset(str(tmp_path / "latents"), autoencoder)
    autoencoder.save(str(tmp_path / "latents" / "autoencoder"))
    command = f"train latents={tmp_path}/latents output={tmp_path}/run device=cpu max_steps=13 global_batch_size=8"
    command += " num_workers=2 denoiser.hidden_size=16 denoiser.depth=1 denoiser.num_heads=2 denoiser.patch_size=1"
    before = sorted(tmp_path.rglob("*"))
    assert cli.main([*command.split(), "price_per_hour=3", "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["steps_per_epoch"], found["epochs"]) == (26 / 8, 4.0)
    assert found["training_flops"] == 3 * found["forward_flops"]
    assert found["total_flops"] == 13 * 8 * found["training_flops"]
    seconds = found["total_flops"] / (2 * found["worker_flops_per_second"] * found["assumed_mfu"])
    assert found["hours"] == pytest.approx(seconds / 3600)
    assert found["price"] == pytest.approx(found["hours"] * 2 * 3)
    assert [row["stage"] for row in found["memory"]] == [0, 1, 2, 3]
    assert all(row["total"] > row["weights"] + row["optimizer"] + row["averages"] for row in found["memory"])
    assert cli.main([*command.split(), "activation_checkpointing=true", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "hours: assumed, not measured: 40% of the matmul rate of" in text and "\n  2 *" in text
    assert "micro_batch_size=auto: the memory is for a worker's whole share of 4" in text and "price" not in text
    header, row = (line.replace("*", "").split() for line in text.splitlines() if line.startswith(("  ZeRO", "  2 *")))
    shown = dict(zip(header, map(float, row), strict=True))
    assert shown.keys() >= {"gradients", "activations", "communication", "step", "total"}, "what the total is made of"
    assert sorted(tmp_path.rglob("*")) == before

"""The DeepSpeed adapter on real gloo processes, against plain PyTorch on the whole batch."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import nn

from ldm.config import RequestError
from pipelines.train import zero
from pipelines.train.ema import Ema, EmaProfile
from tests.pipelines import gloo, tiny

pytestmark = pytest.mark.slow

CASES = [(stage, precision) for stage in zero.STAGES for precision in zero.PRECISIONS]
PROFILES = (EmaProfile("short", 0.3), EmaProfile("long", 0.999))
STEPS = 5


def scenario(rank: int, world: int) -> dict[tuple[int, str], dict[str, Any]]:
    """Everything that the tests below ask of a rank, for every stage and precision, one engine after another."""
    found = {}
    for stage, precision in CASES:
        run = tiny.engine(rank, world, stage, precision)
        state = run.state
        case: dict[str, Any] = {
            "primed": tiny.snapshot(run),
            "primed_step": state.optimizer_step,
            "shapes": state.shapes,
            "buffers": sorted(state.buffers),
        }
        ema = Ema(state, PROFILES)
        case["losses"], case["norms"], case["masters"] = [], [], [case["primed"]]
        for step in range(STEPS):
            done, losses = tiny.train_step(run, step)
            assert done.applied
            ema.update()
            case["losses"].append(losses)
            case["norms"].append(done.grad_norm)
            case["masters"].append([piece for piece in tiny.snapshot(run) if piece[0] == "master"])
        case["trained"], case["trained_step"] = tiny.snapshot(run, ema), state.optimizer_step
        case["poisoned"], _ = tiny.train_step(run, STEPS, poison=rank == world - 1)
        case["after_poison"], case["after_poison_step"] = tiny.snapshot(run), state.optimizer_step
        for held in state.held:
            held.master.copy_(torch.linspace(-1, 1, math.prod(held.shape))[held.start : held.start + held.count])
        state.publish()
        with torch.no_grad():
            case["published"] = run(tiny.batch(0)[0]).float()
        run.close()
        found[stage, precision] = case
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[tuple[int, str], dict[str, Any]]]:
    return gloo.run(scenario, 3)


@functools.cache
def reference(world: int, precision: str) -> tuple[tiny.Tiny, list[float], list[dict[str, torch.Tensor]]]:
    """Plain PyTorch: the same micro-batches in one process; returns the model, gradient norms, weights by step."""
    model = tiny.Tiny(0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(parameters, weight_decay=tiny.WEIGHT_DECAY, eps=tiny.EPS)
    norms, weights = [], []
    for step in range(STEPS):
        x, y = tiny.batch(step)
        for part_x, part_y in zip(x.chunk(2 * world), y.chunk(2 * world), strict=True):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                output = model(part_x)
            ((output.float() - part_y).square().mean() / 2).backward()
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad /= world
        norms.append(nn.utils.clip_grad_norm_(parameters, 0.3).item())
        adamw.param_groups[0]["lr"] = 0.01 / (1 + step)
        adamw.step()
        adamw.zero_grad()
        weights.append({n: p.detach().flatten().clone() for n, p in model.named_parameters() if p.requires_grad})
    return model, norms, weights


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_priming_moves_no_weight_and_every_element_is_on_one_rank(ranks, stage, precision):
    model = tiny.Tiny(0)
    cases = [rank[stage, precision] for rank in ranks]
    whole = tiny.assemble(case["primed"] for case in cases)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name for _, name in whole} == set(trainable)
    for name, parameter in trainable.items():
        assert torch.equal(whole["master", name], parameter.detach().flatten())
        assert not whole["exp_avg", name].any()
        assert not whole["exp_avg_sq", name].any()
    for case in cases:
        assert case["primed_step"] == 0
        assert case["shapes"] == {name: p.shape for name, p in trainable.items()}
        assert case["buffers"] == ["offset", "scale"]  # the frozen parameter, and the persistent buffer


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_training_clipping_and_ema_are_those_of_plain_pytorch(ranks, stage, precision):
    cases = [rank[stage, precision] for rank in ranks]
    _, norms, weights = reference(len(ranks), precision)
    whole = tiny.assemble(case["trained"] for case in cases)
    for name, expected in weights[-1].items():
        torch.testing.assert_close(whole["master", name], expected, rtol=2e-5, atol=2e-6)
    assert max(norms) > 0.3, "clipping is not exercised"
    for case in cases:
        assert case["norms"] == pytest.approx(norms, rel=1e-5)
        assert case["norms"] == cases[0]["norms"], "ranks disagree on the norm"
        assert case["trained_step"] == STEPS


@pytest.mark.parametrize(("stage", "precision"), CASES)
@pytest.mark.parametrize("profile", PROFILES, ids=lambda profile: profile.name)
def test_sharded_ema_is_the_ema_of_the_whole_model(ranks, stage, precision, profile):
    cases = [rank[stage, precision] for rank in ranks]
    whole = tiny.assemble(case["trained"] for case in cases)
    masters = [tiny.assemble(case["masters"][step] for case in cases) for step in range(STEPS + 1)]
    names = [name for kind, name in masters[-1] if kind == "master"]
    expected = {name: masters[0]["master", name] for name in names}
    for k, after_step in enumerate(masters[1:]):
        decay = min(profile.decay, (1 + k) / (10 + k))
        expected = {name: decay * expected[name] + (1 - decay) * after_step["master", name] for name in names}
    assert len(names) == 6
    for name, average in expected.items():
        found = whole[f"ema.{profile.name}", name]
        assert not torch.equal(found, masters[-1]["master", name])
        torch.testing.assert_close(found, average, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_a_nan_on_one_rank_skips_the_step_on_all(ranks, stage, precision):
    cases = [rank[stage, precision] for rank in ranks]
    before = tiny.assemble([p for p in case["trained"] if not p[0].startswith("ema")] for case in cases)
    after = tiny.assemble(case["after_poison"] for case in cases)
    for case in cases:
        assert not case["poisoned"].applied
        assert not math.isfinite(case["poisoned"].grad_norm)
        assert case["after_poison_step"] == STEPS
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_written_masters_are_what_the_next_forward_uses(ranks, stage, precision):
    model = tiny.Tiny(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view(parameter.shape))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            expected = model(tiny.batch(0)[0]).float()
    for rank in ranks:
        torch.testing.assert_close(rank[stage, precision]["published"], expected, rtol=1e-5, atol=1e-5)


def test_ema_decay_warms_up():
    profile = EmaProfile("long", 0.9999)
    assert [profile.decay_at(k) for k in (0, 1, 90)] == [0.1, 2 / 11, 0.91]
    assert profile.decay_at(10**6) == 0.9999


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"stage": 7}, "zero_stage=7: expected 0, 1, 2 or 3"),
        ({"precision": "fp16"}, "precision=fp16: expected fp32 or bf16"),
        ({"world": 3}, "global_batch_size=8: expected a multiple of micro_batch_size x workers = 2 x 3"),
    ],
)
def test_a_wrong_request_is_one_line(wrong, line):
    right = {"stage": 2, "precision": "fp32", "global_batch_size": 8, "micro_batch_size": 2, "world": 2}
    with pytest.raises(RequestError) as caught:
        zero.deepspeed_config(**right | wrong)
    assert str(caught.value) == line


def fail_on_rank_1(rank: int, world: int) -> None:
    if rank == 1:
        raise ValueError("this very rank")
    torch.distributed.barrier()  # rank 0 waits for a rank that is gone


def test_the_helper_raises_a_childs_traceback():
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 failed.*fail_on_rank_1.*ValueError: this very rank"):
        gloo.run(fail_on_rank_1, 2)

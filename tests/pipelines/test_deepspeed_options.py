"""The `deepspeed:` section: merged deeply, and refused in one line before any work where the trainer owns the key."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from ldm.config import RequestError
from pipelines.train import zero
from pipelines.train.deepspeed_options import ALLOWED, OWNED
from pipelines.train.deterministic import use_deterministic

RIGHT = {"stage": 2, "precision": "bf16", "global_batch_size": 64, "micro_batch_size": 4, "world": 8}


def test_settings_are_merged_into_the_trainers_own():
    before = zero.deepspeed_config(**RIGHT)
    offload = {"device": "cpu", "pin_memory": "false"}  # as the command line gives it
    options = {"zero_optimization": {"overlap_comm": True, "offload_optimizer": offload}, "steps_per_print": "10"}
    merged = zero.deepspeed_config(**RIGHT, options=options)
    assert merged["zero_optimization"] == before["zero_optimization"] | {
        "overlap_comm": True,
        "offload_optimizer": {"device": "cpu", "pin_memory": False},
    }
    assert merged | {"zero_optimization": before["zero_optimization"]} == before | {"steps_per_print": 10}
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("train_batch_size", 3, "=3: is set by the trainer; give global_batch_size"),
        ("gradient_clipping", 0.5, "=0.5: is set by the trainer; give gradient_clip"),
        ("fp16", {"enabled": True}, ": is set by the trainer; give precision"),
        ("zero_optimization.stage", 3, "=3: is set by the trainer; give zero_stage"),
        (
            "zero_optimization.round_robin_gradients",
            True,
            "=true: is set by the trainer; leave it out: checkpoints know one order of the weights in DeepSpeed's"
            " buffers",
        ),
        (
            "zero_optimization.overlap_com",
            True,
            "=true: is no setting of DeepSpeed that may be given here; the nearest is"
            " deepspeed.zero_optimization.overlap_comm",
        ),
        (
            "overlap_comm",
            True,
            "=true: is no setting of DeepSpeed that may be given here; the nearest is"
            " deepspeed.zero_optimization.overlap_comm",
        ),
        ("nonsense", 1, "=1: is no setting of DeepSpeed that may be given here; leave it out"),
        ("zero_optimization.offload_optimizer.device", "nvme", "=nvme: is not supported; give cpu, or none"),
        (
            "zero_optimization.offload_param.device",
            "cpu",
            "=cpu: zero_stage=2 has nothing to offload; give zero_stage=3",
        ),
        ("zero_optimization.reduce_bucket_size", -3, "=-3: Input should be greater than 0"),
        ("comms_logger.enabled", "loud", "=loud: Input should be a valid boolean, unable to interpret input"),
        ("log_level", "loud", '="loud": should be one of "debug", "info", "warning", "error"'),
        ("steps_per_print", "often", '="often": should be a number of steps, 1 or more'),
    ],
)
def test_a_wrong_setting_is_one_line(key, value, line):
    options: Any = value
    for part in reversed(key.split(".")):
        options = {part: options}
    with pytest.raises(RequestError) as caught:
        zero.deepspeed_config(**RIGHT, options=options)
    assert str(caught.value) == f"deepspeed.{key}{line}"


def test_all_that_the_trainer_writes_is_owned_or_allowed():
    config = zero.deepspeed_config(**RIGHT)
    flat = {*config, *(f"zero_optimization.{key}" for key in config["zero_optimization"])} - {"zero_optimization"}
    assert flat <= ALLOWED | OWNED.keys()
    assert not ALLOWED & OWNED.keys()


def test_on_a_gpu_deterministic_kernels_are_chosen_and_on_the_cpu_nothing_changes(monkeypatch):
    sdp = torch.backends.cuda
    switches = (
        (sdp.enable_mem_efficient_sdp, sdp.mem_efficient_sdp_enabled),
        (sdp.enable_cudnn_sdp, sdp.cudnn_sdp_enabled),
    )
    before = [enabled() for _, enabled in switches]
    for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO"):
        monkeypatch.setenv(name, "before")
    for module, name in ((torch.backends.cudnn, "benchmark"), (torch.backends.cudnn, "deterministic")):
        monkeypatch.setattr(module, name, getattr(module, name))
    use_deterministic("cpu")
    assert not torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == "before"
    try:
        use_deterministic("cuda")
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert torch.backends.cudnn.deterministic
        assert not any(enabled() for _, enabled in switches)
        assert torch.backends.cuda.math_sdp_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True
        for (enable, _), was in zip(switches, before, strict=True):
            enable(was)

"""FLOPs against formulas by hand, activation memory against what a real pass holds."""

import contextlib
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.cost import Cost, LiveBytes, UntraceableError, cost
from ldm.denoiser import DenoiserConfig, build_denoiser
from ldm.dit import Block, fused_attention
from ldm.unet import UNetConfig

SMALL = DenoiserConfig(hidden_size=96, depth=2, num_heads=3)


def meta(config: DenoiserConfig, size: int = 32, classes: int | None = 1000) -> nn.Module:
    with torch.device("meta"):
        return build_denoiser(config, in_channels=4, sample_size=(size, size), num_classes=classes)


def costs(
    config: DenoiserConfig, precision: str = "fp32", size: int = 32, classes: int | None = 1000, on_gpu: bool = True
) -> Cost:
    shape, has_labels = (4, size, size), classes is not None
    return cost(meta(config, size, classes), shape, precision, has_labels=has_labels, on_gpu=on_gpu)


def dit_multiply_adds(tokens: int, d: int, depth: int, patch_dim: int) -> int:
    """By hand: qkv, both attention products, out, MLP of 4 d; modulations; embeddings; the last layer."""
    block = tokens * (3 * d * d + d * d + 8 * d * d) + 2 * tokens * tokens * d + 6 * d * d
    timestep = 256 * d + d * d
    return depth * block + timestep + tokens * patch_dim * d + 2 * d * d + tokens * d * patch_dim


def test_flops_of_dit_are_those_of_the_formula_and_the_paper() -> None:
    """Two for a multiply-add. The paper gives 118.64 G multiply-adds for DiT-XL/2 at 256 px."""
    assert dit_multiply_adds(256, 1152, 28, 16) == pytest.approx(118.64e9, rel=0.001)
    found = costs(SMALL)
    assert found.forward_flops == 2 * dit_multiply_adds(256, 96, 2, 16)
    assert (found.training_flops, found.hardware_flops(True)) == (3 * found.forward_flops, 4 * found.forward_flops)
    assert found.parameters == found.trainable_parameters == sum(p.numel() for p in meta(SMALL).parameters())


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_peak_is_that_of_a_real_pass(precision: str, on_gpu: bool) -> None:
    """On a CPU; and with the attention of a GPU, which keeps less."""
    found = costs(SMALL, precision, size=16, on_gpu=on_gpu)
    real = build_denoiser(SMALL, in_channels=4, sample_size=(16, 16), num_classes=1000)
    for parameter in real.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    batch = 5
    given = (torch.ones(batch, 4, 16, 16), torch.ones(batch, dtype=torch.int64), torch.ones(batch).long())
    attention = fused_attention() if on_gpu else contextlib.nullcontext()
    with attention, LiveBytes([*given, *real.parameters(), *real.buffers()]) as live:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            output = real(*given)
        output.float().square().mean().backward()
    assert found.peak_bytes(batch) == pytest.approx(live.peak, rel=0.03)


def test_checkpointed_blocks_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, forward = costs(SMALL, size=16), Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, *args: checkpoint(forward, self, *args, use_reentrant=False))
    found = costs(SMALL, size=16)
    assert found.forward_flops == plain.forward_flops
    assert 0.3 * plain.activation_bytes < found.activation_bytes < 0.6 * plain.activation_bytes


def test_a_unet_and_a_class_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = UNetConfig(model_channels=32, channel_multipliers=(1, 2), attention_resolutions=(2,), num_res_blocks=1)
    found = costs(DenoiserConfig(type="unet", unet=unet), size=16, classes=None)
    assert found.forward_flops > 2 * found.parameters and found.activation_bytes > 0
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    mine = costs(DenoiserConfig(type="custom_denoiser:MyDenoiser", options={"width": 8}), size=8)
    convolutions = 64 * 9 * (4 * 8 + 4 * 8 * 8 + 8 * 4)  # first, four blocks, last
    assert mine.forward_flops == 2 * (convolutions + 32 * 8 + 8 * 8)
    assert mine.buffer_bytes == 0


class Impatient(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        return x if float(x.sum()) > 0 else x * self.scale


def test_what_needs_values_is_said() -> None:
    with torch.device("meta"):
        denoiser = Impatient()
    with pytest.raises(UntraceableError, match=r"^Impatient: cannot be counted, .*\n?.*$"):
        cost(denoiser, (4, 8, 8), "fp32", has_labels=False)
    assert denoiser.scale.is_meta

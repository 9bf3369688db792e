"""Activation checkpointing: the same bits from fewer kept tensors."""

import copy

import pytest
import torch
from torch import Tensor, nn

from ldm.activations import checkpoint_activations
from ldm.config import RequestError
from ldm.denoiser import DenoiserConfig, build_denoiser
from ldm.unet import UNetConfig

UNET = UNetConfig(
    model_channels=16,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(2,),
    head_channels=8,
    norm_groups=8,
)
DENOISERS = {
    "dit": DenoiserConfig(hidden_size=32, depth=3, num_heads=2, patch_size=2, qk_norm=True, positions="rotary"),
    "unet": DenoiserConfig(type="unet", unet=UNET),
}


def gradients(denoiser: nn.Module, autocast: bool) -> tuple[dict[str, Tensor], int]:
    """The gradient of each weight, and the elements that were kept for the backward pass."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 4, 8, 8, generator=generator)
    t, labels = torch.tensor([0, 10, 500, 999]), torch.tensor([0, 1, 2, 3])
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    denoiser.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = denoiser(x, t, labels)
        loss = (output.float() - x).square().mean()
    weights = {p.untyped_storage().data_ptr() for p in denoiser.parameters()}
    loss.backward()
    found = {name: p.grad.clone() for name, p in denoiser.named_parameters() if p.grad is not None}
    return found, sum(size for place, size in kept.items() if place not in weights)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", DENOISERS)
def test_gradients_are_bitwise_the_same_and_less_is_kept(kind, autocast):
    denoiser = build_denoiser(DENOISERS[kind], in_channels=4, sample_size=(8, 8), num_classes=3)
    with torch.no_grad():
        for parameter in denoiser.parameters():  # a fresh denoiser has no gradient in most of its weights
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    checkpointed = copy.deepcopy(denoiser)
    checkpoint_activations(checkpointed)
    assert list(checkpointed.state_dict()) == list(denoiser.state_dict())
    expected, all_kept = gradients(denoiser, autocast)
    found, kept = gradients(checkpointed, autocast)
    assert found.keys() == expected.keys() == {name for name, _ in denoiser.named_parameters()}
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    assert kept < 0.6 * all_kept


def test_a_denoiser_without_blocks_is_refused():
    with pytest.raises(RequestError, match="activation_checkpointing=true: Linear has no list `blocks`"):
        checkpoint_activations(nn.Linear(2, 2))

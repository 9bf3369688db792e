"""What DiT can be told: each option against its formula, and the default as it was."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from ldm.config import Config, RequestError, parse
from ldm.denoiser import DenoiserConfig, build_denoiser, compile_denoiser
from ldm.diffusion import Diffusion, DiffusionConfig
from ldm.dit import Block, DiT, DiTConfig, SwiGLU, attention, rotary_embedding, rotate

TINY: dict[str, Any] = {"hidden_size": 32, "depth": 2, "num_heads": 2}
ALL = {"qk_norm": True, "norm": "rmsnorm", "mlp": "swiglu", "positions": "rotary", "learned_sigma": True}


def build(size: tuple[int, int] = (8, 8), **options: Any) -> DiT:
    denoiser = build_denoiser(DenoiserConfig(**TINY | options), in_channels=4, sample_size=size, num_classes=10)
    assert isinstance(denoiser, DiT)
    return denoiser


def filled(module: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data.normal_(std=0.1, generator=generator)
    return module.eval()


def inputs(size: tuple[int, int] = (8, 8)) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(3, 4, *size, generator=torch.Generator().manual_seed(2))
    return x, torch.arange(3) * 400, torch.arange(3)


@pytest.mark.parametrize("options", [ALL, *({key: value} for key, value in ALL.items())], ids=str)
def test_every_option_begins_at_zero_keeps_the_shape_and_learns(options):
    denoiser = build((4, 12), **options)
    x, t, labels = inputs((4, 12))
    assert torch.equal(denoiser(x, t, labels), torch.zeros_like(x))
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=0.01)
    before = {name: p.detach().clone() for name, p in denoiser.named_parameters()}
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    for _ in range(4):  # zeros unlock from the end backwards
        optimizer.zero_grad()
        Diffusion(DiffusionConfig()).loss(denoiser, x, noise, t, labels).mean().backward()
        optimizer.step()
    assert [name for name, p in denoiser.named_parameters() if torch.equal(p, before[name])] == []
    with torch.autocast("cpu", torch.bfloat16):
        answer = denoiser(x, t, labels)
    assert answer.dtype == torch.float32 and answer.isfinite().all()


def test_without_options_a_block_has_the_weights_that_it_had():
    layers = ("qkv", "attention_out", "mlp.0", "mlp.2", "modulation")
    expected = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert set(build().blocks[0].state_dict()) == expected


def test_qk_norm_makes_attention_blind_to_the_scale_of_queries_and_keys():
    block = filled(Block(DiTConfig(**TINY, qk_norm=True)))
    x = torch.randn(2, 5, 32)
    before = block.attend(x, None)
    block.qkv.weight.data[:64] *= 100
    block.qkv.bias.data[:64] *= 100
    torch.testing.assert_close(block.attend(x, None), before, rtol=0, atol=1e-4)
    head = torch.randn(7, 16)
    expected = head / (head.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * block.q_norm.weight
    torch.testing.assert_close(block.q_norm(head), expected)


def test_rmsnorm_has_no_weights_and_keeps_the_mean():
    x = torch.randn(7, 32) + 3
    norm = build(norm="rmsnorm").blocks[0].norm1
    assert list(norm.parameters()) == []
    torch.testing.assert_close(norm(x), x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt())


def test_swiglu_is_its_formula_with_about_as_many_weights():
    gated = build(mlp="swiglu").blocks[0].mlp
    assert isinstance(gated, SwiGLU)
    x = torch.randn(5, 32)
    gate, value = F.linear(x, gated.hidden.weight, gated.hidden.bias).split(85, dim=-1)  # 2/3 of 128
    torch.testing.assert_close(gated(x), F.linear(gate * torch.sigmoid(gate) * value, gated.out.weight, gated.out.bias))
    counts = [sum(p.numel() for p in mlp.parameters()) for mlp in (gated, build().blocks[0].mlp)]
    assert counts[0] == pytest.approx(counts[1], rel=0.02)


def test_rotary_positions_turn_pairs_as_complex_numbers_do():
    """A pair is a complex number times exp(i * place * frequency): half the pairs by the column, half by the row."""
    rows, columns, d = 3, 5, 16
    x = torch.randn(2, 2, rows * columns, d)
    found = rotate(x, rotary_embedding(d, (rows, columns)))
    frequencies = [10_000 ** -(i / (d // 4)) for i in range(d // 4)]
    for token in range(rows * columns):
        row, column = divmod(token, columns)
        angles = torch.tensor([column * f for f in frequencies] + [row * f for f in frequencies])
        numbers = torch.complex(x[:, :, token, : d // 2], x[:, :, token, d // 2 :]) * torch.exp(1j * angles)
        torch.testing.assert_close(found[:, :, token], torch.cat([numbers.real, numbers.imag], dim=-1))


def test_rotary_products_depend_on_the_distance_alone():
    q, k = torch.randn(16).expand(1, 1, 36, 16), torch.randn(16).expand(1, 1, 36, 16)
    rotations = rotary_embedding(16, (6, 6))
    scores = (rotate(q, rotations) @ rotate(k, rotations).transpose(-1, -2)).reshape(6, 6, 6, 6)
    torch.testing.assert_close(scores[1, 2, 3, 1], scores[2, 4, 4, 3])
    assert not torch.allclose(scores[1, 2, 3, 1], scores[1, 2, 1, 3])


def test_a_learned_sigma_is_there_and_not_answered():
    both, plain = filled(build(learned_sigma=True)), filled(build())
    weights = both.state_dict()
    for name in ("final.linear.weight", "final.linear.bias"):
        weights[name] = weights[name].unflatten(0, (4, 8))[:, :4].flatten(0, 1)
    plain.load_state_dict(weights)
    assert torch.equal(both(*inputs()), plain(*inputs()))
    both(*inputs()).sum().backward()
    gradient = both.final.linear.weight.grad.unflatten(0, (4, 8))
    assert (gradient[:, :4] != 0).any() and (gradient[:, 4:] == 0).all()


@pytest.mark.parametrize(("frequencies", "shift"), [("paper", 0), ("diffusers", 1)])
def test_timestep_frequencies(frequencies, shift):
    embedding = build(timestep_frequencies=frequencies).timestep_embedding
    t = torch.tensor([0, 1, 10, 500, 999])
    waves = get_timestep_embedding(t, 256, flip_sin_to_cos=True, downscale_freq_shift=shift)
    expected = embedding.out(F.silu(embedding.hidden(waves)))
    torch.testing.assert_close(embedding(t), expected, rtol=0, atol=1e-6)
    assert math.isclose(waves[1, 128 + 127].item(), math.sin(10_000 ** -(127 / (128 - shift))), rel_tol=1e-5)


class Request(Config):
    denoiser: DenoiserConfig = DenoiserConfig()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["norm=batch"], "denoiser.norm=batch: input should be 'layernorm' or 'rmsnorm'"),
        (
            ["positions=rotary", "num_heads=64"],
            "denoiser.positions=rotary: turns pairs along two axes, so hidden_size / num_heads = 6 must be",
        ),
        (["qknorm=true"], "denoiser.qknorm=true: unknown key; did you mean 'denoiser.qk_norm'?"),
    ],
)
def test_wrong_options_are_refused(overrides, expected):
    with pytest.raises(RequestError) as refused:
        parse(Request, [], [f"denoiser.{override}" for override in overrides])
    assert str(refused.value).startswith(expected)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_attention_by_matmuls_is_the_fused_one(dtype, bound):
    q, k, v = torch.randn(3, 2, 6, 64, 24, generator=torch.Generator().manual_seed(4)).to(dtype)  # 24^-0.5 is no bf16
    found, expected = attention(q, k, v), F.scaled_dot_product_attention(*(x.double() for x in (q, k, v)))
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=bound)


@pytest.mark.slow
def test_compiled_it_has_the_same_answers_gradients_and_names():
    eager, compiled = filled(build(depth=3)), filled(build(depth=3))
    compile_denoiser(compiled)
    assert compiled.state_dict().keys() == eager.state_dict().keys()
    for denoiser in (eager, compiled):
        denoiser(*inputs()).square().sum().backward()
    torch.testing.assert_close(compiled(*inputs()), eager(*inputs()), rtol=0, atol=1e-5)
    for (name, one), other in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        assert (one.grad - other.grad).norm() <= 1e-5 * one.grad.norm(), name

"""DiT against the paper's figures and against diffusers; what is refused; a class of the user's own."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ldm.config import Config, RequestError, parse
from ldm.denoiser import DenoiserConfig, build_denoiser
from ldm.diffusion import Diffusion, DiffusionConfig
from ldm.dit import DiT, TimestepEmbedding, patchify, position_embedding, unpatchify

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TINY = DenoiserConfig(hidden_size=32, depth=2, num_heads=2)


def build(config: DenoiserConfig = TINY, **changes: Any) -> nn.Module:
    return build_denoiser(config, **{"in_channels": 4, "sample_size": (8, 8), "num_classes": 10, **changes})


def filled(denoiser: nn.Module, std: float = 0.1) -> nn.Module:
    """Weights that are nowhere zero, for a fresh DiT answers 0 to everything."""
    generator = torch.Generator().manual_seed(1)
    for parameter in denoiser.parameters():
        parameter.data.normal_(std=std, generator=generator)
    return denoiser.eval()


def inputs(count: int = 3, size: tuple[int, int] = (8, 8)) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(count, 4, *size, generator=torch.Generator().manual_seed(2))
    return x, torch.arange(count) * 400, torch.arange(count)


@pytest.mark.parametrize(
    ("hidden_size", "depth", "num_heads", "patch_size", "millions", "gflops"),
    [(1152, 28, 16, 2, 675, 118.64), (384, 12, 6, 2, 33, 6.06), (768, 12, 12, 4, 130, 5.56)],
)
def test_size_and_flops_are_those_of_the_paper(
    hidden_size: int, depth: int, num_heads: int, patch_size: int, millions: int, gflops: float
) -> None:
    """DiT-XL/2, S/2 and B/4 at 256 px: arXiv 2212.09748, tables 1 and 4 (its Gflops are multiply-adds)."""
    config = DenoiserConfig(hidden_size=hidden_size, depth=depth, num_heads=num_heads, patch_size=patch_size)
    with torch.device("meta"):
        denoiser = build(config, sample_size=(32, 32), num_classes=1000)
        label = torch.zeros(1, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            assert denoiser(torch.empty(1, 4, 32, 32), label, label).shape == (1, 4, 32, 32)
    assert sum(p.numel() for p in denoiser.parameters()) / 1e6 == pytest.approx(millions, abs=0.6)
    assert counter.get_total_flops() / 2e9 == pytest.approx(gflops, rel=0.005)


def test_a_fresh_dit_answers_zero_and_its_blocks_change_nothing() -> None:
    denoiser = build()
    assert isinstance(denoiser, DiT)
    x, t, labels = inputs()
    assert torch.equal(denoiser(x, t, labels), torch.zeros_like(x))
    tokens, condition = torch.randn(2, 16, 32), torch.randn(2, 32)
    for block in denoiser.blocks:
        assert torch.equal(block(tokens, condition), tokens)


def test_training_reaches_every_parameter() -> None:
    denoiser = build()
    optimizer = torch.optim.SGD(denoiser.parameters(), lr=0.1)
    x0, t, labels = inputs()
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(3))
    before = {name: p.detach().clone() for name, p in denoiser.named_parameters()}
    for _ in range(4):  # zeros unlock from the end backwards: final layer, then gates, then the rest
        optimizer.zero_grad()
        Diffusion(DiffusionConfig()).loss(denoiser, x0, noise, t, labels).mean().backward()
        optimizer.step()
    unchanged = [name for name, p in denoiser.named_parameters() if torch.equal(p, before[name])]
    assert unchanged == []


@pytest.mark.parametrize("size", [(8, 8), (4, 12)])
@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_any_latent_grid_keeps_its_shape(size: tuple[int, int], patch_size: int) -> None:
    config = TINY.model_copy(update={"patch_size": patch_size})
    denoiser = filled(build(config, sample_size=size))
    x, t, labels = inputs(size=size)
    assert denoiser(x, t, labels).shape == x.shape
    with pytest.raises(AssertionError, match="built for"):
        denoiser(torch.zeros(3, 4, 16, 16), t, labels)


def test_patchify_goes_row_by_row_and_unpatchify_undoes_it() -> None:
    x = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    patches = patchify(x, 2)
    assert patches.shape == (2, 6, 12)
    assert torch.equal(unpatchify(patches, 2, (4, 6)), x)
    # the token of row 1, column 2 holds its square pixel by pixel, channels last
    assert torch.equal(patches[1, 5], x[1, :, 2:4, 4:6].permute(1, 2, 0).flatten())


def test_positions_are_fixed_distinct_and_not_saved() -> None:
    positions = position_embedding(32, (3, 5))
    assert positions.shape == (15, 32)
    assert len({tuple(row.tolist()) for row in positions}) == 15
    row_1, column_3 = 1 * 5 + 3, 3
    assert positions[row_1, 0].item() == pytest.approx(torch.tensor(3.0).sin().item())  # column first
    assert torch.equal(positions[row_1, :16], positions[column_3, :16])
    assert "positions" not in build().state_dict()


def test_labels_and_the_null_class_matter_row_by_row() -> None:
    denoiser = filled(build())
    x, t, _ = inputs()
    x, t = x[:1].expand(12, -1, -1, -1), t[:1].expand(12)
    answers = denoiser(x, t, torch.tensor([*range(11), 0]))  # 10 classes, the null class, class 0 again
    assert len({answer.flatten()[0].item() for answer in answers}) == 11
    assert torch.equal(answers[0], answers[11])
    with pytest.raises(IndexError):
        denoiser(x[:1], t[:1], torch.tensor([11]))


@pytest.mark.parametrize("num_classes", [None, 0])
def test_without_classes_the_denoiser_is_unconditional(num_classes: int | None) -> None:
    denoiser = filled(build(num_classes=num_classes))
    x, t, labels = inputs()
    assert denoiser(x, t).shape == x.shape
    assert not any("label" in name for name in denoiser.state_dict())
    with pytest.raises(AssertionError, match="unconditional"):
        denoiser(x, t, labels)
    with pytest.raises(AssertionError, match="needs labels"):
        build()(x, t, None)


def test_timestep_embedding_stays_fp32_under_autocast() -> None:
    embedding = TimestepEmbedding(32)
    t = torch.tensor([998, 999])
    plain = embedding(t)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = embedding(t)
        answer = filled(build())(*inputs())
    assert under_autocast.dtype == torch.float32
    assert torch.equal(under_autocast, plain)
    assert not torch.equal(plain[0], plain[1])
    assert answer.dtype == torch.float32 and answer.isfinite().all()


def test_fresh_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one = build(seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), state)  # the caller's generator is untouched
    torch.manual_seed(6)
    same, other = build(seed=3).state_dict(), build(seed=4).state_dict()
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["patch_embedding.weight"], other["patch_embedding.weight"])


def test_equals_diffusers_dit_with_the_same_weights() -> None:
    theirs = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=10,
        norm_eps=1e-6,
    )
    filled(theirs, std=0.2)
    for block in theirs.transformer_blocks:
        # diffusers spaces its 128 frequencies by 1/127; the paper's code, and ours, by 1/128
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm1.emb.load_state_dict(theirs.transformer_blocks[0].norm1.emb.state_dict())
    ours = build()
    ours.load_state_dict(_from_diffusers(theirs.state_dict(), patch_size=2))
    x, t, labels = inputs()
    with torch.no_grad():
        expected = theirs(x, timestep=t, class_labels=labels).sample
        found = ours.eval()(x, t, labels)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def _from_diffusers(theirs: dict[str, Tensor], patch_size: int) -> dict[str, Tensor]:
    names = {
        "patch_embedding": "pos_embed.proj",
        "timestep_embedding.hidden": "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1",
        "timestep_embedding.out": "transformer_blocks.0.norm1.emb.timestep_embedder.linear_2",
        "final.modulation": "proj_out_1",
        "final.linear": "proj_out_2",
    }
    for i in (0, 1):
        block = f"transformer_blocks.{i}"
        names[f"blocks.{i}.attention_out"] = f"{block}.attn1.to_out.0"
        names[f"blocks.{i}.mlp.0"] = f"{block}.ff.net.0.proj"
        names[f"blocks.{i}.mlp.2"] = f"{block}.ff.net.2"
        names[f"blocks.{i}.modulation"] = f"{block}.norm1.linear"
    ours = {f"{a}.{kind}": theirs[f"{b}.{kind}"] for a, b in names.items() for kind in ("weight", "bias")}
    # a convolution of stride p is a linear map of the patch: (D, C, p, p) => (D, p * p * C)
    ours["patch_embedding.weight"] = ours["patch_embedding.weight"].permute(0, 2, 3, 1).flatten(1)
    table = "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"
    ours["label_embedding.weight"] = theirs[table]
    for i in (0, 1):
        for kind in ("weight", "bias"):
            parts = [theirs[f"transformer_blocks.{i}.attn1.to_{part}.{kind}"] for part in "qkv"]
            ours[f"blocks.{i}.qkv.{kind}"] = torch.cat(parts)
    return ours


class Request(Config):
    denoiser: DenoiserConfig = DenoiserConfig()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "denoiser.num_heads=5",
            "denoiser.num_heads=5: does not divide hidden_size=384; the nearest that does is 4",
        ),
        (
            "denoiser.hidden_size=100",
            "denoiser.num_heads=6: does not divide hidden_size=100; the nearest that does is 5",
        ),
        ("denoiser.hidden_size=386", "denoiser.hidden_size=386: must be a multiple of 4; the nearest is 384"),
        (
            "denoiser.type=dti",
            "denoiser.type=dti: is no denoiser; use dit, unet, or your own class as package.module:Class",
        ),
        (
            "denoiser.options.width=8",
            'denoiser.options={"width": "8"}: type=dit has no options; they are for your own class',
        ),
    ],
)
def test_wrong_configs_are_refused_with_what_would_be_right(override: str, expected: str) -> None:
    with pytest.raises(RequestError) as refused:
        parse(Request, [], [override])
    assert str(refused.value) == expected


def test_patch_size_must_divide_the_latents() -> None:
    with pytest.raises(RequestError) as refused:
        build(TINY.model_copy(update={"patch_size": 3}), sample_size=(8, 12))
    assert str(refused.value) == (
        "denoiser.patch_size=3: does not divide the latent size 8x12; the nearest that does is 2"
    )


def test_the_example_denoiser_plugs_in_by_name_and_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    assert len((EXAMPLES / "custom_denoiser.py").read_text().splitlines()) <= 40
    overrides = ["denoiser.type=custom_denoiser:MyDenoiser", "denoiser.options.width=16"]
    denoiser = build(parse(Request, [], overrides).denoiser, seed=1)
    assert type(denoiser).__name__ == "MyDenoiser"
    assert denoiser.get_parameter("last.weight").shape[1] == 16
    unconditional = build(parse(Request, [], overrides).denoiser, num_classes=None)
    x0, t, labels = inputs()
    assert unconditional(x0, t, None).shape == x0.shape

    diffusion, optimizer = Diffusion(DiffusionConfig()), torch.optim.Adam(denoiser.parameters(), lr=1e-2)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(3))
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = diffusion.loss(denoiser, x0, noise, t, labels).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("no_such_package:MyDenoiser", {}, ["denoiser.type=no_such_package:MyDenoiser", "PYTHONPATH"]),
        ("custom_denoiser:YourDenoiser", {}, ["custom_denoiser has no torch.nn.Module class YourDenoiser"]),
        ("custom_denoiser:Tensor", {}, []),
        ("math:pi", {}, ["math has no torch.nn.Module class pi"]),
        (
            "custom_denoiser:MyDenoiser",
            {"witdh": 8},
            ['denoiser.options={"witdh": 8}', "unexpected keyword", "witdh"],
        ),
    ],
)
def test_own_classes_that_cannot_be_built_are_refused(
    name: str, options: dict[str, Any], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    with pytest.raises(RequestError) as refused:
        build(DenoiserConfig(type=name, options=options))
    assert "\n" not in str(refused.value)
    for word in words:
        assert word in str(refused.value)


def test_building_dit_imports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A config is data: only a type of the form module:Class ever imports, and only when it is built."""
    monkeypatch.delitem(sys.modules, "custom_denoiser", raising=False)
    monkeypatch.syspath_prepend(EXAMPLES)
    DenoiserConfig(type="custom_denoiser:MyDenoiser")
    build()
    assert "custom_denoiser" not in sys.modules

"""The U-Net behind the protocol of every denoiser."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.config import Config, RequestError, parse
from ldm.denoiser import DenoiserConfig, build_denoiser
from ldm.diffusion import Diffusion, DiffusionConfig
from ldm.snapshot import read_snapshot
from tests.ldm.exchanging import filled, write


class Request(Config):
    denoiser: DenoiserConfig = DenoiserConfig()


TINY = ("model_channels=8", "channel_multipliers=1,2", "attention_resolutions=2", "head_channels=8", "norm_groups=4")


def config(*overrides: str) -> DenoiserConfig:
    options = ["denoiser.type=unet", *(f"denoiser.unet.{text}" for text in (*TINY, *overrides))]
    return parse(Request, [], options).denoiser


def build(*overrides: str, **changes: Any) -> nn.Module:
    options: dict[str, Any] = {"in_channels": 4, "sample_size": (8, 8), "num_classes": 10, **changes}
    return build_denoiser(config(*overrides), **options)


def inputs(size: tuple[int, int] = (8, 8)) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(3, 4, *size, generator=torch.Generator().manual_seed(2))
    return x, torch.arange(3) * 400, torch.arange(3)


def test_it_is_as_large_as_asked_for() -> None:
    """The defaults are LDM-8's (channels, multipliers, blocks, heads), with the class added to the timestep."""
    with torch.device("meta"):
        default = build_denoiser(DenoiserConfig(type="unet"), in_channels=4, sample_size=(32, 32), num_classes=1000)
        attention = [name for name, _ in default.named_modules() if name.endswith("attentions.0")]
    assert sum(p.numel() for p in default.parameters()) / 1e6 == pytest.approx(258.8, abs=0.1)
    assert attention == [
        *(f"unet.down_blocks.{i}.attentions.0" for i in (0, 1, 2)),
        *(f"unet.up_blocks.{i}.attentions.0" for i in (0, 1, 2)),
        "unet.mid_block.attentions.0",
    ]


def test_a_fresh_one_answers_zero_and_learns_from_there() -> None:
    denoiser = build()
    x, t, labels = inputs()
    assert torch.equal(denoiser(x, t, labels), torch.zeros_like(x))
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=0.01)
    before = {name: p.detach().clone() for name, p in denoiser.named_parameters()}
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    for _ in range(4):
        optimizer.zero_grad()
        Diffusion(DiffusionConfig()).loss(denoiser, x, noise, t, labels).mean().backward()
        optimizer.step()
    assert [name for name, p in denoiser.named_parameters() if torch.equal(p, before[name])] == []


def test_labels_and_the_null_class_matter_row_by_row() -> None:
    denoiser = filled(build())
    x, t, _ = inputs()
    answers = denoiser(x[:1].expand(12, -1, -1, -1), t[:1].expand(12), torch.tensor([*range(11), 0]))
    assert len({answer.flatten()[0].item() for answer in answers}) == 11
    assert torch.equal(answers[0], answers[11])
    with pytest.raises(IndexError):
        denoiser(x[:1], t[:1], torch.tensor([11]))
    with pytest.raises(AssertionError, match="needs labels"):
        denoiser(x, t, None)


def test_without_classes_it_is_unconditional() -> None:
    denoiser = filled(build(num_classes=None))
    x, t, labels = inputs()
    assert denoiser(x, t).shape == x.shape
    with pytest.raises(AssertionError, match="unconditional"):
        denoiser(x, t, labels)


def test_neighbouring_timesteps_differ_under_autocast() -> None:
    denoiser = filled(build())
    x, _, labels = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        one, other = (denoiser(x, torch.full((3,), t), labels) for t in (998, 999))
    assert one.dtype == torch.float32 and one.isfinite().all()
    assert not torch.equal(one, other)


def test_a_snapshot_of_it(kl, kl_folder, tmp_path) -> None:
    found = read_snapshot(write(tmp_path / "snapshot", kl, str(kl_folder), denoiser_config=config()))
    assert found.denoiser["type"] == "unet"
    x, t, labels = inputs((4, 4))
    expected = filled(build(num_classes=3, sample_size=(4, 4)))(x, t, labels)
    assert expected.std() > 0.01
    assert torch.equal(found.load_denoiser()(x, t, labels), expected)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("attention_resolutions=4", "channel_multipliers gives levels at the factors 1, 2"),
        ("head_channels=5", "does not divide the 16 channels of the level at factor 2"),
        ("norm_groups=3", "does not divide model_channels=8"),
        ("channel_multipliers=1,0", "input should be greater than or equal to 1"),
        ("channels=3", "unknown key; did you mean 'denoiser.unet.head_channels'?"),
    ],
)
def test_wrong_configs_are_refused_with_what_would_be_right(override: str, expected: str) -> None:
    with pytest.raises(RequestError) as refused:
        config(override)
    assert str(refused.value).startswith(f"denoiser.unet.{override.split('=')[0]}")
    assert str(refused.value).endswith(expected)


def test_there_is_no_dropout() -> None:
    """Nothing seeds what it would draw: neither would a run repeat, nor a resume be exact."""
    with pytest.raises(RequestError, match=r"^denoiser\.unet=.*: has no dropout, .*; leave it out$"):
        config("dropout=0.1")


def test_its_levels_must_divide_the_latents() -> None:
    with pytest.raises(RequestError, match="its levels halve the latents to 1/2, which does not divide 5x8"):
        build(sample_size=(5, 8))

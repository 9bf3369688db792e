"""What a run begins with from a snapshot: the same function where nothing changed, and each change said."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ldm.config import RequestError
from ldm.denoiser import DenoiserConfig, build_denoiser
from ldm.diffusion import DiffusionConfig
from ldm.latents.manifest import Conditioning
from ldm.snapshot import Snapshot, read_snapshot
from ldm.transfer import check_fit, initial_weights
from ldm.unet import UNetConfig
from tests.ldm.exchanging import inputs, write

DIT = DenoiserConfig(hidden_size=32, depth=2, num_heads=2)
UNET = DenoiserConfig(
    type="unet",
    unet=UNetConfig(
        model_channels=8, channel_multipliers=(1, 2), attention_resolutions=(2,), head_channels=8, norm_groups=4
    ),
)


@pytest.fixture
def snapshot(kl, kl_folder, tmp_path):
    def make(config: DenoiserConfig = DIT, classes: int = 3, **changes: Any) -> Snapshot:
        conditioning = Conditioning("class", classes) if classes else Conditioning()
        options = {"denoiser_config": config, "conditioning": conditioning, **changes}
        return read_snapshot(write(tmp_path / "snapshot", kl, str(kl_folder), **options))

    return make


def begun(snapshot: Snapshot, config: DenoiserConfig, classes: int, size: int = 4) -> tuple[nn.Module, tuple[str, ...]]:
    """The denoiser that a run begins with, and what is said."""
    notes = check_fit(snapshot, config, DiffusionConfig(), (4, size, size), classes)
    denoiser = build_denoiser(config, in_channels=4, sample_size=(size, size), num_classes=classes or None, seed=9)
    denoiser.load_state_dict(initial_weights(snapshot, config, denoiser))
    return denoiser.eval(), notes


@pytest.mark.parametrize("config", [DIT, UNET], ids=["dit", "unet"])
@pytest.mark.parametrize(
    ("was", "now", "note"),
    [
        (3, 3, None),
        (3, 2, "3 classes become 2: the rows of classes 0 to 1 and of the null class are kept"),
        (3, 5, "3 classes become 5: the rows of classes 0 to 2 and of the null class are kept, 2 rows are fresh"),
        (3, 0, "3 classes become none: the null class is what is left"),
        (0, 2, "no classes become 2: their 2 rows and the null class are fresh"),
    ],
)
def test_other_classes(snapshot, config, was, now, note):
    before = snapshot(config, was)
    denoiser, notes = begun(before, config, now)
    assert notes == (() if note is None else (note,))
    old = before.load_denoiser()
    x, t, _ = inputs()
    with torch.no_grad():
        if was and now:
            kept = min(was, now)
            labels = torch.tensor([*range(kept), was, 0, 0])[:4]
            same = torch.where(labels == was, now, labels)  # the null class has moved
            assert torch.equal(denoiser(x, t, same), old(x, t, labels))
            if now > was:
                assert not torch.equal(denoiser(x, t, torch.full((4,), was)), denoiser(x, t, torch.full((4,), now)))
        elif was:
            expected = old(x, t, torch.full((4,), was))
            torch.testing.assert_close(denoiser(x, t, None), expected, rtol=0, atol=1e-5)
        else:
            assert denoiser(x, t, torch.tensor([0, 1, 2, 0])).isfinite().all()


@pytest.mark.parametrize(("was", "now"), [(True, False), (False, True), (True, True)])
def test_another_head(snapshot, was, now):
    """The epsilon half is the same function whatever becomes of the sigma half."""
    before = snapshot(DIT.model_copy(update={"learned_sigma": was}))
    denoiser, notes = begun(before, DIT.model_copy(update={"learned_sigma": now}), 3)
    x, t, labels = inputs()
    with torch.no_grad():
        assert torch.equal(denoiser(x, t, labels), before.load_denoiser()(x, t, labels))
    if was:
        fate = "kept as it is, neither used nor trained" if now else "dropped"
        assert notes == (f"the learned sigma of its head is {fate}",)
    else:
        assert notes == ("a learned sigma is added to its head, as zeros, neither used nor trained",)


@pytest.mark.parametrize("config", [DIT, UNET], ids=["dit", "unet"])
def test_another_size_of_latents(snapshot, config):
    before = snapshot(config)
    denoiser, (note,) = begun(before, config, 3, size=8)
    positions = "; the sincos positions are computed anew" if config is DIT else ""
    assert note == f"latents of 4x4 become 8x8{positions}"
    assert all(torch.equal(v, before.load_denoiser().state_dict()[k]) for k, v in denoiser.state_dict().items())
    assert denoiser(*inputs(3, size=8)).shape == (3, 4, 8, 8)


def test_what_training_makes_up_for(snapshot):
    asked = DIT.model_copy(update={"timestep_frequencies": "diffusers", "label_dropout": 0.5})
    _, notes = begun(snapshot(), asked, 3)
    assert notes == ("timestep_frequencies was paper and is diffusers: training has to make up for it",)


def test_another_diffusion_is_said(snapshot):
    asked = DiffusionConfig(schedule="cosine", prediction_type="v_prediction")
    assert check_fit(snapshot(), DIT, asked, (4, 4, 4), 3) == (
        "diffusion.schedule was linear and is cosine: training has to make up for it",
        "diffusion.prediction_type was epsilon and is v_prediction: training has to make up for it",
    )


@pytest.mark.parametrize(
    ("was", "now", "notes"),
    [
        ({}, {"beta_end": 0.02, "beta_start": 1e-4}, []),  # the schedule's own
        ({}, {"beta_end": 0.03}, ["beta_end was 0.02 and is 0.03: training has to make up for it"]),
        (
            {"prediction_type": "sample"},
            {"prediction_type": "sample", "zero_terminal_snr": True},
            ["zero_terminal_snr was False and is True: training has to make up for it"],
        ),
        ({}, {"loss_weighting": "min_snr"}, ["loss_weighting was none and is min_snr"]),
        (
            {"schedule": "flow"},
            {"schedule": "flow", "shift": 3.0, "timestep_sampling": "logit_normal", "logit_mean": 0.5},
            [
                "timestep_sampling was uniform and is logit_normal",
                "logit_mean was 0.0 and is 0.5",
                "shift was 1.0 and is 3.0",
            ],
        ),
    ],
)
def test_each_change_of_the_diffusion_is_said(snapshot, was, now, notes):
    found = snapshot(diffusion_config=DiffusionConfig(**was))
    assert list(check_fit(found, DIT, DiffusionConfig(**now), (4, 4, 4), 3)) == [f"diffusion.{note}" for note in notes]


@pytest.mark.parametrize(
    ("config", "shape", "differs"),
    [
        (DIT.model_copy(update={"depth": 3, "qk_norm": True}), (4, 4, 4), "depth: 2 != 3; qk_norm: false != true"),
        (UNET, (4, 4, 4), "type: dit != unet"),
        (DenoiserConfig(type="custom_denoiser:MyDenoiser"), (4, 4, 4), "type: dit != custom_denoiser:MyDenoiser"),
        (DIT, (8, 4, 4), "latent_channels: 4 != 8"),
    ],
)
def test_another_architecture_is_refused(snapshot, config, shape, differs):
    found = snapshot()
    with pytest.raises(RequestError, match=rf"^init_from={found.url}: does not fit this run \({differs}"):
        check_fit(found, config, DiffusionConfig(), shape, 3)


def test_a_class_of_the_users_own_must_be_as_it_was(snapshot, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "examples"))
    own = DenoiserConfig(type="custom_denoiser:MyDenoiser", options={"width": 8})
    before = snapshot(own)
    denoiser, notes = begun(before, own, 3)
    assert notes == ()
    assert all((v != 0).any() for v in denoiser.state_dict().values())
    for config, shape, classes in [
        (own.model_copy(update={"options": {"width": 16}}), (4, 4, 4), 3),
        (own, (4, 8, 8), 3),
        (own, (4, 4, 4), 5),
        (DIT, (4, 4, 4), 3),
    ]:
        with pytest.raises(RequestError, match="does not fit this run"):
            check_fit(before, config, DiffusionConfig(), shape, classes)


def test_a_snapshot_that_still_says_dropout(snapshot):
    found = snapshot(UNET)
    found.denoiser["unet"]["dropout"] = 0.0
    denoiser, notes = begun(found, UNET, 3)
    assert notes == ()
    assert torch.equal(denoiser(*inputs(3)), found.load_denoiser()(*inputs(3)))


def test_a_snapshot_that_is_older_than_an_option(snapshot):
    found = snapshot()
    for key in ("mlp", "norm", "qk_norm", "positions", "learned_sigma", "timestep_frequencies", "mlp_norm_eps", "unet"):
        del found.denoiser[key]
    denoiser, notes = begun(found, DIT, 3)
    assert notes == ()
    assert torch.equal(denoiser(*inputs()), found.load_denoiser()(*inputs()))

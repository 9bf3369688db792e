"""Snapshots to diffusers' DiTPipeline and back: the same answers, the same bits, the same pictures."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import Tensor

from ldm.autoencoder import Autoencoder, load_autoencoder
from ldm.config import RequestError
from ldm.diffusion import DiffusionConfig, alphas_cumprod
from ldm.exchange import ExportConfig, export
from ldm.exchange.classes import from_pipeline, pipeline_label, to_pipeline
from ldm.exchange.export import check
from ldm.exchange.first_stage import normalized
from ldm.exchange.schedule import from_scheduler, to_scheduler
from ldm.latents.manifest import Conditioning
from ldm.latents.receipt import Statistics
from ldm.plan import SamplerConfig, make_plan
from ldm.sampler import guided, sample_latents
from ldm.snapshot import Snapshot, read_snapshot
from tests.ldm.exchanging import TINY, UNEVEN, WEIGHTS, exported, imported, inputs, their_folder, write
from tests.pictures import kl_model, some_fingerprint, tiny_model

# The same answers


@pytest.mark.parametrize("learned_sigma", [False, True])
def test_their_dit_answers_as_ours(kl, kl_folder, tmp_path, learned_sigma):
    config = TINY.model_copy(update={"learned_sigma": learned_sigma})
    url = write(tmp_path / "snapshot", kl, str(kl_folder), denoiser_config=config)
    theirs = DiTTransformer2DModel.from_pretrained(exported(url) / "transformer")
    ours = read_snapshot(url).load_denoiser()
    x, t, labels = inputs()
    with torch.no_grad():
        expected = ours(x, t, labels)
        found = theirs(x, timestep=t, class_labels=torch.where(labels == 3, 1000, labels)).sample
    assert found.shape[1] == (8 if learned_sigma else 4)  # the first half is epsilon, there as here
    assert expected.std() > 0.1
    torch.testing.assert_close(found[:, :4], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", [{}, {"out_channels": 8}, {"patch_size": 1, "norm_eps": 1e-2}])
def test_our_dit_answers_as_theirs(tmp_path, config):
    """Theirs has 1/127 between its frequencies, and an epsilon of its own in the second norm of a block."""
    found, report = imported(their_folder(tmp_path / "theirs", kl_model(), **config))
    theirs = DiTTransformer2DModel.from_pretrained(tmp_path / "theirs" / "transformer")
    ours = found.load_denoiser()
    x, t, _ = inputs()
    labels = torch.tensor([0, 7, 999, 1000])
    with torch.no_grad():
        expected = theirs(x, timestep=t, class_labels=labels).sample[:, :4]
        answer = ours(x, t, labels)
    assert expected.std() > 0.1
    torch.testing.assert_close(answer, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert found.conditioning == Conditioning("class", 1000)
    assert found.diffusion_config == DiffusionConfig(beta_start=0.0001, beta_end=0.02)
    assert found.denoiser["learned_sigma"] == ("out_channels" in config)
    assert any("learned sigma" in note for note in report.notes) == ("out_channels" in config)


# The same bits


@pytest.mark.parametrize("frequencies", ["paper", "diffusers"])
@pytest.mark.parametrize(
    "conditioning",
    [
        Conditioning(),
        Conditioning("class", 3, ("a", "b, c", "d")),
        Conditioning("class", 1000),
        Conditioning("class", 1003),
    ],
    ids=lambda c: str(c.num_classes),
)
def test_export_then_import_gives_the_same_bytes(kl, kl_folder, tmp_path, conditioning, frequencies):
    config = TINY.model_copy(update={"timestep_frequencies": frequencies, "label_dropout": 0.3})
    diffusion = DiffusionConfig(schedule="cosine", prediction_type="v_prediction")
    options = {"denoiser_config": config, "conditioning": conditioning, "diffusion_config": diffusion}
    before = read_snapshot(write(tmp_path / "snapshot", kl, str(kl_folder), **options))
    folder = exported(before.url)
    after, _ = imported(folder)
    assert after.weights_sha256 == before.weights_sha256
    assert after.denoiser == before.denoiser
    assert after.diffusion_config == before.diffusion_config
    assert after.conditioning == before.conditioning
    assert (after.step, after.images_seen) == (7, 700)
    assert after.fingerprint["pictures"] == before.fingerprint["pictures"]
    labels = json.loads((folder / "model_index.json").read_text())["id2label"]
    assert labels == ({"0": "a", "1": "b, c", "2": "d"} if conditioning.num_classes == 3 else None)


def test_import_then_export_gives_the_same_bytes(tmp_path):
    """Also of the autoencoder: one factor for all channels needs no change of its weights."""
    found, _ = imported(their_folder(tmp_path / "theirs", kl_model()))
    again = exported(found.url)
    for name in (WEIGHTS, "vae/diffusion_pytorch_model.safetensors"):
        before, after = (safetensors.torch.load_file(folder / name) for folder in (tmp_path / "theirs", again))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    assert AutoencoderKL.load_config(again / "vae")["scaling_factor"] == pytest.approx(0.18215, rel=1e-12)


@pytest.mark.parametrize("count", [1, 3, 999, 1000, 1001, 1005])
def test_the_null_class_is_number_1000_there(count):
    table = torch.arange(float(count + 1))[:, None]
    theirs = to_pipeline(table, 1)
    assert len(theirs) == max(count, 1000) + 1
    assert theirs[1000] == count
    assert [theirs[pipeline_label(i)].item() for i in range(count)] == list(range(count))
    assert torch.equal(from_pipeline(theirs, count), table)


# The same pictures


def our_pictures(snapshot: Snapshot, noise: Tensor, labels: list[int], steps: int, guidance: float) -> np.ndarray:
    """What our sampler draws from this noise: (N, 3, H, W) in 0..1, before rounding."""
    denoise = guided(snapshot.load_denoiser(), torch.tensor(labels), guidance, snapshot.conditioning.num_classes)
    plan = make_plan(snapshot.diffusion_config, SamplerConfig(num_inference_steps=steps))
    latents = sample_latents(denoise, noise, plan)
    mean, std = (torch.tensor(v)[:, None, None] for v in (snapshot.statistics.mean, snapshot.statistics.std))
    with torch.no_grad():
        pixels = snapshot.load_autoencoder().model.decode(latents * std + mean).sample
    return (pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def their_pictures(folder: Path, labels: list[int], steps: int, guidance: float) -> np.ndarray:
    pipeline = DiTPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    drawn = pipeline(labels, guidance, generator, num_inference_steps=steps, output_type="np")
    return drawn.images


@pytest.mark.parametrize(
    "diffusion",
    [
        DiffusionConfig(),
        DiffusionConfig(schedule="scaled_linear", beta_end=0.013, prediction_type="v_prediction"),
        DiffusionConfig(schedule="cosine", prediction_type="v_prediction"),
        DiffusionConfig(schedule="cosine", num_train_timesteps=500),  # epsilon: starts below t = T-1
        DiffusionConfig(zero_terminal_snr=True, prediction_type="sample"),
    ],
    ids=["linear", "scaled_linear", "cosine", "cosine-epsilon", "zero-snr-sample"],
)
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_the_pipeline_draws_our_pictures(kl, kl_folder, tmp_path, diffusion, guidance):
    url = write(tmp_path / "snapshot", kl, str(kl_folder), diffusion_config=diffusion)
    labels, steps = [0, 2, 1, 1], 20
    noise = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    ours = our_pictures(read_snapshot(url), noise, labels, steps, guidance)
    theirs = their_pictures(exported(url), labels, steps, guidance)
    assert ours.std() > 0.05
    assert np.abs(ours - theirs).max() < 1e-5  # a level of a byte is 4e-3


# The first stage


@pytest.mark.parametrize("options", [{}, {"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.1}])
def test_the_normalisation_moves_into_the_autoencoder(tmp_path, options):
    """Encoding too: its latents are normalised, of the same posterior."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"block_out_channels": (8, 16), "norm_num_groups": 4, "latent_channels": 4}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    AutoencoderKL(**sizes, **blocks, **options).save_pretrained(tmp_path / "vae")
    ours = load_autoencoder(str(tmp_path / "vae"))
    normalized(ours, UNEVEN).save_pretrained(tmp_path / "normalized")
    theirs = load_autoencoder(str(tmp_path / "normalized"))
    mean, std = (torch.tensor(v)[:, None, None] for v in (UNEVEN.mean, UNEVEN.std))
    x, _, _ = inputs()
    with torch.no_grad():
        expected, found = ours.model.decode(x * std + mean).sample, theirs.model.decode(x).sample
    assert expected.std() > 0.05
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    (m1, v1), (m2, v2) = (vae.encode(pixels).chunk(2, dim=1) for vae in (ours, theirs))
    torch.testing.assert_close(m2 * std + mean, m1, rtol=0, atol=1e-5)
    torch.testing.assert_close(v2 + 2 * std.log(), v1, rtol=0, atol=1e-5)
    assert theirs.config["scaling_factor"] == 1 and theirs.config["shift_factor"] is None


def test_a_tiny_autoencoder_takes_one_factor_and_no_more(tmp_path):
    tiny = Autoencoder(tiny_model())
    tiny.save(str(tmp_path / "vae"))
    options = {"latent_shape": (4, 4, 4), "fingerprint": some_fingerprint(tiny, 16)}
    url = write(tmp_path / "uneven", tiny, str(tmp_path / "vae"), **options)
    request = ExportConfig(snapshot=url, to="diffusers", output=str(tmp_path / "x"))
    for refuse in (check, export):  # a dry run says it too
        with pytest.raises(
            RequestError, match="^to=diffusers: an AutoencoderTiny has no layer .* only an AutoencoderKL"
        ):
            refuse(request)
    assert not (tmp_path / "x").exists()
    even = Statistics((0.0,) * 4, (2.0,) * 4)
    url = write(tmp_path / "even", tiny, str(tmp_path / "vae"), statistics=even, **options)
    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    ours = our_pictures(read_snapshot(url), noise, [0, 1], 10, 1.0)
    assert np.abs(ours - their_pictures(exported(url), [0, 1], 10, 1.0)).max() < 1e-5


# The schedule


@pytest.mark.parametrize(
    "diffusion",
    [
        DiffusionConfig(),
        DiffusionConfig(schedule="linear", beta_end=0.03, num_train_timesteps=400),
        DiffusionConfig(schedule="scaled_linear"),
        DiffusionConfig(schedule="cosine", prediction_type="v_prediction"),
        DiffusionConfig(schedule="scaled_linear", zero_terminal_snr=True, prediction_type="sample"),
    ],
    ids=str,
)
def test_the_schedule_goes_there_and_back(diffusion):
    scheduler = DDIMScheduler(**to_scheduler(diffusion))
    expected = alphas_cumprod(diffusion)
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), expected, rtol=1e-3, atol=1e-9)
    back = from_scheduler(dict(scheduler.config))
    torch.testing.assert_close(alphas_cumprod(back), expected, rtol=0, atol=0)
    assert back.prediction_type == diffusion.prediction_type

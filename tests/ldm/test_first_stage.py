"""The first stage: it learns, is the same from a seed, and leaves a folder that diffusers reads."""

import json

import pytest
import torch
from diffusers import AutoencoderKL

from ldm.digits import load_digit_pictures
from ldm.first_stage import FirstStageConfig, measure, train_autoencoder

WEIGHTS = "diffusion_pytorch_model.safetensors"
TINY = FirstStageConfig(block_out_channels=(4, 8), latent_channels=2, epochs=4, batch_size=16, seed=3)


@pytest.fixture(scope="module")
def pictures():
    return load_digit_pictures()[0][:128, :, ::2, ::2]  # (128, 3, 16, 16)


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("first-stage")
    seen = []
    report = train_autoencoder(
        pictures[:96], folder, TINY, held_out=pictures[96:], progress=lambda *at: seen.append(at)
    )
    return folder, report, seen


def test_it_learns(trained):
    _, report, seen = trained
    assert [at[:2] for at in seen] == [(i, 24) for i in range(1, 25)]
    assert seen[-1][2] < 0.6 * seen[0][2]
    assert report["pictures"] == 96 and report["steps"] == 24
    assert len(report["latent_std"]) == 2


def test_the_folder_is_read_by_diffusers_and_measures_the_same(trained, pictures):
    folder, report, _ = trained
    assert {path.name for path in folder.iterdir()} == {"config.json", WEIGHTS}
    model = AutoencoderKL.from_pretrained(folder).eval()
    assert model.config.scaling_factor == pytest.approx(1 / report["latent_rms"])
    assert model.config.latent_channels == 2
    assert json.loads((folder / "config.json").read_text())["block_out_channels"] == [4, 8]
    assert measure(model, pictures[96:])["psnr"] == pytest.approx(report["psnr"], abs=1e-3)


def test_same_seed_same_weights_and_the_callers_generator_is_left_alone(trained, pictures, tmp_path):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    train_autoencoder(pictures[:96], tmp_path, TINY)
    assert torch.equal(torch.rand(3), expected)
    assert (tmp_path / WEIGHTS).read_bytes() == (trained[0] / WEIGHTS).read_bytes()


def test_measure_against_its_definitions(pictures):
    class Constant(torch.nn.Module):
        """Posterior N(2, 1) everywhere; decodes to mid-grey."""

        def encode(self, inputs):
            self.mean = torch.full((len(inputs), 1, 2, 2), 2.0)
            self.logvar = torch.zeros_like(self.mean)
            self.latent_dist = self
            return self

        def decode(self, latents):
            self.sample = torch.zeros(len(latents), 3, 16, 16)
            return self

    report = measure(Constant(), pictures)
    error = ((pictures.double() / 255 - 0.5) ** 2).flatten(1).mean(1)
    assert report["psnr"] == pytest.approx(float((-10 * error.log10()).mean()), abs=1e-4)
    assert report["kl"] == pytest.approx(2.0)  # mean^2 / 2
    assert report["latent_std"] == [0.0] and report["latent_rms"] == pytest.approx(2.0)

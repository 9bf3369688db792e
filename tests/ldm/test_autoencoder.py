"""The frozen first stage: its shapes, its hash, and what is no autoencoder."""

import json
import shutil

import numpy as np
import pytest
import torch

from ldm import shards
from ldm.autoencoder import FILES, Autoencoder, hash_tensors, load_autoencoder
from ldm.config import RequestError
from ldm.images import decode
from tests.pictures import dc_model, kl_model, tiny_model


def pixels(count=3, height=16, width=24):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


def test_kl_gives_moments(kl):
    moments = kl.encode(pixels())
    assert (kl.factor, kl.latent_channels, kl.deterministic) == (2, 4, False)
    assert moments.shape == (3, 8, 8, 12) and moments.dtype == torch.float32
    posterior = kl.model.encode(pixels().float() / 127.5 - 1).latent_dist
    assert torch.allclose(moments[:, :4], posterior.mean, atol=1e-5)
    assert torch.allclose(moments[:, 4:], posterior.logvar, atol=1e-5)


def test_tiny_gives_latents(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    tiny = load_autoencoder(str(tmp_path))
    latents = tiny.encode(pixels())
    assert (tiny.factor, tiny.latent_channels, tiny.deterministic) == (4, 4, True)
    assert latents.shape == (3, 4, 4, 6)
    decoded = tiny.decode(latents)
    assert decoded.shape == (3, 3, 16, 24) and decoded.dtype == torch.uint8


def test_a_deep_compression_autoencoder_gives_latents(tmp_path):
    model = dc_model()
    model.save_pretrained(tmp_path)
    autoencoder = load_autoencoder(str(tmp_path))
    pixels = torch.randint(0, 256, (2, 3, 32, 16), dtype=torch.uint8)
    latents = autoencoder.encode(pixels)
    assert (autoencoder.factor, latents.shape, autoencoder.deterministic) == (4, (2, 4, 8, 4), True)
    with torch.no_grad():
        direct = model.eval().encode(pixels.float() / 127.5 - 1).latent
    torch.testing.assert_close(latents, direct, atol=1e-5, rtol=1e-5)
    assert autoencoder.decode(latents).shape == pixels.shape


def test_decode_gives_pixels(kl):
    latents = kl.encode(pixels())[:, :4]
    decoded = kl.decode(latents)
    raw = kl.model.decode(latents).sample
    assert decoded.shape == (3, 3, 16, 24) and decoded.dtype == torch.uint8
    assert (decoded.float() - (raw.clamp(-1, 1) + 1) * 127.5).abs().max() <= 0.5 + 1e-3


def test_decoded_pixels_are_clamped_and_never_wrap_around():
    model = kl_model()
    model.decoder.conv_out.bias.data.copy_(torch.tensor([30.0, -30.0, 0.0]))
    decoded = Autoencoder(model).decode(torch.randn(1, 4, 4, 4))
    assert (decoded[:, 0] == 255).all() and (decoded[:, 1] == 0).all()


def test_weights_stay_frozen(kl):
    assert not any(p.requires_grad for p in kl.model.parameters()) and not kl.model.training


def test_the_hash_is_of_the_weights(kl, kl_folder, tmp_path):
    assert kl.weights_sha256 == load_autoencoder(str(kl_folder), precision="bfloat16").weights_sha256
    assert kl.weights_sha256 == Autoencoder(kl_model()).weights_sha256
    assert kl.weights_sha256 != Autoencoder(kl_model(seed=1)).weights_sha256
    kl.save(str(tmp_path / "copy"))
    copy = load_autoencoder(str(tmp_path / "copy"))
    assert copy.weights_sha256 == kl.weights_sha256 and copy.config == kl.config
    assert sorted(p.name for p in (tmp_path / "copy").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    assert torch.equal(copy.encode(pixels()), kl.encode(pixels()))


def test_hash_tensors_sees_names_types_shapes_and_values():
    base = {"a": torch.arange(6.0), "b": torch.tensor(1)}
    others = [
        {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1)},
        {"a": torch.arange(6.0).double(), "b": torch.tensor(1)},
        {"c": torch.arange(6.0), "b": torch.tensor(1)},
        {"a": -torch.arange(6.0), "b": torch.tensor(1)},  # differs in the sign of zero too
        {"a": torch.arange(6.0)},
    ]
    hashes = {hash_tensors(tensors) for tensors in (base, *others)}
    assert len(hashes) == 6
    assert hash_tensors(base) == hash_tensors(dict(reversed(base.items())))
    assert hash_tensors(base) == hash_tensors({**base, "a": torch.arange(12.0)[::2] / 2})  # strides do not count


def test_bfloat16_computes_about_the_same(kl, kl_folder):
    half = load_autoencoder(str(kl_folder), precision="bfloat16").encode(pixels())
    assert half.dtype == torch.float32
    assert (half - kl.encode(pixels())).abs().mean() < 0.05


def test_the_same_files_wherever_it_was_loaded_from(kl, s3, tmp_path):
    """Of a URL that is a temporary folder, another one each time."""
    kl.save(f"{s3}/same")
    for name in ("one", "other"):
        load_autoencoder(f"{s3}/same").save(str(tmp_path / name))
    for name in FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    assert "_name_or_path" not in json.loads((tmp_path / "one" / "config.json").read_text())


def test_at_a_url(kl, s3):
    kl.save(f"{s3}/vae")
    assert load_autoencoder(f"{s3}/vae").weights_sha256 == kl.weights_sha256


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "UNet2DModel"}, "is a UNet2DModel, expected one of AutoencoderKL, AutoencoderTiny"),
        ({"_class_name": "os.system"}, "is a os.system, expected one of"),
        ({"vocab_size": 3}, "is a None, expected one of"),
        ([1, 2], "is a None, expected one of"),
    ],
)
def test_a_folder_of_something_else(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RequestError, match=f"^autoencoder={tmp_path}: {message}"):
        load_autoencoder(str(tmp_path))


def test_a_folder_without_a_config_or_with_a_broken_one(tmp_path):
    for url in (str(tmp_path), str(tmp_path / "absent"), ""):
        with pytest.raises(RequestError, match="^autoencoder=.*: holds no config.json; give a diffusers"):
            load_autoencoder(url)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RequestError, match=r"^autoencoder=.*config\.json: is no JSON"):
        load_autoencoder(str(tmp_path))


def test_pickled_weights_are_never_loaded(kl_folder, tmp_path):
    shutil.copy(kl_folder / "config.json", tmp_path)
    torch.save(kl_model().state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(RequestError, match="holds no diffusion_pytorch_model.safetensors; only safetensors"):
        load_autoencoder(str(tmp_path))


@pytest.mark.parametrize("damage", ["cut", "other shapes"])
def test_damaged_weights_are_refused(kl_folder, tmp_path, damage):
    shutil.copytree(kl_folder, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-1000])
    else:
        kl_model(latent_channels=2).save_pretrained(tmp_path / "other")
        shutil.copy(tmp_path / "other" / file.name, file)
    with pytest.raises(RequestError, match="^autoencoder=.*: its weights cannot be loaded"):
        load_autoencoder(str(tmp_path))


def test_without_an_autoencoder_every_pixel_value_comes_back(tmp_path):
    """Also through the fp16 of the latent dataset, and from the folder that a snapshot holds."""
    load_autoencoder("identity").save(str(tmp_path / "saved"))
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
    for url in ("identity", str(tmp_path / "saved")):
        identity = load_autoencoder(url)
        assert (identity.factor, identity.latent_channels, identity.deterministic) == (1, 3, True)
        latents = identity.encode(every)
        assert latents.shape == (2, 3, 16, 16) and (latents.min(), latents.max()) == (-1, 1)
        assert torch.equal(identity.decode(latents.half()), every)
        assert identity.weights_sha256 == load_autoencoder("identity").weights_sha256
    identity.compile()
    assert torch.equal(identity.encode(every), latents)


def test_a_folder_named_identity_is_a_folder(kl_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(kl_folder, "identity")
    assert load_autoencoder("identity").class_name == "AutoencoderKL"


@pytest.mark.real_data
def test_real_taesd_is_that_of_diffusers(shared):
    import diffusers

    folder = shared / "models" / "taesd"
    ours = load_autoencoder(str(folder))
    theirs = diffusers.AutoencoderTiny.from_pretrained(folder).eval()
    reader = shards.ShardReader(str(shared / "data" / "grocery" / "val-00000.tar"))
    photos = [decode(sample.picture, 64)[0] for sample, _ in zip(reader, range(8), strict=False)]
    x = torch.from_numpy(np.stack(photos))
    with torch.inference_mode():
        # Not its forward(), which rounds the latents to 8 bits.
        latents = theirs.encode(x.float() / 127.5 - 1).latents
        expected = theirs.decode(latents).sample.clamp(-1, 1)
    found = ours.decode(ours.encode(x))
    assert (ours.factor, ours.latent_channels) == (8, 4)
    assert (found.float() - (expected + 1) * 127.5).abs().max() <= 0.5 + 0.05
    error = (found.float() - x.float()).square().mean()
    print(f"\ntaesd at 64 px: {10 * torch.log10(255**2 / error):.2f} dB on {len(photos)} photos")

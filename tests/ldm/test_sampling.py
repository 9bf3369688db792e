"""A picture depends on its seed, its label and the settings; labels by name and number; PNGs that open."""

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm import images, storage
from ldm.autoencoder import load_autoencoder
from ldm.config import RequestError, parse, validate
from ldm.diffusion import DiffusionConfig
from ldm.drawing import load_sampler
from ldm.images import Buckets, PictureRules
from ldm.labels import resolve_labels
from ldm.latents.manifest import Conditioning, make_fingerprint
from ldm.plan import SamplerConfig, make_plan
from ldm.sampling import SampleConfig, check, sample
from ldm.snapshot import read_snapshot
from tests.pictures import FRUIT, TINY_DIT, picture, write_tiny_snapshot


@pytest.fixture(scope="module")
def snapshot(kl, kl_folder, tmp_path_factory):
    url = str(tmp_path_factory.mktemp("snapshot"))
    write_tiny_snapshot(url, kl, str(kl_folder))
    return url


@pytest.fixture(scope="module")
def sampler(snapshot):
    return load_sampler(snapshot, batch_size=8, device="cpu")


SEEDS = torch.arange(100, 112)
LABELS = torch.arange(12) % 3


@pytest.mark.parametrize("options", [{}, {"eta": 1.0}, {"guidance_scale": 3.0}, {"eta": 0.5, "guidance_scale": 0.0}])
def test_a_picture_does_not_depend_on_its_neighbours(sampler, options):
    settings = SamplerConfig(num_inference_steps=4, **options)
    whole = sampler.draw(LABELS, SEEDS, settings)
    assert whole.shape == (12, 3, 8, 8) and whole.dtype == torch.uint8
    for i in (0, 5, 11):
        alone = sampler.draw(LABELS[i : i + 1], SEEDS[i : i + 1], settings)
        assert torch.equal(alone[0], whole[i])
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sampler.draw(LABELS[order], SEEDS[order], settings), whole[order])


def test_seed_label_and_settings_each_change_the_picture(sampler):
    base = {"labels": torch.tensor([1]), "seeds": torch.tensor([5]), "num_inference_steps": 4}
    changes = [
        {},
        {"labels": torch.tensor([2])},
        {"seeds": torch.tensor([6])},
        {"num_inference_steps": 5},
        {"eta": 1.0},
        {"eta": "sigma_hat"},
        {"sampler": "dpmpp_2m"},
        {"spacing": "leading"},
        {"clip_x0": 0.5},
        {"guidance_scale": 4.0},
        {"guidance_scale": 4.0, "guidance_interval": (0.3, 0.8)},
        {"guidance_scale": 4.0, "guidance_rescale": 0.7},
    ]
    pictures = set()
    for change in changes:
        values = {**base, **change}
        settings = SamplerConfig(**{key: value for key, value in values.items() if key not in ("labels", "seeds")})
        pictures.add(sampler.draw(values["labels"], values["seeds"], settings).numpy().tobytes())
    assert len(pictures) == len(changes)


def test_latents_are_brought_back_to_raw_before_decoding(sampler, monkeypatch):
    """decode() gets latents * std + mean: with a denoiser that answers v = 0 they are known in closed form."""
    from ldm.sampler import initial_noise, sample_latents

    monkeypatch.setattr(sampler, "denoiser", lambda x, t, labels: torch.zeros_like(x))
    found = sampler.draw(LABELS[:2], SEEDS[:2], SamplerConfig(num_inference_steps=3))
    seeds = torch.cat([SEEDS[:2], torch.zeros(6, dtype=torch.int64)])
    plan = make_plan(sampler.diffusion, SamplerConfig(num_inference_steps=3))
    normalised = sample_latents(lambda x, t: torch.zeros_like(x), initial_noise(seeds, (4, 4, 4)), plan)
    mean = torch.tensor([0.1, 0.2, 0.3, 0.4])[:, None, None]
    std = torch.tensor([1.0, 2.0, 0.5, 1.5])[:, None, None]
    assert torch.equal(found, sampler.autoencoder.decode(normalised * std + mean)[:2])


def test_progress_counts_pictures(sampler):
    done = []
    sampler.draw(LABELS, SEEDS, SamplerConfig(num_inference_steps=1), progress=done.append)
    assert done == [8, 12]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("labels=apple,2", ("apple", "2")),
        ("labels=apple, pear", ("apple", "pear")),
        ("labels=1", ("1",)),
        ("labels=[1, pear]", ("1", "pear")),
        ("labels=null", None),
    ],
)
def test_labels_are_read_from_the_command_line(override, expected):
    assert parse(SampleConfig, [], ["snapshot=x", override]).labels == expected


@pytest.mark.parametrize(("value", "expected"), [(1, ("1",)), ([0, "pear"], ("0", "pear")), ("apple", ("apple",))])
def test_labels_are_read_from_yaml(value, expected):
    assert parse(SampleConfig, [("yaml", {"snapshot": "x", "labels": value})]).labels == expected


def test_labels_by_name_and_number_are_taken_in_turn():
    assert resolve_labels(["pear", "0"], FRUIT, 5).tolist() == [1, 0, 1, 0, 1]
    assert resolve_labels(None, FRUIT, 4).tolist() == [0, 1, 2, 0]
    named_by_digits = Conditioning("class", 3, ("2", "1", "0"))
    assert resolve_labels(["2"], named_by_digits, 1).tolist() == [0]  # a name wins
    assert resolve_labels(None, Conditioning(), 4) is None
    assert resolve_labels(["4"], Conditioning("class", 5), 1).tolist() == [4]


@pytest.mark.parametrize("label", ["3", "-1", "cherry", "", "²", "1.0"])
def test_a_label_that_is_no_class_is_refused(label):
    with pytest.raises(RequestError) as caught:
        resolve_labels([label], FRUIT, 1)
    assert str(caught.value) == f"labels={label}: is no class of this model; give 0 to 2, or apple, pear, plum"


def test_labels_for_an_unconditional_model_are_refused():
    with pytest.raises(RequestError, match="^labels=1: the model is unconditional; leave it out$"):
        resolve_labels(["1"], Conditioning(), 1)


@pytest.mark.parametrize("place", ["local", "s3"])
def test_pictures_are_written(snapshot, sampler, place, tmp_path, request):
    output = str(tmp_path / "out") if place == "local" else f"{request.getfixturevalue('s3')}/samples"
    config = SampleConfig(
        snapshot=snapshot, output=output, num_images=11, labels=("pear",), seed=100, num_inference_steps=3, batch_size=8
    )
    report = sample(config)
    assert (report.images, report.output, report.grid) == (11, output, f"{output}/grid.png")
    assert report.images_per_second > 0
    assert storage.list_dir(output) == [*(f"{i:06d}.png" for i in range(11)), "grid.png"]
    expected = sampler.draw(
        torch.ones(11, dtype=torch.int64), torch.arange(100, 111), SamplerConfig(num_inference_steps=3)
    ).numpy()
    for i in range(11):
        image = Image.open(io.BytesIO(storage.read_bytes(f"{output}/{i:06d}.png")))
        assert image.mode == "RGB" and np.array_equal(np.asarray(image).transpose(2, 0, 1), expected[i])
    grid = np.asarray(Image.open(io.BytesIO(storage.read_bytes(report.grid))))
    assert grid.shape == (2 * 10 - 2, 10 * 10 - 2, 3)
    assert np.array_equal(grid[10:18, 0:8].transpose(2, 0, 1), expected[10])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Three pictures in a folder of their own, and a mask that is white on its right half."""
    folder = tmp_path_factory.mktemp("given")
    (folder / "pictures").mkdir()
    for number in range(3):
        picture(number, 24, 16).save(folder / "pictures" / f"{number}.png")
    Image.fromarray(np.repeat(np.array([[0, 255]], np.uint8), 4, axis=1).repeat(8, axis=0)).save(folder / "mask.png")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / "black.png")
    Image.fromarray(np.pad(np.full((1, 1), 255, np.uint8), ((3, 4), (3, 4)))).save(folder / "dot.png")
    (folder / "empty").mkdir()
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


def drawn(snapshot, output, **changes):
    """Every picture that `sample` writes: uint8 (N, 3, 8, 8)."""
    values = {"snapshot": snapshot, "output": str(output), "num_inference_steps": 4, "batch_size": 4, **changes}
    report = sample(validate(SampleConfig, values))
    pngs = [storage.read_bytes(f"{output}/{i:06d}.png") for i in range(report.images)]
    return torch.stack([torch.from_numpy(np.array(Image.open(io.BytesIO(p))).transpose(2, 0, 1)) for p in pngs])


def given(files):
    """The three pictures, cut as training would cut them."""
    data = [(files / "pictures" / f"{number}.png").read_bytes() for number in range(3)]
    return torch.stack([torch.from_numpy(images.decode(png, 8)[0].copy()) for png in data])


def test_reconstruction_gives_each_picture_back_once(snapshot, sampler, files, tmp_path):
    """Better with more steps, up to what the autoencoder itself loses."""
    place = {"task": "reconstruct", "pictures": f"{files}/pictures"}
    few, many = (drawn(snapshot, tmp_path, **place, num_inference_steps=steps) for steps in (3, 60))
    encoded = sampler.autoencoder.encode(given(files))[:, :4]
    floor = sampler.autoencoder.decode(encoded).float()
    assert few.shape == (3, 3, 8, 8)
    assert (many - floor).square().mean() < (few - floor).square().mean()
    assert (many - floor).abs().max() <= 12


def test_interpolation_between_seeds_has_their_pictures_as_its_ends(snapshot, sampler, tmp_path):
    frames = drawn(snapshot, tmp_path, task="interpolate", seed=5, num_images=6)
    null = torch.full((2,), 3)
    settings = SamplerConfig(num_inference_steps=4)
    small = load_sampler(snapshot, batch_size=4, device="cpu")
    ends = small.draw(null, torch.tensor([5, 6]), settings)
    assert torch.equal(frames[[0, 5]], ends)
    assert len({frame.numpy().tobytes() for frame in frames}) == 6


def test_interpolation_between_pictures_goes_from_one_to_the_other(snapshot, files, tmp_path):
    two = {"pictures": f"{files}/pictures/2.png,{files}/pictures/0.png", "num_inference_steps": 10}
    frames = drawn(snapshot, tmp_path / "a", task="interpolate", num_images=5, **two)
    ends = drawn(snapshot, tmp_path / "b", task="reconstruct", **two)  # in the order that was given
    assert torch.equal(frames[[0, 4]], ends)


def test_variations_go_from_the_picture_to_another_with_the_strength(snapshot, files, tmp_path):
    one = {"pictures": f"{files}/pictures/1.png", "labels": "pear", "num_inference_steps": 10}
    base = drawn(snapshot, tmp_path / "base", task="reconstruct", **one)[0].float()
    distances = []
    for strength in (0.02, 0.3, 1.0):
        found = drawn(snapshot, tmp_path / f"{strength}", task="variations", num_images=3, strength=strength, **one)
        assert len({one.numpy().tobytes() for one in found}) == 3
        distances.append((found - base).square().mean().item())
    assert distances == sorted(distances)
    of_seed = drawn(snapshot, tmp_path / "seed", task="variations", seed=9, num_images=3, strength=1e-6)
    alone = drawn(snapshot, tmp_path / "alone", seed=9, num_images=1, labels="0")
    assert (of_seed[0].float() - alone[0]).abs().max() <= 1


def test_image_to_image_stays_nearer_with_less_strength(snapshot, sampler, files, tmp_path):
    place = {"task": "image_to_image", "pictures": f"{files}/pictures/*.png", "labels": "plum", "num_images": 3}
    floor = sampler.autoencoder.decode(sampler.autoencoder.encode(given(files))[:, :4]).float()
    distances = []
    for strength in (0.04, 0.4, 1.0):
        found = drawn(snapshot, tmp_path / f"{strength}", strength=strength, num_inference_steps=25, **place)
        distances.append((found - floor).square().mean().item())
    assert distances == sorted(distances)


@pytest.mark.parametrize("options", [{}, {"mask_blur": 1}, {"sampler": "dpmpp_2m", "guidance_scale": 2.0}, {"eta": 1}])
def test_inpainting_leaves_what_the_mask_leaves_to_the_last_bit(snapshot, files, tmp_path, options):
    place = {"task": "inpaint", "pictures": f"{files}/pictures", "mask": f"{files}/mask.png", "num_images": 6}
    found = drawn(snapshot, tmp_path, **place, **options)
    original = given(files).repeat(2, 1, 1, 1)
    assert torch.equal(found[..., :4], original[..., :4])
    assert not torch.equal(found[..., 4:], original[..., 4:])
    assert not torch.equal(found[0], found[3])  # the same picture, another seed


def test_every_task_gives_a_picture_that_does_not_depend_on_its_neighbours(snapshot, files, tmp_path):
    tasks = (
        {"task": "image_to_image"},
        {"task": "variations"},
        {"task": "inpaint", "mask": f"{files}/mask.png"},
        {"task": "reconstruct"},
    )
    for values in tasks:
        values = {**values, "pictures": f"{files}/pictures/1.png"}
        many = drawn(snapshot, tmp_path / "many", num_images=5, seed=3, **values)
        alone = drawn(snapshot, tmp_path / "alone", num_images=1, seed=6, **values)
        assert torch.equal(many[3], alone[0]), values


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"snapshot": "absent"}, "^snapshot=absent: is no snapshot"),
        ({"labels": "cherry"}, "^labels=cherry: is no class"),
        ({"num_inference_steps": 1001}, "^num_inference_steps=1001: must be 1 to 1000"),
        ({"sampler": "heun"}, "^sampler=heun: is for a flow"),
        ({"task": "reconstruct"}, "^task=reconstruct: starts from pictures; give pictures=FILES"),
        ({"pictures": "pictures"}, "^task=generate: starts from noise alone; leave pictures out"),
        ({"task": "interpolate", "pictures": "pictures"}, "^pictures=pictures: are 3; interpolate needs exactly 2"),
        ({"task": "inpaint", "pictures": "pictures"}, "^mask=null: .*give mask=FILE"),
        ({"mask": "mask.png"}, "^mask=mask.png: is no part of task=generate"),
        ({"mask_blur": 3}, "^mask_blur=3: is of a mask; leave it out"),
        ({"task": "reconstruct", "pictures": "pictures", "clip_x0": 2}, "^clip_x0=2.0: inversion knows no clipping"),
        ({"strength": 0.5}, "^strength=0.5: is no part of task=generate"),
        ({"task": "reconstruct", "pictures": "pictures", "eta": 1}, "^task=reconstruct: inverts pictures.*use eta=0"),
        ({"task": "variations", "pictures": "pictures", "sampler": "dpmpp_2m"}, "^task=variations: inverts pictures"),
        ({"task": "reconstruct", "pictures": "broken.png"}, "^pictures=.*broken.png: cannot be read as a picture"),
        ({"task": "reconstruct", "pictures": "empty"}, "^pictures=empty: holds no pictures; give pictures, or"),
        ({"task": "inpaint", "pictures": "pictures", "mask": "absent.png"}, "^mask=absent.png: is no file; give a pic"),
        ({"task": "inpaint", "pictures": "pictures", "mask": "pictures"}, "^mask=pictures: is no file; give a pict"),
        ({"task": "reconstruct", "pictures": "absent.png"}, "^pictures=absent.png: does not exist; give pictures, or"),
        ({"task": "inpaint", "pictures": "pictures", "mask": "black.png"}, "^mask=black.png: is black"),
        ({"task": "inpaint", "pictures": "pictures", "mask": "dot.png", "mask_blur": 2}, "fades out at mask_blur=2"),
    ],
)
def test_a_wrong_request_writes_nothing(snapshot, files, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(files)
    values = {"snapshot": snapshot, "output": str(tmp_path / "out"), "num_images": 2, **changes}
    for stage in (check, sample):  # a dry run says it too
        with pytest.raises(RequestError, match=message) as refused:
            stage(validate(SampleConfig, values))
        assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()


def test_of_a_folder_only_its_pictures_are_taken(snapshot, files, tmp_path):
    folder = Path(shutil.copytree(files / "pictures", tmp_path / "given"))
    (folder / "0.png").rename(folder / "0.PNG")
    (folder / "more").mkdir()
    (folder / "notes.txt").write_text("no picture")
    shutil.copy(folder / "1.png", folder / "grid.png")  # as `ldm sample` writes beside its pictures
    config = SampleConfig(snapshot=snapshot, task="reconstruct", pictures=str(folder))
    assert torch.equal(check(config).given, given(files))


def test_a_model_without_a_null_class_wants_the_pictures_classes(kl, kl_folder, files, tmp_path):
    url = str(tmp_path / "snapshot")
    write_tiny_snapshot(url, kl, str(kl_folder), denoiser_config=TINY_DIT.model_copy(update={"label_dropout": 0.0}))
    values = {"task": "reconstruct", "pictures": f"{files}/pictures/0.png"}
    with pytest.raises(RequestError, match="^labels=null: .* name the pictures' classes"):
        drawn(url, tmp_path / "out", **values)
    assert drawn(url, tmp_path / "out", **values, labels="pear").shape == (1, 3, 8, 8)
    config = SampleConfig(snapshot=url, output=str(tmp_path / "guided"), guidance_scale=4)
    with pytest.raises(RequestError, match=r"^guidance_scale=4.0: .* trained without the null class .*be 1$"):
        check(config)


@pytest.mark.parametrize("sampler_name", [None, "heun"])
def test_a_flow_snapshot_samples_and_edits(kl, kl_folder, files, tmp_path, sampler_name):
    url = str(tmp_path / "snapshot")
    write_tiny_snapshot(url, kl, str(kl_folder), diffusion_config=DiffusionConfig(schedule="flow", shift=2.0))
    assert drawn(url, tmp_path / "a", num_images=2, sampler=sampler_name).shape == (2, 3, 8, 8)
    place = {"pictures": f"{files}/pictures", "sampler": sampler_name, "num_inference_steps": 8}
    found = drawn(url, tmp_path / "b", task="reconstruct", **place)
    assert found.shape == (3, 3, 8, 8)
    with pytest.raises(RequestError, match="^sampler=ddim: .*this model is a flow: use euler or heun"):
        drawn(url, tmp_path / "c", sampler="ddim")


def test_bf16_draws_nearly_the_same_pictures(snapshot, tmp_path):
    exact = drawn(snapshot, tmp_path / "a", num_images=4).float()
    half = drawn(snapshot, tmp_path / "b", num_images=4, precision="bf16").float()
    assert 0 < (half - exact).abs().mean() < 4


def test_pixel_diffusion_is_the_same_pipeline(files, tmp_path):
    identity, place = load_autoencoder("identity"), str(tmp_path / "identity")
    identity.save(place)
    url = str(tmp_path / "snapshot")
    write_tiny_snapshot(url, identity, place, latent_shape=(3, 8, 8))
    assert drawn(url, tmp_path / "a", num_images=2).shape == (2, 3, 8, 8)
    found = drawn(url, tmp_path / "b", task="reconstruct", pictures=f"{files}/pictures", num_inference_steps=100)
    assert (found.float() - given(files)).abs().mean() < 6  # no autoencoder loses anything


def test_a_model_of_one_bucket_edits_pictures_of_its_shape(kl, kl_folder, files, tmp_path):
    """A bucket of 8x8 pixels can be 4x16: then no side is that of the fingerprint."""
    url = str(tmp_path / "snapshot")
    rules = PictureRules((8,), buckets=Buckets(max_ratio=4, step=4))
    made = make_fingerprint(load_autoencoder(str(kl_folder)), rules.fingerprint(), "moments", "float32")
    write_tiny_snapshot(url, kl, str(kl_folder), latent_shape=(4, 2, 8), fingerprint=made)
    assert read_snapshot(url).picture_shape() == (4, 16)
    values = {"pictures": f"{files}/pictures", "num_images": 1}
    for task in ("reconstruct", "image_to_image"):
        assert drawn(url, tmp_path / task, task=task, **values).shape == (1, 3, 4, 16)
    inpainted = drawn(url, tmp_path / "inpaint", task="inpaint", mask=f"{files}/mask.png", **values)
    assert inpainted.shape == (1, 3, 4, 16)


def test_an_unconditional_model_samples_and_cannot_be_guided(kl, kl_folder, tmp_path):
    url = str(tmp_path / "snapshot")
    write_tiny_snapshot(url, kl, str(kl_folder), conditioning=Conditioning())
    config = SampleConfig(snapshot=url, output=str(tmp_path / "out"), num_images=2, num_inference_steps=2, batch_size=2)
    assert sample(config).images == 2
    with pytest.raises(RequestError, match="^guidance_scale=2.0: the model is unconditional"):
        check(config.model_copy(update={"guidance_scale": 2.0}))

"""A picture depends on its seed, its label and the settings; labels by name and number; PNGs that open."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from ldm import storage
from ldm.config import RequestError, parse
from ldm.drawing import load_sampler
from ldm.latents.manifest import Conditioning
from ldm.plan import SamplerConfig, make_plan
from ldm.sampling import SampleConfig, resolve_labels, sample
from tests.pictures import FRUIT, write_tiny_snapshot


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"snapshot": "absent"}, "^snapshot=absent: is no snapshot"),
        ({"labels": ("cherry",)}, "^labels=cherry: is no class"),
        ({"num_inference_steps": 1001}, "^num_inference_steps=1001: must be 1 to 1000"),
    ],
)
def test_a_wrong_request_writes_nothing(snapshot, tmp_path, changes, message):
    values = {"snapshot": snapshot, "output": str(tmp_path / "out"), "num_images": 2, **changes}
    with pytest.raises(RequestError, match=message):
        sample(SampleConfig(**values))
    assert not (tmp_path / "out").exists()


def test_an_unconditional_model_samples_and_cannot_be_guided(kl, kl_folder, tmp_path):
    url = str(tmp_path / "snapshot")
    write_tiny_snapshot(url, kl, str(kl_folder), conditioning=Conditioning())
    config = SampleConfig(snapshot=url, output=str(tmp_path / "out"), num_images=2, num_inference_steps=2, batch_size=2)
    assert sample(config).images == 2
    with pytest.raises(RequestError, match="^guidance_scale=2.0: the model is unconditional"):
        sample(config.model_copy(update={"guidance_scale": 2.0}))

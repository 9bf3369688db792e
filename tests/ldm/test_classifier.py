"""The corpus classifier: it learns the digits, is the same from a seed, and its name follows its weights."""

import pytest
import torch

from ldm.classifier import Classifier, _network_input, _shifted, train_classifier
from ldm.digits import load_digit_pictures

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def split():
    """Every fifth digit is held out."""
    pictures, labels = load_digit_pictures()
    held_out = torch.arange(len(labels)) % 5 == 0
    return pictures[~held_out], labels[~held_out], pictures[held_out], labels[held_out]


@pytest.fixture(scope="module")
def classifier(split) -> Classifier:
    return train_classifier(split[0], split[1], num_classes=10)


def test_reads_held_out_digits(classifier, split):
    _, _, pictures, labels = split
    assert classifier.accuracy(pictures, labels) >= 0.97
    predicted = classifier.predict(pictures)
    assert predicted.dtype == torch.int64 and predicted.shape == labels.shape


def test_noise_costs_accuracy(classifier, split):
    _, _, pictures, labels = split
    generator = torch.Generator().manual_seed(0)
    accuracies = []
    for strength in (0, 150, 1000):
        noise = torch.randn(pictures.shape, generator=generator) * strength
        accuracies.append(classifier.accuracy((pictures + noise).clamp(0, 255).to(torch.uint8), labels))
    assert accuracies == sorted(accuracies, reverse=True)
    assert accuracies[-1] < 0.6


def test_features_do_not_depend_on_the_neighbours_in_a_batch(classifier, split):
    pictures = split[2]
    features = classifier.features(pictures)
    assert features.shape == (len(pictures), 128) and not features.requires_grad
    assert torch.allclose(features[:7], classifier.features(pictures[:7]), atol=1e-4)


def test_other_sizes_are_resized(classifier, split):
    _, _, pictures, labels = split
    larger = pictures.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert larger.shape[-1] == 64
    assert classifier.accuracy(larger, labels) >= 0.97


def test_features_are_classified_as_their_pictures(classifier, split):
    features = classifier.features(split[2])
    assert torch.equal(classifier.classify(features), classifier.predict(split[2]))


def test_a_picture_is_reduced_to_the_same_bits_beside_any_others():
    """So training may reduce all of them before the first epoch."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (300, 3, 48, 40), dtype=torch.uint8, generator=generator)
    rows = torch.randperm(300, generator=generator)[:64]
    assert torch.equal(_network_input(pictures)[rows], _network_input(pictures[rows]))


def test_same_seed_same_weights_and_name(split):
    pictures, labels = split[0][:256], split[1][:256]
    one, again = (train_classifier(pictures, labels, 10, epochs=2) for _ in range(2))
    other = train_classifier(pictures, labels, 10, epochs=2, seed=1)
    assert one.name == again.name and one.name.startswith("classifier-")
    assert other.name != one.name
    assert torch.equal(one.features(pictures), again.features(pictures))


def test_training_leaves_the_callers_generator_alone(split):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    train_classifier(split[0][:64], split[1][:64], 10, epochs=1)
    assert torch.equal(torch.rand(3), expected)


def test_progress_counts_every_step(split):
    seen = []
    pictures, labels = split[0][:100], split[1][:100]
    train_classifier(pictures, labels, 10, epochs=3, batch_size=32, progress=lambda *at: seen.append(at))
    assert seen == [(i, 9) for i in range(1, 10)]


def test_shift_moves_each_picture_by_whole_pixels():
    inputs = torch.zeros(50, 3, 8, 8)
    inputs[:, :, 4, 4] = 1.0
    moved = _shifted(inputs, torch.arange(50), epoch=0, seed=0, reach=2)
    places = moved[:, 0].flatten(1).argmax(1)
    assert moved.shape == inputs.shape and torch.equal(moved.sum((2, 3)), torch.ones(50, 3))
    offsets = {(int(p) // 8 - 4, int(p) % 8 - 4) for p in places}
    assert len(offsets) > 10 and all(abs(dy) <= 2 and abs(dx) <= 2 for dy, dx in offsets)


@pytest.mark.parametrize(
    ("pictures", "labels", "says"),
    [
        (torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64), "uint8"),
        (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), "one label each"),
        (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.full((4,), 10), r"\[0, 10\)"),
    ],
)
def test_what_cannot_be_trained_on_is_said(pictures, labels, says):
    with pytest.raises(ValueError, match=says):
        train_classifier(pictures, labels, 10)

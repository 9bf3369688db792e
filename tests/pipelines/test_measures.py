"""Figures of pictures move the way that they must: against noise, blur, missing classes, repetition and copies."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ldm import features, metrics
from ldm.autoencoder import Autoencoder
from ldm.classifier import Classifier, train_classifier
from ldm.digits import load_digit_pictures
from ldm.features import Extractor, VaeFeatures, load_extractor
from ldm.identity import IdentityAutoencoder
from ldm.latents.cache import hash_file
from pipelines.evaluate import classes, measures, memory, report
from pipelines.evaluate.figures import Measured, measure
from pipelines.evaluate.measures import EQUAL, FLOOR, RECONSTRUCTION, SAMPLES
from pipelines.evaluate.reference import Pictures, Reference
from tests.ldm.extractors import InceptionLike, Means, write_script

pytestmark = pytest.mark.slow


def digits() -> Pictures:
    """All of them, mixed: scikit-learn has them in the order of their writers."""
    pictures, labels = load_digit_pictures()
    return Pictures(pictures, labels).take(torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)))


@pytest.fixture(scope="module")
def reference() -> Reference:
    """1,440 digits, of which every fifth is held out."""
    whole = digits().take(torch.arange(1440))
    held_out = torch.arange(1440) % 5 == 0
    names = tuple(f"digits/{i}" for i in (~held_out).nonzero().flatten().tolist())
    return Reference(whole.take(~held_out), whole.take(held_out), 0, names)


@pytest.fixture(scope="module")
def unseen() -> Pictures:
    """Digits that are in no part of the reference: what a perfect model would draw."""
    return digits().take(torch.arange(1440, 1797))


@pytest.fixture(scope="module")
def extractor(tmp_path_factory: pytest.TempPathFactory) -> Extractor:
    return load_extractor(str(write_script(Means(), tmp_path_factory.mktemp("network") / "means.pt")), (32, 32))


@pytest.fixture(scope="module")
def pixels() -> Autoencoder:
    """The autoencoder of a pixel model, which loses nothing."""
    return Autoencoder(IdentityAutoencoder())


@pytest.fixture(scope="module")
def classifier(reference: Reference) -> Classifier:
    assert reference.train.labels is not None
    return train_classifier(reference.train.pixels, reference.train.labels, 10, epochs=4)


@pytest.fixture(scope="module")
def perfect(unseen: Pictures, reference: Reference, extractor: Extractor, pixels: Autoencoder) -> Measured:
    return measure(unseen, reference, extractor, pixels)


@pytest.fixture
def measured(reference: Reference, extractor: Extractor, pixels: Autoencoder) -> Any:
    return lambda samples: measure(samples, reference, extractor, pixels).metrics


def noisy(pictures: Pictures, deviation: float) -> Pictures:
    noise = torch.randn(pictures.pixels.shape, generator=torch.Generator().manual_seed(0)) * deviation
    return Pictures((pictures.pixels + noise).round().clamp(0, 255).to(torch.uint8), pictures.labels)


def repeated(pictures: Pictures, times: int) -> Pictures:
    """The first picture of each class, so many times."""
    assert pictures.labels is not None
    first = torch.stack([(pictures.labels == label).nonzero()[0, 0] for label in torch.unique(pictures.labels)])
    return pictures.take(first.repeat(times))


def test_pictures_never_seen_are_as_good_as_the_floor(perfect: Measured, extractor: Extractor) -> None:
    figures, name = perfect.metrics, extractor.name
    assert figures[f"fd-{name}_equal_n"] == pytest.approx(figures[f"fd-{name}_floor"], rel=0.5)
    width = figures[f"kid-{name}_high"] - figures[f"kid-{name}_low"]
    assert figures[f"kid-{name}"] == pytest.approx(figures[f"kid-{name}_floor"], abs=width)
    for kind in ("precision", "recall", "coverage"):
        assert figures[f"{kind}-{name}_equal_n"] == pytest.approx(figures[f"{kind}-{name}_floor"], abs=0.06)
    assert figures["nearest_train"] == pytest.approx(figures["nearest_train_floor"], rel=0.05)
    assert figures["memorised"] < 0.05 and figures["memorised_floor"] == pytest.approx(0.01, abs=0.01)
    for figure in perfect.figures:  # what loses nothing is at the floor itself
        if measures.RECONSTRUCTION in figure.sides:
            assert figure.sides[measures.RECONSTRUCTION] == figure.sides[measures.FLOOR]


def test_the_held_out_pictures_themselves_are_the_floor(
    reference: Reference, extractor: Extractor, pixels: Autoencoder
) -> None:
    found = measure(reference.holdout, reference, extractor, pixels)
    for figure in found.figures:
        assert figure.sides[measures.SAMPLES].value == pytest.approx(figure.sides[measures.FLOOR].value)


def test_more_noise_is_worse_in_every_figure(
    perfect: Measured, unseen: Pictures, measured: Any, extractor: Extractor
) -> None:
    steps = [perfect.metrics, *(measured(noisy(unseen, deviation)) for deviation in (40.0, 120.0))]
    for name in (f"fd-{extractor.name}", f"kid-{extractor.name}", "sliced_wasserstein", "nearest_train"):
        values = [figures[name] for figures in steps]
        assert values == sorted(values) and values[2] > 1.5 * values[0]
    for name in (f"precision-{extractor.name}", f"density-{extractor.name}", f"coverage-{extractor.name}"):
        values = [figures[name] for figures in steps]
        assert values == sorted(values, reverse=True) and values[2] < values[0]


def test_fewer_classes_cost_variety_and_not_likeness(
    perfect: Measured, unseen: Pictures, measured: Any, extractor: Extractor
) -> None:
    assert unseen.labels is not None
    some, name = measured(unseen.take(unseen.labels < 4)), extractor.name
    assert some[f"precision-{name}"] > perfect.metrics[f"precision-{name}"] - 0.1
    for kind in ("recall", "coverage"):
        assert some[f"{kind}-{name}"] < 0.75 * perfect.metrics[f"{kind}-{name}"]
    for kind in ("fd", "kid"):
        assert some[f"{kind}-{name}"] > 2 * perfect.metrics[f"{kind}-{name}"]


def test_a_few_pictures_again_and_again_cost_variety(
    perfect: Measured, unseen: Pictures, measured: Any, extractor: Extractor
) -> None:
    few, name = measured(repeated(unseen, 35)), extractor.name
    assert few[f"recall-{name}"] < 0.1 * perfect.metrics[f"recall-{name}"]
    assert few[f"coverage-{name}"] < 0.3 * perfect.metrics[f"coverage-{name}"]
    assert few[f"fd-{name}"] > 2 * perfect.metrics[f"fd-{name}"]


def test_copies_of_training_pictures_are_called_memorised_and_shown(
    reference: Reference, unseen: Pictures, extractor: Extractor, pixels: Autoencoder
) -> None:
    copies = noisy(reference.train.take(torch.arange(30)), 3.0)
    assert unseen.labels is not None and copies.labels is not None
    samples = Pictures(torch.cat([unseen.pixels[:100], copies.pixels]), torch.cat([unseen.labels[:100], copies.labels]))
    found = measure(samples, reference, extractor, pixels)
    assert found.nearest is not None
    assert found.metrics["memorised"] == pytest.approx(30 / 130, abs=0.04)
    pairs = memory.pairs(found.nearest, reference)
    assert {pair["picture"] for pair in pairs["samples"]} <= set(range(100, 130))
    assert all(p["training_picture"] == reference.train_names[p["picture"] - 100] for p in pairs["samples"])
    grid = torch.from_numpy(memory.pairs_grid(found.nearest, samples, reference))
    first = pairs["samples"][0]["picture"]
    assert torch.equal(grid[:, :32, :32], samples.pixels[first])
    assert torch.equal(grid[:, 34:66, :32], reference.train.pixels[first - 100])


def test_the_class_that_drags_a_figure_down_is_named(
    reference: Reference, unseen: Pictures, classifier: Classifier, pixels: Autoencoder
) -> None:
    assert unseen.labels is not None
    spoilt = Pictures(unseen.pixels.clone(), unseen.labels)
    spoilt.pixels[unseen.labels == 7] = noisy(unseen, 150.0).pixels[unseen.labels == 7]
    found = measure(spoilt, reference, classifier, pixels, names=tuple("abcdefghij"))
    worst = classes.worst_classes(found.by_class)
    assert {worst[figure]["name"] for figure in ("accuracy", "fd_part")} == {"h"}
    parts, counts = [row["fd_part"] for row in found.by_class], unseen.labels.bincount().tolist()
    mean = sum(part * count for part, count in zip(parts, counts, strict=True)) / sum(counts)
    assert mean == pytest.approx(found.metrics[f"fd-{classifier.name}"])


def test_one_picture_for_each_class_has_accuracy_and_no_recall(
    reference: Reference, classifier: Classifier, pixels: Autoencoder
) -> None:
    right = classifier.predict(reference.train.pixels) == reference.train.labels
    collapsed = repeated(reference.train.take(right), 30)
    found = measure(collapsed, reference, classifier, pixels)
    assert found.metrics["accuracy"] == found.metrics["accuracy_worst_class"] == 1
    assert [row["class"] for row in found.by_class if row["accuracy"] == 1] == list(range(10))
    assert found.metrics["recall_ratio"] < 0.1
    assert found.metrics["recall_floor"] > 0.3


def test_held_out_pictures_have_their_own_accuracy_and_all_the_recall(
    reference: Reference, classifier: Classifier, pixels: Autoencoder
) -> None:
    figures = measure(reference.holdout, reference, classifier, pixels).metrics
    assert figures["recall_ratio"] == figures["recall_ratio_worst_class"] == 1
    assert figures["accuracy"] == figures["classifier_accuracy"] > 0.85
    assert figures["accuracy_low"] <= figures["accuracy"] <= figures["accuracy_high"]


def test_noise_has_neither(reference: Reference, classifier: Classifier, pixels: Autoencoder) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = Pictures(
        torch.randint(0, 256, (200, 3, 32, 32), dtype=torch.uint8, generator=generator), torch.arange(200) % 10
    )
    figures, name = measure(noise, reference, classifier, pixels).metrics, f"fd-{classifier.name}"
    assert figures[name] > 5 * figures[f"{name}_floor"]
    assert figures["accuracy"] < 0.3
    assert figures["nearest_train"] > 2 * figures["nearest_train_floor"]


def test_without_held_out_pictures_there_is_no_floor(
    reference: Reference, extractor: Extractor, pixels: Autoencoder
) -> None:
    bare = Reference(reference.train, reference.holdout.take(torch.arange(0)), 0, reference.train_names)
    found = measure(reference.holdout, bare, extractor, pixels)
    assert all(set(figure.sides) == {measures.SAMPLES} for figure in found.figures)
    assert "memorised" not in found.metrics


def test_the_floor_of_pictures_without_labels_is_chosen_by_the_seed() -> None:
    few, many = (Pictures(torch.zeros(count, 3, 2, 2, dtype=torch.uint8), None) for count in (20, 200))
    rows, held_out = measures.equal_rows(few, many, 0)
    assert rows.tolist() == list(range(20)) and len(held_out) == 20
    assert held_out.tolist() == sorted(set(held_out.tolist())) != list(range(20))
    assert torch.equal(measures.equal_rows(few, many, 0)[1], held_out)
    assert not torch.equal(measures.equal_rows(few, many, 1)[1], held_out)
    assert torch.equal(measures.equal_rows(many, few, 0)[1], rows)  # nor are the samples the first ones
    assert measures.equal_rows(many, few, 0)[0].max() > 20


def test_a_kernel_distance_counts_the_pictures_in_its_subsets(extractor: Extractor) -> None:
    generator = torch.Generator().manual_seed(0)
    train, drawn, floor = (torch.randn(count, 4, generator=generator) for count in (1200, 1500, 400))
    sides = measures.kernel({SAMPLES: drawn, FLOOR: floor}, train, extractor, 0).sides
    assert (sides[SAMPLES].count, sides[FLOOR].count) == (1000, 400)


def test_an_inception_score_compares_with_its_floor_at_as_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: Reference, unseen: Pictures, pixels: Autoencoder
) -> None:
    path = write_script(InceptionLike(), tmp_path / "inception.pt")
    monkeypatch.setattr(features, "INCEPTION_SHA256", hash_file(path))
    network = load_extractor(str(path), (32, 32))
    sets = measures.make_sets(unseen, reference, pixels, 0)
    (figure,) = measures.inception_score(sets, network, 0)
    assert set(figure.sides) == {SAMPLES, EQUAL, FLOOR, RECONSTRUCTION}
    assert figure.sides[EQUAL].count == figure.sides[FLOOR].count < figure.sides[SAMPLES].count == len(unseen)
    drawn = network.log_probabilities(unseen.pixels[sets.equal])
    assert drawn is not None
    assert figure.sides[EQUAL].value == pytest.approx(float(metrics.log_score_contributions(drawn).mean().exp()))
    assert "is_equal_n" in figure.flat()


def test_sets_that_share_a_pass_have_the_neighbours_of_their_own() -> None:
    generator = torch.Generator().manual_seed(0)
    train, drawn, floor = (torch.randn(count, 12, generator=generator) for count in (400, 300, 70))
    near = memory.nearest({SAMPLES: drawn, FLOOR: floor}, train, 0)
    for side, rows in ((SAMPLES, drawn), (FLOOR, floor)):
        found, alone = near.neighbours[side], metrics.nearest_neighbours(rows, train)
        assert torch.equal(found.row, alone.row)
        assert torch.allclose(found.distance, alone.distance, rtol=1e-12)
        assert torch.allclose(found.closeness, alone.closeness, rtol=1e-12)


def test_the_order_of_the_samples_changes_no_figure(
    perfect: Measured, reference: Reference, unseen: Pictures, extractor: Extractor, pixels: Autoencoder
) -> None:
    backwards = Pictures(unseen.pixels.flip(0), None if unseen.labels is None else unseen.labels.flip(0))
    found = measure(backwards, reference, extractor, pixels)
    for one, other in zip(perfect.figures, found.figures, strict=True):
        assert other.sides[measures.SAMPLES].value == pytest.approx(one.sides[measures.SAMPLES].value)


def test_the_table_has_each_figure_beside_its_floor(perfect: Measured) -> None:
    head, *lines = report.table(perfect).splitlines()
    assert head.split()[-3:] == ["equal_n", "floor", "reconstruction"]
    for figure, line in zip(perfect.figures, lines, strict=True):
        name, value, *_, floor, _ = line.split()
        assert name == figure.name and float(value) == pytest.approx(figure.sides[measures.SAMPLES].value, rel=1e-3)
        assert float(floor) == pytest.approx(figure.sides[measures.FLOOR].value, rel=1e-3)


def test_large_pictures_are_compared_at_32_pixels() -> None:
    small = torch.arange(0, 256, 64, dtype=torch.uint8).reshape(1, 1, 2, 2).expand(1, 3, 2, 2)
    blocks = small.repeat_interleave(32, 2).repeat_interleave(32, 3)  # 64 px
    assert measures.compared(blocks).shape == (1, 3 * 32 * 32)
    assert measures.compared(blocks)[0, 0] == 0  # far from an edge a block keeps its value


def test_the_vae_is_a_network_too(vae: str, reference: Reference) -> None:
    from ldm.autoencoder import load_autoencoder

    network = VaeFeatures(load_autoencoder(vae))
    assert network.features(reference.holdout.pixels[:5]).shape == (5, 4 * 8 * 8)


def test_too_many_rows_for_a_manifold_are_thinned_by_the_seed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(measures, "MANIFOLD_ROWS", 10)
    rows = torch.arange(25.0)[:, None]
    kept = measures.thinned(rows, 0)
    assert len(kept) == 10 and torch.equal(kept, kept.sort(0).values)
    assert torch.equal(measures.thinned(rows, 0), kept) and not torch.equal(measures.thinned(rows, 1), kept)

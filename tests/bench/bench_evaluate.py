"""What measuring costs beside sampling: seconds of each part, and its share of the seconds that drawing takes.

    python tests/bench/bench_evaluate.py SNAPSHOT REFERENCE [FEATURES [NUM_IMAGES [STEPS]]]       two cores, minutes

FEATURES: vae (the default), classifier or a network's file. Pictures are drawn in this process, as `ldm sample` draws
them, so that no server's start counts as sampling. Then the whole of it twice, as for the first and the next snapshot
that are measured into one output. Asked: under 10% of drawing.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from typing import TypeVar

import torch

from ldm import metrics
from ldm.classifier import Classifier
from ldm.drawing import load_sampler
from ldm.features import VaeFeatures, load_extractor
from ldm.plan import SamplerConfig
from ldm.snapshot import read_snapshot
from ldm.sources import find_shards
from pipelines.evaluate import classes, figures, measures
from pipelines.evaluate.kept import Kept
from pipelines.evaluate.measures import FLOOR, SAMPLES
from pipelines.evaluate.memory import nearest
from pipelines.evaluate.networks import CLASSIFIER, VAE, trained_classifier
from pipelines.evaluate.reference import Pictures, read_reference

T = TypeVar("T")
SECONDS: dict[str, float] = {}


def timed(name: str, work: Callable[[], T]) -> T:
    started = time.perf_counter()
    result = work()
    SECONDS[name] = time.perf_counter() - started
    return result


def main(snapshot_url: str, source: str, features: str, num_images: int, steps: int) -> None:
    snapshot = read_snapshot(snapshot_url)
    reference = read_reference(find_shards(source)[0], snapshot, 0.1, 20_000)
    sampler = load_sampler(snapshot_url, batch_size=32)
    labels, seeds = None, torch.arange(num_images)
    if snapshot.conditioning.num_classes:
        labels = seeds % snapshot.conditioning.num_classes
    settings = SamplerConfig(num_inference_steps=steps)
    with torch.inference_mode():
        sampler.draw(labels, seeds[:32], settings)  # warms up
        drawn = timed("drawing", lambda: sampler.draw(labels, seeds, settings))
    if features == CLASSIFIER:
        num_classes = snapshot.conditioning.num_classes
        network = timed("training the classifier", lambda: trained_classifier(reference, num_classes, 0))
    else:
        network = VaeFeatures(sampler.autoencoder) if features == VAE else load_extractor(features, drawn.shape[2:])
    samples = Pictures(drawn.clone(), labels)
    in_parts(samples, reference, network, sampler.autoencoder)
    report(len(drawn), len(reference.train))
    with tempfile.TemporaryDirectory() as folder:
        for which in ("first", "next"):
            seconds = whole(samples, reference, network, sampler.autoencoder, Kept(folder))
            print(f"all of it, {which} snapshot in one output: {seconds:.2f} s, {seconds / SECONDS['drawing']:.1%}")


def whole(samples, reference, network, autoencoder, kept):
    """Seconds of what `ldm evaluate` does once pictures are drawn and read."""
    started = time.perf_counter()
    if isinstance(network, Classifier):
        network = trained_classifier(reference, network.network[-1].out_features, 0, kept=kept)
    figures.measure(samples, reference, network, autoencoder, kept=kept)
    return time.perf_counter() - started


def in_parts(samples, reference, network, autoencoder):
    """The parts of `pipelines.evaluate.figures.measure`, one by one."""
    sets = timed("reconstructions", lambda: measures.make_sets(samples, reference, autoencoder, 0))
    sides = timed("features of samples and floors", lambda: sets.describe(network.features))
    train = timed("features of the training pictures", lambda: network.features(reference.train.pixels))
    pixels, held_out, train_pixels = timed("reducing", lambda: reduced(sets, reference))
    timed("fréchet", lambda: frechet(sides, train, network))
    timed("kernel", lambda: measures.kernel(sides, train, network, 0))
    timed("manifolds", lambda: measures.manifolds(sides, train, network, 0))
    timed("sliced", lambda: measures.sliced(pixels, train_pixels, 0))
    near = {SAMPLES: pixels[SAMPLES], FLOOR: held_out}
    timed("nearest", lambda: nearest(near, train_pixels, 0))
    if samples.labels is not None and reference.train.labels is not None:
        timed("recall by class", lambda: classes.class_recall(sets, pixels, train_pixels, reference.train.labels))


def reduced(sets, reference):
    held_out = measures.compared(reference.holdout.pixels)
    return sets.describe(measures.compared, held_out=held_out), held_out, measures.compared(reference.train.pixels)


def frechet(sides, train, network):
    gaussian = metrics.fit_gaussian(train)
    influence = {side: metrics.frechet_contributions(rows, gaussian) for side, rows in sides.items()}
    return measures.frechet(influence, network, 0)


def report(drawn: int, train: int) -> None:
    drawing, parts = SECONDS["drawing"], {name: took for name, took in SECONDS.items() if name != "drawing"}
    print(f"{drawn} pictures against {train}; drawing {drawing:.1f} s; of that")
    for name, seconds in {**parts, "the parts together": sum(parts.values())}.items():
        print(f"{name:<36} {seconds:8.2f} s {seconds / drawing:8.1%}")


if __name__ == "__main__":
    given = sys.argv[1:]
    rest = [*given[2:], *("vae", "500", "50")[len(given) - 2 :]]
    main(given[0], given[1], rest[0], int(rest[1]), int(rest[2]))

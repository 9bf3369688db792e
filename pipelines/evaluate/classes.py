"""Figures by class: is what was asked for drawn, in all its variety, and which class is worst off?"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm import metrics
from ldm.classifier import Classifier
from pipelines.evaluate.measures import EQUAL, FLOOR, NEIGHBOURS, SAMPLES, Sets, Sides
from pipelines.evaluate.reference import Pictures, Reference

WORST = {"accuracy": min, "recall_ratio": min, "fd_part": max, "nearest_train": min}
"""Figures of a class, and which of them is the worst."""


@dataclass(frozen=True)
class ClassFigures:
    """metrics: name => figure. by_class: rows of class number and figures; empty where there are no labels."""

    metrics: dict[str, float]
    by_class: list[dict[str, Any]]


def conditional_accuracy(
    samples: Pictures, predicted: Tensor, reference: Reference, classifier: Classifier, seed: int
) -> ClassFigures:
    """Share of the samples that the classifier reads as the class asked for, beside its own held-out accuracy.

    predicted: int64 (N,), what it reads the samples as.
    """
    assert samples.labels is not None and reference.holdout.labels is not None
    right = (predicted == samples.labels).double()
    low, high = metrics.mean_interval(right, seed=seed)
    rows = class_means("accuracy", right, samples.labels)
    figures = {
        "accuracy": float(right.mean()),
        "accuracy_low": low,
        "accuracy_high": high,
        "accuracy_worst_class": min(row["accuracy"] for row in rows),
        "classifier_accuracy": classifier.accuracy(reference.holdout.pixels, reference.holdout.labels),
    }
    return ClassFigures(figures, rows)


def class_recall(sets: Sets, pixels: Sides, train: Tensor, train_labels: Tensor) -> ClassFigures:
    """Within-class recall (k = 5) of samples, and of equally many held-out pictures as the floor.

    pixels, train: rows of the sets and of the training pictures, as `measures.compared` gives them.

    recall_ratio is the mean recall over the mean floor; recall_ratio_worst_class the least of one class. Classes
    with too few pictures to span a manifold are left out; nothing is said where none is left.
    """
    asked_for, held_labels = sets.pictures[SAMPLES].labels, sets.pictures[FLOOR].labels
    assert asked_for is not None and held_labels is not None
    numbers, counts = torch.unique(held_labels, return_counts=True)
    measured = torch.isin(train_labels, numbers[counts > NEIGHBOURS])
    if not measured.any():
        return ClassFigures({}, [])
    real, real_labels = train[measured], train_labels[measured]
    recalls, floors = (
        metrics.within_class_recall(real, real_labels, rows, labels, NEIGHBOURS)
        for rows, labels in ((pixels[EQUAL], asked_for[sets.equal]), (pixels[FLOOR], held_labels))
    )
    labels = torch.unique(real_labels).tolist()
    rows = [
        {"class": label, "recall": recall, "recall_floor": floor, "recall_ratio": recall / floor if floor else None}
        for label, recall, floor in zip(labels, recalls.tolist(), floors.tolist(), strict=True)
    ]
    figures = {"recall": float(recalls.mean()), "recall_floor": float(floors.mean())}
    if bool((floors > 0).all()):
        figures["recall_ratio"] = figures["recall"] / figures["recall_floor"]
        figures["recall_ratio_worst_class"] = float((recalls / floors).min())
    return ClassFigures(figures, rows)


def class_means(name: str, values: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    """The mean of values (N,) over each class of labels (N,), as rows."""
    return [{"class": n, name: float(values[labels == n].mean())} for n in torch.unique(labels).tolist()]


def joined(parts: Iterable[list[dict[str, Any]]], names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Rows of the same class made one, in the order of the classes, with the class's name where it has one."""
    found: dict[int, dict[str, Any]] = {}
    for rows in parts:
        for row in rows:
            found.setdefault(row["class"], {}).update(row)
    return [{**found[n], "name": names[n]} if names else found[n] for n in sorted(found)]


def worst_classes(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By figure the row, cut to what names it, of the class that is worst off."""
    worst = {}
    for figure, choose in WORST.items():
        measured = [row for row in rows if row.get(figure) is not None]
        if measured:
            row = choose(measured, key=lambda row: row[figure])
            worst[figure] = {key: row[key] for key in ("class", "name", figure) if key in row}
    return worst

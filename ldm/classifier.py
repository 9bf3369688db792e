"""A small classifier trained on the corpus itself: does a sampled picture show the class that was asked for?

It is also a named feature extractor for `ldm.metrics`. Its figures compare runs on one corpus only, and its
own accuracy on held-out pictures stands beside each of them.

    N  pictures      D  features      K  classes
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm import random
from ldm.features import in_fixed_batches

PICTURE_SIZE = 32  # px: what a picture is resized to before it is classified
NUM_FEATURES = 128
PREDICT_BATCH = 256  # pictures


class Classifier:
    """A trained network over raw pictures; the hash of its weights is its name, and that of its features."""

    def __init__(self, network: nn.Sequential) -> None:
        self.network = network.eval()
        self.name = f"classifier-{_weights_hash(network)}"

    def predict(self, pictures: Tensor) -> Tensor:
        """Pictures uint8 (N, 3, H, W) => labels int64 (N,)."""
        return self.classify(self.features(pictures))

    @torch.no_grad()
    def classify(self, features: Tensor) -> Tensor:
        """What `features` gave (N, D) => labels int64 (N,)."""
        logits: Tensor = self.network[-1](features)
        return logits.argmax(1)

    @torch.no_grad()
    def features(self, pictures: Tensor) -> Tensor:
        """Pictures uint8 (N, 3, H, W) => what the last layer reads, float32 (N, D)."""
        body = self.network[:-1]
        self.network.to(pictures.device)
        return in_fixed_batches(lambda batch: body(_network_input(batch)), pictures, PREDICT_BATCH)

    def accuracy(self, pictures: Tensor, labels: Tensor) -> float:
        """Share of the pictures (N, 3, H, W) that it reads as their label (N,)."""
        return float((self.predict(pictures) == labels).double().mean())


def train_classifier(
    pictures: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    seed: int = 0,
    epochs: int = 12,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    progress: Callable[[int, int], None] | None = None,
) -> Classifier:
    """Trains on pictures uint8 (N, 3, H, W) with labels int64 (N,) in [0, num_classes).

    The same weights for the same arguments on one machine and thread count. `progress(step, steps)` is called
    after each step. What is held out, and the accuracy on it, is the caller's business. Memory: 12 KB a picture.
    """
    _check(pictures, labels, num_classes)
    batch_size = min(batch_size, len(pictures))
    steps_per_epoch = len(pictures) // batch_size
    network = _new_network(num_classes, seed).to(pictures.device).train()
    optimizer = torch.optim.AdamW(network.parameters(), learning_rate, weight_decay=0.05)
    steps = epochs * steps_per_epoch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    ids = torch.arange(len(pictures), device=pictures.device)
    inputs = torch.cat([_network_input(part) for part in pictures.split(PREDICT_BATCH)])  # once, not in each epoch
    for epoch in range(epochs):
        order = random.uniform(seed, "classifier-order", ids, epoch).argsort(stable=True)
        for i in range(steps_per_epoch):  # the rest of an epoch, less than a batch, comes in another one
            rows = order[i * batch_size : (i + 1) * batch_size]
            shifted = _shifted(inputs[rows], rows, epoch, seed)
            loss = F.cross_entropy(network(shifted), labels[rows], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if progress is not None:
                progress(epoch * steps_per_epoch + i + 1, steps)
    return Classifier(network)


def load_classifier(weights: dict[str, Tensor], num_classes: int) -> Classifier:
    """The one whose network has these weights."""
    network = _new_network(num_classes, 0)
    network.load_state_dict(weights)
    return Classifier(network)


def _new_network(num_classes: int, seed: int) -> nn.Sequential:
    """(N, 3, 32, 32) => (N, K). All but the last layer give the features."""

    def convolution(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
        layer = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        return [layer, nn.BatchNorm2d(outputs), nn.ReLU()]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            *convolution(3, 16, stride=2),  # (N, 16, 16, 16)
            *convolution(16, 32),
            nn.MaxPool2d(2),  # (N, 32, 8, 8)
            *convolution(32, 64),
            nn.MaxPool2d(2),  # (N, 64, 4, 4)
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, NUM_FEATURES, bias=False),
            nn.BatchNorm1d(NUM_FEATURES),
            nn.ReLU(),
            nn.Linear(NUM_FEATURES, num_classes),
        )


def _network_input(pictures: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) => float32 (N, 3, 32, 32) in [-1, 1]."""
    pixels = pictures.float() / 127.5 - 1
    if pixels.shape[-2:] == (PICTURE_SIZE, PICTURE_SIZE):
        return pixels
    return F.interpolate(pixels, size=(PICTURE_SIZE, PICTURE_SIZE), mode="bilinear", antialias=True)


def _shifted(inputs: Tensor, ids: Tensor, epoch: int, seed: int, reach: int = 2) -> Tensor:
    """Moves each picture (N, 3, S, S) by up to `reach` pixels either way; its edge fills the gap."""
    size = inputs.shape[-1]
    down, right = (
        random.uniform_integers(seed, f"classifier-shift-{axis}", ids, epoch, 2 * reach + 1) for axis in "yx"
    )
    window = torch.arange(size, device=inputs.device)
    rows, columns = down[:, None] + window, right[:, None] + window  # (N, S)
    padded = F.pad(inputs, (reach,) * 4, mode="replicate")
    sample = torch.arange(len(inputs), device=inputs.device)[:, None, None]
    # Index tensors around the slice put the channels last: (N, S, S, 3) => (N, 3, S, S)
    return padded[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _weights_hash(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def _check(pictures: Tensor, labels: Tensor, num_classes: int) -> None:
    if pictures.dtype != torch.uint8 or pictures.ndim != 4 or pictures.shape[1] != 3:
        raise ValueError(f"pictures must be uint8 (N, 3, H, W), not {pictures.dtype} {tuple(pictures.shape)}")
    if len(pictures) < 2 or labels.shape != (len(pictures),):
        shapes = f"{len(pictures)} pictures and labels {tuple(labels.shape)}"
        raise ValueError(f"at least 2 pictures with one label each are needed, not {shapes}")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"labels {int(labels.min())}..{int(labels.max())} do not lie in [0, {num_classes})")

"""Image shards, or a folder of pictures => the reference pictures, split as training split them."""

import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ldm import images, storage
from ldm.config import RequestError
from ldm.latents.choice import is_held_out
from ldm.latents.writer import sample_id
from ldm.shards import RawSample
from ldm.snapshot import Snapshot
from ldm.sources import InputShard, find_shards
from pipelines.progress import Progress, counted, say


@dataclass(frozen=True)
class Pictures:
    """pixels: uint8 (N, 3, H, W). labels: int64 (N,), or None."""

    pixels: Tensor
    labels: Tensor | None

    def __len__(self) -> int:
        return len(self.pixels)

    def take(self, rows: Tensor) -> "Pictures":
        """Those at `rows`: numbers, or a bool (N,)."""
        return Pictures(self.pixels[rows], None if self.labels is None else self.labels[rows])


@dataclass(frozen=True)
class Reference:
    """What the model was trained on, and what it never saw. skipped: samples that hold no readable picture.

    train_names: SHARD/KEY of each training picture. unlabelled: pictures without a label; where there are any, none has
    one here.
    """

    train: Pictures
    holdout: Pictures
    skipped: int
    train_names: tuple[str, ...] = ()
    unlabelled: int = 0


def find_reference(source: str | Sequence[str], key: str = "reference") -> tuple[dict[str, InputShard], dict[str, int]]:
    """(input shards by name, their bytes by URL). Raises RequestError, which names `key`."""
    try:
        found, _ = find_shards(source)
    except RequestError as error:
        raise RequestError(str(error).replace("source=", f"{key}=", 1)) from None
    for shard in found.values():
        if shard.bytes == 0:
            raise RequestError(f"{key}={shard.url}: is empty; give a WebDataset tar that holds pictures")
    return found, {storage.join(s.url, s.name) if s.files else s.url: s.bytes for s in found.values()}


def read_reference(
    inputs: Mapping[str, InputShard], snapshot: Snapshot, holdout: float, max_pictures: int, label: str = "cls"
) -> Reference:
    """Reads shards (by name) in the order given, prepared as the snapshot's own pictures were.

    label: what holds the class number, as `ldm encode` was told. A picture is held out by the hash of its id, as in
    training. Raises RequestError where there is none, or a label that the model does not have.
    """
    shape, background = snapshot.picture_shape(), tuple(snapshot.fingerprint["pictures"]["background"])
    pixels: list[npt.NDArray[np.uint8]] = []
    labels, ids, names, skipped = list[int](), list[int](), list[str](), 0
    for name, sample in _samples(inputs):
        if len(pixels) == max_pictures:
            say(f"evaluate: the first {max_pictures:,} reference pictures are used (max_reference)")
            break
        try:
            number = sample.label_from(label)
            decoded, _ = images.decode(sample.picture or b"", shape, background)
        except (images.BadPicture, ValueError):  # ValueError: a label that is no number
            skipped += 1
            continue
        pixels.append(decoded)
        labels.append(-1 if number is None else number)
        ids.append(sample_id(name, sample.key))
        names.append(f"{name}/{sample.key}")
    if not pixels:
        raise RequestError(f"reference={next(iter(inputs.values())).url}: holds no readable picture; give image shards")
    if skipped:
        say(f"evaluate: {counted(skipped, 'sample')} of the reference left out: no readable picture, or a broken label")
    known, held_out = _checked_labels(labels, snapshot), is_held_out(np.array(ids, np.int64), holdout)

    def side(rows: npt.NDArray[np.intp]) -> Pictures:
        # Straight from the list: one array of all, which both sides are taken from, would hold the pictures once more.
        part = np.empty((len(rows), 3, *shape), np.uint8)
        for place, row in enumerate(rows):
            part[place] = pixels[row]
        return Pictures(torch.from_numpy(part), None if known is None else known[torch.from_numpy(rows)])

    train, held = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    unlabelled = labels.count(-1) if snapshot.conditioning.num_classes else 0
    return Reference(side(train), side(held), skipped, tuple(names[row] for row in train), unlabelled)


def _samples(inputs: Mapping[str, InputShard]) -> Iterator[tuple[str, RawSample]]:
    """(name of the shard, sample) in order. Raises RequestError where a tar is damaged."""
    with Progress("evaluate: reading the reference", len(inputs), "shards") as progress:
        for name, shard in inputs.items():
            try:
                yield from ((name, sample) for sample in shard.reader())
            except tarfile.TarError as error:
                raise RequestError(f"reference={shard.url}: is no whole tar ({error}); give image shards") from None
            progress.advance(1)


def _checked_labels(labels: list[int], snapshot: Snapshot) -> Tensor | None:
    """int64 (N,); None for an unconditional model, or where a picture has no label."""
    num_classes = snapshot.conditioning.num_classes
    if num_classes == 0 or min(labels) < 0:
        return None
    if max(labels) >= num_classes:
        raise RequestError(f"reference: holds label {max(labels)}, but the model has classes 0 to {num_classes - 1}")
    return torch.tensor(labels, dtype=torch.int64)

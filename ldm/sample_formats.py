"""Drawn pictures as files of their own, and as the array that the ADM suite reads. Shards: `ldm.sample_shards`."""

import zipfile
from collections.abc import Iterable

import numpy as np

from ldm import storage
from ldm.provenance import DrawnPicture
from ldm.threads import ahead


def write_pngs(url: str, batches: Iterable[Iterable[DrawnPicture]]) -> None:
    """One PNG a picture, by its number; those of a batch are written while the next one is drawn."""

    def write(picture: DrawnPicture) -> None:
        storage.write_bytes(storage.join(url, f"{picture.number:06d}.png"), picture.to_png())

    for _ in ahead(write, batches):
        pass


def write_npz(url: str, count: int, shape: tuple[int, int], batches: Iterable[Iterable[DrawnPicture]]) -> None:
    """`count` pictures of `shape` (H, W) as a .npz, whole or not at all: arr_0 uint8 (N, H, W, 3), and arr_1 int64 (N,)
    of the labels where all have one.

    What `image_sample.py` of openai/guided-diffusion saves, and its `evaluator.py` reads. One batch is held at a time.
    """
    labels: list[int | None] = []
    with storage.writing(url) as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as array:
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape, 3)}
            np.lib.format.write_array_header_1_0(array, header)
            for batch in batches:
                for picture in batch:
                    array.write(picture.pixels.transpose(1, 2, 0).tobytes())
                    labels.append(picture.label)
        if None not in labels:
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w", force_zip64=True) as array:
                np.lib.format.write_array(array, np.array(labels, np.int64), allow_pickle=False)


def array_bytes(count: int, shape: tuple[int, int]) -> int:
    """What `write_npz` takes, its headers but for a kilobyte."""
    return count * (3 * shape[0] * shape[1] + 8)

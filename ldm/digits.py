"""Demonstration data: the 1,797 handwritten 8x8 digits that scikit-learn carries, as image shards.

UCI "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak 1998, CC BY 4.0). They are enlarged to
32 px, and two broken pictures are planted among them, for real data has some.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from ldm.config import RequestError

PICTURE_SIZE = 32  # px
SEED = 20240229  # of the order of the digits over the shards
BROKEN = {600: "truncated", 1200: "no picture"}  # place in the data set => what is wrong with it


def load_digit_pictures() -> tuple[Tensor, Tensor]:
    """All digits, in scikit-learn's order: pictures uint8 (1797, 3, 32, 32), labels int64 (1797,).

    Raises RequestError where scikit-learn is not installed.
    """
    images, labels = _digits()
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))  # (N, H, W, 3)
    return pixels.permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels)


def write_digit_shards(folder: str | Path, shards: int = 8) -> dict[str, int]:
    """Writes digits-00000.tar … (WebDataset: NNNNN.png, NNNNN.cls) into `folder`; the same bytes each time.

    The classes are mixed over the shards by a fixed permutation. Returns {inputs, digits, broken, shards},
    where inputs = digits + broken. Raises RequestError where scikit-learn is not installed.
    """
    images, labels = _digits()
    order = iter(np.random.Generator(np.random.Philox(SEED)).permutation(len(images)))
    inputs = len(images) + len(BROKEN)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for shard, places in enumerate(np.array_split(np.arange(inputs), shards)):
        with tarfile.open(folder / f"digits-{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for place in places.tolist():
                if place in BROKEN:
                    picture, label = _broken_picture(BROKEN[place], images[0]), 0
                else:
                    digit = next(order)
                    picture, label = _png(images[digit]), int(labels[digit])
                _add(tar, f"{place:05d}.png", picture)
                _add(tar, f"{place:05d}.cls", str(label).encode())
    return {"inputs": inputs, "digits": len(images), "broken": len(BROKEN), "shards": shards}


def _digits() -> tuple[list[Image.Image], npt.NDArray[np.int64]]:
    """RGB pictures of 32 px and labels, in scikit-learn's order."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        message = "digits: need scikit-learn, which is not installed; pip install scikit-learn"
        raise RequestError(message) from None
    digits = load_digits()
    images = []
    for ink in digits.images:  # (8, 8) of 0 to 16
        small = Image.fromarray(np.round(ink * (255 / 16)).astype(np.uint8))
        images.append(small.resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.BICUBIC).convert("RGB"))
    return images, digits.target.astype(np.int64)


def _broken_picture(fault: str, image: Image.Image) -> bytes:
    if fault == "truncated":
        whole = _png(image)
        return whole[: len(whole) // 2]
    return b"This is no picture, whatever its name says.\n"


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # mtime, owner and mode are constants: the same bytes on each machine
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))

"""The pictures and the mask that a request to sample starts from, and which of them a task needs."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ldm import images, storage
from ldm.config import RequestError
from ldm.editing import soften
from ldm.sample_config import SampleConfig
from ldm.shards import PICTURE_EXTENSIONS
from ldm.snapshot import Snapshot

GRID = "grid.png"
"""What `ldm sample` writes beside its pictures, and never takes for one of those given."""

NEED_PICTURES = ("reconstruct", "image_to_image", "inpaint")
EDITS = ("image_to_image", "inpaint")


def find_pictures(pictures: str | Sequence[str] | None) -> tuple[str, ...]:
    """URLs in the order in which they are given; of a folder its pictures, but for the grid of `ldm sample`."""
    given = (pictures,) if isinstance(pictures, str) else pictures or ()
    found: list[str] = []
    for text in (part for location in given for part in storage.split_commas(location)):
        if storage.is_directory(text):
            names = [name for name in storage.list_dir(text) if _is_picture(name)]
            if not names:
                raise RequestError(f"pictures={text}: holds no pictures; give pictures, or a folder of them")
            found += [storage.join(text, name) for name in names]
        else:
            try:
                found += storage.expand(text, "pictures")
            except RequestError as error:  # which advises a tar
                raise RequestError(f"{str(error).split('; give')[0]}; give pictures, or a folder of them") from None
    return tuple(found)


def check_task(config: SampleConfig, pictures: Sequence[str]) -> None:
    """Raises RequestError where a task has not what it needs, or a key is given that it does not use."""
    task = config.task
    if task in NEED_PICTURES and not pictures:
        raise RequestError(f"task={task}: starts from pictures; give pictures=FILES")
    if task == "generate" and pictures:
        raise RequestError("task=generate: starts from noise alone; leave pictures out, or give another task")
    if task == "interpolate" and pictures and len(pictures) != 2:
        raise RequestError(f"pictures={config.pictures}: are {len(pictures)}; interpolate needs exactly 2")
    if (task == "inpaint") != (config.mask is not None):
        wrong = (
            "inpaint paints where it is white; give mask=FILE" if task == "inpaint" else f"is no part of task={task}"
        )
        raise RequestError(f"mask={config.mask or 'null'}: {wrong}")
    if config.mask_blur and config.mask is None:
        raise RequestError(f"mask_blur={config.mask_blur}: is of a mask; leave it out, or give task=inpaint mask=FILE")
    if config.clip_x0 is not None and pictures and task not in EDITS:
        raise RequestError(f"clip_x0={config.clip_x0}: inversion knows no clipping; leave it out for task={task}")
    if config.strength is not None and task not in ("variations", *EDITS):
        raise RequestError(f"strength={config.strength}: is no part of task={task}; leave it out")


def _is_picture(name: str) -> bool:
    return name != GRID and name.lower().rpartition(".")[2] in PICTURE_EXTENSIONS


def read_mask(url: str | None, blur: int, shape: tuple[int, int], snapshot: Snapshot) -> Tensor | None:
    """float (1, 1, H, W), 1 where it is white; with a soft edge of `blur` pixels inside. Raises RequestError."""
    if url is None:
        return None
    grey = read_pictures((url,), shape, snapshot, "mask").float().mean(dim=1, keepdim=True) / 255
    mask = soften(grey, blur)
    if not mask.any():
        raise RequestError(f"mask={url}: is black, or fades out at mask_blur={blur}")
    return mask


def read_pictures(urls: Sequence[str], shape: tuple[int, int], snapshot: Snapshot, key: str) -> Tensor:
    """uint8 (N, 3, H, W), cut as training cut its pictures. Raises RequestError."""
    background = tuple(snapshot.fingerprint["pictures"]["background"])
    pixels = []
    for url in urls:
        try:
            pixels.append(images.decode(storage.read_bytes(url), shape, background)[0])
        except (FileNotFoundError, IsADirectoryError):
            raise RequestError(f"{key}={url}: is no file; give a picture") from None
        except images.BadPicture as error:
            raise RequestError(f"{key}={url}: cannot be read as a picture ({error})") from None
    return torch.from_numpy(np.stack(pixels)) if pixels else torch.empty(0)

"""Encoded picture => raw pixels: uint8 (3, size, size), the same way up for everyone.

The rules are part of the fingerprint of a latent dataset (`PICTURE_RULES`): change one and its version.
"""

import io
import warnings

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

PICTURE_RULES = {
    "version": 1,
    "orientation": "exif",
    "colour": "sRGB values as stored, grey and palette to RGB, alpha over the background",
    "frame": "first",
    "resize": "short side, lanczos, antialiased",
    "crop": "centre",
}
MAX_PIXELS = 1 << 27
"""Pictures whose header claims more pixels are refused before they are decoded (a decompression bomb)."""


class BadPicture(Exception):
    """The bytes cannot be made into a picture; `str(error)` says why in one line."""


def decode(
    data: bytes, size: int, background: tuple[int, int, int] = (255, 255, 255)
) -> tuple[npt.NDArray[np.uint8], tuple[int, int]]:
    """Encoded picture => (pixels uint8 (3, size, size), original (width, height) after orientation).

    Raises BadPicture for anything that Pillow cannot read in full.
    """
    try:
        # A truncated or odd picture may warn instead of failing: what warns of a bomb is refused by size below.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image: Image.Image = Image.open(io.BytesIO(data))
            if image.width * image.height > MAX_PIXELS:
                raise BadPicture(f"{image.width}x{image.height} pixels, the limit is {MAX_PIXELS}")
            image.load()
            image = _to_rgb(ImageOps.exif_transpose(image), background)
            original = image.size
            pixels = np.asarray(_resize_and_crop(image, size), dtype=np.uint8)
    except BadPicture:
        raise
    except Exception as error:  # a malformed picture makes Pillow raise nearly anything; the message is kept
        if isinstance(error, UnidentifiedImageError):  # its text names a place in memory
            raise BadPicture("is no picture that Pillow knows") from None
        text = " ".join(str(error).split())[:200]
        raise BadPicture(f"{type(error).__name__}: {text}") from None
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)), original  # (H, W, 3) => (3, H, W)


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):  # 16 bits: keep the upper eight
        image = Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(canvas, image)
    return image.convert("RGB")


def _resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    """Short side to `size`, then the centre square."""
    if image.size == (size, size):
        return image
    # The box is cut out while resizing: the whole of a very long picture would not fit into memory.
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))


def to_png(pixels: npt.NDArray[np.uint8]) -> bytes:
    """uint8 (3, H, W) => PNG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


def grid(pictures: npt.NDArray[np.uint8], columns: int, gap: int = 2) -> npt.NDArray[np.uint8]:
    """uint8 (N, 3, H, W) => one picture uint8 (3, rows * H, columns * W), row by row on white."""
    count, channels, height, width = pictures.shape
    rows = -(-count // columns)
    canvas = np.full((channels, rows * (height + gap) - gap, columns * (width + gap) - gap), 255, np.uint8)
    for i, picture in enumerate(pictures):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        canvas[:, top : top + height, left : left + width] = picture
    return canvas

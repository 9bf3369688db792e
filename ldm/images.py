"""Encoded picture => raw pixels, the same way up for everyone: a square, several squares, or the nearest bucket.

What Pillow reads is taken, all of it decoded at full size (no JPEG draft mode, no reducing gap: both change the bytes):

| stored as | becomes |
|---|---|
| EXIF orientation, in any format that has it | upright; EXIF that cannot be read counts as upright |
| grey, palette, 1 bit, CMYK (Adobe's inverted too), YCbCr, LAB | RGB; embedded profiles are not applied |
| alpha: a channel, a palette's, one transparent colour, what a first frame leaves free | the background |
| 16-bit grey or colour | the upper eight bits |
| integers outside of 16 bits, floating point | BadPicture: nothing says what is white |
| animation, several pages | the first frame |
| EPS | BadPicture: reading it would run Ghostscript on it |
| more than MAX_PIXELS by its header | BadPicture, before anything is decoded |

A transparent colour of a grey PNG of 2 or 4 bits is not seen: Pillow (13.0) compares it with other numbers.
The rules are part of the fingerprint of a latent dataset (`PICTURE_RULES`): change one and its version.
"""

import io
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from math import inf, isqrt, log10
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from pydantic import Field

from ldm.config import Config, RequestError

PICTURE_RULES = {
    "version": 2,
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


class TooSmall(BadPicture):
    """A picture that is to be filtered out: its short side is under `PictureRules.min_size`."""


class Buckets(Config):
    """Shapes of about the same area, so that pictures of other aspects than the square lose little to the crop."""

    max_ratio: float = Field(2.0, ge=1, description="long side over short side, at most")
    step: int = Field(64, gt=0, description="sides are multiples of this, pixels")


@cache
def bucket_shapes(size: int, buckets: Buckets) -> tuple[tuple[int, int], ...]:
    """Sorted (h, w), both ways round: for each short side the longest other side that keeps h w <= size^2.

    Holds the square where `buckets.step` divides `size`. Raises RequestError where no shape is left.
    """
    step, found = buckets.step, set[tuple[int, int]]()
    for short in range(1, isqrt(size**2 // step**2) + 1):
        long = size**2 // (step**2 * short)
        if long <= buckets.max_ratio * short:
            found |= {(short * step, long * step), (long * step, short * step)}
    if not found:
        raise RequestError(
            f"buckets.step={step}: leaves no shape of the area of {size}x{size} pixels and a ratio of at most "
            f"{buckets.max_ratio:g}; give a step that divides {size}"
        )
    return tuple(sorted(found))


@dataclass(frozen=True)
class PictureRules:
    """What pictures become. sizes: pixels, one view for each; its square, or the nearest of its buckets.

    background: RGB behind what is transparent. min_size: of the short side, 0 for none. flip: mirrored copies too.
    """

    sizes: tuple[int, ...]
    buckets: Buckets | None = None
    background: tuple[int, int, int] = (255, 255, 255)
    min_size: int = 0
    flip: bool = False

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """All (h, w) that can come out, sorted. Raises RequestError where the buckets leave none."""
        return tuple(sorted({shape for size in self.sizes for shape in self.shapes_of(size)}))

    def shapes_of(self, size: int) -> tuple[tuple[int, int], ...]:
        """The (h, w) that the view of this size can have."""
        return bucket_shapes(size, self.buckets) if self.buckets else ((size, size),)

    def fingerprint(self) -> dict[str, object]:
        """All that the bytes of a view depend on; `min_size` only chooses pictures."""
        rules = {**PICTURE_RULES, "size": self.sizes[0], "background": list(self.background)}
        if len(self.sizes) > 1:
            rules["sizes"] = list(self.sizes)
        if self.buckets:
            rules["buckets"] = self.buckets.model_dump()
        if self.flip:
            rules["flip"] = True
        return rules

    @staticmethod
    def from_fingerprint(values: dict[str, Any]) -> "PictureRules":
        """The rules that gave this fingerprint, but for `min_size`."""
        buckets = Buckets(**values["buckets"]) if "buckets" in values else None
        sizes, background = values.get("sizes", [values["size"]]), values["background"]
        return PictureRules(tuple(sizes), buckets, tuple(background), flip=values.get("flip", False))

    def to_json(self) -> str:
        return json.dumps({**vars(self), "buckets": self.buckets and self.buckets.model_dump()})

    @staticmethod
    def from_json(text: str) -> "PictureRules":
        values = json.loads(text)
        buckets = Buckets(**values["buckets"]) if values["buckets"] else None
        return PictureRules(
            tuple(values["sizes"]), buckets, tuple(values["background"]), values["min_size"], values["flip"]
        )


@dataclass(frozen=True, eq=False)
class View:
    """One way to see a picture.

    pixels: uint8 (3, h, w). box: (left, top, right, bottom) of what it shows, in original pixels after orientation.
    """

    pixels: npt.NDArray[np.uint8]
    box: tuple[float, float, float, float]
    flipped: bool = False


def views(data: bytes, rules: PictureRules) -> tuple[list[View], tuple[int, int]]:
    """Encoded picture => (its views, original (width, height) after orientation).

    The views come in the order of `rules.sizes`, each followed by its mirrored copy where those are asked for. Raises
    BadPicture for anything that Pillow cannot read in full, TooSmall from the header alone.
    """
    with _bad_pictures():
        image = _open(data, rules)
        made = []
        for size in rules.sizes:
            view = _resize_and_crop(image, _nearest(image.size, rules.shapes_of(size)))
            made.append(view)
            if rules.flip:
                made.append(View(np.ascontiguousarray(view.pixels[:, :, ::-1]), view.box, flipped=True))
        return made, image.size


def decode(
    data: bytes, size: int | tuple[int, int], background: tuple[int, int, int] = (255, 255, 255)
) -> tuple[npt.NDArray[np.uint8], tuple[int, int]]:
    """Encoded picture => (pixels uint8 (3, h, w), original (width, height) after orientation). size: a side, or (h, w).

    Raises BadPicture for anything that Pillow cannot read in full.
    """
    with _bad_pictures():
        image = _open(data, PictureRules((), background=background))
        return _resize_and_crop(image, (size, size) if isinstance(size, int) else size).pixels, image.size


@contextmanager
def _bad_pictures() -> Iterator[None]:
    """Turns what decoding raises into a BadPicture of one line."""
    try:
        # A truncated or odd picture may warn instead of failing: what warns of a bomb is refused by its size.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (BadPicture, RequestError):
        raise
    except UnidentifiedImageError:  # its text names a place in memory
        raise BadPicture("is no picture that Pillow knows") from None
    except Exception as error:  # a malformed picture makes Pillow raise nearly anything; the message is kept
        text = " ".join(str(error).split())[:200]
        raise BadPicture(f"{type(error).__name__}: {text}".removesuffix(": ")) from None


def _open(data: bytes, rules: PictureRules) -> Image.Image:
    """The first frame: upright, flat, RGB. Its header is judged before anything is decoded."""
    image = Image.open(io.BytesIO(data))
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadPicture(f"{width}x{height} pixels, the limit is {MAX_PIXELS}")
    if min(width, height) < rules.min_size:
        raise TooSmall(f"{width}x{height} pixels, its short side is under {rules.min_size}")
    if image.format == "EPS":
        raise BadPicture("is EPS, a program and no picture")
    frame = _first_frame(image, data)
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    rgb = _to_rgb(image, rules.background)
    if frame is None or frame == (0, 0, *rgb.size):
        return rgb
    canvas = Image.new("RGB", rgb.size, rules.background)
    canvas.paste(rgb.crop(frame), frame)
    return canvas


def _first_frame(image: ImageFile.ImageFile, data: bytes) -> tuple[int, int, int, int] | None:
    """The box of the first frame where Pillow would paint what it leaves free: viewers see through there."""
    if image.format == "GIF":  # would get colour 0
        return image.tile[0][1]
    if image.format == "WEBP" and image.mode == "RGB" and getattr(image, "is_animated", False):  # would get black
        start = data.index(b"ANMF") + 8  # an animation that is opaque by its header, though no frame need be whole
        left, top, width, height = (int.from_bytes(data[start + n : start + n + 3], "little") for n in (0, 3, 6, 9))
        return 2 * left, 2 * top, 2 * left + width + 1, 2 * top + height + 1
    return None


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode == "F":
        raise BadPicture("holds floating-point numbers, and nothing says which of them is white")
    if image.mode.startswith("I"):
        image = _upper_eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image)
    return image.convert("RGB")


def _upper_eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey => 8-bit grey, with alpha where one value is declared transparent."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise BadPicture(f"holds integers from {values.min()} to {values.max()}, 16 bits have 0 to 65535")
    grey = Image.fromarray((values >> 8).astype(np.uint8))
    if "transparency" in image.info:
        grey.putalpha(Image.fromarray(values != image.info["transparency"]).convert("L"))
    return grey


def _nearest(original: tuple[int, int], shapes: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """Of `shapes` (h, w) the one whose ratio is nearest to that of `original` (width, height), as ratios go."""
    width, height = original

    def distance(shape: tuple[int, int]) -> float:
        # |log| of the quotient of the ratios, without the log: one division gives the same number everywhere.
        one, other = width * shape[0], height * shape[1]
        return max(one, other) / min(one, other)

    return min(shapes, key=distance)


def _resize_and_crop(image: Image.Image, shape: tuple[int, int]) -> View:
    """The greatest centred part that has the ratio of `shape` (h, w), at that size."""
    (width, height), (h, w) = image.size, shape
    wide, high = (height * w / h, float(height)) if width * h > height * w else (float(width), width * h / w)
    left, top = (width - wide) / 2, (height - high) / 2
    # The box is cut out while resizing: the whole of a very long picture would not fit into memory.
    box = (left, top, left + wide, top + high)
    resized = image.resize((w, h), Image.Resampling.LANCZOS, box=box)
    # Band by band is four times as fast as numpy's transposition of (h, w, 3).
    pixels = bytearray().join(resized.getchannel(band).tobytes() for band in range(3))
    return View(np.frombuffer(pixels, np.uint8).reshape(3, h, w), box)


def to_png(pixels: npt.NDArray[np.uint8], text: Mapping[str, str] | None = None) -> bytes:
    """uint8 (3, H, W) => PNG bytes, the same for the same arguments. text: its tEXt chunks, by keyword."""
    buffer, chunks = io.BytesIO(), PngInfo()
    for keyword, value in (text or {}).items():
        chunks.add_text(keyword, value)
    Image.fromarray(pixels.transpose(1, 2, 0)).save(buffer, format="PNG", pnginfo=chunks)
    return buffer.getvalue()


def psnr(one: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio of two pictures of one shape, dB; infinite where they are equal."""
    error = float(np.square(one.astype(np.float64) - other).mean())
    return 10 * log10(255**2 / error) if error else inf


def grid(pictures: npt.NDArray[np.uint8], columns: int, gap: int = 2) -> npt.NDArray[np.uint8]:
    """uint8 (N, 3, H, W) => one picture uint8 (3, rows * H, columns * W), row by row on white."""
    count, channels, height, width = pictures.shape
    rows = -(-count // columns)
    canvas = np.full((channels, rows * (height + gap) - gap, columns * (width + gap) - gap), 255, np.uint8)
    for i, picture in enumerate(pictures):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        canvas[:, top : top + height, left : left + width] = picture
    return canvas

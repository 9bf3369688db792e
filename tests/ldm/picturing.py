"""Pictures whose parts tell which way up they are, PNG files written by hand, and those of a tar."""

import struct
import tarfile
import zlib

import numpy as np
from PIL import Image


def corners(width: int, height: int) -> Image.Image:
    """Red, green, blue and white quarters: no two of its rotations and reflections are alike."""
    pixels = np.zeros((height, width, 3), np.uint8)
    top, left = height // 2, width // 2
    pixels[:top, :left], pixels[:top, left:] = (255, 0, 0), (0, 255, 0)
    pixels[top:, :left], pixels[top:, left:] = (0, 0, 255), (255, 255, 255)
    return Image.fromarray(pixels)


def quarters(pixels: np.ndarray) -> list[tuple[int, ...]]:
    """The colours at the centres of the quarters, rounded to 0 or 255."""
    size = pixels.shape[-1]
    near, far = size // 4, 3 * size // 4
    return [tuple((pixels[:, y, x] > 127) * 255) for y, x in ((near, near), (near, far), (far, near), (far, far))]


AS_MADE = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]


def png_file(width: int, height: int, bits: int, colour: int, rows: list[bytes], *extra: tuple[bytes, bytes]) -> bytes:
    """A PNG of the given rows; colour: 0 grey, 2 RGB."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = b""
    for kind, data in ((b"IHDR", header), *extra, (b"IDAT", body), (b"IEND", b"")):
        chunks += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunks


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds a few bytes."""
    return png_file(width, height, 8, 2, [b"\0" * 99])


def members(path):
    with tarfile.open(path) as tar:
        for member in tar:
            if member.isfile():
                yield member.name, tar.extractfile(member).read()

"""A picture file comes out the right way up, at its size, cut at the centre; and goes back into PNG files."""

import io

import numpy as np
import pytest
from PIL import Image, features

from ldm import images
from ldm.images import decode
from tests.ldm.picturing import AS_MADE, corners, members, quarters
from tests.pictures import encoded, picture

# How a camera that writes this orientation stored the picture: the inverse of what a viewer applies.
STORED_AS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def oriented(image: Image.Image, orientation: int, form: str, **options) -> bytes:
    """The picture as a camera that was held so would store it."""
    transposition = STORED_AS[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image if transposition is None else image.transpose(transposition), form, exif=exif, **options)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", STORED_AS)
def test_every_orientation_comes_out_the_same_way_up(orientation, form):
    if form == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    options = {"lossless": True} if form == "WEBP" else {}
    pixels, original = decode(oriented(corners(48, 32), orientation, form, **options), 32)
    assert original == (48, 32)
    assert quarters(pixels) == AS_MADE


@pytest.mark.parametrize(("width", "height"), [(96, 64), (64, 96)])
def test_all_orientations_are_alike(width, height):
    first, *others = [decode(oriented(picture(0, width, height), n, "JPEG", quality=95), 32)[0] for n in STORED_AS]
    for pixels in others:
        assert np.abs(pixels.astype(float) - first).mean() < 1


@pytest.mark.parametrize(
    "exif",
    [
        b"garbage garbage",
        b"",
        b"MM\0\x2a\0\0\0\x08\0\xff\x01",
        b"II*\0\xff\xff\xff\x7f",
        b"II*\0\x08\0\0\0\x01\0\x12\x01",
    ],
    ids=["no TIFF", "empty", "255 entries", "far away", "cut off"],
)
def test_exif_that_cannot_be_read_counts_as_upright(exif):
    assert quarters(decode(encoded(corners(32, 32), "JPEG", exif=b"Exif\0\0" + exif), 32)[0]) == AS_MADE


@pytest.mark.parametrize(("width", "height"), [(48, 32), (32, 48), (33, 47), (32, 32), (5, 9), (1, 1), (300, 32)])
@pytest.mark.parametrize("size", [8, 32])
def test_shape_and_original_size(width, height, size):
    pixels, original = decode(encoded(picture(0, width, height)), size)
    assert pixels.shape == (3, size, size) and pixels.dtype == np.uint8 and pixels.flags.c_contiguous
    assert original == (width, height)


def test_a_square_picture_of_the_size_is_left_alone():
    image = picture(1, 24, 24)
    assert np.array_equal(decode(encoded(image), 24)[0], np.asarray(image).transpose(2, 0, 1))


def test_the_centre_is_kept():
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 200
    assert (decode(encoded(Image.fromarray(pixels)), 20)[0] == 200).all()
    assert (decode(encoded(Image.fromarray(pixels.transpose(1, 0, 2))), 20)[0] == 200).all()


def test_short_side_lanczos_then_the_centre():
    image = picture(3, 96, 64)
    small = image.resize((48, 32), Image.Resampling.LANCZOS)
    expected = np.asarray(small.crop((8, 0, 40, 32))).transpose(2, 0, 1)
    found = decode(encoded(image), 32)[0]
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_a_very_long_picture_is_not_blown_up_before_it_is_cropped():
    """200,000 x 2 to a short side of 256 would be 25 million pixels wide: 19 GB."""
    pixels, original = decode(encoded(Image.new("RGB", (200_000, 2), (1, 2, 3))), 256)
    assert original == (200_000, 2) and (pixels == np.array([1, 2, 3])[:, None, None]).all()


def test_png_round_trip_and_grid():
    pixels = np.stack([np.asarray(picture(n, 6, 4)).transpose(2, 0, 1) for n in range(5)])
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(images.to_png(pixels[0])))).transpose(2, 0, 1), pixels[0])
    canvas = images.grid(pixels, columns=3, gap=2)
    assert canvas.shape == (3, 2 * 6 - 2, 3 * 8 - 2)
    for n in range(5):
        top, left = n // 3 * 6, n % 3 * 8
        assert np.array_equal(canvas[:, top : top + 4, left : left + 6], pixels[n])
    assert (canvas[:, :, 6:8] == 255).all() and (canvas[:, 6:, 16:] == 255).all()


@pytest.mark.real_data
def test_real_pictures_of_every_orientation_are_alike(shared):
    found: dict[bool, list[np.ndarray]] = {True: [], False: []}
    for name, data in members(shared / "data" / "hostile" / "exif-00000.tar"):
        if name.endswith((".jpg", ".jpeg")):
            pixels, (width, height) = decode(data, 64)
            found[width > height].append(pixels.astype(float))
    assert [len(group) for group in found.values()] == [9, 9]
    for group in found.values():
        for pixels in group[1:]:
            assert np.abs(pixels - group[0]).mean() < 8  # each file carries its own number as a caption

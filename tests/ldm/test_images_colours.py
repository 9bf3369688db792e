"""Colours, transparency, bit depths and animations become flat RGB."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, features

from ldm.images import BadPicture, decode
from tests.ldm.picturing import AS_MADE, corners, png_file, quarters
from tests.pictures import encoded, picture


@pytest.mark.parametrize("background", [(255, 255, 255), (10, 20, 30)])
def test_transparency_lies_over_the_background(background):
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[:, :4] = (200, 100, 0, 255)
    rgba[:, 4:] = (200, 100, 0, 0)
    rgba[4:, 4:, 3] = 128
    for image in (Image.fromarray(rgba), Image.fromarray(rgba).quantize(16)):
        pixels = decode(encoded(image), 8, background)[0].astype(int)
        assert np.abs(pixels[:, 2, 2] - (200, 100, 0)).max() <= 1
        assert np.abs(pixels[:, 2, 6] - background).max() <= 1
        half = (np.array((200, 100, 0)) * 128 + np.array(background) * 127) / 255
        assert np.abs(pixels[:, 6, 6] - half).max() <= 2


def test_grey_with_transparency_and_a_transparent_colour():
    grey = Image.fromarray(np.stack([np.full((4, 4), 90, np.uint8), np.eye(4, dtype=np.uint8) * 255], -1), "LA")
    pixels = decode(encoded(grey), 4, (1, 2, 3))[0]
    assert pixels[:, 0, 0].tolist() == [90, 90, 90] and pixels[:, 0, 1].tolist() == [1, 2, 3]
    colour = Image.new("RGB", (4, 4), (9, 9, 9))
    pixels = decode(encoded(colour, transparency=(9, 9, 9)), 4, (1, 2, 3))[0]
    assert pixels[:, 0, 0].tolist() == [1, 2, 3]


def test_premultiplied_alpha_and_a_palette_with_alpha():
    """Forms of alpha that only TIFF has."""
    data = encoded(Image.new("RGBA", (4, 4), (100, 50, 25, 128)), "TIFF")
    kind = [struct.pack("<HHII", 338, 3, 1, n) for n in (2, 1)]  # the tag ExtraSamples: alpha of its own, premultiplied
    assert data.count(kind[0]) == 1
    assert decode(data, 4, (10, 20, 30))[0][:, 0, 0].tolist() == [55, 35, 27]
    premultiplied = decode(data.replace(*kind), 4, (10, 20, 30))[0][:, 0, 0].astype(int)
    assert np.abs(premultiplied - (100 + 5, 50 + 10, 25 + 15)).max() <= 1
    data = encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 128)).convert("PA"), "TIFF")
    assert Image.open(io.BytesIO(data)).mode == "PA"
    assert decode(data, 4, (0, 0, 0))[0][:, 0, 0].tolist() == [128, 0, 0]


COLOUR_FORMS = {
    "CMYK": ("JPEG", "TIFF"),
    "YCbCr": ("TIFF",),
    "LAB": ("TIFF",),
    "P": ("PNG", "GIF", "TIFF", "BMP"),
    "RGB": ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000"),
}


@pytest.mark.parametrize(("mode", "form"), [(mode, form) for mode, forms in COLOUR_FORMS.items() for form in forms])
def test_colours_survive_every_mode(mode, form):
    data = encoded(corners(32, 32).convert(mode), form)
    assert Image.open(io.BytesIO(data)).mode == mode
    pixels, _ = decode(data, 32)
    assert quarters(pixels) == AS_MADE
    red = pixels[:, 8, 8].astype(int)  # of an inverted CMYK it would be cyan, of a bare LAB something else
    assert np.abs(red - (255, 0, 0)).max() <= 6


@pytest.mark.parametrize("form", ["PNG", "TIFF", "BMP"])
@pytest.mark.parametrize("mode", ["L", "1"])
def test_grey_becomes_rgb(mode, form):
    image = picture(2, 16, 16).convert(mode)
    pixels, _ = decode(encoded(image, form), 16)
    assert np.array_equal(pixels, np.broadcast_to(np.asarray(image.convert("L")), (3, 16, 16)))


def test_resizing_is_antialiased_in_every_mode():
    """Pillow would take the nearest pixel for a palette or one bit: a fine chequerboard would not become grey."""
    board = Image.fromarray((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8))
    for mode, form in (("1", "PNG"), ("L", "PNG"), ("P", "GIF"), ("RGB", "PNG"), ("RGBA", "WEBP")):
        options = {"lossless": True} if form == "WEBP" else {}
        pixels = decode(encoded(board.convert(mode), form, **options), 8)[0].astype(int)
        assert np.abs(pixels - 127).max() <= 6, mode


def test_sixteen_bits_keep_their_upper_eight():
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    portable = b"P5 8 8 65535\n" + values.astype(">u2").tobytes()
    big_endian = encoded(Image.frombytes("I;16B", (8, 8), values.astype(">u2").tobytes()), "TIFF")
    for data in (
        encoded(Image.fromarray(values), "PNG"),
        encoded(Image.fromarray(values), "TIFF"),
        big_endian,
        portable,
    ):
        assert Image.open(io.BytesIO(data)).mode.startswith("I")
        assert np.array_equal(decode(data, 8)[0], np.broadcast_to(values >> 8, (3, 8, 8)))
    colour = png_file(2, 2, 16, 2, [struct.pack(">6H", 0x1234, 0x5678, 0x9ABC, 0xFFFF, 0, 0x80FF)] * 2)
    assert decode(colour, 2)[0][:, 0].T.tolist() == [[0x12, 0x56, 0x9A], [0xFF, 0, 0x80]]


def test_one_transparent_value_of_sixteen_bits():
    transparency = (b"tRNS", struct.pack(">H", 0x1234))
    data = png_file(3, 3, 16, 0, [struct.pack(">3H", 0x1234, 0x1235, 0xFFFF)] * 3, transparency)
    assert decode(data, 3, (1, 2, 3))[0][:, 0].T.tolist() == [[1, 2, 3], [0x12] * 3, [255] * 3]


def test_numbers_without_a_white_are_bad():
    floats, integers = np.linspace(0, 1, 64, dtype=np.float32), np.linspace(-5, 70_000, 64, dtype=np.int32)
    with pytest.raises(BadPicture, match="floating-point"):
        decode(encoded(Image.fromarray(floats.reshape(8, 8)), "TIFF"), 8)
    with pytest.raises(BadPicture, match="integers from -5 to 70000"):
        decode(encoded(Image.fromarray(integers.reshape(8, 8)), "TIFF"), 8)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_the_first_frame_of_an_animation(form):
    if form == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    frames = [Image.new("RGBA", (8, 8), colour) for colour in ((255, 0, 0, 255), (0, 0, 255, 255))]
    frames[0].paste((0, 0, 0, 0), (0, 0, 8, 4))
    options = {"WEBP": {"lossless": True}, "GIF": {"disposal": 2}, "AVIF": {"quality": 100}}.get(form, {})
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 2
    pixels = decode(data, 8, (0, 200, 0))[0].astype(int)
    assert np.abs(pixels[:, 6, 4] - (255, 0, 0)).max() <= 3
    assert np.abs(pixels[:, 1, 4] - (0, 200, 0)).max() <= 3


@pytest.mark.parametrize("transparent", [None, 3])
def test_a_first_frame_that_does_not_fill_its_canvas(transparent):
    """A GIF of 8x8 that begins with 4x4 blue pixels in the middle."""
    screen = b"GIF89a" + struct.pack("<HHBBB", 8, 8, 0x81, 1, 0) + bytes([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    control = b"" if transparent is None else b"\x21\xf9\x04" + bytes([1, 0, 0, transparent]) + b"\0"
    codes = [4, 2] * 16 + [5]  # in LZW of 3 bits: forget, colour 2, and so on, end
    packed = sum(code << 3 * n for n, code in enumerate(codes)).to_bytes(13, "little")
    data = screen + control + b"," + struct.pack("<HHHHB", 2, 2, 4, 4, 0) + bytes([2, 13]) + packed + b"\0;"
    expected = np.broadcast_to(np.array((10, 20, 30))[:, None, None], (3, 8, 8)).copy()
    expected[:, 2:6, 2:6] = np.array((0, 0, 255))[:, None, None]
    assert np.array_equal(decode(data, 8, (10, 20, 30))[0], expected)

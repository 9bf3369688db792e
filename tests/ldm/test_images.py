"""What becomes of picture files: the right way up, flat RGB, or a BadPicture; never anything else."""

import io
import struct
import tarfile
import time
import zlib
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from ldm import images
from ldm.images import BadPicture, decode
from tests.pictures import encoded, picture


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


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", STORED_AS)
def test_every_orientation_comes_out_the_same_way_up(orientation, form):
    image = corners(48, 32)
    transposition = STORED_AS[orientation]
    stored = image if transposition is None else image.transpose(transposition)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if form == "WEBP" else {}
    pixels, original = decode(encoded(stored, form, exif=exif, **options), 32)
    assert original == (48, 32)
    assert quarters(pixels) == AS_MADE


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


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr"])
def test_other_modes_become_rgb(mode):
    form = {"CMYK": "JPEG", "YCbCr": "JPEG"}.get(mode, "PNG")
    data = encoded(picture(2, 16, 16).convert(mode), form)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(decode(data, 16)[0], expected)


def test_sixteen_bits_keep_their_upper_eight():
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    for form in ("PNG", "TIFF"):
        pixels, _ = decode(encoded(Image.fromarray(values), form), 8)
        assert np.array_equal(pixels, np.broadcast_to(values >> 8, (3, 8, 8)))


def test_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    for form in ("GIF", "WEBP", "PNG"):
        options = {"lossless": True} if form == "WEBP" else {}
        data = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
        assert decode(data, 8)[0][:, 4, 4].tolist() == [255, 0, 0]


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds a few bytes."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = b""
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")):
        chunks += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunks


def test_a_bomb_is_refused_before_it_is_decoded():
    side = 12_000
    assert images.MAX_PIXELS < side * side < 178_956_970  # ours, and not yet Pillow's own limit
    before = time.process_time()
    with pytest.raises(BadPicture, match=rf"^12000x12000 pixels, the limit is {images.MAX_PIXELS}$"):
        decode(png_header(side, side), 8)
    with pytest.raises(BadPicture, match="DecompressionBomb"):
        decode(png_header(60_000, 60_000), 8)
    assert time.process_time() - before < 60


@pytest.mark.parametrize(
    "data",
    [b"", b"no picture", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\xff\xd8\xff", png_header(0, 5), png_header(20, 20)],
    ids=["empty", "text", "png magic", "gif magic", "jpeg magic", "zero width", "too little data"],
)
def test_what_is_no_picture_is_bad(data):
    with pytest.raises(BadPicture) as caught:
        decode(data, 8)
    assert str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
def test_a_truncated_picture_is_bad_at_every_length(form):
    data = encoded(picture(0, 40, 40), form)
    whole = decode(data, 16)[0]
    for length in range(0, len(data), max(1, len(data) // 40)):
        try:
            pixels, _ = decode(data[:length], 16)
        except BadPicture:
            continue
        # Only what follows the pixels (an end marker, the last bits of a stream) may be missing.
        assert length > 0.9 * len(data) and np.abs(pixels.astype(int) - whole).mean() < 8


def test_random_damage_gives_pixels_or_bad_pictures():
    generator = np.random.default_rng(0)
    counts: Counter[str] = Counter()
    for form in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"):
        for _ in range(40):
            data = np.frombuffer(encoded(picture(0, 24, 24), form), np.uint8).copy()
            places = generator.integers(0, len(data), 5)
            data[places] = generator.integers(0, 256, 5)
            try:
                counts["decoded"] += decode(data.tobytes(), 16)[0].shape == (3, 16, 16)
            except BadPicture:
                counts["bad"] += 1
    assert counts["decoded"] + counts["bad"] == 240 and counts["bad"] > 20


def test_png_round_trip_and_grid():
    pixels = np.stack([np.asarray(picture(n, 6, 4)).transpose(2, 0, 1) for n in range(5)])
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(images.to_png(pixels[0])))).transpose(2, 0, 1), pixels[0])
    canvas = images.grid(pixels, columns=3, gap=2)
    assert canvas.shape == (3, 2 * 6 - 2, 3 * 8 - 2)
    for n in range(5):
        top, left = n // 3 * 6, n % 3 * 8
        assert np.array_equal(canvas[:, top : top + 4, left : left + 6], pixels[n])
    assert (canvas[:, :, 6:8] == 255).all() and (canvas[:, 6:, 16:] == 255).all()


def members(path):
    with tarfile.open(path) as tar:
        for member in tar:
            if member.isfile():
                yield member.name, tar.extractfile(member).read()


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


@pytest.mark.real_data
def test_real_fuzzed_files_give_pixels_or_bad_pictures(shared):
    counts: Counter[str] = Counter()
    for name, data in members(shared / "data" / "hostile" / "fuzz-00000.tar"):
        try:
            assert decode(data, 32)[0].shape == (3, 32, 32)
            counts["decoded"] += 1
        except BadPicture as error:
            assert "\n" not in str(error), name
            counts[str(error).split(":")[0]] += 1
    print(f"\nfuzzed pictures: {dict(counts.most_common())}")
    assert counts.total() == 1708 and counts["decoded"] > 300

"""What becomes of picture files: the right way up, flat RGB, or a BadPicture; never anything else."""

import io
import json
import pickle
import struct
import tarfile
import time
import zlib
from collections import Counter

import numpy as np
import pytest
from PIL import Image, features

from ldm import images
from ldm.config import RequestError
from ldm.images import BadPicture, Buckets, PictureRules, TooSmall, bucket_shapes, decode, views
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


def test_no_program_is_run():
    with pytest.raises(BadPicture, match="is EPS"):
        decode(encoded(picture(0), "EPS"), 8)


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


def test_too_small_is_told_from_bad_by_the_header_alone():
    hollow = png_header(20, 30)
    with pytest.raises(TooSmall, match=r"^20x30 pixels, its short side is under 21$"):
        views(hollow, PictureRules((8,), min_size=21))
    with pytest.raises(BadPicture) as caught:
        views(hollow, PictureRules((8,), min_size=20))
    assert not isinstance(caught.value, TooSmall)
    with pytest.raises(BadPicture, match="the limit is"):
        views(png_header(12_000, 12_000), PictureRules((8,), min_size=13_000))
    assert views(encoded(picture(0, 20, 30)), PictureRules((8,), min_size=20))[1] == (20, 30)


@pytest.mark.parametrize(
    ("size", "buckets", "expected"),
    [
        (256, Buckets(), [(192, 320), (256, 256), (320, 192)]),
        (512, Buckets(), [(384, 640), (448, 576), (512, 512), (576, 448), (640, 384)]),
        (512, Buckets(max_ratio=1), [(512, 512)]),
        (24, Buckets(step=8), [(16, 32), (24, 24), (32, 16)]),
        (200, Buckets(), [(128, 256), (192, 192), (256, 128)]),
    ],
)
def test_buckets_of_known_sizes(size, buckets, expected):
    assert bucket_shapes(size, buckets) == tuple(expected)


@pytest.mark.parametrize("max_ratio", [1, 1.5, 2, 4])
@pytest.mark.parametrize(("size", "step"), [(256, 64), (256, 8), (512, 64), (1024, 64), (1024, 32), (768, 48)])
def test_buckets_hold_what_they_promise(size, step, max_ratio):
    shapes = bucket_shapes(size, Buckets(step=step, max_ratio=max_ratio))
    assert list(shapes) == sorted(set(shapes)) and (size, size) in shapes
    for h, w in shapes:
        assert (w, h) in shapes and h % step == w % step == 0
        assert h * w <= size * size < min(h, w) * (max(h, w) + step)  # no longer side would do
        assert max(h, w) <= max_ratio * min(h, w)


def test_buckets_that_leave_nothing_are_refused():
    with pytest.raises(RequestError, match=r"^buckets.step=64: leaves no shape .* give a step that divides 32$"):
        PictureRules((32,), Buckets()).shapes  # noqa: B018


@pytest.mark.parametrize(
    ("width", "height", "shape"),
    [(100, 100, (512, 512)), (300, 200, (384, 640)), (200, 300, (640, 384)), (900, 100, (384, 640)),
     (115, 100, (448, 576)), (113, 100, (512, 512)), (100, 113, (512, 512)), (100, 115, (576, 448))],
)  # fmt: skip
def test_a_picture_goes_to_the_bucket_of_the_nearest_ratio(width, height, shape):
    (view,), original = views(encoded(picture(0, width, height)), PictureRules((512,), Buckets()))
    assert view.pixels.shape == (3, *shape) and original == (width, height) and not view.flipped
    left, top, right, bottom = view.box
    assert left == pytest.approx(width - right) and top == pytest.approx(height - bottom)
    assert (left, right) == (0, width) or (top, bottom) == (0, height)
    assert (right - left) / (bottom - top) == pytest.approx(shape[1] / shape[0])


def test_a_bucket_shows_what_its_box_says():
    image = picture(3, 400, 200)
    (view,), _ = views(encoded(image), PictureRules((24,), Buckets(step=8, max_ratio=2)))
    assert view.pixels.shape == (3, 16, 32) and view.box == (0, 0, 400, 200)
    (view,), _ = views(encoded(image), PictureRules((512,), Buckets()))
    left, top, right, bottom = view.box
    assert (top, bottom) == (0, 200) and right - left == pytest.approx(200 * 640 / 384)
    y, x = 300, 500  # the smooth picture, looked up where that pixel stands
    there = image.getpixel((int(left + (x + 0.5) / 640 * (right - left)), int((y + 0.5) / 384 * 200)))
    assert np.abs(view.pixels[:, y, x].astype(int) - there).max() <= 6


def test_several_sizes_and_mirrored_copies():
    data = encoded(picture(1, 50, 40))
    made, original = views(data, PictureRules((32, 16), flip=True))
    assert original == (50, 40)
    assert [(v.pixels.shape, v.box, v.flipped) for v in made] == [
        ((3, size, size), (5, 0, 45, 40), flipped) for size in (32, 16) for flipped in (False, True)
    ]
    for size, view, mirrored in ((32, *made[:2]), (16, *made[2:])):
        assert np.array_equal(view.pixels, decode(data, size)[0])
        assert np.array_equal(mirrored.pixels, view.pixels[:, :, ::-1])
        assert all(v.pixels.flags.c_contiguous and v.pixels.flags.writeable for v in (view, mirrored))


def test_the_shapes_of_rules_are_what_comes_out():
    rules = PictureRules((64, 32), Buckets(step=16, max_ratio=3))
    assert rules.shapes == tuple(sorted({*bucket_shapes(64, rules.buckets), *bucket_shapes(32, rules.buckets)}))
    found = set()
    for width in range(10, 200, 5):
        found |= {view.pixels.shape[1:] for view in views(encoded(picture(0, width, 70)), rules)[0]}
    assert found == set(rules.shapes)
    assert PictureRules((64,)).shapes == ((64, 64),)


def test_the_fingerprint_names_what_is_used_and_nothing_else():
    plain = {**images.PICTURE_RULES, "size": 64, "background": [255, 255, 255]}
    assert PictureRules((64,)).fingerprint() == plain
    assert PictureRules((64,), min_size=100).fingerprint() == plain
    every = PictureRules((64, 32), Buckets(step=32), (1, 2, 3), 9, True)
    assert every.fingerprint() == {
        **plain,
        "background": [1, 2, 3],
        "sizes": [64, 32],
        "buckets": {"max_ratio": 2.0, "step": 32},
        "flip": True,
    }
    for rules in (every, PictureRules((8,))):
        assert PictureRules.from_json(rules.to_json()) == rules == pickle.loads(pickle.dumps(rules))
        assert json.loads(json.dumps(rules.fingerprint())) == rules.fingerprint()


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

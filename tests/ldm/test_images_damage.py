"""What is damaged, hostile or no picture is a BadPicture; never anything else."""

import time
from collections import Counter

import numpy as np
import pytest

from ldm import images
from ldm.images import BadPicture, decode
from tests.ldm.picturing import members, png_header
from tests.pictures import encoded, picture


def test_no_program_is_run():
    with pytest.raises(BadPicture, match="is EPS"):
        decode(encoded(picture(0), "EPS"), 8)


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

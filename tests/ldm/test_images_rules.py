"""Picture rules: what is too small, buckets of shapes, several sizes, mirrored copies, and their fingerprint."""

import json
import pickle

import numpy as np
import pytest

from ldm import images
from ldm.config import RequestError
from ldm.images import BadPicture, Buckets, PictureRules, TooSmall, bucket_shapes, decode, views
from tests.ldm.picturing import png_header
from tests.pictures import encoded, picture


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

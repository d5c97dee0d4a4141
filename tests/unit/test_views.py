"""Boxes lie where the method wants them, and crops show what lies in the boxes."""

import io
import math

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms.v2 import CenterCrop, Compose, Resize

from aclip.data.images.decode import decode_image, decode_pixels
from aclip.data.images.views import center_crop, crop, random_box, teacher_box
from aclip.data.shards.listing import Skip


def edges(box):
    top, left, height, width = box
    return top, left, top + height, left + width


def contains(outer, inner):
    (top, left, bottom, right), (t, lft, b, r) = edges(outer), edges(inner)
    return top <= t and left <= lft and b <= bottom and r <= right


def test_every_student_box_lies_in_its_teacher_box_inside_the_image():
    rng = np.random.default_rng(0)
    for _ in range(1000):
        height, width = (int(side) for side in rng.integers(16, 700, 2))
        boxes = [random_box(rng, height, width, (0.5, 1.0)) for _ in range(2)]
        around = teacher_box(rng, boxes, height, width)
        assert contains((0, 0, height, width), around)
        assert all(contains(around, box) and min(box[2:]) > 0 for box in boxes)


def test_a_box_has_area_and_ratio_in_range():
    rng = np.random.default_rng(0)
    boxes = [random_box(rng, 1000, 1000, (0.2, 0.5)) for _ in range(2000)]
    shares = np.array([height * width / 1e6 for _, _, height, width in boxes])
    ratios = np.array([width / height for _, _, height, width in boxes])
    # Sides are rounded to whole pixels of at least 380: areas and ratios move by less than 0.3 %.
    assert 0.1994 < shares.min() < 0.205 and 0.495 < shares.max() < 0.5015
    assert 0.747 < ratios.min() < 0.76 and 1.32 < ratios.max() < 1.337
    # Uniform in area, and as often wide as high: means of 2,000 draws, 4 standard errors.
    assert abs(shares.mean() - 0.35) < 4 * 0.3 / math.sqrt(12 * 2000)
    assert abs(np.log(ratios).mean()) < 4 * 2 * math.log(4 / 3) / math.sqrt(12 * 2000)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        pytest.param(20, 300, (0, 136, 20, 27), id="wide: full height, 20 * 4/3 = 27 wide"),
        pytest.param(300, 30, (130, 0, 40, 30), id="high: full width, 30 / (3/4) = 40 high"),
    ],
)
def test_an_image_that_no_box_fits_gives_the_largest_centred_one(height, width, expected):
    assert random_box(np.random.default_rng(0), height, width, (1.0, 1.0)) == expected


def test_the_teacher_box_grows_by_any_share_of_the_room_on_each_side():
    rng = np.random.default_rng(0)
    boxes = [(3, 2, 4, 5), (5, 1, 4, 3)]  # union: rows 3 to 9, columns 1 to 7, of 12 x 9
    drawn = [edges(teacher_box(rng, boxes, 12, 9)) for _ in range(2000)]
    tops, lefts, bottoms, rights = (set(side) for side in zip(*drawn, strict=True))
    assert tops == {0, 1, 2, 3} and lefts == {0, 1}
    assert bottoms == {9, 10, 11, 12} and rights == {7, 8, 9}
    assert len(set(drawn)) == 4 * 2 * 4 * 3


def test_a_crop_is_the_box_read_as_top_left_height_width():
    pixels = np.zeros((40, 60, 3), dtype=np.uint8)
    pixels[10:30, 35:55] = (10, 20, 30)
    view = crop(Image.fromarray(pixels), (10, 35, 20, 20), 20)
    assert view.shape == (3, 20, 20) and view.dtype == np.uint8
    assert (view == np.array([10, 20, 30])[:, None, None]).all()


def test_a_crop_of_the_whole_image_at_its_size_is_the_image():
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    view = crop(Image.fromarray(pixels), (0, 0, 24, 24), 24)
    np.testing.assert_array_equal(view, pixels.transpose(2, 0, 1))


@pytest.mark.parametrize("size", [(64, 64), (91, 47), (47, 91), (65, 64), (33, 200)])
def test_the_evaluation_crop_equals_torchvision(size):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    expected = Compose([Resize(32), CenterCrop(32)])(image)
    np.testing.assert_array_equal(center_crop(image, 32), np.asarray(expected).transpose(2, 0, 1))


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "1"])
def test_every_mode_decodes_to_rgb(mode):
    buffer = io.BytesIO()
    image_format = "JPEG" if mode == "CMYK" else "PNG"
    Image.new("RGB", (20, 30), (0, 0, 0)).convert(mode).save(buffer, image_format)
    image = decode_image(buffer.getvalue())
    assert image.mode == "RGB" and image.size == (20, 30)


def test_16_bit_grayscale_keeps_its_high_byte():
    levels = np.array([[0, 0x01FF], [0x8000, 0xFFFF]], dtype=np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, "PNG")
    pixels = np.asarray(decode_image(buffer.getvalue()))
    np.testing.assert_array_equal(pixels, np.repeat([[[0], [1]], [[128], [255]]], 3, axis=2))


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_damaged_images_are_unreadable(encode_image, image_format):
    whole = encode_image(40, 30, image_format=image_format)
    assert decode_image(whole).size == (40, 30)
    assert decode_image(whole[: len(whole) // 2]) == Skip("unreadable_image")
    assert decode_image(b"") == Skip("unreadable_image")
    assert decode_image(b"no image at all") == Skip("unreadable_image")


def test_no_damage_raises(encode_image):
    rng = np.random.default_rng(0)
    for image_format in ("JPEG", "PNG", "WEBP"):
        content = np.frombuffer(encode_image(24, 24, image_format=image_format), dtype=np.uint8)
        for _ in range(300):
            damaged = content.copy()
            damaged[rng.integers(len(content), size=4)] = rng.integers(256, size=4)
            decoded = decode_image(damaged.tobytes())
            assert decoded == Skip("unreadable_image") or decoded.mode == "RGB"


@pytest.mark.parametrize("side", [11, 30])
def test_images_over_the_pixel_limit_are_unreadable(encode_image, monkeypatch, side):
    # Pillow warns from the limit on and raises from twice the limit on.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert decode_image(encode_image(side, side)) == Skip("unreadable_image")
    assert decode_image(encode_image(10, 10)).size == (10, 10)


def test_images_with_a_short_side_are_too_small(encode_image):
    assert decode_image(encode_image(4000, 1), 16) == Skip("image_too_small")
    assert decode_image(encode_image(15, 16), 16) == Skip("image_too_small")
    assert decode_image(encode_image(16, 16), 16).size == (16, 16)


def with_pillow(content: bytes) -> np.ndarray | None:
    """The pixels, or None for what Pillow can't decode."""
    try:
        return np.asarray(Image.open(io.BytesIO(content), formats=("JPEG",)).convert("RGB"))
    except (OSError, SyntaxError, ValueError):
        return None


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_decodes_to_pillows_pixels_bit_by_bit(subsampling, progressive):
    rng = np.random.default_rng(0)
    for height, width, quality in ((37, 50, 90), (16, 16, 30), (123, 81, 75), (1, 9, 98)):
        pixels = rng.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
        for mode in ("RGB", "L", "CMYK"):
            buffer = io.BytesIO()
            options = {"subsampling": subsampling} if mode == "RGB" else {}
            image.convert(mode).save(
                buffer, "JPEG", quality=quality, progressive=progressive, **options
            )
            expected = with_pillow(buffer.getvalue())
            np.testing.assert_array_equal(decode_pixels(buffer.getvalue()), expected)
            np.testing.assert_array_equal(np.asarray(decode_image(buffer.getvalue())), expected)


def test_a_damaged_jpeg_is_judged_as_pillow_judges_it(encode_image):
    rng = np.random.default_rng(1)
    content = np.frombuffer(encode_image(40, 30), dtype=np.uint8)
    verdicts = set()
    for _ in range(300):
        damaged = content.copy()
        damaged[rng.integers(len(content), size=3)] = rng.integers(256, size=3)
        damaged = damaged[: rng.integers(len(content) // 2, 2 * len(content))].tobytes()
        expected, found = with_pillow(damaged), decode_pixels(damaged)
        assert (
            (found == Skip("unreadable_image")) if expected is None else (found == expected).all()
        )
        verdicts.add(expected is None)
    assert verdicts == {True, False}

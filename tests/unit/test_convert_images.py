"""What a shard keeps of an image: right in the loader, whatever the source held."""

import io
import os
import zipfile

import numpy as np
import pytest
from PIL import Image

from aclip.data.convert.entries import Entry, Rejected
from aclip.data.convert.images import FileReader, ImageRule, StoredImage, prepare_image
from aclip.data.images.decode import decode_image
from aclip.errors import ConfigError

KEEP = ImageRule(min_side=16)
SMALL = ImageRule(min_side=16, short_side=64, encoding="jpeg", quality=95)
RED, GREEN, BLUE, GRAY = (250, 10, 10), (10, 250, 10), (10, 10, 250), (120, 120, 120)


def quarters(width: int = 200, height: int = 100) -> Image.Image:
    """Red and green above blue and gray."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(GREEN, (width // 2, 0, width, height // 2))
    image.paste(BLUE, (0, height // 2, width // 2, height))
    image.paste(GRAY, (width // 2, height // 2, width, height))
    return image


def encode(image: Image.Image, image_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def corners(image: Image.Image) -> list[tuple[int, int, int]]:
    """Colours of the quarters' middles: above left and right, below left and right."""
    width, height = image.size
    places = [(x, y) for y in (height // 4, height * 3 // 4) for x in (width // 4, width * 3 // 4)]
    return [image.getpixel(place) for place in places]


def assert_looks_like(image: Image.Image, colors: list[tuple[int, int, int]], tolerance: int = 12):
    assert np.abs(np.subtract(corners(image), colors)).max() <= tolerance


def loaded(stored: StoredImage) -> Image.Image:
    """The image as aclip's loader decodes it."""
    image = decode_image(stored.content)
    assert isinstance(image, Image.Image)
    return image


KINDS = {
    "jpeg": (encode(quarters(), "JPEG"), "jpg", "original"),
    "progressive": (encode(quarters(), "JPEG", progressive=True), "jpg", "original"),
    "cmyk": (encode(quarters().convert("CMYK"), "JPEG"), "jpg", "original"),
    "png": (encode(quarters(), "PNG"), "png", "original"),
    "palette": (encode(quarters().quantize(7), "PNG"), "png", "original"),
    "alpha": (encode(quarters().convert("RGBA"), "PNG"), "png", "original"),
    "webp": (encode(quarters(), "WEBP"), "webp", "original"),
    "gif": (encode(quarters(), "GIF"), "png", "reencoded"),
    "bmp": (encode(quarters(), "BMP"), "png", "reencoded"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_loader_sees_the_picture_whether_bytes_are_kept_or_not(kind):
    content, suffix, what = KINDS[kind]
    kept = prepare_image("k", content, KEEP)
    assert (kept.suffix, kept.what) == (suffix, what)
    assert (kept.content == content) == (what == "original")
    assert_looks_like(loaded(kept), [RED, GREEN, BLUE, GRAY])

    small = prepare_image("k", content, SMALL)
    assert (small.suffix, small.what) == ("jpg", "reencoded")
    assert loaded(small).size == (128, 64)
    assert_looks_like(loaded(small), [RED, GREEN, BLUE, GRAY])


@pytest.mark.parametrize("rule", [KEEP, SMALL])
def test_16_bit_grayscale_keeps_its_gradations(rule):
    # From 0 to 65535 in 256 columns of 257 each: the high byte is the column.
    ramp = np.tile(np.arange(256, dtype=np.uint16) * 257, (64, 1))
    content = encode(Image.fromarray(ramp), "PNG")
    assert Image.open(io.BytesIO(content)).mode == "I;16"
    stored = prepare_image("k", content, rule)
    assert stored.what == "reencoded"
    pixels = np.asarray(loaded(stored))
    expected = np.tile(np.arange(256)[None, :, None], (64, 1, 3))
    assert np.abs(pixels - expected).max() <= (0 if rule is KEEP else 3)


# What EXIF says of the first row and column (its specification, tag 274), worked out by hand: where
# the stored picture's quarters come to lie when it is shown.
SHOWN = {
    1: [RED, GREEN, BLUE, GRAY],
    2: [GREEN, RED, GRAY, BLUE],
    3: [GRAY, BLUE, GREEN, RED],
    4: [BLUE, GRAY, RED, GREEN],
    5: [RED, BLUE, GREEN, GRAY],
    6: [BLUE, RED, GRAY, GREEN],
    7: [GRAY, GREEN, BLUE, RED],
    8: [GREEN, GRAY, RED, BLUE],
}


@pytest.mark.parametrize("orientation", SHOWN)
def test_short_side_applies_the_exif_orientation(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode(quarters(), "JPEG", exif=exif)
    stored = prepare_image("k", content, SMALL)
    shown = loaded(stored)
    assert shown.size == ((128, 64) if orientation < 5 else (64, 128))
    assert_looks_like(shown, SHOWN[orientation])
    assert 0x0112 not in Image.open(io.BytesIO(stored.content)).getexif()

    kept = prepare_image("k", content, KEEP)
    assert kept.content == content
    assert kept.what == ("original" if orientation == 1 else "rotated")


def test_damaged_exif_is_no_reason_to_reject(tmp_path):
    content = encode(quarters(), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff" + b"\xff" * 20)
    assert prepare_image("k", content, KEEP).content == content
    assert_looks_like(loaded(prepare_image("k", content, SMALL)), [RED, GREEN, BLUE, GRAY])


def test_short_side_leaves_small_upright_images_of_its_format_alone():
    content = encode(quarters(100, 64), "JPEG")
    assert prepare_image("k", content, SMALL) == StoredImage("jpg", content, "original")
    as_webp = prepare_image("k", content, ImageRule(16, 64, "webp"))
    assert (as_webp.suffix, as_webp.what) == ("webp", "reencoded")
    assert loaded(as_webp).size == (100, 64)


def test_quality_decides_the_size():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8))
    content = encode(noise, "PNG")
    for encoding in ("jpeg", "webp"):
        low, high = (
            len(prepare_image("k", content, ImageRule(16, 64, encoding, quality)).content)
            for quality in (30, 95)
        )
        assert low < high


@pytest.mark.parametrize(
    ("content", "kind", "why"),
    [
        (KINDS["jpeg"][0][:900], "unreadable_image", "truncated"),
        (KINDS["png"][0][:200], "unreadable_image", ""),
        (b"", "unreadable_image", "none of JPEG"),
        (b"<html>", "unreadable_image", "none of JPEG"),
        (encode(quarters(), "PCX"), "unreadable_image", "none of JPEG"),
        (encode(Image.new("L", (15, 900)), "PNG"), "image_too_small", "15 x 900"),
        (encode(Image.new("1", (20000, 20000)), "PNG"), "unreadable_image", "bomb"),
    ],
    ids=["half a jpeg", "half a png", "empty", "page", "pcx", "small", "bomb"],
)
@pytest.mark.parametrize("rule", [KEEP, SMALL], ids=["keep", "small"])
def test_unusable_images_are_rejected_with_the_reason(content, kind, why, rule):
    rejected = prepare_image("k", content, rule)
    assert (rejected.key, rejected.kind) == ("k", kind)
    assert why in rejected.why
    # The loader would have skipped it too.
    assert decode_image(content, rule.min_side).kind == kind


def test_files_are_read_below_the_folder_and_what_is_no_file_is_no_image(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.jpg").write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe.jpg")  # opening it would wait for ever
    reader = FileReader(tmp_path)
    assert reader.read_image(Entry("k", "sub/a.jpg")) == b"x"
    for name in ("b.jpg", "sub", "sub/a.jpg/c.jpg", "pipe.jpg", "n" * 300, "a\0b"):
        assert reader.read_image(Entry("k", name)).kind == "no_image"


def test_members_of_zips_are_read_and_damaged_ones_rejected(tmp_path):
    with zipfile.ZipFile(tmp_path / "0.zip", "w") as archive:
        archive.writestr("000.jpg", b"first")
        archive.writestr("001.jpg", b"second")
    damaged = (tmp_path / "0.zip").read_bytes().replace(b"second", b"sXcond")
    (tmp_path / "0.zip").write_bytes(damaged)
    (tmp_path / "1.zip").write_bytes(b"no zip")
    reader = FileReader(tmp_path)

    def read(archive: str, member: str):
        outcome = reader.read_image(Entry("k", archive, member=member))
        return outcome.kind if isinstance(outcome, Rejected) else outcome

    assert read("0.zip", "000.jpg") == b"first"
    assert read("0.zip", "001.jpg") == "unreadable_image"
    assert read("0.zip", "002.jpg") == "no_image"
    assert read("1.zip", "000.jpg") == "unreadable_image"
    assert read("2.zip", "000.jpg") == "no_image"


def test_files_too_large_to_be_images_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("aclip.data.convert.images.MAX_BYTES", 10)
    (tmp_path / "a.jpg").write_bytes(b"x" * 11)
    with zipfile.ZipFile(tmp_path / "0.zip", "w") as archive:
        archive.writestr("a.jpg", b"x" * 11)
    for entry in (Entry("k", "a.jpg"), Entry("k", "0.zip", member="a.jpg")):
        assert FileReader(tmp_path).read_image(entry).kind == "unreadable_image"


def test_a_file_that_may_not_be_read_ends_the_conversion_by_name(tmp_path, monkeypatch):
    (tmp_path / "a.jpg").write_bytes(b"x")

    def refuse(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ConfigError, match=r"a\.jpg can't be read \(Permission denied\)"):
        FileReader(tmp_path).read_image(Entry("k", "a.jpg"))

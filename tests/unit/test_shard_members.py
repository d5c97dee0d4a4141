"""What a shard's members are called and are, and what is said where no samples come of them."""

import io
import logging
import os
import re
import tarfile

import pytest
from PIL import Image
from small_recipe import SMALL_RECIPE

from aclip.config.recipe_file import load_recipe
from aclip.data.find_data import find_data
from aclip.data.images.decode import decode_image, decode_pixels
from aclip.data.images.suffixes import IMAGE_SUFFIXES, is_litter
from aclip.data.members import read_image_bytes
from aclip.data.shards.listing import Shard, Skip, index_shards, read_shard
from aclip.errors import ConfigError

LITTER = [
    "._0.jpg",
    "d/._0.txt",
    ".DS_Store",
    "d/.DS_Store",
    "__MACOSX/0.jpg",
    "d/__MACOSX/._0.jpg",
    "@eaDir/0.jpg/SYNOFILE_THUMB_M.jpg",
    "Thumbs.db",
    "desktop.ini",
    "PaxHeaders.123/0.jpg",
    "PaxHeader/0.jpg",
]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("ACLIP_CACHE", str(tmp_path_factory.mktemp("cache")))


def find(url, **values):
    overrides = [f"data.train={url}", "data.val=[]", *(f"{k}={v}" for k, v in values.items())]
    return find_data(load_recipe(SMALL_RECIPE, overrides))[0]


def refusal(url, **values) -> str:
    with pytest.raises(ConfigError) as caught:
        find(url, **values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def link(name: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "elsewhere"
    return info


def write_members(path, members: list) -> str:
    """As write_tar; a TarInfo stands for itself, and names may be bytes."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as archive:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(os.fsdecode(name))
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return str(path)


@pytest.mark.parametrize("litter", LITTER)
def test_litter_is_no_sample_and_divides_none(write_tar, litter):
    assert is_litter(litter)
    names = [litter, "0.jpg", litter, "0.txt", litter, "1.jpg", "1.txt", litter]
    url = write_tar("x.tar", [(name, b"x") for name in names])
    (shard,) = index_shards([url])
    assert [(raw.key, [*raw.members]) for _, raw in read_shard(shard)] == [
        ("0", ["jpg", "txt"]),
        ("1", ["jpg", "txt"]),
    ]


@pytest.mark.parametrize("name", ["0.jpg", "./0.jpg", "a.b/macosx/thumbs.jpg", "ini/desktop.txt"])
def test_other_names_are_no_litter(name):
    assert not is_litter(name)


def test_keys_keep_new_lines_spaces_and_bytes_that_are_no_text(tmp_path):
    names = [
        b"a\nb/0.jpg",
        b"a\nb/0.txt",
        b"\xff.JPG",
        b"\xff.TXT",
        b"\xfe.jpg",
        b"c d.jpg",
        b"c%20d.jpg",
    ]
    url = write_members(tmp_path / "x.tar", [(name, b"x") for name in names])
    (shard,) = index_shards([url])
    found = [(raw.key, [*raw.members]) for _, raw in read_shard(shard)]
    assert found == [
        ("a\nb/0", ["jpg", "txt"]),
        ("\\xff", ["jpg", "txt"]),
        ("\\xfe", ["jpg"]),
        ("c d", ["jpg"]),
        ("c%20d", ["jpg"]),
    ]
    for key, _ in found:
        key.encode()  # it can be printed


@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES))
def test_every_image_suffix_is_read_in_any_case(write_tar, suffix):
    image_format = Image.registered_extensions()[suffix]
    mode = {".pgm": "L", ".pbm": "1"}.get(suffix, "RGB")
    content = io.BytesIO()
    Image.new(mode, (20, 30), "white").save(content, image_format)
    url = write_tar("x.tar", [(f"0{suffix.upper()}", content.getvalue()), ("0.txt", b"x")])
    (shard,) = find(url)
    ((_, raw),) = read_shard(shard)
    image = decode_image(read_image_bytes(raw))
    assert image.mode == "RGB" and image.size == (20, 30)
    assert image.getextrema() == ((255, 255),) * 3
    assert decode_pixels(read_image_bytes(raw)).shape == (30, 20, 3)


def test_formats_of_today_come_before_the_others(write_tar):
    suffixes = ["bmp", "gif", "webp", "tiff", "png", "ppm", "jpeg", "jfif", "jpg"]
    order = ["jpg", "jpeg", "png", "webp"]
    for missing in range(5):
        names = [suffix for suffix in suffixes if suffix not in order[:missing]]
        url = write_tar(f"{missing}.tar", [(f"0.{name}", name.encode()) for name in names])
        ((_, raw),) = read_shard(Shard(url, 1))
        expected = [*order, "bmp"][missing]
        assert read_image_bytes(raw) == expected.encode()


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"P6 50000 50000 255\n" + bytes(99), id="PPM with too many pixels"),
        pytest.param(b"P4 900000 900000\n", id="PBM with too many pixels"),
        pytest.param(b"P6 20 20 255\n" + bytes(99), id="PPM cut"),
        pytest.param(b"II*\0\x08\0\0\0\xff\xff", id="TIFF cut"),
        pytest.param(b"\0\0\0 ftypheic", id="HEIC"),
        pytest.param(b"<svg></svg>", id="SVG"),
    ],
)
def test_what_can_not_be_decoded_safely_is_unreadable(content):
    assert decode_image(content) == Skip("unreadable_image")


def test_gray_levels_of_16_bits_keep_their_high_byte_and_other_depths_are_unreadable():
    levels = b"\x01\xff\x80\x00"
    assert decode_pixels(b"P5 2 1 65535\n" + levels)[0, :, 0].tolist() == [1, 128]
    for mode in ("I", "F"):
        content = io.BytesIO()
        Image.new(mode, (2, 1)).save(content, "TIFF")
        assert decode_image(content.getvalue()) == Skip("unreadable_image")


@pytest.mark.parametrize(
    ("names", "found", "apart"),
    [
        (
            [f"{n}.{s}" for n in range(8) for s in ("input.jpg", "output.txt")],
            "first 8 samples of {}; found were input.jpg (8) and output.txt (8); a sample is",
            False,
        ),
        (
            [f"{n}.{s}" for s in ("jpg", "txt") for n in range(8)],
            "first 16 samples of {}; found were jpg (8) and txt (8); a sample is KEY.jpg",
            True,
        ),
        ([f"{n}.{s}" for n in range(3) for s in ("heic", "txt")], "heic (3) and txt (3)", False),
        ([f"{n}.JPG" for n in range(3)], "found were jpg (3);", False),
    ],
)
def test_shards_without_a_pair_are_refused_with_what_was_found(write_tar, names, found, apart):
    url = write_tar("x.tar", [(name, b"x") for name in names])
    message = refusal(url)
    assert message.startswith("data.train gives no image with a text in the first ")
    assert found.replace("{}", url) in message
    assert ("pack them with tar --sort=name" in message) == apart
    # In other words for a validation set, whose classes are texts too.
    good = write_tar("good.tar", [("0.jpg", b"x"), ("0.txt", b"x")])
    with pytest.raises(ConfigError, match=r"^data.val .* KEY.txt or KEY.json or KEY.cls"):
        find_data(load_recipe(SMALL_RECIPE, [f"data.train={good}", f"data.val={url}"]))


def test_a_single_pair_among_many_shards_is_enough(write_tar):
    apart = [write_tar(f"{n}.tar", [("0.jpg", b"x"), ("1.txt", b"x")]) for n in range(5)]
    good = write_tar("9.tar", [("0.jpg", b"x"), ("1.jpg", b"x"), ("1.txt", b"x")])
    assert len(find([*apart, good])) == 6
    with pytest.raises(ConfigError, match=r"first 10 samples of \S*/0.tar and others; found"):
        find(apart)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_in_a_shard_are_named_with_the_way_to_pack_what_they_lead_to(tmp_path, kind):
    half = [
        (link(f"{n}.jpg", kind), b"") if s else (f"{n}.txt", b"x") for n in range(3) for s in (1, 0)
    ]
    message = refusal(write_members(tmp_path / "half.tar", half))
    assert (
        "found were jpg (a link) (3) and txt (3) (links hold no bytes: pack with tar -h" in message
    )
    whole = [(link(f"{n}.{s}", kind), b"") for n in range(3) for s in ("jpg", "txt")]
    url = write_members(tmp_path / "whole.tar", whole)
    assert f"no shard holds a sample: {url} holds 6 links (links hold no bytes" in refusal(url)


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([], "is a tar of no files"),
        ([("README", b"x"), ("b/LICENSE", b"x")], "holds 2 files that belong to no sample"),
    ],
)
def test_a_shard_without_samples_is_refused_with_what_it_holds(write_tar, members, words):
    assert words in refusal(write_tar("x.tar", members))


def test_an_empty_file_and_one_that_is_no_tar_are_refused_as_what_they_are(tmp_path):
    for content, words in ((b"", "is an empty file"), (b"hello " * 500, "is no tar")):
        (tmp_path / "x.tar").write_bytes(content)
        assert words in refusal(tmp_path / "x.tar")


def test_samples_that_lack_an_image_are_named_by_what_they_hold_once(tmp_path, write_tar, caplog):
    from aclip.data.loader import build_train_loader

    image = io.BytesIO()
    Image.new("RGB", (40, 40)).save(image, "PNG")
    members = []
    for n in range(16):
        members += [
            (f"{n}.{'heic' if n % 4 == 0 else 'png'}", image.getvalue()),
            (f"{n}.txt", b"x"),
        ]
    recipe = load_recipe(
        SMALL_RECIPE,
        ["train.global_batch_size=4", "data.lanes=4", "data.workers=0", f"data.train={tmp_path}"],
    )
    url = write_tar("x.tar", members)
    with caplog.at_level(logging.WARNING):
        batches = iter(build_train_loader(recipe, find(url), 0, 1))
        skipped = sum(next(batches).skipped.get("no_image", 0) for _ in range(4))
    assert skipped >= 4
    named = [r.getMessage() for r in caplog.records if "heic" in r.getMessage()]
    assert named == ["samples are skipped as no_image, in which heic and txt were found"]


def test_a_lane_that_finds_nothing_usable_says_what_the_samples_hold(write_tar):
    from aclip.data.loader import build_train_loader

    url = write_tar("x.tar", [(f"{n}.heic", b"x") for n in range(8)])
    recipe = load_recipe(
        SMALL_RECIPE, ["train.global_batch_size=4", "data.lanes=1", "data.workers=0"]
    )
    with pytest.raises(ConfigError, match=re.escape("(no_caption ") + ".*; samples held heic; rep"):
        next(iter(build_train_loader(recipe, [Shard(url, 8)], 0, 1)))

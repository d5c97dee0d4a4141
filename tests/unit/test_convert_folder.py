"""A folder as users have it: any suffix and name, links, litter of other tools, other formats."""

import os
from pathlib import Path

import pytest
from convert_sources import IMAGES, encode, make_job, write_file
from PIL import Image

from aclip.data.convert.conversion import run
from aclip.data.convert.entries import Entry, Note, Rejected
from aclip.data.convert.report import format_report
from aclip.data.convert.sources.folder import folder_source
from aclip.data.members import read_captions
from aclip.data.shards.listing import Shard, read_shard

JPEG = IMAGES["jpeg"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ACLIP_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def convert(tmp_path):
    """convert(files) -> (captions by key, report) of a folder that holds these files."""

    def run_on(files: dict[str, bytes]):
        for name, content in files.items():
            write_file(tmp_path / "pairs" / name, content)
        report = run(make_job(tmp_path, folder_source(str(tmp_path / "pairs"))), processes=1)
        shards = sorted((tmp_path / "out").glob("*.tar"))
        samples = [raw for shard in shards for _, raw in read_shard(Shard(str(shard), 99))]
        found = {raw.key: read_captions(raw) for raw in samples if not hasattr(raw, "kind")}
        return found, report

    return run_on


def test_suffixes_may_be_upper_case_and_captions_lie_in_txt_caption_and_json(convert):
    found, report = convert(
        {
            "A.JPG": JPEG,
            "A.TXT": b"a",
            "b.JPEG": JPEG,
            "b.Txt": b"one\ntwo\n\n",
            "c.jpeg": JPEG,
            "c.caption": b"c",
            "d.jpg": JPEG,
            "d.json": b'{"captions": ["d", null, "dd"]}',
            "e.jpg": JPEG,
            "e.json": b'{"caption": "old"}',
            "e.txt": b"edited",
            "f.jpg": JPEG,
            "f.caption": b"long\nshort",
            "f.txt": b"short",
            "g.jpg": JPEG,
            "g.json": b'{"width": 40}',
        }
    )
    assert found == {
        "A": ["a"],
        "b": ["one", "two"],
        "c": ["c"],
        "d": ["d", "dd"],
        "e": ["edited"],
        "f": ["short", "long"],
    }
    assert report["skipped"] == {"no_caption": 1}
    assert report["examples"]["no_caption"] == ["g: no caption in g.json"]
    assert report["noted"] == {"no_text_in_json": 1, "txt_before_json": 1}


def test_captions_of_other_encodings_are_read_and_counted(convert):
    files = {f"{name}.jpg": JPEG for name in ("cp1252", "utf-16", "utf-8")}
    files |= {f"{name}.txt": "café".encode(name) for name in ("cp1252", "utf-16", "utf-8")}
    found, report = convert(files)
    assert found == {"cp1252": ["café"], "utf-16": ["café"], "utf-8": ["café"]}
    assert report["noted"] == {"decoded_as_cp1252": 1}
    assert report["examples"]["decoded_as_cp1252"] == ["cp1252: cp1252.txt"]


def test_images_of_every_format_that_pillow_decodes_safely_are_converted(convert):
    picture = Image.new("RGB", (40, 40), (200, 10, 10))
    files = {f"{name}.txt": b"text" for name in "abcdefgh"}
    files |= {
        "a.gif": encode(picture, "GIF"),
        "b.tif": encode(picture, "TIFF"),
        "c.TIFF": encode(picture, "TIFF", compression="tiff_lzw"),
        "d.bmp": encode(picture, "BMP"),
        "e.ppm": encode(picture, "PPM"),
        "f.pgm": encode(picture.convert("L"), "PPM"),
        "g.jfif": encode(picture, "JPEG"),
        "h.webp": encode(picture, "WEBP", save_all=True, append_images=[picture.rotate(90)]),
    }
    found, report = convert(files)
    assert len(found) == report["samples"] == 8
    assert report["images"] == {"original": 2, "reencoded": 6}


def test_litter_other_files_and_formats_that_are_not_decoded_are_counted_by_name(convert):
    found, report = convert(
        {
            "a.jpg": JPEG,
            "a.txt": b"a",
            "._a.jpg": b"x",
            "._a.txt": b"x",
            ".DS_Store": b"x",
            "Thumbs.db": b"x",
            "__MACOSX/a.jpg": JPEG,
            "__MACOSX/a.txt": b"x",
            "sub/@eaDir/a.jpg": JPEG,
            "sub/.ipynb_checkpoints/a-checkpoint.txt": b"x",
            "b.heic": b"x",
            "b.txt": b"b",
            "c.heic": b"x",
            "d.SVG": b"x",
            "e.jpg": b"",
            "e.txt": b"e",
            "list.xml": b"x",
            "README": b"x",
            "lone.json": b"{}",
        }
    )
    assert found == {"a": ["a"]}
    assert report["skipped"] == {
        "unreadable_image": 1,
        "unsupported_format (.heic)": 2,
        "unsupported_format (.svg)": 1,
    }
    assert report["noted"] == {
        "litter": 7,
        "other_file (.json)": 1,
        "other_file (.xml)": 1,
        "other_file (without a suffix)": 1,
    }
    assert "the file is empty" in report["examples"]["unreadable_image"][0]
    assert "  unsupported_format (.heic)" in format_report(report)


def test_names_may_hold_anything_and_be_as_long_as_the_file_system_allows(tmp_path, convert):
    long = "é" * 125  # 250 bytes, the limit being 255
    names = [" a b ", "a.b.c", "new\nline", long, "\udcff\udcfe", "%41", "-x", "'\"*?[", "a:b"]
    files = {f"{name}.jpg": JPEG for name in names} | {f"{name}.txt": b"text" for name in names}
    found, report = convert(files)
    assert len(found) == report["samples"] == len(names)
    assert report["skipped"] == {}
    assert all(key.isascii() and "." not in key for key in found)


def test_a_report_about_names_that_can_not_be_printed_is_one_line_a_kind(convert):
    files = {
        "good.jpg": JPEG,
        "good.txt": b"text",
        "bad\n\udcff.jpg": b"x",
        "bad\n\udcff.txt": b"x",
    }
    _, report = convert(files)
    table = format_report(report)
    table.encode("utf-8")
    (line,) = [line for line in table.splitlines() if "unreadable_image" in line]
    assert r"bad\n\udcff.jpg" in line


def test_links_are_followed_once_and_those_to_nowhere_are_counted(tmp_path, convert):
    root, elsewhere = tmp_path / "pairs", tmp_path / "elsewhere"
    write_file(elsewhere / "folder" / "x.jpg", JPEG)
    write_file(elsewhere / "folder" / "x.txt", b"x")
    write_file(elsewhere / "y.jpg", JPEG)
    write_file(root / "y.txt", b"y")
    (root / "y.jpg").symlink_to(elsewhere / "y.jpg")
    (root / "linked").symlink_to(elsewhere / "folder")
    (elsewhere / "folder" / "back").symlink_to(root)
    (root / "nowhere.jpg").symlink_to(tmp_path / "gone")
    write_file(root / "nowhere.txt", b"z")
    (root / "self.jpg").symlink_to(root / "self.jpg")
    write_file(root / "self.txt", b"z")
    found, report = convert({})
    assert found == {"linked/x": ["x"], "y": ["y"]}
    assert report["skipped"] == {"no_image": 2}


def test_two_images_of_one_name_are_one_sample_and_a_duplicate(convert):
    found, report = convert({"a.jpg": JPEG, "a.JPG": JPEG, "a.png": IMAGES["alpha"], "a.txt": b"a"})
    assert found == {"a": ["a"]}
    assert report["skipped"] == {"duplicate_key": 2}
    assert report["examples"]["duplicate_key"][0] == "a: a.JPG has the key already"


def test_what_is_in_a_folder_is_listed_in_the_order_of_the_paths(tmp_path):
    for name in ("b/1.jpg", "a/2.jpg", "a/1.jpg", "c.jpg"):
        write_file(tmp_path / "pairs" / name, JPEG)
        write_file((tmp_path / "pairs" / name).with_suffix(".txt"), b"text")
    entries = list(folder_source(str(tmp_path / "pairs")).entries())
    assert [type(entry) for entry in entries] == [Entry] * 4
    assert [entry.image for entry in entries] == ["c.jpg", "a/1.jpg", "a/2.jpg", "b/1.jpg"]
    assert not any(isinstance(entry, Rejected | Note) for entry in entries)
    assert Path(os.path.join("a", "1.txt")).as_posix() == entries[1].caption_files[0]

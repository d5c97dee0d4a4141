"""A sample's texts -> its captions: lines, lists, encodings, and which file counts."""

import codecs

import pytest

from aclip.data.captions import captions_of, decode_text
from aclip.data.members import read_captions
from aclip.data.shards.listing import Shard, Skip, read_shard
from aclip.data.shards.tar import RawSample


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ACLIP_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"txt": b"a dog"}, ["a dog"]),
        ({"txt": b"one\ntwo\r\n\n  \nthree\rfour\n"}, ["one", "two", "three", "four"]),
        ({"txt": "a\x0b b\x85c\u2028d".encode()}, ["a\x0b b\x85c\u2028d"]),
        ({"json": b'{"captions": ["a", " ", "b"], "caption": "c"}', "txt": b"b"}, ["a", "b"]),
        ({"json": b'{"captions": [], "caption": "c"}'}, ["c"]),
        ({"json": b'{"captions": ["a", 1]}', "txt": b"d"}, ["d"]),
        ({"json": b'{"captions": ["a dog", null]}'}, ["a dog"]),
        ({"json": b'{"captions": "a dog"}'}, ["a dog"]),
        ({"json": b'{"caption": ["x", "y"]}'}, ["x", "y"]),
        ({"json": b'{"caption": ""}', "txt": b"d"}, ["d"]),
        ({"json": b'{"captions": [null], "caption": "c"}'}, ["c"]),
        ({"json": b'"a dog"'}, ["a dog"]),
        ({"json": b'["a", "b", 3]'}, ["a", "b"]),
        ({"json": '\ufeff"a dog"'.encode()}, ["a dog"]),
        ({"json": '{"caption": "caf\xe9"}'.encode("utf-16")}, ["caf\xe9"]),
        ({"json": b"not json", "txt": b"d"}, ["d"]),
        ({"json": b"[1]", "txt": b"d"}, ["d"]),
        ({"json": b"7", "txt": b"d"}, ["d"]),
        ({"json": b'{"caption": "half \\ud83d"}'}, ["half ?"]),
        ({"txt": "é".encode("latin-1")}, ["é"]),
        ({"txt": b" \n"}, Skip("empty_caption")),
        ({"txt": b""}, Skip("empty_caption")),
        ({"json": b'{"captions": ["", " "]}'}, Skip("empty_caption")),
        ({"json": b'{"captions": [null, NaN, 3]}'}, Skip("no_caption")),
        ({"json": b'{"url": "x"}'}, Skip("no_caption")),
        ({"jpg": b"x"}, Skip("no_caption")),
    ],
)
def test_lines_and_list_items_are_captions_and_what_is_unusable_is_left_out(
    write_tar, members, expected
):
    url = write_tar("x.tar", [(f"0.{suffix}", content) for suffix, content in members.items()])
    ((_, sample),) = read_shard(Shard(url, 1))
    assert isinstance(sample, RawSample) and read_captions(sample) == expected


@pytest.mark.parametrize(
    ("txt", "json", "expected", "is_noted"),
    [
        # as the converter and the demo write it: the txt is one of the json's
        (b"b", b'{"captions": ["a", "b"]}', ["a", "b"], False),
        (b"  b \n", b'{"captions": ["a", "b"]}', ["a", "b"], False),
        # as img2dataset writes a caption with line ends: one caption
        (b"a\nb", b'{"caption": "a\\nb"}', ["a\nb"], False),
        (b"a b", b'{"captions": ["a\\nb", "c"]}', ["a\nb", "c"], False),
        (b"a\nb\n", b'{"captions": ["b", "c", "a"]}', ["b", "c", "a"], False),
        # edited since
        (b"new", b'{"captions": ["a", "b"]}', ["new"], True),
        (b"new", b'{"caption": "old"}', ["new"], True),
        (b"a\nnew", b'{"captions": ["a", "b"]}', ["a", "new"], True),
    ],
)
def test_a_json_counts_only_where_it_holds_what_the_txt_holds(txt, json, expected, is_noted):
    captions = captions_of([txt], json)
    assert captions == expected
    assert captions.notes == ({"txt_before_json"} if is_noted else set())


@pytest.mark.parametrize(
    ("content", "text", "note"),
    [
        (b"plain", "plain", None),
        ("naïve 猫".encode(), "naïve 猫", None),
        (codecs.BOM_UTF8 + "é".encode(), "é", None),
        ("é猫".encode("utf-16"), "é猫", None),
        (codecs.BOM_UTF16_BE + "é猫".encode("utf-16-be"), "é猫", None),
        (codecs.BOM_UTF32_LE + "é猫".encode("utf-32-le"), "é猫", None),
        (codecs.BOM_UTF32_BE + "é猫".encode("utf-32-be"), "é猫", None),
        ("a dog".encode("utf-16-le"), "a dog", "decoded_as_utf16"),
        ("a dog".encode("utf-16-be"), "a dog", "decoded_as_utf16"),
        # 0x80, 0x93 and 0x94 are the euro and quotation marks; Windows-1252 leaves 0x81 free.
        (b"\x80 \x93caf\xe9\x94 \x81", "€ “café” \x81", "decoded_as_cp1252"),
        (codecs.BOM_UTF8 + b"\xe9", "é", "decoded_as_cp1252"),
        ("a dog".encode("utf-16")[:-1], "a do\ufffd", "damaged_text"),
        (b"a stray \0 in it", "a stray \0 in it", None),
        (b"", "", None),
    ],
)
def test_an_encoding_is_told_by_its_mark_or_guessed_and_noted(content, text, note):
    assert decode_text(content) == (text, note)


@pytest.mark.parametrize(
    ("json", "notes"),
    [
        (b'{"captions": ["a", null, 3]}', {"no_text_in_json"}),
        (b'{"captions": ["a", ""]}', {"blank_in_json"}),
        (b"{", {"unreadable_json"}),
        (b'{"caption": null, "captions": ["a"]}', set()),
        ('{"caption": "é"}'.encode("cp1252"), {"decoded_as_cp1252", "txt_before_json"}),
    ],
)
def test_what_is_left_out_or_guessed_is_noted_by_kind(json, notes):
    assert captions_of([b"a"], json).notes == notes

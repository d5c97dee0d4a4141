"""What names shards: braces, globs, folders, links, other tools' notations, and other files."""

import bz2
import gzip
import json
import lzma
import os
import shlex
import time
import tracemalloc
from pathlib import Path

import pytest
from small_recipe import SMALL_RECIPE

from aclip.config.recipe_file import load_recipe
from aclip.data.shards.listing import Shard, index_shards, list_shards, read_shard
from aclip.data.shards.remote import RemoteShards
from aclip.data.shards.tar import ShardError
from aclip.errors import ConfigError

PAIR = [("0.jpg", b"image"), ("0.txt", b"text")]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("ACLIP_CACHE", str(tmp_path_factory.mktemp("cache")))


def refusal(pattern) -> str:
    with pytest.raises(ConfigError) as caught:
        list_shards(pattern, "data.train")
    return str(caught.value)


@pytest.mark.parametrize(
    "entry",
    [
        "/d/a/{0000..9999}.tar::/d/b/{0000..9999}.tar",
        "s3://a/{0..9}.tar::s3://b/{0..9}.tar",
        "https://a/{0..9}.tar::https://b/{0..9}.tar::https://c/0.tar",
        "pipe:cat /a/{0..9}.tar::pipe:cat /b/{0..9}.tar",
    ],
)
def test_data_sets_joined_as_for_open_clip_are_refused_with_both_ways_to_write_them(entry):
    message = refusal(entry)
    assert message.startswith(f"data.train is {entry}, which joins data sets with :: as open_clip")
    way = message.split("; write ")[1]
    (as_list,) = shlex.split(way.split(", or, with a weight")[0])
    (weighted,) = shlex.split(way.split("upsampling-factors, ")[1])
    assert load_recipe(SMALL_RECIPE, [as_list]).data.train == entry.split("::")
    sources = load_recipe(SMALL_RECIPE, ["data.train=[]", weighted]).data.sources
    assert [(source.shards, source.weight) for source in sources] == [
        (part, 1) for part in entry.split("::")
    ]


@pytest.mark.parametrize(
    "entry",
    ["simplecache::memory://b/{0..1}.tar", "zip://{0..1}.tar::memory://b/all.zip"],
)
def test_an_address_through_another_one_stays_a_single_one(entry):
    assert len(list_shards(entry, "data.train")) == 2


def test_a_command_keeps_its_own_colons(tmp_path):
    command = "pipe:perl -e 'print Foo::bar' {0..1}.tar"
    assert len(list_shards(command, "data.train")) == 2
    (tmp_path / "a::b.tar").touch()
    assert list_shards(f"{tmp_path}/a::b.tar", "data.train") == [f"{tmp_path}/a::b.tar"]


def test_an_address_of_ipv6_is_refused_at_once():
    assert "an address of IPv6" in refusal("http://[::1]:8000/x.tar")


@pytest.mark.parametrize(
    ("entry", "number"),
    [
        ("/d/{0..99999999}.tar", 100_000_000),
        ("/d/{99999999..0..2}.tar", 50_000_000),
        ("/d/{a,b{0..999}}/{0..9999}.tar", 1001 * 10_000),
        ("/d/{a..z}{a..z}/{0..9999}.tar", 26 * 26 * 10_000),
        ("memory://b/{x}/{0..9999999}.tar", 10_000_000),
        ("pipe:cat {0..9999}/{0..9999}.tar | awk '{print $1,$2}'", 100_000_000),
    ],
)
def test_braces_for_more_names_than_any_set_has_are_refused_before_they_fill_memory(entry, number):
    tracemalloc.start()
    start = time.monotonic()
    message = refusal(entry)
    assert f"{entry}, whose braces stand for {number:,} names" in message
    assert time.monotonic() - start < 3 and tracemalloc.get_traced_memory()[1] < 10**7
    tracemalloc.stop()


def test_nested_braces_and_lists_of_folders_are_expanded(tmp_path):
    names = ["a/0", "a/1", "b/1", "b/0"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.tar").touch()
    found = list_shards(f"{tmp_path}/{{a/{{0..1}},b/{{1..0}}}}.tar", "data.train")
    assert [str(Path(url).relative_to(tmp_path)) for url in found] == [f"{n}.tar" for n in names]


def test_a_folder_stands_for_its_tars_without_litter(tmp_path):
    for name in ("b.tar", "a.TAR", "._b.tar", "sizes.json", "a.txt"):
        (tmp_path / name).touch()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.tar").touch()
    found = [f"{tmp_path}/a.TAR", f"{tmp_path}/b.tar"]
    assert list_shards(str(tmp_path), "data.train") == found
    assert list_shards(f"{tmp_path}/", "data.train") == found


def test_two_stars_mean_any_depth(tmp_path):
    for folder in ("", "a", "a/b"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "x.tar").touch()
    assert len(list_shards(f"{tmp_path}/**/x.tar", "data.train")) == 3


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("d", "is {}/d, a folder that holds 3 .tgz files, 1 .json file and 1 folder, but no .tar"),
        ("d/*.tar", "no file matches {}/d/*.tar; {}/d holds 3 .tgz files, 1 .json file and 1 fold"),
        ("d/sub/*/x.tar", "no file matches {}/d/sub/*/x.tar; {}/d/sub is empty; check the path"),
        ("d/{0..3}.tar", "there is no file {}/d/0.tar; {}/d holds 3 .tgz"),
        ("d/su*", "only folders match {}/d/su*"),
        (
            "gone/deep/{0..3}.tar",
            "no file {}/gone/deep/0.tar; there is no folder {}/gone, and {} holds 1 folder; check",
        ),
        ("gone/*.tar", "no file matches {}/gone/*.tar; there is no folder {}/gone, and {} holds"),
    ],
)
def test_what_is_not_there_is_refused_with_what_was_found(tmp_path, pattern, words):
    (tmp_path / "d" / "sub").mkdir(parents=True)
    for name in ("0.tgz", "1.tgz", "2.tgz", "sizes.json"):
        (tmp_path / "d" / name).touch()
    assert words.replace("{}", str(tmp_path)) in refusal(f"{tmp_path}/{pattern}")


def test_links_to_shards_are_read_and_links_to_nothing_are_named(tmp_path, write_tar):
    shard = write_tar("0.tar", PAIR)
    (tmp_path / "d").mkdir()
    os.symlink(shard, tmp_path / "d" / "0.tar")
    assert index_shards(list_shards(f"{tmp_path}/d/*.tar", "data.train")) == [
        Shard(f"{tmp_path}/d/0.tar", 1)
    ]
    os.symlink("/gone/1.tar", tmp_path / "d" / "1.tar")
    for pattern in ("d", "d/*.tar", "d/1.tar", "d/{0..1}.tar"):
        assert (f"but {tmp_path}/d/1.tar is a link to /gone/1.tar, where nothing is") in refusal(
            f"{tmp_path}/{pattern}"
        )


@pytest.mark.parametrize("name", ["a b.tar", "a%20b.tar", "new\nline.tar", "é.tar", b"\xff.tar"])
def test_a_file_is_read_whatever_its_name(tmp_path, write_tar, name):
    name = os.fsdecode(name)
    url = write_tar(name, [(f"{n}.jpg", b"x") for n in range(70)])
    (shard,) = index_shards(list_shards(f"{tmp_path}/*.tar", "data.train"))
    assert shard.url == url == list_shards(url, "data.train")[0]
    assert len(list(read_shard(shard))) == 70


@pytest.mark.parametrize(
    ("pack", "tool", "name", "unpacked"),
    [
        (gzip, "gzip", "x.tar.gz", "x.tar"),
        (gzip, "gzip", "x.tgz", "x.tar"),
        (gzip, "gzip", "x.tar", "x.unpacked.tar"),
        (bz2, "bzip2", "x.tar.bz2", "x.tar"),
        (lzma, "xz", "x y.TAR.XZ", "x y.TAR"),
    ],
)
def test_a_compressed_shard_is_refused_by_its_content_with_the_command(
    tmp_path, write_tar, pack, tool, name, unpacked
):
    good, path = write_tar("good.tar", PAIR), str(tmp_path / name)
    Path(path).write_bytes(pack.compress(Path(good).read_bytes()))
    command, target = refusal(path).split("; unpack it, ")[1].split(" > ")
    assert shlex.split(command) == [tool, "-dc", path]
    assert shlex.split(target) == [f"{tmp_path}/{unpacked}"]
    # One that list_shards does not open is noticed when it is counted, or read.
    for use in (lambda: index_shards([good, path]), lambda: list(read_shard(Shard(path, 5)))):
        with pytest.raises(ShardError, match=f"is compressed .{tool}."):
            use()


def test_a_plain_tar_is_read_whatever_suffix_it_has_and_whatever_its_first_member_is_called(
    write_tar,
):
    url = write_tar("x.tar.gz", [("BZh9.jpg", b""), ("BZh9.txt", b"x")])
    assert index_shards(list_shards(url, "data.train")) == [Shard(url, 1)]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"PK\x03\x04" + bytes(600), "is no tar but a zip archive; unpack it"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS; fetch"),
        (b"\n<!DOCTYPE html><html>", "is no tar but a page of HTML or XML; check where"),
    ],
)
def test_a_file_of_another_kind_is_named(tmp_path, content, words):
    (tmp_path / "x.tar").write_bytes(content)
    assert words in refusal(f"{tmp_path}/x.tar")


def test_a_compressed_shard_at_an_address_is_refused_by_its_name_or_when_it_is_fetched(tmp_path):
    assert "pipe:aws s3 cp" in refusal("memory://b/{0..1}.tar.gz?token=1")
    (tmp_path / "x.tar").write_bytes(gzip.compress(bytes(2000)))
    remote = RemoteShards(tmp_path / "shards", 10**9, retries=0)
    with pytest.raises(ShardError, match=r"or read it as 'pipe:COMMAND \| gzip -dc'"):
        index_shards([f"file://{tmp_path}/x.tar"], remote)
    assert len(list_shards("pipe:zcat /d/{0..1}.tar.gz", "data.train")) == 2


def test_counts_of_a_broken_list_still_name_the_compression(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(600))
    (tmp_path / "sizes.json").write_text(json.dumps({"x.tar": 3}))
    (shard,) = index_shards([str(tmp_path / "x.tar")])
    with pytest.raises(ShardError, match=r"Zstandard.*zstd -dc"):
        list(read_shard(shard))

"""Finding, counting and reading shards, in good and in bad state."""

import json
import logging
import os
import tarfile
from pathlib import Path

import pytest
import webdataset

from aclip.data.members import read_image_bytes
from aclip.data.shards.listing import (
    Shard,
    Skip,
    index_shards,
    list_shards,
    read_shard,
    shard_names,
)
from aclip.errors import ConfigError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ACLIP_CACHE", str(tmp_path / "cache"))


def numbered(count: int, size: int = 700) -> list[tuple[str, bytes]]:
    return [
        (f"{index:03d}.{suffix}", f"{suffix}{index} ".encode().ljust(size))
        for index in range(count)
        for suffix in ("txt", "jpg")
    ]


def describe(shard: Shard, start: int = 0) -> list[tuple[int, str]]:
    return [
        (position, sample.kind if isinstance(sample, Skip) else sample.key)
        for position, sample in read_shard(shard, start)
    ]


def test_braces_globs_and_lists_name_files_in_the_order_given(tmp_path):
    for name in ("a0", "a1", "b1", "b0", "c[1]"):
        (tmp_path / f"{name}.tar").touch()
    named = list_shards([f"{tmp_path}/b?.tar", f"{tmp_path}/a{{1..0}}.tar"], "data.train")
    assert [Path(url).name for url in named] == ["b0.tar", "b1.tar", "a1.tar", "a0.tar"]
    assert list_shards(f"{tmp_path}/c[1].tar", "data.train") == [f"{tmp_path}/c[1].tar"]


def test_commands_and_addresses_are_expanded_by_braces_alone():
    entries = ["pipe:aws s3 cp s3://b/{08..10}.tar -", "memory://b/{a,b}.tar"]
    assert list_shards(entries, "data.train") == [
        "pipe:aws s3 cp s3://b/08.tar -",
        "pipe:aws s3 cp s3://b/09.tar -",
        "pipe:aws s3 cp s3://b/10.tar -",
        "memory://b/a.tar",
        "memory://b/b.tar",
    ]


def test_a_protocol_whose_package_is_missing_says_which_to_install():
    with pytest.raises(
        ConfigError, match=r"data.val holds s3://b/0.tar.*pip install 'fsspec\[s3\]'"
    ):
        list_shards("s3://b/0.tar", "data.val")


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        pytest.param("/nowhere/{00..03}.tar", "/nowhere/00.tar", id="missing file"),
        pytest.param("/nowhere/*.tar", "/nowhere/*.tar", id="glob without match"),
        pytest.param([], "empty", id="nothing"),
        pytest.param("", "empty", id="empty text"),
        pytest.param("/x/{00..03.tar", "/x/{00..03.tar", id="open brace"),
        pytest.param("s3://bucket/00.tar", "s3://bucket/00.tar", id="address"),
        pytest.param("nonsense://x/00.tar", "nonsense", id="unknown protocol"),
        pytest.param("memory://x/*.tar", "memory://x/*.tar", id="glob at an address"),
    ],
)
def test_a_pattern_that_names_no_file_is_refused_with_field_and_value(pattern, named):
    with pytest.raises(ConfigError) as error:
        list_shards(pattern, "data.train")
    assert "data.train" in str(error.value) and named in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(
            {"shardlist": [{"url": "x.tar", "nsamples": 7}]}, id="webdataset's shard list"
        ),
        pytest.param([{"url": "x.tar", "nsamples": 7}], id="plain list"),
        pytest.param({"x.tar": 7}, id="open_clip's sizes"),
    ],
)
def test_counts_come_from_sizes_json_without_reading_the_shard(tmp_path, content):
    (tmp_path / "x.tar").write_text("not a tar")
    (tmp_path / "sizes.json").write_text(json.dumps(content))
    url = str(tmp_path / "x.tar")
    assert index_shards([url]) == [Shard(url, 7)]


@pytest.mark.parametrize("content", ["{", '{"shardlist": [{"url": "x.tar"}]}', "[1]", "3"])
def test_a_malformed_sizes_json_is_refused_by_name(tmp_path, content):
    (tmp_path / "x.tar").touch()
    (tmp_path / "sizes.json").write_text(content)
    with pytest.raises(ConfigError, match=r"sizes\.json"):
        index_shards([str(tmp_path / "x.tar")])


def test_a_shard_that_sizes_json_does_not_list_is_counted(tmp_path, write_tar):
    listed, other = write_tar("listed.tar", numbered(2)), write_tar("other.tar", numbered(5))
    (tmp_path / "sizes.json").write_text(json.dumps({"listed.tar": 9}))
    assert index_shards([listed, other]) == [Shard(listed, 9), Shard(other, 5)]


def test_counts_are_cached_until_the_file_changes(write_tar, monkeypatch):
    url = write_tar("x.tar", numbered(5))
    assert index_shards([url]) == [Shard(url, 5)]
    scans = []
    scan = "aclip.data.shards.counts._scan_shard"
    monkeypatch.setattr(scan, lambda url, remote: scans.append(url) or 8)
    assert index_shards([url]) == [Shard(url, 5)] and scans == []
    os.utime(url, ns=(0, 0))
    assert index_shards([url]) == [Shard(url, 8)] and scans == [url]


def test_a_long_count_tells_how_far_it_is(write_tar, monkeypatch, capsys):
    monkeypatch.setattr("aclip.data.shards.counts.PROGRESS_SHARDS", 2)
    urls = [write_tar(f"{number}.tar", numbered(1)) for number in range(5)]
    for _ in range(2):  # the second time the counts are in the cache
        index_shards(urls)
    assert capsys.readouterr().out.splitlines() == [
        "counting samples: 2 of 5 shards",
        "counting samples: 4 of 5 shards",
    ]


def test_counting_works_where_the_cache_folder_can_not_be_made(tmp_path, write_tar, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ACLIP_CACHE", str(tmp_path / "file" / "cache"))
    url = write_tar("x.tar", numbered(3))
    assert index_shards([url]) == [Shard(url, 3)]


def test_an_empty_shard_is_named_and_left_out(tmp_path, write_tar, caplog):
    good, bad = write_tar("good.tar", numbered(1)), str(tmp_path / "bad.tar")
    Path(bad).touch()
    with caplog.at_level(logging.WARNING):
        assert index_shards([bad, good]) == [Shard(good, 1)]
    assert bad in caplog.text
    with pytest.raises(ConfigError, match=r"bad\.tar"):
        index_shards([bad])


def test_samples_are_those_that_webdataset_finds(write_tar):
    names = ["a.jpg", "a.txt", "b.mask.png", "b.JPG", "dir.x/c.jpg", "dir.x/c.txt", "d.jpg"]
    names += ["__meta__/e.txt", "noext", "other/d.jpg", "d.txt", "long/" + "n" * 120 + ".txt"]
    url = write_tar("x.tar", [(name, name.encode()) for name in names])
    expected = [
        (sample["__key__"], {k: v for k, v in sample.items() if not k.startswith("__")})
        for sample in webdataset.WebDataset(url, shardshuffle=False)
    ]
    found = [
        (sample.key, {suffix: sample.read(suffix) for suffix in sample.members})
        for _, sample in read_shard(Shard(url, len(expected)))
    ]
    assert found == expected


def test_reading_starts_at_any_position(write_tar):
    shard = Shard(write_tar("x.tar", numbered(4)), 4)
    assert describe(shard, 2) == [(2, "002"), (3, "003")]
    assert describe(shard, 4) == []


def test_positions_after_a_truncation_come_as_truncated(write_tar):
    shard = Shard(write_tar("x.tar", numbered(5)), 5)
    # A sample takes two members of 512 + 1024 bytes; this cuts the jpg of the third.
    os.truncate(shard.url, 2 * 3072 + 1536 + 512 + 100)
    lost = [(position, "truncated_shard") for position in (2, 3, 4)]
    assert describe(shard) == [(0, "000"), (1, "001"), *lost]
    assert describe(shard, 3) == lost[1:]


def test_positions_after_a_corrupt_header_come_as_truncated(write_tar, caplog):
    url = write_tar("x.tar", numbered(5))
    with open(url, "r+b") as file:
        file.seek(2 * 3072)
        file.write(b"\xff" * 512)
    assert describe(Shard(url, 5))[1:] == [(1, "001")] + [(p, "truncated_shard") for p in (2, 3, 4)]
    with caplog.at_level(logging.WARNING):
        assert index_shards([url]) == [Shard(url, 2)]
    assert "corrupt after sample 2" in caplog.text


def test_a_whole_shard_is_counted_without_a_warning(write_tar, caplog):
    with caplog.at_level(logging.WARNING):
        index_shards([write_tar("x.tar", numbered(5))])
    assert caplog.text == ""


def test_a_file_that_is_no_tar_gives_every_position_as_truncated(tmp_path):
    (tmp_path / "x.tar").write_text("no tar " * 1000)
    shard = Shard(str(tmp_path / "x.tar"), 2)
    assert describe(shard) == [(0, "truncated_shard"), (1, "truncated_shard")]


def test_samples_beyond_the_index_are_skipped_after_the_others(write_tar):
    shard = Shard(write_tar("x.tar", numbered(3)), 2)
    assert describe(shard, 1) == [(1, "001"), (2, "not_in_index")]


def test_a_missing_shard_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"gone\.tar can't be read"):
        describe(Shard(str(tmp_path / "gone.tar"), 2))


def test_pax_and_gnu_long_names_are_read(tmp_path):
    for tar_format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        url = str(tmp_path / f"{tar_format}.tar")
        with tarfile.open(url, "w", format=tar_format) as archive:
            archive.addfile(tarfile.TarInfo("k" * 300 + ".txt"))
        assert describe(Shard(url, 1)) == [(0, "k" * 300)]


def test_the_image_is_a_member_with_an_image_suffix(write_tar):
    url = write_tar("x.tar", [("0.mask.png", b"m"), ("0.webp", b"w"), ("1.mask.png", b"m")])
    (_, first), (_, second) = read_shard(Shard(url, 2))
    assert read_image_bytes(first) == b"w"
    assert read_image_bytes(second) == Skip("no_image")


def test_shards_with_one_stem_are_named_by_their_paths():
    assert shard_names(["/a/0.tar", "/a/1.tar"]) == ["0", "1"]
    assert shard_names(["/a/0.tar", "/b/0.tar"]) == ["/a/0", "/b/0"]

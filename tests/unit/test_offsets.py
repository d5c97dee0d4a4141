"""Reading starts at any sample without a walk through those before it, and is never wrong."""

import logging
import multiprocessing
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from odd_tars import ODD

from aclip.data.shards import offsets
from aclip.data.shards.listing import Shard, Skip, index_shards, read_shard
from aclip.data.shards.offsets import SampleOffsets
from aclip.data.shards.remote import RemoteShards
from aclip.data.shards.tar import TarShard

SIZE = 512 + 1024
"""Bytes of a member of `numbered`, header and content."""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("ACLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(SampleOffsets, "_has_warned", False)
    return tmp_path / "cache" / "offsets"


@pytest.fixture
def places(monkeypatch) -> list[int]:
    """The offsets of all reads, headers and contents."""
    found, read = [], TarShard.read
    monkeypatch.setattr(
        TarShard,
        "read",
        lambda self, offset, size: found.append(offset) or read(self, offset, size),
    )
    return found


def numbered(count: int, first: int = 0) -> list[tuple[str, bytes]]:
    """Samples of one member each."""
    return [(f"{n:05d}.txt", b"%05d" % n + bytes(700)) for n in range(first, first + count)]


def describe(shard: Shard, start: int = 0) -> list[tuple]:
    """All that a walk gives, contents too."""
    return [
        (position, raw.kind)
        if isinstance(raw, Skip)
        else (position, raw.key, [(suffix, raw.read(suffix)) for suffix in raw.members])
        for position, raw in read_shard(shard, start)
    ]


def keys(shard: Shard, start: int = 0) -> list[str]:
    return [raw.key for _, raw in read_shard(shard, start)]


@pytest.mark.parametrize("content", ODD.values(), ids=ODD)
@pytest.mark.parametrize("more", [-5, 0, 3], ids=["short index", "true index", "long index"])
def test_every_start_gives_what_a_walk_from_the_start_does(
    tmp_path, cache, monkeypatch, content, more
):
    monkeypatch.setattr(offsets, "EVERY", 3)
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    found = sum(1 for _ in TarShard(str(path)).walk())
    assert found >= 17
    shard = Shard(str(path), found + more)
    expected = describe(shard)
    wanted = {
        start: [entry for entry in expected if entry[0] >= min(start, shard.num_samples)]
        for start in range(found + 6)
    }
    for start, entries in wanted.items():  # with the offsets of the whole file, then with none
        assert describe(shard, start) == entries, start
    for start, entries in wanted.items():
        for file in cache.glob("*"):
            file.unlink()
        assert describe(shard, start) == entries, start
    for start in random.Random(0).sample(list(wanted), len(wanted)):  # as they become known
        next(read_shard(shard, start), None)
        assert describe(shard, start) == wanted[start], start


def test_a_walk_learns_nothing_behind_a_global_header(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(offsets, "EVERY", 3)
    for name, rows in (("global header first", 0), ("global header among", 3), ("plain", 7)):
        path = tmp_path / f"{name}.tar"
        path.write_bytes(ODD[name])
        list(TarShard(str(path)).walk())
        sizes = [file.stat().st_size for file in cache.glob(f"*{name.replace(' ', '-')}*")]
        assert sizes == ([16 * (1 + rows)] if rows else [])


def test_a_start_in_the_middle_reads_fewer_than_64_headers_before_it(write_tar, places):
    shard = Shard(write_tar("x.tar", numbered(300)), 300)
    assert keys(shard)[200] == "00200"
    for start, nearest in ((63, 0), (64, 64), (200, 192), (255, 192), (299, 256)):
        places.clear()
        position, raw = next(read_shard(shard, start))
        assert (position, raw.key) == (start, f"{start:05d}")
        assert min(places) == nearest * SIZE
        assert max(places) <= (start + 1) * SIZE  # where the next one's header lies


def test_a_scan_keeps_the_offsets(write_tar, places):
    url = write_tar("x.tar", numbered(150))
    (shard,) = index_shards([url])
    places.clear()
    assert keys(shard, 140) == [f"{n:05d}" for n in range(140, 150)]
    assert min(places) == 128 * SIZE


def test_without_a_scan_the_first_walk_to_a_sample_keeps_what_it_passes(write_tar, places):
    shard = Shard(write_tar("x.tar", numbered(300)), 300)
    walk = read_shard(shard, 150)
    next(walk)  # and stands there, as a lane does for a long time
    places.clear()
    next(read_shard(shard, 190))
    assert min(places) == 128 * SIZE
    for _ in range(100):
        next(walk)
    walk.close()
    places.clear()
    next(read_shard(shard, 260))
    assert min(places) == 192 * SIZE  # it has passed the 250th


def test_a_walk_that_began_earlier_does_not_undo_what_another_kept(write_tar, places):
    shard = Shard(write_tar("x.tar", numbered(300)), 300)
    first = read_shard(shard)
    for _ in range(70):
        next(first)
    keys(shard)
    first.close()  # knows of the 64th alone
    places.clear()
    next(read_shard(shard, 299))
    assert min(places) == 256 * SIZE


def test_a_changed_file_is_walked_anew(write_tar, cache, places):
    shard = Shard(write_tar("x.tar", numbered(200)), 200)
    keys(shard)
    for change in (
        lambda: write_tar("x.tar", numbered(300)),
        lambda: os.utime(shard.url, ns=(0, 0)),
        lambda: os.utime(shard.url, ns=(-5, -5)),
    ):
        change()
        places.clear()
        assert next(read_shard(shard, 150))[1].key == "00150"
        assert min(places) == 0
        places.clear()
        next(read_shard(shard, 150))
        assert min(places) == 128 * SIZE
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize(
    "replaced",
    [
        pytest.param(numbered(200, first=7), id="other keys"),
        pytest.param(numbered(100) + [("new.txt", bytes(705))] + numbered(99, 100), id="shifted"),
        pytest.param(numbered(40) * 5, id="repeated"),
    ],
)
def test_a_file_of_the_same_size_and_time_gives_its_own_samples(write_tar, places, replaced):
    shard = Shard(write_tar("x.tar", numbered(200)), 200)
    keys(shard)
    before = os.stat(shard.url)
    write_tar("x.tar", replaced)
    os.utime(shard.url, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat(shard.url).st_size == before.st_size
    for start in (199, 150, 128, 100, 64, 10, 0):
        assert keys(shard, start) == [name.removesuffix(".txt") for name, _ in replaced[start:]]
    places.clear()
    next(read_shard(shard, 150))
    assert min(places) > 100 * SIZE  # the offsets are right again


def test_offsets_kept_at_other_distances_are_no_danger(write_tar, monkeypatch):
    shard = Shard(write_tar("x.tar", numbered(100)), 100)
    for distance in (4, 2, 8, 3):
        monkeypatch.setattr(offsets, "EVERY", distance)
        for start in (50, 99, 8):
            assert keys(shard, start) == [f"{n:05d}" for n in range(start, 100)]


@pytest.mark.parametrize("damage", ["empty", "cut", "noise", "far", "negative", "a folder"])
def test_a_damaged_file_of_offsets_is_no_danger(write_tar, cache, damage):
    shard = Shard(write_tar("x.tar", numbered(200)), 200)
    keys(shard)
    (path,) = cache.iterdir()
    content = path.read_bytes()
    assert len(content) == 16 * 4
    damaged = {
        "empty": b"",
        "cut": content[:40],
        "noise": random.Random(0).randbytes(64),
        "far": content[:16] + struct.pack("<qq", 2**63 - 1, 0) * 3,
        "negative": content[:16] + struct.pack("<qq", -512, 0) * 3,
    }
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    else:
        path.write_bytes(damaged[damage])
    for start in (180, 70, 0):
        assert keys(shard, start) == [f"{n:05d}" for n in range(start, 200)]
    if damage != "a folder":
        assert path.read_bytes() == content


def test_a_cache_folder_that_can_not_be_written_is_said_once(
    tmp_path, write_tar, monkeypatch, caplog
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ACLIP_CACHE", str(tmp_path / "file" / "cache"))
    shards = [Shard(write_tar(f"{n}.tar", numbered(100)), 100) for n in range(2)]
    with caplog.at_level(logging.WARNING):
        for shard in shards * 2:
            assert keys(shard, 70) == [f"{n:05d}" for n in range(70, 100)]
    (record,) = caplog.records
    assert "offsets of samples are not cached" in record.message
    assert "set ACLIP_CACHE" in record.message


def test_nothing_is_written_beside_the_data(tmp_path, write_tar):
    keys(Shard(write_tar("x.tar", numbered(200)), 200))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "x.tar"]


def test_offsets_of_a_remote_shard_outlive_its_copy(tmp_path, write_tar, places):
    remote = RemoteShards(tmp_path / "shards", 10**9, retries=0)
    url = f"file://{write_tar('x.tar', numbered(200))}"
    shard = Shard(url, 200, remote=remote)
    keys(shard)
    for copy in (tmp_path / "shards").glob("*.shard"):
        copy.unlink()
    places.clear()
    assert keys(shard, 150) == [f"{n:05d}" for n in range(150, 200)]
    assert min(places) == 128 * SIZE


def _read_often(shards: list[Shard], seed: int) -> None:
    for start in random.Random(seed).sample(range(500), 25):
        assert keys(shards[start % len(shards)], start) == [f"{n:05d}" for n in range(start, 500)]


def test_processes_at_once_keep_right_offsets(write_tar, cache, monkeypatch):
    monkeypatch.setattr(offsets, "EVERY", 2)
    shards = [Shard(write_tar(f"{n}.tar", numbered(500)), 500) for n in range(2)]
    context = multiprocessing.get_context("fork")
    readers = [context.Process(target=_read_often, args=(shards, seed)) for seed in range(4)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(60)
    assert [reader.exitcode for reader in readers] == [0] * 4
    files = sorted(cache.iterdir())
    assert [file.stat().st_size for file in files] == [16 * 250] * 2  # and nothing half written


def test_a_walk_that_a_process_leaves_unfinished_says_nothing(write_tar):
    url = write_tar("x.tar", numbered(200))
    code = (
        "import os\n"
        "from aclip.data.shards.tar import TarShard\n"
        f"os.held = TarShard({url!r}).walk()\n"
        "samples = [next(os.held) for _ in range(100)]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_only_a_walk_that_comes_there_finds_a_shard_broken(write_tar):
    url = write_tar("x.tar", numbered(200))
    os.truncate(url, 199 * SIZE + 100)
    for start in (0, 190):  # the second time from offsets
        shard = TarShard(url)
        walk = shard.walk(start)
        assert next(walk).key == f"{start:05d}" and not shard.is_broken
        assert sum(1 for _ in walk) == 198 - start and shard.is_broken

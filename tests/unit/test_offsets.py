"""Reading starts at any sample without a walk through those before it, and is never wrong."""

import os
import random

import pytest
from numbered_shards import SIZE, describe, keys, numbered
from odd_tars import ODD

from aclip.data.shards import offsets
from aclip.data.shards.listing import Shard, index_shards, read_shard
from aclip.data.shards.tar import TarShard

pytestmark = pytest.mark.usefixtures("offsets_cache")


@pytest.mark.parametrize("content", ODD.values(), ids=ODD)
@pytest.mark.parametrize("more", [-5, 0, 3], ids=["short index", "true index", "long index"])
def test_every_start_gives_what_a_walk_from_the_start_does(
    tmp_path, offsets_cache, monkeypatch, content, more
):
    monkeypatch.setattr(offsets, "EVERY", 4)
    if more == 0:
        monkeypatch.setattr(offsets, "MAX_ROWS", 256)
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
        for file in offsets_cache.glob("*"):
            file.unlink()
        assert describe(shard, start) == entries, start
    for start in random.Random(0).sample(list(wanted), len(wanted)):  # as they become known
        next(read_shard(shard, start), None)
        assert describe(shard, start) == wanted[start], start


def test_a_walk_learns_nothing_behind_a_global_header(tmp_path, offsets_cache, monkeypatch):
    monkeypatch.setattr(offsets, "MAX_ROWS", 256)
    monkeypatch.setattr(offsets, "LEAST", 1)
    for name, rows in (("global header first", 0), ("global header among", 10), ("plain", 23)):
        path = tmp_path / f"{name}.tar"
        path.write_bytes(ODD[name])
        list(TarShard(str(path)).walk())
        sizes = [file.stat().st_size for file in offsets_cache.glob(f"*{name.replace(' ', '-')}*")]
        assert sizes == ([16 * (2 + rows)] if rows else [])


def test_a_start_in_the_middle_reads_fewer_than_64_headers_before_it(write_tar, places):
    shard = Shard(write_tar("x.tar", numbered(300)), 300)
    assert keys(shard)[200] == "00200"
    for start, nearest in ((63, 0), (64, 64), (200, 192), (255, 192), (299, 256)):
        places.clear()
        position, raw = next(read_shard(shard, start))
        assert (position, raw.key) == (start, f"{start:05d}")
        assert min(places) == nearest * SIZE
        assert max(places) <= (start + 1) * SIZE  # where the next one's header lies


@pytest.mark.parametrize(
    ("samples", "every"), [(17, 1), (64, 1), (257, 1), (258, 2), (513, 2), (600, 4)]
)
def test_in_a_small_shard_a_start_reads_few_headers_before_it_or_none(
    write_tar, monkeypatch, offsets_cache, places, samples, every
):
    monkeypatch.setattr(offsets, "MAX_ROWS", 256)
    shard = Shard(write_tar("x.tar", numbered(samples)), samples)
    keys(shard)
    (file,) = offsets_cache.iterdir()
    assert file.stat().st_size == 16 * (2 + (samples - 1) // every) <= 16 * (2 + 256)
    for start in {1, samples // 2, samples - 1}:
        places.clear()
        assert next(read_shard(shard, start))[1].key == f"{start:05d}"
        assert min(places) == start // every * every * SIZE


def test_of_very_few_samples_nothing_is_kept(write_tar, offsets_cache):
    keys(Shard(write_tar("x.tar", numbered(16)), 16))
    assert not offsets_cache.exists()


def test_a_kept_start_is_walked_once(write_tar, monkeypatch, places):
    monkeypatch.setattr(offsets, "MAX_ROWS", 256)
    shard = Shard(write_tar("x.tar", numbered(64)), 64)
    keys(shard)
    places.clear()
    next(read_shard(shard, 40))
    # Its header, and that of the next one, each with what tarfile reads ahead.
    assert len(places) == len(set(places)) <= 2


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


def test_a_changed_file_is_walked_anew(write_tar, offsets_cache, places):
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
    assert len(list(offsets_cache.iterdir())) == 1


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

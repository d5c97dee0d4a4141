"""The files that offsets are kept in: damaged, shared by processes, or not to be written."""

import logging
import multiprocessing
import os
import random
import struct
import subprocess
import sys

import pytest
from numbered_shards import SIZE, keys, numbered

from aclip.data.shards import offsets
from aclip.data.shards.listing import Shard
from aclip.data.shards.remote import RemoteShards
from aclip.data.shards.tar import TarShard

pytestmark = pytest.mark.usefixtures("offsets_cache")


def test_offsets_kept_at_other_distances_are_no_danger(write_tar, monkeypatch):
    shard = Shard(write_tar("x.tar", numbered(100)), 100)
    for distance in (4, 2, 8, 3):
        monkeypatch.setattr(offsets, "EVERY", distance)
        for start in (50, 99, 8):
            assert keys(shard, start) == [f"{n:05d}" for n in range(start, 100)]


@pytest.mark.parametrize(
    "damage",
    [
        "empty",
        "cut",
        "noise",
        "far",
        "negative",
        "of an earlier version",
        "no distance",
        "another distance",
        "an odd distance",
        "a folder",
    ],
)
def test_a_damaged_file_of_offsets_is_no_danger(write_tar, offsets_cache, damage):
    shard = Shard(write_tar("x.tar", numbered(200)), 200)
    keys(shard)
    (path,) = offsets_cache.iterdir()
    content = path.read_bytes()
    assert len(content) == 16 * (2 + 3)
    damaged = {
        "empty": b"",
        "cut": content[:40],
        "noise": random.Random(0).randbytes(80),
        "far": content[:32] + struct.pack("<qq", 2**63 - 1, 0) * 3,
        "negative": content[:32] + struct.pack("<qq", -512, 0) * 3,
        "of an earlier version": content[:16] + content[32:],
        "no distance": content[:16] + struct.pack("<qq", -2, 0) + content[32:],
        "another distance": content[:16] + struct.pack("<qq", -2, 16) + content[32:],
        "an odd distance": content[:16] + struct.pack("<qq", -2, 3) + content[32:],
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


def test_processes_at_once_keep_right_offsets(write_tar, offsets_cache, monkeypatch):
    monkeypatch.setattr(offsets, "EVERY", 2)
    shards = [Shard(write_tar(f"{n}.tar", numbered(500)), 500) for n in range(2)]
    context = multiprocessing.get_context("fork")
    readers = [context.Process(target=_read_often, args=(shards, seed)) for seed in range(4)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(60)
    assert [reader.exitcode for reader in readers] == [0] * 4
    files = sorted(offsets_cache.iterdir())
    assert [file.stat().st_size for file in files] == [16 * 251] * 2  # and nothing half written


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

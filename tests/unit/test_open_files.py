"""A process holds samples of many shards, reads them in any order, and has few files open."""

import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from aclip.data.shards.listing import Shard, read_shard
from aclip.data.shards.open_files import OPEN_FILES
from aclip.data.shards.remote import RemoteShards
from aclip.data.shards.tar import RawSample, ShardError, TarShard

NUM_SHARDS, SHARD_SIZE = 50, 40


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ACLIP_CACHE", str(tmp_path / "cache"))


def open_shards() -> list[str]:
    """Names of the shards that are open; what else the process has open does not count."""
    names = []
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            names.append(Path(os.readlink(descriptor)).name)
        except FileNotFoundError:  # the one that lists the folder
            continue
    return sorted(name for name in names if name.endswith(".tar"))


def members(shard: int, size: int = SHARD_SIZE) -> list[tuple[str, bytes]]:
    return [(f"{index}.txt", b"%d of %d" % (index, shard)) for index in range(size)]


@pytest.fixture
def held(write_tar) -> list[tuple[bytes, RawSample]]:
    """2,000 samples of 50 shards, each with its content, in random order."""
    samples = []
    for number in range(NUM_SHARDS):
        shard = Shard(write_tar(f"{number}.tar", members(number)), SHARD_SIZE)
        samples += [(b"%d of %d" % (index, number), raw) for index, raw in read_shard(shard)]
    random.Random(0).shuffle(samples)
    return samples


def test_held_samples_are_read_with_few_open_files(monkeypatch, held):
    monkeypatch.setattr(OPEN_FILES, "limit", 8)
    assert len(held) == 2000
    most = 0
    for content, raw in held:
        assert raw.read("txt") == content
        most = max(most, len(open_shards()))
    assert most == 8


def test_a_process_opens_256_shards_at_most(write_tar):
    shards = [TarShard(write_tar(f"{number}.tar", members(number, 1))) for number in range(270)]
    assert len(open_shards()) == 256
    assert all(shard.read(512, 4) == b"0 of" for shard in shards)
    assert len(open_shards()) == 256


def test_walks_go_on_after_their_files_were_closed(write_tar, monkeypatch):
    monkeypatch.setattr(OPEN_FILES, "limit", 1)
    walks = [TarShard(write_tar(f"{n}.tar", members(n, 100))).walk() for n in range(3)]
    for index in range(100):
        for number, walk in enumerate(walks):
            sample = next(walk)
            assert sample.key == str(index)
            assert sample.read("txt") == b"%d of %d" % (index, number)
            assert len(open_shards()) == 1


def test_no_file_stays_open_for_samples_that_are_gone(held):
    assert len(open_shards()) == NUM_SHARDS
    held.clear()
    assert len(open_shards()) == 0


def test_the_least_recently_read_file_is_closed(write_tar, monkeypatch):
    monkeypatch.setattr(OPEN_FILES, "limit", 2)
    first, second = (TarShard(write_tar(f"{n}.tar", members(n, 1))) for n in range(2))
    first.read(0, 1)
    third = TarShard(write_tar("2.tar", members(2, 1)))
    assert open_shards() == ["0.tar", "2.tar"]
    assert second.size == third.size


def test_threads_read_while_others_close_their_files(monkeypatch, held):
    monkeypatch.setattr(OPEN_FILES, "limit", 2)
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda pair: pair[1].read("txt"), held))
    assert read == [content for content, _ in held]
    assert len(open_shards()) == 2


@pytest.mark.parametrize("has_new_file", [True, False])
def test_a_file_that_is_not_the_one_that_was_opened_is_an_error(
    write_tar, monkeypatch, has_new_file
):
    monkeypatch.setattr(OPEN_FILES, "limit", 1)
    shard = TarShard(write_tar("a.tar", members(0, 100)))
    walk = shard.walk()
    held = next(walk)
    os.remove(shard.url)
    if has_new_file:
        write_tar("a.tar", members(0, 2))
    assert held.read("txt") == b"0 of 0"  # while its file is open
    other = TarShard(write_tar("b.tar", members(1, 1)))
    reason = "had 112640 bytes and now has 10240" if has_new_file else "can't be read: No such file"
    for read in (lambda: held.read("txt"), lambda: list(walk)):
        with pytest.raises(ShardError, match=f"^shard {shard.url} {reason}"):
            read()
    assert other.read(512, 6) == b"0 of 1"


def test_a_remote_shard_that_left_the_cache_meanwhile_is_fetched_again(
    tmp_path, write_tar, monkeypatch
):
    monkeypatch.setattr(OPEN_FILES, "limit", 1)
    remote = RemoteShards(tmp_path / "shards", 1, retries=0)  # nothing stays that is not read
    shards = [
        Shard(f"file://{write_tar(f'{number}.tar', members(number, 3))}", 3, remote=remote)
        for number in range(2)
    ]
    held = [[raw for _, raw in read_shard(shard)] for shard in shards]
    assert len(list((tmp_path / "shards").glob("*.shard"))) <= 2
    for _ in range(2):
        for number, samples in enumerate(held):
            assert [raw.read("txt") for raw in samples] == [
                b"%d of %d" % (index, number) for index in range(3)
            ]

"""The cache that fetched shards go into: its limit, what is in use, and many processes at once."""

import errno
import fcntl
import logging
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from aclip.data.shards import cache as shard_cache
from aclip.data.shards.cache import ShardCache


def fill(size: int):
    return lambda path: path.write_bytes(b"x" * size)


def shards_in(folder: Path) -> int:
    return len(list(folder.glob("*.shard")))


def test_the_cache_keeps_to_its_limit_and_drops_the_least_recently_opened(tmp_path):
    cache = ShardCache(tmp_path, 350)
    for name in "abc":
        cache.open(name, fill(100)).close()
    os.utime(next(tmp_path.glob("*-a.shard")), (1, 1))
    os.utime(next(tmp_path.glob("*-b.shard")), (2, 2))
    os.utime(next(tmp_path.glob("*-c.shard")), (3, 3))
    cache.open("a", fill(0)).close()  # is there, and now the most recent
    cache.open("d", fill(150)).close()
    assert [cache.holds(name) for name in "abcd"] == [True, False, True, True]


def test_a_shard_that_is_read_stays_and_an_overfull_cache_is_said(tmp_path, caplog):
    cache = ShardCache(tmp_path, 150)
    with cache.open("a", fill(100)) as first, caplog.at_level(logging.WARNING):
        cache.open("b", fill(100)).close()
        assert cache.holds("a") and first.read() == b"x" * 100
        assert "beyond its limit" in caplog.text
    cache.open("c", fill(100)).close()
    assert [cache.holds(name) for name in "abc"] == [False, False, True]


def test_the_cache_works_where_locks_want_a_file_that_can_be_written(tmp_path, monkeypatch):
    real = fcntl.flock

    def flock_over_nfs(file, operation):
        if operation & fcntl.LOCK_EX and not getattr(file, "writable", lambda: True)():
            raise OSError(errno.EBADF, "Bad file descriptor")
        return real(file, operation)

    monkeypatch.setattr(shard_cache.fcntl, "flock", flock_over_nfs)
    (tmp_path / f"killed.1{shard_cache.PARTIAL}").write_bytes(b"half")
    cache = ShardCache(tmp_path, 10)
    for url in ("a", "b", "c"):
        with cache.open(url, lambda path: path.write_bytes(bytes(8))) as file:
            assert len(file.read()) == 8
    left = {path.name for path in tmp_path.iterdir() if path.suffix != ".lock"}
    assert len(left) == 1 and cache.holds("c")


def test_a_failed_or_killed_transfer_leaves_no_shard_and_is_cleared_away(tmp_path):
    cache = ShardCache(tmp_path, 1000)

    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("broke")

    with pytest.raises(OSError, match="broke"):
        cache.open("a", fail)
    assert not cache.holds("a") and not list(tmp_path.glob("*.partial"))
    context = multiprocessing.get_context("fork")
    killed = context.Process(target=lambda: cache.open("b", lambda path: os.kill(os.getpid(), 9)))
    killed.start()
    killed.join()
    assert len(list(tmp_path.glob("*.partial"))) == 1 and not cache.holds("b")
    cache.open("b", fill(10)).close()
    assert not list(tmp_path.glob("*.partial")) and cache.holds("b")


def _read_many(folder: Path, seed: int) -> None:
    """Opens shards in an order of its own and checks every byte; exits non-zero if one is wrong."""
    cache = ShardCache(folder, 3500)
    for step in range(60):
        number = (seed * 7 + step * (seed + 1)) % 12
        content = bytes([number]) * 1000

        def fetch(path: Path, content=content) -> None:
            with open(folder / "fetched", "a") as log:
                log.write(".")
            path.write_bytes(content[:500])
            time.sleep(0.001)
            path.write_bytes(content)

        with cache.open(f"shard-{number}", fetch) as file:
            time.sleep(0.001)
            assert file.read() == content


def test_many_processes_share_a_small_cache_without_a_torn_file(tmp_path):
    context = multiprocessing.get_context("fork")
    readers = [context.Process(target=_read_many, args=(tmp_path, seed)) for seed in range(6)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(60)
    assert [reader.exitcode for reader in readers] == [0] * 6
    assert shards_in(tmp_path) * 1000 <= 3500 and not list(tmp_path.glob("*.partial"))


def test_processes_that_want_one_shard_fetch_it_once(tmp_path):
    def want() -> None:
        def fetch(path: Path) -> None:
            with open(tmp_path / "fetched", "a") as log:
                log.write(".")
            time.sleep(0.1)
            path.write_bytes(b"x")

        ShardCache(tmp_path, 100).open("a", fetch).close()

    context = multiprocessing.get_context("fork")
    readers = [context.Process(target=want) for _ in range(5)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(30)
    assert (tmp_path / "fetched").read_text() == "."

"""A cache folder that is full or can't be used is never taken for a shard that can't be read."""

import errno
import fcntl
import logging
import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_recipe import SMALL_RECIPE

from aclip.config.recipe import Recipe
from aclip.config.recipe_file import load_recipe
from aclip.data.find_data import find_data
from aclip.data.loader import build_train_loader
from aclip.data.shards import cache as shard_cache
from aclip.data.shards import counts
from aclip.data.shards import remote as remote_module
from aclip.data.shards.cache import CacheFull, ShardCache
from aclip.data.shards.listing import Shard, index_shards
from aclip.data.shards.remote import RemoteShards
from aclip.errors import ConfigError, DataError, NotWritten
from aclip.files import cache_folder

NUM_SHARDS, NUM_SAMPLES = 8, 6


class Disk:
    """Lets what is fetched into a folder fill no more than `capacity` bytes."""

    def __init__(self, folder: Path, capacity: int, code: int = errno.ENOSPC):
        self.folder, self.capacity, self.code = folder, capacity, code
        self.fetched: list[str] = []

    def write(self, path: Path, content: bytes, name: str = "") -> None:
        self.fetched.append(name)
        used = sum(file.stat().st_size for file in self.folder.glob("*.shard"))
        free = self.capacity - used
        path.write_bytes(content[: max(0, free)])
        if len(content) > free:
            raise OSError(self.code, os.strerror(self.code))

    def fill(self, size: int):
        return lambda path: self.write(path, bytes(size))


def shards_in(folder: Path) -> int:
    return len(list(folder.glob("*.shard")))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_makes_room_from_what_nobody_reads_and_fetches_again(tmp_path, code):
    cache, disk = ShardCache(tmp_path, 10**9), Disk(tmp_path, 350, code)
    for number, name in enumerate("abc"):
        cache.open(name, disk.fill(100)).close()
        os.utime(next(tmp_path.glob(f"*-{name}.shard")), (number, number))
    with cache.open("a", disk.fill(100)):  # is read, though it was the oldest
        cache.open("d", disk.fill(100)).close()
        assert [cache.holds(name) for name in "abcd"] == [True, False, True, True]
    assert len(disk.fetched) == 3 + 2  # d came at the second try
    assert not list(tmp_path.glob("*.partial"))


def test_a_disk_that_stays_full_is_named_with_the_folder_and_what_is_in_use(tmp_path):
    cache, disk = ShardCache(tmp_path, 100 * 10**9), Disk(tmp_path, 250)
    with cache.open("a", disk.fill(100)), cache.open("b", disk.fill(100)):
        with pytest.raises(CacheFull) as caught:
            cache.open("c", disk.fill(100))
        assert cache.holds("a") and cache.holds("b") and not cache.holds("c")
    assert str(caught.value) == (
        f"the cache folder {tmp_path} is full (No space left on device): 2 shards with 0.0 GB are "
        "in use there, and data.cache_gb would allow 100 GB; make room on that disk, set "
        "data.cache to a folder on a larger one, or, in a new run, lower data.lanes and "
        "data.shuffle_block, by which so many are read at once"
    )
    assert isinstance(caught.value, NotWritten) and not isinstance(caught.value, OSError)
    cache.open("c", disk.fill(100)).close()  # what is in use no longer makes room


def test_a_disk_that_is_nearly_full_keeps_room_for_another_shard(tmp_path, monkeypatch, caplog):
    used = lambda folder: SimpleNamespace(  # noqa: E731
        free=450 - sum(file.stat().st_size for file in folder.glob("*.shard"))
    )
    monkeypatch.setattr(shard_cache, "shutil", SimpleNamespace(disk_usage=used))
    cache, disk = ShardCache(tmp_path, 10**9), Disk(tmp_path, 450)
    for name in "abcdefgh":
        cache.open(name, disk.fill(100)).close()
        assert shards_in(tmp_path) <= 3
    assert len(disk.fetched) == 8 and caplog.text == ""  # none of them twice


@pytest.fixture
def limited(tmp_path, write_tar, encode_image, monkeypatch):
    """limited(capacity in shards) -> (urls, their local paths, the disk) of shards by commands."""
    monkeypatch.setenv("ACLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote_module, "FIRST_WAIT", 0.01)
    paths = []
    for shard in range(NUM_SHARDS):
        members = []
        for index in range(NUM_SAMPLES):
            members.append((f"{shard}-{index}.jpg", encode_image(40, 36, index)))
            members.append((f"{shard}-{index}.txt", b"a picture"))
        paths.append(write_tar(f"{shard}.tar", members))
    folder, size = tmp_path / "cache" / "shards", max(os.stat(path).st_size for path in paths)

    def limit(capacity: float, code: int = errno.ENOSPC):
        disk = Disk(folder, round(capacity * size), code)
        monkeypatch.setattr(
            remote_module,
            "_fetch",
            lambda url, path: disk.write(path, Path(url.split()[-1]).read_bytes(), url),
        )
        return [f"pipe:cat {path}" for path in paths], paths, disk

    return limit


def make_recipe(lanes: int = 2, workers: int = 0, **data) -> Recipe:
    return Recipe(
        model={"image": {"resolution": 16, "kwargs": {"patch_size": 8}}},
        teacher={"resolution": 16},
        data={"workers": workers, "lanes": lanes, "shuffle_block": 4, "retries": 1, **data},
        train={"global_batch_size": 4},
    )


def run(recipe: Recipe, urls: list[str], count: int = 13) -> list:
    remote = RemoteShards(cache_folder() / "shards", 10**12, recipe.data.retries)
    shards = [
        Shard(url, NUM_SAMPLES, remote=remote if url.startswith("pipe:") else None) for url in urls
    ]
    loader = iter(build_train_loader(recipe, shards, 0, 1))
    batches = [next(loader) for _ in range(count)]
    loader.close()
    return batches


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("policy", ["skip", "stop"])
def test_a_run_on_a_disk_smaller_than_cache_gb_reads_all_data(limited, policy, workers):
    urls, paths, _ = limited(5.5)  # two lanes whose blocks lie in two shards each
    batches = run(make_recipe(workers=workers, on_shard_error=policy), urls)
    expected = run(make_recipe(), paths)
    assert [batch.keys for batch in batches] == [batch.keys for batch in expected]
    assert not any(batch.skipped for batch in batches)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("policy", ["skip", "stop"])
def test_a_disk_too_small_for_the_lanes_ends_the_run_with_its_own_sentence(
    limited, caplog, policy, workers
):
    urls, _, _ = limited(1.5)
    with caplog.at_level(logging.WARNING), pytest.raises(NotWritten) as caught:
        run(make_recipe(workers=workers, on_shard_error=policy), urls)
    assert str(caught.value).startswith("the cache folder ") and "is full" in str(caught.value)
    assert not isinstance(caught.value, DataError)
    assert "can't be read" not in caplog.text and "check the address" not in str(caught.value)


def test_counting_on_a_small_disk_goes_through_all_shards_and_says_when_it_can_not(
    limited, tmp_path, monkeypatch
):
    monkeypatch.setattr(counts, "SCAN_THREADS", 1)
    urls, _, disk = limited(1.5)
    remote = RemoteShards(cache_folder() / "shards", 10**12, retries=0)
    assert [shard.num_samples for shard in index_shards(urls, remote)] == [NUM_SAMPLES] * 8
    shutil.rmtree(tmp_path / "cache")
    urls, _, disk = limited(0.5)
    with pytest.raises(CacheFull):
        index_shards(urls, remote)
    assert len(set(disk.fetched)) == len(disk.fetched)  # and not once more without a cache


def test_a_full_disk_is_tried_again_while_others_use_it(limited, monkeypatch):
    urls, _, _ = limited(1.5)
    remote = RemoteShards(cache_folder() / "shards", 10**12, retries=5)
    monkeypatch.setattr(remote_module, "FIRST_WAIT", 0.1)
    held = remote.open(urls[0])
    threading.Timer(0.2, held.close).start()
    remote.open(urls[1]).close()


def test_a_full_disk_is_recognised_in_what_a_protocols_client_raises(monkeypatch):
    def use(*_):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("the client's own class") from error

    with pytest.raises(OSError, match="No space") as caught:
        remote_module._through_fsspec("memory://b/x.tar", use)
    assert caught.value.errno == errno.ENOSPC


def find_remote(cache: Path):
    overrides = [f"data.cache={cache}", "data.train=pipe:cat x.tar", "data.val=[]"]
    return find_data(load_recipe(SMALL_RECIPE, overrides))


def test_a_cache_folder_that_can_not_be_made_is_refused_before_anything_is_fetched(tmp_path):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "cache"
    with pytest.raises(ConfigError, match=rf"^data.cache is {folder}, which can't be written"):
        find_remote(folder)
    with pytest.raises(NotWritten, match=rf"^data.cache is {folder}, which can't be written \(Not"):
        RemoteShards(folder, 1, retries=3).open("pipe:exit 3")


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    words = rf"^data.cache is {tmp_path}, whose file system knows no locks \(.*local disk$"
    with pytest.raises(ConfigError, match=words):
        find_remote(tmp_path)
    with pytest.raises(NotWritten, match=words):
        ShardCache(tmp_path, 100).open("a", lambda path: path.write_bytes(b"x"))


def test_a_user_without_a_home_is_told_to_set_the_cache(monkeypatch):
    monkeypatch.delenv("ACLIP_CACHE", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(ConfigError, match="^ACLIP_CACHE is not set, and this user has no home"):
        cache_folder()

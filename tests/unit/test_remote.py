"""Shards over HTTP and from commands, by servers that fail in every way; the cache they go into."""

import logging
import os
import threading
import time
from collections import Counter
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from aclip.config.recipe import Recipe
from aclip.data.loader import build_train_loader
from aclip.data.shards import remote as remote_module
from aclip.data.shards.listing import Shard, index_shards, list_shards, read_shard
from aclip.data.shards.remote import RemoteShards
from aclip.data.shards.tar import ShardError
from aclip.errors import ConfigError, DataError

NUM_SAMPLES = 6


class ShardServer:
    """HTTP on 127.0.0.1; `failures[name]` lists how the next requests of a file go wrong."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.failures: dict[str, list[str]] = {}
        self.requests: Counter[str] = Counter()
        self.closing = threading.Event()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):  # noqa: N802 - the base class names it
                owner.answer(self)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def answer(self, handler) -> None:
        name = handler.path.lstrip("/")
        self.requests[name] += 1
        failures = self.failures.get(name, [])
        failure = failures[0] if failures == ["always"] else failures.pop(0) if failures else ""
        if failure.startswith("always "):
            failures.insert(0, failure)
            failure = failure.removeprefix("always ")
        path = self.folder / name
        if failure.isdigit() or not path.is_file():
            handler.send_error(int(failure or 404))
            return
        content = path.read_bytes()
        if failure == "drop":
            handler.connection.close()
            return
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content[: len(content) // 2] if failure else content)
        if failure == "stall":
            self.closing.wait(20)
        if failure:  # half a file
            handler.connection.close()

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("ACLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote_module, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(remote_module, "STALL", 0.5)
    server = ShardServer(tmp_path)
    yield server
    server.close()


@pytest.fixture
def remote(tmp_path):
    return RemoteShards(tmp_path / "shards", 10**9, retries=3)


@pytest.fixture
def write_shard(write_tar, encode_image):
    def write(name: str) -> str:
        members = []
        for index in range(NUM_SAMPLES):
            members.append((f"{name}-{index}.jpg", encode_image(40, 36, index)))
            members.append((f"{name}-{index}.txt", b"a picture"))
        return write_tar(f"{name}.tar", members)

    return write


def keys(shard: Shard) -> list[str]:
    return [sample.key for _, sample in read_shard(shard)]


def test_a_shard_over_http_holds_what_the_file_does_and_is_fetched_once(
    server, remote, write_shard
):
    local = write_shard("a")
    shard = Shard(f"{server.address}/a.tar", NUM_SAMPLES, remote=remote)
    for _ in range(2):
        found = [
            (sample.key, sample.read("jpg"), sample.read("txt")) for _, sample in read_shard(shard)
        ]
        assert found == [
            (sample.key, sample.read("jpg"), sample.read("txt"))
            for _, sample in read_shard(Shard(local, NUM_SAMPLES))
        ]
    assert server.requests == {"a.tar": 1}


@pytest.mark.parametrize("failure", ["drop", "stall", "half", "500", "503"])
def test_a_failure_that_passes_is_tried_again(server, remote, write_shard, failure):
    write_shard("a")
    server.failures["a.tar"] = [failure] * 2
    shard = Shard(f"{server.address}/a.tar", NUM_SAMPLES, remote=remote)
    assert keys(shard) == [f"a-{index}" for index in range(NUM_SAMPLES)]
    assert server.requests["a.tar"] == 3


@pytest.mark.parametrize(
    ("failure", "requests"),
    # aiohttp asks once more by itself after a dropped connection.
    [("drop", 8), ("stall", 4), ("half", 4), ("500", 4), ("404", 1)],
)
def test_a_failure_that_stays_ends_with_the_shards_name_and_leaves_nothing(
    server, remote, write_shard, failure, requests
):
    write_shard("a")
    server.failures["a.tar"] = [f"always {failure}"]
    url = f"{server.address}/a.tar"
    start = time.monotonic()
    with pytest.raises(ShardError, match=f"^shard {url} can't be read: [^\n]*; check the address$"):
        keys(Shard(url, NUM_SAMPLES, remote=remote))
    assert time.monotonic() - start < 20
    assert server.requests["a.tar"] == requests
    assert [path for path in remote.folder.iterdir() if not path.name.endswith(".lock")] == []


def test_waits_double_up_to_a_limit(server, remote, monkeypatch):
    waits = []
    monkeypatch.setattr(remote_module, "FIRST_WAIT", 1.0)
    monkeypatch.setattr(remote_module, "time", SimpleNamespace(sleep=waits.append))
    with pytest.raises(OSError, match=r"status 3 \(10 tries\)"):
        replace(remote, retries=9).open("pipe:exit 3")
    expected = [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert len(waits) == 9
    for wait, middle in zip(waits, expected, strict=True):
        assert 0.5 * middle <= wait <= 1.5 * middle


def test_a_run_over_http_survives_failures_and_gives_the_local_order(server, write_shard, tmp_path):
    paths = [write_shard(f"s{index}") for index in range(4)]
    (tmp_path / "sizes.json").write_text(
        str({f"s{i}.tar": NUM_SAMPLES for i in range(4)}).replace("'", '"')
    )
    server.failures = {
        "sizes.json": ["500"],
        "s0.tar": ["drop", "half"],
        "s1.tar": ["stall"],
        "s2.tar": ["503"],
    }
    batches = run(make_recipe(workers=2), addresses(server), 6)
    expected = run(make_recipe(workers=0), paths, 6)
    assert [batch.keys for batch in batches] == [batch.keys for batch in expected]
    for first, second in zip(batches, expected, strict=True):
        assert (first.student_views == second.student_views).all()


@pytest.mark.parametrize("failure", ["404", "500", "half"])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_policy_decides_whether_a_run_outlives_a_lost_shard(
    server, write_shard, tmp_path, caplog, failure, workers
):
    paths = [write_shard(f"s{index}") for index in range(4)]
    (tmp_path / "sizes.json").write_text(
        str({f"s{i}.tar": NUM_SAMPLES for i in range(4)}).replace("'", '"')
    )
    server.failures["s2.tar"] = [f"always {failure}"]
    with pytest.raises(DataError, match=r"^shard \S*/s2\.tar can't be read: [^\n]*$"):
        run(make_recipe(workers=workers), addresses(server), 6)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        batches = run(make_recipe(workers=workers, on_shard_error="skip"), addresses(server), 6)
    found = [key for batch in batches for key in batch.keys]
    assert not any(key.startswith("s2/") for key in found)
    skipped = sum((Counter(batch.skipped) for batch in batches), Counter())
    assert skipped["unreadable_shard"] >= NUM_SAMPLES and set(skipped) == {"unreadable_shard"}
    assert "s2.tar can't be read" in caplog.text and "its samples are skipped" in caplog.text
    everything = [key for batch in run(make_recipe(workers=0), paths, 6) for key in batch.keys]
    by_lane = [key for key in everything if not key.startswith("s2/")]
    assert set(found) == set(by_lane)


def addresses(server) -> list[str]:
    return list_shards(f"{server.address}/s{{0..3}}.tar", "data.train")


def make_recipe(workers: int, **data) -> Recipe:
    return Recipe(
        model={"image": {"resolution": 16, "kwargs": {"patch_size": 8}}},
        teacher={"resolution": 16},
        data={"workers": workers, "lanes": 2, "shuffle_block": 4, "retries": 2, **data},
        train={"global_batch_size": 4},
    )


def run(recipe: Recipe, urls: list[str], count: int) -> list:
    remote = RemoteShards(Path(os.environ["ACLIP_CACHE"]) / "shards", 10**9, recipe.data.retries)
    loader = iter(build_train_loader(recipe, index_shards(urls, remote=remote), 0, 1))
    batches = [next(loader) for _ in range(count)]
    loader.close()
    return batches


def test_counts_come_from_the_sizes_file_beside_the_shards(server, remote, tmp_path):
    (tmp_path / "sizes.json").write_text('{"a.tar": 7, "b.tar": 9}')
    urls = [f"{server.address}/{name}.tar?token=x/y" for name in "ba"]
    shards = index_shards(urls, remote=remote)
    assert shards == [Shard(urls[0], 9, 0, remote), Shard(urls[1], 7, 0, remote)]
    assert server.requests == {"sizes.json": 1}


def test_without_a_sizes_file_shards_are_counted_once_and_the_cost_is_said(
    server, remote, write_shard, caplog
):
    write_shard("a")
    url = f"{server.address}/a.tar"
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert index_shards([url], remote=remote) == [Shard(url, NUM_SAMPLES, 0, remote)]
    assert server.requests == {"sizes.json": 2, "a.tar": 1}
    assert caplog.text.count("fetched whole to count") == 1


def test_a_sizes_file_that_can_not_be_read_or_understood_is_named(server, remote, tmp_path):
    (tmp_path / "sizes.json").write_text("[")
    with pytest.raises(ConfigError, match=f"^{server.address}/sizes.json is not a list of shards"):
        index_shards([f"{server.address}/a.tar"], remote=remote)
    server.failures["sizes.json"] = ["always 500"]
    with pytest.raises(ConfigError, match="sizes.json can't be read: .*500"):
        index_shards([f"{server.address}/a.tar"], remote=remote)


def test_a_command_gives_a_shard(remote, write_shard):
    path = write_shard("a")
    shard = Shard(f"pipe:gzip -c {path} | gunzip", NUM_SAMPLES, remote=remote)
    assert keys(shard) == [f"a-{index}" for index in range(NUM_SAMPLES)]
    assert index_shards([shard.url], remote=remote) == [shard]


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("exit 3", "status 3"),
        ("false | cat", "status 1"),
        ("head -c 100 /dev/zero; exit 4", "status 4"),
        ("sleep 30 | cat", "wrote nothing for 0.5 s"),
    ],
)
def test_a_command_that_fails_or_hangs_is_named_with_its_reason(server, remote, command, reason):
    with pytest.raises(ShardError, match=f"^shard pipe:.* can't be read: .*{reason}"):
        keys(Shard(f"pipe:{command}", 1, remote=remote))


def test_braces_of_a_command_are_its_own_unless_they_are_a_range():
    command = r"pipe:cat {0..1}/{08..10}.tar | awk '{print $1,$2}' | tr '\n' x"
    listed = list_shards(command, "data.train")
    assert len(listed) == 6
    assert listed[0] == r"pipe:cat 0/08.tar | awk '{print $1,$2}' | tr '\n' x"
    assert listed[-1].startswith("pipe:cat 1/10.tar | awk")


def test_any_protocol_of_fsspec_is_read(remote, write_shard):
    import fsspec

    fsspec.filesystem("memory").pipe("/bucket/a.tar", Path(write_shard("a")).read_bytes())
    shard = Shard("memory://bucket/a.tar", NUM_SAMPLES, remote=remote)
    assert keys(shard) == [f"a-{index}" for index in range(NUM_SAMPLES)]

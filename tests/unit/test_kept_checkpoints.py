"""Which checkpoints stay, and what is copied elsewhere."""

import threading

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from aclip.errors import ConfigError
from aclip.run_folder import checkpoint_folder
from aclip.training.upload import Uploader

LIMIT = 30.0


def _make(root, samples, content="weights"):
    folder = root / f"samples-{samples:012d}"
    partial = folder.with_suffix(".tmp")
    partial.mkdir(parents=True)
    (partial / "student.safetensors").write_text(content)
    (partial / "state.json").write_text("{}")
    checkpoint_folder.publish(root, partial, folder)
    return folder


def _samples(root):
    return [checkpoint_folder.num_samples(path) for path in checkpoint_folder.complete(root)]


@pytest.mark.parametrize(
    "keep, keep_every, stay",
    [
        pytest.param(2, 0, [160, 176], id="the newest two"),
        # The first ones at or after 50, 100 and 150.
        pytest.param(1, 50, [64, 112, 160, 176], id="the newest and milestones"),
        pytest.param(3, 1000, [144, 160, 176], id="no milestone reached"),
        pytest.param(1, 16, list(range(16, 177, 16)), id="each one"),
    ],
)
def test_newest_and_every_so_many_samples_stay(tmp_path, keep, keep_every, stay):
    for samples in range(16, 177, 16):
        newest = _make(tmp_path, samples)
        checkpoint_folder.prune(tmp_path, newest, keep, keep_every)
    assert _samples(tmp_path) == stay


def test_spared_checkpoint_stays_until_it_is_not_spared(tmp_path):
    first, second, third = (_make(tmp_path, samples) for samples in (16, 32, 48))
    checkpoint_folder.prune(tmp_path, third, keep=1, spared={first})
    assert _samples(tmp_path) == [16, 48]
    checkpoint_folder.prune(tmp_path, third, keep=1)
    assert _samples(tmp_path) == [48]


@pytest.mark.parametrize("keep_every", [0, 16])
def test_folder_of_another_name_is_the_users_and_takes_no_place(tmp_path, keep_every):
    names = ["samples-000000000008-best", "samples-best", "samples-16", "samples-0000000000160"]
    for name in names:
        _make(tmp_path, 8).rename(tmp_path / name)
    for samples in (16, 32, 48):
        newest = _make(tmp_path, samples)
        checkpoint_folder.remove_partial(tmp_path)
        checkpoint_folder.prune(tmp_path, newest, keep=2, keep_every=keep_every)
    left = {path.name for path in tmp_path.iterdir()}
    kept = {f"samples-{n:012d}" for n in ((16, 32, 48) if keep_every else (32, 48))}
    assert left == {*names, *kept, "latest"}
    for name in names:
        assert checkpoint_folder.find(tmp_path, str(tmp_path / name)) == tmp_path / name
    # `latest` that names nothing: a copy does not stand in for the newest one.
    (tmp_path / "latest").write_text("gone")
    assert checkpoint_folder.find(tmp_path, "auto") == newest


def test_link_to_where_a_checkpoint_was_moved_is_followed_and_not_removed(tmp_path):
    root, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    link = _make(root, 16)
    link.rename(elsewhere)
    link.symlink_to(elsewhere)
    assert checkpoint_folder.find(root, "auto") == link
    for samples in (32, 48):
        newest = _make(root, samples)
        checkpoint_folder.prune(root, newest, keep=1)
    assert _samples(root) == [16, 48] and (elsewhere / "manifest.json").is_file()
    # Reached again from an older one: the link goes, and what it leads to stays.
    assert not _make(root, 16).is_symlink()
    assert (elsewhere / "manifest.json").is_file()


def test_what_a_kill_left_of_the_pointer_is_removed(tmp_path):
    folder = _make(tmp_path, 16)
    (tmp_path / "latest.4711.tmp").write_text("samples-0")
    checkpoint_folder.remove_partial(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", folder.name]
    assert checkpoint_folder.find(tmp_path, "auto") == folder


def test_upload_is_a_checkpoint_that_can_be_verified(tmp_path):
    folder = _make(tmp_path / "local", 16)
    uploader = Uploader(f"file://{tmp_path}/remote/run")
    uploader.put(folder)
    uploader.close()
    remote = tmp_path / "remote/run"
    assert checkpoint_folder.find(remote, "auto") == remote / folder.name
    assert checkpoint_folder.verify(remote / folder.name) is None


class SlowFiles(MemoryFileSystem):
    """A memory of its own, whose files arrive one permit at a time."""

    protocol = "slow"
    cachable = False
    store: dict = {}
    pseudo_dirs = [""]
    permits = threading.Semaphore(0)
    arrived: list = []

    def put_file(self, local, remote, **options):
        assert self.permits.acquire(timeout=LIMIT)
        super().put_file(local, remote, **options)
        self.arrived.append(remote.rsplit("/", 2)[-2:])


@pytest.fixture
def slow():
    fsspec.register_implementation("slow", SlowFiles, clobber=True)
    SlowFiles.permits = threading.Semaphore(0)
    SlowFiles.arrived = []
    yield SlowFiles
    SlowFiles.permits.release(100)


def test_manifest_comes_last_and_a_waiting_upload_gives_way_to_a_newer_one(tmp_path, slow, capsys):
    uploader = Uploader("slow://bucket/run")
    folders = [_make(tmp_path, samples) for samples in (16, 32, 48)]
    uploader.put(folders[0])
    slow.permits.release(1)
    while not slow.arrived:  # so that the first is on its way
        pass
    uploader.put(folders[1])
    uploader.put(folders[2])
    assert uploader.unfinished == {folders[0], folders[2]}
    slow.permits.release(5)
    uploader.close()
    names = ["state.json", "student.safetensors", "manifest.json"]
    assert slow.arrived == [[f.name, name] for f in (folders[0], folders[2]) for name in names]
    assert uploader.unfinished == set()
    assert f"{folders[1].name} is not uploaded" in capsys.readouterr().out
    assert uploader._files.cat_file(f"{uploader._root}/latest") == folders[2].name.encode()


def test_failed_upload_is_said_and_raises_nothing(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    folder = _make(tmp_path / "local", 16)
    uploader = Uploader(f"file://{tmp_path}/file/run")
    uploader.put(folder)
    uploader.close()
    said = capsys.readouterr().out
    assert folder.name in said and f"{tmp_path}/file/run" in said and "the run goes on" in said


def test_unknown_url_is_one_sentence():
    with pytest.raises(ConfigError, match="train.upload_to is nothing://x"):
        Uploader("nothing://x")

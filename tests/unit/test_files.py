"""A file appears whole or not at all, and what a kill leaves can be told from it."""

import errno
import os
import re
import stat
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from aclip.errors import ConfigError, NotWritten
from aclip.files import (
    appearing,
    appearing_folder,
    append,
    check_writable,
    make_folder,
    remove_leftovers,
    write_whole,
    writing,
)
from aclip.run_folder.checkpoint_folder import publish


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_file_has_its_name_only_once_it_is_whole(tmp_path):
    path = tmp_path / "a.tar"
    path.write_text("before")
    with appearing(path) as temporary:
        temporary.write_text("af")
        assert path.read_text() == "before" and temporary.parent == tmp_path
        with open(temporary, "a") as file:
            file.write("ter")
    assert path.read_text() == "after" and names(tmp_path) == ["a.tar"]


@pytest.mark.parametrize(
    ("error", "reported"), [(OSError, NotWritten), (KeyboardInterrupt, KeyboardInterrupt)]
)
def test_nothing_is_left_of_what_failed_and_the_file_before_stays(tmp_path, error, reported):
    path = tmp_path / "a.tar"
    path.write_text("before")
    with pytest.raises(reported), appearing(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "before" and names(tmp_path) == ["a.tar"]


def test_bytes_are_on_the_disk_before_the_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    events, opened = [], {}
    fsync, replace, os_open = os.fsync, os.replace, os.open

    def open_noting(name, *args, **options):
        descriptor = os_open(name, *args, **options)
        opened[descriptor] = name
        return descriptor

    def fsync_noting(descriptor):
        events.append("bytes" if opened[descriptor] != tmp_path else "folder")
        fsync(descriptor)

    def replace_noting(source, target):
        events.append("name")
        replace(source, target)

    monkeypatch.setattr(os, "open", open_noting)
    monkeypatch.setattr(os, "fsync", fsync_noting)
    monkeypatch.setattr(os, "replace", replace_noting)
    write_whole(tmp_path / "a.json", b"{}")
    assert events == ["bytes", "name", "folder"]


def test_what_a_killed_process_left_is_written_over_or_removed(tmp_path):
    path = tmp_path / "plan.sqlite"
    with appearing(path) as temporary:
        temporary.write_text("1")
    temporary.write_text("half, by a killed process that had this one's number")
    with appearing(path) as again:
        assert again == temporary and not again.exists()
        again.write_text("2")
    assert path.read_text() == "2"
    kept = ["plan.sqlite", "samples-000000000016.tmp", "scene.tmp"]
    for name in (*kept[1:], temporary.name, "00000.tar.4711.tmp"):
        (tmp_path / name).touch()
    (tmp_path / "export.4711.tmp" / "inner").mkdir(parents=True)
    remove_leftovers(tmp_path)
    assert names(tmp_path) == kept


def test_folder_that_can_not_be_written_is_named_with_its_option(tmp_path):
    check_writable(tmp_path / "new", "--output")
    assert names(tmp_path) == ["new"] and names(tmp_path / "new") == []
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=f"^--out is {tmp_path}/file/x, which can't be written"):
        check_writable(tmp_path / "file" / "x", "--out")


def test_full_disk_is_said_in_one_sentence_that_names_the_file(tmp_path):
    path = tmp_path / "results.json"
    with pytest.raises(NotWritten) as raised, writing(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert str(raised.value) == (
        f"{path} can't be written (No space left on device); make room there, or write to another "
        "disk"
    )


@pytest.mark.parametrize("write", [make_folder, lambda path: write_whole(path, "x")])
def test_place_below_a_file_is_said_in_one_sentence(tmp_path, write):
    (tmp_path / "file").touch()
    with pytest.raises(NotWritten, match=r"file/x can't be written \(.*\); make it writable, or"):
        write(tmp_path / "file" / "x")


def test_error_about_another_file_is_not_taken_for_a_failed_write(tmp_path):
    absent = tmp_path / "source" / "absent.jpg"
    with pytest.raises(FileNotFoundError), appearing(tmp_path / "out" / "a.tar"):
        absent.read_bytes()
    assert names(tmp_path / "out") == []


def test_folder_has_its_name_only_once_it_is_filled(tmp_path):
    out = tmp_path / "export"
    with appearing_folder(out) as partial:
        (partial / "model.safetensors").write_text("1")
        assert not out.exists()
    assert names(tmp_path) == ["export"] and names(out) == ["model.safetensors"]
    with pytest.raises(NotWritten, match="export can't be written"), appearing_folder(out):
        pass
    assert names(tmp_path) == ["export"] and names(out) == ["model.safetensors"]


def test_who_may_read_a_folder_may_read_the_weights_in_it(tmp_path):
    before = os.umask(0o027)
    try:
        with appearing_folder(tmp_path / "export") as export:
            save_file({"a": torch.zeros(1)}, export / "model.safetensors")
        root, partial = tmp_path / "checkpoints", tmp_path / "checkpoints" / "partial.tmp"
        partial.mkdir(parents=True)
        save_file({"a": torch.zeros(1)}, partial / "student.safetensors")
        publish(root, partial, root / "samples-1")
    finally:
        os.umask(before)
    for path in (tmp_path / "export" / "model.safetensors", root / "samples-1/student.safetensors"):
        assert stat.filemode(path.stat().st_mode) == "-rw-r-----"


def test_line_that_does_not_fit_is_cut_off_again(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    append(path, b"one\n")

    class FullDisk:
        def __init__(self, *args, **options):
            self.file = opened(*args, **options)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def write(self, content):
            return self.file.write(content[:2])

        def __getattr__(self, name):
            return getattr(self.file, name)

    opened = open
    monkeypatch.setattr("builtins.open", FullDisk)
    with pytest.raises(NotWritten, match="No space left"):
        append(path, b"two\n")
    monkeypatch.undo()
    append(path, b"three\n")
    assert path.read_text() == "one\nthree\n"


def test_full_disk_under_safetensors_is_a_failed_write_too(tmp_path):
    """Its own error says so in words alone; another error of it is not about the disk."""
    path = tmp_path / "a.safetensors"
    with pytest.raises(NotWritten, match="can't be written .No space left"), writing(path):
        raise SafetensorError("I/O error: No space left on device (os error 28)")
    with pytest.raises(SafetensorError), writing(path):
        raise SafetensorError("InvalidHeaderLength")


RAW_WRITE = re.compile(
    r"""open\([^)]*["'][wax]b?["']|os\.(replace|rename|makedirs)|\.(write_text|write_bytes|mkdir|touch)\("""
    r"|torch\.save\(|save_file\(|savefig\("
)
ALLOWED = {
    # Inside of `appearing` and `appearing_folder`, or of a folder that appears as they do.
    "benchmarks/scaling.py",
    "data/convert/shard_writer.py",
    "data/convert/sources/yfcc_list.py",
    "data/demo.py",
    "run_folder/checkpoint_folder.py",
    "run_folder/earlier.py",
    "training/checkpoint.py",
    "weights/card/card.py",
    "weights/formats/plain.py",
    "weights/push.py",
    "weights/write_export.py",
    # The lock of a model in Hugging Face's cache.
    "weights/hub_weights.py",
    # The cache of shards, which has its own way to appear, and to make room.
    "data/shards/cache.py",
    "data/shards/remote.py",
    # Temporary files, a token, logs that started processes write, a switch of the kernel.
    "ablation/runner.py",
    "ablation/timing.py",
    "benchmarks/loading.py",
    "benchmarks/parts.py",
    "benchmarks/peak_memory.py",
    "benchmarks/step_cost.py",
    "nodes/probe.py",
}


def test_writes_go_through_the_one_place_that_says_what_failed():
    package = Path(__file__).parents[2] / "aclip"
    writing = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if RAW_WRITE.search(path.read_text())
    }
    assert writing - {"files.py"} == ALLOWED

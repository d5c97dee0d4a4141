"""A file appears whole or not at all, and what a kill leaves can be told from it."""

import os

import pytest

from aclip.errors import ConfigError
from aclip.files import appearing, check_writable, remove_leftovers, write_whole


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


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_nothing_is_left_of_what_failed_and_the_file_before_stays(tmp_path, error):
    path = tmp_path / "a.tar"
    path.write_text("before")
    with pytest.raises(error), appearing(path) as temporary:
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
    remove_leftovers(tmp_path)
    assert names(tmp_path) == kept


def test_folder_that_can_not_be_written_is_named_with_its_option(tmp_path):
    check_writable(tmp_path / "new", "--output")
    assert names(tmp_path) == ["new"] and names(tmp_path / "new") == []
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=f"^--out is {tmp_path}/file/x, which can't be written"):
        check_writable(tmp_path / "file" / "x", "--out")

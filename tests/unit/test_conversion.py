"""A conversion that was finished, stopped, or begun from something else."""

import os
from dataclasses import replace

import pytest
from convert_sources import GOOD, IMAGES, make_coco, make_folder, make_job, make_redcaps, write_file

from aclip.data.convert import conversion
from aclip.data.convert.conversion import run
from aclip.data.convert.images import ImageRule
from aclip.errors import ConfigError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ACLIP_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("make", [make_folder, make_coco])
def test_the_same_command_after_the_end_changes_nothing_and_says_so(tmp_path, capsys, make):
    source, _, _ = make(tmp_path)
    report = run(make_job(tmp_path, source), processes=1)
    assert capsys.readouterr().out == ""
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert run(make_job(tmp_path, source), processes=1) == report
    assert capsys.readouterr().out == (
        f"{tmp_path}/out is already finished, so nothing was read; give another --out, or delete "
        "the folder, to convert again\n"
    )
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == stamps


def add_pair(pairs):
    write_file(pairs / "k" / "new.jpg", IMAGES["jpeg"])
    write_file(pairs / "k" / "new.txt", b"text")


CHANGES = {
    "a pair comes": add_pair,
    "an image without a caption comes": lambda pairs: write_file(pairs / "new.jpg", b"x"),
    "an image goes": lambda pairs: (pairs / "c" / "a.b cmyk é.jpg").unlink(),
    "an image changes": lambda pairs: os.utime(pairs / "c" / "a.b cmyk é.jpg", (1, 1)),
    "a caption changes": lambda pairs: (pairs / "c" / "a.b cmyk é.txt").write_text("text"),
    "an image moves": lambda pairs: (pairs / "c").rename(pairs / "moved"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_folder_that_has_changed_since_is_refused(tmp_path, change):
    source, _, _ = make_folder(tmp_path)
    run(make_job(tmp_path, source), processes=1)
    (tmp_path / "pairs" / "notes.json").write_text("[1, 2]")  # is not of the source
    run(make_job(tmp_path, source), processes=1)
    change(tmp_path / "pairs")
    with pytest.raises(ConfigError, match=r"--out is .*changed since"):
        run(make_job(tmp_path, source), processes=1)


def test_a_stopped_conversion_of_a_folder_continues_unless_it_has_changed(tmp_path, monkeypatch):
    source, _, _ = make_folder(tmp_path)
    (tmp_path / "pairs" / "nowhere.jpg").symlink_to(tmp_path / "gone")
    write_file(tmp_path / "pairs" / "nowhere.txt", b"text")
    job = replace(make_job(tmp_path, source), out=tmp_path / "pairs" / "out")

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "make_report", stop)
        with pytest.raises(KeyboardInterrupt):
            run(job, processes=1)
    stamps = {path: path.stat().st_mtime_ns for path in job.out.glob("*.tar")}
    assert stamps
    added = tmp_path / "pairs" / "new.jpg"
    added.write_bytes(IMAGES["jpeg"])
    with pytest.raises(ConfigError, match=r"--out is .*changed since"):
        run(job, processes=1)
    added.unlink()
    assert run(job, processes=1)["samples"] == len(GOOD)
    assert {path: path.stat().st_mtime_ns for path in job.out.glob("*.tar")} == stamps


def test_another_conversion_in_the_same_folder_is_refused(tmp_path):
    source, _, _ = make_redcaps(tmp_path, in_one_file=True)
    run(make_job(tmp_path, source), processes=1)
    with pytest.raises(ConfigError, match=r"--out is .*other arguments"):
        run(make_job(tmp_path, source, ImageRule(32)), processes=1)
    (tmp_path / "redcaps_v1.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"--out is .*changed since"):
        run(make_job(tmp_path, source), processes=1)


def test_a_folder_that_holds_something_else_is_refused(tmp_path):
    source, _, _ = make_folder(tmp_path)
    write_file(tmp_path / "out" / "thesis.tex", b"x")
    with pytest.raises(ConfigError, match=r"--out is .*not empty"):
        run(make_job(tmp_path, source), processes=1)

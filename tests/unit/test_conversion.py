"""A conversion that was finished, stopped, or begun from something else."""

import multiprocessing
import os
import shutil
from dataclasses import replace

import pytest
from convert_sources import (
    GOOD,
    IMAGES,
    make_coco,
    make_folder,
    make_job,
    make_redcaps,
    make_table,
    write_file,
)

from aclip.data.convert import conversion
from aclip.data.convert.conversion import run
from aclip.data.convert.images import ImageRule
from aclip.data.convert.sources.folder import folder_source
from aclip.data.convert.sources.table import table_source
from aclip.errors import ConfigError, NotWritten
from aclip.lock import claim, release


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
    words = r"--out is .*other arguments.*\(--min-side was 16 and is 32; --short-side was not given"
    with pytest.raises(ConfigError, match=words):
        run(make_job(tmp_path, source, ImageRule(32, 64)), processes=1)
    (tmp_path / "redcaps_v1.json").write_text("[]")
    words = r"--out is .*changed since \(the file .*redcaps_v1\.json was changed\)"
    with pytest.raises(ConfigError, match=words):
        run(make_job(tmp_path, source), processes=1)


def test_a_folder_that_holds_something_else_is_refused(tmp_path):
    source, _, _ = make_folder(tmp_path)
    write_file(tmp_path / "out" / "thesis.tex", b"x")
    with pytest.raises(ConfigError, match=r"--out is .*not empty \(thesis\.tex\)"):
        run(make_job(tmp_path, source), processes=1)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def stop(*_):
    raise KeyboardInterrupt


def test_a_corrected_command_begins_anew_where_no_shard_was_finished(tmp_path, monkeypatch):
    source, expected, _ = make_table(tmp_path, "csv")
    wrong = replace(make_job(tmp_path, source), arguments={"source": "test", "no_quotes": True})
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "write_shards", stop)
        with pytest.raises(KeyboardInterrupt):
            run(wrong, processes=1)
    assert run(make_job(tmp_path, source), processes=1)["samples"] == len(expected)


def test_other_arguments_are_named_where_a_shard_was_finished(tmp_path, monkeypatch):
    source, _, _ = make_table(tmp_path, "csv")
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "make_report", stop)
        with pytest.raises(KeyboardInterrupt):
            run(make_job(tmp_path, source), processes=1)
    shards = sorted((tmp_path / "out").glob("*.tar"))
    with pytest.raises(ConfigError, match=r"changed since \(--shard-size was 5 and is 4\); give"):
        run(make_job(tmp_path, source, shard_size=4), processes=1)
    assert sorted((tmp_path / "out").glob("*.tar")) == shards


def test_a_conversion_that_gives_nothing_says_why_and_leaves_its_folder_free(tmp_path, capsys):
    write_file(tmp_path / "images" / "a.jpg", IMAGES["jpeg"])
    (tmp_path / "t.csv").write_text("filepath,caption\na.jpg,one\nb.jpg,\n")

    def job(images: str | None):
        source = table_source(str(tmp_path / "t.csv"), images, "filepath", ["caption"])
        return make_job(tmp_path, source)

    words = (
        rf"no entry of the source became a sample \(no_image 1, empty_caption 1\); no_image means: "
        rf"the image is not there, e\.g\. a: no file a\.jpg in {tmp_path} \(.*report\.json has more"
    )
    with pytest.raises(ConfigError, match=words):
        run(job(None), processes=1)
    table = capsys.readouterr().out
    assert (
        "skipped          2" in table and "  empty_caption  1  no caption, or only blank" in table
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.json"]
    assert run(job(str(tmp_path / "images")), processes=1)["samples"] == 1


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ((), r"the source holds no entry; check it"),
        (("a.xml", "b.xml", "Thumbs.db"), r"no entry, only litter 1, other_file \(\.xml\) 2;"),
        (("a.heic", "a.txt"), r"\(unsupported_format \(\.heic\) 1\)"),
        (("a.jpg",), r"no_caption means: the caption is not there, e\.g\. a: no \.txt, "),
        (("a.txt",), r"no_image means: the image is not there, e\.g\. a: no image beside a\.txt"),
    ],
)
def test_a_folder_that_gives_nothing_is_described(tmp_path, names, words):
    (tmp_path / "pairs").mkdir()
    for name in names:
        (tmp_path / "pairs" / name).write_bytes(IMAGES["jpeg"])
    with pytest.raises(ConfigError, match=words):
        run(make_job(tmp_path, folder_source(str(tmp_path / "pairs"))), processes=1)


def test_one_image_is_one_shard(tmp_path):
    write_file(tmp_path / "pairs" / "a.jpg", IMAGES["jpeg"])
    write_file(tmp_path / "pairs" / "a.txt", b"text")
    report = run(make_job(tmp_path, folder_source(str(tmp_path / "pairs"))), processes=8)
    assert (report["entries"], report["samples"], report["shards"]) == (1, 1, 1)


def test_an_out_that_is_a_file_or_lies_below_one_is_refused(tmp_path):
    source, _, _ = make_folder(tmp_path)
    (tmp_path / "file").touch()
    job = make_job(tmp_path, source)
    with pytest.raises(ConfigError, match=r"--out is .*file, which is a file; give a folder"):
        run(replace(job, out=tmp_path / "file"), processes=1)
    with pytest.raises(ConfigError, match=r"file/x/y, which is below .*/file, a file; give"):
        run(replace(job, out=tmp_path / "file" / "x" / "y"), processes=1)


def test_a_second_conversion_at_the_same_time_is_told_who_is_first(tmp_path):
    source, _, _ = make_folder(tmp_path)
    (tmp_path / "out").mkdir()
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()

    def hold():
        claim(tmp_path / "out", "--out", "another conversion")
        ready.set()
        done.wait(60)
        release(tmp_path / "out")

    first = context.Process(target=hold)
    first.start()
    ready.wait(60)
    words = rf"--out is .*out, which another conversion \(process {first.pid} on .* is using"
    with pytest.raises(ConfigError, match=words):
        run(make_job(tmp_path, source), processes=1)
    done.set()
    first.join()
    assert run(make_job(tmp_path, source), processes=1)["samples"] == len(GOOD)


def test_a_full_disk_ends_with_a_sentence_and_the_same_command_goes_on(tmp_path, monkeypatch):
    source, _, _ = make_folder(tmp_path)

    def no_room(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", no_room)
        with pytest.raises(NotWritten, match=r"can't be written \(No space left on device\)"):
            run(make_job(tmp_path, source), processes=1)
    assert not list((tmp_path / "out").rglob("*.tmp"))
    assert run(make_job(tmp_path, source), processes=1)["samples"] == len(GOOD)
    shutil.rmtree(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(
            "aclip.data.convert.plan.SCHEMA", "PRAGMA max_page_count = 1; CREATE TABLE x (y);"
        )
        with pytest.raises(NotWritten, match=r"--out is .*plan can't be written.*full"):
            run(make_job(tmp_path, source), processes=1)

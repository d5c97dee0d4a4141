"""Class folders as people have them: any image format, litter of other tools, links, odd names."""

import errno
import io
import os
from pathlib import Path

import pytest
from evaluation_folders import find_one, png, read_all, write_classes, write_tar
from PIL import Image

from aclip.data.images.suffixes import IMAGE_SUFFIXES
from aclip.data.shards.listing import Skip
from aclip.errors import ConfigError, DataError

FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".jpe": "JPEG", ".jfif": "JPEG", ".png": "PNG"}
FORMATS |= {".webp": "WEBP", ".gif": "GIF", ".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF"}
FORMATS |= {".ppm": "PPM", ".pgm": "PPM", ".pbm": "PPM", ".pnm": "PPM"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ACLIP_CACHE", str(tmp_path / "cache"))


def encoded(image_format, value):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value,) * 3).save(buffer, image_format)
    return buffer.getvalue()


def write_file(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def test_every_suffix_of_an_image_is_read_in_lower_and_upper_case(tmp_path):
    assert set(FORMATS) == IMAGE_SUFFIXES
    for number, (suffix, image_format) in enumerate(FORMATS.items()):
        for name in (f"a{suffix}", f"b{suffix.upper()}"):
            write_file(tmp_path / "set" / f"c{number:02d}" / name, encoded(image_format, 200))
    found = read_all(find_one("set", tmp_path).dataset)
    assert [label for _, label, _ in found] == sorted([*range(14), *range(14)])
    assert all(abs(grey - 200) <= 2 for grey, _, _ in found)


def test_litter_is_neither_a_class_nor_an_image(tmp_path):
    write_classes(tmp_path / "set", ["cat", "dog"])
    for folder in ("__MACOSX", "@eaDir", ".ipynb_checkpoints", "lost+found", "cat/@eaDir"):
        write_file(tmp_path / "set" / folder / "x.png", png(77))
    for file in ("._0.png", ".DS_Store", "Thumbs.db", "desktop.ini"):
        write_file(tmp_path / "set" / "cat" / file, png(77))
    task = find_one("set", tmp_path)
    assert task.prompts.names == [["cat"], ["dog"]] and task.dataset.notes == []
    assert read_all(task.dataset) == [(0, 0, []), (10, 1, [])]


def test_a_class_whose_files_are_no_images_is_refused_with_what_it_holds(tmp_path):
    write_classes(tmp_path / "set", ["cat", "dog"])
    (tmp_path / "set" / "dog" / "0.png").rename(tmp_path / "set" / "dog" / "0.HEIC")
    (tmp_path / "set" / "dog" / "README").touch()
    with pytest.raises(
        ConfigError, match=r"set/dog holds no image but 1 x \.heic, 1 x without a suffix; give .*"
    ):
        find_one("set", tmp_path)


def test_empty_classes_and_files_that_are_no_images_are_named_and_counted(tmp_path):
    write_classes(tmp_path / "set", ["bird", "cat", "dog"])
    (tmp_path / "set" / "bird" / "0.png").unlink()
    for file in ("cat/a.txt", "cat/b.txt", "dog/a.json"):
        (tmp_path / "set" / file).touch()
    task = find_one("set", tmp_path)
    assert [label for _, label, _ in read_all(task.dataset)] == [1, 2]
    empty, left_out = task.dataset.notes
    assert empty.startswith("1 of 3 classes in") and empty.endswith(": bird")
    assert left_out.endswith("no image's: 2 x .txt, 1 x .json")


@pytest.mark.parametrize("splits", [["train"], ["train", "val"], ["Test", "train"]])
def test_splits_are_no_classes(splits, tmp_path):
    for split in splits:
        write_classes(tmp_path / "set" / split, ["cat", "dog"])
        for image in (tmp_path / "set" / split).glob("*/*.png"):  # also without classes in them
            (tmp_path / "set" / split / image.name).write_bytes(image.read_bytes())
    with pytest.raises(ConfigError, match="which are parts of a set and no classes; give one with"):
        find_one("set", tmp_path)


def test_links_to_classes_and_images_are_followed_once(tmp_path):
    write_classes(tmp_path / "elsewhere", ["cat", "dog"])
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a").symlink_to(tmp_path / "elsewhere" / "cat")
    (tmp_path / "set" / "b").mkdir()
    (tmp_path / "set" / "b" / "1.png").symlink_to(tmp_path / "elsewhere" / "dog" / "0.png")
    (tmp_path / "set" / "b" / "back").symlink_to(tmp_path / "set" / "b")
    (tmp_path / "set" / "b" / "gone.png").symlink_to(tmp_path / "nothing")
    task = find_one("set", tmp_path)
    loaded = [load() for _, load in task.dataset.read(0, 1)]
    assert [each.label for each in loaded[:2]] == [0, 1]
    assert loaded[2:] == [Skip("unreadable_file")]


def test_wordnet_ids_are_read_as_the_names_of_imagenets_classes(tmp_path):
    write_classes(tmp_path / "set", ["n01440764", "n02129165", "n04606251"])
    task = find_one("set", tmp_path)
    assert task.prompts.names == [["tench"], ["lion"], ["shipwreck"]]
    assert "3 WordNet ids" in task.dataset.notes[0]
    write_classes(tmp_path / "set", ["n00000001"])
    with pytest.raises(ConfigError, match=r"1 of its 4 .*\(n00000001\); write .*classnames.txt"):
        find_one("set", tmp_path)
    (tmp_path / "set" / "classnames.txt").write_text("one\ntench\nlion\nwreck\n")
    task = find_one("set", tmp_path)
    assert task.prompts.names[0] == ["one"] and task.dataset.notes == []


def test_imagenet_in_folders_that_are_called_by_words_is_refused(tmp_path):
    write_classes(tmp_path / "imagenet" / "val", [f"word{c:03d}" for c in range(1000)], images=0)
    (tmp_path / "imagenet" / "val" / "word000" / "0.png").write_bytes(png(1))
    with pytest.raises(ConfigError, match="word000, word001, .* come in the order of WordNet ids"):
        find_one("imagenet", tmp_path)


def test_numbers_as_names_are_said(tmp_path):
    write_classes(tmp_path / "set", ["0", "1", "10"])
    (note,) = find_one("set", tmp_path).dataset.notes
    assert "called by their numbers" in note and "classnames.txt" in note


def test_a_folder_of_no_layout_is_refused_with_what_it_holds(tmp_path):
    (tmp_path / "set").mkdir()
    with pytest.raises(ConfigError, match="no known layout .it is empty.; write images as"):
        find_one("set", tmp_path)
    for name in ("a.jpg", "b.JPG", "._c.tar"):
        (tmp_path / "set" / name).touch()
    with pytest.raises(ConfigError, match=r"\(it holds files 2 x \.jpg, 1 x \.tar\)"):
        find_one("set", tmp_path)


def test_shards_in_upper_case_are_read_and_litter_beside_them_is_not(tmp_path):
    write_tar(tmp_path / "set" / "test" / "0.TAR", [{"png": png(1), "txt": b"a"}])
    (tmp_path / "set" / "test" / "._0.TAR").write_bytes(b"resource fork")
    assert read_all(find_one("set", tmp_path).dataset) == [(1, -1, ["a"])]


def test_class_names_are_read_in_any_encoding_that_is_said(tmp_path, capsys):
    write_classes(tmp_path / "set", ["a", "b"])
    file = tmp_path / "set" / "classnames.txt"
    file.write_bytes("cat\r\ndög\r\n".encode("utf-8-sig"))
    assert find_one("set", tmp_path).prompts.names == [["cat"], ["dög"]]
    assert capsys.readouterr().out == ""
    file.write_bytes("cat\ndög\n".encode("cp1252"))
    assert find_one("set", tmp_path).prompts.names == [["cat"], ["dög"]]
    assert "was read as Windows-1252" in capsys.readouterr().out
    file.write_text("\ncat\ndog")  # or every name would be that of the class before
    with pytest.raises(ConfigError, match="empty line 1"):
        find_one("set", tmp_path)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_store_that_fails_is_no_unusable_image(number, tmp_path, monkeypatch):
    write_classes(tmp_path / "set", ["cat"])
    ((_, load),) = find_one("set", tmp_path).dataset.read(0, 1)

    def fail(path):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(DataError, match="0.png can't be read .*not for a fault of its own"):
        load()


def test_a_set_that_was_removed_is_no_set_of_unusable_images(tmp_path):
    write_classes(tmp_path / "set", ["cat"])
    ((_, load),) = find_one("set", tmp_path).dataset.read(0, 1)
    (tmp_path / "set").rename(tmp_path / "moved")
    with pytest.raises(DataError, match="see that .*set can be reached"):
        load()

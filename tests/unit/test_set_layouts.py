"""Sets are read from folders of classes, from shards and from Karpathy's captions."""

import json

import pytest
from evaluation_folders import find_one, png, read_all, write_classes, write_tar

from aclip.errors import ConfigError
from aclip.evaluation.sets.catalog import catalog


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ACLIP_CACHE", str(tmp_path / "cache"))


def test_folder_of_classes_gives_labels_in_the_order_of_their_names(tmp_path):
    write_classes(tmp_path / "pets2" / "test", ["zebra_fish", "Ant", "bee"], images=2)
    (tmp_path / "pets2" / "test" / "bee" / "broken.jpg").write_bytes(b"no picture")
    task = find_one("pets2", tmp_path)
    # Sorted: Ant (written second: greys 10, 11), bee (20, 21), zebra_fish (0, 1).
    loaded = {index: load() for index, load in task.dataset.read(0, 1)}
    bad = [index for index, example in loaded.items() if not hasattr(example, "label")]
    assert [loaded[index].kind for index in bad] == ["unreadable_image"]
    greys = [
        (e.image.getpixel((0, 0))[0], e.label) for i, e in sorted(loaded.items()) if i not in bad
    ]
    assert greys == [(10, 0), (11, 0), (20, 1), (21, 1), (0, 2), (1, 2)]
    assert task.prompts.names == [["Ant"], ["bee"], ["zebra fish"]]
    assert task.prompts.templates == ["a photo of a {c}."]
    assert "folders" in task.prompts.source and task.train is None
    (tmp_path / "pets2" / "classnames.txt").write_text("an ant\na bee\na zebra\n")
    (tmp_path / "pets2" / "zeroshot_classification_templates.txt").write_text("{c}!")
    assert find_one(str(tmp_path / "pets2")).prompts.texts(2) == ["a zebra!"]
    (tmp_path / "pets2" / "classnames.txt").write_text("an ant\na bee\n")
    with pytest.raises(ConfigError, match="3 folders of classes, but .*classnames.txt names 2"):
        find_one("pets2", tmp_path)


def labels_by_grey(dataset):
    return {grey: label for grey, label, _ in read_all(dataset)}


def test_class_folders_that_are_numbers_count_by_value(tmp_path):
    numbers = [str(number) for number in range(43)]
    for split in ("test", "train"):
        write_classes(tmp_path / "gtsrb" / split, numbers[:25])  # greys end at 255
        for number in numbers[25:]:
            (tmp_path / "gtsrb" / split / number).mkdir()
    task = find_one("gtsrb", tmp_path)
    expected = {10 * number: number for number in range(25)}
    assert labels_by_grey(task.dataset) == labels_by_grey(task.train()) == expected
    assert task.prompts.names[14] == ["stop"]
    write_classes(tmp_path / "mine" / "test", ["9", "10", "100"])
    task = find_one("mine", tmp_path)
    assert labels_by_grey(task.dataset) == {0: 0, 10: 1, 20: 2}
    assert task.prompts.names == [["9"], ["10"], ["100"]]
    write_classes(tmp_path / "mixed" / "test", ["9", "10", "x"])  # as text
    assert labels_by_grey(find_one("mixed", tmp_path).dataset) == {10: 0, 0: 1, 20: 2}


def test_class_folders_of_a_set_with_an_order_of_its_own_count_as_text(tmp_path):
    for split in ("val", "train"):
        write_classes(tmp_path / "clevr_counts" / split, [str(number) for number in range(3, 11)])
    task = find_one("clevr_counts", tmp_path)
    expected = {70: 0} | {10 * number: number + 1 for number in range(7)}  # 10, 3, 4, ..., 9
    assert labels_by_grey(task.dataset) == labels_by_grey(task.train()) == expected
    assert [name for (name,) in task.prompts.names[:2]] == ["ten", "three"]


def test_hidden_folders_are_no_classes(tmp_path):
    for name, splits in (("mine", ("test", "train")), ("eurosat", ("val", "train"))):
        for split in splits:
            write_classes(tmp_path / name / split, [f"class{c}" for c in range(10)])
        write_classes(tmp_path / name / splits[1], [".ipynb_checkpoints"])
        task = find_one(name, tmp_path)
        assert labels_by_grey(task.train()) == {10 * c: c for c in range(10)}
        write_classes(tmp_path / name / splits[0], [".ipynb_checkpoints"])
        task = find_one(name, tmp_path)
        assert labels_by_grey(task.dataset) == {10 * c: c for c in range(10)}


@pytest.mark.parametrize("name, test", [("mine", "test"), ("eurosat", "val")])
def test_splits_with_other_classes_are_refused_once_the_probe_reads_them(name, test, tmp_path):
    classes = [f"class{c}" for c in range(10)]
    write_classes(tmp_path / name / test, classes)
    write_classes(tmp_path / name / "train", classes[:4] + classes[5:7])
    task = find_one(name, tmp_path)
    with pytest.raises(
        ConfigError, match=rf"{name}/train has no folder class4, which .*{name}/{test} has"
    ):
        task.train()
    for missing in (4, 7, 8, 9):
        (tmp_path / name / "train" / f"class{missing}").mkdir()
    assert task.train().num_samples == 6
    (tmp_path / name / "train" / "another").mkdir()
    with pytest.raises(ConfigError, match=rf"{name}/{test} has no folder another, which"):
        task.train()


def test_shards_in_clip_benchmarks_layout_and_their_train_split(tmp_path):
    folder = tmp_path / "mine"
    for number in (10, 2, 0):  # read by number, not by name
        write_tar(folder / "test" / f"{number}.tar", [{"png": png(number), "cls": b"1"}])
    write_tar(folder / "train" / "0.tar", [{"png": png(7), "cls": b"0"}])
    (folder / "classnames.txt").write_text("no\nyes")
    task = find_one(str(folder))
    assert [grey for grey, _, _ in read_all(task.dataset)] == [0, 2, 10]
    assert task.prompts.names == [["no"], ["yes"]] and task.metric == "top1"
    assert read_all(task.train()) == [(7, 0, [])]


def test_each_line_of_a_retrieval_set_is_a_caption(tmp_path):
    write_tar(tmp_path / "r" / "test" / "0.tar", [{"png": png(1), "txt": b"one\ntwo\n\nthree"}])
    (tmp_path / "r" / "dataset_type.txt").write_text("retrieval\n")
    task = find_one("r", tmp_path)
    assert read_all(task.dataset) == [(1, -1, ["one", "two", "three"])]
    assert task.prompts is None


@pytest.mark.parametrize("name, images", [("flickr30k", "flickr30k-images"), ("coco", "val2014")])
def test_the_test_split_of_karpathys_captions(name, images, tmp_path):
    folder = tmp_path / name
    (folder / images).mkdir(parents=True)
    entries = []
    for number, split in enumerate(["train", "test", "val", "restval", "test"]):
        (folder / images / f"{number}.png").write_bytes(png(number))
        entry = {"filename": f"{number}.png", "split": split}
        entry["sentences"] = [{"raw": f"caption {number} {i}"} for i in range(2)]
        entries.append(entry | ({"filepath": "val2014"} if name == "coco" else {}))
    captions = folder / catalog()[name]["captions"]
    captions.write_text(json.dumps({"images": entries}))
    expected = [(n, -1, [f"caption {n} 0", f"caption {n} 1"]) for n in (1, 4)]
    assert read_all(find_one(name, tmp_path).dataset) == expected
    (folder / images / "4.png").unlink()
    with pytest.raises(ConfigError, match=r"names .*4.png and 0 more that are not there"):
        find_one(name, tmp_path)
    captions.write_text("[]")
    with pytest.raises(ConfigError, match="not a caption file in Karpathy's format"):
        find_one(name, tmp_path)


def test_any_folder_with_one_caption_file_of_karpathys_format_is_for_retrieval(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "0.png").write_bytes(png(3))
    entry = {"filename": "0.png", "split": "test", "sentences": [{"raw": "a caption"}]}
    (folder / "dataset_mine.json").write_text(json.dumps({"images": [entry]}))
    task = find_one("mine", tmp_path)
    assert (task.title, task.metric, task.source) == ("mine", "retrieval", str(folder))
    assert task.prompts is None and read_all(task.dataset) == [(3, -1, ["a caption"])]
    write_classes(folder, ["a"])
    (folder / "dataset_other.json").write_text("{}")  # two caption files: neither is meant
    assert find_one("mine", tmp_path).metric == "top1"

"""Which sets `--suite` finds, in which layouts, how labels count, and the published numbers."""

import io
import json
import math
import tarfile

import pytest
import torchvision
from PIL import Image

from aclip.errors import ConfigError
from aclip.evaluation.results import METRICS, published_results
from aclip.evaluation.sets import image_sets
from aclip.evaluation.sets.catalog import catalog, find_tasks, is_retrieval
from aclip.evaluation.sets.prompts import clip_benchmark_prompts, slip_prompts


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ACLIP_CACHE", str(tmp_path / "cache"))


def png(value):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


def write_classes(folder, class_names, images=1):
    """A folder for each class; image i of class c has the grey value 10 c + i."""
    for label, name in enumerate(class_names):
        (folder / name).mkdir(parents=True)
        for number in range(images):
            (folder / name / f"{number}.png").write_bytes(png(10 * label + number))


def write_tar(path, samples):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for number, members in enumerate(samples):
            for suffix, content in members.items():
                info = tarfile.TarInfo(f"{number:03d}.{suffix}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def read_all(dataset):
    """[(grey value, label, captions)] of the whole set, read as two ranks would."""
    loaded = {}
    for rank in range(2):
        loaded |= {index: load() for index, load in dataset.read(rank, 2)}
    assert sorted(loaded) == list(range(dataset.num_samples))
    examples = [loaded[index] for index in sorted(loaded)]
    return [(e.image.getpixel((0, 0))[0], e.label, e.captions) for e in examples]


def find_one(suite, data=None, **kwargs):
    (task,), missing = find_tasks([suite], data, **kwargs)
    assert not missing
    return task


def test_the_paper_has_26_sets_and_two_for_retrieval():
    retrieval = [name for name in catalog() if is_retrieval(name)]
    assert retrieval == ["flickr30k", "coco"] and len(catalog()) == 28
    metrics = {name: entry.get("metric") for name, entry in catalog().items()}
    # SLIP's eval_zeroshot.py.
    special = {name: metric for name, metric in metrics.items() if metric}
    assert special == {
        "aircraft": "mean_per_class",
        "pets": "mean_per_class",
        "caltech101": "mean_per_class",
        "flowers": "mean_per_class",
        "kinetics700_frames": "mean_top1_top5",
        "hateful_memes": "roc_auc",
    }
    assert set(special.values()) < METRICS.keys()


@pytest.mark.parametrize("name", published_results())
def test_published_rows_have_the_published_average(name):
    """A slip in one of the 26 numbers would show here."""
    row = published_results()[name]
    values = [row[member] for member in catalog() if not is_retrieval(member)]
    assert len(values) == 26
    # The table's numbers are rounded, and so is its average.
    assert math.fsum(values) / 26 == pytest.approx(row["average"], abs=0.0501)
    assert len(row["flickr30k"]) == len(row["coco"]) == 2


def test_torchvision_counts_pets_as_clip_benchmark_does_and_we_as_folders_sort():
    entry = catalog()["pets"]["clip_benchmark"]
    prompts = clip_benchmark_prompts("pets", "pets", entry["order"], None)
    names = [name for (name,) in prompts.names]
    cats, dogs = names[:12], names[12:]
    assert cats == sorted(cats) and dogs == sorted(dogs)
    assert {"Abyssinian", "Sphynx", "Maine Coon"} < set(cats) and "Pug" in dogs
    assert catalog()["pets"]["torchvision"]["labels"] == entry["order"]


def test_class_names_of_sets_that_count_differently():
    def names(name):
        entry = catalog()[name]["clip_benchmark"]
        prompts = clip_benchmark_prompts(
            entry["templates"], entry["names"], entry.get("order"), None
        )
        return [words for (words,) in prompts.names]

    numbers = ["ten", "three", "four", "five", "six", "seven", "eight", "nine"]
    assert names("clevr_counts") == numbers
    assert catalog()["clevr_counts"]["torchvision"]["labels"] == [10, 3, 4, 5, 6, 7, 8, 9]
    # Folders above_20, below_20, below_8, no_vehicle.
    assert [name.removeprefix("a photo i took ") for name in names("kitti_distance")] == [
        "with a car in the distance.",
        "with a car nearby.",
        "of a car on my left or right side.",
        "with no car.",
    ]
    # The file's numbers 0 to 6: angry, disgust, fear, happy, sad, surprise, neutral.
    raw = ["angry", "disgusted", "fearful", "happy", "sad", "surprised", "neutral"]
    labels = catalog()["fer2013"]["torchvision"]["labels"]
    assert [raw[label] for label in labels] == names("fer2013")


def test_clip_benchmark_ships_prompts_for_all_but_four_of_the_sets():
    """Of the others it knows no class names, so that they come from torchvision or a file."""
    without = []
    for name, entry in catalog().items():
        if is_retrieval(name):
            continue
        values = entry.get("clip_benchmark")
        if values is None:
            without.append(name)
            continue
        own_names = ["first_class", "second"]
        prompts = clip_benchmark_prompts(
            values["templates"], values.get("names"), values.get("order"), own_names
        )
        assert prompts.texts(0), name
        if "names" not in values and name != "imagenet":
            assert prompts.names == [["first class"], ["second"]]
    assert without == ["cub200", "ucf101_frames", "kinetics700_frames", "hateful_memes"]
    imagenet = clip_benchmark_prompts("imagenet", None, None, None)
    assert len(imagenet.names) == 1000
    assert "itap of a tench." in imagenet.texts(0) and len(imagenet.texts(0)) == 7


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


class FakeTorchvision:
    """Stands for any of torchvision's classes: two raw labels, and a download that is recorded."""

    downloads: list = []

    def __init__(self, root, split, download=False):
        if download:
            self.downloads.append(root)
        if not self.downloads:
            raise RuntimeError("Dataset not found. You can use download=True to download it")
        self.split = split

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return Image.new("L", (8, 8), index), (10, 3)[index]


def test_torchvision_sets_are_fetched_only_when_asked_and_count_as_the_catalog_says(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(FakeTorchvision, "downloads", [])
    monkeypatch.setattr(torchvision.datasets, "CLEVRClassification", FakeTorchvision)
    with pytest.raises(ConfigError, match=r"clevr_counts .*--download, or put its images into"):
        find_one("clevr_counts", tmp_path)
    assert FakeTorchvision.downloads == []
    task = find_one("clevr_counts", tmp_path, download=True)
    assert FakeTorchvision.downloads == [str(tmp_path)]
    assert [label for _, label, _ in read_all(task.dataset)] == [0, 1]  # raw 10 and 3
    assert task.train().num_samples == 2


def test_every_torchvision_entry_names_a_class_that_takes_its_arguments(tmp_path):
    """Without the data each says so itself, and not that an argument is unknown."""
    for name, entry in catalog().items():
        if "torchvision" not in entry or entry["torchvision"]["class"] == "PCAM":  # needs h5py
            continue
        for split in ("test", "train"):
            where = image_sets.Where(tmp_path, False)
            with pytest.raises(image_sets.Unavailable, match=f"{name} is not in"):
                image_sets.open_torchvision(name, entry["torchvision"], split, where, "")


def test_of_the_paper_what_is_there_is_taken_and_the_rest_is_named(tmp_path):
    write_classes(tmp_path / "eurosat" / "val", [f"class{c}" for c in range(10)])
    write_classes(tmp_path / "cub200" / "val", ["a", "b"])
    tasks, missing = find_tasks(["paper"], tmp_path)
    assert [task.name for task in tasks] == ["eurosat"]
    assert tasks[0].prompts.source == "clip-benchmark"
    assert tasks[0].prompts.names[1] == ["forest"]
    by_name = {sentence.split()[0]: sentence for sentence in missing}
    assert by_name.keys() == catalog().keys() - {"eurosat"}
    assert "cub200/classnames.txt" in by_name["cub200"]
    assert f"{tmp_path}/cars/test/CLASS/" in by_name["cars"]
    assert "fer2013.csv" in by_name["fer2013"]
    assert "dataset_coco.json" in by_name["coco"]
    with pytest.raises(ConfigError, match="cub200 has no class prompts"):
        find_one("cub200", tmp_path)
    write_classes(tmp_path / "eurosat" / "val", ["class10"])
    with pytest.raises(ConfigError, match="has 11 classes, but clip-benchmark names 10"):
        find_one("eurosat", tmp_path)


def test_prompts_of_a_slip_checkout_are_taken_for_the_papers_sets(tmp_path):
    labels = {"fer2013": [["angry"], ["happy", "smiling"]], "cub200": ["Albatross", "Ani"]}
    templates = {"fer2013": ["a {} face.", "they look {}."], "cub200": ["a photo of a {}."]}
    checkout = tmp_path / "SLIP"
    checkout.mkdir()
    (checkout / "labels.json").write_text(json.dumps(labels))
    (checkout / "templates.json").write_text(json.dumps(templates))
    write_classes(tmp_path / "cub200" / "val", ["001", "002"])
    task = find_one("cub200", tmp_path, slip_checkout=checkout)
    assert task.prompts.texts(1) == ["a photo of a Ani."]
    assert str(checkout) in task.prompts.source
    expected = {"a happy face.", "a smiling face.", "they look happy.", "they look smiling."}
    assert set(slip_prompts(checkout, "fer2013").texts(1)) == expected
    (checkout / "labels.json").write_text("{")
    with pytest.raises(ConfigError, match=r"labels.json, which can't be read \(it is not JSON"):
        find_one("cub200", tmp_path, slip_checkout=checkout)


def test_names_that_mean_nothing_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="did you mean food101"):
        find_tasks(["food11"], tmp_path)
    with pytest.raises(ConfigError, match="looked for in --data"):
        find_tasks(["mnist"], None)
    with pytest.raises(ConfigError, match="holds none of the 28 sets"):
        find_tasks(["paper"], tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no known layout"):
        find_tasks(["empty"], tmp_path)
    (tmp_path / "classes" / "a").mkdir(parents=True)
    with pytest.raises(ConfigError, match="holds no image in a folder of its class"):
        find_tasks(["classes"], tmp_path)

"""The sets that `--suite` finds, how their labels count, and the published numbers."""

import json
import math

import pytest
import torchvision
from evaluation_folders import find_one, read_all, write_classes
from PIL import Image

from aclip.errors import ConfigError
from aclip.evaluation.results import published_results
from aclip.evaluation.sets import image_sets
from aclip.evaluation.sets.catalog import catalog, find_tasks, is_retrieval
from aclip.evaluation.sets.prompts import clip_benchmark_prompts, slip_prompts
from aclip.run_folder.results_file import METRICS


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ACLIP_CACHE", str(tmp_path / "cache"))


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

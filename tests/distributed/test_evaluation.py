"""Evaluation on several ranks equals evaluation on one, sample by sample."""

import io
import json
import math
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from grey_images import Greys, probe
from PIL import Image

from aclip import distributed
from aclip.config.sections import TextTowerConfig
from aclip.data.shards.listing import index_shards
from aclip.data.tokenizer import build_tokenizer
from aclip.errors import DataError
from aclip.evaluation.evaluate_set import evaluate_models, evaluate_set
from aclip.evaluation.linear_probe import fit
from aclip.evaluation.sets.evaluation_set import ShardSet
from aclip.evaluation.sets.prompts import find_class_prompts
from aclip.evaluation.towers import Towers

pytestmark = pytest.mark.distributed

CLASSES = ["red thing", "blue thing", "thing with a rather long name", "other", "none", "last"]


def write_set(folder, num_samples, class_names=CLASSES):
    """Random images with 0 to 3 captions and mostly a label; a broken one and one without image."""
    generator = np.random.default_rng(num_samples)
    with tarfile.open(folder / "0.tar", "w") as archive:
        for number in range(num_samples):
            buffer = io.BytesIO()
            pixels = generator.integers(256, size=(12, 9, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(buffer, "PNG")
            captions = [f"caption {number} {i} {'long ' * i}" for i in range(number % 4)]
            members = {
                "png": b"broken" if number == 2 else buffer.getvalue(),
                "json": json.dumps({"captions": captions}).encode(),
            }
            if number != 4:
                members["cls"] = str(number * 5 % len(class_names)).encode()
            for suffix, content in members.items():
                info = tarfile.TarInfo(f"{number:04d}.{suffix}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    (folder / "classnames.txt").write_text("\n".join(class_names))
    templates = "a {c}.\nthe {c} is here\n{c}"
    (folder / "zeroshot_classification_templates.txt").write_text(templates)
    return index_shards([str(folder / "0.tar")])


def random_towers(seed=0):
    """Towers of random weights, and how often each encoder was called."""
    generator = torch.Generator().manual_seed(seed)
    image_weight = torch.randn(3 * 6 * 6, 5, generator=generator)
    text_weight = torch.randn(49408, 5, generator=generator)
    calls = {"image": 0, "text": 0}

    def encode_image(pixels):
        calls["image"] += 1
        return pixels.flatten(1) @ image_weight

    def encode_text(tokens):
        calls["text"] += 1
        return F.embedding(tokens.ids, text_weight).where(tokens.ids[..., None] > 0, 0).sum(1)

    towers = Towers(
        encode_image,
        encode_text,
        build_tokenizer(TextTowerConfig()),
        resolution=6,
        device=torch.device("cpu"),
        dtype=torch.float32,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    )
    return towers, calls


def evaluate_with_random_towers(shards, batch_size):
    """Metrics, and how often each encoder was called."""
    towers, calls = random_towers()
    prompts = find_class_prompts(Path(shards[0].url).parent)
    return evaluate_set(towers, ShardSet(shards), prompts, batch_size), calls


@pytest.mark.parametrize(
    "num_samples, world_size, batch_size",
    [
        pytest.param(23, 2, 4, id="sizes that neither ranks nor batches divide"),
        pytest.param(23, 3, 100, id="one batch a rank"),
        pytest.param(6, 4, 1, id="ranks of one and two samples"),
    ],
)
def test_ranks_together_score_what_one_rank_scores(
    run_distributed, tmp_path, monkeypatch, num_samples, world_size, batch_size
):
    monkeypatch.setenv("ACLIP_CACHE", str(tmp_path / "cache"))
    shards = write_set(tmp_path, num_samples)
    expected, _ = evaluate_with_random_towers(shards, 3)
    assert expected["num_images"] + expected["num_skipped"] == num_samples
    named = {"zero_shot_top5", "zero_shot_mean_per_class", "image_to_text_r10", "text_to_image_r1"}
    assert named <= set(expected)

    results = run_distributed(evaluate_with_random_towers, world_size, shards, batch_size)
    for metrics, calls in results:
        assert metrics == expected
        assert calls == results[0][1]
    assert results[0][1]["image"] == math.ceil(math.ceil(num_samples / world_size) / batch_size)


def test_models_together_score_what_each_scores_and_every_image_is_decoded_once(
    run_distributed, tmp_path, monkeypatch
):
    monkeypatch.setenv("ACLIP_CACHE", str(tmp_path / "cache"))
    shards = write_set(tmp_path, 23)
    prompts = find_class_prompts(tmp_path)
    seeds = {"student": 0, "teacher": 1}
    expected = {
        name: evaluate_set(random_towers(seed)[0], ShardSet(shards), prompts, 4)
        for name, seed in seeds.items()
    }
    assert expected["student"] != expected["teacher"]

    def evaluate():
        loaded, load = [], ShardSet._load

        def count(dataset, sample):
            loaded.append(sample.key)
            return load(dataset, sample)

        ShardSet._load = count
        models = {name: random_towers(seed)[0] for name, seed in seeds.items()}
        return evaluate_models(models, ShardSet(shards), prompts, 4), loaded

    results = run_distributed(evaluate, 2)
    assert [metrics for metrics, _ in results] == [expected] * 2
    keys = sorted(key for _, loaded in results for key in loaded)
    assert keys == [f"{number:04d}" for number in range(23)]


def test_ranks_together_give_the_roc_auc_of_one(run_distributed, tmp_path, monkeypatch):
    monkeypatch.setenv("ACLIP_CACHE", str(tmp_path / "cache"))
    shards = write_set(tmp_path, 15, CLASSES[:2])
    expected, _ = evaluate_with_random_towers(shards, 4)
    assert 0 < expected["zero_shot_roc_auc"] < 1
    results = run_distributed(evaluate_with_random_towers, 2, shards, 4)
    assert [metrics for metrics, _ in results] == [expected] * 2


def test_a_rank_without_any_sample_takes_part(run_distributed, tmp_path, monkeypatch):
    monkeypatch.setenv("ACLIP_CACHE", str(tmp_path / "cache"))
    shards = write_set(tmp_path, 2)
    expected, _ = evaluate_with_random_towers(shards, 8)
    results = run_distributed(evaluate_with_random_towers, 3, shards, 8)
    assert [metrics for metrics, _ in results] == [expected] * 3
    assert len({tuple(calls.items()) for _, calls in results}) == 1


def test_ranks_together_fit_the_probe_of_one(run_distributed):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(5, (123,), generator=generator)
    features = torch.eye(5, 9)[labels] + torch.randn(123, 9, generator=generator)

    def fit_share():
        rank, world_size = distributed.rank(), distributed.world_size()
        return fit(features[rank::world_size], labels[rank::world_size], 5, 0.1)

    expected = fit_share()
    for world_size in (2, 3):
        results = run_distributed(fit_share, world_size)
        assert all(torch.equal(weights, results[0]) for weights in results)
        assert (results[0] - expected).abs().max() < 1e-4 * expected.abs().max()


def test_ranks_together_score_the_probe_of_one(run_distributed):
    """Every tenth sample is held out, so that of two ranks one holds none of them."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(256, (60,), generator=generator).tolist()
    labels = [int(value + 90 * (number % 3) > 180) for number, value in enumerate(values)]
    train, test = Greys(values[:45], labels[:45]), Greys(values[45:], labels[45:])
    expected = probe(train, test)
    assert 0.5 < expected["linear_probe_top1"] < 1
    for world_size in (2, 4):
        for metrics in run_distributed(probe, world_size, train, test):
            assert metrics == pytest.approx(expected)


class Fails:
    """Grey images, which one rank can't read to their end."""

    name, num_samples, notes = "fails", 8, []

    def read(self, rank, world_size):
        for number, sample in enumerate(Greys([10] * 8, [0, 1] * 4).read(rank, world_size)):
            if number == 2 and rank == 1:
                raise DataError("the disk of rank 1 is gone")
            yield sample


def fails_on_every_rank(evaluate):
    """What each rank was told, and that the next collective is answered."""
    try:
        evaluate()
    except DataError as error:
        return str(error), distributed.all_gather_rows(torch.ones(1)).sum().item()
    return None


def test_a_rank_that_cant_read_on_fails_together_with_the_others(run_distributed, tmp_path):
    towers = Towers(
        lambda pixels: pixels.flatten(1),
        encode_text=None,
        tokenizer=None,
        resolution=2,
        device=torch.device("cpu"),
        dtype=torch.float32,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    )

    def work():
        return (
            fails_on_every_rank(lambda: evaluate_set(towers, Fails(), None, 1)),
            fails_on_every_rank(lambda: probe(Fails(), Greys([1], [0]))),
        )

    told = ("the disk of rank 1 is gone", 2.0)
    assert run_distributed(work, 2) == [(told, told)] * 2

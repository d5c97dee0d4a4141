"""The evaluation between two steps: every model's scores, chance by hand, the picture on rank 0."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from small_recipe import SMALL_RECIPE

from aclip import distributed
from aclip.config.recipe_file import load_recipe
from aclip.config.sections import TextTowerConfig
from aclip.data.shards.listing import index_shards
from aclip.data.tokenizer import build_tokenizer
from aclip.errors import ConfigError
from aclip.evaluation import during_training
from aclip.evaluation.during_training import Evaluator
from aclip.evaluation.mask_signals import MaskTeacher
from aclip.evaluation.towers import Towers

NUM_SAMPLES = 12
CLASSES = ["one", "two", "three"]
RECIPE = ["model.image.resolution=32", "mask.block_size=1", "teacher.resolution=32"]
RECIPE += ["views.scale=[1, 1]"]


@pytest.fixture
def shards(write_tar, encode_image, tmp_path, monkeypatch):
    """Captioned pictures of three classes, the object at the top left of each."""
    monkeypatch.setenv("ACLIP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "classnames.txt").write_text("\n".join(CLASSES))
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a {c}")
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[:32, :32] = 255
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG")
    members = []
    for number in range(NUM_SAMPLES):
        members += [(f"{number:02d}.jpg", encode_image(64, 64, number))]
        members += [(f"{number:02d}.mask.png", buffer.getvalue())]
        members += [(f"{number:02d}.txt", f"picture {number}".encode())]
        members += [(f"{number:02d}.cls", str(number % 3).encode())]
    return index_shards([write_tar("val.tar", members)])


def towers(encode_image) -> Towers:
    """Texts of a class lie at its angle; images where `encode_image` says."""
    tokenizer = build_tokenizer(TextTowerConfig(context_length=16))
    known = [tokenizer.encode([f"a {name}"]).ids[0].tolist() for name in CLASSES]

    def encode_text(tokens):
        rows = [[token for token in row if token] for row in tokens.ids.tolist()]
        return torch.eye(4)[[known.index(row) if row in known else 3 for row in rows]]

    nothing, one = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    device = torch.device("cpu")
    return Towers(encode_image, encode_text, tokenizer, 32, device, torch.float32, nothing, one)


def always(place):
    return towers(lambda pixels: torch.eye(4)[[place] * len(pixels)])


def sees_the_object(embed_kept=lambda views, selection: torch.ones(len(views), 2, 3)):
    """A teacher with attention on the object alone, of 4 x 4 patches."""

    def scores(views):
        assert views.dtype == torch.uint8 and views.shape == (NUM_SAMPLES, 3, 32, 32)
        scores = torch.zeros(NUM_SAMPLES, 4, 4)
        scores[:, :2, :2] = 1
        return scores

    return MaskTeacher(scores, embed_kept, lambda texts: torch.ones(len(texts), 3))


def test_every_model_is_scored_and_the_mask_measured(shards):
    evaluator = Evaluator(load_recipe(SMALL_RECIPE, RECIPE), shards)
    models = {"student": always(0), "teacher": always(1)}
    signals = {"object_patches_kept": 1.0, "attention_kept": pytest.approx(1, abs=0.01)}
    # All views and captions are embedded alike, so that a loss is the logarithm of their number.
    signals |= {f"loss_{name}": pytest.approx(math.log(12)) for name in ("kept", "dropped")}
    for of_mask in (signals, signals | {"agreement": 1.0}):  # both times on the same samples
        evaluation = evaluator(models, sees_the_object())
        metrics = evaluation.metrics
        assert list(metrics) == ["student", "teacher", "chance", "mask"]
        for name in ("student", "teacher"):  # both name one class of three, whatever they see
            assert metrics[name]["zero_shot_top1"] == pytest.approx(1 / 3)
            assert metrics[name]["num_images"] == metrics[name]["num_captions"] == NUM_SAMPLES
        assert metrics["mask"] == of_mask and evaluation.warning == ""
        assert evaluation.picture.dtype == np.uint8 and evaluation.picture.shape[2] == 3


def test_chance_is_what_guessing_scores(shards):
    chance = Evaluator(load_recipe(SMALL_RECIPE, RECIPE), shards)(
        {"student": always(0)}, sees_the_object()
    ).metrics["chance"]
    assert chance == {
        "image_to_text_r1": pytest.approx(1 / 12),
        "image_to_text_r5": pytest.approx(5 / 12),
        "image_to_text_r10": pytest.approx(10 / 12),
        "text_to_image_r1": pytest.approx(1 / 12),
        "text_to_image_r5": pytest.approx(5 / 12),
        "text_to_image_r10": pytest.approx(10 / 12),
        "zero_shot_top1": pytest.approx(1 / 3),
        "zero_shot_top5": 1.0,
        "zero_shot_mean_per_class": pytest.approx(1 / 3),
    }


def test_without_a_mask_or_on_another_rank_nothing_is_pictured(shards, monkeypatch):
    plain = [*RECIPE, "mask.policy=none", "loss.byol=0", "loss.simclr=0", "teacher=null"]
    evaluation = Evaluator(load_recipe(SMALL_RECIPE, plain), shards)({"student": always(0)}, None)
    assert evaluation.picture is None and "mask" not in evaluation.metrics
    evaluator = Evaluator(load_recipe(SMALL_RECIPE, RECIPE), shards)
    found = {"student": {"num_images": 1.0, "zero_shot_top1": 1.0, "num_classes": 3.0}}
    monkeypatch.setattr(during_training, "evaluate_models", lambda *_, **__: found)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    evaluation = evaluator({"student": always(0)}, sees_the_object())
    assert evaluation.picture is None and "mask" not in evaluation.metrics


def test_a_threshold_that_does_not_fit_is_said_once_before_training(shards):
    plain = [*RECIPE, "loss.byol=0", "loss.simclr=0", "teacher=null", "mask.policy=cluster"]
    # One of 4 x 4 patches is the anchor, and no other is as like it.
    recipe = load_recipe(SMALL_RECIPE, [*plain, "mask.cluster_threshold=0.999"])
    evaluator = Evaluator(recipe, shards)
    before = evaluator({"student": always(0)}, None, progress=0.0)
    assert before.metrics["mask"]["clustered"] == pytest.approx(1 / 16)
    assert 0 <= before.metrics["mask"]["object_patches_kept"] <= 1
    assert "clusters hold 6 % of the patches, where the mask drops 50 %" in before.warning
    assert before.picture is not None
    later = evaluator({"student": always(0)}, None, progress=0.5)
    assert later.metrics["mask"] == before.metrics["mask"] and later.warning == ""


def write_set(write_tar, encode_image, *members):
    """A set of one picture with these members besides."""
    named = [("0.jpg", encode_image(64, 64)), *((f"0.{name}", text) for name, text in members)]
    return index_shards([write_tar("small.tar", named)])


def test_one_sample_is_scored_and_guessing_is_always_right(write_tar, encode_image, tmp_path):
    shards = write_set(write_tar, encode_image, ("txt", b"one"))
    plain = [*RECIPE, "mask.policy=none", "loss.byol=0", "loss.simclr=0", "teacher=null"]
    metrics = Evaluator(load_recipe(SMALL_RECIPE, plain), shards)(
        {"student": always(0)}, None
    ).metrics
    assert metrics["student"]["image_to_text_r1"] == metrics["chance"]["image_to_text_r1"] == 1.0


def test_a_set_without_any_score_is_refused_by_the_first_evaluation(write_tar, encode_image):
    shards = write_set(write_tar, encode_image, ("cls", b"0"))
    evaluator = Evaluator(load_recipe(SMALL_RECIPE, RECIPE), shards)
    with pytest.raises(ConfigError, match="data.val is .*small.tar.*neither captions nor labels"):
        evaluator({"student": always(0)}, sees_the_object())

"""What tells of a blind mask: shares, agreement and losses by hand, and the warning."""

import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_recipe import SMALL_RECIPE

from aclip.config.recipe_file import load_recipe
from aclip.evaluation.mask_signals import (
    MaskSignals,
    MaskTeacher,
    agreement,
    caption_losses,
    is_below_zero,
)
from aclip.method.masks.policy import Selection, kept_patches
from aclip.models.student import build_student
from aclip.reports.kept_patches import PictureSet
from aclip.training.evaluated_models import mask_teacher
from aclip.training.teacher import Teacher

SIDE, NUM = 4, 64
OBJECT, CORNER = (slice(0, 2), slice(0, 2)), (slice(2, 4), slice(2, 4))
WORDS = ["the teacher looks past what captions speak of"]


def pictured(mask, object_known=True, captioned=NUM):
    """Samples of 4 x 4 patches whose object has the upper left four; views are the whole image."""
    coverage = torch.full((NUM, 2, SIDE, SIDE), 0.0 if object_known else math.nan)
    if object_known:
        coverage[(..., *OBJECT)] = 1.0
    box = torch.tensor([0, 0, SIDE, SIDE], dtype=torch.int32)
    return PictureSet(
        images=torch.zeros(NUM, 3, 8, 8, dtype=torch.uint8),
        captions=[str(number) for number in range(NUM)],
        is_captioned=torch.arange(NUM) < captioned,
        student_views=torch.zeros(NUM, 2, 3, 8, 8, dtype=torch.uint8),
        colors=None,
        teacher_box=box.repeat(NUM, 1),
        view_boxes=box.repeat(NUM, 2, 1),
        noise=torch.rand(NUM, 2, SIDE, SIDE, generator=torch.Generator().manual_seed(0)),
        coverage=coverage,
        mask=mask,
        skipped=Counter(),
    )


def attention_on(*places):
    """(n, 4, 4): 1 on each patch, and as much again for each place that holds it."""
    scores = torch.ones(NUM, SIDE, SIDE)
    for place in places:
        scores[(slice(None), *place)] += 1
    return scores


def knows_captions_by(patch):
    """A teacher whose embeds of an image fit its caption only if this patch is shown."""

    def embed_kept(views, selection):
        shown = kept_patches(selection, SIDE)
        is_shown = (shown == patch).any(2).float()
        return torch.eye(NUM).unsqueeze(1) * is_shown.unsqueeze(2) + 1e-3

    return MaskTeacher(lambda views: None, embed_kept, lambda texts: torch.eye(NUM)[: len(texts)])


def signals_of(overrides=(), **options):
    recipe = load_recipe(SMALL_RECIPE, ["mask.block_size=1", "mask.keep_ratio=0.25", *overrides])
    return MaskSignals(recipe, pictured(recipe.mask, **options))


def test_agreement_is_the_share_of_patches_that_were_kept_before():
    before = torch.tensor([[[0, 1, 2], [3, 4, 5]]])
    now = torch.tensor([[[0, 2, 7], [3, 4, 5]]])
    assert agreement(now, before, 9) == pytest.approx(5 / 6)


def test_a_samples_loss_is_its_part_of_the_contrastive_loss():
    generator = np.random.default_rng(0)
    images, texts = generator.normal(size=(3, 2, 5)), generator.normal(size=(3, 5))
    expected = np.zeros(3)
    for view in range(2):
        cosines = np.array(
            [[i @ t / math.sqrt((i @ i) * (t @ t)) for t in texts] for i in images[:, view]]
        )
        odds = np.exp(7 * cosines)
        for n in range(3):
            right = odds[n, n]
            both = math.log(odds[n].sum() / right) + math.log(odds[:, n].sum() / right)
            expected[n] += both / 4
    losses = caption_losses(torch.from_numpy(images), torch.from_numpy(texts), 7.0)
    np.testing.assert_allclose(losses.numpy(), expected)


@pytest.mark.parametrize(
    "numbers, is_below",
    [
        ([-1.0, -1.1, -0.9, -1.0], True),
        # Mean -0.5, deviation 1, and so an error of 0.5: not more than two of them.
        ([-1.0, 0.0, 1.0, -2.0], False),
        ([1.0, 1.1, 0.9, 1.0], False),
        ([-1.0], False),
        ([], False),
        ([math.nan, -1.0, -1.0], False),
    ],
)
def test_a_mean_is_below_0_by_more_than_two_standard_errors_or_not(numbers, is_below):
    assert is_below_zero(torch.tensor(numbers)) is is_below


@pytest.mark.parametrize(
    "overrides, progress, share",
    [
        pytest.param([], 0.5, 8 / 20, id="attentive"),
        pytest.param(["mask.policy=inverse"], 0.5, 4 / 20, id="inverse"),
        pytest.param(["mask.warmup=0.2"], 0.2, 8 / 20, id="after the warm-up"),
    ],
)
def test_attention_kept_is_the_share_on_what_the_mask_keeps(overrides, progress, share):
    # Four patches of 16 are kept; four have an attention of 2, and the others of 1.
    signals = signals_of(overrides)
    metrics, _ = signals.measure(knows_captions_by(0), attention_on(OBJECT), progress)
    assert metrics["attention_kept"] == pytest.approx(share)


def test_while_noise_decides_the_mask_keeps_the_share_that_a_random_one_keeps():
    signals = signals_of(["mask.warmup=0.2"])
    metrics, _ = signals.measure(knows_captions_by(0), attention_on(OBJECT), 0.1)
    kept = signals._pictured.keep_ids("random")
    expected = attention_on(OBJECT).flatten(1)[:, None].expand(-1, 2, -1).gather(2, kept).sum(2)
    assert metrics["attention_kept"] == pytest.approx((expected / 20).mean().item())
    flat, _ = signals.measure(knows_captions_by(0), attention_on(), 0.1)
    assert flat["attention_kept"] == pytest.approx(4 / 16)


def test_agreement_comes_from_the_second_time_on_and_tells_of_the_scores():
    signals = signals_of(["mask.warmup=0.5"])
    found = [
        signals.measure(knows_captions_by(0), attention_on(place), 0.1)[0].get("agreement")
        for place in (OBJECT, OBJECT, CORNER)
    ]
    assert found == [None, 1.0, 0.0]


def test_agreement_compares_as_many_patches_where_the_number_changes():
    # A quarter of 16 patches at first; all of them at the end, which always agree.
    signals = signals_of(["mask.keep_ratio_end=1"])
    found = [
        signals.measure(knows_captions_by(0), attention_on(place), progress)[0].get("agreement")
        for place, progress in ((OBJECT, 0.0), (OBJECT, 0.5), (CORNER, 0.5), (OBJECT, 1.0))
    ]
    # In the middle ten are kept: with the object 0 to 9; with the corner its four and 0 to 5.
    assert found == [None, 1.0, pytest.approx(0.6), 1.0]


def test_a_mask_that_keeps_everything_is_not_warned_of():
    signals = signals_of(["mask.keep_ratio_end=1"])
    assert signals.measure(knows_captions_by(0), attention_on(CORNER), 0.0)[1]
    metrics, warning = signals.measure(knows_captions_by(0), attention_on(CORNER), 1.0)
    assert metrics == {"attention_kept": pytest.approx(1.0), "agreement": 1.0}
    assert warning == ""


def test_losses_tell_where_captions_are_understood():
    metrics, _ = signals_of().measure(knows_captions_by(0), attention_on(OBJECT), 1.0)
    # Patch 0 is the object's: with it an image fits its caption alone, without it any caption.
    assert metrics["loss_kept"] < 0.01
    assert metrics["loss_dropped"] == pytest.approx(math.log(NUM))
    without, _ = signals_of(captioned=0).measure(knows_captions_by(0), attention_on(), 1.0)
    assert list(without) == ["attention_kept"]


@pytest.mark.parametrize(
    "place, options, overrides, progress, words",
    [
        pytest.param(OBJECT, {}, [], 1.0, None, id="sees the object"),
        pytest.param(
            CORNER, {}, [], 0.0, ["hold 0.0 % of the objects' patches, but 25.0 %", "warmup=0.25"],
            id="sees another corner",
        ),
        pytest.param(CORNER, {}, ["mask.policy=inverse"], 1.0, ["hold 0.0 %"], id="inverse"),
        pytest.param(CORNER, {}, ["mask.warmup=0.2"], 0.1, None, id="warms up"),
        pytest.param(
            CORNER, {}, ["mask.warmup=0.2"], 0.2, ["a longer mask.warmup than 0.2"],
            id="has warmed up",
        ),
        pytest.param(OBJECT, {"object_known": False}, [], 0.01, None, id="kept patches tell more"),
        pytest.param(
            CORNER, {"object_known": False}, [], 0.01,
            ["of the most attention (loss 4.159) no better than as many of the least (0.0"],
            id="dropped patches tell more",
        ),
        pytest.param(
            CORNER, {"object_known": False, "patch": 5}, [], 0.01,
            ["(loss 4.159) no better than as many of the least (4.159)"], id="neither tell more",
        ),
        pytest.param(CORNER, {"object_known": False}, [], 0.0, None, id="before training"),
        pytest.param(
            CORNER, {"object_known": False, "captioned": 63}, [], 1.0, None, id="few captions"
        ),
        pytest.param(
            CORNER, {"object_known": False, "captioned": 0}, [], 1.0, None, id="nothing known"
        ),
    ],
)  # fmt: skip
def test_a_teacher_that_looks_past_the_objects_is_warned_of(
    place, options, overrides, progress, words
):
    options = dict(options)
    teacher = knows_captions_by(options.pop("patch", 0))
    signals = signals_of(overrides, **options)
    _, warning = signals.measure(teacher, attention_on(place), progress)
    assert (warning == "") is (words is None)
    assert all(word in warning for word in (WORDS + words if words else []))


def stepper_of(*overrides):
    """What an evaluation reads of a run's stepper, with tiny towers."""
    tiny = [
        "model.image.resolution=32",
        "teacher.resolution=32",
        "model.image.kwargs={patch_size: 8, embed_dim: 24, depth: 2, num_heads: 2}",
        "model.text={width: 16, heads: 2, layers: 1, context_length: 16}",
        "model.embed_dim=12",
    ]
    recipe, device = load_recipe(SMALL_RECIPE, [*tiny, *overrides]), torch.device("cpu")
    teacher = Teacher(build_student(recipe), torch.float32, device)
    return SimpleNamespace(recipe=recipe, teacher=teacher, device=device, dtype=torch.float32)


def test_a_mask_is_measured_by_the_scores_of_the_blocks_that_the_run_reads():
    stepper = stepper_of("teacher.score_layers=1")
    views = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    scores = mask_teacher(stepper).scores(views)
    stepper.teacher.model.image.vit.blocks[0].attn.qkv.weight.data[24:48] = 0  # its keys
    flat = mask_teacher(stepper).scores(views)
    assert flat.std() < 1e-6 < scores.std()


def test_a_runs_teacher_embeds_what_is_kept_of_each_view_and_nothing_else():
    of_run = mask_teacher(stepper_of())
    views = torch.randint(0, 256, (3, 2, 3, 32, 32), dtype=torch.uint8)
    scores = torch.zeros(3, 2, 4, 4)
    scores[:, 0, :2] = scores[:, 1, 2:] = 1  # the upper half of one view, the lower of the other
    selection = Selection(scores, None, None, num_kept_blocks=2, block_size=2)
    embeds = of_run.embed_kept(views, selection)
    assert embeds.shape == (3, 2, 12)
    dropped, kept = views.clone(), views.clone()
    dropped[:, 0, :, 16:] = dropped[:, 1, :, :16] = 0
    kept[:, 0, :, :16] = 0
    torch.testing.assert_close(of_run.embed_kept(dropped, selection), embeds)
    is_same = torch.isclose(of_run.embed_kept(kept, selection), embeds).all(2)
    assert is_same.tolist() == [[False, True]] * 3
    assert of_run.embed_texts(["a", "a longer one"]).shape == (2, 12)
    assert of_run.scores(views[:, 0]).shape == (3, 4, 4)
